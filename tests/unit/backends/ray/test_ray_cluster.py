"""The package for a cluster; tests/integration/test_nodes.py loses real nodes."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from pgenrm_train.backends.ray.cluster import ALL_BUT_CODE, CODE
from pgenrm_train.config import ROOT


def test_the_package_holds_the_code_and_nothing_else(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    create_package(str(ROOT), tmp_path / "package.zip", include_gitignore=True, excludes=ALL_BUT_CODE)
    names = zipfile.ZipFile(tmp_path / "package.zip").namelist()
    assert {name.split("/")[0] for name in names} == set(CODE)
    assert {
        "pgenrm_train/backends/grpo/cpu.py",
        "recipes/psi.py",
        "configs/config.yaml",
        "eval/studies/evaluation.py",
    } <= set(names)
    assert not any("__pycache__" in name for name in names)


def test_a_process_that_uses_ray_hears_sigterm_as_before() -> None:
    program = (
        "import os, signal, time\n"
        "from pgenrm_train.backends.ray.cluster import connect\n"
        "from pgenrm_train.config import load\n"
        "from pgenrm_train.run.process import Terminated, end_on_sigterm\n"
        "end_on_sigterm()\n"
        "close = connect(load('recipe=evaluate'), 1, {})\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(20)\n"
        "except Terminated:\n"
        "    print('heard')\n"
        "close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["heard"]), done.stderr
