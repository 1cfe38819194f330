"""A model behind an API, evaluated and scored by command line."""

import dataclasses
import json
import subprocess
import sys

import pytest
from llm_server import serve

from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import ROOT, ApiConfig, StageName, load
from pgenrm_train.errors import BackendError
from pgenrm_train.stages.registry import REGISTRY
from recipes import score
from recipes.wiring.llm import model_endpoint

FIRST = write_chain("The first, always.", [("place", 100)], [[9], [2]])


def command(recipe, run_dir, url, *more):
    arguments = [
        f"recipe={recipe}",
        "model=endpoint",
        "model.name=stub",
        f"model.base_url={url}",
        f"run_dir={run_dir}",
        "tracking=none",
        "pipeline.budget=smoke",
        "eval.ind=1",
        "eval.one_pair_ind=[]",
        "eval.probes=false",
        "eval.max_in_flight=16",
        "eval.seeds=2",
        *more,
    ]
    return subprocess.run(
        [sys.executable, "-m", "pgenrm_train", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def results(run_dir):
    return json.loads((run_dir / "evaluate" / "results.json").read_text())


def test_an_evaluation_counts_failures_and_asks_for_them_again(tmp_path):
    """One call in four is refused; answered questions are not repeated."""
    refuses = {"every": 4}
    with serve(lambda body, n: {"status": 404} if n % refuses["every"] == 0 else FIRST) as server:
        done = command("evaluate", tmp_path / "run", server.url)
        assert done.returncode == 0, done.stderr[-2000:]
        first, asked = results(tmp_path / "run"), len(server.bodies)
        assert (
            f"model stub: {asked} calls" in done.stdout.replace(",", "")
            and "no price configured" in done.stdout
        )
        assert first["n_pairs"] * 2 * 2 == asked, "every pair, both orders, two seeds"
        assert first["failures"] == {"engine:http_404": asked // 4} and first["accuracy"] < 0.5, (
            "and all in the denominator"
        )
        assert (
            "<history>" in server.bodies[0]["messages"][1]["content"]
            and server.bodies[0]["messages"][0]["role"] == "system"
        )
        refuses["every"] = 10**9
        again = command("evaluate", tmp_path / "run", server.url, "eval.draws=500")
        assert again.returncode == 0 and len(server.bodies) == asked + asked // 4
        final = results(tmp_path / "run")
    assert (
        final["accuracy"] == pytest.approx(0.5)
        and final["failures"] == {}
        and final["order_flip_rate"] == 1.0
    )
    [cost] = final["cost"].values()
    assert cost["prompt tokens"] == 10 * asked, "of both starts"
    report = (tmp_path / "run/evaluate/report.html").read_text()
    assert "What the answers cost" in report


def test_a_server_that_is_down_ends_the_evaluation_and_the_same_command_goes_on(tmp_path):
    up = {"limit": 30}

    def behaviour(body, n):
        return FIRST if n < up["limit"] else {"status": 404}

    with serve(behaviour) as server:
        done = command("evaluate", tmp_path / "run", server.url)
        assert done.returncode == 2
        assert (
            "failed" in done.stderr
            and "the same command continues from there" in done.stderr
            and "Traceback" not in done.stderr
        )
        up["limit"] = 10**9
        before = len(server.bodies)
        done = command("evaluate", tmp_path / "run", server.url)
        assert done.returncode == 0, done.stderr[-2000:]
        final = results(tmp_path / "run")
        assert final["failures"] == {} and final["accuracy"] == pytest.approx(0.5)
        assert len(server.bodies) - before < final["n_pairs"] * 2 * 2, "answers are kept"


def test_one_score_over_an_api(tmp_path):
    question = {"user_id": "u", "history": [], "query": "Tea or coffee?", "responses": ["Tea.", "Coffee."]}
    (tmp_path / "q.json").write_text(json.dumps(question))
    with serve(lambda body, n: FIRST) as server:
        done = command("score", tmp_path / "run", server.url, f"score.input={tmp_path / 'q.json'}")
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1])["scores"] == {"response_1": 9.0, "response_2": 2.0}
    done = command("score", tmp_path / "run", "http://127.0.0.1:9/v1", f"score.input={tmp_path / 'q.json'}")
    assert done.returncode == 2 and "failed 1 call (1 × connection; the reason: " in done.stderr


def test_a_score_is_asked_for_at_a_temperature_that_the_server_takes(tmp_path, capsys):
    question = {"user_id": "u", "history": [], "query": "Tea or coffee?", "responses": ["Tea.", "Coffee."]}
    (tmp_path / "q.json").write_text(json.dumps(question))

    def behaviour(body, n):
        right = body.get("temperature", 1) == 1
        return FIRST if right else {"status": 400, "words": "temperature must be 1"}

    with serve(behaviour) as server:
        keys = [f"model.base_url={server.url}", "model.name=stub", f"score.input={tmp_path / 'q.json'}"]
        keys += ["recipe=score", "model=endpoint", f"run_dir={tmp_path / 'run'}"]
        with pytest.raises(BackendError, match="temperature must be 1"):
            score.run(load(*keys))
        for way in ("score.temperature=1", "model.leave_out=[temperature]"):
            assert score.run(load(*keys, way)) == 0
            assert json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]["response_1"] == 9.0


def test_a_model_under_test_has_the_settings_of_every_role():
    changed = {
        "requests_per_minute": 600.0,
        "tokens_per_minute": 1e6,
        "timeout_seconds": 7.0,
        "attempts": 2,
        "give_up_after": 9,
        "max_tokens_field": "max_completion_tokens",
        "leave_out": ["seed"],
        "dollars_per_million_in": 1.0,
        "dollars_per_million_out": 2.0,
        "max_dollars": 3.0,
        "max_total_tokens": 4,
        "api_key_env": "SOME_KEY",
        "base_url": "http://h/v1",
    }
    assert {field.name for field in dataclasses.fields(ApiConfig)} == {*changed, "extra_body"}
    keys = [f"model.{key}={value}" for key, value in changed.items()]
    config = load("recipe=evaluate", "model=endpoint", "model.name=m", *keys, "+model.extra_body.top_k=5")
    settings = model_endpoint(config)
    assert {key: getattr(settings, key) for key in changed} == changed
    assert settings.extra_body == {"top_k": 5}
    plain = load("recipe=evaluate", "model=endpoint", "model.name=m", "model.base_url=http://h/v1")
    before, after = (REGISTRY[StageName.EVALUATE].settings(c) for c in (plain, config))
    added = {key: value for key, value in after.items() if key not in before}
    assert added == {"model.leave_out": ["seed"], "model.extra_body": {"top_k": 5}}, "they change answers"
