"""gpu_check on a CPU at two ranks, tiny: as a whole on request, its PSI in every test run.

CRE at two ranks with these shapes, in full and with adapters, is in test_gpu_settings.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgenrm_train.config import ROOT, load, to_dict
from pgenrm_train.files import read_json
from pgenrm_train.run.checkpoints import COMPLETE
from pgenrm_train.run.folder import write_config
from pgenrm_train.run.tracking import METRICS
from pgenrm_train.stages.stage import launch
from recipes.wiring.gpu_check import passes

BASE = "build_sec/base"
TINY = [
    "cluster.processes_per_node=2",
    "cluster.zero_stage=3",
    "model.nano.family=llama",  # as model=nano_1b, and untied
    "model.nano.hidden=512",  # DeepSpeed keeps weights of up to 100,000 elements whole
    "model.nano.heads=8",
    "model.nano.layers=2",
    "data.users=60",
    "sec.max_chains=100",
    "cre.prompts_per_step=4",
    "cre.mini_batch_prompts=4",
    "cre.group_size=4",
    "cre.micro_batch_size=8",
    "cre.rows=16",
    "data.max_test_pairs=4",
]


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_the_recipe_of_the_first_day_passes_here(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pgenrm_train", "recipe=gpu_check", f"run_dir={tmp_path / 'run'}", *TINY]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("verdict: PASSED")
    report = json.loads((tmp_path / "run" / "gpu_check.json").read_text())
    rows = {row["recipe"]: row for row in report["recipes"]}
    measured = ("psi", "cre", "evaluate", "psi (Qwen3, LoRA)", "cre (Qwen3, LoRA)")
    assert all(rows[stage]["peak_gib"] > 0.1 and rows[stage]["planned_gib"] > 0.1 for stage in measured)
    assert all(rows[stage]["seconds_per_step"] > 0 for stage in measured if stage != "evaluate")
    assert rows["cre"]["generated_per_second"] > 0 and rows["evaluate"]["chains_per_second"] > 0


@pytest.mark.parametrize("name", ["psi", "psi (Qwen3, LoRA)"])
def test_two_ranks_partition_train_and_publish_the_models_of_the_check(name: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    # each validation costs more here than the three steps
    shipped = load("recipe=gpu_check", f"run_dir={tmp_path}", *TINY, "psi.evaluate_every=0")
    config, recipe = passes(shipped)[name]
    run_dir = Path(config.run_dir)
    write_config(run_dir / "config.yaml", to_dict(config))
    launch(config, recipe)
    lines = [json.loads(line) for line in (run_dir / "psi" / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines if "psi/loss" in line] == [1, 2, 3]
    marker = read_json(run_dir / "psi/steps/checkpoint-3" / COMPLETE)
    assert (marker["ranks"], marker["zero_stage"]) == (2, 3)
    before, after = (
        load_file(run_dir / f"{folder}/model.safetensors") for folder in (BASE, "psi/checkpoint")
    )
    assert {key: value.shape for key, value in before.items()} == {k: v.shape for k, v in after.items()}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= before.keys(), "untied"
    projections = [key for key in before if ".q_proj." in key]
    assert all(before[key].numel() > 100_000 for key in projections), "ZeRO-3 partitions them"
    assert not any(torch.equal(before[key], after[key].to(before[key].dtype)) for key in projections)
