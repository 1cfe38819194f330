"""Public names of a package, imported on first use."""

from collections.abc import Callable, Iterable
from importlib import import_module


def lazily(package: str, **homes: Iterable[str]) -> Callable[[str], object]:
    """The `__getattr__` of a package; `homes` maps each module of it to its public names."""
    modules = {name: f"{package}.{module}" for module, names in homes.items() for name in names}

    def load(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return load
