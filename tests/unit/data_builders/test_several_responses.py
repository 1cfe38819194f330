"""Rows with several responses make votes by the stated rule, and reward models become users."""

import json
from pathlib import Path

import pytest
from benchmark_files import reward_models

from data_builders.sources import pairs, rm_as_user
from data_builders.sources.several_responses import votes_of
from pgenrm_train.config import DataConfig
from pgenrm_train.errors import DataError
from pgenrm_train.records.raw_rows import LeftOut
from pgenrm_train.records.rows import row_to_pair

ROW = {"user_id": "ann", "context": "Tea?", "conversation_id": "c", "split": "test"}
FOUR = ROW | {"responses": ["w", "x", "y", {"role": "model", "content": "z"}]}


def built(tmp_path, row, **data):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    left_out = LeftOut()
    data = {"name": "pairs", "path": str(tmp_path / "rows.jsonl")} | data
    return list(pairs.build(DataConfig(**data), 0, left_out)), left_out


@pytest.mark.parametrize(
    ("rule", "votes"),
    [("best", ["zw", "zx", "zy"]), ("all", ["zw", "zx", "zy", "wx", "wy", "xy"]), ("ends", ["zy"])],
)
@pytest.mark.parametrize("given", [{"ratings": [7, 5.5, 1, 9]}, {"ranking": [2, 3, 4, 1]}])
def test_the_rule_makes_the_votes(tmp_path, rule, votes, given):
    found, _ = built(tmp_path, FOUR | given, pairs_of=rule)
    assert [p.chosen + p.rejected for p in found] == votes
    assert {p.conversation_id for p in found} == {"c"} and len({p.pair_id for p in found}) == len(votes)
    assert found[0].chosen_score == (9 if "ratings" in given else None) and found[0].split == "test"


def test_ties_equal_texts_and_unrated_responses_are_counted(tmp_path):
    found, left_out = built(tmp_path, FOUR | {"ratings": [9, 9, None, 2]})
    assert [(p.chosen, p.rejected) for p in found] == [("w", "z")]
    assert left_out == {"responses without a rating": 1, "two responses of equal rating or text": 1}
    found, left_out = built(tmp_path, ROW | {"responses": ["w", "w", "x"], "ratings": [3, 2, 1]})
    assert [(p.chosen, p.rejected) for p in found] == [("w", "x")] and left_out.total() == 1


def test_a_row_with_a_choice_keeps_it(tmp_path):
    found, _ = built(tmp_path, FOUR | {"chosen": "w", "rejected": "z", "ratings": [1, 2, 3, 4]})
    assert [(p.chosen, p.rejected) for p in found] == [("w", "z")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "row 1: expected 'ratings' or 'ranking' next to 'responses', got neither"),
        ({"ratings": [1, 2, 3, 4], "ranking": [1, 2, 3, 4]}, "got ratings and ranking"),
        ({"ratings": [1, 2]}, "field 'ratings': expected one value for each of the 4 responses"),
        ({"ratings": [1, 2, 3, True]}, r"field 'ratings\[3\]': expected a finite number or null, got 'True'"),
        ({"ranking": [0, 1, 2, 3]}, r"field 'ranking\[0\]': expected a rank from 1"),
        ({"responses": ["w", ""], "ratings": [1, 2]}, r"field 'responses\[1\]': expected a non-empty text"),
        ({"responses": "w", "ratings": [1]}, "field 'responses': expected a list of two texts or more"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, said):
    with pytest.raises(DataError, match=said):
        built(tmp_path, FOUR | change)


def test_reward_models_are_users(tmp_path):
    folder = reward_models(tmp_path / "raw")
    found = list(pairs.build(DataConfig(name="rm_as_user", path=str(folder)), 0, LeftOut()))
    assert len(found) == 2 * (12 + 6) and {p.user_id for p in found} == {
        "org_reward-model-a",
        "org_reward-model-b",
    }
    assert {p.split for p in found} == {"train", "test"}
    long = {p.user_id[-1]: p.chosen.startswith("long") for p in found}
    assert long == {"a": True, "b": False} and '"quoted"' in found[0].query
    assert found[0].chosen_score == 3.0


