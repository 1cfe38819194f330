"""The message about lost ranks of PSI; tests/integration/test_nodes.py loses a real node."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgenrm_train.backends.sft import ray_train
from pgenrm_train.run.checkpoints import COMPLETE


def test_the_message_names_the_lost_ranks_and_the_checkpoint_to_resume_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray import cloudpickle

    on_the_controller = cloudpickle.loads(cloudpickle.dumps(ray_train.lost_rank_reporter(tmp_path)))
    lost = {3: ConnectionError("gone"), 1: ConnectionError("gone")}
    on_the_controller.after_exception(None, lost)
    assert capsys.readouterr().out == (
        "psi: rank 1, 3 of the cluster was lost (ConnectionError); "
        "all start again from the beginning once enough nodes are there\n"
    )
    for step, whole in ((5, True), (10, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / COMPLETE).write_text("{}")
    on_the_controller.after_exception(None, lost)
    assert f"from {tmp_path}/checkpoint-5 once" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-10").exists(), "the half-written one is for a rank to remove"
