"""R = α·PR + β·OR, and its parts."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgenrm_train.chains.chain import Chain, write_chain
from pgenrm_train.rewards.reward import RewardWeights, chain_reward

CRITERIA = [("formal", 60), ("brief", 40)]
FIRST_WINS = write_chain("analysis", CRITERIA, [[9, 8], [3, 2]])
TIE = write_chain("analysis", CRITERIA, [[5, 5], [5, 5]])


def never_asked(chain: Chain) -> float:
    raise AssertionError("the judge was asked")


@pytest.mark.parametrize(
    ("index", "process", "total"), [(0, 0.8, 1.4), (1, 0.8, 0.4), (0, None, 1.0), (1, None, 0.0), (0, 0, 1.0)]
)
def test_total_is_the_weighted_sum(index, process, total):
    reward = chain_reward(FIRST_WINS, index, process=process)
    assert reward.total == pytest.approx(total)
    assert reward.parts["outcome"] == float(index == 0) and reward.parts["format"] == 0.0
    assert math.isnan(reward.parts["process"]) if process is None else reward.parts["process"] == process


def test_weights_scale_the_parts():
    reward = chain_reward(FIRST_WINS, 0, process=0.5, weights=RewardWeights(outcome=2, process=1))
    assert reward.total == pytest.approx(2.5)
    assert reward.parts == {"outcome": 1.0, "process": 0.5, "format": 0.0}


def test_agreement_with_ones_own_sums_is_a_part_where_it_is_asked_for():
    verifying = RewardWeights(verified=0.25)
    wrong = FIRST_WINS.replace('"response_1": 8.6', '"response_1": 9.9')
    bare = '<JSON_START>{"rationale": "", "better_response": {"response_1": 9, "response_2": 1}}<JSON_END>'
    assert wrong != FIRST_WINS
    for text, agrees in ((FIRST_WINS, 1.0), (wrong, 0.0), (bare, 0.0), ("no chain", 0.0)):
        reward = chain_reward(text, 0, weights=verifying)
        assert reward.parts["verified"] == agrees
        assert reward.total == pytest.approx(chain_reward(text, 0).total + 0.25 * agrees)
        assert "verified" not in chain_reward(text, 0).parts


@pytest.mark.parametrize(
    "text", ["", "no chain", "<JSON_START>{<JSON_END>", FIRST_WINS.replace("<JSON_END>", "")]
)
def test_a_format_error_costs_and_asks_no_judge(text):
    for process in (never_asked, None, 0.9):
        reward = chain_reward(text, 0, process=process)
        assert reward.total == -0.1
        assert (reward.parts["outcome"], reward.parts["format"]) == (0.0, -0.1)
        assert math.isnan(reward.parts["process"])
    assert chain_reward(text, 0, weights=RewardWeights(format_error=-1.0)).total == -1.0


def test_the_judge_is_asked_once_with_the_chain():
    judged = []
    reward = chain_reward(FIRST_WINS, 0, process=lambda chain: judged.append(chain) or 0.5)
    assert [chain.analysis for chain in judged] == ["analysis"] and reward.total == pytest.approx(1.25)
    assert chain_reward(FIRST_WINS, 0, process=lambda chain: None).total == 1.0
    assert chain_reward(FIRST_WINS, 0, process=lambda chain: math.nan).total == 1.0
    assert chain_reward(FIRST_WINS, 0, process=math.nan).total == 1.0


def test_a_tie_earns_no_outcome():
    assert chain_reward(TIE, 0).total == chain_reward(TIE, 1).total == 0.0


def test_scores_are_compared_as_numbers():
    scores = '{"response_1": "10.0", "response_2": "9.5"}'
    text = f'<JSON_START>{{"rationale": "", "better_response": {scores}}}<JSON_END>'
    assert chain_reward(text, 0).parts["outcome"] == 1.0
    assert chain_reward(text, 1).parts["outcome"] == 0.0


def test_the_chosen_response_must_beat_all_others():
    text = write_chain("a", CRITERIA, [[5, 5], [7, 7], [7, 7], [9, 9]])
    assert [chain_reward(text, i, n_responses=4).parts["outcome"] for i in range(4)] == [0, 0, 0, 1]


@pytest.mark.parametrize("process", [-0.1, 1.1, math.inf, lambda chain: 2.0])
def test_a_process_score_outside_the_range_is_an_error(process):
    with pytest.raises(ValueError, match="process"):
        chain_reward(FIRST_WINS, 0, process=process)


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_outside_the_responses_is_an_error(index):
    with pytest.raises(ValueError, match="chosen_index"):
        chain_reward(FIRST_WINS, index)


@given(st.text(max_size=200), st.integers(0, 1), st.one_of(st.none(), st.floats(0, 1)))
def test_any_text_gets_a_bounded_reward(text, index, process):
    for candidate in (text, FIRST_WINS + text, text + TIE):
        assert -0.1 <= chain_reward(candidate, index, process=process).total <= 1.5


def test_the_core_imports_nothing_heavy():
    heavy = [
        "torch",
        "ray",
        "verl",
        "vllm",
        "transformers",
        "datasets",
        "pandas",
        "pyarrow",
        "scipy",
        "numpy",
        "wandb",
        "deepspeed",
    ]
    program = f"import sys, pgenrm_train.rewards.reward; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
