"""The guardian ends the leftovers of a killed driver, even processes that are no longer its children."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

from pgenrm_train.backends.ray import guardian

DRIVER = """
import subprocess, sys, time
from pathlib import Path
from pgenrm_train.backends.ray import guardian
folder = Path(sys.argv[1])
guardian.watch_over(folder)
agent = "import sys, time; log = open(sys.argv[1], 'w'); print('ready', flush=True); time.sleep(600)"
command = [sys.executable, "-c", agent, str(folder / "agent.log")]
child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_killed_driver_leaves_neither_process_nor_folder(tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    agent = psutil.Process(int(driver.stdout.readline()))
    family = psutil.Process(driver.pid).children(recursive=True)
    assert agent in family and agent in guardian.holders(folder)
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive and not folder.exists()


def test_a_guardian_that_is_dismissed_does_nothing(tmp_path: Path) -> None:
    with (tmp_path / "held").open("w"):
        watching = guardian.watch_over(tmp_path)
        guardian.dismiss(watching)
        time.sleep(0.5)
    assert tmp_path.exists() and subprocess.Popen.poll(watching) is not None
