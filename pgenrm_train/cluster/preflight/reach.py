"""Checks of a run's sources and services: data, model, Ray, W&B, and the APIs of teacher, judge and model."""

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pgenrm_train.config import (
    CHOOSING,
    GRPO_STAGES,
    ROOT,
    TRAINED,
    ApiConfig,
    Config,
    StageName,
    gpus_per_node,
)
from pgenrm_train.errors import ConfigError
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.http import client, key_of, lost_connection, proxy_for, service
from pgenrm_train.run.process import child_environment

SECONDS = 5.0  # per request: a server that is up answers in less
RAY_SECONDS = 60.0
ASKING = (StageName.EVALUATE, *CHOOSING)  # a finished model answers their questions
ON_RAY = (*TRAINED, StageName.PROTOTYPES, *ASKING)
OFFLINE = ("1", "true", "yes", "on")


class ChildFailed(Exception):
    """A child process failed; the text is the reason."""


def run_module(module: str, *arguments: str, seconds: float, variables: dict[str, str] | None = None) -> str:
    """Run `python -m module` in a child, which keeps drivers, CUDA and torch out of this process.

    Returns its output.  Raises ChildFailed, or subprocess.TimeoutExpired.
    """
    child = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=child_environment() | (variables or {}),
    )
    if child.returncode:
        lines = reversed(child.stderr.splitlines())
        raise ChildFailed(next((line.strip()[:200] for line in lines if "Error" in line), "no reason given"))
    return child.stdout


def check_store(config: Config, stage: str) -> Iterator[str]:
    """Access to a run_dir that is a URL, only with preflight.only=true, because a start tries it anyway."""
    if config.store is None or not config.preflight.only:
        return
    from pgenrm_train.errors import PGenRMError
    from pgenrm_train.run.store.objects import Store, StoreLost

    try:
        Store(config.store).try_out()
    except (PGenRMError, StoreLost) as error:
        reason = str(error).removeprefix(f"run_dir={config.store} ")
        yield (
            f"run_dir={config.store} cannot be read and written ({reason}); check the bucket, the "
            "credentials, "
            "the endpoint and fsspec's package for the protocol"
        )


def check_data(config: Config, stage: str) -> Iterator[str]:
    """Raw data, unless the run has already read them, and published personas."""
    personas = config.eval.personas
    if stage == StageName.EVALUATE and personas is not None and not Path(personas).is_dir():
        yield f"{personas} does not exist; eval.personas= must name a folder of SynthesizeMe's personas"
    if StageFolder.read(Path(config.run_dir), StageName.BUILD_DATA).complete:
        return
    path, answers = config.data.path, config.data.answers
    hub_id = path is not None and path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if path is not None and not hub_id and not Path(path).exists():
        yield f"{path} does not exist; data.path= must name a file or a folder that this machine can read"
    if answers is not None and not Path(answers).exists():
        yield f"{answers} does not exist; data.answers= must name a file of answers"


def check_model(config: Config, stage: str) -> Iterator[str]:
    """Weights that a stage starts from: a local folder, the hub's cache, or the hub itself."""
    model, starts = config.model, stage in (StageName.BUILD_SEC, StageName.PSI)
    if model.kind not in ("nano", "hf") or not (starts or stage in (*TRAINED, *ASKING)):
        return
    if model.path is not None:
        if not _is_checkpoint(model.path):
            yield (
                f"model.path={model.path} is not a checkpoint: it has no config.json; "
                "give a folder in Hugging Face format"
            )
    elif starts and model.kind == "hf":
        if not _is_checkpoint(model.name):
            yield from _hub(model.name)
    elif starts:
        start = config.psi.nano_start
        if stage == StageName.PSI and start and not _is_checkpoint(ROOT / start):
            yield (
                f"psi.nano_start={start} is not in the checkout; "
                "make it with make fixture, or use pipeline.budget=demo"
            )
    elif config.recipe == stage:
        before = StageName(stage).starts_from
        if not any(StageFolder.read(Path(config.run_dir), name).complete for name in before):
            yield (
                f"there is no complete {' or '.join(before)} under run_dir={config.run_dir}; "
                f"run recipe={before[-1]} there first or give model.path="
            )


