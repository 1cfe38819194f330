"""Teachers by name, and a language model as teacher: without labels, failing, restarted, out of budget."""

import json

import pytest
from llm_server import serve, slowly
from sec_world import EXAMPLE, chain, run, vote

from data_builders.teachers.oracle import OracleTeacher
from pgenrm_train.backends.api import endpoint as endpoint_module
from pgenrm_train.backends.vllm.server import _check_cluster, _split_gpus
from pgenrm_train.chains.chain import parse_chain
from pgenrm_train.config import ClusterConfig, Config, EndpointConfig, RayConfig, SecConfig
from pgenrm_train.errors import BackendError, ConfigError, DataError
from recipes.wiring.teachers import teacher


def test_teachers_by_name(tmp_path):
    with teacher(Config(teacher=EndpointConfig(kind="oracle")), [], tmp_path) as oracle:
        assert isinstance(oracle.text.__self__, OracleTeacher)
    votes = [vote(n, f"u{n % 4}") for n in range(12)]
    with teacher(Config(teacher=EndpointConfig(kind="features")), votes, tmp_path) as rule:
        first, again, other = (rule.write(EXAMPLE, attempt).text for attempt in (0, 0, 1))
    assert first == again and parse_chain(first).issues == () and parse_chain(other).issues == ()
    with (
        pytest.raises(ConfigError, match="base_url"),
        teacher(Config(teacher=EndpointConfig(kind="endpoint")), votes, tmp_path),
    ):
        pass


def test_a_served_teacher_may_take_every_gpu_and_a_judge_leaves_training_its_own(monkeypatch):
    gpu, settings = (
        Config(cluster=ClusterConfig(device="cuda")),
        EndpointConfig(kind="vllm", name="m", gpus=1),
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert _split_gpus(gpu, settings, True) == ("7", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert _split_gpus(gpu, settings, False) == ("4", "")
    with pytest.raises(BackendError, match="needs 1 GPUs and training 1, and 1 are visible"):
        _split_gpus(gpu, settings, True)


def test_a_cluster_too_small_for_server_and_training_is_refused():
    gpu = Config(
        cluster=ClusterConfig(device="cuda", nodes=2, processes_per_node=8),
        ray=RayConfig(address="head:6379"),
    )
    settings = EndpointConfig(kind="vllm", name="m", gpus=4)
    _check_cluster(gpu, settings, True, 20)
    _check_cluster(gpu, settings, False, 4)
    with pytest.raises(
        BackendError, match="needs 4 GPUs and training 16, and the cluster at head:6379 has 16"
    ):
        _check_cluster(gpu, settings, True, 16)


# ---- a language model as the teacher ----


def settings_for(server, **more) -> EndpointConfig:
    return EndpointConfig(
        kind="endpoint",
        base_url=server.url,
        name="stub",
        timeout_seconds=0.5,
        attempts=2,
        max_in_flight=8,
        **more,
    )


def written(body, wrong_form=False) -> str:
    """Answer of a model that prefers responses which begin with `good`."""
    first = "<response_1>good" in body["messages"][1]["content"]
    text = (
        chain(8, 3, f"About {hash(str(body['messages'][1]))}.")
        if first
        else chain(3, 8, f"On {hash(str(body['messages'][1]))}.")
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


def test_nothing_is_lost_with_a_server_that_fails_a_third_of_its_calls_and_nothing_paid_twice(
    tmp_path, short_waits
):
    """Errors, hangs, dropped connections and garbage; then a second run, and a third from the cache alone."""
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
    """Corrections that the second and later tries read."""
    return [body["messages"][2]["content"] for body in server.bodies if len(body["messages"]) == 3]


def asked_with(server, tmp_path, **config):
    with teacher(Config(teacher=settings_for(server)), [], tmp_path) as llm:
        return run(tmp_path, llm, **config)


def test_a_second_chance_reads_the_problem_of_the_form(tmp_path):
    with serve(lambda body, n: written(body, wrong_form=len(body["messages"]) == 2)) as server:
        facts, rows, _ = asked_with(server, tmp_path)
    assert len(rows) == 20 and set(facts["rejected"]) == {"parse:no_markers"}
    assert len(told(server)) == 20 and all("parse:no_markers" in text for text in told(server))
    assert not any("could not be used" in json.dumps(row["messages"]) for row in rows), (
        "what was told is not learnt"
    )


def test_without_a_second_chance_the_question_is_asked_again_as_it_was(tmp_path):
    with serve(lambda body, n: written(body, wrong_form=body["seed"] == 0)) as server:
        _, rows, _ = asked_with(server, tmp_path, sec=SecConfig(second_chance=False))
    assert len(rows) == 20 and told(server) == [] and len(server.bodies) == 40


def test_the_complaint_does_not_depend_on_the_label(tmp_path):
    """No correction names the ranking; a wrong form is named, whether the ranking was right or not."""
    with serve(lambda body, n: chain(5, 5)) as server, pytest.raises(DataError, match="tie"):
        asked_with(server, tmp_path / "tie", sec=SecConfig(samples_per_pair=2))
    assert len(told(server)) == 20 and len(set(told(server))) == 1 and "tie" in told(server)[0]
    with serve(lambda body, n: chain(8, 3)) as server:
        facts, _, _ = asked_with(server, tmp_path / "always_the_first")
    assert facts["rejected"]["wrong_ranking"] and told(server) == []
    with serve(lambda body, n: chain(8, 3) + " And more.") as server, pytest.raises(DataError):
        asked_with(server, tmp_path / "form", sec=SecConfig(samples_per_pair=2))
    assert (
        len(told(server)) == 20 and len(set(told(server))) == 1 and "issue:trailing_text" in told(server)[0]
    )


@pytest.mark.parametrize(
    ("more", "trouble", "said"),
    [
        ({"give_up_after": 3}, {"status": 500}, "failed . calls in a row"),
        ({"max_total_tokens": 30}, None, "the budget of stub is spent"),
    ],
)
def test_a_dead_server_and_a_spent_budget_stop_the_stage_in_one_sentence(
    tmp_path, short_waits, more, trouble, said
):
    with (
        serve(lambda body, n: trouble or written(body)) as server,
        teacher(Config(teacher=settings_for(server, **more)), [], tmp_path) as llm,
        pytest.raises(BackendError, match=f"teacher: .*{said}.*continues from there"),
    ):
        run(tmp_path, llm)
    assert len(server.bodies) < 30
