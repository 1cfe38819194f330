"""build_sec keeps only chains worth learning from, records why the others fell, balances orders, and leaks no criteria."""

import json
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from llm_server import serve, slowly

from data_builders.oracle import OracleTeacher
from data_builders.personaworld import build
from pgenrm_train.artifacts import StageFolder
from pgenrm_train.backends import endpoint as endpoint_module
from pgenrm_train.backends.base import Generation
from pgenrm_train.chains import parse_chain, write_chain
from pgenrm_train.config import Config, DataConfig, EndpointConfig, MaskingConfig, SecConfig
from pgenrm_train.errors import BackendError, ConfigError, DataError
from pgenrm_train.prompts import chat_messages
from pgenrm_train.records import Example, ExplicitSignals, Message, PreferencePair
from pgenrm_train.rejection import reason_to_reject
from pgenrm_train.stages import build_sec
from recipes.build_sec import _Rule, teacher, yield_table

CRITERIA = [("brevity", 70), ("wit", 30)]
EXAMPLE = Example("p1", "u1", (Message("user", "q"),), ("left", "right"), 0)


def chain(first: float, second: float, analysis: str = "Short is better.", criteria=CRITERIA) -> str:
    return write_chain(analysis, criteria, [[first] * len(criteria), [second] * len(criteria)])


def reason(text: str, example: Example = EXAMPLE) -> str | None:
    return reason_to_reject(parse_chain(text, len(example.responses)), example.chosen_index, text)


# ---- reasons ----


def test_a_correct_chain_is_kept_for_the_side_that_it_prefers():
    second = Example("p1", "u1", EXAMPLE.context, EXAMPLE.responses, 1)
    assert reason(chain(8, 3)) is None and reason(chain(3, 8), second) is None
    assert reason(chain(8, 3), second) == reason(chain(3, 8)) == "wrong_ranking"
    assert reason(chain(5, 5)) == reason(chain(5, 5), second) == "tie"


@pytest.mark.parametrize("text,kind", [
    ("", "no_markers"),
    ("left is better", "no_markers"),
    ("<JSON_START>{oops<JSON_END>", "bad_json"),
    ('<JSON_START>{"rationale": "x"}<JSON_END>', "scores_missing"),
    ('<JSON_START>{"better_response": {"response_1": 8}}<JSON_END>', "scores_count"),
    ('<JSON_START>{"better_response": {"response_1": true, "response_2": 1}}<JSON_END>', "scores_not_numbers"),
])  # fmt: skip
def test_chains_that_cannot_be_read(text, kind):
    assert reason(text) == f"parse:{kind}"


def declared(rationale: str, first: float = 8.0, second: float = 3.0) -> str:
    block = {"rationale": rationale, "better_response": {"response_1": first, "response_2": second}}
    return f"Analysis.\n<JSON_START>{json.dumps(block)}<JSON_END>"


@pytest.mark.parametrize("text,issue", [
    (declared("It is simply better."), "no_rubric"),
    (declared("brevity 70%, wit 70%. Response 1: brevity 8, wit 8 = 8.0. Response 2: brevity 3, wit 3 = 3.0."), "weights"),
    (declared("brevity 70%, wit 30%. Response 1: brevity 20, wit 20 = 20.0. Response 2: brevity 3, wit 3 = 3.0.", 20), "score_range"),
    (declared("brevity 70%, wit 30%. Response 1: brevity 8, wit 8 = 8.0. Response 2: brevity 3, wit 3 = 3.0.", 9.5), "declared_differs"),
    (chain(8, 3) + " And that is that.", "trailing_text"),
])  # fmt: skip
def test_chains_whose_rubric_does_not_hold(text, issue):
    assert reason(text) == f"issue:{issue}"


def test_the_ranking_is_looked_at_before_the_issues():
    assert reason(declared("It is simply better.", 3, 8)) == "wrong_ranking"


@pytest.mark.parametrize(
    "words",
    [
        "As the chosen response shows, short wins.",
        "The REJECTED Response fails.",
        "Ground truth: 1.",
        "By the label, the first wins.",
        "The user actually picked response 1, so it scores higher.",
        "Response 2 was clearly rejected for its length.",
        "Given the actual vote, brevity must weigh most.",
        "They voted for the first one.",
        "History is thin. The user preferred the first answer here.",
        "I correct my previous answer: brevity weighs more.",
    ],
)
def test_a_chain_that_speaks_of_the_vote_is_a_leak(words):
    assert reason(chain(8, 3, words)) == "label_leak"


