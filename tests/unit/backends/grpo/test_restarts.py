"""When a GRPO run is started again by itself, and when it stops; no engine is started."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from pgenrm_train.backends.grpo.progress import chain_metrics, rewards_problem
from pgenrm_train.backends.grpo.scoring import ScoredChain, ScoredGroup
from pgenrm_train.backends.grpo.supervisor import process_lost, read_report, with_restarts
from pgenrm_train.backends.protocols import Trained
from pgenrm_train.errors import BackendError, ConfigError, EngineLostError, NodeLostError
from pgenrm_train.rewards.hacking_signs import Ranking

DONE = [Trained(3, Path("checkpoint"))]


def scripted(*outcomes: Any) -> Any:
    left = list(outcomes)

    def work() -> Any:
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return work


def test_a_lost_engine_is_started_again_and_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "restarts.jsonl"
    assert (
        with_restarts(scripted(EngineLostError("it hung"), EngineLostError("it died"), DONE), 2, log) == DONE
    )
    assert [json.loads(line)["reason"] for line in log.read_text().splitlines()] == ["it hung", "it died"]
    assert "it hung\nstarting again from the newest checkpoint (1 of 2)" in capsys.readouterr().out


def test_restarts_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(EngineLostError, match="third"):
        with_restarts(
            scripted(*(EngineLostError(n) for n in ("first", "second", "third")), DONE), 2, tmp_path / "log"
        )


def test_a_lost_node_is_a_lost_engine(tmp_path: Path) -> None:
    assert (
        with_restarts(
            scripted(NodeLostError("a node"), EngineLostError("it hung"), DONE), 2, tmp_path / "log"
        )
        == DONE
    )


@pytest.mark.parametrize(
    "error", [BackendError("the judge gave no verdict"), ConfigError("a key"), OSError("disk full")]
)
def test_what_would_fail_again_is_not_tried_again(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        with_restarts(scripted(error, DONE), 5, tmp_path / "log")


@pytest.mark.parametrize(
    ("code", "lost"),
    [
        (-signal.SIGKILL, True),
        (-signal.SIGSEGV, True),
        (-signal.SIGTERM, False),
        (-signal.SIGINT, False),
        (1, False),
    ],
)
def test_a_child_without_a_report_was_lost_if_it_was_killed(code: int, lost: bool, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=f"code {code} and no report") as error:
        read_report(tmp_path / "report.json", code)
    assert isinstance(error.value, EngineLostError) == lost


def test_a_dead_actor_is_a_lost_engine_and_a_failed_task_is_not() -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    assert process_lost(ActorDiedError())
    assert not process_lost(RayTaskError("f", "traceback", ValueError("x"))) and not process_lost(
        ValueError("x")
    )


# ---- a step with useless rewards ----


def chain(**more: Any) -> ScoredChain:
    parts = {"length": 5, "total": 1.0, "outcome": 1.0, "process": 0.5, "format": 0.0}
    return ScoredChain(**(parts | more))


NULL = {"process": None, "null_verdict": True}
UNSCORED = dict.fromkeys(("total", "outcome", "process", "format")) | {"error": "OSError: gone"}


@pytest.mark.parametrize(
    ("bad", "share", "problem"),
    [
        ([NULL, NULL], 0.5, None),
        ([NULL, NULL, NULL], 0.5, "the judge gave no verdict for 75% of the chains that it saw"),
        ([NULL], 0.0, "the judge gave no verdict for 25% of the chains that it saw"),  # null_policy=stop
        ([UNSCORED], 0.5, "reward code failed for 25% of its chains, first with OSError: gone"),
    ],
)
def test_too_many_nulls_or_errors_end_a_run(
    bad: list[dict[str, Any]], share: float, problem: str | None
) -> None:
    groups = [ScoredGroup([chain(**more) for more in [*bad, *({} for _ in range(4 - len(bad)))]])]
    assert rewards_problem(groups, chain_metrics(groups), share) == problem


def test_a_null_is_in_no_mean() -> None:
    metrics = chain_metrics([ScoredGroup([chain(**NULL), chain(process=0.8)])])
    assert metrics["reward/process"] == 0.8 and metrics["reward/process_null_share"] == 0.5


def test_a_group_travels_through_verl_as_it_is() -> None:
    """Its `extra_fields` hold plain values alone, tuples as lists after a transport that knows no tuples."""
    ranking = Ranking(2.0, None, 3.0, ("formal", "brief"), 2.0, False)
    sent = ScoredGroup([chain(ranking=ranking, score=1.0), chain(**UNSCORED)], 1, 2, 4)
    assert ScoredGroup.from_extra_fields(json.loads(json.dumps(sent.to_extra_fields()))) == sent
