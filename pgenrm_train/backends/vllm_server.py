"""An OpenAI-compatible vLLM server on this machine for as long as a block runs: a teacher or judge of one's own."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from pgenrm_train.config import Config, EndpointConfig
from pgenrm_train.errors import BackendError

START_SECONDS = 1800.0  # a 70B model is read from a slow disk


@contextmanager
def served(config: Config, settings: EndpointConfig, log: Path, *, beside_training: bool) -> Iterator[EndpointConfig]:
    """Serve `settings.name` on a free port; yields the settings of the endpoint that it is.

    On GPUs the server takes the last `settings.gpus` visible ones and leaves the others to this process and its children; a judge
    must leave some, since a training runs beside it.
    """
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", settings.name or "", "--host", "127.0.0.1",
               "--port", str(port), "--max-num-seqs", str(settings.max_in_flight), *_device_arguments(config, settings)]  # fmt: skip
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine, left = _split_gpus(config, settings, beside_training)
    env = os.environ | _environment(config) | ({"CUDA_VISIBLE_DEVICES": mine} if mine else {})
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True, preexec_fn=_die_with_parent)
    try:
        if left is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = left
        url = f"http://127.0.0.1:{port}"
        _wait(server, url, log)
        yield dataclasses.replace(settings, kind="endpoint", base_url=f"{url}/v1")
    finally:
        _stop(server)
        if left is not None:
            os.environ.pop("CUDA_VISIBLE_DEVICES") if ours is None else os.environ.update(CUDA_VISIBLE_DEVICES=ours)


def _device_arguments(config: Config, settings: EndpointConfig) -> list[str]:
    if config.cluster.device == "cpu":
        return ["--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]
    return ["--tensor-parallel-size", str(settings.gpus)]


def _environment(config: Config) -> dict[str, str]:
    from pgenrm_train.backends.vllm_engine import environment

    return environment(config)


def _split_gpus(config: Config, settings: EndpointConfig, beside_training: bool) -> tuple[str | None, str | None]:
    """CUDA_VISIBLE_DEVICES of the server and of everyone else; None on a CPU."""
    if config.cluster.device == "cpu":
        return None, None
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = visible.split(",")
    if len(gpus) < settings.gpus + beside_training:
        needs = f"{settings.gpus} GPUs and training at least one more" if beside_training else f"{settings.gpus} GPUs"
        raise BackendError(
            f"the vLLM server needs {needs}, and {len(gpus)} are visible; use kind=endpoint and serve the model elsewhere, or lower gpus"
        )
    return ",".join(gpus[-settings.gpus :]), ",".join(gpus[: -settings.gpus])


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise BackendError(f"the vLLM server ended with code {server.returncode} before it answered; its words are in {log}")
        try:
            if httpx.get(f"{url}/health", timeout=2.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise BackendError(f"the vLLM server did not answer within {START_SECONDS:.0f} s; its words are in {log}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
    server.terminate()
    try:
        server.wait(timeout=15.0)
    except subprocess.TimeoutExpired:
        server.kill()
    for process in family:
        if process.is_running():
            process.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _die_with_parent() -> None:
    """Linux: a killed parent takes the server with it."""
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