def test_a_conversation_as_json_counts_by_its_last_message(tmp_path):
    talks = {
        side: json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": side}])
        for side in ("chosen", "rejected")
    }
    row = {"prompt": "q", "prompt_id": 7.0, **talks, "chosen_m": 1, "rejected_m": 2}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = pairs.build(DataConfig(name="rm_as_user", path=str(tmp_path)), 0, LeftOut())
    assert (found.chosen, found.rejected, found.pair_id) == ("rejected", "chosen", "7/1-0")


def test_a_cut_file_and_other_columns_are_named(tmp_path):
    folder = reward_models(tmp_path / "raw")
    train = folder / "merged_reward_model_as_user_train.csv"
    whole = train.read_text()
    train.write_text(whole[: whole.index('"quoted') + 4])
    with pytest.raises(DataError, match=r"user_train\.csv, after row 0: expected complete CSV"):
        list(pairs.build(DataConfig(name="rm_as_user", path=str(folder)), 0, LeftOut()))
    for head, got in (("", "an empty file"), ("prompt,prompt,chosen\n", "'prompt' twice")):
        train.write_text(head)
        with pytest.raises(DataError, match=f"expected a head line with one of each name, got {got}"):
            list(pairs.build(DataConfig(name="rm_as_user", path=str(folder)), 0, LeftOut()))
    train.write_text("prompt,text\na,b\n")
    with pytest.raises(DataError, match=r"expected the columns prompt, response_1.* got prompt, text"):
        list(pairs.build(DataConfig(name="rm_as_user", path=str(folder)), 0, LeftOut()))
    train.write_text(whole.replace("long long long ", " ", 1))
    with pytest.raises(DataError, match="field 'chosen': expected a non-empty text"):
        list(pairs.build(DataConfig(name="rm_as_user", path=str(folder)), 0, LeftOut()))
    train.write_text(whole.replace("-1.5", "low"))
    with pytest.raises(DataError, match="field 'rejected_org_reward-model-b': expected a number, got 'low'"):
        list(pairs.build(DataConfig(name="rm_as_user", path=str(folder)), 0, LeftOut()))


def test_the_votes_of_reward_models_are_those_of_the_full_check(tmp_path):
    """Only the first vote of a row is checked in full; the others differ from it in what they may."""
    row = {"prompt_id": "p 1", "prompt": "Ünter?", "split": "val"}
    row |= {f"response_{n}": f"text {n} ü" for n in (1, 2, 3)}
    row |= {f"org_rm-{r}_response_{n}_score": str(n * (-1) ** r) for r in range(3) for n in (1, 2, 3)}
    path, rated = Path("f.csv"), rm_as_user.rated(row, "f.csv, row 1")
    full = [
        row_to_pair(vote, path, 1)
        for rater, scores in rated.scores.items()
        for vote in votes_of(
            rated.row | {"user_id": rater, "responses": rated.texts, "ratings": scores},
            "f.csv, row 1",
            "all",
            "f-1",
            LeftOut(),
        )
    ]
    votes = pairs._votes_of_raters(row, path, 1, "all", LeftOut())
    assert [pair for _, pair in votes] == full and len(full) == 9 and len({p.user_id for p in full}) == 3
    row["response_2"] = "half \ud83d"
    with pytest.raises(DataError, match="expected text that UTF-8 can hold"):
        pairs._votes_of_raters(row, path, 1, "all", LeftOut())


@pytest.mark.parametrize("score", ["inf", "-inf", True, [1]])
def test_a_score_that_is_no_number_is_named_by_its_column(score):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "m_chosen": 1, "m_rejected": score}
    with pytest.raises(DataError, match="field 'm_rejected': expected a number, got"):
        rm_as_user.rated(row, "f, row 1")
    assert rm_as_user.rated(row | {"m_rejected": "nan"}, "").scores == {"m": [1.0, None]}