@pytest.mark.parametrize(
    "words",
    [
        "In pair 2 the chosen response is shorter than the rejected answer.",
        "Earlier votes: they picked the first answer whenever it was brief.",
        "Response 1 is the better one, and this user prefers response 1 for its wit.",
        "The food label of the second is wrong, and response 2 was written in haste.",
        "Votes in the senate were selected as the topic; I score the previous sentence low.",
    ],
)
def test_judging_and_talk_of_earlier_votes_are_no_leak(words):
    assert reason(chain(8, 3, words)) is None


def test_a_leak_inside_the_rationale_counts():
    text = (
        "brevity 70%, wit 30%. Response 1: the user chose the first; brevity 8, wit 8 = 8.0. Response 2: brevity 3, wit 3 = 3.0."
    )
    assert reason(declared(text)) == "label_leak"


def test_totals_that_rank_only_by_rounding_are_rejected():
    """Declared 7.1 and 7.0 agree with 7.05 and 7.05 to a decimal; what can be recomputed shows a tie, or the other order."""
    even = "a 50%, b 50%. Response 1: a 7, b 7.1 = 7.1. Response 2: a 7.1, b 7 = 7.0."
    other = "a 50%, b 50%. Response 1: a 7, b 7.1 = 7.1. Response 2: a 7.1, b 7.06 = 7.04."
    assert reason(declared(even, 7.1, 7.0)) == reason(declared(other, 7.1, 7.04)) == "verified_ranking"


def test_more_than_two_responses_need_the_chosen_one_above_every_other():
    three = Example("p1", "u1", EXAMPLE.context, ("a", "b", "c"), 1)
    scores = {(5, 8, 3): None, (8, 8, 3): "tie", (5, 6, 7): "wrong_ranking"}
    for given, expected in scores.items():
        assert reason(write_chain("x", CRITERIA, [[s, s] for s in given]), three) == expected


# ---- the stage ----


def progress(items, _what, _total):
    return items


def vote(number: int, user: str = "u", **more) -> PreferencePair:
    explicit = ExplicitSignals(criteria="SECRET-CRITERION", self_description="SECRET-SELF")
    context = (Message("user", f"question {number}"),)
    return PreferencePair(f"p{number}", user, context, f"good {number}", f"bad {number}", explicit=explicit, **more)


class Prefers:
    """A teacher that scores texts beginning with `good` higher; `wrong` first attempts are ranked the other way."""

    def __init__(self, wrong: int = 0) -> None:
        self.wrong, self.asked = wrong, []

    def write(self, example: Example, attempt: int) -> str:
        self.asked.append((example.pair_id, example.chosen_index, attempt))
        scores = [[8, 8] if text.startswith("good") else [3, 3] for text in example.responses]
        if attempt < self.wrong:
            scores.reverse()
        return write_chain(f"About {example.pair_id} in order {example.chosen_index}.", CRITERIA, scores)


class Says:
    """A teacher with one answer to everything."""

    def __init__(self, text: str) -> None:
        self.text = text

    def write(self, example: Example, attempt: int) -> str:
        return self.text


class Writer:
    """Prompts that are never cut, of a model that may write `words` words."""

    def __init__(self, words: int = 10_000) -> None:
        self.words, self.trimmed = words, Counter()

    def __call__(self, view):
        return chat_messages(view)

    def can_be_written(self, response: str) -> bool:
        return len(response.split()) <= self.words


def run(tmp_path, teacher, votes=None, words=10_000, **config):
    """Run the stage; its facts, the rows for SFT and the rejected chains."""
    folder = StageFolder(tmp_path / "build_sec", "build_sec")
    settings = Config(**config)
    settings.psi.masking = settings.psi.masking if "masking" in config else "masked"
    votes = votes or [vote(n, f"u{n % 4}") for n in range(20)]
    teacher = teacher if hasattr(teacher, "in_flight") else _Rule(teacher.write)
    facts = build_sec.run(settings, folder, votes, teacher, lambda kept: Writer(words), progress)
    assert json.loads((folder.path / "yield.json").read_text()) == facts
    rows = pq.read_table(folder.path / "sec.parquet").to_pylist()
    return facts, rows, pd.read_parquet(folder.path / "rejected.parquet")


