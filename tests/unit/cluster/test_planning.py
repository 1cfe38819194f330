"""The plan: published parameter counts, memory by the formulas, batches, and a change that fits."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pgenrm_train.cluster.planning import memory
from pgenrm_train.cluster.planning.advice import apply, grpo_batches, problems_of, psi_batches
from pgenrm_train.cluster.planning.geometry import KNOWN, geometry_of, read_geometry
from pgenrm_train.cluster.planning.plan import plan_of
from pgenrm_train.cluster.planning.table import show
from pgenrm_train.cluster.planning.work import generation_rate, lengths, pairs_of, with_planned_sizes
from pgenrm_train.config import CONFIG_DIR, ROOT, Config, load
from pgenrm_train.config.stage_names import PLANNED, StageName
from pgenrm_train.errors import ConfigError
from pgenrm_train.files import write_table

WITHOUT_WEIGHTS = ("endpoint", "baseline", "callable", "reward_head")
MODELS = sorted({path.stem for path in (CONFIG_DIR / "model").glob("*.yaml")} - set(WITHOUT_WEIGHTS))
CLUSTERS = sorted(path.stem for path in (CONFIG_DIR / "cluster").glob("*.yaml"))
PUBLISHED = {  # parameter counts on the models' hub pages
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen3-8B": 8_190_735_360,
}
GIB = 2**30


def composed(model: str, cluster: str, *more: str) -> Config:
    return load("recipe=plan", f"model={model}", f"cluster={cluster}", "data=chatbot_arena", *more)


@pytest.fixture(scope="module")
def eight() -> Config:
    return composed("llama31_8b", "gpu8")


def changed(config: Config, **keys: object) -> Config:
    return apply(config, (tuple((key.replace("__", "."), value) for key, value in keys.items()),))


def test_with_lora_the_old_policy_is_taken_again(eight: Config) -> None:
    """veRL cannot take the sampler's log-probabilities then, so there are two passes and not one."""
    hours = []
    for config in (eight, changed(eight, model__lora__rank=64)):
        stages = plan_of(changed(config, plan__stage="cre")).stages
        hours.append(stages[0].work.hours["log-probabilities"])
    assert hours[1] == pytest.approx(2 * hours[0])


def test_a_note_names_zero_2_where_it_suffices(eight: Config) -> None:
    def notes(config: Config) -> str:
        return " ".join(
            note
            for phase in plan_of(changed(config, plan__stage="psi")).stages[0].phases
            for note in phase.notes
        )

    assert "cluster.zero_stage=2 fits with 42.5 GiB" in notes(changed(eight, cluster__zero_stage=3))
    assert "zero_stage" not in notes(changed(eight, cluster__zero_stage=2))
    large = changed(composed("llama31_70b_lora", "gpu8"), cluster__zero_stage=3)
    assert "zero_stage" not in notes(large), "131 GiB of weights"
    assert "cluster.zero_stage=null is 2: the lowest that takes at most 80% of a GPU" in notes(eight)


@pytest.mark.parametrize(
    ("model", "cluster", "card", "stage"),
    [
        ("llama31_8b", "gpu8", "h200", 1),  # 2Ψ weights and 4Ψ gradients, 60 GiB, and a twelfth of the rest
        ("llama31_8b", "gpu8", "h100", 2),
        ("llama31_8b", "gpu8", "l40s", 3),
        ("llama31_8b", "multi_node", "h100", 1),  # a quarter of gpu8's optimizer per GPU
        ("llama31_70b_lora", "multi_node", "h200", 3),
    ],
)
def test_the_zero_stage_is_the_lowest_with_room(model: str, cluster: str, card: str, stage: int) -> None:
    config = with_planned_sizes(composed(model, cluster, f"plan.card={card}"))
    geometry = geometry_of(config)
    chosen = memory.with_zero_stage(config, geometry)
    assert chosen.cluster.zero_stage == stage

    def room(stage: int) -> float:
        phases = memory.psi_phases(changed(config, cluster__zero_stage=stage), geometry)
        return max(phase.total / phase.available for phase in phases)

    assert room(stage) <= memory.ROOM < min([room(lower) for lower in range(1, stage)], default=1.0)


def test_a_given_zero_stage_stays_and_one_gpu_takes_two(eight: Config) -> None:
    geometry = geometry_of(eight)
    given = changed(eight, cluster__zero_stage=3)
    assert memory.with_zero_stage(given, geometry) is given
    alone = changed(eight, cluster__processes_per_node=1)
    assert memory.with_zero_stage(alone, geometry).cluster.zero_stage == 2
    assert memory.with_zero_stage(changed(eight, cluster__device="cpu"), geometry).cluster.zero_stage == 0


# ---- geometry ----


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_geometries_have_the_published_number_of_parameters(name: str) -> None:
    assert KNOWN[name].parameters == PUBLISHED[name]


def test_a_checkpoint_has_as_many_parameters_as_its_config_gives() -> None:
    from safetensors import safe_open

    folder = ROOT / "tests/data/psi_nano"
    with safe_open(folder / "model.safetensors", "np") as file:
        sizes = [
            math.prod(file.get_slice(name).get_shape())
            for name in sorted(file.keys())
            if name != "lm_head.weight"
        ]  # tied
    assert read_geometry(folder / "config.json").parameters == sum(sizes)


def test_a_local_checkpoint_is_read_instead_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((ROOT / "tests/data/psi_nano/config.json").read_text())
    assert geometry_of(composed("llama31_8b", "gpu8", f"model.path={tmp_path}")).hidden == 96


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has no field 'hidden_size'"),
        ("no json", "cannot be read"),
        ('{"hidden_size": "x"}', "cannot be read"),
    ],
)
def test_a_bad_config_json_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_geometry(tmp_path / "config.json")


def test_an_unknown_model_names_the_key_to_give() -> None:
    with pytest.raises(ConfigError, match=r"model\.name=someone/else is not one of .* give model\.path="):
        geometry_of(composed("llama31_8b", "gpu8", "model.name=someone/else"))


# ---- memory ----


def test_zero_divides_what_the_paper_divides(eight: Config) -> None:
    """ZeRO, table 1, with gradients in fp32 where there is ZeRO: 16Ψ, 6Ψ + 12Ψ/N, 2Ψ + 16Ψ/N, 18Ψ/N."""
    geometry = geometry_of(eight)
    psi, n = geometry.parameters / GIB, 8
    for stage, expected in enumerate(
        (16 * psi, 6 * psi + 12 * psi / n, 2 * psi + 16 * psi / n, 18 * psi / n)
    ):
        parts, host = memory.zero_states(changed(eight, cluster__zero_stage=stage), geometry)
        states = sum(parts[name] for name in ("weights", "gradients", "optimizer"))
        assert states == pytest.approx(expected) and host == {}


def test_an_offloaded_optimizer_moves_to_the_host(eight: Config) -> None:
    parts, host = memory.zero_states(
        changed(eight, cluster__offload_optimizer=True, cluster__zero_stage=3), geometry_of(eight)
    )
    assert "optimizer" not in parts and host["offloaded optimizer"] == pytest.approx(
        16 * geometry_of(eight).parameters / GIB
    )


def test_lora_trains_little_and_keeps_the_base(eight: Config) -> None:
    geometry, lora = geometry_of(eight), changed(eight, model__lora__rank=64, cluster__zero_stage=0)
    parts, _ = memory.zero_states(lora, geometry)
    assert parts["weights"] == pytest.approx(2 * geometry.parameters / GIB)
    assert (
        memory.trained_parameters(lora, geometry) == 167_772_160
    )  # as peft prints for rank 64 on all seven matrices of 8B
    assert parts["optimizer"] < 0.03 * 12 * geometry.parameters / GIB


def test_checkpointing_keeps_less_and_flash_attention_less_than_eager(eight: Config) -> None:
    geometry = geometry_of(eight)

    def peak(config: Config) -> float:
        return memory.psi_phases(config, geometry)[0].total

    whole = changed(eight, psi__gradient_checkpointing=False)
    assert peak(eight) < peak(whole)
    (note, *_), (other, *_) = (memory.psi_phases(config, geometry)[0].notes for config in (eight, whole))
    assert "with psi.gradient_checkpointing=false" in note and "with psi.gradient_checkpointing=true" in other
    per_token = [
        memory.layer_activations(geometry, 2, a, 4096) for a in ("flash_attention_2", "sdpa", "eager")
    ]
    assert per_token == sorted(per_token) and len(set(per_token)) == 3


