"""Checks fail before a weight is loaded; the published checkpoint equals the trained one."""

import dataclasses
import shutil
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig

from data_builders.sources.personaworld import build
from eval.studies.evaluation import Validation
from pgenrm_train.backends.protocols import GenerationRequest
from pgenrm_train.backends.sft.checks import check_libraries, encode_rows, inspect_start
from pgenrm_train.backends.sft.engine import merge_adapter
from pgenrm_train.backends.sft.generate import TrainingGenerator
from pgenrm_train.chains.chain import Chain, parse_chain
from pgenrm_train.chains.totals import STOP, close_chain
from pgenrm_train.config import (
    ROOT,
    TRAINED,
    Config,
    DataConfig,
    LoraConfig,
    PsiConfig,
    StageName,
    load,
)
from pgenrm_train.errors import ArtifactError, ConfigError, DataError, PGenRMError
from pgenrm_train.files import write_table
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.writer import PromptWriter
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.stages.model_card import write_card
from pgenrm_train.stages.registry import REGISTRY
from recipes import psi
from recipes.wiring.models import load_tokenizer

NANO = ROOT / "tests" / "data" / "psi_nano"
SKIPPED = "preflight.skip=[disk,memory,versions,fit]"  # an 8B model does not fit here


def chat(answer, question="Which?"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# ---- before any weight is loaded ----


def test_the_shipped_model_can_be_started_from():
    config = load("recipe=psi")
    start = inspect_start(config, NANO)
    assert start.limit == config.model.max_prompt_tokens + config.model.max_response_tokens
    config.model.max_prompt_tokens = 100_000
    assert inspect_start(config, NANO).limit == 1024  # the model's positions


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="is not a model that PSI can start from"):
        inspect_start(Config(), tmp_path)


def test_a_missing_chat_template_is_refused(tmp_path):
    shutil.copytree(NANO, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template"):
        inspect_start(Config(), tmp_path / "base")
    with pytest.raises(DataError, match="has no chat template"):
        load_tokenizer(tmp_path / "base")


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    settings = shutil.copytree(NANO, tmp_path / "base") / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"eos_token": "<|end|>"', '"eos_token": null'))
    with pytest.raises(DataError, match=r"the tokenizer of .*base has no eos_token"):
        inspect_start(Config(), tmp_path / "base")


def test_a_start_that_psi_would_refuse_is_refused_before_any_chain_is_made(tmp_path):
    (tmp_path / "model").mkdir()
    overrides = (
        "model=llama31_8b",
        "cluster=cpu",
        f"model.path={tmp_path / 'model'}",
        f"run_dir={tmp_path / 'run'}",
        "tracking=none",
    )
    with pytest.raises(PGenRMError, match=r"model is not a"):
        psi.run(load("recipe=psi", *overrides, SKIPPED))
    assert not (tmp_path / "run" / "build_data").exists()
    shutil.copytree(NANO, tmp_path / "base")
    overrides = (
        *overrides[:2],
        f"model.path={tmp_path / 'base'}",
        *overrides[3:],
        "model.lora.rank=4",
        "model.lora.target_modules=[nope]",
    )
    with pytest.raises(ConfigError, match="target_modules=nope names no linear layer"):
        psi.run(load("recipe=psi", *overrides, SKIPPED))
    assert not (tmp_path / "run" / "build_data").exists()
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    (tmp_path / "base" / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}<model>{% endif %}"
    )
    for kind in ("nano", "llama31_8b"):
        with pytest.raises(DataError, match="base: the chat template renders a prompt that is not a prefix"):
            psi.run(load("recipe=psi", f"model={kind}", *overrides[1:4], SKIPPED))
        assert not (tmp_path / "run" / "build_data").exists()


def test_a_run_may_resume_with_another_interval_of_saving():
    """Settings bind a run folder only if a step of training depends on them."""
    for stage in (REGISTRY[name] for name in TRAINED):
        assert not {f"{stage.name}.save_every", f"{stage.name}.keep_checkpoints"} & set(stage.reads)
        assert f"{stage.name}.learning_rate" in stage.reads
    assert "curriculum.schedule" in REGISTRY[StageName.CURRICULUM].reads


def test_a_card_names_the_base_model(tmp_path):
    folder = StageFolder.read(tmp_path, "psi")
    folder.begin(config={}, settings={}, inputs={}, seed=0)
    (folder.path / "checkpoint").mkdir()
    for more, base, hub in (
        ((), "Llama-3.1-8B-Instruct", "base_model: meta-llama/Llama-3.1-8B-Instruct"),
        ((f"model.path={tmp_path / 'mine'}",), "mine", None),
    ):
        trained = {"steps": 3, "metrics": {"psi/peak_learning_rate": 1e-05}}
        write_card(load("recipe=psi", "model=llama31_8b", *more), REGISTRY[StageName.PSI], folder, trained)
        card = (folder.path / "checkpoint" / "README.md").read_text()
        assert f"| base model | {base} |" in card and "| learning rate | 1e-05 |" in card
        assert (hub in card) if hub else ("base_model" not in card)


def test_an_unknown_lora_target_is_refused_with_the_list_of_layers():
    config = load("recipe=psi")
    config.model.lora = LoraConfig(rank=4, target_modules=["q_proj", "qkv"])
    with pytest.raises(
        ConfigError,
        match=r"target_modules=qkv names no linear layer of the model; it has down_proj, gate_proj, k_proj",
    ):
        inspect_start(config, NANO)


