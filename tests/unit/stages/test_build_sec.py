"""build_sec balances orders, records every rejected chain, keeps no chain twice, and leaks no criteria."""

import json
from collections import Counter

import pytest
from sec_world import Prefers, Says, chain, run, vote

from data_builders.sources.personaworld import build
from data_builders.teachers.oracle import OracleTeacher
from pgenrm_train.backends.protocols import Generation
from pgenrm_train.chains.chain import Chain, parse_chain
from pgenrm_train.chains.totals import close_chain, first_total
from pgenrm_train.config import DataConfig, MaskingConfig, ModelConfig, SecConfig
from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import Example
from pgenrm_train.stages.build_sec import yield_table


def test_orders_alternate_and_both_are_equally_frequent(tmp_path):
    facts, rows, _ = run(tmp_path, Prefers())
    assert facts["chains"] == len(rows) == 20 and facts["chosen_first"] == 0.5
    assert Counter(row["order"] for row in rows) == {0: 10, 1: 10}
    assert [row["order"] for row in rows] == [0, 1] * 10
    assert len({row["pair_id"] for row in rows}) == 20
    for row in rows:  # the order gives the place of the chosen response
        prompt = row["messages"][-2]["content"]
        assert (
            (prompt.index("<response_1>good") > 0)
            if row["order"] == 0
            else (prompt.index("<response_2>good") > 0)
        )


def test_two_orders_a_pair_ask_both(tmp_path):
    _, rows, _ = run(tmp_path, Prefers(), sec=SecConfig(orders_per_pair=2))
    assert Counter(Counter(row["pair_id"] for row in rows).values()) == {2: 20}
    assert {(row["pair_id"], row["order"]) for row in rows} == {
        (f"p{n}", order) for n in range(20) for order in (0, 1)
    }


def test_a_rejected_chain_is_recorded_and_another_is_asked_for(tmp_path):
    teacher = Prefers(wrong=2)
    facts, rows, rejected = run(tmp_path, teacher)
    assert len(teacher.asked) == 60 and {row["attempt"] for row in rows} == {2}
    assert (
        facts["rejected"] == {"wrong_ranking": 40}
        and facts["asked"] == 60
        and facts["yield"] == pytest.approx(1 / 3, abs=1e-4)
    )
    assert len(rejected) == 40 and set(rejected["reason"]) == {"wrong_ranking"}
    assert list(rejected["attempt"][:2]) == [0, 1] and rejected["text"].str.contains("JSON_START").all()


def test_the_yield_is_a_table_of_reasons(tmp_path):
    facts, _, _ = run(tmp_path, Prefers(wrong=2))
    assert yield_table(facts) == "       20   33.3%  kept\n       40   66.7%  wrong_ranking"


def test_no_more_samples_than_allowed(tmp_path):
    teacher = Prefers(wrong=9)
    with pytest.raises(
        DataError, match=r"no chain passed rejection sampling; reasons: \{'wrong_ranking': 60\}"
    ):
        run(tmp_path, teacher, sec=SecConfig(samples_per_pair=3))
    assert len(teacher.asked) == 60


@pytest.mark.parametrize(
    "text,reasons", [(chain(5, 5), "tie"), ("I cannot say.", "parse:no_markers"), ("", "parse:no_markers")]
)
def test_a_teacher_that_never_succeeds_ends_the_stage_in_one_sentence(tmp_path, text, reasons):
    with pytest.raises(DataError, match=reasons) as error:
        run(tmp_path, Says(text))
    assert "\n" not in str(error.value)


def test_the_same_text_is_learnt_once_a_user(tmp_path):
    votes = [vote(n, f"u{n % 2}") for n in range(12)]
    _, rows, rejected = run(tmp_path, Says(chain(8, 3)), votes)
    assert len(rows) == 2 and {row["user_id"] for row in rows} == {"u0", "u1"}
    assert len(rows) + len(rejected[rejected["reason"] == "duplicate"]) == 6, (
        "orders alternate: half rank the other way"
    )
    assert set(rejected["reason"]) == {"duplicate", "wrong_ranking"}


LONG = (
    "This reader asks for recipes on weekdays and has little time, so every answer that starts with the "
    "list of ingredients and then gives numbered steps earns marks, whereas stories about grandmothers, "
    "remarks on the weather and advice to consult a chef cost some; the earlier votes agree on it in "
    "three of three pairs, and nothing in them speaks of taste in music or of politics at all."
)
OTHER = (
    "Somebody who argues about history for pleasure: sources with dates, a counter-argument taken "
    "seriously, and a plain statement of what is not known count for more than tone. Length does no harm "
    "as long as each paragraph adds a claim that can be checked by the reader, which is why bullet points"
    " without verbs and bold headings were passed over twice in the votes shown above."
)


class Repeats(Prefers):
    """Language model that writes `said` about every pair, with one word changed."""

    in_flight, by_rule = 2, False

    def __init__(self, said: str = LONG) -> None:
        super().__init__()
        self.said = said

    def write(self, example: Example, attempt: int, complaint: str | None = None) -> Generation:
        text = (
            super()
            .write(example, attempt)
            .replace(f"About {example.pair_id} in order", f"{self.said} Case {example.pair_id},")
        )
        return Generation(example.pair_id, attempt, text)

    def expect(self, examples, questions, tries):
        return None

    def spending(self):
        return None


def test_a_repeated_analysis_is_kept_once(tmp_path):
    votes = [vote(n, f"u{n % 2}") for n in range(12)]
    _, rows, rejected = run(tmp_path, Repeats(), votes)
    assert len(rows) == 1 and len(rejected) == 11
    owner = rows[0]["user_id"]
    users = {v.pair_id: v.user_id for v in votes}
    for row in rejected.itertuples():  # of this user: nothing new; of another: generic
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
    assert (
        facts["rejected"] == {"over_length": 2}
        and set(rejected["pair_id"]) == {"p3", "p4"}
        and len(rows) == 18
    )
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
    orders = [
        [row["pair_id"] for row in run(tmp_path / str(n), Prefers(), seed=seed)[1]]
        for n, seed in enumerate((0, 0, 1))
    ]
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
    """A chain that cites votes which the prompt lacks would teach the model to invent some."""

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


def test_with_totals_by_code_no_row_states_a_total(tmp_path):
    facts, rows, _ = run(tmp_path, Prefers(), model=ModelConfig(totals="code"))
    assert facts["chains"] == 20
    for row in rows:
        text = row["messages"][-1]["content"]
        assert first_total(text) is None and isinstance(parse_chain(close_chain(text)), Chain)


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
