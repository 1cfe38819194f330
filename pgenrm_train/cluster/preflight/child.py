"""Checks that need a process of their own, so that no driver, CUDA context or torch stays in this one."""

import subprocess
import sys

from pgenrm_train.run.process import child_environment


class ChildFailed(Exception):
    """A child process failed; the text is the reason."""


def run_module(module: str, *arguments: str, seconds: float, variables: dict[str, str] | None = None) -> str:
    """Run `python -m module`; returns its output.  Raises ChildFailed, or subprocess.TimeoutExpired."""
    child = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=child_environment() | (variables or {}),
    )
    if child.returncode:
        lines = reversed(child.stderr.splitlines())
        reason = next((line.strip()[:200] for line in lines if "Error" in line), "no reason given")
        raise ChildFailed(reason)
    return child.stdout