def test_orders_alternate_and_both_are_equally_frequent(tmp_path):
    facts, rows, _ = run(tmp_path, Prefers())
    assert facts["chains"] == len(rows) == 20 and facts["chosen_first"] == 0.5
    assert Counter(row["order"] for row in rows) == {0: 10, 1: 10}
    assert [row["order"] for row in rows] == [0, 1] * 10
    assert len({row["pair_id"] for row in rows}) == 20
    for row in rows:  # the chosen response stands where the order says
        prompt = row["messages"][-2]["content"]
        assert (prompt.index("<response_1>good") > 0) if row["order"] == 0 else (prompt.index("<response_2>good") > 0)


def test_two_orders_a_pair_ask_both(tmp_path):
    _, rows, _ = run(tmp_path, Prefers(), sec=SecConfig(orders_per_pair=2))
    assert Counter(Counter(row["pair_id"] for row in rows).values()) == {2: 20}
    assert {(row["pair_id"], row["order"]) for row in rows} == {(f"p{n}", order) for n in range(20) for order in (0, 1)}


def test_a_rejected_chain_is_recorded_and_another_is_asked_for(tmp_path):
    teacher = Prefers(wrong=2)
    facts, rows, rejected = run(tmp_path, teacher)
    assert len(teacher.asked) == 60 and {row["attempt"] for row in rows} == {2}
    assert (
        facts["rejected"] == {"wrong_ranking": 40} and facts["asked"] == 60 and facts["yield"] == pytest.approx(1 / 3, abs=1e-4)
    )
    assert len(rejected) == 40 and set(rejected["reason"]) == {"wrong_ranking"}
    assert list(rejected["attempt"][:2]) == [0, 1] and rejected["text"].str.contains("JSON_START").all()


def test_the_yield_is_a_table_of_reasons(tmp_path):
    facts, _, _ = run(tmp_path, Prefers(wrong=2))
    assert yield_table(facts) == "       20   33.3%  kept\n       40   66.7%  wrong_ranking"


def test_no_more_samples_than_allowed(tmp_path):
    teacher = Prefers(wrong=9)
    with pytest.raises(DataError, match=r"no chain passed rejection sampling; reasons: \{'wrong_ranking': 60\}"):
        run(tmp_path, teacher, sec=SecConfig(samples_per_pair=3))
    assert len(teacher.asked) == 60


@pytest.mark.parametrize("text,reasons", [(chain(5, 5), "tie"), ("I cannot say.", "parse:no_markers"), ("", "parse:no_markers")])
def test_a_teacher_that_never_succeeds_ends_the_stage_in_one_sentence(tmp_path, text, reasons):
    with pytest.raises(DataError, match=reasons) as error:
        run(tmp_path, Says(text))
    assert "\n" not in str(error.value)


def test_the_same_text_is_learnt_once_a_user(tmp_path):
    votes = [vote(n, f"u{n % 2}") for n in range(12)]
    _, rows, rejected = run(tmp_path, Says(chain(8, 3)), votes)
    assert len(rows) == 2 and {row["user_id"] for row in rows} == {"u0", "u1"}
    assert len(rows) + len(rejected[rejected["reason"] == "duplicate"]) == 6, "orders alternate: half rank the other way"
    assert set(rejected["reason"]) == {"duplicate", "wrong_ranking"}


LONG = (
    "This reader asks for recipes on weekdays and has little time, so every answer that starts with the list of ingredients and then "
    "gives numbered steps earns marks, whereas stories about grandmothers, remarks on the weather and advice to consult a chef cost "
    "some; the earlier votes agree on it in three of three pairs, and nothing in them speaks of taste in music or of politics at all."
)
OTHER = (
    "Somebody who argues about history for pleasure: sources with dates, a counter-argument taken seriously, and a plain statement of "
    "what is not known count for more than tone. Length does no harm as long as each paragraph adds a claim that can be checked by "
    "the reader, which is why bullet points without verbs and bold headings were passed over twice in the votes shown above."
)


class Repeats(Prefers):
    """A language model that says `said` of every pair, with one word changed."""

    in_flight, by_rule = 2, False

    def __init__(self, said: str = LONG) -> None:
        super().__init__()
        self.said = said

    def write(self, example: Example, attempt: int, complaint: str | None = None) -> Generation:
        text = (
            super().write(example, attempt).replace(f"About {example.pair_id} in order", f"{self.said} Case {example.pair_id},")
        )
        return Generation(example.pair_id, attempt, text)

    def expect(self, examples, questions, tries):
        return {}

    def facts(self):
        return {}


