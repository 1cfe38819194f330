"""The folder of one stage: its manifest, its configuration, and the rule by which a run continues.

A stage's folder holds `config.yaml`, `manifest.json` and the stage's products.  The manifest's `fingerprint`
covers the settings that the stage reads and the fingerprints of its inputs.  A complete stage with the same
fingerprint is kept. One with another fingerprint is never silently reused.  An incomplete one continues.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import fingerprint, read_json, sha256_file, write_json, write_text

MANIFEST = "manifest.json"
PACKAGES = (
    "verl",
    "torch",
    "transformers",
    "deepspeed",
    "ray",
    "vllm",
    "datasets",
    "wandb",
    "hydra-core",
    "peft",
    "numpy",
)


def check_checkpoint(folder: Path) -> Path:
    """The folder that `model.path` names.  Raises ArtifactError if it holds no Hugging Face checkpoint."""
    if not (folder / "config.json").exists():
        reason = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise ArtifactError(f"model.path={folder} is not a Hugging Face checkpoint: {reason}")
    return folder


def weights_digest(checkpoint: Path) -> str:
    """Hash of a checkpoint's weights.  Every byte counts: fine-tuning may leave most of a file unchanged."""
    return fingerprint([(path.name, sha256_file(path)) for path in sorted(checkpoint.glob("*.safetensors"))])


def environment_facts() -> dict[str, object]:
    """Versions, machine and git state for a manifest: no user name, host name, path or variable.

    `git`: the commit, and whether files differ from it; null outside a checkout.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpus": os.cpu_count(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "git": _git_state(),
    }


def installed_version(package: str) -> str | None:
    """Version of an installed package, with its local label; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, str | bool] | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


class Status(StrEnum):
    """State of a stage."""

    RUNNING = "running"
    COMPLETE = "complete"
    INTERRUPTED = "interrupted"


@dataclass
class Manifest:
    """Content of `manifest.json`; every key without a field of its own is kept in `facts`."""

    stage: str | None = None
    status: str | None = None
    fingerprint: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    wall_seconds: float = 0.0  # over all starts
    starts: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, record: Mapping[str, object]) -> Self:
        """A manifest of any version: missing keys get defaults, unknown ones become facts."""
        names = {item.name for item in fields(cls)} - {"facts"}
        facts = {key: value for key, value in record.items() if key not in names}
        known: dict[str, Any] = {key: record[key] for key in record.keys() & names}
        return cls(**known, facts=facts)

    def as_json(self) -> dict[str, object]:
        """The keys in the order of the file."""
        known = {key: value for key, value in vars(self).items() if key != "facts" and value is not None}
        return {**known, **self.facts}


@dataclass
class StageFolder:
    """One stage's folder inside a run."""

    path: Path
    stage: str
    manifest: Manifest = field(default_factory=Manifest)
    _started: float = field(default_factory=time.monotonic)

    @classmethod
    def read(cls, run_dir: Path, stage: str) -> Self:
        """Open without changing anything; an absent folder has an empty manifest."""
        path = run_dir / stage
        file = path / MANIFEST
        manifest = Manifest.parse(read_json(file)) if file.exists() else Manifest()
        return cls(path, str(stage), manifest)

    @property
    def complete(self) -> bool:
        return self.manifest.status == Status.COMPLETE

    def made_from(self, settings: Mapping[str, object], inputs: Mapping[str, str]) -> bool:
        """True if the folder's fingerprint is that of these settings and inputs."""
        return self.manifest.fingerprint == fingerprint(settings, inputs)

    def begin(
        self,
        *,
        config: Mapping[str, object],
        settings: Mapping[str, object],
        inputs: Mapping[str, str],
        seed: int,
    ) -> None:
        """Start or continue the stage.  Raises ArtifactError if other settings or inputs made the folder."""
        before = self.manifest
        if before.fingerprint is not None and not self.made_from(settings, inputs):
            if self._holds_work():
                raise ArtifactError(
                    f"{self.path} was made with other settings ({self._difference(settings, inputs)}); "
                    "use another run_dir=, or resume=false, which renames the old run folder and starts again"
                )
            before = Manifest()
        self._started = time.monotonic()
        self.manifest = Manifest(
            self.stage,
            Status.RUNNING,
            fingerprint(settings, inputs),
            settings,
            inputs,
            seed,
            before.wall_seconds,
            before.starts + 1,
            environment_facts(),
        )
        write_config(self.path / "config.yaml", config)
        self.save()

    def _holds_work(self) -> bool:
        """True if there is any product.

        A start that failed before any product may be repeated with other settings.
        """
        return self.complete or any(
            path.name not in ("config.yaml", MANIFEST, "wandb") for path in self.path.iterdir()
        )

    def beat(self, every: float = 10.0) -> None:
        """Save the time spent so far, so that the table also counts the time of a killed start."""
        if time.monotonic() - self._started > every:
            self._count_time()
            self.save()

    def add_seconds(self, seconds: float) -> None:
        """Count time that another stage's process spent for this one, or negative time spent for another."""
        self.manifest.wall_seconds += seconds

    def finish(self, **facts: object) -> None:
        """Mark complete and add facts for the tables; wall seconds add up over restarts."""
        self._count_time()
        self.manifest.status = Status.COMPLETE
        self.note(**facts)

    def interrupted(self, reason: str) -> None:
        """Mark interrupted, with the reason."""
        self._count_time()
        self.manifest.status = Status.INTERRUPTED
        self.note(reason=reason)

    def note(self, **facts: object) -> None:
        """Add facts to the manifest and save it."""
        self.manifest.facts |= facts
        self.save()

    def _count_time(self) -> None:
        now = time.monotonic()
        self.manifest.wall_seconds = round(self.manifest.wall_seconds + now - self._started, 1)
        self._started = now

    def save(self) -> None:
        write_json(self.path / MANIFEST, self.manifest.as_json())

    def _difference(self, settings: Mapping[str, object], inputs: Mapping[str, str]) -> str:
        """The first three keys that changed, each with its old and new value."""
        before = _flat(self.manifest.settings) | _flat(self.manifest.inputs, "input ")
        after = _flat(json.loads(json.dumps(settings, default=str))) | _flat(inputs, "input ")
        changed = [
            f"{key}: {before.get(key)} → {after.get(key)}"
            for key in sorted({*before, *after})
            if str(before.get(key)) != str(after.get(key))
        ]
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return "; ".join(changed[:3]) + more or "unreadable settings"


def write_config(path: Path, config: Mapping[str, object]) -> None:
    import yaml

    write_text(path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def set_aside(run_dir: Path) -> Path | None:
    """Rename an existing run folder, never delete it; returns its new path."""
    if not run_dir.exists():
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (f"{run_dir.name}.{stamp}{suffix}.bak" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    target = next(path for name in names if not (path := run_dir.with_name(name)).exists())
    run_dir.rename(target)
    return target


def _flat(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat
