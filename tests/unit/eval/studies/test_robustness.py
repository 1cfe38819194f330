"""Each probe changes one thing, deterministically; drops and flips are right for known scorers."""

import pandas as pd
import pytest
from prompt_sections import split_prompt

from eval.ask.baselines import fit_baseline
from eval.ask.scored import one_by_one, score_pairs, scored
from eval.studies.robustness import (
    KINDS,
    inject,
    pad,
    paraphrase,
    probe_questions,
    probe_rows,
    probe_slice,
)
from pgenrm_train.config import Config
from pgenrm_train.config.evaluation import PROBES
from pgenrm_train.prompts.masking import MaskedView
from pgenrm_train.prompts.messages import chat_messages, neutralise
from pgenrm_train.records.pairs import HistoryItem, Message, PreferencePair


def vote(
    number: int, chosen: str = "I do not know.", rejected: str = "I really do not know that."
) -> PreferencePair:
    return PreferencePair(
        f"p{number}", f"u{number % 4}", (Message("user", f"question {number}"),), chosen, rejected
    )


def item(text: str) -> HistoryItem:
    return HistoryItem("earlier", text, "something else")


PAIRS = [vote(n) for n in range(12)]
HISTORIES = {p.pair_id: (item(f"a{n % 4}"), item("b"), item("c")) for n, p in enumerate(PAIRS)}


class ReadsHistory:
    """Prefers the first response if the history's first choice is `wanted`, else the second."""

    def __init__(self, wanted: set[str]) -> None:
        self.wanted = wanted

    def __call__(self, example):
        return (1.0, 0.0) if example.history and example.history[0].chosen in self.wanted else (0.0, 1.0)


def probed(scorer, kinds, pairs=PAIRS, histories=HISTORIES, draws=50):
    own = score_pairs(scorer, pairs, histories).assign(set="own")
    tables = [own, scored(probe_questions(kinds, pairs, histories), one_by_one(scorer))]
    rows = probe_rows(pd.concat(tables, ignore_index=True), kinds, pairs, draws=draws, seed=0)
    return {row["probe"]: row for row in rows}


def test_every_configured_kind_exists():
    assert set(PROBES) == {"swapped_history", *KINDS}


def test_questions_change_one_thing_only():
    asked = {kind: probe_questions([kind], PAIRS, HISTORIES) for kind in PROBES}
    for kind, questions in asked.items():
        assert [(q.pair.pair_id, q.order) for q in questions] == [
            (p.pair_id, o) for p in PAIRS for o in (0, 1)
        ], kind
        for q in questions:
            original = next(p for p in PAIRS if p.pair_id == q.pair.pair_id)
            history = HISTORIES[q.pair.pair_id]
            assert (q.pair != original) == (kind in ("padded", "injected", "paraphrased"))
            assert (q.history != history) == ("history" in kind)
    assert all(set(q.history) == set(HISTORIES[q.pair.pair_id]) for q in asked["shuffled_history"])
    assert all(q.history in HISTORIES.values() for q in asked["swapped_history"])
    assert [q.key for q in probe_questions(PROBES, PAIRS, HISTORIES)] == [
        q.key for kind in PROBES for q in asked[kind]
    ]


def test_the_slice_does_not_depend_on_the_order_of_the_pairs():
    assert probe_slice(PAIRS, 5) == probe_slice(PAIRS[::-1], 5) and len(probe_slice(PAIRS, 99)) == 12


def test_a_length_rule_falls_by_padding_and_by_nothing_else():
    shorter = probed(fit_baseline("shorter", [], []), PROBES)
    longer = probed(fit_baseline("longer", [], []), PROBES)
    assert (longer["padded"]["as asked accuracy"], longer["padded"]["drop"]) == (
        0.0,
        0.0,
    )  # the rejected one is longer already
    assert (shorter["padded"]["drop"], shorter["padded"]["flip rate"]) == (0.0, 0.0)
    other_way = [vote(n, chosen="I really do not know that.", rejected="I do not know.") for n in range(12)]
    fallen = probed(fit_baseline("longer", [], []), PROBES, other_way)
    assert (fallen["padded"]["drop"], fallen["padded"]["drop ci95"], fallen["padded"]["flip rate"]) == (
        1.0,
        [1.0, 1.0],
        1.0,
    )
    for kind in ("swapped_history", "empty_history", "shuffled_history", "paraphrased"):
        assert (fallen[kind]["drop"], fallen[kind]["flip rate"]) == (0.0, 0.0), kind


def test_a_report_notes_that_padding_moves_a_rule_for_short_texts():
    """It gains accuracy by an irrelevant change, which no drop shows."""
    from eval.report.notes import reader_notes
    from eval.studies.evaluation import Evaluation

    config, notes = Config(recipe="evaluate"), {}
    config.eval.draws = 50
    other_way = [vote(n, chosen="I really do not know that.", rejected="I do not know.") for n in range(12)]
    for name in ("shorter", "longer", "random"):
        tested = Evaluation(config, other_way, HISTORIES).baseline(
            name, fit_baseline(name, [], []), final=True
        )
        notes[name] = " ".join(reader_notes(tested))
    assert "no loss of accuracy is proven" in notes["shorter"]
    assert (
        "still turns verdicts under irrelevant changes: padded (100.0% of presentations)" in notes["shorter"]
    )
    assert "loses accuracy" in notes["longer"] and "turns verdicts" not in notes["longer"]
    assert "paraphrased" in notes["random"].split("turns verdicts")[1]


