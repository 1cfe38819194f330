"""Metrics of a stage: `metrics.jsonl` always, Weights & Biases by choice.  The one call site of wandb.

A stage is one W&B run; the stages of a pipeline share a group and one step axis: steps of W&B count the
optimiser steps of all stages.  `eval/accuracy` is the key of accuracy in every stage and in the summary.
Products of a stage become artifacts; checkpoints only by reference, so that no weights are copied.  Without
the network a run starts offline.  `wandb sync` later sends everything that W&B lacks.

Nothing that is sent may hold a secret: addresses and names of credential variables are removed from the
settings.
"""

import hashlib
import json
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pgenrm_train.config import Config, to_dict
from pgenrm_train.files import write_json, write_text

METRICS = "metrics.jsonl"
NAME = 128  # characters of a name that W&B takes
START_SECONDS, FINISH_SECONDS = 30.0, 300.0  # longest waits for W&B
# type of an artifact → file
FILES = {"predictions": "predictions.parquet", "results": "results.json", "report": "report.html"}


def append(path: Path, record: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; none if there is no file."""
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def samples_file(metrics: Path, step: int) -> Path:
    """Path of a validation's sample chains, next to the metrics file that holds its numbers."""
    return metrics.parent / "samples" / f"step-{step:06d}.parquet"


def trim(path: Path, step: int) -> None:
    """Drop lines of steps after `step` and a half-written last line: a resumed run writes them again."""
    if not path.exists():
        return
    written = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in written if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_text(path, "".join(kept))


class Tracker:
    """Log the numbers of one stage; a failing tracking service is reported once and never stops training.

    `first_step`: optimiser steps of the stages before, which steps of W&B count too.
    """

    early: ClassVar[dict[Path, Self]] = {}  # of stages that train before they begin

    def __init__(self, config: Config, stage: str, folder: Path, first_step: int = 0) -> None:
        self.stage, self.path, self.folder, self.first_step = stage, folder / METRICS, folder, first_step
        # The newest step forwarded, by the names logged. Lines cannot be counted, because a resumed engine
        # rewrites them. Training and validation both write a line for the same step.
        self._sent: dict[frozenset[str], int] = {}
        self.after_log: Callable[[], None] = lambda: None
        folder.mkdir(parents=True, exist_ok=True)
        self._place = folder / "wandb"  # W&B's own files of this run
        self._best: float | None = None
        self._public = _public(to_dict(config))
        self._wandb = self._start_wandb(config) if config.tracking.kind != "none" else None

    @classmethod
    def begin_early(cls, config: Config, stage: str, folder: Path, first_step: int) -> Self:
        """A tracker that the stage takes over when it begins: a joint session trains it before."""
        cls.early[folder] = cls(config, stage, folder, first_step)
        return cls.early[folder]

    @classmethod
    def close_early(cls) -> None:
        """Close trackers that no stage has taken over, after a failure."""
        while cls.early:
            cls.early.popitem()[1].close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line `{"step", "stage", name: number}`; non-finite numbers become null."""
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append(self.path, {"step": step, "stage": self.stage, **numbers})
        self.after_log()
        self._send(step, metrics)

    @contextmanager
    def follow(self, path: Path, every: float = 2.0) -> Iterator[None]:
        """Forward lines that another process, an engine, appends to `path` while the block runs.

        The engine never connects to the tracking service itself, so that the network cannot stop training.
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
        while True:
            last_round = ended.wait(every)
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
            for record in map(json.loads, lines):
                step, names = int(record["step"]), frozenset(record)
                if step > self._sent.get(names, -1):
                    self._sent[names] = step
                    self.after_log()
                    numbers = {
                        k: v for k, v in record.items() if k not in ("step", "stage") and v is not None
                    }
                    self._send(step, numbers, samples_file(path, step) if "eval/accuracy" in record else None)
            if last_round:
                return

    def _send(self, step: int, metrics: Mapping[str, float], samples: Path | None = None) -> None:
        if self._wandb is not None:
            if (accuracy := metrics.get("eval/accuracy")) is not None:
                self._best = max(accuracy, self._best or 0.0)
            try:
                table = _table(samples) if samples and samples.exists() else {}
                self._wandb.log({**metrics, **table}, step=self.first_step + step)
            except Exception as error:
                self._give_up(error)

    def link(self, facts: Mapping[str, object]) -> None:
        """Write the accuracy of a finished stage to the summary, and link its products as artifacts.

        An evaluation has its own accuracy; a training has its best one, that of the published checkpoint.
        """
        if self._wandb is None:
            return
        try:
            if (accuracy := facts.get("accuracy", self._best)) is not None:
                self._wandb.log({}, commit=True)  # the open last step would overwrite the summary
                self._wandb.summary["eval/accuracy"] = accuracy
            for artifact in self._artifacts(str(self._wandb.name), facts):
                self._wandb.log_artifact(artifact)
        except Exception as error:
            _warn(f"W&B did not accept the artifacts ({_brief(error)}); they are in {self.folder}")

    def _artifacts(self, run: str, facts: Mapping[str, object]) -> Iterator[Any]:
        import wandb

        # Kinds and W&B's own suffixes follow the name.
        name = _short(re.sub(r"[^\w.-]", "-", run, flags=re.ASCII), limit=NAME - 16)
        # W&B reads files when it sends them, which may be much later: these stay in the run folder.
        settings, weights = (self.folder / "wandb" / f"{name}.json" for name in ("settings", "checkpoint"))
        write_json(settings, self._public)
        files = {"config": settings} | {kind: self.folder / file for kind, file in FILES.items()}
        for kind, path in files.items():
            if path.exists():
                artifact = wandb.Artifact(f"{name}-{kind}", kind)
                artifact.add_file(str(path), policy="immutable", skip_cache=True)
                yield artifact
        checkpoint = (self.folder / "checkpoint").absolute()
        if checkpoint.exists():
            stats = {file.name: file.stat() for file in sorted(checkpoint.iterdir())}
            write_json(weights, {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()})
            steps = {"steps": facts["steps"]} if "steps" in facts else {}
            artifact = wandb.Artifact(f"{name}-checkpoint", "model", metadata=steps)
            artifact.add_reference(checkpoint.as_uri(), checksum=False)
            # This file differs with the weights, and so makes another version of the artifact.
            artifact.add_file(str(weights), policy="immutable", skip_cache=True)
            yield artifact

    def close(self) -> None:
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                _warn(
                    f"W&B did not receive everything ({_brief(error)}); metrics.jsonl is complete, and "
                    f"wandb sync --no-skip-online {self._place} sends the rest"
                )

    def _start_wandb(self, config: Config) -> Any:
        try:
            try:
                return self._init(config, "offline" if config.tracking.kind == "offline" else "online")
            except Exception as error:
                if config.tracking.kind == "offline":
                    raise
                run = self._init(config, "offline")
                _warn(
                    f"W&B is not reached ({_brief(error)}); tracking continues offline, and "
                    f"wandb sync {self._place} sends it later"
                )
                return run
        except Exception as error:  # a tracking service must never stop a run
            self._give_up(error)
            return None

    def _init(self, config: Config, mode: Literal["online", "offline"]) -> Any:
        import wandb

        run = wandb.init(
            project=_short(config.tracking.project),
            entity=config.tracking.entity,
            group=_short(config.tracking.group or Path(config.run_dir).name),
            job_type=self.stage,
            name=_short(Path(config.run_dir).name, f"/{self.stage}"),
            dir=str(self.folder),
            mode=mode,
            reinit="create_new",  # a joint session has a run per stage
            config=self._public,
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                # utilisation and memory of the GPUs
                x_disable_stats=config.cluster.device == "cpu",
                init_timeout=START_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        self._place = Path(run.dir).parent
        return run

    def _give_up(self, error: Exception) -> None:
        _warn(f"W&B logging stopped ({_brief(error)}); metrics.jsonl continues")
        self._wandb = None


def _short(name: str, end: str = "", limit: int = NAME) -> str:
    """`name` and `end` in the length that W&B takes; a hash stands for what is cut off."""
    if len(name) + len(end) <= limit:
        return name + end
    mark = "-" + hashlib.sha256(name.encode()).hexdigest()[:8] + end
    return name[: limit - len(mark)] + mark


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _table(samples: Path) -> dict[str, object]:
    import pandas as pd
    import wandb

    return {"eval/chains": wandb.Table(dataframe=pd.read_parquet(samples))}


def _public(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings without addresses and names of credential variables."""
    return {
        k: _public(v) if isinstance(v, Mapping) else v
        for k, v in settings.items()
        if k not in ("api_key_env", "base_url")
    }
