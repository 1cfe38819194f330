"""Checks of what a run talks to or reads: data, model, Ray, W&B, and the APIs of teacher, judge and model under test."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pgenrm_train.config import ROOT, Config
from pgenrm_train.run.folder import StageFolder

SECONDS = 5.0  # of one request: a server that is up answers in less
STARTS_FROM = {"cre": ("psi",), "curriculum": ("cre", "psi"), "evaluate": ("curriculum", "cre", "psi")}
RAY_SECONDS = 60.0
ON_RAY = ("psi", "cre", "curriculum", "prototypes", "evaluate")
OFFLINE = ("1", "true", "yes", "on")


def check_store(config: Config, stage: str) -> Iterator[str]:
    """A run_dir that is a URL can be read and written.  A start finds it out by itself, and then goes on when the store is lost."""
    if config.store is None or not config.preflight.only:
        return
    from pgenrm_train.errors import PGenRMError
    from pgenrm_train.run.store.objects import Store, StoreLost

    try:
        Store(config.store).try_out()
    except (PGenRMError, StoreLost) as error:
        reason = str(error).removeprefix(f"run_dir={config.store} ")
        yield f"run_dir={config.store} cannot be read and written ({reason}); check the bucket, the credentials, the endpoint and fsspec's package for the protocol"


def check_data(config: Config, stage: str) -> Iterator[str]:
    """The raw data, as long as the run has not read them."""
    if StageFolder.read(Path(config.run_dir), "build_data").complete:
        return
    path, answers = config.data.path, config.data.answers
    hub = (
        path is not None and path.count("/") == 1 and not path.startswith((".", "/", "~"))
    )  # it may be an id there
    if path is not None and not hub and not Path(path).exists():
        yield f"{path} does not exist; data.path= must name a file or a folder that this machine can read"
    if answers is not None and not Path(answers).exists():
        yield f"{answers} does not exist; data.answers= must name a file of answers"


def check_model(config: Config, stage: str) -> Iterator[str]:
    """The weights that the first stages start from: a local folder, the hub's cache, or the hub itself."""
    model = config.model
    if stage not in ("build_sec", "psi", "cre", "curriculum", "evaluate") or model.kind not in ("nano", "hf"):
        return
    if model.path is not None:
        if not (Path(model.path) / "config.json").is_file():
            yield f"model.path={model.path} is not a checkpoint: it has no config.json; give a folder in Hugging Face format"
    elif model.kind == "nano" and stage in ("build_sec", "psi"):
        if (
            stage == "psi"
            and config.psi.nano_start
            and not (ROOT / config.psi.nano_start / "config.json").is_file()
        ):
            yield f"psi.nano_start={config.psi.nano_start} is not in the checkout; make it with make fixture, or use pipeline.budget=demo"
    elif config.recipe == stage and (before := STARTS_FROM.get(stage)):
        if not any(StageFolder.read(Path(config.run_dir), name).complete for name in before):
            yield f"there is no complete {' or '.join(before)} under run_dir={config.run_dir}; run recipe={before[-1]} there first or give model.path="
    elif stage in ("build_sec", "psi") and not (Path(model.name) / "config.json").is_file():
        yield from _hub(model.name)


def _hub(name: str) -> Iterator[str]:
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in OFFLINE:
        yield f"{name} is not in the local cache and HF_HUB_OFFLINE is set; download it first, or give model.path="
        return
    import httpx
    from huggingface_hub import constants, get_token

    headers = {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
    try:
        answer = httpx.head(
            f"{constants.ENDPOINT}/{name}/resolve/main/config.json",
            headers=headers,
            timeout=SECONDS,
            follow_redirects=True,
        )
    except httpx.HTTPError as error:
        yield f"{name} is not in the local cache and the Hugging Face hub is not reached ({type(error).__name__}); give model.path="
        return
    if answer.status_code in (401, 403):
        yield f"the hub does not let you read {name}; accept its licence on its page and set HF_TOKEN"
    elif answer.status_code == 404:
        yield f"the hub has no model {name}; check model.name, or give model.path="


def check_ray(config: Config, stage: str) -> Iterator[str]:
    """A running cluster that `ray.address` names answers, and its nodes have what the stage would wait for."""
    address, nodes = config.ray.address, config.cluster.nodes
    if stage not in ON_RAY or address is None or address == "local":
        if stage in ON_RAY and nodes > 1:
            yield (
                f"cluster.nodes={nodes} needs ray.address= of a Ray cluster that runs; start one with ray start --head on the first node and "
                "ray start --address=HOST:PORT on the others"
            )
        return
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=SECONDS).close()
        except OSError as error:
            reason = error.strerror or "no answer"
            yield f"no Ray cluster answers at {address} ({reason}); start one with ray start --head, or leave ray.address unset for a local one"
            return
    elif config.ray.address != "auto":  # which Ray may find by itself
        yield f"ray.address={config.ray.address} is not host:port or auto"
        return
    found = nodes_at(config.ray.address or "")
    if isinstance(found, str):
        yield f"the Ray cluster at {config.ray.address} takes no driver from here ({found}); start it with the versions of the pins, on every node"
    else:
        yield from cluster_problems(config, stage, found)


