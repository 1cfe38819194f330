"""The run folder: atomic writes, hashes, manifests, and the rule by which a run continues.

A stage's folder holds `config.yaml`, `manifest.json` and what the stage makes.  The manifest's `fingerprint` covers the settings
that the stage reads and the fingerprints of its inputs: a complete stage with the same fingerprint is kept, one with another
fingerprint is never silently reused, and an incomplete one continues.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

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
    """The folder that `model.path` names.  Raises ArtifactError where it holds no Hugging Face checkpoint."""
    if not (folder / "config.json").exists():
        reason = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise ArtifactError(f"model.path={folder} is not a Hugging Face checkpoint: {reason}")
    return folder


def weights_digest(checkpoint: Path) -> str:
    """Tells one checkpoint's weights from another's.  Every byte counts: fine-tuning may leave most of a file as it was."""
    return fingerprint([(path.name, sha256_file(path)) for path in sorted(checkpoint.glob("*.safetensors"))])


def environment_facts() -> dict[str, Any]:
    """Versions, machine and git state, for the manifest.  No user name, no host name, no path, no variable."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpus": os.cpu_count(),
        "packages": versions,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
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


@dataclass
class StageFolder:
    """One stage's folder inside a run."""

    path: Path
    stage: str
    manifest: dict[str, Any] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)

    @classmethod
    def read(cls, run_dir: Path, stage: str) -> StageFolder:
        """Open without changing anything; an absent folder has an empty manifest."""
        path = run_dir / stage
        manifest = read_json(path / MANIFEST) if (path / MANIFEST).exists() else {}
        return cls(path, stage, manifest)

    @property
    def complete(self) -> bool:
        return self.manifest.get("status") == "complete"

    def made_from(self, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
        """True when the folder's fingerprint is the one that these settings and inputs give."""
        return self.manifest.get("fingerprint") == fingerprint(settings, inputs)

    def begin(
        self, *, config: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, str], seed: int
    ) -> None:
        """Start or continue the stage.  Raises ArtifactError when the folder was made with other settings or inputs."""
        found = self.manifest.get("fingerprint")
        wanted = fingerprint(settings, inputs)
        if found not in (None, wanted):
            if self._holds_work():
                raise ArtifactError(
                    f"{self.path} was made with other settings ({self._difference(settings, inputs)}); "
                    "use another run_dir=, or resume=false to set the old run aside and start anew"
                )
            self.manifest = {}
        self._started = time.monotonic()
        self.manifest = {
            "stage": self.stage,
            "status": "running",
            "fingerprint": wanted,
            "settings": settings,
            "inputs": inputs,
            "seed": seed,
            "wall_seconds": self.manifest.get("wall_seconds", 0.0),
            "starts": self.manifest.get("starts", 0) + 1,
            **environment_facts(),
        }
        write_config(self.path / "config.yaml", config)
        self.save()

    def _holds_work(self) -> bool:
        """Whether something was made: a start that failed on a mistyped path does not bind the folder to the mistake."""
        return self.complete or any(
            path.name not in ("config.yaml", MANIFEST, "wandb") for path in self.path.iterdir()
        )

    def beat(self, every: float = 10.0) -> None:
        """Note the time spent so far, so that a killed stage has not spent it for nothing in the table."""
        if time.monotonic() - self._started > every:
            self._count_time()
            self.save()

    def finish(self, *, seconds_shift: float = 0.0, **facts: Any) -> None:
        """Mark complete, with the facts that a table shows; wall seconds add up over restarts.

        `seconds_shift`: time that another stage's process spent for this one, or this one's for another (negative).
        """
        self._count_time()
        self.manifest["wall_seconds"] = round(self.manifest["wall_seconds"] + seconds_shift, 1)
        self.manifest |= {"status": "complete", **facts}
        self.save()

    def interrupted(self, reason: str) -> None:
        self._count_time()
        self.manifest |= {"status": "interrupted", "reason": reason}
        self.save()

    def _count_time(self) -> None:
        now = time.monotonic()
        self.manifest["wall_seconds"] = round(self.manifest["wall_seconds"] + now - self._started, 1)
        self._started = now

    def save(self) -> None:
        write_json(self.path / MANIFEST, self.manifest)

    def _difference(self, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
        before = {
            **_flat(self.manifest.get("settings", {})),
            **_flat(self.manifest.get("inputs", {}), "input "),
        }
        after = {**_flat(json.loads(json.dumps(settings, default=str))), **_flat(inputs, "input ")}
        changed = [
            f"{k}: {before.get(k)} → {after.get(k)}"
            for k in sorted({*before, *after})
            if str(before.get(k)) != str(after.get(k))
        ]
        return (
            "; ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            or "unreadable settings"
        )


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    import yaml

    write_text(path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def set_aside(run_dir: Path) -> Path | None:
    """Move an existing run folder out of the way (never delete what a user made); returns where it went."""
    if not run_dir.exists():
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (f"{run_dir.name}.{stamp}{suffix}.bak" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    target = next(path for name in names if not (path := run_dir.with_name(name)).exists())
    run_dir.rename(target)
    return target


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat
