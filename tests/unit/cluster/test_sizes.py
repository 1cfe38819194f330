"""Batch, passes and steps follow from the data by one rule; given settings stay; poor ones get a sentence."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgenrm_train.cluster.planning.advice import apply
from pgenrm_train.cluster.planning.plan import plan_of
from pgenrm_train.cluster.sizes import FEW, MANY_PASSES, PASSES, settle_sizes, sizes_of, with_sizes
from pgenrm_train.config import TRAINED, Config, StageName, load
from pgenrm_train.config.checks import grpo_problems, psi_problems

EIGHT = load("recipe=plan", "model=llama31_8b", "cluster=gpu8", "data=chatbot_arena")
PSI, CRE, CURRICULUM = TRAINED


def given_keys(config: Config, *overrides: str) -> Config:
    """A copy with overrides like psi.batch_size=8."""
    changes = [text.split("=") for text in overrides]
    return apply(config, (tuple((key, None if v == "null" else int(v)) for key, v in changes),))


@pytest.mark.parametrize(
    ("model", "cluster", "orders"),
    [
        ("llama31_8b", "gpu1", 2),
        ("llama31_8b", "gpu8", 2),
        ("qwen3_8b", "gpu8", 1),
        ("llama31_70b_lora", "multi_node", 2),
    ],
)
def test_chatbot_arena_trains_enough_and_not_too_often(model: str, cluster: str, orders: int) -> None:
    plan = plan_of(
        load(
            "recipe=plan",
            *(f"model={model}", f"cluster={cluster}", "data=chatbot_arena"),
            f"sec.orders_per_pair={orders}",
        )
    )
    sizes = {stage.stage: stage.sizes for stage in plan.stages if stage.sizes}
    assert tuple(sizes) == TRAINED and not any(stage.warnings for stage in plan.stages)
    for stage, each in sizes.items():
        assert each.updates >= FEW and each.passes <= PASSES[stage]


@pytest.mark.parametrize(
    ("stage", "examples", "batch", "steps", "passes"),
    [
        (PSI, 610, 32, 60, 3.0),
        (PSI, 20_000, 128, 314, 2.0),
        (PSI, 100_000, 128, 782, 1.0),
        (CRE, 305, 64, 76, 16.0),
        (CURRICULUM, 8_192, 128, 200, 3.1),
        (CRE, 40, 16, 40, 16.0),
    ],
)
def test_the_rule(stage: StageName, examples: int, batch: int, steps: int, passes: float) -> None:
    sizes = sizes_of(with_sizes(EIGHT, stage, examples), stage, examples)
    assert (sizes.batch, sizes.steps, sizes.updates) == (batch, steps, steps)
    assert sizes.passes == pytest.approx(passes, rel=0.02)


@pytest.mark.parametrize(
    ("chains", "lora", "rate"), [(610, 0, 1e-5), (2_133, 0, 1e-5), (2_134, 0, 5e-6), (610, 64, 1e-4)]
)
def test_few_chains_and_adapters_are_learnt_at_a_higher_rate(chains: int, lora: int, rate: float) -> None:
    config = given_keys(EIGHT, f"model.lora.rank={lora}")
    sized = with_sizes(config, PSI, chains)
    assert sized.psi.learning_rate == pytest.approx(rate)
    assert str(sizes_of(sized, PSI, chains)).endswith(f"learning rate {rate:g}")
    assert with_sizes(given_keys(config, "psi.learning_rate=1"), PSI, chains).psi.learning_rate == 1


@given(
    st.integers(1, 100_000),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(2, 16),
    st.sampled_from(TRAINED),
)
def test_computed_batches_divide(
    examples: int, nodes: int, processes: int, micro: int, group: int, stage: StageName
) -> None:
    config = copy.deepcopy(EIGHT)
    config.cluster.nodes, config.cluster.processes_per_node = nodes, processes
    config.psi.micro_batch_size = config.cre.micro_batch_size = config.curriculum.micro_batch_size = micro
    config.cre.group_size = config.curriculum.group_size = group
    sized = with_sizes(config, stage, examples)
    assert (psi_problems(sized) if stage == PSI else grpo_problems(sized, stage)) == []
    sizes = sizes_of(sized, stage, examples)
    assert sizes.steps >= 1
    if examples >= sizes.batch:  # enough for one step of all processes
        assert sizes.passes <= PASSES[stage]


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does() -> None:
    config = given_keys(EIGHT, "psi.batch_size=2", "cre.mini_batch_prompts=4", "cre.group_size=9")
    (psi,) = psi_problems(with_sizes(config, PSI, 610))
    (cre,) = grpo_problems(with_sizes(config, CRE, 305), CRE)
    assert psi.endswith("the nearest is psi.batch_size=8")
    assert cre.endswith("the nearest is cre.mini_batch_prompts=8")


def test_given_sizes_stay() -> None:
    keys = ("psi.batch_size=8", "psi.epochs=5", "cre.steps=7", "cre.mini_batch_prompts=48")
    config = given_keys(EIGHT, *keys)
    assert (config.psi.batch_size, config.psi.epochs) == (8, 5)
    psi, cre = with_sizes(config, PSI, 610).psi, with_sizes(config, CRE, 305).cre
    assert (psi.batch_size, psi.epochs) == (8, 5)
    assert (cre.steps, cre.mini_batch_prompts, cre.prompts_per_step) == (7, 48, 48)
    assert EIGHT.psi.batch_size is None, "the configuration itself is not changed"


@pytest.mark.parametrize(("budget", "steps"), [("demo", (4500, 36, 36)), ("smoke", (20, 3, 3))])
def test_the_sizes_of_the_demo_are_those_of_its_file(budget: str, steps: tuple[int, ...]) -> None:
    plan = plan_of(load("recipe=plan", f"pipeline.budget={budget}"))
    sizes = [stage.sizes for stage in plan.stages if stage.sizes]
    assert tuple(each.steps for each in sizes) == steps
    assert [each.batch for each in sizes] == [8, 16, 16]
    assert not any(stage.warnings for stage in plan.stages), "nano's are sizes of a demonstration"


@pytest.mark.parametrize(
    ("examples", "passes", "steps"), [(17_664, 2, 4416), (3_001, 2, 752), (596, 11, 825), (100, 20, 260)]
)
def test_nano_learns_its_language_in_at_least_750_steps_or_20_passes(
    examples: int, passes: int, steps: int
) -> None:
    nano = load("recipe=plan", "data=pairs", "data.path=votes.parquet")
    sizes = sizes_of(with_sizes(nano, PSI, examples), PSI, examples)
    assert (sizes.passes, sizes.steps) == (passes, steps)


POOR = {
    ("psi.batch_size=128", "psi.epochs=1"): ("psi makes 5 optimiser steps", "fewer than 10"),
    ("psi.batch_size=128", "psi.epochs=8"): ("psi makes 40 optimiser steps", "fewer than 50"),
    ("psi.epochs=40",): ("psi makes 40 passes", "psi.epochs=20"),
    ("psi.max_steps=5",): ("psi makes 5 optimiser steps", "psi.max_steps=null"),
    ("cre.steps=200", "cre.prompts_per_step=128"): ("cre makes 84 passes", "cre.steps=50"),
    ("cre.steps=3",): ("cre makes 3 optimiser steps", "cre.steps=50"),
    ("curriculum.steps=20", "curriculum.prompts_per_step=200"): (
        "curriculum makes 20 optimiser steps",
        "=50",
    ),
    ("cluster.nodes=16",): ("psi makes 15 optimiser steps", "psi.epochs=10"),
}


@pytest.mark.parametrize("keys", POOR)
def test_poor_sizes_get_one_sentence_with_a_setting_that_is_better(keys: tuple[str, ...]) -> None:
    config = given_keys(EIGHT, *keys)
    (warning,) = (w for stage in plan_of(config).stages for w in stage.warnings)
    assert all(part in warning for part in POOR[keys]) and "\n" not in warning
    better = given_keys(config, *warning.partition("setting is ")[2].split())
    left = [w for stage in plan_of(better).stages for w in stage.warnings]
    assert not [w for w in left if "optimiser steps" in w], left
    assert all(s.sizes.passes <= MANY_PASSES for s in plan_of(better).stages if s.sizes)


def test_too_few_data_for_the_cluster_name_the_remedy() -> None:
    (warning,) = (
        plan_of(given_keys(EIGHT, "plan.pairs=10", "cluster.nodes=4", "sec.orders_per_pair=1"))
        .stages[1]
        .warnings
    )
    assert "10 examples are too few for 32 processes" in warning
    better = warning.partition("setting is ")[2].split()
    assert better == ["cluster.nodes=1", "cluster.processes_per_node=4"]
    fewer = given_keys(EIGHT, "plan.pairs=10", "sec.orders_per_pair=1", *better)
    assert "psi.epochs=" in next(iter(plan_of(fewer).stages[1].warnings)), "then passes are the remedy"


def test_grpo_with_adapters_takes_a_higher_rate() -> None:
    config = given_keys(EIGHT, "model.lora.rank=16")
    cre, curriculum = (w for stage in plan_of(config).stages for w in stage.warnings)
    assert "cre.learning_rate=1e-05" in cre and "curriculum.learning_rate=1e-05" in curriculum
    shipped = load("recipe=plan", "model=llama31_70b_lora", "cluster=gpu8", "data=chatbot_arena")
    assert not [w for stage in plan_of(shipped).stages for w in stage.warnings]


def test_a_run_logs_its_sizes_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    settle_sizes(given_keys(EIGHT, "cre.steps=3"), CRE, 305)
    printed = capsys.readouterr()
    expected = "cre: 305 pairs in batches of 64, 3 optimiser steps, 0.6 passes, learning rate 1e-06\n"
    assert printed.out == expected
    assert printed.err.startswith("warning: cre makes 3 optimiser steps")


def test_hardness_is_mined_on_the_pairs_that_there_are() -> None:
    stages = {stage.stage: stage.work.counts for stage in plan_of(EIGHT).stages}
    assert stages[CURRICULUM]["chains for mining"] == 305 * EIGHT.curriculum.mining_samples


def test_models_on_gpus_validate_on_enough_pairs() -> None:
    assert min(EIGHT.cre.validate_pairs, EIGHT.curriculum.validate_pairs, EIGHT.psi.evaluate_pairs) >= 256
