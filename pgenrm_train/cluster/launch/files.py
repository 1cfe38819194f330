"""Files that start a run on a cluster, from the typed configuration: a SLURM script and a KubeRay RayJob.

Both run the driver on the head node with `ray.address=auto`.  From there the checkout travels to every worker
as the `working_dir` of Ray's runtime environment (`backends.grpo.session`).  Keys are named, never written:
SLURM exports the submitter's environment, Kubernetes reads a secret.  User input passes through `shlex.quote`
or YAML's own writer, so that no value can become a command.
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from pgenrm_train.cluster.planning.needs import host_gib
from pgenrm_train.config import CONFIG_DIR, STAGES, Config, StageName, load, machines, to_dict
from pgenrm_train.config.schema import NODE_GPUS
from pgenrm_train.config.stage_names import PLANNED
from pgenrm_train.errors import ConfigError

HERE = Path(__file__).parent
RAY_PORT = 6379
CHECKOUT = "/opt/pgenrm-train"  # in the image of the Dockerfile
USER = 10001  # of the image
MEMORY_LIMIT = 1.5  # over the planned memory: files in /dev/shm count, and a pod above its limit is killed
RUNS = "/runs"  # where the volume claim is mounted
BARE = re.compile(r"[A-Za-z_/.][\w/.:-]*", re.ASCII)  # no quotes needed in Hydra's grammar
LEFT_OUT = ("recipe", "plan", "ray")  # sections for the planner, not for the run


def slurm(config: Config, hours: float | None = None) -> str:
    """A batch script: Ray on every node, the recipe on the first.

    Its time limit is 1.5 times the planned hours, at most four days.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["quote"] = shlex.quote
    limit = min(96, max(1, math.ceil(1.5 * (hours or 16.0))))
    cuda, needed = config.cluster.device == "cuda", machines(config, *_stages(config))
    return templates.get_template("slurm.sh.j2").render(
        name=job_name(config),
        nodes=needed.nodes,
        gpus=needed.gpus,
        cuda=cuda,
        limit=f"{limit}:00:00",
        directives=[_one_line("plan.sbatch", text) for text in config.plan.sbatch],
        secrets=required_secrets(config),
        port=RAY_PORT,
        command=shlex.join(command(config, ray=needed.nodes > 1)),
    )


def rayjob(config: Config, hours: float | None = None) -> str:
    """A KubeRay RayJob (ray.io/v1).

    HTTPMode: only one shell reads the entrypoint, so one level of quotes suffices.
    """
    import yaml

    from pgenrm_train.cluster.preflight.machine import pinned

    for key, path in (("data.path", config.data.path), ("model.path", config.model.path)):
        if path is not None and not Path(path).is_absolute():
            raise ConfigError(
                f"{key}={path} is a path of this machine; "
                f"for plan.emit=rayjob give one below {RUNS}, where the volume is mounted"
            )
    key, path = ("mirror", config.mirror) if config.store else ("run_dir", config.run_dir)
    place = path if Path(path).is_absolute() else f"{RUNS}/{Path(path).name}"
    entry = [part for part in command(config, ray=True) if not part.startswith(f"{key}=")]
    start = f"cd {CHECKOUT} && exec {shlex.join([*entry, f'{key}={hydra_value(place)}'])}"
    cluster: dict[str, object] = {
        "rayVersion": pinned("ray", config),
        "headGroupSpec": _group(config, head=True),
    }
    if workers := machines(config, *_stages(config)).nodes - 1:
        sizes = {"replicas": workers, "minReplicas": workers, "maxReplicas": workers}
        cluster["workerGroupSpecs"] = [{"groupName": "workers", **sizes, **_group(config, head=False)}]
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job_name(config)},
        "spec": {
            "submissionMode": "HTTPMode",
            "entrypoint": start,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": cluster,
        },
    }
    return str(yaml.safe_dump(job, sort_keys=False, allow_unicode=True, width=120))


def _stages(config: Config) -> tuple[StageName, ...]:
    """Stages that the command runs: recipe=psi serves the teacher of build_sec, too."""
    from pgenrm_train.cluster.preflight.checks import stages_of

    return STAGES if config.plan.stage == "all" else tuple(map(StageName, stages_of(config.plan.stage)))


def idle_warning(config: Config) -> str | None:
    """A sentence if a SLURM job, which takes full nodes, uses less than half of their usual GPUs."""
    gpus = machines(config, *_stages(config)).gpus
    if config.cluster.device == "cpu" or 2 * gpus >= NODE_GPUS:
        return None
    return (
        f"the script takes full nodes (--exclusive, --mem=0) and uses {gpus} of the GPUs of each; "
        f"where nodes have {NODE_GPUS}, the nearest better setting is cluster.processes_per_node={NODE_GPUS}"
    )