def test_an_analysis_that_says_the_same_again_is_kept_once(tmp_path):
    votes = [vote(n, f"u{n % 2}") for n in range(12)]
    _, rows, rejected = run(tmp_path, Repeats(), votes)
    assert len(rows) == 1 and len(rejected) == 11
    owner = rows[0]["user_id"]
    users = {v.pair_id: v.user_id for v in votes}
    for row in rejected.itertuples():  # of this user: nothing new; of another: about nobody
        assert row.reason == ("near_duplicate" if users[row.pair_id] == owner else "boilerplate")


def test_the_two_orders_of_a_pair_may_share_their_analysis(tmp_path):
    _, rows, rejected = run(tmp_path, Repeats(), [vote(1)], sec=SecConfig(orders_per_pair=2))
    assert [row["order"] for row in rows] == [0, 1] and rejected["reason"].isna().all()


def test_different_analyses_stay_and_the_threshold_is_the_user_s(tmp_path):
    class Both(Repeats):
        def write(self, example, attempt, complaint=None):
            self.said = OTHER if int(example.pair_id[1:]) % 2 else LONG
            return super().write(example, attempt)

    votes = [vote(n) for n in range(2)]
    assert len(run(tmp_path / "both", Both(), votes)[1]) == 2
    votes = [vote(n) for n in range(4)]
    assert len(run(tmp_path / "exact", Repeats(), votes, sec=SecConfig(near_duplicate=1.0))[1]) == 4


def test_a_chain_that_the_model_may_not_write_is_over_length(tmp_path):
    class Rambles(Prefers):
        def write(self, example, attempt):
            more = "and so on " * 100 if example.pair_id in ("p3", "p4") else ""
            return f"{more}{super().write(example, attempt)}"

    facts, rows, rejected = run(tmp_path, Rambles(), words=100)
    assert facts["rejected"] == {"over_length": 2} and set(rejected["pair_id"]) == {"p3", "p4"} and len(rows) == 18
    with pytest.raises(DataError, match=r"reasons: \{'over_length': 20\}"):
        run(tmp_path / "none", Prefers(), words=3)


def test_a_run_without_rejections_still_writes_the_table(tmp_path):
    _, _, rejected = run(tmp_path, Prefers())
    assert {"pair_id", "reason", "text"} <= set(rejected.columns)


def test_only_training_votes_are_asked_about(tmp_path):
    votes = [vote(1), vote(2, split="test"), vote(3, user_split="test"), vote(4, split="val"), vote(5)]
    _, rows, _ = run(tmp_path, Prefers(), votes)
    assert {row["pair_id"] for row in rows} == {"p1", "p5"}


def test_a_limit_on_chains_is_kept_and_stays_balanced(tmp_path):
    facts, rows, _ = run(tmp_path, Prefers(), sec=SecConfig(max_chains=6))
    assert len(rows) == 6 and facts["chosen_first"] == 0.5


def test_the_seed_orders_the_questions(tmp_path):
    orders = [[row["pair_id"] for row in run(tmp_path / str(n), Prefers(), seed=seed)[1]] for n, seed in enumerate((0, 0, 1))]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


def text_of(row) -> str:
    return json.dumps(row["messages"])


def test_masked_prompts_hold_no_criteria_and_full_ones_do(tmp_path):
    _, masked, _ = run(tmp_path / "masked", Prefers(), masking=MaskingConfig(policy="masked"))
    _, full, _ = run(tmp_path / "full", Prefers(), masking=MaskingConfig(policy="full"))
    assert not any("SECRET" in text_of(row) for row in masked)
    assert all("SECRET-CRITERION" in text_of(row) and "SECRET-SELF" in text_of(row) for row in full)


def test_mixed_masking_draws_by_pair_and_reproducibly(tmp_path):
    mixed = MaskingConfig(policy="mixed", show_probability=0.5)
    first, second = (run(tmp_path / name, Prefers(), masking=mixed)[1] for name in "ab")
    assert first == second and 0 < sum("SECRET" in text_of(row) for row in first) < 20


