"""The kind of totals travels with the checkpoint, and no other kind is used by mistake."""

import json

import pytest

from pgenrm_train.config import StageName, Totals, load
from pgenrm_train.errors import ArtifactError, ConfigError
from pgenrm_train.run.checkpoints import check_group_size, totals_of, write_manifest
from pgenrm_train.stages.registry import REGISTRY
from pgenrm_train.stages.stage import with_totals


def checkpoint(folder, totals):
    folder.mkdir()
    write_manifest(folder, totals)
    return folder


def test_the_manifest_decides_and_without_one_the_setting(tmp_path):
    code = checkpoint(tmp_path / "code", Totals.CODE)
    assert with_totals(load("recipe=score"), code).model.counted is Totals.CODE
    assert with_totals(load("recipe=score", "model.totals=code"), code).model.counted is Totals.CODE
    assert totals_of(tmp_path) is None
    assert (
        with_totals(load("recipe=score", "model.totals=verified"), tmp_path).model.counted is Totals.VERIFIED
    )
    assert with_totals(load("recipe=score"), tmp_path).model.counted is Totals.DECLARED
    for more, kind in (
        (["model=nano"], Totals.CODE),
        (["model=nano", "data=pairs", "data.path=votes.csv", "teacher=features"], Totals.DECLARED),
        (["model=nano", "pipeline.budget=smoke"], Totals.DECLARED),  # PSI goes on from a small checkpoint
        (["model=qwen3_8b"], Totals.DECLARED),
    ):
        assert with_totals(load("recipe=psi", *more)).model.counted is kind, "without a checkpoint"
    assert with_totals(load("recipe=psi", "model.totals=declared")).model.counted is Totals.DECLARED


def test_the_manifest_has_the_group_size_of_training(tmp_path):
    folder = checkpoint(tmp_path / "c", Totals.CODE)
    check_group_size(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["group_size"] == 2
    (folder / "manifest.json").write_text(json.dumps(manifest | {"group_size": 4}))
    with pytest.raises(
        ArtifactError, match=r"manifest\.json: group_size=4, but scores come from prompts of 2"
    ):
        check_group_size(folder)
    check_group_size(tmp_path)  # a checkpoint of others


def test_another_kind_than_the_manifests_is_one_sentence(tmp_path):
    code, declared = checkpoint(tmp_path / "c", Totals.CODE), checkpoint(tmp_path / "d", Totals.DECLARED)
    with pytest.raises(
        ConfigError, match=r"model.totals=verified, but .*c has totals=code; leave model.totals out"
    ):
        with_totals(load("recipe=score", "model.totals=verified"), code)
    with pytest.raises(ConfigError, match="different totals need runs of"):
        with_totals(load("recipe=evaluate"), code, declared)
    (code / "manifest.json").write_text(json.dumps({"totals": "summed"}))
    with pytest.raises(ArtifactError, match="totals=summed is not one of declared"):
        totals_of(code)
    (code / "manifest.json").write_text('["code"]')
    with pytest.raises(ArtifactError, match="is not one of declared"):
        totals_of(code)
    with pytest.raises(ConfigError, match=r"answers to model\.prompt=judge have none"):
        load(
            "recipe=evaluate",
            "model=endpoint",
            "model.name=x",
            "model.base_url=http://x",
            "model.prompt=judge",
            "model.totals=code",
        )


def test_a_run_with_other_totals_is_another_run():
    for stage in (REGISTRY[StageName.PSI], REGISTRY[StageName.CRE]):
        plain, stated, code = (
            stage.settings(load("recipe=psi", *more))
            for more in ([], ["model.totals=declared"], ["model.totals=code"])
        )
        assert plain == stated != code and code["model.totals"] == "code"
