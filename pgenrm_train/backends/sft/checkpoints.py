"""Checkpoints of SFT on disk: which are whole, whose they are, and whether training is over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgenrm_train.config import Config
from pgenrm_train.errors import ArtifactError

COMPLETE = "complete.json"  # the last file written into a checkpoint


def newest_complete(steps: Path, *, clean: bool = True) -> Path | None:
    """The newest checkpoint that is whole; newer ones, half-written or damaged since, are reported and removed (`clean`)."""
    for folder in sorted(steps.glob("checkpoint-*"), key=step_of, reverse=True):
        wrong = (
            "half-written" if not (folder / COMPLETE).exists() else "damaged" if _damaged(folder) else None
        )
        if wrong is None:
            return folder
        if clean:
            print(f"ignoring {wrong} checkpoint {folder}", flush=True)
            shutil.rmtree(folder)
    return None


def sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of every file."""
    return {
        str(file.relative_to(checkpoint)): file.stat().st_size
        for file in checkpoint.rglob("*")
        if file.is_file()
    }


def _damaged(checkpoint: Path) -> bool:
    """Whether a file that the marker counts is gone or has another size, as a full or failing disk leaves it."""
    noted = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8")).get("bytes", {})
    return bool(noted.items() - sizes(checkpoint).items())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def check_resumable(checkpoint: Path, mark: Mapping[str, Any]) -> None:
    """A checkpoint continues with the processes, the ZeRO stage and the model that wrote it.  Raises ArtifactError otherwise."""
    found = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    for key, what in (
        ("ranks", "number of processes"),
        ("zero_stage", "ZeRO stage"),
        ("model", "model or adapter"),
    ):
        if found.get(key) != mark[key]:
            raise ArtifactError(
                f"{checkpoint} was written with another {what} ({found.get(key)}, now {mark[key]}); "
                "go on as it was, or use another run_dir="
            )


def state_of(checkpoint: Path) -> Any:
    from transformers import TrainerState

    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def is_over(config: Config, state: Any) -> bool:
    """All planned steps are made, or validation has ended training."""
    return bool(state.global_step >= state.max_steps > 0) or stopped_early(config, state)


def stopped_early(config: Config, state: Any) -> bool:
    """Whether `psi.patience` validations have passed since the best one.  Nothing but the state is asked: a resume decides alike."""
    psi = config.psi
    if not psi.patience or not psi.evaluate_every or not state.best_global_step:
        return False
    return bool(state.global_step - state.best_global_step >= psi.patience * psi.evaluate_every)
