"""Rubric dropout: how much is hidden, from whom, and when it changes."""

import json
from collections import Counter

import pytest

from data_builders.teachers.corruptible import dropping_judge_for_rewards
from data_builders.teachers.oracle import judge_for_rewards, names_judge_for_rewards
from pgenrm_train.backends.grpo.scoring import RewardSpec, Sample, score
from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import load
from pgenrm_train.errors import ConfigError
from pgenrm_train.rewards.reward import DEFAULT_WEIGHTS
from pgenrm_train.rewards.rubric_dropout import RubricDropout
from pgenrm_train.rewards.training_rows import with_dropout, withheld_signals

STATED = "For work I want formal above all, then direct, then warm."


def row(signals, criteria=STATED, pair_id="p1"):
    extra = {"pair_id": pair_id, "explicit": json.dumps(signals), "criteria": criteria, "n_responses": 2}
    return {"extra_info": extra, "reward_model": {"ground_truth": "0"}, "prompt": []}


@pytest.mark.parametrize(
    ("share", "count", "kept"),
    [(0.5, 3, 2), (0.5, 4, 2), (0.3, 10, 7), (0.3, 3, 3), (0.7, 3, 1), (0.99, 1, 1), (0.5, 0, 0)],
)
def test_the_floor_of_the_share_is_hidden_and_at_least_one_stays(share, count, kept):
    items = list(range(count))
    seen = RubricDropout(share, "p1", 1).keep(items)
    assert len(seen) == kept and seen == sorted(seen)


def test_all_chains_of_a_group_share_it_and_steps_and_pairs_do_not():
    names = list("abcdefgh")
    of_steps = [tuple(RubricDropout(0.5, "p1", step).keep(names)) for step in range(1, 40)]
    assert of_steps == [tuple(RubricDropout(0.5, "p1", step).keep(names)) for step in range(1, 40)]
    assert len(set(of_steps)) > 20
    assert len({tuple(RubricDropout(0.5, f"p{n}", 1).keep(names)) for n in range(40)}) > 20
    counts = Counter(name for seen in of_steps for name in seen)
    assert set(counts) == set(names) and max(counts.values()) < 2.5 * min(counts.values()), "no favourite"


def test_a_judge_of_signals_sees_sentences_lines_and_attributes_less_those_hidden():
    signals = {
        "criteria": "Be brief. Cite sources! 要約して。 Never joke.\n- no lists",
        "style": "plain",
        "attributes": {"warm": 0.5, "formal": 0.2},
    }
    whole = withheld_signals(row(signals)["extra_info"])
    assert whole == signals
    seen = [withheld_signals(with_dropout(row(signals), 0.5, step)["extra_info"]) for step in range(1, 200)]
    items = {"Be brief.", "Cite sources!", "要約して。", "Never joke.", "- no lists"}
    for part in seen:
        of_text = [item for item in items if item in str(part.get("criteria", ""))]
        assert len(of_text) + len(part.get("attributes", {})) + ("style" in part) == 8 - 4
    assert {name for part in seen for name in part.get("attributes", {})} == {"warm", "formal"}
    one = {"inferred_criteria": "I prefer answers that are warm (60%), brief (40%)."}
    assert withheld_signals(with_dropout(row(one), 0.9, 3)["extra_info"]) == one, "one criterion stays"


def chain(*criteria):
    share = 100 / len(criteria)
    return write_chain(
        "So.", [(name, share) for name in criteria], [[9.0] * len(criteria), [5.0] * len(criteria)]
    )


def test_rules_judge_by_the_criteria_that_stay():
    hidden = with_dropout(row({"criteria": STATED}), 0.5, 1)["extra_info"]
    seen = hidden["dropout"].keep(("formal", "direct", "warm"))
    (gone,) = {"formal", "direct", "warm"} - set(seen)
    for judge in (dropping_judge_for_rewards(), names_judge_for_rewards()):
        assert judge(chain(*seen), hidden) == judge(chain(*seen, gone), hidden) == 1.0
        assert judge(chain(gone), hidden) == 0.0
        assert judge(chain(*seen), {"criteria": STATED}) == pytest.approx(2 / 3)
    oracle = judge_for_rewards()
    assert oracle(chain(*seen), hidden) > oracle(chain(gone, "quality"), hidden)
    assert oracle(chain("formal", "direct", "warm"), {"criteria": STATED}) > 0.5


def test_a_reward_follows_the_part_that_the_judge_sees():
    judge, rewards = dropping_judge_for_rewards(), set()
    text = chain("formal")
    sample = Sample([1], [2], [0.0], text, True, 0)
    for step in range(1, 30):
        scored = score(sample, with_dropout(row({"criteria": STATED}), 0.5, step), DEFAULT_WEIGHTS, judge)
        rewards.add(scored.process)
    assert rewards == {0.0, 0.5}


def test_measurements_hide_nothing():
    spec, shown = RewardSpec(rubric_dropout=0.5), row({"criteria": STATED})
    assert spec.judged_row(shown, 0) is shown is RewardSpec().judged_row(shown, 7)
    dropout = spec.judged_row(shown, 7)["extra_info"]["dropout"]
    assert dropout == RubricDropout(0.5, "p1", 7) and "dropout" not in shown["extra_info"]


def test_it_needs_a_training_judge():
    assert load("recipe=cre", "cre.rubric_dropout=0.5").cre.rubric_dropout == 0.5
    with pytest.raises(ConfigError, match=r"cre\.rubric_dropout=0\.5 hides .* with judge=none there is none"):
        load("recipe=cre", "cre.rubric_dropout=0.5", "judge=none")
    with pytest.raises(ConfigError, match=r"with curriculum\.process_weight=0 there is none"):
        load("recipe=curriculum", "curriculum.rubric_dropout=0.5")
    with pytest.raises(ConfigError, match=r"cre\.rubric_dropout=1\.0 must be at least 0 and below 1"):
        load("recipe=cre", "cre.rubric_dropout=1")
