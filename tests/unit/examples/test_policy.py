"""The policy example: data, true utility, intervals, control, settings, and mistakes in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from serving_world import StubEngine, configured, running, service_of

from data_builders.sources import personaworld
from examples.policy import report, train
from examples.policy.report import Answer, paired, read_answers, signs
from examples.policy.world import chats_of, draw_askers, histories, rows_of, split_queries
from pgenrm_train import client
from pgenrm_train.config import load
from pgenrm_train.errors import ArtifactError, BackendError

ROOT = Path(__file__).resolve().parents[3]
NANO = ROOT / "tests" / "data" / "psi_nano"
FOREIGN = "Dear reader, as you like it."
ASKERS = draw_askers(4, 3, seed=0)
COMPOSED = ["--url", "http://10.0.0.1:8000", "--settings"]


def wanted(asker, quality="Quite right."):
    """An answer with everything that a user asks for."""
    return " ".join([*(personaworld.PHRASES[pole][0] for pole in asker.criteria), quality])


def answers(asker, *pairs):
    return [Answer(asker, "For u: Q?", text, reward, asker.utility(text)) for text, reward in pairs]


def test_true_utility_is_the_world_s_and_a_foreign_text_has_none():
    for asker in ASKERS:
        assert asker.utility(wanted(asker)) == pytest.approx(1.0)
        assert asker.utility(wanted(asker, "Off topic.")) == pytest.approx(0.8)
        assert -1 <= asker.popular <= 1
        for text in (FOREIGN, "", "Quite", "Quite right. <|user|>"):
            assert asker.utility(text) is None


def test_the_policy_sees_neither_votes_nor_criteria_and_evaluation_queries_are_new():
    training, evaluation = split_queries(0)
    assert not {q for qs in training.values() for q in qs} & {q for qs in evaluation.values() for q in qs}
    assert {scenario: len(queries) for scenario, queries in evaluation.items()} == dict.fromkeys(training, 6)
    rows = rows_of(ASKERS, training)
    assert len(rows) == len(ASKERS) * 12
    for row in rows:
        extra, user = row["extra_info"], row["extra_info"]["user_id"].partition(".")[0]
        assert row["prompt"] == [{"role": "user", "content": f"For {user}: {extra['query']}"}]
        assert extra["user_id"] == row["reward_model"]["ground_truth"]


def test_sft_teaches_both_texts_of_a_vote_for_users_drawn_at_random():
    votes = list(islice(personaworld.build(load("recipe=build_data", "data.users=40").data, 0), 200))
    chats = [chat["messages"] for chat in chats_of(votes, ["u00", "u01"], seed=0)]
    assert [chat[1]["content"] for chat in chats] == [t for v in votes for t in (v.chosen, v.rejected)]
    chosen = [chat[0]["content"].startswith("For u00: ") for chat in chats[::2]]
    assert 70 < sum(chosen) < 130, "a user's name carries no taste"


def test_the_control_reads_another_user_s_votes_of_the_same_scenario():
    own, others = histories(ASKERS, of_others=False), histories(ASKERS, of_others=True)
    for asker in ASKERS:
        (lender,) = (each for each in ASKERS if each.votes == others[asker.key])
        assert own[asker.key] == asker.votes and len(asker.votes) == 3
        assert lender.user != asker.user and lender.scenario == asker.scenario
    assert sorted(map(str, own.values())) == sorted(map(str, others.values()))


def test_signs_count_foreign_texts_and_missing_scores():
    asker = ASKERS[0]
    found = signs(answers(asker, (wanted(asker), 8.0), (FOREIGN, 5.0), (wanted(asker, "Off topic."), 2.0)), 4)
    assert found["reward"] == 5.0 and found["unscored"] == 1, "a missing score is counted, and is no 0"
    assert found["utility"] == pytest.approx((1.0 + report.FOREIGN + 0.8) / 3)
    assert found["foreign"] == pytest.approx(1 / 3) and found["different"] == 1.0
    # rewards 8 > 5 > 2; utilities 1 > .8 > 0: one of three pairs is in the wrong order
    assert found["agreement"] == pytest.approx(2 / 3)
    assert signs([], 2) | {"unscored": None} == dict.fromkeys(found, None)


def test_agreement_compares_answers_to_one_prompt_only():
    first, second = answers(ASKERS[0], (wanted(ASKERS[0]), 1.0)), answers(ASKERS[1], (FOREIGN, 9.0))
    assert signs([*first, *second], 2)["agreement"] is None


def test_differences_are_paired_by_prompt_and_drawn_over_users():
    before = [answer for asker in ASKERS for answer in answers(asker, (FOREIGN, 5.0), (FOREIGN, 5.0))]
    after = [answer for asker in ASKERS for answer in answers(asker, (wanted(asker), 5.0), (FOREIGN, 5.0))]
    difference = paired(after, before)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.5, 0.5, 0.5))
    assert str(paired(before, after)) == "-0.500 [-0.500, -0.500]"
    mixed = [replace(a, utility=0.0) if a.asker.user == "u00" else a for a in after]
    assert paired(mixed, before).low < paired(mixed, before).mean < 0.5
    with pytest.raises(ArtifactError, match="no prompt in common"):
        paired(after, [replace(answer, prompt="other") for answer in before])


@pytest.mark.parametrize(
    ("utilities", "rewards", "verdict"),
    [
        ((0, 0.4), (5, 8), "both rise"),
        ((0.4, 0.1), (5, 8), "reward hacking"),
        ((0, 1), (5, 5), "does not rise"),
    ],
)
def test_hacking_is_named(utilities, rewards, verdict):
    steps = [{"utility": u, "reward": r} for u, r in zip(utilities, rewards, strict=True)]
    assert verdict in report.hacking(steps)


def test_dumps_of_verl_are_read_and_a_missing_one_is_named(tmp_path):
    asker, dump = ASKERS[2], tmp_path / "1.jsonl"
    row = {"input": "For u00: Q?", "output": wanted(asker), "gts": asker.key, "score": 7.5, "uid": "0a_0_0"}
    padding = {"output": "", "score": 0.0, "uid": f"pad{'0' * 32}_0_0"}
    rows = [row, row | {"output": FOREIGN}, row | padding]
    dump.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_answers(dump, ASKERS)
    assert [answer.utility for answer in read] == [pytest.approx(1.0), None]
    assert [answer.value for answer in read] == [pytest.approx(1.0), report.FOREIGN]
    assert "utility" in report.table({"step 1": signs(read, 2)})
    with pytest.raises(ArtifactError, match=r"2\.jsonl does not exist"):
        read_answers(tmp_path / "2.jsonl", ASKERS)


def test_votes_reach_the_service(tmp_path):
    with running(service_of(configured(tmp_path), StubEngine())) as connection:
        for arm in (train.OWN, train.OTHERS):
            train.store_votes(str(connection.base_url), ASKERS, arm)
            for key, votes in histories(ASKERS, of_others=arm == train.OTHERS).items():
                stored = connection.get(f"/v1/users/{key}/votes").json()["votes"]
                assert [vote["chosen"] for vote in stored] == [vote["chosen"] for vote in votes]


def test_a_service_that_is_down_is_one_sentence():
    with pytest.raises(BackendError, match=r"cannot store votes: http://127\.0\.0\.1:9 does not answer"):
        train.store_votes("http://127.0.0.1:9", ASKERS, train.OWN)


def test_a_folder_with_parts_of_another_run_is_refused(tmp_path):
    def check(*words):
        train.check_settings(train.arguments(["--url", "http://x", *words]), tmp_path / "settings.json")

    check("--no-control", "--seed", "1")
    check("--seed", "1")  # the control may be added later
    with pytest.raises(ArtifactError, match="holds a run with other seed, settings; use another --out"):
        check("--seed", "2", "cre.steps=3")
    check("--seed", "1")


def test_a_service_that_does_not_start_is_one_sentence(tmp_path):
    with (
        pytest.raises(BackendError, match=r"the service did not start: .*nowhere"),
        train.service(tmp_path / "nowhere", tmp_path),
    ):
        pass


def test_mistakes_on_the_command_line(capsys):
    for words, sentence in (
        ([], "expected one of --reward-model and --url"),
        (["--url", "http://x", "--reward-model", "y"], "expected one of --reward-model and --url"),
        (["--url", "http://x", "--users", "1"], "expected at least 2"),
        (["--url", "http://x", "--settings", "absent.txt"], "absent.txt"),
    ):
        with pytest.raises(SystemExit):
            train.arguments(words)
        assert sentence in capsys.readouterr().err
    args = train.arguments(["cre.steps=3", "--url", "http://x", "--no-control", "cre.group_size=4"])
    assert args.overrides == ["cre.steps=3", "cre.group_size=4"] and args.arms == [train.OWN]


@pytest.mark.parametrize("name", ["nano", "llama31_8b"])
def test_settings_compose_for_verl_s_own_trainer(name, tmp_path):
    args = train.arguments([*COMPOSED, str(Path(train.__file__).with_name(f"{name}.txt")), "--seed", "3"])
    config = train.configuration(args)
    settings = train.verl_settings(config, tmp_path, NANO, args.url, evaluate_start=True)
    reward, rollout = settings.reward, settings.actor_rollout_ref.rollout
    assert settings.trainer.v1.trainer_mode == "sync" and reward.num_workers == rollout.agent.num_workers == 1
    assert Path(reward.custom_reward_function.path).samefile(client.__file__)
    assert reward.custom_reward_function.reward_kwargs == {"url": args.url, "group_size": rollout.n}
    assert settings.trainer.total_training_steps == settings.trainer.test_freq == config.cre.steps
    assert settings.trainer.device == {"nano": "cpu", "llama31_8b": "cuda"}[name] and settings.data.seed == 3


def test_the_8b_settings_are_planned_and_fit(capsys):
    assert (
        train.plan(train.arguments(["--plan", "--settings", str(ROOT / "examples/policy/llama31_8b.txt")]))
        == 0
    )
    printed = capsys.readouterr().out
    assert printed.count("in all about") == 2 and "gpu" in printed.lower()
