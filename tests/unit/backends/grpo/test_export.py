"""An export holds one file in memory, merges adapters, and is checked by the headers of its files."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from pgenrm_train.backends.grpo import export as exporting
from pgenrm_train.backends.grpo.engine import check_export
from pgenrm_train.config import ROOT
from pgenrm_train.errors import ArtifactError

NANO = ROOT / "tests/data/psi_nano"


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def exported(one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(folder, sharded model with adapters, bytes of each file) of an untied Llama in files of 60 kB."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(NANO)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(shape), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    fully_shard(model)
    sizes: list[int] = []

    def save(state: dict[str, torch.Tensor], *args: Any, **rest: Any) -> None:
        sizes.append(sum(tensor.nbytes for tensor in state.values()))
        write(state, *args, **rest)

    write = exporting.save_file
    monkeypatch.setattr(exporting, "save_file", save)
    monkeypatch.setattr(exporting, "SHARD", "60KB")
    settings = SimpleNamespace(lora_rank=4, lora_alpha=8, hf_config=shape)
    folder = tmp_path / "checkpoint"
    export = exporting.Export(model, settings, folder, torch.float32, "cpu")
    for number in range(export.begin()):
        export.write(number)
    tokenizer.save_pretrained(folder)
    return folder, model, sizes


def test_the_export_is_the_actor_and_no_file_is_larger_than_a_shard(exported: Any) -> None:
    from transformers import AutoModelForCausalLM

    folder, model, sizes = exported
    check_export(folder)
    assert len(sizes) > 1 and max(sizes) <= 60_000
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
        torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_an_export_is_checked_without_reading_a_weight(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import PreTrainedModel

    folder, *_ = exported
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    check_export(folder)
    first = next(iter(sorted(folder.glob("*.safetensors"))))
    state = load_file(first)
    name = next(iter(state))
    save_file({**state, name: torch.zeros(3)}, first)
    with pytest.raises(ArtifactError, match=rf"differs .* in 1 tensors, the first {name}: shape \[3\]"):
        check_export(folder)
    state.pop(name)
    save_file(state, first)
    with pytest.raises(ArtifactError, match=f"the first {name}: shape None instead of"):
        check_export(folder)
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="is damaged"):
        check_export(folder)
