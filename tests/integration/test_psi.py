"""PSI on real DeepSpeed: the shipped GPU settings take a real step here, with few, listed keys changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_builders.sources.personaworld import build
from data_builders.teachers.oracle import OracleTeacher
from pgenrm_train.backends.protocols import GenerationRequest, Validated
from pgenrm_train.backends.sft import engine as deepspeed_sft
from pgenrm_train.backends.sft.generate import is_sharded
from pgenrm_train.config import ROOT, Config, DataConfig, load
from pgenrm_train.files import write_table
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.masking import MaskedView, present
from pgenrm_train.prompts.messages import chat_messages
from pgenrm_train.run.tracking import METRICS, samples_file

NANO = ROOT / "tests" / "data" / "psi_nano"
# The only settings that differ from a GPU run.
CHANGED: dict[str, Any] = {
    "cluster.device": "cpu",
    "cluster.nodes": 1,
    "cluster.processes_per_node": 2,
    "model.dtype": "float32",
    "model.max_prompt_tokens": 256,
    "model.max_response_tokens": 24,
    "model.instructions": False,
    "psi.batch_size": 4,
    "psi.micro_batch_size": 1,
    "psi.log_every": 1,
    "psi.packing": True,  # as on a GPU
    "psi.max_steps": 2,  # the first step of the warm-up has a learning rate of 0
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few chats as build_sec writes them."""
    pairs = list(build(DataConfig(users=3, heldout_users=2, pairs_per_user=10), seed=0))
    history, teacher = HistorySampler(pairs, size=3, policy="random"), OracleTeacher()
    examples = [present(pair, history(pair), n % 2) for n, pair in enumerate(pairs[:16])]
    chats = [
        [
            *chat_messages(MaskedView(e.context, e.history, e.responses), instructions=False),
            {"role": "assistant", "content": teacher.write(e)},
        ]
        for e in examples
    ]
    path = tmp_path_factory.mktemp("rows") / "sec.parquet"
    write_table(path, [{"messages": chat} for chat in chats])
    return path


QUESTIONS = (
    "Which is better?",
    "Plan my report? " * 9,
    "Fix my knee?",
)  # more than processes, of unlike lengths
REQUESTS = [
    GenerationRequest(question[:4], ({"role": "user", "content": question},)) for question in QUESTIONS
]


def answers(config: Config) -> Any:
    """A validator that keeps the answers of the model in training, and scores each better than the last."""
    calls: list[int] = []

    def validate(generator: Any) -> Validated:
        calls.append(1)
        texts = {answer.key: answer.text for answer in generator(REQUESTS, temperature=0.0)}
        weights = list(generator.model.parameters())
        metrics = {
            "eval/accuracy": len(calls) / 2,
            "eval/partitioned": sum(not getattr(weight, "ds_persist", True) for weight in weights),
            "eval/sharded": is_sharded(generator.model),
        }
        return Validated(metrics, [{"text": texts[request.key]} for request in REQUESTS])

    return validate


def wide(folder: Path, shape: str) -> Path:
    """A base model with untied embeddings, and layers above the 100,000 weights that ZeRO-3 keeps whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
    config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[shape](
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
        **heads,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "cluster", "shape", "more"),
    [
        ("llama31_8b", "gpu8", "llama", "cluster.zero_stage=3"),
        ("qwen3_8b", "gpu1", "qwen3", "cluster.zero_stage=2"),
        ("llama31_70b_lora", "multi_node", "llama", "cluster.zero_stage=3"),
        ("qwen3_8b", "gpu8", "qwen3", "cluster.zero_stage=3"),
        ("qwen3_8b", "gpu8", "qwen3", "cluster.zero_stage=1 model.lora.rank=8"),
    ],
)
def test_gpu_settings_take_a_real_step(
    model: str,
    cluster: str,
    shape: str,
    more: str,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = wide(tmp_path / "start", shape)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    config = load("recipe=psi", f"model={model}", f"cluster={cluster}", *more.split())
    for key, value in CHANGED.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    config.psi.evaluate_every = 1
    (tmp_path / METRICS).write_text(
        '{"step": 1, "stage": "psi"}\n{"ste'
    )  # of a start that was killed before it saved
    trained = deepspeed_sft.train(
        config, rows, start=start, work_dir=tmp_path, validator=f"{__name__}:answers"
    )
    assert trained.steps == 2 == trained.metrics["psi/published_step"]
    logged = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    losses = {line["step"]: line["psi/loss"] for line in logged if "psi/loss" in line}
    assert list(losses) == [1, 2] and all(loss > 0 for loss in losses.values())
    speeds = [line for line in logged if "psi/loss" in line]
    assert all(line["psi/perf/throughput"] > 0 <= line["psi/perf/cpu_utilization"] <= 1 for line in speeds)
    measured = [line for line in logged if "eval/accuracy" in line]
    assert [line["step"] for line in measured] == [0, 1, 2]
    assert all(bool(line["eval/partitioned"]) == (config.cluster.zero_stage == 3) for line in measured)
    assert not any(line["eval/sharded"] for line in measured), "gathered once, not for every token"
    for step in (0, 1):  # the first step of the warm-up has a learning rate of 0
        answers_of_step = pq.read_table(samples_file(tmp_path / METRICS, step))["text"].to_pylist()
        assert answers_of_step == _answers_alone(config, start), (
            "the sharded model answers as an unsharded one"
        )
    _assert_trained(start, tmp_path / "checkpoint")


ACCUMULATED = """
import sys, json, deepspeed, torch
from pgenrm_train.backends.sft.rank import join_processes
from pgenrm_train.backends.sft.settings import deepspeed_settings, set_variables
from pgenrm_train.config import ClusterConfig, ModelConfig, PsiConfig
set_variables(ClusterConfig())
join_processes(ClusterConfig())
cluster = ClusterConfig(device="cuda", zero_stage=int(sys.argv[1]))
settings = deepspeed_settings(cluster, ModelConfig(), PsiConfig())
settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
settings["train_batch_size"] = 2
model = torch.nn.Linear(1, 1, bias=False)
engine, *_ = deepspeed.initialize(
    model=model, config=settings, optimizer=torch.optim.AdamW(model.parameters())
)
for value in (256.0, 1.0):
    engine.backward(engine(torch.tensor([[value]], dtype=torch.bfloat16)).sum())
