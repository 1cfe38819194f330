"""The house: every module has a layer and strict types, folders stay small, lines and English stay plain."""

import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import house  # noqa: E402

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
CONTRACTS = SETTINGS["importlinter"]["contracts"]


def children(package: str) -> set[str]:
    folder = ROOT / package.replace(".", "/")
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    return modules | {path.parent.name for path in folder.glob("*/__init__.py")}


@pytest.mark.parametrize("container", ["pgenrm_train", "pgenrm_train.backends"])
def test_every_module_is_in_one_layer(container):
    (contract,) = (c for c in CONTRACTS if c["type"] == "layers" and c.get("containers") == [container])
    layers = [name.strip() for layer in contract["layers"] for name in layer.split("|")]
    assert contract["exhaustive"] and Counter(layers) == Counter(children(container))


def test_every_folder_of_code_is_linted_and_typed():
    assert SETTINGS["importlinter"]["root_packages"] == list(house.CODE)
    assert SETTINGS["mypy"]["files"] == list(house.CODE)
    assert all((folder / "__init__.py").exists() for folder in folders(*house.CODE))


def test_no_module_of_ours_escapes_strict_typing():
    strict = {
        "check_untyped_defs", "disallow_any_generics", "disallow_incomplete_defs", "disallow_untyped_defs",
        "extra_checks", "no_implicit_reexport", "strict_equality",
    }  # fmt: skip
    assert all(SETTINGS["mypy"][option] for option in strict)
    for override in SETTINGS["mypy"]["overrides"]:
        ours = any(name.split(".")[0] in house.CODE for name in override["module"])
        assert not (ours and (strict | {"ignore_errors", "follow_imports"}) & set(override))
        assert not ours or all(name.endswith(".*") for name in override["module"]), "name folders, not files"


def folders(*places: str) -> set[Path]:
    return {path.parent for path in house.modules(ROOT, *places)}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_no_link_is_tracked():
    """A checkout of a link replaces an ignored folder of its name, such as .venv, without a question."""
    files = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not [line for line in files.stdout.splitlines() if line.startswith("120000")]


def test_contracts_name_folders():
    for contract in CONTRACTS:
        for name in contract.get("source_modules", []) + contract.get("forbidden_modules", []):
            assert (ROOT / name.replace(".", "/")).is_dir(), name


def test_a_folder_holds_at_most_fifteen_modules():
    modules = Counter(p.parent for p in house.modules(ROOT, *house.CODE, "tests", "benchmarks"))
    full = {str(f.relative_to(ROOT)): n for f, n in modules.items() if n - (f / "__init__.py").exists() > 15}
    assert not full


def test_no_prefix_stands_for_a_folder():
    prefixes = defaultdict(list)
    for path in house.modules(ROOT, *house.CODE):
        if "_" in path.stem.strip("_"):
            prefixes[path.parent, path.stem.partition("_")[0]].append(path.stem)
    assert not {str(key): names for key, names in prefixes.items() if len(names) > 2}


def test_lines_and_english():
    figures = house.count(ROOT)
    assert figures[f"lines over {house.WIDE} characters"] == 0
    for text in ("docstrings and comments", "documents"):
        assert figures[f"{text}: odd words per 1,000"] <= 1
        assert figures[f'{text}: "a row" for "per row", per 1,000'] <= 1
