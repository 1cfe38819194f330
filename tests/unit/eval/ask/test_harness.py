"""The queue of an evaluation: order is irrelevant, failures are data, and a resume fills only gaps."""

import itertools
import json
import random
import re
from dataclasses import replace

import pandas as pd
import pytest
from prompt_sections import split_prompt

from eval.ask import harness
from eval.ask.harness import (
    PredictionStore,
    Question,
    RunningAccuracy,
    ask,
    own_questions,
    prediction,
    readable_text,
)
from eval.ask.scored import one_by_one, score_pairs, scored
from eval.metrics.accuracy import accuracy_report
from eval.metrics.outcomes import COLUMNS
from eval.report.notes import reader_notes
from eval.report.sections import cohort_rows, gain_rows, stage_row
from eval.report.summary import narrow
from eval.studies.evaluation import Candidate, Evaluation, greedy_headline
from pgenrm_train.backends.protocols import Generation
from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import Config, Totals
from pgenrm_train.errors import DataError
from pgenrm_train.prompts.messages import chat_messages
from pgenrm_train.records.pairs import ExplicitSignals, HistoryItem, Message, PreferencePair
from pgenrm_train.run.concurrency import progress as bar

CRITERIA = [("likeness", 100)]


def vote(
    number: int, user: str = "u", chosen: str = "tea", rejected: str = "coffee", **more
) -> PreferencePair:
    explicit = ExplicitSignals(criteria="SECRET")
    return PreferencePair(
        f"p{number}", user, (Message("user", f"q{number}"),), chosen, rejected, explicit=explicit, **more
    )


def liked(text: str) -> tuple[HistoryItem, ...]:
    return (HistoryItem("earlier", text, "something else"),)


class LikesHistory:
    """A generator that scores the history's choice 8 and others 3, and finishes in random order."""

    def __init__(self, seed: int = 0, broken=lambda request, sample: None) -> None:
        self.random, self.broken = random.Random(seed), broken
        self.asked: list[str] = []
        self.temperatures: list[float] = []
        self.prompts: list[str] = []

    def __call__(self, requests, *, temperature):
        self.temperatures.append(temperature)
        waiting = list(requests)
        self.asked += [request.key for request in waiting]
        answers = [self.answer(request, sample) for request in waiting for sample in range(request.samples)]
        self.random.shuffle(answers)
        yield from answers

    def answer(self, request, sample: int) -> Generation:
        self.prompts.append(request.messages[-1]["content"])
        if (broken := self.broken(request, sample)) is not None:
            return broken
        sections = split_prompt(request.messages[-1]["content"])
        likes = next((text for tag, text in sections if tag == "<chosen>"), None)
        scores = [[8.0] if text == likes else [3.0] for tag, text in sections if tag.startswith("<response_")]
        return Generation(request.key, sample, write_chain("x", CRITERIA, scores), None, 12)

    def close(self) -> None: ...


def progress(items, _name, _total, _status):
    return items


PAIRS = [vote(n, f"u{n % 3}", *(("tea", "coffee") if n % 2 else ("coffee", "tea"))) for n in range(8)]
HISTORIES = {p.pair_id: liked(p.chosen) for p in PAIRS}
QUESTIONS = own_questions(PAIRS, HISTORIES)


def answer(folder, generator, questions=QUESTIONS, identity="model a", masking="masked") -> pd.DataFrame:
    return ask(
        questions,
        lambda: generator,
        chat_messages,
        PredictionStore(folder, identity),
        masking=masking,
        temperature=0.5,
        progress=progress,
        what="test",
    )


def table(frame: pd.DataFrame) -> list[tuple]:
    return sorted(frame.fillna("none").itertuples(index=False, name=None))


def test_every_pair_is_asked_in_both_orders_and_scores_follow_the_chosen_response(tmp_path):
    generator = LikesHistory()
    frame = answer(tmp_path, generator)
    assert len(frame) == 16 and generator.temperatures == [0.5]
    assert set(zip(frame["pair_id"], frame["order"], strict=True)) == {
        (p.pair_id, order) for p in PAIRS for order in (0, 1)
    }
    assert set(frame["score_chosen"]) == set(frame["verified_chosen"]) == {8.0}
    assert set(frame["score_rejected"]) == {3.0} and frame["failure"].isna().all()
    for prompt in generator.prompts:
        assert prompt.index("<response_1>") < prompt.index("<response_2>") and "SECRET" not in prompt