def test_heads_that_processes_cannot_share_are_refused():
    config = load("recipe=psi")
    heads = AutoConfig.from_pretrained(NANO).num_attention_heads
    config.psi.sequence_parallel = heads
    inspect_start(config, NANO)
    config.psi.sequence_parallel = heads + 1
    with pytest.raises(
        ConfigError, match=rf"psi.sequence_parallel={heads + 1} does not divide the model's {heads} heads"
    ):
        inspect_start(config, NANO)


def test_an_adapter_on_the_output_head_is_refused():
    config = load("recipe=psi")
    config.model.lora = LoraConfig(rank=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match="must not name the output head"):
        inspect_start(config, NANO)


def test_another_shape_or_adapter_is_another_model():
    plain, adapted = Config(), Config()
    adapted.model.lora = LoraConfig(rank=4)
    assert inspect_start(plain, NANO).identity == inspect_start(Config(), NANO).identity
    assert inspect_start(plain, NANO).identity != inspect_start(adapted, NANO).identity


def test_chats_that_are_too_long_are_counted_and_the_first_is_named(tmp_path):
    tokenizer = inspect_start(Config(), NANO).tokenizer
    rows = tmp_path / "sec.parquet"
    write_table(rows, [chat("short"), chat("long " * 90), chat("longer " * 200), chat("short")])
    sizes = [len(c.ids) for c in encode_rows(tokenizer, rows, 10_000)]
    with pytest.raises(
        DataError,
        match="2 of 4 chats are longer than the model's limit of 80 tokens, "
        f"the first in row 1 with {sizes[1]}",
    ):
        encode_rows(tokenizer, rows, 80)


def test_an_empty_table_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([chat("a")]).slice(0, 0)
    pq.write_table(table, tmp_path / "sec.parquet")
    with pytest.raises(DataError, match="holds no chains to train on"):
        encode_rows(inspect_start(Config(), NANO).tokenizer, tmp_path / "sec.parquet", 80)


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_a_missing_kernel_library_is_refused():
    with pytest.raises(ConfigError, match=r"psi.liger=true needs the package liger-kernel"):
        check_libraries(PsiConfig(liger=True))
    check_libraries(PsiConfig())


# ---- publishing ----


def test_a_merged_adapter_gives_the_logits_of_base_and_adapter(tmp_path):
    from peft import LoraConfig as Adapter
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = load("recipe=psi")
    base = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    model = get_peft_model(
        base,
        Adapter(r=4, lora_alpha=8, target_modules=config.model.lora.target_modules, task_type="CAUSAL_LM"),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero before training
            torch.nn.init.normal_(weight, std=0.1)
    ids = torch.randint(0, 600, (2, 30))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / "adapter")
        merge_adapter(NANO, tmp_path / "adapter", tmp_path / "merged", config)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
        assert not torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-2)


# ---- accuracy while training ----


@pytest.fixture(scope="module")
def training():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = load("recipe=psi", "pipeline.budget=smoke")
    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32).eval()
    return config, TrainingGenerator(config.model, model, AutoTokenizer.from_pretrained(NANO), batch_size=8)


@pytest.fixture(scope="module")
def validation(training):
    config, generator = training
    pairs = list(build(DataConfig(users=4, heldout_users=2, pairs_per_user=6), seed=1))
    sampler, chosen = HistorySampler(pairs, size=3, policy="random"), [p for p in pairs if p.trains][:3]
    writer = PromptWriter(config.model, generator.tokenizer)
    return Validation(config, chosen, {p.pair_id: sampler(p) for p in chosen}, writer)


def test_a_trained_model_is_scored_by_generation(training, validation):
    _, generator = training
    state = torch.get_rng_state()
    result = validation(generator)
    assert torch.equal(torch.get_rng_state(), state)  # validation does not change the draws of training
    assert 0 <= result.metrics["eval/accuracy"] <= 1
    assert result.metrics["eval/format_failures"] + sum(row["failure"] is None for row in result.samples) == 6
    assert {"eval/order_flip_rate", "eval/ties"} <= set(result.metrics) and len(result.samples) == 6
    assert any(isinstance(parse_chain(row["text"]), Chain) for row in result.samples)


def test_answers_do_not_depend_on_the_batch(training, validation):
    config, generator = training
    one_by_one = TrainingGenerator(config.model, generator.model, generator.tokenizer, batch_size=1)
    requests = validation.requests[:3]
    texts = [{a.key: a.text for a in g(requests, temperature=0.0)} for g in (generator, one_by_one)]
    assert texts[0] == texts[1] and len(texts[0]) == 3


def test_generation_of_an_open_chain_ends_before_its_totals(training, validation):
    config, generator = training
    by_code = dataclasses.replace(config.model, totals="code")
    stopped = TrainingGenerator(by_code, generator.model, generator.tokenizer, batch_size=8)
    requests = validation.requests[:3]
    complete = {a.key: a for a in generator(requests, temperature=0.0)}
    for answer in stopped(requests, temperature=0.0):
        whole, head = complete[answer.key], answer.text.partition(STOP)[0]
        assert answer.failure is None and answer.tokens < whole.tokens
        assert whole.text.startswith(head) and parse_chain(answer.text).kind == "no_markers"
        assert close_chain(answer.text) == close_chain(whole.text)


def test_answers_that_do_not_end_and_prompts_that_do_not_fit_are_failures(training):
    config, generator = training
    config.model.max_response_tokens, before = 4, config.model.max_response_tokens
    long = GenerationRequest("long", ({"role": "user", "content": "word " * 2000},))
    short = GenerationRequest("short", ({"role": "user", "content": "word"},), samples=2)
    failures = {(a.key, a.sample): a.failure for a in generator([long, short], temperature=1.0)}
    config.model.max_response_tokens = before
    assert failures == {("long", 0): "prompt_too_long", ("short", 0): "length", ("short", 1): "length"}
