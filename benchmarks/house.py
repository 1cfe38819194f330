"""Count what makes the code easy or hard to enter: folders, statements, untyped dicts, odd English.

    python benchmarks/house.py                      # this checkout
    python benchmarks/house.py 705d5bd .            # a revision and this checkout, as two columns

Code: `pgenrm_train`, `recipes`, `eval`, `data_builders`.
English: docstrings and comments of that code; `docs/` and `README.md`.
"""

import argparse
import ast
import io
import re
import subprocess
import tarfile
import tempfile
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("pgenrm_train", "recipes", "eval", "data_builders")
# Typed again, because a revision before `stage_names` is counted by the same names.
STAGES = ("build_data", "build_sec", "psi", "cre", "curriculum", "prototypes", "evaluate")
REGISTRY = ("pgenrm_train/config/stage_names.py", "pgenrm_train/stages/registry.py")
UNTYPED = re.compile(r"\b(?:dict|Mapping)\[str, Any\]")
WIDE = 110
ODD = r"said|says|tells?|told|handed|anew|beside|stands|nobody|somebody|alike"
# "chains a pair" for "chains per pair": `a` and a unit, but not after a word of NOT_PER, as in "of a pair".
UNITS = (
    "row|pair|step|chain|user|token|question|seed|GPU|process|node|core|sample|prompt|second|minute|group|"
    "line|stage|run|model|batch|file|rank|epoch|request|call"
)
PER = re.compile(rf"(\w+) an? (?:{UNITS})\b")
NOT_PER = re.compile(
    "of|in|for|to|on|at|with|from|by|as|into|over|after|before|within|without|about|under|between|"
    "against|than|like|per|and|or|but|if|when|where|while|that|which|what|who|how|whether|so|because|"
    "unless|until|not|only|also|just|is|are|was|were|be|has|have|had|make|makes|made|give|gives|get|"
    "gets|take|takes|needs|need|wants|want|see|shows|show|starts|start|runs|run|ends|end|writes|write|"
    "reads|read|holds|hold|names|name|means|mean|asks|ask|keeps|keep|kills|kill|loses|lose|finds|find|"
    "leaves|builds|build|becomes|become|returns|return|draws|draw|sends|send|counts|count|does|do|can|"
    "may|must|all|such|half"
)


def modules(root: Path, *folders: str) -> list[Path]:
    """Python files below `folders`, in a stable order."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def prose(path: Path) -> str:
    """Docstrings and comments of a module."""
    source = path.read_text(encoding="utf-8")
    nodes = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    texts = [text for node in nodes if (text := ast.get_docstring(node))]
    comments = (
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    )
    return "\n".join(
        [*texts, *(comment for comment in comments if "noqa" not in comment and "fmt:" not in comment)]
    )


def count(root: Path) -> dict[str, float]:
    """Every figure of one checkout."""
    code = modules(root, *CODE)
    sources = {path: path.read_text(encoding="utf-8") for path in code}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    thousands = sum(source.count("\n") for source in sources.values()) / 1000
    everything = modules(root, *CODE, "tests", "benchmarks")
    folders = Counter(path.parent for path in everything if path.name != "__init__.py")
    untyped = sum(len(UNTYPED.findall(source)) for source in sources.values())
    named = [
        node.value
        for path, tree in trees.items()
        if str(path.relative_to(root)) not in REGISTRY
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in STAGES
    ]
    english = "\n".join(prose(path) for path in code)
    documents = "\n".join(
        path.read_text(encoding="utf-8")
        for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    )
    figures: dict[str, float] = {
        "modules in the fullest folder": max(folders.values()),
        "entries of pgenrm_train/": len(
            [p for p in (root / "pgenrm_train").iterdir() if p.name != "__pycache__"]
        ),
        "modules": len(code),
        "lines": round(1000 * thousands),
        "statements": sum(isinstance(node, ast.stmt) for tree in trees.values() for node in ast.walk(tree)),
        "dict[str, Any] and Mapping[str, Any] per 1,000 lines": round(untyped / thousands, 1),
        f"lines over {WIDE} characters": sum(
            len(line) > WIDE for path in everything for line in path.read_text("utf-8").splitlines()
        ),
        "stage names typed outside the registry": len(named),
    }
    for name, text in (("docstrings and comments", english), ("documents", documents)):
        words = len(text.split()) / 1000
        figures[f"{name}: words"] = round(1000 * words)
        figures[f"{name}: odd words per 1,000"] = round(len(re.findall(rf"\b(?:{ODD})\b", text)) / words, 1)
        figures[f'{name}: "a row" for "per row", per 1,000'] = round(
            sum(NOT_PER.fullmatch(word.lower()) is None for word in re.findall(PER, text)) / words, 1
        )
    return figures


def at(revision: str) -> dict[str, float]:
    """The figures of a git revision, or of this checkout for `.`."""
    if revision == ".":
        return count(ROOT)
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as stream:
            stream.extractall(folder, filter="data")
        return count(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("revisions", nargs="*", default=["."], help="git revisions; . is this checkout")
    revisions = parser.parse_args().revisions
    columns = [at(revision) for revision in revisions]
    print(f"{'':60}" + "".join(f"{revision:>12}" for revision in revisions))
    for name in columns[0]:
        print(f"{name:60}" + "".join(f"{column[name]:>12,}" for column in columns))


if __name__ == "__main__":
    main()
