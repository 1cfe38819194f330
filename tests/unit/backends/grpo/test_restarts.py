"""When a GRPO run goes on by itself, and when it stops: no engine is started."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from pgenrm_train.backends.grpo.engine import _died, _read, with_restarts
from pgenrm_train.backends.grpo.progress import chain_metrics, hopeless
from pgenrm_train.backends.protocols import Trained
from pgenrm_train.errors import BackendError, ConfigError, EngineLostError, NodeLostError

DONE = [Trained(3, Path("checkpoint"))]


def scripted(*outcomes: Any) -> Any:
    left = list(outcomes)

    def work() -> Any:
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return work


def test_a_lost_engine_is_started_again_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        _read(tmp_path / "report.json", code, tmp_path)
    assert isinstance(error.value, EngineLostError) == lost


def test_a_dead_actor_is_a_lost_engine_and_a_failed_task_is_not() -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    assert _died(ActorDiedError())
    assert not _died(RayTaskError("f", "traceback", ValueError("x"))) and not _died(ValueError("x"))


# ---- a step that gives no ground to go on ----


def chain(**more: Any) -> dict[str, Any]:
    parts = {
        "total": 1.0,
        "outcome": 1.0,
        "process": 0.5,
        "format": 0.0,
        "margin": 1.0,
        "verified_margin": None,
        "spread": 1.0,
    }
    counts = {"length": 5, "order": 0, "discarded_passes": 0, "discarded_chains": 0}
    return parts | counts | {"criteria": [], "failure": None, "null_verdict": False, "error": None} | more


NULL = {"process": None, "null_verdict": True}
UNSCORED = dict.fromkeys(("total", "outcome", "process", "format", "margin")) | {"error": "OSError: gone"}


@pytest.mark.parametrize(
    ("bad", "share", "said"),
    [
        ([NULL, NULL], 0.5, None),
        ([NULL, NULL, NULL], 0.5, "the judge gave no verdict for 75% of the chains that it saw"),
        ([NULL], 0.0, "the judge gave no verdict for 25% of the chains that it saw"),  # null_policy=stop
        ([UNSCORED], 0.5, "reward code failed for 25% of its chains, first with OSError: gone"),
    ],
)
def test_too_many_nulls_or_errors_end_a_run(
    bad: list[dict[str, Any]], share: float, said: str | None
) -> None:
    groups = [[chain(**more) for more in [*bad, *({} for _ in range(4 - len(bad)))]]]
    assert hopeless(chain_metrics(groups), groups, share) == said


def test_a_null_is_in_no_mean() -> None:
    found = chain_metrics([[chain(**NULL), chain(process=0.8)]])
    assert found["reward/process"] == 0.8 and found["reward/process_null_share"] == 0.5