def test_under_history_dropout_the_teacher_reads_as_many_votes_as_the_prompt_shows(tmp_path):
    """A chain that spoke of votes which the prompt lacks would teach the model to invent some."""

    class Counts(Prefers):
        def write(self, example, attempt):
            self.read[example.pair_id, example.chosen_index] = [item.query for item in example.history]
            return super().write(example, attempt)

    teacher = Counts()
    teacher.read = {}
    dropout = MaskingConfig(policy="history_dropout", show_probability=0.4)
    _, rows, _ = run(tmp_path / "a", teacher, masking=dropout)
    for row in rows:
        queries = teacher.read[row["pair_id"], row["order"]]
        prompt = row["messages"][-2]["content"]
        assert prompt.count("<chosen>") == len(queries) and all(query in prompt for query in queries)
    assert {len(queries) for queries in teacher.read.values()} >= {1, 3}
    assert run(tmp_path / "b", Prefers(), masking=dropout)[1] == rows


def test_a_row_is_a_chat_that_ends_with_the_chain(tmp_path):
    _, rows, _ = run(tmp_path, Prefers())
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
        read = parse_chain(row["messages"][-1]["content"])
        assert read.scores[row["order"]] > read.scores[1 - row["order"]] and row["analysis"] == read.analysis
        assert row["pair_id"] in read.analysis


def test_histories_are_shown_and_never_hold_the_asked_vote(tmp_path):
    _, rows, _ = run(tmp_path, Prefers())
    for row in rows:
        prompt = row["messages"][-2]["content"]
        number = row["pair_id"][1:]
        assert prompt.count("<chosen>") == 3 and f"<query>question {number}\n<chosen>" not in prompt


def test_the_oracle_teacher_fills_a_stage_whose_prompts_stay_masked(tmp_path):
    votes = list(build(DataConfig(users=15, heldout_users=2), 0))
    facts, rows, rejected = run(tmp_path, OracleTeacher(), votes)
    assert 0.6 < facts["yield"] <= 1 and abs(facts["chosen_first"] - 0.5) < 0.1
    assert set(rejected["reason"]) <= {"wrong_ranking", "tie", "duplicate"}
    assert not any("above all" in row["messages"][-2]["content"] for row in rows)
    assert set(facts["kinds"]) == {"easy", "medium", "hard", "rival"}


# ---- the teachers of a configuration ----


def test_teachers_by_name(tmp_path):
    with teacher(Config(teacher=EndpointConfig("oracle")), [], tmp_path) as oracle:
        assert isinstance(oracle.text.__self__, OracleTeacher)
    votes = [vote(n, f"u{n % 4}") for n in range(12)]
    with teacher(Config(teacher=EndpointConfig("features")), votes, tmp_path) as rule:
        first, again, other = (rule.write(EXAMPLE, attempt).text for attempt in (0, 0, 1))
    assert first == again and parse_chain(first).issues == () and parse_chain(other).issues == ()
    with pytest.raises(ConfigError, match="base_url"), teacher(Config(teacher=EndpointConfig("endpoint")), votes, tmp_path):
        pass


# ---- a language model as the teacher ----


def settings_for(server, **more) -> EndpointConfig:
    return EndpointConfig("endpoint", server.url, "stub", timeout_seconds=0.5, attempts=2, max_in_flight=8, **more)


def written(body, wrong_form=False) -> str:
    """What a model answers that prefers responses which begin with `good`."""
    first = "<response_1>good" in body["messages"][1]["content"]
    text = (
        chain(8, 3, f"About {hash(str(body['messages'][1]))}.") if first else chain(3, 8, f"On {hash(str(body['messages'][1]))}.")
    )
    return text.replace("<JSON_END>", "") if wrong_form else text


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "MAX_WAIT_SECONDS", 0.02)


def test_the_llm_teacher_is_shown_everything_but_the_label(tmp_path):
    # slower than a thread's turn on a busy machine
    with (
        serve(lambda body, n: slowly(0.1, written(body))) as server,
        teacher(Config(teacher=settings_for(server)), [], tmp_path) as llm,
    ):
        facts, rows, _ = run(tmp_path, llm)
    assert len(rows) == 20 and facts["teacher"]["calls"] == 20 and facts["teacher"]["failures"] == {}
    assert server.most_busy > 1, "questions are asked side by side"
    assert [row["order"] for row in rows] == [0, 1] * 10, "whatever the order of the answers"
    for body in server.bodies:
        system, user = (m["content"] for m in body["messages"])
        assert "<JSON_START>" in system and "SECRET-CRITERION" in user
        assert "chosen_index" not in user and user.count("<chosen>") == 3, "of the history alone"