def _is_checkpoint(folder: str | Path) -> bool:
    return (Path(folder) / "config.json").is_file()


def _hub(name: str) -> Iterator[str]:
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in OFFLINE:
        yield (
            f"{name} is not in the local cache and HF_HUB_OFFLINE is set; download it first, or give "
            "model.path="
        )
        return
    import httpx
    from huggingface_hub import constants, get_token

    url = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
    headers = {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
    try:
        with client(url, headers=headers, timeout=SECONDS, follow_redirects=True) as connection:
            answer = connection.head(url)
    except ConfigError as error:
        yield f"{name} is not in the local cache, and the Hugging Face hub cannot be called: {error}"
        return
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield (
            f"{name} is not in the local cache and the Hugging Face hub is not reached "
            f"({type(error).__name__}); "
            "give model.path="
        )
        return
    if answer.status_code in (401, 403):
        yield f"the hub does not let you read {name}; accept its licence on its page and set HF_TOKEN"
    elif answer.status_code == 404:
        yield f"the hub has no model {name}; check model.name, or give model.path="


def check_ray(config: Config, stage: str) -> Iterator[str]:
    """The cluster at `ray.address` answers, and its nodes have the resources that the stage needs."""
    address, nodes = config.ray.address, config.cluster.nodes
    if stage not in ON_RAY or address is None or address == "local":
        if stage in ON_RAY and nodes > 1:
            yield (
                f"cluster.nodes={nodes} needs ray.address= of a Ray cluster that runs; start one with "
                "ray start --head on the first node and ray start --address=HOST:PORT on the others"
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
            yield (
                f"no Ray cluster answers at {address} ({reason}); "
                "start one with ray start --head, or leave ray.address unset for a local one"
            )
            return
    elif config.ray.address != "auto":  # Ray may find that cluster by itself
        yield f"ray.address={config.ray.address} is not host:port or auto"
        return
    try:
        yield from cluster_problems(config, stage, nodes_at(config.ray.address or ""))
    except ChildFailed as reason:
        yield (
            f"the Ray cluster at {config.ray.address} accepts no driver from this machine ({reason}); "
            "start it with the versions of the pins, on every node"
        )


@functools.cache
def nodes_at(address: str) -> list[dict[str, float]]:
    """Resources of each living node.  Raises ChildFailed if no driver can connect."""
    try:
        output = run_module("pgenrm_train.backends.ray.cluster", address, seconds=RAY_SECONDS)
    except subprocess.TimeoutExpired:
        raise ChildFailed(f"no answer in {RAY_SECONDS:.0f} s") from None
    return list(json.loads(output.splitlines()[-1]))


def cluster_problems(config: Config, stage: str, nodes: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Reasons why the placement of workers would wait without end; busy GPUs count as present."""
    cluster, gpus = config.cluster, config.cluster.processes_per_node
    if cluster.device == "cpu" and stage not in GRPO_STAGES:  # only veRL's ranks take logical GPUs on a CPU
        return
    able = sum(int(node.get("GPU", 0) // gpus) for node in nodes)
    if able < cluster.nodes:
        yield (
            f"the Ray cluster has room for {able} nodes of {gpus} GPUs and cluster={cluster.name} needs "
            f"{cluster.nodes}; add nodes with ray start, or set cluster.nodes= and "
            "cluster.processes_per_node="
        )
    total = sum(int(node.get("GPU", 0)) for node in nodes)
    needed = cluster.ranks + gpus_per_node(config, stage) - gpus
    if able >= cluster.nodes and total < needed:
        yield (
            f"the Ray cluster has {total} GPUs, and {stage} needs {needed} with those of served judges; "
            "add a node with ray start, or set cluster.processes_per_node="
        )
    label = "accelerator_type:"
    kinds = {name.removeprefix(label) for node in nodes for name in node if name.startswith(label)}
    if len(kinds) > 1:
        yield (
            f"the GPUs of the Ray cluster differ ({', '.join(sorted(kinds))}) and the slowest would set the "
            "pace; "
            "start Ray on nodes with equal GPUs"
        )


def check_wandb(config: Config, stage: str) -> Iterator[str]:
    """A key for tracking=wandb in the environment or in ~/.netrc (by `wandb login`), and accepted by W&B.

    A W&B that is not reached is no failure: the run then starts offline.
    """
    if config.tracking.kind != "wandb" or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    import httpx

    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
    host = urlsplit(base).hostname or ""
    if not (key := os.environ.get("WANDB_API_KEY") or _in_netrc(host)):
        yield (
            f"tracking=wandb has no key for {host}; run wandb login, set WANDB_API_KEY, or use "
            "tracking=offline"
        )
        return
    try:
        query = {"query": "{viewer {id}}"}
        with client(base, auth=("api", key), timeout=SECONDS) as connection:
            answer = connection.post(f"{base}/graphql", json=query)
        unknown = answer.is_success and not (answer.json().get("data") or {}).get("viewer")
    except ConfigError as error:
        yield f"W&B at {host} cannot be called: {error}; or use tracking=offline"
        return
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return
    if unknown or answer.status_code in (401, 403):
        yield (
            f"W&B at {host} refuses the key; "
            "run wandb login --relogin, correct WANDB_API_KEY, or use tracking=offline"
        )


def _in_netrc(host: str) -> str | None:
    import netrc

    try:
        entry = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] if entry else None


def check_teacher(config: Config, stage: str) -> Iterator[str]:
    if stage == StageName.BUILD_SEC and config.teacher.kind == "endpoint":
        yield from endpoint_problems("teacher", config.teacher)


def check_judge(config: Config, stage: str) -> Iterator[str]:
    judged = stage in GRPO_STAGES and getattr(config, stage).process_weight
    if judged and config.judge.kind == "endpoint":
        yield from endpoint_problems("judge", config.judge)
    if stage in GRPO_STAGES and config.judge_gold.kind == "endpoint":
        yield from endpoint_problems("judge_gold", config.judge_gold)


def check_model_endpoint(config: Config, stage: str) -> Iterator[str]:
    if stage in ASKING and config.model.kind == "endpoint":
        yield from endpoint_problems("model", config.model)


def endpoint_problems(section: str, settings: ApiConfig) -> Iterator[str]:
    """GET {base_url}/models, which is cheap and free.  Any answer but a refusal is proof of a server."""
    import httpx

    api_key_env, url = settings.api_key_env, service(settings.base_url or "", "/models")
    if api_key_env and not os.environ.get(api_key_env):
        yield f"{section}.api_key_env={api_key_env} is not set; export the variable that holds the key"
        return
    try:
        headers = {"Authorization": f"Bearer {key_of(api_key_env)}"} if api_key_env else {}
        with client(url, timeout=SECONDS, headers=headers) as connection:
            status = connection.get(url).status_code
    except ConfigError as error:
        yield f"the {section} cannot be called: {error}"
        return
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        kind, words, _ = lost_connection(error, proxy_for(url))
        remedy = "" if kind == "tls" else f"; start the server or correct {section}.base_url"
        yield f"the {section} does not answer at {url} ({words}){remedy}"
        return
    if status in (401, 403):
        where = f"the key in {api_key_env}" if api_key_env else "a call without a key"
        yield (
            f"the {section} at {url} refuses {where} (HTTP {status}); "
            f"set {section}.api_key_env to the variable that holds a valid one"
        )
    elif status >= 500 and status != 501:  # a server need not list its models
        yield f"the {section} at {url} answers HTTP {status}; wait for it or look at the server's log"
