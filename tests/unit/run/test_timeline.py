"""Seconds by stage and part: from one process, from its child, after a kill, and without a time line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pgenrm_train.run import timeline
from pgenrm_train.run.process import child_environment
from pgenrm_train.run.timeline import Part


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the next lines; the first is that of the process's start."""
    now = [100.0]
    monkeypatch.setattr(timeline.time, "time", lambda: now[0])
    monkeypatch.setattr(timeline, "_starts", iter([90.0, 200.0, 300.0]))
    return now


def test_a_part_lasts_until_the_next_one_and_a_stage_starts_with_its_process(
    tmp_path: Path, clock: list[float]
) -> None:
    timeline.begin(tmp_path, "psi")
    timeline.mark(Part.UPDATE)
    for clock[0], part in ((104.0, Part.VALIDATION), (105.0, Part.UPDATE)):
        timeline.mark(part)
    clock[0] = 107.5
    timeline.end()
    timeline.begin(tmp_path, "cre")
    clock[0] = 201.0
    timeline.mark(Part.GENERATION, "curriculum")  # trained in the same session
    clock[0] = 204.0
    timeline.end()
    spent = timeline.seconds_by_part(tmp_path)
    assert spent == {
        "psi": {"start-up": 10.0, "update": 6.5, "validation": 1.0},
        "cre": {"start-up": 1.0},
        "curriculum": {"generation": 3.0},
    }
    assert timeline.rows(spent)[0] == {
        "stage": "psi",
        "seconds": 17.5,
        "start-up": 10.0,
        "generation": 0.0,
        "update": 6.5,
        "validation": 1.0,
    }
    timeline.write_summary(tmp_path)
    assert json.loads((tmp_path / timeline.SUMMARY).read_text()) == spent


def test_the_time_between_a_kill_and_the_next_start_is_nobodys(tmp_path: Path, clock: list[float]) -> None:
    timeline.begin(tmp_path, "psi")
    timeline.mark(Part.UPDATE)  # then the process is killed, and its last line cut
    with (tmp_path / timeline.LINES).open("a") as lines:
        lines.write('\n{"time": 1')
    timeline.begin(tmp_path, "psi")
    clock[0] = 203.0
    timeline.mark(Part.UPDATE)
    clock[0] = 208.0
    timeline.end()
    assert timeline.seconds_by_part(tmp_path) == {"psi": {"start-up": 13.0, "update": 5.0}}


def test_a_child_process_goes_on_in_the_same_file(tmp_path: Path) -> None:
    timeline.begin(tmp_path, "cre")
    code = "from pgenrm_train.run.timeline import Part, mark; mark(Part.LOG_PROBABILITIES, 'curriculum')"
    subprocess.run([sys.executable, "-c", code], env=child_environment(), check=True)
    timeline.end()
    assert set(timeline.seconds_by_part(tmp_path)["curriculum"]) == {"log-probabilities"}


def test_without_a_stage_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    timeline.mark(Part.UPDATE)
    timeline.end()
    assert not list(tmp_path.iterdir())
    assert timeline.seconds_by_part(tmp_path) == {} and timeline.rows({}) == []
