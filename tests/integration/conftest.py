"""Tests that share an engine run in one process: those of a file, and those of the folder grpo."""

from __future__ import annotations

from typing import Any

import pytest

LONGEST = ("test_pipeline.py", "grpo", "test_gpu_settings.py", "test_nodes.py")  # they start first


def _engine(nodeid: str) -> str:
    return nodeid.partition("::")[0].split("/")[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(_engine(item.nodeid), len(places)))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The scheduler of `--dist loadfile`, with the folder grpo as one file."""
    from xdist.scheduler import LoadFileScheduling

    class ByEngine(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _engine(nodeid)

    return ByEngine(config, log)