def test_prompts_with_the_same_history_are_adjacent_and_share_a_prefix():
    """A server encodes a prefix once: the users' votes alternate here, their histories must not."""
    prompts = [
        request.messages[-1]["content"] for request in harness.requests(QUESTIONS, chat_messages, "masked")
    ]
    beginnings = [prompt[: prompt.index("<current>")] for prompt in prompts]
    assert len(set(beginnings)) == 2 and len([1 for a, b in itertools.pairwise(beginnings) if a != b]) == 1
    assert all("earlier" in beginning and "q1" not in beginning for beginning in beginnings)


def test_prompts_hold_criteria_only_when_masking_shows_them(tmp_path):
    generator = LikesHistory()
    answer(tmp_path, generator, masking="full")
    assert all("SECRET" in prompt for prompt in generator.prompts)


def test_the_order_of_completion_does_not_matter(tmp_path):
    frames = [
        answer(tmp_path / str(seed), LikesHistory(seed), own_questions(PAIRS, HISTORIES, samples=3))
        for seed in range(3)
    ]
    assert table(frames[0]) == table(frames[1]) == table(frames[2])
    assert frames[0]["key"].tolist() != frames[1]["key"].tolist()  # they did finish in another order


def test_the_table_is_what_the_metrics_read(tmp_path):
    frame = answer(tmp_path, LikesHistory(), own_questions(PAIRS, HISTORIES, seeds=2, samples=3))
    assert set(COLUMNS) <= set(frame.columns) and len(frame) == 8 * 2 * 2 * 3
    report = accuracy_report(frame, draws=20)
    assert (report["accuracy"], report["n_pairs"], report["n_users"], report["seeds"], report["ind"]) == (
        1.0,
        8,
        3,
        [0, 1],
        3,
    )


BROKEN = {
    "length": Generation("", 0, "half a chain", "length", 99),
    "prompt_too_long": Generation("", 0, None, "prompt_too_long"),
    "engine:RuntimeError": Generation("", 0, None, "engine:RuntimeError"),
    "parse:no_markers": Generation("", 0, "I prefer tea.", None, 5),
    "parse:bad_json": Generation("", 0, "<JSON_START>{tea<JSON_END>", None, 5),
    "parse:scores_count": Generation(
        "", 0, '<JSON_START>{"better_response": {"response_1": 3}}<JSON_END>', None, 5
    ),
}


@pytest.mark.parametrize("failure", BROKEN)
def test_a_failure_stays_in_the_table_with_its_reason(tmp_path, failure):
    def broken(request, sample):
        given = BROKEN[failure]
        return (
            Generation(request.key, sample, given.text, given.failure, given.tokens)
            if '"p3"' in request.key
            else None
        )

    frame = answer(tmp_path, LikesHistory(broken=broken))
    bad = frame[frame["pair_id"] == "p3"]
    assert set(bad["failure"]) == {failure} and bad[
        ["score_chosen", "score_rejected", "verified_chosen"]
    ].isna().all(axis=None)
    assert (bad["text"].dropna() == BROKEN[failure].text).all()
    report = accuracy_report(frame, draws=20)
    assert (
        report["failures"] == {failure: 2}
        and report["accuracy"] == pytest.approx(7 / 8)
        and report["n_pairs"] == 8
    )


def test_issues_and_declared_scores_are_kept_apart_from_verified_ones():
    rationale = "a 100%. Response 1: a 8 = 8.0. Response 2: a 3 = 3.0."
    scores = {"response_1": 2, "response_2": 9}
    verdict = json.dumps({"rationale": rationale, "better_response": scores})
    text = f"<JSON_START>{verdict}<JSON_END>"
    row = prediction(Question(PAIRS[0], 0, ()), Generation("k", 0, text), Totals.DECLARED)
    assert (row["score_chosen"], row["score_rejected"]) == (2.0, 9.0)
    assert (row["verified_chosen"], row["verified_rejected"]) == (8.0, 3.0) and row[
        "issues"
    ] == "declared_differs"
    turned = prediction(Question(PAIRS[0], 1, ()), Generation("k", 0, text), Totals.DECLARED)
    assert (turned["score_chosen"], turned["verified_chosen"]) == (9.0, 3.0)


