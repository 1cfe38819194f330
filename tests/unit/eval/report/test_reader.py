"""The chain reader shows every outcome and kind, with the content of the answers."""

import random

import pandas as pd
from test_summary import Judge, evaluate, odd_pairs

from eval.ask.scored import one_by_one
from eval.report.chain_section import chain_views, shown_rows
from eval.studies.evaluation import Evaluation, ScoredCandidate
from pgenrm_train.config import Config


def table(rows):
    keys = ("pair_id", "kind", "score_chosen", "score_rejected")
    shared = {
        "user_id": "u",
        "order": 0,
        "seed": 0,
        "sample": 0,
        "set": "own",
        "text": "chain",
        "failure": None,
    }
    return pd.DataFrame([shared | dict(zip(keys, row, strict=True)) for row in rows])


def test_rare_outcomes_and_kinds_take_their_turn():
    rows = [(f"hit{n}", "easy" if n % 10 else "hard", 8.0, 3.0) for n in range(60)]
    rows += [("miss", "easy", 3.0, 8.0), ("tie", "hard", 5.0, 5.0), ("failed", "hard", None, None)]
    shown = shown_rows(table(rows), 6)
    assert shown["pair_id"].tolist()[1:4] == ["tie", "miss", "failed"]
    hits = shown[shown["pair_id"].str.startswith("hit")]
    assert hits["kind"].tolist() == ["easy", "hard", "easy"]
    random.Random(0).shuffle(rows)
    assert shown_rows(table(rows), 6)["pair_id"].tolist() == shown["pair_id"].tolist()
    assert len(shown_rows(table(rows[:2]), 6)) == 2


def test_probes_further_samples_and_seeds_are_not_shown():
    rows = table([(f"p{n}", "easy", 8.0, 3.0) for n in range(4)])
    rows.loc[0, "set"], rows.loc[1, "sample"], rows.loc[2, "seed"] = "swapped", 1, 1
    assert shown_rows(rows, 9)["pair_id"].tolist() == ["p3"]


def test_a_model_that_gives_scores_is_read_by_its_scores(tmp_path):
    pairs, histories = odd_pairs()
    config = Config(recipe="evaluate")
    config.eval.draws, config.eval.probes, config.eval.chains_in_report = 20, False, 30
    evaluation = Evaluation(config, pairs, histories)

    def length(example):
        sign = -1 if "plain" in example.pair_id else 1
        return None if "hostile" in example.pair_id else [sign * len(text) for text in example.responses]

    candidate = ScoredCandidate("length", "v1", lambda: one_by_one(length), lambda: None)
    tested = evaluation.test(candidate, tmp_path, lambda items, *_: items)
    views = chain_views(config, evaluation, tested)
    assert {view.outcome for view in views} == {"hit", "miss", "tie", "failure"}
    for view in views:
        assert view.text == "" and (view.failure == "scores:none") == (view.kind == "hostile")
        if view.failure is None:
            sign = -1 if view.kind == "plain" else 1
            assert view.declared == tuple(sign * len(text) for text in view.responses), (
                "in the order in which they are shown"
            )


def test_the_page_of_a_pair_agrees_with_the_predictions(tmp_path):
    pairs, histories = odd_pairs()
    results, files = evaluate(tmp_path, Judge(), pairs, histories, chains_in_report=12)
    stored = pd.read_parquet(tmp_path / "predictions.parquet")
    assert len(shown_rows(stored, 12)) == files["report.html"].count('<article class="chain"') == 12
    assert files["report.html"].count('<span class="badge tie">') == 6, (
        "identical responses, whatever is preferred by place"
    )
    assert results["ties"] > 0
