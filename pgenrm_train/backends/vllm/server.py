"""An OpenAI-compatible vLLM server for the time of a block: a teacher or judge that this run serves itself.

On one machine the server is a child of this process.  With `ray.address` it is an actor of that cluster: Ray
finds and reserves the GPUs.
"""

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
from typing import Any, NamedTuple

import httpx

from pgenrm_train.backends.ray.cluster import join
from pgenrm_train.backends.vllm.engine import vllm_variables
from pgenrm_train.config import Config, EndpointConfig
from pgenrm_train.errors import BackendError, last_line
from pgenrm_train.run.process import die_with_parent, stop_child

START_SECONDS = 1800.0  # for a 70B model from a slow disk
PLACE_SECONDS = 120.0  # for Ray to find room
STOP_SECONDS = 15.0


class GpuSplit(NamedTuple):
    """Values of CUDA_VISIBLE_DEVICES."""

    server: str
    others: str


@contextmanager
def served(
    config: Config, settings: EndpointConfig, log: Path, *, with_training: bool
) -> Iterator[EndpointConfig]:
    """Serve `settings.name`, and yield the settings of its endpoint; their kind stays vllm.

    On this machine the server takes the last `settings.gpus` visible GPUs and leaves the others to this
    process and its children.  On a cluster it takes as many of one node.  `with_training`: training runs at
    the same time, so the server must leave its GPUs free.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = _here if config.ray.address is None else _on_cluster
    with start(config, settings, log.resolve(), with_training) as url:
        yield dataclasses.replace(settings, base_url=f"{url}/v1")


@contextmanager
def _here(config: Config, settings: EndpointConfig, log: Path, with_training: bool) -> Iterator[str]:
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    split = _split_gpus(config, settings, with_training)
    variables = vllm_variables(config.cluster.device) | (
        {"CUDA_VISIBLE_DEVICES": split.server} if split else {}
    )
    server = _Server(server_arguments(config, settings), variables, log)
    url = server.start("127.0.0.1")
    try:
        if split:
            os.environ["CUDA_VISIBLE_DEVICES"] = split.others
        _wait(server.exit_code, url, log)
        yield url
    finally:
        server.stop()
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif split:
            del os.environ["CUDA_VISIBLE_DEVICES"]


@contextmanager
def _on_cluster(config: Config, settings: EndpointConfig, log: Path, with_training: bool) -> Iterator[str]:
    import ray

    assert config.ray.address is not None
    joins = not ray.is_initialized()  # the servers of two judges share one connection
    if joins:
        join(config.ray.address, vllm_variables(config.cluster.device))
    try:
        _check_cluster(config, settings, with_training, ray.cluster_resources().get("GPU", 0))
        gpus = settings.gpus if config.cluster.device == "cuda" else 0
        server = ray.remote(num_cpus=1, num_gpus=gpus)(_Server).remote(
            server_arguments(config, settings), vllm_variables(config.cluster.device), log
        )
        try:
            url = str(_result(server.start.remote(), PLACE_SECONDS))
        except ray.exceptions.GetTimeoutError:
            raise BackendError(
                f"the cluster at {config.ray.address} had no {gpus} free GPUs on one node for vLLM "
                f"within {PLACE_SECONDS:.0f} s; lower gpus or cluster.processes_per_node"
            ) from None
        try:
            _wait(lambda: _result(server.exit_code.remote()), url, log)
            yield url
        finally:
            with contextlib.suppress(BackendError):
                _result(server.stop.remote())
    finally:
        if joins:
            ray.shutdown()  # which also ends the actor


def _result(reference: Any, seconds: float | None = None) -> Any:
    """Return the result of a call of the actor.  Raises BackendError if the actor is lost."""
    import ray

    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        raise
    except ray.exceptions.RayError as error:
        raise BackendError(f"the vLLM server on the cluster was lost ({last_line(error)})") from error


class _Server:
    """The server as a child of the process that creates this object."""

    def __init__(self, arguments: list[str], variables: dict[str, str], log: Path) -> None:
        self.arguments, self.variables, self.log = arguments, variables, log

    def start(self, host: str | None = None) -> str:
        """Start the server and return its URL; `host` is by default the network address of this machine."""
        if host is None:
            import ray

            host = str(ray.util.get_node_ip_address())
        with socket.socket() as free:
            free.bind((host, 0))
            port = free.getsockname()[1]
        module = "vllm.entrypoints.openai.api_server"
        command = [sys.executable, "-m", module, "--host", host, "--port", str(port), *self.arguments]
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                command,
                env=os.environ | self.variables,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, signal.SIGTERM),
            )
        return f"http://{host}:{port}"

    def exit_code(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        stop_child(self.process, STOP_SECONDS)


def server_arguments(config: Config, settings: EndpointConfig) -> list[str]:
    """Command line of the server, without host and port."""
    common = ["--model", settings.name or "", "--max-num-seqs", str(settings.max_in_flight)]
    if config.cluster.device == "cpu":
        batches = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]
        return [*common, "--dtype", "float32", "--enforce-eager", *batches]
    return [*common, "--tensor-parallel-size", str(settings.gpus)]


def _split_gpus(config: Config, settings: EndpointConfig, with_training: bool) -> GpuSplit | None:
    """Divide the visible GPUs between the server and all other processes; None on a CPU."""
    if config.cluster.device == "cpu":
        return None
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = visible.split(",")
    training = config.cluster.processes_per_node if with_training else 0
    if len(gpus) < settings.gpus + training:
        raise _too_few_gpus(settings.gpus, training, f"{len(gpus)} are visible")
    return GpuSplit(",".join(gpus[-settings.gpus :]), ",".join(gpus[: -settings.gpus]))


def _check_cluster(config: Config, settings: EndpointConfig, with_training: bool, gpus: float) -> None:
    if config.cluster.device == "cpu":
        return
    training = config.cluster.ranks if with_training else 0
    if gpus < settings.gpus + training:
        raise _too_few_gpus(settings.gpus, training, f"the cluster at {config.ray.address} has {gpus:g}")


def _too_few_gpus(server: int, training: int, available: str) -> BackendError:
    needs = f"{server} GPUs" + (f" and training {training}" if training else "")
    return BackendError(
        f"the vLLM server needs {needs}, and {available}; lower cluster.processes_per_node or gpus, "
        "or use kind=endpoint and serve the model elsewhere"
    )


def _wait(exit_code: Callable[[], int | None], url: str, log: Path) -> None:
    """Wait until the server answers.  Raises BackendError if it ends or takes too long."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if (code := exit_code()) is not None:
            raise BackendError(f"the vLLM server exited with code {code} before it answered; see {log}")
        try:
            # This run's own server, also on another node: no proxy reaches it.
            if httpx.get(f"{url}/health", timeout=2.0, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise BackendError(f"the vLLM server did not answer within {START_SECONDS:.0f} s; see {log}")