def test_nothing_is_lost_with_a_server_that_fails_a_third_of_its_calls_and_nothing_paid_twice(tmp_path, short_waits):
    """Errors, hangs, dropped connections and garbage; then the same command again, and a third time from the cache alone."""
    troubles = [{"status": 500}, {"status": 429}, {"reset": True}, {"raw": b"garbage"}, {"hang": True}]

    def flaky(body, n):
        trouble = troubles[(n // 3) % 5] if n % 3 == 0 else None
        if trouble and "hang" in trouble:
            return slowly(0.8, "late")
        return trouble or written(body)

    config = {"sec": SecConfig(samples_per_pair=1)}
    with serve(flaky) as server:
        kept = []
        for attempt in ("first", "second", "third", "fourth"):
            with teacher(Config(teacher=settings_for(server)), [], tmp_path) as llm:
                facts, rows, rejected = run(tmp_path / attempt, llm, **config)
            kept.append({row["pair_id"]: row["messages"][-1]["content"] for row in rows})
            failed = set(rejected["pair_id"].dropna())
            assert len(kept[-1]) + len(failed) == 20 and not failed & set(kept[-1])
            assert all(r is None or r.startswith("teacher:") for r in rejected["reason"])
            assert facts["asked"] == 20
        answered = len(server.bodies)
        with teacher(Config(teacher=settings_for(server)), [], tmp_path) as llm:
            facts, _, _ = run(tmp_path / "last", llm, **config)
    assert kept[0].items() <= kept[1].items() <= kept[3].items(), "what was answered is never asked again"
    assert len(kept[3]) == 20 and len(server.bodies) == answered and facts["teacher"]["from cache"] == 20


def told(server) -> list[str]:
    """What the second and later tries were told."""
    return [body["messages"][2]["content"] for body in server.bodies if len(body["messages"]) == 3]


def asked_with(server, tmp_path, **config):
    with teacher(Config(teacher=settings_for(server)), [], tmp_path) as llm:
        return run(tmp_path, llm, **config)


def test_a_second_chance_is_told_about_the_form(tmp_path):
    with serve(lambda body, n: written(body, wrong_form=len(body["messages"]) == 2)) as server:
        facts, rows, _ = asked_with(server, tmp_path)
    assert len(rows) == 20 and set(facts["rejected"]) == {"parse:no_markers"}
    assert len(told(server)) == 20 and all("parse:no_markers" in text for text in told(server))
    assert not any("could not be used" in json.dumps(row["messages"]) for row in rows), "what was told is not learnt"


def test_without_a_second_chance_the_question_is_asked_again_as_it_was(tmp_path):
    with serve(lambda body, n: written(body, wrong_form=body["seed"] == 0)) as server:
        _, rows, _ = asked_with(server, tmp_path, sec=SecConfig(second_chance=False))
    assert len(rows) == 20 and told(server) == [] and len(server.bodies) == 40


def test_what_a_second_chance_is_told_is_the_same_whatever_the_label(tmp_path):
    """The ranking is never complained about; a wrong form is, whether the ranking was right or not."""
    with serve(lambda body, n: chain(5, 5)) as server, pytest.raises(DataError, match="tie"):
        asked_with(server, tmp_path / "tie", sec=SecConfig(samples_per_pair=2))
    assert len(told(server)) == 20 and len(set(told(server))) == 1 and "tie" in told(server)[0]
    with serve(lambda body, n: chain(8, 3)) as server:
        facts, _, _ = asked_with(server, tmp_path / "always_the_first")
    assert facts["rejected"]["wrong_ranking"] and told(server) == []
    with serve(lambda body, n: chain(8, 3) + " And more.") as server, pytest.raises(DataError):
        asked_with(server, tmp_path / "form", sec=SecConfig(samples_per_pair=2))
    assert len(told(server)) == 20 and len(set(told(server))) == 1 and "issue:trailing_text" in told(server)[0]


@pytest.mark.parametrize(
    ("more", "trouble", "said"),
    [
        ({"give_up_after": 3}, {"status": 500}, "failed . calls in a row"),
        ({"max_total_tokens": 30}, None, "the budget of stub is spent"),
    ],
)
def test_a_dead_server_and_a_spent_budget_stop_the_stage_in_one_sentence(tmp_path, short_waits, more, trouble, said):
    with (
        serve(lambda body, n: trouble or written(body)) as server,
        teacher(Config(teacher=settings_for(server, **more)), [], tmp_path) as llm,
        pytest.raises(BackendError, match=f"teacher: .*{said}.*the same command goes on from there"),
    ):
        run(tmp_path, llm)
    assert len(server.bodies) < 30
