"""The leak report finds each planted leak, none in clean data, and its errors end the build."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders.checks import card
from data_builders.checks.leaks import LeakReport, clustered_share
from data_builders.checks.shared_texts import SharedTexts, nearest_by_band
from pgenrm_train.chains.near_duplicates import PLACES, shingles
from pgenrm_train.config import Config, DataConfig, StageName
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_table
from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.records.rows import pair_to_row
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.stages.registry import REGISTRY
from recipes.build_data import build as build_and_describe
from recipes.wiring.evaluation import notes

WORDS = [f"word{i:03d}" for i in range(500)]  # of one length, so that length gives nothing away


def words(seed: object, count: int = 30) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=count))


def vote(number, user="u", split="train", query=None, chosen=None, rejected=None, **more) -> PreferencePair:
    texts = (query or f"query {number}", chosen or words(f"c{number}"), rejected or words(f"r{number}"))
    return PreferencePair(f"p{number}", user, (Message("user", texts[0]),), *texts[1:], split=split, **more)


def clean() -> list[PreferencePair]:
    return [
        vote(n, f"u{n % 4}", ("train", "train", "val", "test")[n // 4 % 4], conversation_id=f"c{n}")
        for n in range(64)
    ]


def report(votes, **settings):
    leaks = LeakReport(**settings)
    for pair in votes:
        leaks.add(pair)
    return leaks.report()


def test_clean_votes_have_nothing_to_report():
    found = report(clean())
    assert found["errors"] == [] and found["findings"] == []
    assert (found["votes"], found["held_out_votes"]) == (64, 32)


def test_a_pair_of_one_user_in_two_splits_is_an_error():
    planted = vote(
        99, "u0", "test", query="query 0", chosen=words("r0"), rejected=words("c0")
    )  # the other way round
    found = report([*clean(), planted])
    assert found["same_pair"]["within_user"] == 1
    assert found["errors"] == ["1 pairs of one user are in two splits, e.g. p0 and p99 of user u0"]
    assert (
        report([*clean(), vote(98, "u0", "test", chosen=words("c0"), rejected=words("r0"))])["errors"] == []
    ), "another question"


def test_a_pair_that_others_judged_is_reported_and_an_error_when_split_by_pair():
    again = [
        vote(n, "other", "test", query=f"query {n}", chosen=words(f"c{n}"), rejected=words(f"r{n}"))
        for n in (0, 1)
    ]
    found = report([*clean(), *again])
    assert found["same_pair"]["between_users"] == found["same_pair"]["held_out_votes_between_users"] == 2
    assert (
        found["errors"] == []
        and "5.9% of the held-out votes are on pairs that other users judged in train" in found["findings"]
    )
    assert report([*clean(), *again], split_by="pair")["errors"] == [
        "2 pairs are in two splits, though data.split_by=pair"
    ]


def test_a_user_on_both_sides_is_an_error_only_where_users_are_disjoint():
    assert report(clean())["same_user"] == {"asked_and_trained": 4, "asked_only": 0, "marked_both_ways": 0}
    (error,) = report(clean(), split_by="user_disjoint")["errors"]
    assert error == "4 held-out users also train, though data.split_by=user_disjoint"
    held_out = [vote(100 + n, "h", split, user_split="test") for n, split in enumerate(("train", "test"))]
    train = [p for p in clean() if p.split == "train"]
    assert report([*train, *held_out], split_by="user_disjoint")["errors"] == [], (
        "a held-out user's train part is history"
    )
    (error,) = report([*train, *held_out, vote(200, "h")])["errors"]
    assert "1 users are held out by some of their rows" in error


def test_a_conversation_in_two_splits_is_reported():
    found = report(
        [*clean(), vote(99, "u0", "test", conversation_id="c0"), vote(98, "v", "test", conversation_id="c1")]
    )
    assert found["same_conversation"] == {"within_user": 1, "conversations": 2, "of": 64}
    assert "1 conversations of one user are in two splits" in found["findings"]


def test_a_near_duplicate_is_found_whatever_its_case_and_marks_and_a_rewrite_is_not():
    long = words("long", 200)
    changed = long.upper().replace(" ", ", ", 1) + "!"
    half = " ".join(long.split()[:100]) + " " + words("other", 100)
    votes = [
        *clean(),
        vote(90, chosen=long),
        vote(91, "a", "test", chosen=changed),
        vote(92, "a", "test", rejected=half),
    ]
    near = report(votes)["near_duplicates"]["responses"]
    assert (near["exact"], near["near"]) == (0, 1)
    assert near["examples"] == [
        {"held_out": "p91", "train": "p90", "similarity": near["examples"][0]["similarity"]}
    ]
    assert near["examples"][0]["similarity"] >= 0.8
    assert report(votes, near_duplicates=False)["near_duplicates"] is None


def test_exact_copies_are_counted_once_a_text_and_history_of_held_out_users_is_no_training_text():
    votes = [
        vote(1, chosen="same " * 5),
        *(vote(n, "b", "test", query="query 1", rejected="same " * 5) for n in (2, 3)),
    ]
    found = report(votes)["near_duplicates"]
    assert (found["responses"]["held_out"], found["responses"]["exact"]) == (5 - 2, 1) and found["queries"][
        "exact"
    ] == 1
    votes[0] = vote(1, "b", chosen="same " * 5, user_split="test")
    assert report(votes)["near_duplicates"]["responses"]["exact"] == 0


@pytest.mark.parametrize("longer", [True, False])
def test_a_label_that_follows_from_length_is_reported(longer):
    short, long = words("s", 10), words("l", 60)
    votes = [
        vote(n, f"u{n % 5}", "test", chosen=long if longer else short, rejected=short if longer else long)
        for n in range(40)
    ]
    found = report(votes, near_duplicates=False)
    assert found["longer_is_chosen"]["held_out"] == {
        "share": float(longer),
        "ci95": [float(longer)] * 2,
        "votes": 40,
        "users": 5,
    }
    word = "longer" if longer else "shorter"
    assert (
        f"the {word} response is chosen in 100.0% [100.0%, 100.0%] of the held-out votes, so the label can "
        "be guessed" in found["findings"]
    )


def test_a_position_that_gives_the_label_away_is_reported_and_an_unknown_one_is_not():
    skewed = [vote(n, f"u{n % 5}", "test", position=int(n % 10 == 0)) for n in range(100)]
    found = report(skewed, near_duplicates=False)
    assert found["shown_first_is_chosen"]["held_out"]["share"] == 0.9
    assert any(f.startswith("the first shown response is chosen in 90.0%") for f in found["findings"])
    assert report(clean(), near_duplicates=False)["shown_first_is_chosen"]["held_out"]["votes"] == 0


def test_duplicates_and_contradictions_are_counted():
    texts = {"query": "q", "chosen": "left text", "rejected": "right text"}
    turned = {"query": "q", "chosen": "right text", "rejected": "left text"}
    found = report(
        [
            vote(1, **texts),
            vote(2, **texts),
            vote(3, **turned),
            vote(4, "b", **texts),
            vote(5, chosen="x", rejected="x"),
        ]
    )
    assert found["duplicates"] == {"repeated_votes": 1, "contradictory_pairs": 1, "identical_responses": 1}
    assert found["findings"][-3:] == [
        "1 votes repeat an earlier one of the same user",
        "on 1 pairs the same user chose both ways",
        "1 votes are between two equal texts",
    ]


def test_nothing_held_out_is_reported():
    assert any(f.startswith("nothing is held out") for f in report([vote(1)])["findings"])


def test_the_interval_is_that_of_users_not_of_votes():
    alike = clustered_share([(100, 100), (0, 100), (100, 100), (0, 100)])
    mixed = clustered_share([(50, 100)] * 4)
    assert alike["share"] == mixed["share"] == 0.5
    assert alike["ci95"] == [0.0, 1.0] and mixed["ci95"] == [0.5, 0.5]
    assert clustered_share([(3, 4)])["ci95"] is None and clustered_share([])["share"] is None


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 9)).map(lambda t: (min(t), max(t))),
        min_size=2,
        max_size=30,
    )
)
def test_the_interval_agrees_with_the_formula(rows):
    hits, votes = np.array(rows, float).T
    share = hits.sum() / votes.sum()
    variance = len(rows) / (len(rows) - 1) * ((hits - share * votes) ** 2).sum() / votes.sum() ** 2
    low, high = clustered_share(rows)["ci95"]
    assert low == pytest.approx(max(0, share - 1.96 * variance**0.5), abs=1e-4)
    assert high == pytest.approx(min(1, share + 1.96 * variance**0.5), abs=1e-4)


# ---- the join over bands ----


def test_the_similarity_estimates_jaccard():
    base = words("base", 400).split()
    votes = [
        vote(0, chosen=" ".join(base)),
        *(vote(n, "h", "test", chosen=" ".join([*base[: 400 - n], *words(n, n).split()])) for n in (20, 40)),
    ]
    near = SharedTexts()
    for pair in votes:
        near.add(pair)
    found = {e["held_out"]: e["similarity"] for e in near.report()["responses"]["examples"]}
    sets = {p.pair_id: shingles(p.chosen) for p in votes}
    for name, similarity in found.items():
        true = len(sets["p0"] & sets[name]) / len(sets["p0"] | sets[name])
        assert similarity == pytest.approx(true, abs=0.12)
    assert "p20" in found


def test_many_copies_of_one_text_cost_one_candidate_a_band():
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2**32, (1, PLACES), np.uint32)
    known = np.repeat(one, 20_000, axis=0)
    match, similarity = nearest_by_band(np.repeat(one, 20_000, axis=0), known)  # all against all would be 4e8
    assert (similarity == 1).all() and (match == 0).all()
    strangers = rng.integers(0, 2**32, (50, PLACES), np.uint32)
    assert (nearest_by_band(strangers, known)[1] < 0.1).all()
    assert (
        nearest_by_band(strangers[:0], known)[0].shape == (0,)
        and (nearest_by_band(strangers, known[:0])[1] == 0).all()
    )


# ---- in the build ----


def built(tmp_path, votes, **data):
    source = tmp_path / "votes.parquet"
    write_table(source, [pair_to_row(p) for p in votes])
    config = Config(data=DataConfig(name="pairs", path=str(source), **data))
    folder = StageFolder(tmp_path / "run" / "build_data", "build_data")
    return folder.path, build_and_describe(config, folder)


def test_a_build_leaves_report_card_and_findings(tmp_path, capsys):
    again = vote(
        99, "u0", "test", query="query 0", chosen=words("c0"), rejected=words("r0"), kind="a|b <script>"
    )
    votes = [
        *clean(),
        again,
        vote(200, "u1", "val", query="query 1", chosen=words("c1"), rejected=words("r5")),
    ]
    folder, facts = built(tmp_path, votes, on_overlap="drop")
    leaks = json.loads((folder / "leaks.json").read_text())
    assert leaks["same_pair"]["left_out"] == 1 and leaks["errors"] == [], "the train vote gave way"
    assert facts["findings"] == leaks["findings"] and "were left out" in capsys.readouterr().out
    text = (folder / "README.md").read_text()
    assert facts["sha256"] in text and "| pairs | 65 |" in text and "| chosen | 30 | 30 | 30 | 30 |" in text
    assert "<script>" not in text and "a b  script" in text and str(tmp_path) not in text
    before = text
    built(tmp_path, votes, on_overlap="drop")
    assert (folder / "README.md").read_text() == before, "the same build writes the same card"


def test_an_error_ends_the_build_after_the_report_is_written(tmp_path):
    rows = [*clean(), vote(100, "h", user_split="test"), vote(101, "h", "test")]
    rows.append(vote(102, "h"))  # the same user, not held out
    with pytest.raises(
        DataError, match="the data leaks: 1 users are held out by some of their rows"
    ) as error:
        built(tmp_path, rows)
    assert "\n" not in str(error.value)
    assert json.loads((tmp_path / "run" / "build_data" / "leaks.json").read_text())["errors"]


@pytest.mark.parametrize("by", ["within_user", "user_disjoint", "pair"])
def test_each_way_of_splitting_passes_its_own_report(tmp_path, by):
    """Twenty users judge the same questions, so that any pair is judged by several of them."""
    votes = [
        vote(
            f"{q}-{u}",
            f"u{u}",
            query=f"query {q}",
            chosen=words(f"c{q}"),
            rejected=words(f"r{q}"),
            conversation_id=f"q{q}",
        )
        for q in range(40)
        for u in range(20)
    ]
    folder, facts = built(tmp_path, votes, split_by=by, near_duplicates=False)
    leaks = json.loads((folder / "leaks.json").read_text())
    assert leaks["errors"] == [] and facts["pairs"] == 800
    assert (leaks["same_pair"]["between_users"] == 0) == (by == "pair")
    assert (leaks["same_user"]["asked_and_trained"] == 0) == (by == "user_disjoint")
    assert leaks["same_conversation"]["within_user"] == 0
    if by == "within_user":
        assert facts["pairs_by_split"] == {"train": 560, "val": 80, "test": 160}
    if by == "user_disjoint":
        assert facts["users_by_user_split"] == {"train": 17, "val": 1, "test": 2}
        assert facts["pairs_by_split"]["test"] == 40 and facts["pairs_by_split"]["val"] == 20


def test_an_evaluation_carries_the_findings(tmp_path):
    config = Config(run_dir=str(tmp_path), data=DataConfig(name="pairs"))
    folder = StageFolder(tmp_path / "build_data", "build_data")
    folder.begin(config={}, settings={}, inputs={}, seed=0)
    folder.finish(findings=["51.8% of the held-out votes are known"])
    assert notes(config, [])[-1] == "Data: 51.8% of the held-out votes are known."
    assert not any(note.startswith("judge=none") for note in notes(config, []))
    assert notes(config, ["psi", "cre"])[0].startswith("judge=none: no process reward"), (
        "told of runs that CRE trained"
    )


def test_lengths_are_percentiles_of_words_and_marks():
    assert card.count_tokens("Hello, world! 12.5") == 7
    assert card.percentiles({1: 90, 5: 9, 100: 1}) == {"p50": 1, "p90": 1, "p99": 5, "p100": 100}
    assert REGISTRY[StageName.BUILD_DATA].reads == ("data", "seed"), (
        "the report is part of the build's settings"
    )
