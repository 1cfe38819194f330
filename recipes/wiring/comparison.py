"""Compare two finished runs (`eval.compare=`) in a run folder of its own."""

from __future__ import annotations

from pathlib import Path

from eval.report.compare import compare, publish_comparison
from pgenrm_train.config import Config
from pgenrm_train.files import link


def compare_runs(config: Config) -> None:
    """Write the comparison to `<run_dir>/compare/`; starts no model and changes neither run."""
    first, second = config.eval.compare
    comparison = compare((first, second), draws=config.eval.draws, seed=config.seed)
    run_dir, folder = Path(config.run_dir), Path(config.run_dir) / "compare"
    print(publish_comparison(comparison, folder), end="")
    for name in ("comparison.json", "report.html", "report.md"):
        if not (run_dir / name).exists() or (run_dir / name).resolve().parent == folder.resolve():
            link(folder / name, run_dir / name)
    print(f"comparison: {folder / 'comparison.json'} · report: {folder / 'report.html'}")