def test_logits_of_psi_are_those_of_one_piece(eight: Config) -> None:
    """In the pieces of its loss: all logits of 8,193 tokens over 128,256 words would be 11.7 GiB."""
    parts = memory.psi_phases(eight, geometry_of(eight))[0].parts
    assert parts.get("logits", 0.0) < 1.0 and sum(parts.values()) > 0


def test_a_trained_head_has_gradients_of_its_own() -> None:
    """One for one piece, three while those of two pieces are added; none with LoRA."""
    base = ("recipe=psi", "model=llama31_8b", "cluster=cpu", "psi.gradient_checkpointing=true")
    base += ("model.max_prompt_tokens=342", "model.max_response_tokens=170")
    head = 4 * 128_256 * 4096 / memory.GIB

    def logits(sequences: int, *more: str) -> float:
        batch = f"psi.micro_batch_size={sequences}"
        config = load(*base, batch, *more)
        return memory.psi_phases(config, geometry_of(config))[0].parts.get("logits", 0.0)

    assert 1 < logits(2) / head < 1.5
    assert 3 < logits(4) / head < 3.5
    assert logits(4, "model.lora.rank=16") < head


@pytest.mark.parametrize(
    "key", ["psi.micro_batch_tokens", "model.max_response_tokens", "model.max_prompt_tokens"]
)
def test_more_of_a_size_never_needs_less(eight: Config, key: str) -> None:
    grown = changed(eight, **{key.replace(".", "__"): 20_000})
    geometry = geometry_of(eight)
    assert memory.psi_phases(grown, geometry)[0].total > memory.psi_phases(eight, geometry)[0].total


def test_vllm_fills_its_share_and_more_gpus_leave_more_cache(eight: Config) -> None:
    geometry = geometry_of(eight)
    one, two = (
        memory.vllm_phase(eight, geometry, StageName.CRE, "rollout", memory.Serving(0.6, tp, 12288))
        for tp in (1, 2)
    )
    assert one.total == pytest.approx(0.6 * one.available) == two.total
    assert two.parts["vLLM KV cache"] > one.parts["vLLM KV cache"]


def test_a_served_judge_of_its_own_size_is_planned(eight: Config) -> None:
    judged = composed("llama31_8b", "gpu8", "judge=vllm", "judge.name=Qwen/Qwen3-8B")
    (phase,) = [p for p in memory.phases_of(judged, geometry_of(judged), "cre") if p.name.startswith("judge")]
    assert phase.fits and phase.parts["vLLM weights"] == pytest.approx(2 * PUBLISHED["Qwen/Qwen3-8B"] / GIB)
    unknown = composed("llama31_8b", "gpu8", "judge=vllm", "judge.name=some/judge")
    assert any(
        "not planned" in note
        for p in memory.phases_of(unknown, geometry_of(unknown), "cre")
        for note in p.notes
    )


# ---- the whole ----


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("model", MODELS)
def test_every_shipped_model_is_planned_on_every_cluster(model: str, cluster: str) -> None:
    batch = ["psi.batch_size=128", "psi.micro_batch_size=1"] if model == "nano" and cluster != "cpu" else []
    config = composed(model, cluster, *batch)
    plan = plan_of(config)
    assert [stage.stage for stage in plan.stages] == list(PLANNED)
    assert json.loads(json.dumps(plan.as_json()))["model"]["parameters"] == plan.geometry.parameters
    for stage in plan.stages:
        assert stage.fits == (stage.problems == ()) and stage.work.total_hours >= 0
        if stage.change:
            keys = tuple((text.split("=")[0], _value(text.split("=")[1])) for text in stage.change)
            assert not problems_of(apply(config, (keys,)), plan.geometry, stage.stage), "the advice must hold"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONFIG_DIR / "recipe").glob("*.yaml")))
