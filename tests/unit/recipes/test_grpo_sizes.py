"""CRE's engine gets the sizes that follow from the pairs of the run."""

import pyarrow.parquet as pq
import pytest

from pgenrm_train.config import ROOT, load
from recipes import cre
from recipes.wiring import grpo


class Started(Exception):
    pass


def test_null_sizes_are_numbers_when_the_engine_starts(tmp_path, monkeypatch, capsys):
    config = load(
        "recipe=cre",
        *("data.users=20", "data.heldout_users=4", "judge=none", "tracking=none"),
        *(f"cre.{key}=null" for key in ("steps", "prompts_per_step", "mini_batch_prompts")),
        *(f"model.path={ROOT / 'tests/data/psi_nano'}", f"run_dir={tmp_path}", "preflight.skip=[versions]"),
    )

    def start(sized, phases):
        raise Started(sized.cre, phases[0])

    monkeypatch.setattr(grpo, "launch", start)
    with pytest.raises(Started) as started:
        cre.run(config)
    settings, phase = started.value.args
    pairs = pq.read_metadata(phase.rows).num_rows
    assert pairs > 100 and settings.prompts_per_step == settings.mini_batch_prompts == 64
    assert phase.steps == settings.steps == 16 * pairs // 64
    assert f"cre: {pairs} pairs in batches of 64, {phase.steps} optimiser steps" in capsys.readouterr().out