def test_a_preference_between_identical_responses_is_a_tie_and_no_hit(tmp_path):
    class First(LikesHistory):
        """Prefers the first response."""

        def answer(self, request, sample):
            return Generation(request.key, sample, write_chain("x", CRITERIA, [[8.0], [3.0]]))

    pairs = [vote(0, "u", "tea", "tea"), vote(1, "u", "tea", "coffee")]
    frame = answer(tmp_path, First(), own_questions(pairs, dict.fromkeys(("p0", "p1"), ())))
    same = frame[frame["pair_id"] == "p0"]
    assert set(same["score_chosen"]) == set(same["score_rejected"]) == set(same["verified_chosen"]) == {5.5}
    report = accuracy_report(frame, draws=20)
    assert (report["accuracy"], report["ties"], report["order_flip_rate"]) == (0.25, 2, 0.5)
    by_place = score_pairs(lambda example: (2, 1), pairs)
    assert accuracy_report(by_place, draws=20)["accuracy"] == 0.25


# ---- resume ----


def test_a_second_start_asks_only_what_is_missing(tmp_path):
    first = LikesHistory()
    answer(tmp_path, first, QUESTIONS[:6])
    second = LikesHistory()
    frame = answer(tmp_path, second)
    assert sorted(second.asked) == sorted(q.key for q in QUESTIONS[6:]) and len(first.asked) == 6
    assert table(frame) == table(answer(tmp_path / "whole", LikesHistory()))


def test_nothing_left_to_ask_starts_no_engine(tmp_path):
    whole = answer(tmp_path, LikesHistory())
    again = ask(
        QUESTIONS,
        lambda: pytest.fail("the engine was started"),
        chat_messages,
        PredictionStore(tmp_path, "model a"),
        masking="masked",
        temperature=0.5,
        progress=progress,
        what="test",
    )
    assert table(again) == table(whole)


