"""The curriculum's trial without its training: kept cells, comparable cells, and the budget of each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import kept_cells
import pandas as pd
import pytest
from curriculum_proof import METHODS, Proof, curves
from proof_report import differences, publish
from training_seeds import ROOT

from pgenrm_train.errors import ArtifactError, DataError

KINDS = ("easy", "hard")


def answers(right: str, failure: str | None = None) -> pd.DataFrame:
    """Eight pairs of four users, in both orders; one letter of `right` per pair: b(oth), o(ne), n(one)."""
    rows = []
    for number, letter in enumerate(right):
        for order in (0, 1):
            hit = letter == "b" or (letter == "o" and order == 0)
            row = {
                "pair_id": f"p{number}",
                "user_id": f"u{number // 2}",
                "kind": KINDS[number % 2],
                "order": order,
            }
            cohort = "unseen_persona" if number < 4 else "seen_persona"
            rows.append(
                row
                | {
                    "cohort": cohort,
                    "score_chosen": 7.0 if hit else 3.0,
                    "score_rejected": 5.0,
                    "failure": None,
                }
            )
    if failure:
        rows[0] |= {"score_chosen": None, "score_rejected": None, "failure": failure}
    return pd.DataFrame(rows).assign(seed=0, sample=0)


def facts(method: str, seed: int = 0, **changed: Any) -> dict[str, Any]:
    curves = {
        "zero_advantage_share": [0.5, 0.25, 0.0],
        "hard_pass_rate": [0.4, None, 0.6],
        "rest_pass_rate": [0.9, 0.9, 1.0],
    }
    hardness = {"pairs": 10, "hard": 4, "suspect": 1} if method == "linear" else None
    start = "psi" if method in ("psi", "cre") else f"cre-{seed}"
    found = {
        "method": method,
        "seed": seed,
        "start": start,
        "checkpoint": f"{method}-{seed}",
        "settings": {"cre.rows": 64},
    }
    return (
        found | {"steps": 3, "chains": 24, "seconds": 1.0, "hardness": hardness, "curves": curves} | changed
    )


def keep(
    folder: Path, method: str, right: str, seed: int = 0, failure: str | None = None, **changed: Any
) -> None:
    kept_cells.keep(folder, answers(right, failure), facts(method, seed, **changed))


def test_cells_of_several_days_share_one_table(tmp_path: Path) -> None:
    """Seed 0 was kept on one day, seed 1 on another; nothing else of either remains."""
    keep(tmp_path, "cre", "bbbbbbbb")
    keep(tmp_path, "uniform", "bnbnbnbn")
    keep(tmp_path, "linear", "bbbobnbn")
    keep(tmp_path, "uniform", "bnbnbnbn", seed=1)
    keep(tmp_path, "linear", "bnbobnbn", seed=1, settings={"cre.rows": 64, "cre.newer_key": 1})
    page = publish(kept_cells.read(tmp_path), METHODS, tmp_path / "docs")
    lines = {
        line.split(" | ")[0].strip("| "): line.split(" | ")
        for line in page.read_text().splitlines()
        if " | " in line
    }
    assert lines["linear"][1:4] != lines["uniform"][1:4]
    found = {
        row["comparison"]: row
        for row in differences({c: t for c, (t, _) in kept_cells.read(tmp_path).items()})
    }
    row = found["linear − uniform"]
    assert row["seeds"] == 2
    assert row["all difference"] == pytest.approx((1.5 / 8 + 0.5 / 8) / 2)
    assert row["seed stderr"] == pytest.approx((1.5 / 8 - 0.5 / 8) / 2)
    assert (
        row["unseen hard difference"] == pytest.approx((1.5 / 2 + 0.5 / 2) / 2)
        and row["unseen easy difference"] == 0
    )
    assert row["all difference ci95"][0] <= row["all difference"] <= row["all difference ci95"][1]
    assert found["uniform − cre"]["seeds"] == 1 and found["uniform − cre"]["all difference"] == pytest.approx(
        -0.5
    )
    assert "unseen rival difference" not in row, "no pair is of that kind"


def test_the_start_is_one_cell_for_all_seeds(tmp_path: Path, proof: Proof) -> None:
    keep(tmp_path, "psi", "bbbbnnnn", curves={}, steps=0, chains=0)
    keep(tmp_path, "cre", "bbbbbnnn")
    keep(tmp_path, "cre", "bbbnnnnn", seed=1)
    kept = kept_cells.read(tmp_path)
    row = differences({cell: table for cell, (table, _) in kept.items()})[0]
    assert (row["comparison"], row["seeds"], row["seeds up"], row["all difference"]) == (
        "cre − psi",
        2,
        1,
        0.0,
    )
    assert "| psi | 1 | 0 | 0 |" in publish(kept, METHODS, tmp_path / "docs").read_text()
    assert proof.steps("psi") == 0 and not proof.kept("psi", 3)
    proof.keep = tmp_path
    assert proof.kept("psi", 3) and not proof.kept("cre", 3)


def test_the_page_has_the_facts_of_training_and_the_plot(tmp_path: Path) -> None:
    keep(tmp_path, "uniform", "bnbnbnbn")
    keep(tmp_path, "linear", "bbbobnbn")
    page = publish(kept_cells.read(tmp_path), METHODS, tmp_path / "docs")
    assert (
        "| linear | 40.0 % | 10.0 % | 40 % → 60 % | 90 % → 100 % | – → – | 25.0 % |"
        in page.read_text().splitlines()
    )
    assert "(curriculum_proof.svg)" in page.read_text()
    plot = tmp_path / "docs/curriculum_proof.svg"
    texts = [node.text for node in ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert "linear − uniform (1)" in texts and "unseen hard" in texts
    before = plot.read_bytes()
    publish(kept_cells.read(tmp_path), METHODS, tmp_path / "docs")
    assert plot.read_bytes() == before


def test_failures_are_kept_as_failures(tmp_path: Path) -> None:
    keep(tmp_path, "uniform", "bbbbbbbb")
    keep(tmp_path, "linear", "bbbbbbbb", failure="no_markers")
    found = {cell: table for cell, (table, _) in kept_cells.read(tmp_path).items()}
    assert found["linear", 0]["failure"].dropna().tolist() == ["no_markers"]
    assert differences(found)[0]["all difference"] == pytest.approx(-1 / 16)


def test_how_often_a_cell_was_validated_is_free(tmp_path: Path) -> None:
    keep(tmp_path, "cre", "bbbbbbbb")
    keep(tmp_path, "linear", "bbbbbbbb", settings={"cre.rows": 64, "cre.validate_every": 7})
    keep(tmp_path, "anti", "bbbbbbbb", settings={"cre.rows": 64, "cre.validate_every": 8})
    assert len(kept_cells.read(tmp_path)) == 3


@pytest.mark.parametrize(
    ("method", "changed", "message"),
    [
        (
            "linear",
            {"settings": {"cre.rows": 32}},
            r"linear-0 was made with other settings than cre-0 .*cre\.rows: 64 → 32",
        ),
        (
            "linear",
            {"start": "cre-7"},
            "linear-0 .* does not start from the checkpoint of cre-0: delete the kept cells of seed 0",
        ),
        ("cre", {"seed": 1, "start": "another psi"}, "cre-1 and cre-0 .* start from different checkpoints"),
    ],
)
def test_cells_that_do_not_belong_together_are_refused(
    tmp_path: Path, method: str, changed: dict[str, Any], message: str
) -> None:
    keep(tmp_path, "cre", "bbbbbbbb")
    keep(tmp_path, method, "bbbbbbbb", **changed)
    with pytest.raises(ArtifactError, match=message):
        kept_cells.read(tmp_path)


def test_arms_without_their_cre_must_share_a_start(tmp_path: Path) -> None:
    keep(tmp_path, "uniform", "bbbbbbbb")
    keep(tmp_path, "linear", "bbbbbbbb", start="cre-0 trained again")
    with pytest.raises(ArtifactError, match=r"uniform-0 and linear-0 .* start from different checkpoints"):
        kept_cells.read(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"eval\.seeds=1"):
        kept_cells.keep(tmp_path, pd.concat([answers("b"), answers("b")]), facts("cre"))
    answers("b").to_parquet(tmp_path / "cre-0.parquet")
    with pytest.raises(ArtifactError, match="is not a kept cell"):
        kept_cells.read(tmp_path)


@pytest.fixture
def proof(tmp_path: Path) -> Proof:
    start = ROOT / "tests/data/psi_nano"
    return Proof(argparse.Namespace(out=tmp_path / "out", keep=tmp_path / "keep", start=start, overrides=[]))


def test_arms_that_measure_hardness_and_those_that_do_not_have_one_budget_of_chains(proof: Proof) -> None:
    assert {proof.chains(arm) for arm in ("linear", "uniform_process", "unmeasured")} == {
        36 * 16 * 8 + 640 * 4
    }
    assert proof.steps("unmeasured") - proof.steps("linear") == 640 * 4 / (16 * 8)
    assert proof.composed["linear"].data.max_test_pairs >= 2000


def test_a_measurement_is_made_once_per_seed(proof: Proof) -> None:
    for arm in ("linear", "anti", "self_paced"):
        proof.trained(arm, 0).mkdir(parents=True)
        (proof.trained(arm, 0) / "mirror.parquet").touch()
    files = [proof.trained(arm, 0) / "mining.parquet" for arm in ("linear", "anti", "self_paced")]
    proof.share_mining(0)
    assert not any(file.exists() for file in files), "nothing is measured yet"
    files[0].write_text("measured")
    assert [file.read_text() for file in files] == ["measured"] * 3
    files[0].unlink()
    files[1].unlink()
    files[1].write_text("measured by another")
    proof.share_mining(0)
    assert [file.read_text() for file in files] == ["measured by another"] * 3


def test_a_cell_keeps_the_curves_of_its_training(tmp_path: Path) -> None:
    folder = tmp_path / "curriculum"
    folder.mkdir()
    lines = [
        {"step": s, "curriculum/pass_rate": s / 4, "curriculum/curriculum/hard_pass_rate": None}
        for s in (1, 2)
    ]
    lines[1]["curriculum/curriculum/rest_pass_rate"] = 1.0
    lines.insert(1, {"step": 1, "curriculum/validation/accuracy": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves(folder) == {"pass_rate": [0.25, 0.5], "rest_pass_rate": [None, 1.0]}, (
        "a step without such pairs has none"
    )
