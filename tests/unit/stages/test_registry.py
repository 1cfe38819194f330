"""Registry of the stages: order, settings that exist, and fingerprints that older run folders hold."""

from dataclasses import replace

import pytest

from pgenrm_train.config import Config, get, load
from pgenrm_train.config.stage_names import CHOOSING, STAGES, TRAINED, StageName
from pgenrm_train.files import fingerprint
from pgenrm_train.stages.registry import REGISTRY, as_recorded

# Of the default settings with one baseline, as run folders of older versions hold them.
OLDER = ("eval.baselines=[random]", "eval.greedy=false", "psi.epochs=2")
FINGERPRINTS = {
    StageName.BUILD_DATA: "f28b8193c528f3cc",
    StageName.CRITERIA: "4fa2db635a210c17",
    StageName.BUILD_SEC: "a8f563f3ab8fa9a5",
    StageName.PSI: "1ab66212435e8645",
    StageName.CRE: "e1d7f7cf3e144eb8",
    StageName.CURRICULUM: "1eba216f5b0a8403",
    StageName.PROTOTYPES: "c2776127319550ed",
    StageName.EVALUATE: "65ce6d821879ce2f",
    StageName.LABEL: "18086539448611cd",
    StageName.BEST_OF_N: "b0556bce7cf7b3cf",
}


def test_every_stage_comes_after_the_stages_that_it_uses():
    order = list(StageName)
    assert list(REGISTRY) == order and set(STAGES) == set(order) - {StageName.CRITERIA, *CHOOSING}
    for stage in REGISTRY.values():
        assert all(order.index(earlier) < order.index(stage.name) for earlier in stage.after)
        assert bool(stage.method) == (stage.name in TRAINED)


@pytest.mark.parametrize("stage", StageName)
def test_a_stage_reads_existing_settings_with_the_fingerprint_of_older_runs(stage):
    config = load("recipe=pipeline", *OLDER)
    for key in REGISTRY[stage].reads:
        get(config, key)
    assert fingerprint(REGISTRY[stage].settings(config)) == FINGERPRINTS[stage]


@pytest.mark.parametrize(("model", "same"), [("nano", True), ("hf", False)])
def test_passes_by_default_are_those_of_an_older_nano(model, same):
    now, old = ({"psi.epochs": epochs, "model.kind": model} for epochs in (None, 2.0))
    assert (as_recorded(now, old) == old) is same
    assert as_recorded(now, {**old, "psi.epochs": 3.0}) == as_recorded(now, {}) == now
    assert as_recorded(old, now) == old, "a stated number is another setting"


def test_later_stages_start_from_the_newest_checkpoint_before_them():
    assert StageName.PSI.starts_from == () == StageName.BUILD_SEC.starts_from
    assert StageName.CURRICULUM.starts_from == (StageName.CRE, StageName.PSI)
    assert StageName.EVALUATE.starts_from == tuple(reversed(TRAINED))


def test_raw_data_counts_by_content(tmp_path):
    config, moved = Config(recipe="build_data"), tmp_path / "moved.jsonl"
    (tmp_path / "votes.jsonl").write_text("{}\n")
    config.data.path = str(tmp_path / "votes.jsonl")
    before = REGISTRY[StageName.BUILD_DATA].settings(config)
    (tmp_path / "votes.jsonl").rename(moved)
    moved_config = replace(config, data=replace(config.data, path=str(moved)))
    assert REGISTRY[StageName.BUILD_DATA].settings(moved_config) == before
    moved.write_text("{} \n")
    assert REGISTRY[StageName.BUILD_DATA].settings(moved_config) != before
    assert (
        REGISTRY[StageName.CRE].settings(moved_config)["data.path sha256"]
        == REGISTRY[StageName.BUILD_DATA].settings(moved_config)["data.path sha256"]
    )


def test_the_mode_of_a_grpo_stage_counts_if_it_is_not_that_of_older_runs():
    def of(*overrides):
        return fingerprint(REGISTRY[StageName.CRE].settings(load("recipe=cre", *overrides)))

    ahead = of("cre.mode=async")
    assert of() != ahead != of("cre.mode=async", "cre.max_staleness=2")


def test_a_run_of_an_older_version_keeps_its_psi_where_the_new_settings_change_nothing():
    now = REGISTRY[StageName.PSI].settings(load("recipe=psi"))
    muon = {**now, "psi.optimizer": "muon"}
    new = {"psi.optimizer", "psi.muon_learning_rate", "psi.cpu_processes"}
    old = {key: value for key, value in now.items() if key not in new}
    assert as_recorded({**now, "psi.cpu_processes": 1, "psi.optimizer": "adamw"}, old) == old
    assert as_recorded({**muon, "psi.cpu_processes": 2}, old) == {**muon, "psi.cpu_processes": 2}
    assert as_recorded(now, now) == now and as_recorded(now, {}) == now
