"""Two finished runs compared from their files: right numbers, and an error for incomparable runs."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from prediction_tables import consistent

from eval.report.compare import Headline, compare, headline_predictions, write_comparison
from pgenrm_train.config import ROOT
from pgenrm_train.errors import ArtifactError, DataError

FACTS = {
    "model": "m",
    "data": "pairs",
    "data_sha256": "d1",
    "protocol": "strict",
    "seeds": [0],
    "accuracy": 0.5,
    "ci95": [0, 1],
    "stderr": None,
    "ind": 1,
    "pro": 0,
}
USERS = ["a", "a", "b", "b", "c", "c"]


def a_run(folder, hits, inside="evaluate", users=USERS, text="a chain", **facts):
    """A run folder of an evaluation; its predictions also hold other models and other questions."""
    own = consistent(hits, users).assign(
        set="own", model="m", language="English", text=text, scenario=["work", "home"] * len(hits)
    )
    own["scenario"] = own["pair_id"].map(lambda name: "work" if int(name[1:]) % 2 else "home")
    others = [own.assign(model="baseline", score_chosen=0), own.assign(set="swapped", score_chosen=0)]
    (folder / inside).mkdir(parents=True)
    pd.concat([*others, own]).to_parquet(folder / inside / "predictions.parquet")
    (folder / inside / "results.json").write_text(json.dumps(FACTS | facts))
    return str(folder)


def test_by_hand_overall_and_by_slice(tmp_path):
    a, b = a_run(tmp_path / "a", [1, 1, 1, 1, 0, 1]), a_run(tmp_path / "b", [0, 1, 0, 0, 0, 0], inside=".")
    found = compare((a, b), draws=200, seed=0)
    overall = found["overall"]
    assert overall["difference"] == pytest.approx(4 / 6) and (
        overall["accuracy_a"],
        overall["accuracy_b"],
    ) == (5 / 6, 1 / 6)
    assert overall["p_value"] == pytest.approx(2 / 2**4) and overall["p_value_users"] == pytest.approx(
        2 / 2**3
    )
    slices = {(s["slice"], s["value"]): s for s in found["slices"]}
    assert set(slices) == {("scenario", "home"), ("scenario", "work")}  # one language only: no slice
    assert slices["scenario", "home"]["difference"] == pytest.approx(2 / 3)
    assert slices["scenario", "work"]["n_pairs"] == 3
    assert all(s["p_value_users_adjusted"] >= s["p_value_users"] for s in found["slices"])
    assert any("3 users: too few" in note for note in found["notes"])
    mirrored = compare((b, a), draws=200, seed=0)["overall"]
    assert mirrored["difference"] == pytest.approx(-4 / 6) and mirrored["p_value"] == overall["p_value"]


def test_everything_is_written(tmp_path):
    a, b = a_run(tmp_path / "a", [1, 0, 1, 1, 0, 1]), a_run(tmp_path / "b", [1, 0, 0, 1, 0, 1])
    text = write_comparison(compare((a, b), draws=50, seed=0), tmp_path / "out")
    assert "a − b" in text and "no difference is proven" in text
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["overall"]["better"] == 1
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Difference on the same pairs" in html and "p users" in html and "16.7 %" in html
    assert f'<th scope="row">{tmp_path}' not in html, "runs go by their short names"
    assert "| all |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": "prism"}, "cannot be compared: data pairs in the first and prism in the second"),
        ({"data_sha256": "d2"}, "cannot be compared: data, by content d1 in the first and d2"),
        ({"protocol": "release"}, "cannot be compared: protocol strict in the first and release"),
        ({"seeds": [0, 1]}, r"cannot be compared: evaluation seeds \[0\] in the first and \[0, 1\]"),
    ],
)
def test_incomparable_runs_are_refused(tmp_path, changed, words):
    a, b = a_run(tmp_path / "a", [1, 0, 1, 1, 0, 1]), a_run(tmp_path / "b", [1, 0, 0, 1, 0, 1], **changed)
    with pytest.raises(DataError, match=words):
        compare((a, b), draws=50, seed=0)


def test_runs_of_other_pairs_are_refused(tmp_path):
    a, b = a_run(tmp_path / "a", [1, 0, 1, 1, 0, 1]), a_run(tmp_path / "b", [1, 0, 0, 1], users=USERS[:4])
    with pytest.raises(
        DataError, match=r"different data: pair_id 'p4' of user 'c' is in .*a only \(2 such pairs\)"
    ):
        compare((a, b), draws=50, seed=0)


def test_a_scorer_without_sampling_meets_a_model_with_several_seeds(tmp_path):
    a = a_run(tmp_path / "a", [1, 0, 1, 1, 0, 1], seeds=[0, 1])
    b = a_run(tmp_path / "b", [1, 0, 0, 1, 0, 1], text=None)
    found = compare((a, b), draws=50, seed=0)
    assert any("all seeds of the other run" in note for note in found["notes"])


def test_what_is_no_finished_run_is_named(tmp_path):
    good = a_run(tmp_path / "a", [1, 0, 1, 1, 0, 1])
    with pytest.raises(ArtifactError, match="nowhere holds no finished evaluation"):
        compare((good, str(tmp_path / "nowhere")), draws=50, seed=0)
    (tmp_path / "a" / "evaluate" / "predictions.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ArtifactError, match="cannot be read"):
        compare((good, good), draws=50, seed=0)
    (tmp_path / "a" / "evaluate" / "results.json").write_text('{"model": "m"}')
    with pytest.raises(ArtifactError, match="lacks 'data'; evaluate this run again"):
        compare((good, good), draws=50, seed=0)


def test_the_headline_of_a_scaled_run_is_its_cell():
    """Ind-2: the mean of two samples, not the first one."""
    own = consistent([1, 0]).assign(set="own", model="m", source=None, study=None, neighbour=None)
    pool = [
        own.assign(set="scaling/own", source="ind", study="scaling", sample=i, score_chosen=c)
        for i, c in enumerate((9, 0))
    ]
    other = [own.assign(set="one_pair/own", source="ind", study="one_pair", sample=i) for i in (0, 1)]
    table = pd.concat([own, *pool, *other], ignore_index=True)
    cell = headline_predictions(table, Headline(**FACTS | {"ind": 2}))
    assert set(cell["score_chosen"]) == {4.5} and len(cell) == 4
    assert len(headline_predictions(table, Headline(**FACTS | {"ind": 1}))) == 4


def test_the_command_starts_no_model_and_leaves_the_runs_alone(tmp_path):
    a, b = a_run(tmp_path / "a", [1, 0, 1, 1, 0, 1]), a_run(tmp_path / "b", [1, 0, 0, 1, 0, 1])
    before = sorted(tmp_path.rglob("*"))

    def pgenrm(*words):
        command = [
            sys.executable,
            "-m",
            "pgenrm_train",
            "recipe=evaluate",
            *words,
            f"run_dir={tmp_path / 'out'}",
            "eval.draws=50",
        ]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    done = pgenrm(f"eval.compare=[{a},{b}]")
    assert done.returncode == 0 and "difference in accuracy" in done.stdout, done.stderr
    assert sorted(p.name for p in (tmp_path / "out" / "compare").iterdir()) == [
        "comparison.json",
        "report.html",
        "report.md",
        "table.txt",
    ]
    assert [p for p in sorted(tmp_path.rglob("*")) if "out" not in p.parts] == before
    for wrong, words in (
        (f"eval.compare=[{a}]", "must name two run folders"),
        (f"eval.compare=[{a},{tmp_path}]", "no finished evaluation"),
    ):
        done = pgenrm(wrong)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