def test_every_shipped_recipe_is_planned(recipe: str) -> None:
    for stage in plan_of(load(f"recipe={recipe}")).stages:
        assert stage.fits and stage.work.total_hours >= 0, stage.problems


@pytest.mark.parametrize("data", sorted(path.stem for path in (CONFIG_DIR / "data").glob("*.yaml")))
def test_every_shipped_data_set_is_planned(data: str) -> None:
    path = ["data.path=votes.jsonl"] if data in ("pairs", "rmgap") else []
    plan = plan_of(load("recipe=plan", f"data={data}", "model=llama31_8b", "cluster=gpu8", *path))
    assert plan.fits and plan.hours > 0 and plan.dollars > 0


@pytest.mark.parametrize("model", WITHOUT_WEIGHTS)
def test_a_model_without_weights_of_ours_is_refused_in_one_sentence(model: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of(load("recipe=plan", f"model={model}", "model.base_url=http://h/v1", checked=False))
    assert "\n" not in str(error.value)


def _value(text: str) -> object:
    return {"true": True, "false": False}[text] if text in ("true", "false") else json.loads(text)


EXPECTED = {  # (model, cluster) → stages that do not fit on 80 GB cards
    ("nano", "cpu"): set(),
    ("llama31_8b", "gpu8"): set(),
    ("qwen3_8b", "gpu8"): set(),
    ("llama31_70b_lora", "multi_node"): set(),
    ("llama31_8b", "gpu1"): {"cre", "curriculum"},
    ("llama31_70b_lora", "gpu1"): {"psi", "cre", "curriculum", "prototypes", "evaluate"},
}


@pytest.mark.parametrize(("model", "cluster"), EXPECTED)
def test_what_fits_on_the_shipped_clusters(model: str, cluster: str) -> None:
    plan = plan_of(composed(model, cluster))
    assert {stage.stage for stage in plan.stages if not stage.fits} == EXPECTED[model, cluster]


@pytest.mark.parametrize(
    ("keys", "stage", "problem", "change"),
    [
        ("cluster.tensor_parallel=16", "cre", "exceeds cluster.processes_per_node=8", "tensor_parallel=8"),
        (
            "cluster.processes_per_node=6 cluster.tensor_parallel=3",
            "evaluate",
            "does not divide the model's 32 heads",
            "cluster.tensor_parallel=2",
        ),
        (
            "cluster.processes_per_node=3 cluster.nodes=2 cluster.tensor_parallel=2",
            "cre",
            "must divide the 3 processes of cluster.processes_per_node",
            "cluster.tensor_parallel=1",
        ),
        ("psi.sequence_parallel=3", "psi", "must divide the 8 processes", "psi.sequence_parallel=2"),
        ("psi.batch_size=20", "psi", "the nearest is psi.batch_size=16", "psi.batch_size=16"),
        ("model.max_prompt_tokens=130000", "evaluate", "131072 positions", "model.max_prompt_tokens=122880"),
        ("teacher.gpus=1", "build_sec", "room for 0 tokens", "teacher.gpus=4"),
        ("teacher.gpus=3", "build_sec", "teacher.gpus=3 does not divide its model's 64", "teacher.gpus=4"),
    ],
)
def test_what_engines_refuse_is_planned_with_the_nearest_change(keys, stage, problem, change) -> None:
    served = ("teacher=vllm", "teacher.name=meta-llama/Llama-3.1-70B-Instruct", "teacher.gpus=4")
    config = composed("llama31_8b", "gpu8", *served, *keys.split())
    (plan,) = plan_of(changed(config, plan__stage=stage)).stages
    assert any(problem in text for text in plan.problems)
    assert plan.change is not None and change in plan.change[0] and len(plan.change) == 1


def test_the_nearest_change_has_no_needless_part() -> None:
    config = composed("llama31_70b_lora", "gpu1")
    (psi,) = plan_of(changed(config, plan__stage="psi")).stages
    assert psi.change is not None
    parts = [(text.split("=")[0], _value(text.split("=")[1])) for text in psi.change]
    assert not problems_of(apply(config, (tuple(parts),)), geometry_of(config), StageName.PSI)
    for left_out in parts:
        rest = tuple(part for part in parts if part is not left_out)
        assert problems_of(apply(config, (rest,)), geometry_of(config), StageName.PSI)


def test_a_fitting_change_is_found_for_batches_that_do_not_divide() -> None:
    batches = ("psi.batch_size=128", "cre.mini_batch_prompts=128", "cre.prompts_per_step=128")
    config = composed("llama31_8b", "gpu8", "cluster.processes_per_node=7", *batches)
    psi, cre = (stage for stage in plan_of(config).stages if stage.stage in ("psi", "cre"))
    assert psi.change == ("psi.batch_size=126",)
    assert cre.change == ("cre.mini_batch_prompts=126", "cre.prompts_per_step=126")


def test_batches_multiply_out(eight: Config) -> None:
    sized = with_planned_sizes(eight)
    assert psi_batches(sized).facts["tokens per process and pass"] == 16384
    sized.psi.packing = False
    psi, cre = psi_batches(sized).facts, grpo_batches(sized, StageName.CRE).facts
    assert psi["micro-batch"] * psi["processes"] * psi["accumulation"] == sized.psi.batch_size
    assert cre["rollouts per step"] == 512 and cre["micro-batch"] * cre["accumulation"] * 8 == 512
    sized.model.attention = "flash_attention_2"
    assert grpo_batches(sized, StageName.CRE).facts["tokens per process and pass"] == 24576


def test_a_group_is_read_once_and_mining_reads_both_orders(eight: Config) -> None:
    (work,) = (stage.work for stage in plan_of(changed(eight, plan__stage="curriculum")).stages)
    prompts = work.counts["rollouts"] // 8
    assert work.tokens["read"] == 2000 * (prompts + 2 * work.counts["pairs"])
    chains = work.counts["rollouts"] + work.counts["chains for mining"]
    assert work.tokens["read"] + work.tokens["from the prefix cache"] == 2000 * chains


# ---- work ----


def test_hours_follow_the_stated_rates(eight: Config) -> None:
    (psi,) = plan_of(changed(eight, plan__stage="psi", plan__pairs=12800)).stages
    tokens = 12800 * 2 * 3000  # both orders, one pass
    assert psi.work.tokens["trained on"] == tokens
    flops = 3 * tokens * geometry_of(eight).forward_flops(3000)
    assert psi.work.total_hours == pytest.approx(flops / (0.35 * 989e12 * 8) / 3600)
    assert flops == pytest.approx(6 * 8.03e9 * tokens, rel=0.1), "the usual 6N a token"


def test_a_measured_rate_replaces_the_estimate(eight: Config) -> None:
    assert (
        generation_rate(changed(eight, plan__tokens_per_second=1000.0), geometry_of(eight), 0.6, 256, 1024)
        == 8000.0
    )


def test_generation_is_bounded_by_reading_the_weights(eight: Config) -> None:
    geometry = geometry_of(eight)
    one = generation_rate(eight, geometry, 0.6, 1, 1e9) / 8
    assert one < 0.5 * 3.35e12 / (2 * geometry.parameters)
    assert generation_rate(eight, geometry, 0.6, 64, 1e9) / 8 > 20 * one


def test_evaluation_uses_every_replica(eight: Config) -> None:
    one, two = (changed(eight, plan__stage="evaluate", cluster__nodes=n) for n in (1, 2))
    hours = [plan_of(config).stages[0].work.hours["generation"] for config in (one, two)]
    assert hours[1] == pytest.approx(hours[0] / 2)


def test_nothing_of_the_table_is_cut_off_in_a_narrow_terminal(eight: Config) -> None:
    output = io.StringIO()
    show(plan_of(changed(eight, plan__stage="cre")), Console(file=output, width=80))
    assert "…" not in output.getvalue() and output.getvalue().count("fits") == 2


def test_pairs_come_from_the_data(tmp_path: Path, eight: Config) -> None:
    assert pairs_of(eight) == (305, 798, ())
    assert pairs_of(load("recipe=plan"))[0] == 3000 * 12
    votes = tmp_path / "votes.jsonl"
    votes.write_text('{"a": 1}\n' * 7)
    train, _, assumed = pairs_of(load("recipe=plan", "data=pairs", f"data.path={votes}"))
    assert train == 7 and "7 rows" in assumed[0]
    assert pairs_of(load("recipe=plan", "data=pairs", "data.path=none.jsonl"))[0] == 10_000


def test_held_out_users_are_no_training_pairs() -> None:
    plan = plan_of(composed("llama31_8b", "gpu8", "data.val_share=0.2", "plan.stage=cre"))
    assert plan.stages[0].sizes is not None and plan.stages[0].sizes.examples == 244


def test_lengths_are_at_most_the_models() -> None:
    assert lengths(load("recipe=plan")) == (640, 192)


def test_apis_are_paid_by_the_token() -> None:
    config = composed(
        "llama31_8b",
        "gpu8",
        "teacher=endpoint",
        "teacher.base_url=http://x/v1",
        "teacher.name=o3",
        "teacher.dollars_per_million_in=2",
        "teacher.dollars_per_million_out=8",
        "plan.stage=build_sec",
    )
    (sec,) = plan_of(config).stages
    calls = 305 * 2 * 4
    assert sec.work.api_dollars == pytest.approx(calls * (2000 * 2 + 1000 * 8) / 1e6)


def test_pairs_are_those_of_the_split_of_a_file(tmp_path: Path) -> None:
    votes = tmp_path / "votes.parquet"
    splits = ["train"] * 5 + [None] + ["val"] * 2 + ["test"] * 3
    write_table(votes, [{"user_id": "u", "split": split} for split in splits])
    keys = ("recipe=plan", "data=pairs", f"data.path={votes}")
    train, test, (assumed,) = pairs_of(load(*keys))
    assert (train, test) == (6, 3) and "6 rows of" in assumed
    assert pairs_of(load(*keys, "data.split_by=within_user"))[:2] == (11, 11)


# ---- the command ----


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pgenrm_train", "recipe=plan", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "160", "PATH": "/usr/bin"},
    )


