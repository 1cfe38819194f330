"""Wall clock, CPU time and peak memory of one command of the project, in a process of its own."""

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_CHILD = """
import resource, sys
from pgenrm_train.__main__ import main
code = main()
spent = resource.getrusage(resource.RUSAGE_SELF)
print("spent", spent.ru_utime + spent.ru_stime, spent.ru_maxrss / 1024, file=sys.stderr)
sys.exit(code)
"""


class Spent(NamedTuple):
    wall_seconds: float
    cpu_seconds: float
    peak_mib: float


def measured(*arguments: str) -> Spent:
    """Run `python -m pgenrm_train ARGUMENTS`; a failure ends this process with the child's stderr."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    wall = time.monotonic() - began
    if done.returncode:
        sys.exit(done.stderr)
    cpu, peak = done.stderr.rsplit("spent ", 1)[1].split()
    return Spent(wall, float(cpu), float(peak))
