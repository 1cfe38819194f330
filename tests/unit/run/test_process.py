"""Child processes: exit codes, relayed output, and nothing left behind by an interrupted parent."""

import os
import subprocess
import sys
import threading
import time

import psutil

from pgenrm_train.run.process import run_child, stop_child

PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("started", flush=True)
time.sleep(60)
"""


def test_the_exit_code_is_returned():
    assert run_child([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), patience=1.0) == 3


def test_output_is_relayed():
    lines, done = [], threading.Event()

    def relay(output):
        lines.extend(output)
        done.set()

    code = run_child(
        [sys.executable, "-c", "print('one\\ntwo')"], dict(os.environ), patience=1.0, relay=relay
    )
    assert code == 0 and done.wait(10.0) and lines == ["one\n", "two\n"]


def test_a_stopped_child_leaves_no_process_behind():
    child = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"started\n"
    family = psutil.Process(child.pid).children()
    assert len(family) == 1
    stop_child(child, 5.0)
    child.stdout.close()
    deadline = time.monotonic() + 10.0
    while family[0].is_running() and family[0].status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_child_that_ignores_sigterm_is_killed():
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    script += "print('ready', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    stop_child(child, 0.2, family=False)
    assert child.wait(10.0) == -9
    child.stdout.close()