def test_the_table_is_printed_and_nothing_is_made(tmp_path: Path) -> None:
    done = command("model=llama31_8b", "cluster=gpu1", "data=chatbot_arena", "plan.stage=cre", cwd=tmp_path)
    assert done.returncode == 1, "a plan that does not fit says so by its exit code"
    change = (
        "nearest change of cre that fits: model.lora.rank=64 model.lora.alpha=128 cre.learning_rate=1e-05"
    )
    assert "DOES NOT FIT" in done.stdout and change in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_is_printed_and_left_in_a_run_folder_that_exists(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = command("plan.json=true", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout) == json.loads(
        (tmp_path / "run" / "plan.json").read_text()
    )
    assert json.loads(done.stdout)["fits"] is True


MISTAKES = {
    "plan.stage=all_of_it": "plan.stage=all_of_it is not one of build_sec, psi",
    "plan.emit=pbs": "plan.emit=pbs is not one of slurm, rayjob, verl, deepspeed, vllm, or null",
    "plan.card=h300": "plan.card=h300 is not one of a100, h100",
    "model=baseline": "model=baseline trains nothing",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_end_in_one_sentence(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of(load("recipe=plan", override))
    assert MISTAKES[override] in str(error.value) and "\n" not in str(error.value)


HEAVY = ("torch", "ray", "verl", "vllm", "transformers", "pandas")


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys, recipes.plan, pgenrm_train.cluster.planning.plan\nprint([m for m in "
        + repr(HEAVY)
        + " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_nano_that_is_made_gives_its_vocabulary_and_nothing_else(tmp_path: Path) -> None:
    base = tmp_path / "build_sec" / "base"
    base.mkdir(parents=True)
    made = json.loads((ROOT / "tests/data/psi_nano/config.json").read_text())
    (base / "config.json").write_text(json.dumps(made | {"vocab_size": 777}))
    config = load("recipe=plan", "model.nano.layers=12", f"run_dir={tmp_path}")
    found = geometry_of(config)
    assert (found.layers, found.vocabulary) == (12, 777)