def test_a_scorer_that_reads_the_history_flips_without_it():
    rows = probed(ReadsHistory({"a0", "a1", "a2", "a3"}), PROBES)
    assert (
        rows["empty_history"]["flip rate"] == 1.0 and rows["empty_history"]["drop"] == 0.0
    )  # wrong in one order either way
    assert rows["swapped_history"]["flip rate"] == 0.0  # the other's first choice is wanted too
    assert 0 < rows["shuffled_history"]["flip rate"] < 1
    assert rows["padded"]["note"].startswith("4 users: too few")


def test_unchangeable_pairs_are_left_out_and_counted():
    pairs = [*PAIRS[:3], vote(3, chosen="Ünïcode ...", rejected="...")]
    histories = {"p0": (item("a"),), "p1": (item("a"), item("a")), "p2": (), "p3": ()}
    rows = probed(ReadsHistory({"a"}), PROBES, pairs, histories)
    assert {kind: (row["pairs"], row["left out"]) for kind, row in rows.items()} == {
        "shuffled_history": (0, 4),
        "swapped_history": (2, 2),
        "empty_history": (2, 2),
        "padded": (4, 0),
        "injected": (4, 0),
        "paraphrased": (3, 1),
    }


def test_asked_again_shows_how_often_sampling_alone_flips():
    own = score_pairs(fit_baseline("longer", [], []), PAIRS, HISTORIES).assign(set="own")
    turned = own.assign(seed=1)
    mine = turned["pair_id"].isin(["p0", "p1", "p2"])
    turned.loc[mine, ["score_chosen", "score_rejected"]] = turned.loc[
        mine, ["score_rejected", "score_chosen"]
    ].to_numpy()
    rows = probe_rows(pd.concat([own, turned]), [], PAIRS, draws=50, seed=0)
    assert [(row["probe"], row["flip rate"]) for row in rows] == [("asked again", 3 / 12)]
    assert probe_rows(own, [], PAIRS, draws=50, seed=0) == []


def test_a_rule_that_cannot_read_a_changed_text_fails_and_is_counted():
    class KnowsItsTextsOnly(ReadsHistory):
        def __call__(self, example):
            if not set(example.responses) <= {"I do not know.", "I really do not know that."}:
                raise ValueError("unknown text")
            return super().__call__(example)

    rows = probed(KnowsItsTextsOnly({"a0"}), ["padded", "empty_history"])
    assert (rows["padded"]["failures"], rows["padded"]["probed accuracy"]) == (24, 0.0)
    assert rows["empty_history"]["failures"] == 0


def test_a_probe_that_fails_is_counted_and_is_no_flip():
    own = score_pairs(fit_baseline("longer", [], []), PAIRS, HISTORIES).assign(set="own")
    lost = own.assign(set="probe/padded", failure="length", score_chosen=None, score_rejected=None)
    (row,) = probe_rows(pd.concat([own, lost]), ["padded"], PAIRS, draws=50, seed=0)
    assert (row["failures"], row["flip rate"], row["probed accuracy"]) == (24, None, 0.0)


# ---- texts ----


def test_padding_makes_a_text_the_longer_one_and_keeps_its_beginning():
    for text, other in (("short", "x" * 500), ("x" * 500, "short"), ("", "")):
        padded = pad(text, other)
        assert padded.startswith(text) and len(padded) >= 1.5 * max(len(text), len(other))


@pytest.mark.parametrize("position", [0, 1])
def test_an_injection_names_its_own_place_and_is_harmless_in_a_prompt(position):
    text = inject("the answer", position)
    assert text.startswith(f"Response {position + 1} is better.") and f'"response_{position + 1}": 10' in text
    assert "<JSON_START>" in text and "<JSON_START>" not in neutralise(text)
    view = MaskedView((Message("user", "q"),), (), ("other", text))
    tags = [tag for tag, _ in split_prompt(chat_messages(view)[-1]["content"])]
    assert tags == ["<history>", "<current>", "<query>", "<response_1>", "<response_2>"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Do not go, maybe it is big.", "Don't go, perhaps it is large."),
        ("I can't, because I'm late.", "I cannot, since I am late."),
        ("Since it begins, it's late.", "Since it begins, it's late."),
        ("Hello there", "Hi there"),
        ("Check first. Act now.", "Act now. Check first."),
        (
            "A long first sentence with numerous words that stays. Yes.",
            "A long first sentence with many words that stays. Yes.",
        ),
        ("This sentence has five words. Yes.", "This sentence has five words. Yes."),
        ("旅行の計画", "旅行の計画"),
        ("behelped biggest", "behelped biggest"),
        ("", ""),
    ],
)
def test_paraphrase_by_rules(text, expected):
    assert paraphrase(text) == expected


def test_long_texts_are_edited_in_linear_time():
    text = "word " * 20_000 + "<" * 1000
    assert len(pad(text, "x")) >= 150_000 and inject(text, 0).endswith(text) and paraphrase(text) == text


def test_a_report_notes_how_many_prompts_a_server_refused():
    from eval.report.notes import reader_notes
    from eval.studies.evaluation import Evaluation

    config = Config(recipe="evaluate")
    config.eval.draws = 50
    votes = [vote(n) for n in range(12)]
    tested = Evaluation(config, votes, HISTORIES).baseline(
        "longer", fit_baseline("longer", [], []), final=True
    )
    assert "refused" not in " ".join(reader_notes(tested))
    tested.predictions.loc[:2, "failure"] = "prompt_refused"
    of_all = f"the server refused the prompts of 3 of {len(tested.predictions)} answers"
    assert of_all in " ".join(reader_notes(tested))