@functools.cache
def nodes_at(address: str) -> list[dict[str, float]] | str:
    """Resources of each living node, or why they cannot be told; asked in a process of its own, which leaves no driver behind."""
    command = [sys.executable, "-m", "pgenrm_train.backends.ray.cluster", address]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=RAY_SECONDS,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {RAY_SECONDS:.0f} s"
    if done.returncode:
        return next(
            (line.strip()[:200] for line in reversed(done.stderr.splitlines()) if "Error" in line),
            "no reason given",
        )
    return list(json.loads(done.stdout.splitlines()[-1]))


def cluster_problems(config: Config, stage: str, nodes: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """What the placement of workers would wait for without end: too few nodes with enough GPUs, busy ones counted."""
    cluster, gpus = config.cluster, config.cluster.processes_per_node
    if cluster.device == "cpu" and stage not in ("cre", "curriculum"):  # veRL's ranks take logical GPUs there
        return
    able = sum(int(node.get("GPU", 0) // gpus) for node in nodes)
    if able < cluster.nodes:
        yield (
            f"the Ray cluster has room for {able} nodes of {gpus} GPUs and cluster={cluster.name} needs {cluster.nodes}; add nodes with ray start, "
            "or set cluster.nodes= and cluster.processes_per_node="
        )
    if (
        len(
            kinds := {
                name.partition(":")[2]
                for node in nodes
                for name in node
                if name.startswith("accelerator_type:")
            }
        )
        > 1
    ):
        yield f"the GPUs of the Ray cluster differ ({', '.join(sorted(kinds))}) and the slowest would set the pace; start ray on nodes that are alike"


def check_wandb(config: Config, stage: str) -> Iterator[str]:
    """tracking=wandb has a key, in the environment or in ~/.netrc, where `wandb login` puts it, and W&B takes it.

    A W&B that is not reached is no failure: the run starts offline then.
    """
    if config.tracking.kind != "wandb" or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    import httpx

    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
    host = urlsplit(base).hostname or ""
    if not (key := os.environ.get("WANDB_API_KEY") or _in_netrc(host)):
        yield f"tracking=wandb has no key for {host}; run wandb login, set WANDB_API_KEY, or use tracking=offline"
        return
    try:
        asked = httpx.post(
            f"{base}/graphql", json={"query": "{viewer {id}}"}, auth=("api", key), timeout=SECONDS
        )
        refused = asked.status_code in (401, 403) or (
            asked.is_success and not (asked.json().get("data") or {}).get("viewer")
        )
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return
    if refused:
        yield f"W&B at {host} refuses the key; run wandb login --relogin, correct WANDB_API_KEY, or use tracking=offline"


def _in_netrc(host: str) -> str | None:
    import netrc

    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None


def check_teacher(config: Config, stage: str) -> Iterator[str]:
    teacher = config.teacher
    if stage == "build_sec" and teacher.kind == "endpoint":
        yield from answering("teacher", teacher.base_url, teacher.api_key_env)


def check_judge(config: Config, stage: str) -> Iterator[str]:
    judge = config.judge
    if stage in ("cre", "curriculum") and judge.kind == "endpoint" and getattr(config, stage).process_weight:
        yield from answering("judge", judge.base_url, judge.api_key_env)


def check_model_endpoint(config: Config, stage: str) -> Iterator[str]:
    if stage == "evaluate" and config.model.kind == "endpoint":
        yield from answering("model", config.model.base_url, config.model.api_key_env)


def answering(section: str, base_url: str | None, api_key_env: str | None) -> Iterator[str]:
    """GET {base_url}/models: cheap, and no server charges for it.  Any answer but a refusal is a server that is up."""
    import httpx

    key = os.environ.get(api_key_env) if api_key_env else None
    if api_key_env and not key:
        yield f"{section}.api_key_env={api_key_env} is not set; export the variable that holds the key"
        return
    url = f"{(base_url or '').rstrip('/')}/models"
    try:
        status = httpx.get(
            url, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=SECONDS
        ).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield f"the {section} does not answer at {url} ({type(error).__name__}); start the server or correct {section}.base_url"
        return
    if status in (401, 403):
        where = f"the key in {api_key_env}" if api_key_env else "a call without a key"
        yield f"the {section} at {url} refuses {where} (HTTP {status}); set {section}.api_key_env to the variable that holds a valid one"
    elif status >= 500 and status != 501:  # a server need not list its models
        yield f"the {section} at {url} answers HTTP {status}; wait for it or look at the server's log"
