"""A second judge rates validation chains alone, and only a gap that widens is called one."""

import json

import pytest

from pgenrm_train.backends.grpo.gold import PREFIX, gold_metrics, widened
from pgenrm_train.backends.grpo.phase import PHASES, Phase
from pgenrm_train.backends.grpo.scoring import JudgeSpec, ScoredChain
from pgenrm_train.config import StageName, load
from pgenrm_train.errors import ConfigError


def world(process=0.9, users=6, **more):
    chains = [ScoredChain(length=9, process=process, text=f"chain {n}", **more) for n in range(users)]
    stated = {"explicit": json.dumps({"criteria": "short"})}
    extras = [{"pair_id": f"p{n}", "user_id": f"u{n}", "order": 0, **stated} for n in range(users)]
    return [[chain] for chain in chains], extras


def fooled(text, extra):
    return 0.5 if "chain" in text else None


def test_both_scores_and_their_gap():
    metrics = gold_metrics(*world(), fooled, 2)
    assert metrics[f"{PREFIX}score"] == 0.5 and metrics[f"{PREFIX}training_judge"] == pytest.approx(0.9)
    assert metrics[f"{PREFIX}gap"] == pytest.approx(0.4) == metrics[f"{PREFIX}gap_low"]
    assert metrics[f"{PREFIX}null_share"] == 0.0


def test_without_a_training_judge_there_is_one_curve():
    metrics = gold_metrics(*world(process=None), fooled, 1)
    assert metrics[f"{PREFIX}score"] == 0.5 and metrics[f"{PREFIX}gap"] is None


def test_a_missing_verdict_is_counted_and_never_a_score():
    groups, extras = world()

    def moody(text, extra):
        if extra["user_id"] == "u0":
            raise OSError("down")
        return {"u1": None, "u2": float("nan")}.get(extra["user_id"], 0.3)

    metrics = gold_metrics(groups, extras, moody, 3)
    assert metrics[f"{PREFIX}score"] == pytest.approx(0.3) and metrics[f"{PREFIX}null_share"] == 0.5


def test_probes_unreadable_chains_and_users_who_stated_nothing_are_not_rated():
    asked = []

    def judge(text, extra):
        asked.append(extra["pair_id"])
        return 0.5

    groups, extras = world()
    extras[0]["probe"], extras[1]["explicit"] = "swapped_history", "{}"
    groups[2] = [ScoredChain(length=9, text="x", failure="no_markers")]
    gold_metrics(groups, extras, judge, 1)
    assert sorted(asked) == ["p3", "p4", "p5"]
    assert gold_metrics([], [], judge, 1)[f"{PREFIX}score"] is None


def line(gap, low, high, score=0.5):
    values = {"gap": gap, "gap_low": low, "gap_high": high, "score": score}
    return {f"cre/{PREFIX}{name}": value for name, value in values.items()}


def test_a_sentence_only_where_the_gap_widens():
    first = line(0.1, 0.05, 0.15, 0.60)
    sentence = widened([first, {"other": 1}, line(0.3, 0.22, 0.38, 0.45)], "cre")
    assert sentence and "grew from 0.10 to 0.30 [0.22, 0.38]" in sentence and "0.60 to 0.45" in sentence
    assert widened([first, line(0.15, 0.08, 0.2)], "cre") is None, "within the interval"
    assert widened([first, line(0.1, 0.1 + 1e-16, 0.1)], "cre") is None, "rounding"
    assert widened([first], "cre") is None and widened([], "cre") is None
    assert widened([first, line(0.3, None, None)], "cre") is None, "one user has no interval"


def test_a_phase_with_a_second_judge_survives_its_job_file(tmp_path):
    spec = JudgeSpec("module:factory", load("recipe=cre", "judge_gold=none").judge_gold, tmp_path, 4)
    phase = Phase(StageName.CRE, None, tmp_path, tmp_path, 1, gold=spec)
    assert PHASES.validate_json(PHASES.dump_json([phase]))[0].gold.factory == "module:factory"


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"judge_gold=endpoint needs judge_gold\.base_url"):
        load("recipe=cre", "judge_gold=endpoint")
    with pytest.raises(ConfigError, match="judge_gold=oracle knows data=personaworld only"):
        load("recipe=cre", "data=chatbot_arena", "judge_gold=oracle")
    with pytest.raises(ConfigError, match=r"judge_gold=vllm needs judge_gold\.name"):
        load("recipe=cre", "judge_gold=vllm")


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["judge_gold=none"],
        ["judge_gold=oracle"],
        ["judge_gold=endpoint", "judge_gold.base_url=http://localhost:8001/v1", "judge_gold.name=m"],
        ["judge_gold=vllm", "judge_gold.name=some/model", "judge_gold.gpus=2"],
    ],
)
def test_every_kind_composes(more):
    config = load("recipe=cre", *more)
    assert config.judge_gold.kind == ([*more, "judge_gold=none"][0].partition("=")[2])