class Dies(LikesHistory):
    """Answers `after` requests, then fails."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        super().__init__()
        self.after, self.error = after, error

    def __call__(self, requests, *, temperature):
        for number, request in enumerate(requests):
            if number == self.after:
                raise self.error
            for sample in range(request.samples):
                yield self.answer(request, sample)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_answers_before_an_engine_failure_are_kept(tmp_path, error):
    questions = own_questions(PAIRS, HISTORIES, samples=2)
    with pytest.raises(error):
        answer(tmp_path, Dies(5, error), questions)
    rest = LikesHistory()
    frame = answer(tmp_path, rest, questions)
    assert len(rest.asked) == 16 - 5 and len(frame) == 32
    assert table(frame) == table(answer(tmp_path / "whole", LikesHistory(), questions))


def test_a_missing_sample_is_asked_for_and_nothing_else(tmp_path):
    questions = own_questions(PAIRS[:2], HISTORIES, samples=3)

    class Forgets(LikesHistory):
        def __call__(self, requests, *, temperature):
            yield from list(super().__call__(requests, temperature=temperature))[:-2]

    with pytest.raises(DataError, match="ended with 2 of 12 samples unanswered"):
        answer(tmp_path, Forgets(), questions)
    rest = LikesHistory()
    frame = answer(tmp_path, rest, questions)
    assert len(rest.prompts) == 2 and len(frame) == 12 and not frame.duplicated(["key", "sample"]).any()


class Seeded(LikesHistory):
    """Sample i of a request depends on its seed + i, as it does with vLLM."""

    def answer(self, request, sample):
        text = write_chain("x", CRITERIA, [[1.0 + (request.seed + sample) % 9], [5.0]])
        return Generation(request.key, sample, text, None, 12)


def test_later_samples_equal_those_of_a_single_start(tmp_path):
    answer(tmp_path, first := Seeded(), own_questions(PAIRS, HISTORIES, samples=2))
    more = Seeded()
    frame = answer(tmp_path, more, own_questions(PAIRS, HISTORIES, samples=5))
    assert len(first.asked) == 16 and len(more.asked) == 16 and len(frame) == 16 * 5
    assert table(frame) == table(
        answer(tmp_path / "whole", Seeded(), own_questions(PAIRS, HISTORIES, samples=5))
    )
    fewer = answer(tmp_path, LikesHistory(), own_questions(PAIRS, HISTORIES, samples=3))
    assert len(fewer) == 16 * 3, "samples beyond the request are left out"


def test_prompts_with_the_same_history_are_asked_one_after_the_other(tmp_path):
    generator = LikesHistory()
    answer(tmp_path, generator)
    histories = [split_prompt(prompt)[2][1] for prompt in generator.prompts]
    assert len(set(histories)) == 2 and histories == sorted(histories)


def test_another_text_under_the_same_ids_is_another_question(tmp_path):
    answer(tmp_path, LikesHistory())
    other = HISTORIES | {"p3": liked("neither")}
    again = LikesHistory()
    questions = own_questions(PAIRS, other)
    frame = answer(tmp_path, again, questions)
    assert len(again.asked) == 2 and all('"p3"' in key for key in again.asked)
    frame = frame[frame["key"].isin({q.key for q in questions})]
    assert len(frame) == 16 and set(frame.loc[frame["pair_id"] == "p3", "score_chosen"]) == {3.0}


def test_another_identity_is_refused(tmp_path):
    answer(tmp_path, LikesHistory())
    with pytest.raises(DataError, match="another model or other settings"):
        answer(tmp_path, LikesHistory(), identity="model b")
    answer(tmp_path, LikesHistory())  # and the store is still its owner's


def test_two_equal_questions_are_refused(tmp_path):
    with pytest.raises(DataError, match="pair ids must be unique"):
        answer(tmp_path, LikesHistory(), [*QUESTIONS, QUESTIONS[0]])


def test_the_progress_bar_shows_the_accuracy_so_far(capsys):
    running, samples = RunningAccuracy(), []
    for _ in bar(range(4), "evaluate me", 4, running):
        row = {"set": "own", "failure": None, "score_chosen": 2.0, "score_rejected": 1.0}
        change = (
            {},
            {"failure": "length", "score_chosen": None},
            {"score_rejected": 2.0},
            {"set": "swapped"},
        )[len(samples)]
        running.add(row | change)
        samples.append(str(running))
    assert samples == ["accuracy 1.000", "accuracy 0.500", "accuracy 0.333", "accuracy 0.333"]
    assert "4/4" in (shown := capsys.readouterr().err) and "accuracy 0.333" in shown.splitlines()[-1]


# ---- shards ----


def a_row(number: int) -> dict:
    return {"sample": 0, "failure": None, "key": f"k{number}", "value": number}


def test_shards_are_written_as_they_fill_and_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROWS_PER_SHARD", 4)
    store = PredictionStore(tmp_path, "x")
    for number in range(10):
        store.add(a_row(number))
    assert len(list(tmp_path.glob("part-*.parquet"))) == 2 and len(store.done()) == 8
    store.flush()
    store.flush()
    assert [p.name for p in sorted(tmp_path.glob("part-*"))] == [
        "part-000000.parquet",
        "part-000001.parquet",
        "part-000002.parquet",
    ]
    assert PredictionStore(tmp_path, "x").read()["value"].tolist() == list(range(10))


def test_a_slow_models_answers_are_on_disk_before_a_shard_is_full(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: now[0])
    store = PredictionStore(tmp_path, "x")
    for number, now[0] in enumerate((10.0, 59.0, 60.0, 61.0, 119.0, 120.0)):
        store.add(a_row(number))
    assert [len(pd.read_parquet(p)) for p in sorted(tmp_path.glob("part-*"))] == [3, 3]


def test_half_written_shards_are_not_read(tmp_path):
    store = PredictionStore(tmp_path, "x")
    store.add(a_row(0))
    store.flush()
    (tmp_path / ".part-000001.parquet.123.tmp").write_bytes(b"PAR1 half a shard")
    again = PredictionStore(tmp_path, "x")
    assert again.done() == {("k0", 0)}
    again.add(a_row(1))
    again.flush()
    assert again.done() == {("k0", 0), ("k1", 0)}


def test_a_shard_that_a_user_deleted_is_asked_again_and_overwrites_nothing(tmp_path):
    store = PredictionStore(tmp_path, "x")
    for number in range(3):
        store.add(a_row(number))
        store.flush()
    (tmp_path / "part-000000.parquet").unlink()
    again = PredictionStore(tmp_path, "x")
    again.add(a_row(0))
    again.flush()
    assert again.done() == {("k0", 0), ("k1", 0), ("k2", 0)}


def test_an_empty_store(tmp_path):
    assert PredictionStore(tmp_path / "new", "x").done() == set()


# ---- the evaluation ----


class AddsUpWrongly(LikesHistory):
    """Declares the totals of its rubric for the wrong responses; without a rubric on the first question."""

    def answer(self, request, sample):
        text = super().answer(request, sample).text
        text = re.sub(r'"response_(\d)"', lambda found: f'"response_{3 - int(found[1])}"', text)
        if '"p0"' in request.key:
            text = re.sub('"rationale": ".*?"', '"rationale": "because"', text)
        return Generation(request.key, sample, text, None, 12)


def test_scores_are_declared_or_verified_and_a_chain_without_a_rubric_is_then_a_failure(tmp_path):
    def tested(totals):
        candidate = Candidate("psi", "sha", AddsUpWrongly, lambda: chat_messages, lambda: None)
        made = evaluation(PAIRS, HISTORIES, seeds=1, probes=False)
        made.config.model.totals = totals
        return made.test(candidate, tmp_path, progress)

    declared = tested("declared").report
    assert (declared["accuracy"], sum(declared["failures"].values())) == (0.0, 0)
    for totals in ("verified", "code"):
        made = tested(totals)
        assert made.report["accuracy"] == 7 / 8 and made.report["failures"] == {"unverified": 2}
        assert made.report["n_pairs"] == 8, "a failure stays in the denominator"
        assert made.own["issues"].str.contains("declared_differs").sum() == 14, "flagged, though scored"


def evaluation(pairs, histories, **settings) -> Evaluation:
    config = Config(recipe="evaluate")
    config.eval.draws, config.eval.probes = 50, True
    for name, value in settings.items():
        setattr(config.eval, name, value)
    return Evaluation(config, pairs, histories)


# Two users disagree on every question, and each user's history names their favourite.
TWINS = [
    vote(
        2 * n + side,
        f"{'ab'[side]}{n % 5}",
        *(("tea", "coffee") if side else ("coffee", "tea")),
        kind=("hard", "medium")[n % 2],
        cohort=("seen_persona", "unseen_persona")[n % 2],
    )
    for n in range(20)
    for side in (0, 1)
]
TWINS = [
    PreferencePair(
        p.pair_id,
        p.user_id,
        (Message("user", f"question {int(p.pair_id[1:]) // 2}"),),
        p.chosen,
        p.rejected,
        kind=p.kind,
        cohort=p.cohort,
    )
    for p in TWINS
]
TWIN_HISTORIES = {p.pair_id: liked(p.chosen) for p in TWINS}


class LikesTea(LikesHistory):
    """Not personal at all."""

    def answer(self, request, sample):
        texts = [
            text
            for tag, text in split_prompt(request.messages[-1]["content"])
            if tag.startswith("<response_")
        ]
        return Generation(
            request.key, sample, write_chain("x", CRITERIA, [[8.0] if t == "tea" else [3.0] for t in texts])
        )


def run(tmp_path, generator, **settings):
    candidate = Candidate("psi", "sha", lambda: generator, lambda: chat_messages, lambda: None, 12.0)
    return evaluation(TWINS, TWIN_HISTORIES, **settings).test(candidate, tmp_path, progress)


def test_a_personal_model_falls_with_swapped_histories(tmp_path):
    generator = LikesHistory()
    tested = run(tmp_path, generator)
    assert len(generator.asked) == 40 * 2 * (5 + 1)  # five evaluation seeds, and the probe once
    assert (
        tested.report["accuracy"] == 1.0
        and tested.report["model"] == "psi"
        and tested.report["n_pairs"] == 40
    )
    assert (tested.probe["own"]["accuracy"], tested.probe["swapped"]["accuracy"]) == (1.0, 0.0)
    assert tested.probe["n_pairs"] == 40 and tested.probe["difference"]["ci95"][0] > 0


@pytest.mark.parametrize("users,claimed", [(4, False), (20, True)])
def test_a_report_calls_a_model_personal_only_where_there_are_users_enough(users, claimed):
    def follows(example):
        return [8.0 if text == example.history[0].chosen else 3.0 for text in example.responses]

    votes = [
        PreferencePair(
            f"p{n}",
            f"u{n}",
            (Message("user", f"q{n // 2}"),),
            *(("tea", "coffee") if n % 2 else ("coffee", "tea")),
        )
        for n in range(users)
    ]
    tests = evaluation(votes, {p.pair_id: liked(p.chosen) for p in votes})
    [note] = [
        note
        for note in reader_notes(tests.judge("mine", scored(tests._questions(1, False), one_by_one(follows))))
        if "disagree" in note
    ]
    assert "own history 100.0%, swapped history 0.0%" in note
    assert ("it uses whose history it reads" in note) == claimed
    assert ("4 users: too few" in note and "not shown to be personal" in note) != claimed


def test_a_rule_that_ignores_the_user_scores_one_half_on_both(tmp_path):
    tested = run(tmp_path, LikesTea())
    assert tested.probe["own"]["accuracy"] == tested.probe["swapped"]["accuracy"] == 0.5
    assert tested.probe["difference"]["difference"] == 0.0


def test_swapped_answers_never_count_for_the_headline(tmp_path):
    with_probe, without = (
        run(tmp_path / "a", LikesHistory()),
        run(tmp_path / "b", LikesHistory(), probes=False),
    )
    assert without.probe is None and with_probe.report["accuracy"] == without.report["accuracy"]
    assert set(without.predictions["set"]) == {"own"} and set(with_probe.predictions["set"]) == {
        "own",
        "swapped",
    }


def test_answers_to_questions_of_an_earlier_run_are_left_out(tmp_path):
    run(tmp_path, LikesHistory(), seeds=2)
    tested = run(tmp_path, LikesHistory(), seeds=1)
    assert tested.report["seeds"] == [0] and len(tested.predictions) == 160


def test_a_second_evaluation_asks_again_only_where_prompt_or_sampling_differ(tmp_path):
    candidate = Candidate("psi", "sha", lambda: generator, lambda: chat_messages, lambda: None)
    asked = {}
    for name, change in {
        "first": {},
        "same": {},
        "longer answers": {"max_response_tokens": 7},
        "shorter texts": {"max_text_tokens": 7},
    }.items():
        generator = LikesHistory()
        tests = evaluation(TWINS, TWIN_HISTORIES, seeds=1)
        for key, value in change.items():
            setattr(tests.config.model, key, value)
        tests.test(candidate, tmp_path, progress, final=True)
        asked[name] = len(generator.asked)
    assert asked["first"] == asked["longer answers"] == asked["shorter texts"] > 0 and asked["same"] == 0


def test_runs_that_share_a_cache_ask_once(tmp_path):
    first, second = LikesHistory(), LikesHistory()
    tested = [
        run(tmp_path / name, g, cache=str(tmp_path / "cache")) for name, g in (("a", first), ("b", second))
    ]
    assert len(first.asked) > 0 and second.asked == []
    assert table(tested[0].predictions) == table(tested[1].predictions)


def test_two_writers_of_one_store_lose_nothing(tmp_path):
    stores = [PredictionStore(tmp_path, "x") for _ in range(2)]
    for number in range(6):
        stores[number % 2].add(a_row(number))
        stores[number % 2].flush()
    assert sorted(stores[0].read()["value"]) == list(range(6))


def test_several_seeds_give_an_error_of_the_mean(tmp_path):
    def broken(request, sample):
        return Generation(request.key, sample, None, "length") if '"p3", "b1", 0, 1,' in request.key else None

    tested = run(tmp_path, LikesHistory(broken=broken), seeds=2)
    assert tested.report["seeds"] == [0, 1] and tested.report["stderr"] > 0
    assert tested.report["failures"] == {"length": 1} and tested.report["accuracy"] < 1


class ErrsWhenSampled(LikesHistory):
    """Likes tea unless its decoding is greedy."""

    def answer(self, request, sample):
        model = LikesHistory() if self.temperatures[-1] == 0 else LikesTea()
        return model.answer(request, sample)


def test_greedy_chains_are_a_set_of_their_own_beside_the_sampled_ones(tmp_path):
    made, model = evaluation(TWINS, TWIN_HISTORIES), ErrsWhenSampled()
    candidate = Candidate("psi", "sha", lambda: model, lambda: chat_messages, lambda: None)
    sampled = made.test(candidate, tmp_path, progress)
    both = made.with_greedy(sampled, candidate, tmp_path, progress)
    assert model.temperatures == [0.7, 0.0]
    assert (both.report["accuracy"], both.greedy["accuracy"]) == (0.5, 1.0)
    assert len(both.likeliest) == 2 * len(TWINS), "one chain per pair and order, of one seed"
    made.with_greedy(sampled, candidate, tmp_path, progress)
    assert model.asked.count(model.asked[-1]) == 1, "kept answers are not asked again"
    assert stage_row(both)["greedy accuracy"] == 1.0 and "greedy accuracy" not in stage_row(sampled)
    assert greedy_headline(both) == {
        "eval/greedy_accuracy": 1.0,
        "eval/greedy_accuracy_low": 1.0,
        "eval/greedy_accuracy_high": 1.0,
    }
    assert greedy_headline(sampled) == {}
    [gain] = gain_rows([both, replace(both, name="cre")], made.config)
    assert gain["greedy difference"] == gain["all difference"] == 0.0
    assert "greedy difference" not in gain_rows([both, sampled], made.config)[0]


def test_gains_are_paired_step_by_step_and_from_first_to_last(tmp_path):
    tea, good = run(tmp_path / "a", LikesTea()), run(tmp_path / "b", LikesHistory())
    config = Config(recipe="evaluate")
    rows = gain_rows(
        [replace(tea, name="psi"), replace(good, name="cre"), replace(good, name="curriculum")], config
    )
    assert [(row["from"], row["to"]) for row in rows] == [
        ("psi", "cre"),
        ("cre", "curriculum"),
        ("psi", "curriculum"),
    ]
    assert [row["all difference"] for row in rows] == [0.5, 0.0, 0.5]
    assert (
        rows[0]["hard difference"] == rows[0]["medium difference"] == 0.5
        and rows[0]["all difference ci95"][0] > 0
    )
    assert list(rows[1]["all difference ci95"]) == [0.0, 0.0]
    assert gain_rows([tea], config) == []
    assert narrow(rows) == rows and list(narrow(rows, columns=4)[0]) == [
        "from",
        "to",
        "all difference",
        "all difference ci95",
    ]


def test_rows_of_the_tables(tmp_path):
    tested = run(tmp_path, LikesHistory())
    row = stage_row(tested)
    assert (row["stage"], row["accuracy"], row["hard accuracy"], row["seconds"], row["format failures"]) == (
        "psi",
        1.0,
        1.0,
        12.0,
        0,
    )
    assert row["swapped history accuracy"] == 0.0
    cohorts = cohort_rows(tested, Config(recipe="evaluate"))
    assert {r["users"]: r["pairs"] for r in cohorts} == {"seen_persona": 20, "unseen_persona": 20}


def test_baselines_answer_the_same_pairs_and_probe():
    def follows(example):
        return tuple(8.0 if text == example.history[0].chosen else 3.0 for text in example.responses)

    tested = evaluation(TWINS, TWIN_HISTORIES).baseline("follows", follows)
    assert tested.report["accuracy"] == 1.0 and tested.probe["swapped"]["accuracy"] == 0.0


def test_without_disagreement_there_is_no_probe(tmp_path):
    candidate = Candidate("psi", "sha", LikesHistory, lambda: chat_messages, lambda: None)
    tested = evaluation(PAIRS[:1], HISTORIES).test(candidate, tmp_path, progress)
    assert tested.probe is None and set(tested.predictions["set"]) == {"own"}


def test_one_failure_among_many_hides_no_other_chain(tmp_path):
    """Parquet returns NaN for a None in a column of texts."""
    store = PredictionStore(tmp_path, "x")
    rows = [
        {"key": str(n), "sample": 0, "text": "chain" if n else None, "failure": None if n else "length"}
        for n in range(3)
    ]
    for row in rows:
        store.add(row)
    store.flush()
    assert [readable_text(row) for _, row in store.read().iterrows()] == [None, "chain", "chain"]


def test_an_error_after_a_bar_begins_a_line(tmp_path, capsys):
    def rows():
        yield from ({"set": "other", "value": n} for n in range(2))
        raise DataError("the engine failed")

    store = PredictionStore(tmp_path, "any")
    with pytest.raises(DataError) as error:
        harness.keep(rows(), 3, store, bar, "evaluate")
    assert capsys.readouterr().err.endswith("\n"), error