print("GRADIENT", float(deepspeed.utils.safe_get_full_grad(model.weight)))
"""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_micro_batches_add_up_in_fp32(stage: int) -> None:
    """256 + 1 is 256 in bf16; each micro-batch counts half."""
    command = [sys.executable, "-c", ACCUMULATED, str(stage)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split("GRADIENT")[1]) == 128.5


def test_two_processes_that_share_each_sequence_learn_what_one_does(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ulysses under ZeRO-3 gives the losses, answers and weights of one process, up to rounding."""
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    start, logged, answers_of, weights = _few_key_heads(tmp_path / "start"), [], [], []
    for processes in (2, 1):
        shared = (
            f"cluster.processes_per_node={processes}",
            f"psi.sequence_parallel={processes}",
            "psi.micro_batch_size=1",
            "psi.cpu_processes=1",
            "psi.optimizer=adamw",
        )
        config = load("recipe=psi", *shared)
        config.cluster.zero_stage, config.psi.gradient_checkpointing = 3, True
        config.psi.batch_size, config.psi.learning_rate = 4, 1e-3
        config.psi.max_steps = config.psi.evaluate_every = 3
        config.psi.log_every, config.model.max_prompt_tokens, config.model.max_response_tokens = 1, 256, 24
        folder = tmp_path / str(processes)
        folder.mkdir()
        trained = deepspeed_sft.train(
            config, rows, start=start, work_dir=folder, validator=f"{__name__}:answers"
        )
        lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        logged.append([line["psi/loss"] for line in lines if "psi/loss" in line])
        answers_of.append(pq.read_table(samples_file(folder / METRICS, 3))["text"].to_pylist())
        weights.append(AutoModelForCausalLM.from_pretrained(trained.checkpoint).state_dict())
    assert len(logged[0]) == 3 and logged[0] == pytest.approx(logged[1], rel=1e-4)
    assert answers_of[0] == answers_of[1]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(value, weights[1][name], atol=1e-4) for name, value in weights[0].items())


def test_an_epoch_by_tokens_learns_what_one_by_sequences_does(rows: Path, tmp_path: Path) -> None:
    """Packed rows of a token budget give the losses and weights of padded micro-batches, up to rounding."""
    import torch
    from transformers import AutoModelForCausalLM

    losses, weights = [], []
    for packing in ("true", "false"):
        batches = ("psi.batch_size=6", "psi.micro_batch_size=3", "psi.micro_batch_tokens=700")
        alone = ("psi.cpu_processes=1", "psi.optimizer=adamw", "psi.epochs=1", "psi.log_every=1")
        config = load("recipe=psi", f"psi.packing={packing}", *batches, *alone)
        folder = tmp_path / packing
        folder.mkdir()
        trained = deepspeed_sft.train(config, rows, start=NANO, work_dir=folder)
        lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        losses.append([line["psi/loss"] for line in lines if "psi/loss" in line])
        weights.append(AutoModelForCausalLM.from_pretrained(trained.checkpoint).state_dict())
    assert len(losses[0]) == 3, "16 chats, so the last step is short"
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(torch.allclose(value, weights[1][name], atol=1e-4) for name, value in weights[0].items())


def _few_key_heads(folder: Path) -> Path:
    """A base model of four heads that share one key head."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    shape = AutoConfig.from_pretrained(NANO, num_attention_heads=4, num_key_value_heads=1)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(folder)
    return folder


def _answers_alone(config: Config, start: Path) -> list[str | None]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pgenrm_train.backends.sft.generate import TrainingGenerator

    whole = AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    generator = TrainingGenerator(
        config.model, whole, AutoTokenizer.from_pretrained(start), 8 * config.psi.micro_batch_size
    )
    texts = {answer.key: answer.text for answer in generator(REQUESTS, temperature=0.0)}
    return [texts[request.key] for request in REQUESTS]


def _assert_trained(start: Path, checkpoint: Path) -> None:
    """Check that the published checkpoint loads completely, without adapters, with changed weights."""
    import torch
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    after, loading = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    moved = [
        name for name, value in after.state_dict().items() if not torch.equal(value.float(), before[name])
    ]
    assert moved and not list(checkpoint.glob("*.bin")) and not list(checkpoint.glob("adapter*"))