def _group(config: Config, head: bool) -> dict[str, object]:
    """Head or worker: one pod per node with all of its GPUs."""
    stages, cuda = _stages(config), config.cluster.device == "cuda"
    gpus = machines(config, *stages).gpus
    memory = max(host_gib(config, stage) for stage in stages if stage in PLANNED)
    devices = {"nvidia.com/gpu": gpus} if cuda else {}
    requests, limits = (
        {"memory": f"{math.ceil(factor * memory)}Gi"} | devices for factor in (1.0, MEMORY_LIMIT)
    )
    optional = dict.fromkeys(required_secrets(config), False)
    if config.model.kind == "hf":
        optional.setdefault("HF_TOKEN", True)
    container = {
        "name": "ray-head" if head else "ray-worker",
        "image": config.plan.image,
        "env": [
            {"name": "HF_HOME", "value": f"{RUNS}/huggingface"},
            *(_from_secret(config, name, is_optional) for name, is_optional in optional.items()),
        ],
        "resources": {"requests": requests, "limits": limits},
        "volumeMounts": [{"name": "runs", "mountPath": RUNS}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    volumes = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": config.plan.volume_claim}},
        # NCCL and Ray need more than the default 64 MiB of a container.
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    # On CPUs these are logical, as in a local Ray.
    start = {"num-gpus": str(gpus)} | ({} if cuda else {"num-cpus": str(8 + 4 * gpus)})
    # The volume's files belong to the group of the image's user.
    user = {"runAsNonRoot": True, "fsGroup": USER}
    pod = {"securityContext": user, "containers": [container], "volumes": volumes}
    return {"rayStartParams": start, "template": {"spec": pod}}


def _from_secret(config: Config, name: str, optional: bool) -> dict[str, object]:
    reference = {"name": config.plan.secret, "key": name, "optional": optional}
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def required_secrets(config: Config) -> list[str]:
    """Names of variables with keys that this run needs.  Raises ConfigError for an impossible name."""
    roles = (config.teacher, config.judge, config.judge_gold, config.model)
    names = [role.api_key_env for role in roles]
    names += ["WANDB_API_KEY"] if config.tracking.kind == "wandb" else []
    wrong = next((name for name in names if name and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)), None)
    if wrong:
        raise ConfigError(f"api_key_env={wrong!r} is not the name of an environment variable")
    return sorted({name for name in names if name})


def job_name(config: Config) -> str:
    """Name after the run folder, in letters that SLURM and Kubernetes (RFC 1123, KubeRay: ≤ 47) allow."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(config.run_dir).name.lower()).strip("-")[:38].strip("-")
    return f"pgenrm-{name or 'run'}"


# ---- the command line ----


def command(config: Config, ray: bool) -> list[str]:
    """The `python -m pgenrm_train …` that composes this configuration again."""
    return ["python", "-m", "pgenrm_train", *overrides_of(config), *(["ray.address=auto"] if ray else [])]


def overrides_of(config: Config) -> list[str]:
    """The recipe, the groups, and every key in which the configuration differs from their composition."""
    recipe = "pipeline" if config.plan.stage == "all" else config.plan.stage
    groups = {
        "recipe": recipe,
        "data": config.data.name,
        "model": _choice(
            "model", config.model.label, {"hf": "llama31_8b"}.get(config.model.kind, config.model.kind)
        ),
        "cluster": _choice("cluster", config.cluster.name, "cpu"),
        "teacher": config.teacher.kind,
        "judge": config.judge.kind,
        "judge_gold": config.judge_gold.kind,
        "tracking": config.tracking.kind,
    }
    chosen = [f"{group}={name}" for group, name in groups.items()]
    # Unchecked, because the differences may hold keys that a group requires (data.path, judge.name, …).
    base = to_dict(load(*chosen, checked=False))
    wanted = to_dict(config) | {"run_dir": config.store or config.run_dir, "store": None}
    wanted["preflight"] = to_dict(config.preflight) | {"only": False}
    return chosen + list(_differences(wanted, base, LEFT_OUT))


def _choice(group: str, name: str, otherwise: str) -> str:
    return name if (CONFIG_DIR / group / f"{name}.yaml").exists() else otherwise


def _differences(
    wanted: Mapping[str, object], base: Mapping[str, object], skip: tuple[str, ...] = (), prefix: str = ""
) -> Iterator[str]:
    for key, value in wanted.items():
        if key in skip:
            continue
        if isinstance(value, Mapping):
            section = base.get(key)
            yield from _differences(
                value, section if isinstance(section, Mapping) else {}, (), f"{prefix}{key}."
            )
        elif key not in base:
            yield f"+{prefix}{key}={hydra_value(value)}"
        elif value != base[key]:
            yield f"{prefix}{key}={hydra_value(value)}"


def hydra_value(value: object) -> str:
    """A value in the grammar of Hydra's overrides: special texts are quoted, and `${` is escaped."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(hydra_value(item) for item in value) + "]"
    if not isinstance(value, str):
        return str(value)
    _one_line("the configuration", value)
    if BARE.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)  # OmegaConf's escape of an interpolation
    text = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + (r"\'" if m[2] else ""), text)
    return f"'{text}'"


def _one_line(key: str, text: str) -> str:
    if any(ord(letter) < 32 for letter in text):
        raise ConfigError(
            f"{key} holds a line break or control character ({text!r}), which a launch file cannot carry; "
            "remove it"
        )
    return text
