"""The table of the trial of totals in docs/results.md is the one that the kept cells give."""

import json

import pandas as pd
import pyarrow.parquet as pq
from totals_trial import KEEP, keep, table

from pgenrm_train.config import ROOT


def test_the_published_table_is_that_of_the_kept_cells() -> None:
    assert table(KEEP) in (ROOT / "docs/results.md").read_text()


def test_a_cell_is_kept_with_its_facts_and_read_back(tmp_path) -> None:
    folder = tmp_path / "code-7" / "evaluate"
    folder.mkdir(parents=True)
    truth = [{"model": stage, "criteria allowed share": 0.5} for stage in ("psi", "cre", "curriculum")]
    stages = {row["model"]: {"ceiling": 0.8} for row in truth}
    results = {"chain_errors": [], "chain_truth": truth, "stages": stages}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "manifest.json").write_text("{}")
    fixed = {"set": "own", "kind": "easy", "cohort": "seen", "score_rejected": 5.0, "failure": None}
    rows = [
        {**fixed, "model": stage, "pair_id": f"p{n}", "user_id": f"u{n}", "order": order}
        | {"score_chosen": 8.0 if n < right else 2.0}
        for stage, right in (("psi", 1), ("cre", 2), ("curriculum", 4))
        for n in range(4)
        for order in (0, 1)
    ]
    pd.DataFrame([*rows, {**rows[0], "set": "swapped"}]).to_parquet(folder / "predictions.parquet")
    keep(tmp_path / "code-7", tmp_path / "kept" / "code-7.parquet")
    assert pq.read_table(tmp_path / "kept" / "code-7.parquet").num_rows == 24
    lines = table(tmp_path / "kept").splitlines()[2:]
    assert [line.split(" | ")[:4] for line in lines] == [
        ["| code", "psi", "7", "25.0"],
        ["| code", "cre", "7", "50.0"],
        ["| code", "curriculum", "7", "100.0"],
    ]
    assert lines[2].split(" | ")[6].startswith("+75.0 [")
