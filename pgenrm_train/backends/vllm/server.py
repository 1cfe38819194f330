"""An OpenAI-compatible vLLM server for as long as a block runs: a teacher or judge of one's own.

On one machine it is a child of this process.  With `ray.address` it is an actor of that cluster: Ray finds the GPUs, counts them, and
so gives nobody else the same ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from pgenrm_train.config import Config, EndpointConfig
from pgenrm_train.errors import BackendError
from pgenrm_train.run.process import die_with_parent

START_SECONDS = 1800.0  # a 70B model is read from a slow disk
PLACE_SECONDS = 120.0  # for Ray to find room


@contextmanager
def served(
    config: Config, settings: EndpointConfig, log: Path, *, beside_training: bool
) -> Iterator[EndpointConfig]:
    """Serve `settings.name`; yields the settings of the endpoint that it is.

    Here, the server takes the last `settings.gpus` visible GPUs and leaves the others to this process and its children.  On a cluster it
    takes as many of one node.  A judge must leave what training needs, since that runs beside it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = _here if config.ray.address is None else _on_cluster
    with start(config, settings, log.resolve(), beside_training) as url:
        yield dataclasses.replace(settings, kind="endpoint", base_url=f"{url}/v1")


@contextmanager
def _here(config: Config, settings: EndpointConfig, log: Path, beside_training: bool) -> Iterator[str]:
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine, left = _split_gpus(config, settings, beside_training)
    env = _environment(config) | ({"CUDA_VISIBLE_DEVICES": mine} if mine else {})
    server = _Server(_arguments(config, settings), env, log)
    url = server.start("127.0.0.1")
    try:
        if left is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = left
        _wait(server.ended, url, log)
        yield url
    finally:
        server.stop()
        if left is not None:
            os.environ.pop("CUDA_VISIBLE_DEVICES") if ours is None else os.environ.update(
                CUDA_VISIBLE_DEVICES=ours
            )


@contextmanager
def _on_cluster(config: Config, settings: EndpointConfig, log: Path, beside_training: bool) -> Iterator[str]:
    import ray

    from pgenrm_train.backends.ray.cluster import join

    assert config.ray.address is not None
    join(config.ray.address, _environment(config))
    try:
        _check_cluster(config, settings, beside_training, ray.cluster_resources().get("GPU", 0))
        gpus = settings.gpus if config.cluster.device == "cuda" else 0
        server = ray.remote(num_cpus=1, num_gpus=gpus)(_Server).remote(
            _arguments(config, settings), _environment(config), log
        )
        url = _placed(config, server, gpus)
        try:
            _wait(lambda: _of_actor(server.ended.remote()), url, log)
            yield url
        finally:
            with contextlib.suppress(BackendError):
                _of_actor(server.stop.remote())
    finally:
        ray.shutdown()  # and what is left of the actor goes with its driver


def _placed(config: Config, server: Any, gpus: int) -> str:
    """Where the actor will answer, once Ray has found room for it."""
    import ray

    try:
        return str(_of_actor(server.start.remote(), PLACE_SECONDS))
    except ray.exceptions.GetTimeoutError:
        raise BackendError(
            f"the cluster at {config.ray.address} had no {gpus} free GPUs on one node for the vLLM server within "
            f"{PLACE_SECONDS:.0f} s; lower gpus or cluster.processes_per_node"
        ) from None


def _of_actor(found: Any, seconds: float | None = None) -> Any:
    """What a call of the actor returned.  Raises BackendError when the actor is lost."""
    import ray

    try:
        return ray.get(found, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        raise
    except ray.exceptions.RayError as error:
        raise BackendError(
            f"the vLLM server on the cluster was lost ({str(error).strip().splitlines()[-1].strip()})"
        ) from error


class _Server:
    """The server as a child of the process that it is made in."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.arguments, self.environment, self.log = arguments, environment, log

    def start(self, host: str | None = None) -> str:
        """Where it will answer; on the network address of its machine when `host` is None."""
        if host is None:
            import ray

            host = str(ray.util.get_node_ip_address())
        port = _free_port(host)
        module = "vllm.entrypoints.openai.api_server"
        command = [sys.executable, "-m", module, "--host", host, "--port", str(port), *self.arguments]
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                command,
                env=os.environ | self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, signal.SIGTERM),
            )
        return f"http://{host}:{port}"

    def ended(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.poll()

    def stop(self) -> None:
        _stop(self.process)


def _arguments(config: Config, settings: EndpointConfig) -> list[str]:
    common = ["--model", settings.name or "", "--max-num-seqs", str(settings.max_in_flight)]
    if config.cluster.device == "cpu":
        batches = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]
        return [*common, "--dtype", "float32", "--enforce-eager", *batches]
    return [*common, "--tensor-parallel-size", str(settings.gpus)]


def _environment(config: Config) -> dict[str, str]:
    from pgenrm_train.backends.vllm.engine import vllm_variables

    return vllm_variables(config)


def _split_gpus(
    config: Config, settings: EndpointConfig, beside_training: bool
) -> tuple[str | None, str | None]:
    """CUDA_VISIBLE_DEVICES of the server and of everyone else; None on a CPU."""
    if config.cluster.device == "cpu":
        return None, None
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = visible.split(",")
    training = config.cluster.processes_per_node if beside_training else 0
    if len(gpus) < settings.gpus + training:
        needs = f"{settings.gpus} GPUs" + (f" and training {training}" if training else "")
        raise BackendError(
            f"the vLLM server needs {needs}, and {len(gpus)} are visible; lower cluster.processes_per_node or gpus, or use kind=endpoint "
            "and serve the model elsewhere"
        )
    return ",".join(gpus[-settings.gpus :]), ",".join(gpus[: -settings.gpus])


def _check_cluster(config: Config, settings: EndpointConfig, beside_training: bool, gpus: float) -> None:
    """Raises BackendError when the cluster could never hold the server and what runs beside it."""
    if config.cluster.device == "cpu":
        return
    training = config.cluster.nodes * config.cluster.processes_per_node if beside_training else 0
    if gpus < settings.gpus + training:
        beside = f" and training {training}" if training else ""
        raise BackendError(
            f"the vLLM server needs {settings.gpus} GPUs{beside}, and the cluster at {config.ray.address} has {gpus:g}; lower "
            "cluster.processes_per_node or gpus, or use kind=endpoint and serve the model elsewhere"
        )


def _wait(ended: Callable[[], int | None], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if (code := ended()) is not None:
            raise BackendError(
                f"the vLLM server ended with code {code} before it answered; its words are in {log}"
            )
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


def _free_port(host: str) -> int:
    with socket.socket() as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])
