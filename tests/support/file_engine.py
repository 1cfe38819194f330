"""A checkpoint engine of veRL that passes weights through a file: a CPU has no NCCL.

veRL loads it in every process by `checkpoint_engine.custom_backend_module`.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry


@CheckpointEngineRegistry.register("files")
class FileEngine(CheckpointEngine):
    """Rank 0 of the actor writes, vLLM's workers read."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.sends = is_master

    def prepare(self) -> str | None:
        return tempfile.mkdtemp(prefix="pg_weights_", dir="/dev/shm") if self.sends else None

    @classmethod
    def build_topology(cls, actors: int, workers: int, metadata: list[Any]) -> tuple[dict[str, Any], ...]:
        return {"folder": metadata[:1] * actors}, {"folder": metadata[:1] * workers}

    def init_process_group(self, folder: str) -> None:
        self.folder = Path(folder)

    def finalize(self) -> None:
        if self.sends:
            shutil.rmtree(self.folder)

    async def send_weights(
        self, weights: Iterator[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> None:
        state = {name: weight.detach().clone() for name, weight in weights}  # every rank gathers
        if self.sends:
            torch.save(state, self.folder / "draft")
            (self.folder / "draft").rename(self.folder / "weights")

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncIterator[tuple[str, torch.Tensor]]:
        while not (self.folder / "weights").exists():
            await asyncio.sleep(0.02)
        for name, weight in torch.load(self.folder / "weights").items():
            yield name, weight
