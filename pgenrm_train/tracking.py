"""Where numbers go: `metrics.jsonl` always, Weights & Biases by choice.  The one call site of wandb.

`eval/accuracy` is the key of accuracy in every stage.  Nothing that is logged may hold a secret: only numbers, and the settings
of the stage without the names of credential variables.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pgenrm_train.config import Config, to_dict

METRICS = "metrics.jsonl"


def append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none when there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def samples_file(metrics: Path, step: int) -> Path:
    """Where the sample chains of a validation lie, beside the metrics file that holds its numbers."""
    return metrics.parent / "samples" / f"step-{step:06d}.parquet"


def trim(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a half-written last one: a resumed run writes them anew."""
    if not path.exists():
        return
    written = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in written if line.endswith("\n") and json.loads(line)["step"] <= step]
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.rename(path)


class Tracker:
    """Logs numbers of one stage.  A tracking service that fails is reported once and never stops training."""

    def __init__(self, config: Config, stage: str, folder: Path) -> None:
        self.stage, self.path = stage, folder / METRICS
        self.after_log: Callable[[], None] = lambda: None
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = self._start_wandb(config, folder) if config.tracking.kind != "none" else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line `{"step", "stage", name: number}`; non-finite numbers become null."""
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append(self.path, {"step": step, "stage": self.stage, **numbers})
        self.after_log()
        self._send(step, metrics)

    @contextmanager
    def follow(self, path: Path, every: float = 2.0) -> Iterator[None]:
        """Forward the lines that another process appends to `path` while the block runs: an engine's metrics.jsonl.

        The engine never talks to the tracking service itself, so that the network cannot stop training.
        """
        ended = threading.Event()
        thread = threading.Thread(target=self._forward, args=(path, ended, every), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=30)

    def _forward(self, path: Path, ended: threading.Event, every: float) -> None:
        # The newest step forwarded, by the names logged: a resumed engine rewrites lines, so they cannot be counted, and
        # training and validation both write a line of the same step.
        sent: dict[frozenset[str], int] = {}
        while True:
            last_round = ended.wait(every)
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
            for record in map(json.loads, lines):
                step, names = int(record["step"]), frozenset(record)
                if step > sent.get(names, -1):
                    sent[names] = step
                    self.after_log()
                    numbers = {k: v for k, v in record.items() if k not in ("step", "stage") and v is not None}
                    self._send(step, numbers, samples_file(path, step) if "eval/accuracy" in record else None)
            if last_round:
                return

    def _send(self, step: int, metrics: Mapping[str, float], samples: Path | None = None) -> None:
        if self._wandb is not None:
            try:
                table = _table(samples) if samples and samples.exists() else {}
                self._wandb.log({**metrics, **table}, step=step)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                self._give_up(error)

    def _start_wandb(self, config: Config, folder: Path) -> Any:
        try:
            import wandb

            return wandb.init(
                project=config.tracking.project,
                entity=config.tracking.entity,
                group=config.tracking.group or Path(config.run_dir).name,
                job_type=self.stage,
                name=f"{Path(config.run_dir).name}/{self.stage}",
                dir=str(folder),
                mode="offline" if config.tracking.kind == "offline" else "online",
                config=_public(to_dict(config)),
                settings=wandb.Settings(silent=True, console="off", save_code=False, x_disable_stats=True),
            )
        except Exception as error:  # a tracking service must never stop a run
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        print(f"warning: W&B logging stopped ({type(error).__name__}: {error}); metrics.jsonl goes on", file=sys.stderr)
        self._wandb = None


def _table(samples: Path) -> dict[str, Any]:
    import pandas as pd
    import wandb

    return {"eval/chains": wandb.Table(dataframe=pd.read_parquet(samples))}


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: _public(v) if isinstance(v, dict) else v for k, v in settings.items() if k not in ("api_key_env", "base_url")}
