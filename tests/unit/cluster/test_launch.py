"""Launch files compose the same configuration, pass shellcheck, run under a fake srun, and hold no key."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pgenrm_train.cluster.launch import files as launch
from pgenrm_train.cluster.planning.needs import host_gib
from pgenrm_train.config import ROOT, Config, StageName, gpus_per_node, load, parse, to_dict
from pgenrm_train.errors import ConfigError

SHELLCHECK = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
HOSTILE = [
    "runs/a b",
    "runs/$(touch pwned)",
    "runs/`touch pwned`",
    "runs/it's; touch pwned",
    'runs/"x" && touch pwned',
    "runs/\\'a\\",
    "runs/a,b=[c]{d}",
    "null",
    "-x",
    "runs/#no comment",
    "5",
    "runs/é %s",
]


def composed(*overrides: str) -> Config:
    return load("recipe=plan", *overrides)


def big(*more: str) -> Config:
    return composed("model=llama31_70b_lora", "cluster=multi_node", "data=chatbot_arena", *more)


def with_run_dir(config: Config, run_dir: str) -> Config:
    config.run_dir = run_dir
    return config


def same(config: Config, arguments: list[str]) -> bool:
    """True if the command line composes this configuration, apart from the planner's sections."""
    again = to_dict(load(*(a for a in arguments if a != "ray.address=auto")))
    return {k: v for k, v in again.items() if k not in launch.LEFT_OUT} == {
        k: v for k, v in to_dict(config).items() if k not in launch.LEFT_OUT
    }


# ---- the command line ----


def test_a_run_at_a_url_is_one_on_the_cluster_too() -> None:
    config = big("plan.stage=cre", "run_dir=s3://bucket/runs/arena", "mirror=/shared/m")
    arguments = launch.overrides_of(config)
    assert "run_dir='s3://bucket/runs/arena'" in arguments or "run_dir=s3://bucket/runs/arena" in arguments
    assert same(config, arguments) and not [a for a in arguments if a.startswith("store=")]
    pod = yaml.safe_load(launch.rayjob(big("plan.stage=cre", "run_dir=s3://bucket/runs/arena")))["spec"][
        "entrypoint"
    ]
    assert "run_dir=s3://bucket/runs/arena" in pod and pod.endswith(" mirror=/runs/mirror")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "model=llama31_8b",
            "cluster=gpu8",
            "data=chatbot_arena",
            "plan.stage=cre",
            "cre.group_size=16",
            "eval.ind=[1,4]",
        ],
        [
            "data=pairs",
            "data.path=votes of mine.parquet",
            "+data.only.shared_context='True'",
            "tracking=wandb",
            "seed=7",
        ],
        [
            "data=chatbot_arena",
            "judge=endpoint",
            "judge.base_url=http://h:1/v1",
            "judge.name=m",
            "judge.api_key_env=KEY",
        ],
        [
            "model=qwen3_8b",
            "model.label=mine",
            "model.path=/m",
            "psi.gradient_checkpointing=false",
            "cluster.name=ours",
        ],
    ],
)
def test_the_command_composes_the_same_configuration(overrides: list[str]) -> None:
    config = composed(*overrides)
    arguments = launch.overrides_of(config)
    assert same(config, arguments)
    assert arguments[0] == f"recipe={'pipeline' if config.plan.stage == 'all' else config.plan.stage}"
    assert not any(argument.startswith("plan.") for argument in arguments)


def test_checks_that_are_skipped_are_skipped_by_the_job_too() -> None:
    arguments = launch.overrides_of(composed("preflight.skip=[compilers,fit]", "preflight.only=true"))
    assert "preflight.skip=[compilers,fit]" in arguments and "preflight.only" not in " ".join(arguments)


@given(st.text(st.characters(min_codepoint=32, blacklist_categories=("Cs", "Cc")), min_size=1, max_size=20))
@settings(max_examples=100)
def test_any_text_survives_hydra(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides([f"run_dir={launch.hydra_value(text)}"])
    assert OmegaConf.to_container(OmegaConf.create({"run_dir": override.value()}), resolve=True) == {
        "run_dir": text
    }


@pytest.mark.parametrize("value", [None, True, False, 3, 0.5, 1e-06, [], [1, "a b", None], ["x", "it's"]])
def test_plain_values_survive_hydra(value: Any) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides([f"key={launch.hydra_value(value)}"])
    assert OmegaConf.to_container(OmegaConf.create({"key": override.value()}))["key"] == value


def test_a_line_break_is_refused() -> None:
    with pytest.raises(ConfigError, match="a line break or control character"):
        launch.slurm(with_run_dir(big(), "runs/a\nsudo rm"))
    with pytest.raises(ConfigError, match=r"plan\.sbatch holds a line break"):
        launch.slurm(big("plan.sbatch=['--x\n#SBATCH --y']"))


# ---- SLURM ----


def shellcheck(script: str) -> str:
    return subprocess.run([SHELLCHECK, "-"], input=script, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=llama31_70b_lora", "cluster=multi_node"],
        ["model=llama31_8b", "cluster=gpu8", "tracking=wandb"],
        ["cluster.nodes=2"],
    ],
)
def test_scripts_pass_shellcheck(overrides: list[str]) -> None:
    script = launch.slurm(composed(*overrides), hours=3.2)
    assert shellcheck(script) == ""
    assert "#SBATCH --time=5:00:00" in script
    assert ("--gpus-per-node=8" in script) == ("cluster.nodes=2" not in overrides)
    assert "#SBATCH --mem=0\n" in script and "--cpu-bind=none" in script
    assert "#SBATCH --open-mode=append\n" in script, "a requeued job keeps its log"


def test_a_served_judge_has_gpus_of_its_own() -> None:
    overrides = [
        "model=llama31_8b",
        "cluster=gpu8",
        "cluster.processes_per_node=7",
        "judge=vllm",
        "judge.name=Qwen/Qwen3-8B",
        "judge.gpus=1",
    ]
    gpus = {}
    for stage in ("psi", "cre", "curriculum"):
        config = composed(*overrides, f"plan.stage={stage}")
        (gpus[stage],) = re.findall(r"--gpus-per-node=(\d+)", launch.slurm(config))
        assert f"nvidia.com/gpu: {gpus[stage]}\n" in launch.rayjob(config)
    assert gpus == {"psi": "7", "cre": "8", "curriculum": "7"}


def test_a_script_of_psi_has_the_gpus_of_its_teacher() -> None:
    teacher = ("teacher=vllm", "teacher.name=Qwen/Qwen3-8B", "teacher.gpus=4")
    one = ("model=llama31_8b", "cluster=gpu1", "plan.stage=psi", "data=chatbot_arena")
    config = composed(*one, *teacher)
    assert "#SBATCH --gpus-per-node=4\n" in launch.slurm(config)
    assert "nvidia.com/gpu: 4\n" in launch.rayjob(config)
    assert "#SBATCH --gpus-per-node=1\n" in launch.slurm(composed(*one, *teacher, "plan.stage=evaluate"))


def test_a_full_node_for_few_gpus_is_warned_about() -> None:
    one = ("model=llama31_8b", "cluster=gpu1", "plan.stage=evaluate")
    assert "the nearest better setting is cluster.processes_per_node=8" in (
        launch.idle_warning(composed(*one)) or ""
    )
    assert launch.idle_warning(composed(*one, "cluster=gpu8")) is None
    assert launch.idle_warning(composed()) is None


def test_a_judge_without_room_is_refused_or_gets_a_node() -> None:
    judge = ("judge=vllm", "judge.name=Qwen/Qwen3-8B", "data=chatbot_arena")
    for emit in (launch.slurm, launch.rayjob):
        with pytest.raises(
            ConfigError, match=r"a node has 8; the nearest better setting is cluster\.processes_per_node=7"
        ):
            emit(composed("model=llama31_8b", "cluster=gpu8", *judge))
    many = big(*judge[:2], "plan.stage=cre")
    script = launch.slurm(many)
    assert "#SBATCH --nodes=5\n" in script and "#SBATCH --gpus-per-node=8\n" in script
    (workers,) = yaml.safe_load(launch.rayjob(many))["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == 4
    assert "#SBATCH --nodes=4\n" in launch.slurm(big(*judge[:2], "plan.stage=psi")), "PSI has no judge"


def test_a_served_second_judge_has_gpus_of_its_own() -> None:
    gold = ("judge_gold=vllm", "judge_gold.name=some/model", "judge_gold.gpus=2", "data=chatbot_arena")
    one = ("model=llama31_8b", "cluster=gpu8", "plan.stage=cre")
    with pytest.raises(ConfigError, match=r"judge_gold=vllm 2 more.* is cluster\.processes_per_node=6"):
        launch.slurm(composed(*one, *gold))
    both = ("judge=vllm", "judge.name=Qwen/Qwen3-8B", *gold, "cluster.processes_per_node=5")
    fitting = composed(*one, *both, "cre.prompts_per_step=40", "cre.mini_batch_prompts=40")
    script = launch.slurm(fitting)
    assert "#SBATCH --gpus-per-node=8\n" in script and "judge_gold=vllm" in script
    assert gpus_per_node(fitting, "cre") == 5 + 1 + 2 and gpus_per_node(fitting, "psi") == 5
    unused = replace(fitting, cre=replace(fitting.cre, validate_every=0))
    assert gpus_per_node(unused, "cre") == 5 + 1, "without validations there is nothing to rate"


def test_the_key_of_the_second_judge_is_a_secret_of_the_job() -> None:
    api = ("judge_gold.base_url=https://judge/v1", "judge_gold.name=m", "judge_gold.api_key_env=GOLD_KEY")
    assert "GOLD_KEY" in launch.required_secrets(composed("judge_gold=endpoint", *api))


def test_pods_ask_for_the_planned_memory_and_may_use_more() -> None:
    config = big("plan.stage=cre")
    needed = host_gib(config, StageName.CRE)
    pod = yaml.safe_load(launch.rayjob(config))["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    resources = pod["containers"][0]["resources"]
    gib = {name: int(resources[name]["memory"].removesuffix("Gi")) for name in ("requests", "limits")}
    assert gib["requests"] == math.ceil(needed) and gib["limits"] == math.ceil(1.5 * needed)
    assert pod["securityContext"] == {"runAsNonRoot": True, "fsGroup": 10001}, "the volume is writable"
    assert f"--uid {launch.USER} " in (ROOT / "Dockerfile").read_text()


def hostile(config: Config) -> Config:
    """Every character that could end a quotation, in a text and in a list."""
    config.run_dir, config.model.lora.target_modules = HOSTILE[3], list(HOSTILE)
    return config


def test_hostile_values_pass_shellcheck() -> None:
    script = launch.slurm(hostile(big()))
    assert "#SBATCH --job-name=pgenrm-it-s-touch-pwned" in script and shellcheck(script) == ""


FAKES = {
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" = show ] && printf "n1\\nn2\\nn3\\nn4\\n"; true',
    "hostname": "echo 10.0.0.1 10.1.0.1",
    # the command after the options runs here, on the "host"
    "srun": 'echo "srun $*" >> "$CALLS"; '
    'while [[ "$1" == -* ]]; do [ "$1" = -w ] && shift; shift; done; exec "$@"',
    "ray": 'echo "ray $*" >> "$CALLS"; [[ " $* " == *" --block "* ]] && sleep 3',
    "python": '"$REAL_PYTHON" -c "import json,sys; print(json.dumps(sys.argv[1:]))" "$@" >> "$PYTHON_CALLS"; '
    'exit "${DRIVER_EXIT:-0}"',
}


def run_script(
    script: str, folder: Path, **more: str
) -> tuple[subprocess.CompletedProcess[str], list[str], list[list[str]]]:
    """The script with fakes on PATH: (process, calls in order, arguments of each python)."""
    (folder / "bin").mkdir()
    for name, body in FAKES.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "job.sh").write_text(script)
    calls, pythons = folder / "calls", folder / "pythons"
    environment = {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "CALLS": str(calls),
        "PYTHON_CALLS": str(pythons),
        "REAL_PYTHON": sys.executable,
        "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(folder),
        **more,
    }
    done = subprocess.run(
        ["bash", "job.sh"], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    lines = pythons.read_text().splitlines() if pythons.exists() else []
    return (
        done,
        calls.read_text().splitlines() if calls.exists() else [],
        [json.loads(line) for line in lines],
    )


def test_the_script_starts_ray_on_every_node_and_the_recipe_on_the_first(tmp_path: Path) -> None:
    config = big("plan.stage=cre")
    done, calls, pythons = run_script(launch.slurm(config), tmp_path)
    assert done.returncode == 0, done.stderr
    rays = [call for call in calls if call.startswith("ray start")]
    assert len(rays) == 4 and sum("--head" in call for call in rays) == 1
    assert all("--num-gpus=8" in call for call in rays)
    assert sum("--address=10.0.0.1:6379" in call for call in rays) == 3, "the first address of the head's"
    hosts = [
        call.split("-w ")[1].split()[0] for call in calls if call.startswith("srun") and " ray start" in call
    ]
    assert sorted(hosts) == ["n1", "n2", "n3", "n4"]
    assert [p[:2] for p in pythons] == [["-m", "pgenrm_train.cluster.launch.wait"]] * 2 + [
        ["-m", "pgenrm_train"]
    ]
    assert pythons[1][2:] == ["10.0.0.1:6379", "4"] and pythons[2][-1] == "ray.address=auto"
    assert same(config, pythons[2][2:])


def test_hostile_values_reach_the_recipe_as_they_are_and_run_nothing(tmp_path: Path) -> None:
    config = hostile(big())
    done, _, pythons = run_script(launch.slurm(config), tmp_path)
    assert done.returncode == 0, done.stderr
    assert same(config, pythons[-1][2:])
    assert not (tmp_path / "pwned").exists()


def test_the_job_fails_when_the_recipe_does(tmp_path: Path) -> None:
    done, *_ = run_script(
        launch.slurm(composed("model=llama31_8b", "cluster=gpu8")), tmp_path, DRIVER_EXIT="3"
    )
    assert done.returncode == 3


def test_a_missing_key_is_named_before_anything_starts(tmp_path: Path) -> None:
    config = composed("cluster=gpu8", "model=llama31_8b", "tracking=wandb")
    done, calls, _ = run_script(launch.slurm(config), tmp_path)
    assert done.returncode != 0 and "WANDB_API_KEY: is not set" in done.stderr and calls == []


def test_no_secret_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    config = big("judge=endpoint", "judge.base_url=http://h:1/v1", "judge.name=m", "judge.api_key_env=MY_KEY")
    for text in (launch.slurm(config), launch.rayjob(config)):
        assert "MY_KEY" in text and "sk-very-secret" not in text
    config.judge.api_key_env = "sk-$(id)"
    with pytest.raises(ConfigError, match="is not the name of an environment variable"):
        launch.slurm(config)


# ---- Kubernetes ----

POD = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "properties": {
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "object", "required": ["name", "image"]},
                }
            },
        }
    },
}
GROUP = {"rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}}, "template": POD}
COUNT = {"type": "integer", "minimum": 0}
RAYJOB = {  # required keys of the CRD ray.io/v1 RayJob, and the types of our keys
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "maxLength": 47, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
            },
        },
        "spec": {
            "type": "object",
            "required": ["entrypoint", "rayClusterSpec"],
            "properties": {
                "entrypoint": {"type": "string"},
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": COUNT,
                "rayClusterSpec": {
                    "type": "object",
                    "required": ["headGroupSpec"],
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "headGroupSpec": {
                            "type": "object",
                            "required": ["rayStartParams", "template"],
                            "properties": GROUP,
                        },
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": [
                                    "groupName",
                                    "minReplicas",
                                    "maxReplicas",
                                    "rayStartParams",
                                    "template",
                                ],
                                "properties": {
                                    **GROUP,
                                    "groupName": {"type": "string"},
                                    "replicas": COUNT,
                                    "minReplicas": COUNT,
                                    "maxReplicas": COUNT,
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


@pytest.mark.parametrize(
    "overrides", [["cluster=multi_node", "model=llama31_70b_lora"], ["cluster=gpu1", "model=qwen3_8b"], []]
)
def test_manifests_have_what_the_crd_requires(overrides: list[str]) -> None:
    config = composed(*overrides)
    job = yaml.safe_load(launch.rayjob(config))
    jsonschema.validate(job, RAYJOB)
    cluster = job["spec"]["rayClusterSpec"]
    assert sum(g["replicas"] for g in cluster.get("workerGroupSpecs", [])) + 1 == config.cluster.nodes
    (container,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == (config.cluster.processes_per_node if config.cluster.device == "cuda" else None)
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert (
        mounted
        == {v["name"] for v in cluster["headGroupSpec"]["template"]["spec"]["volumes"]}
        == {"runs", "shm"}
    )


def test_the_entrypoint_is_the_command_whatever_the_values() -> None:
    config = with_run_dir(hostile(big()), "/runs/it's $(touch pwned)")
    entry = yaml.safe_load(launch.rayjob(config))["spec"]["entrypoint"]
    change, _, start = entry.partition(" && exec ")
    assert change == "cd /opt/pgenrm-train"
    assert same(config, shlex.split(start)[3:])


def test_keys_come_from_the_secret_by_name() -> None:
    job = yaml.safe_load(launch.rayjob(big("tracking=wandb", "plan.secret=mine")))
    (container,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    found = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container["env"] if "valueFrom" in e}
    assert found["WANDB_API_KEY"] == {"name": "mine", "key": "WANDB_API_KEY", "optional": False}
    assert found["HF_TOKEN"]["optional"] is True


def test_paths_of_this_machine_are_refused_for_kubernetes_and_runs_go_to_the_volume() -> None:
    with pytest.raises(ConfigError, match=r"data\.path=votes\.parquet is a path of this machine"):
        launch.rayjob(composed("data=pairs", "data.path=votes.parquet"))
    assert (
        "run_dir=/runs/personaworld-nano-demo"
        in yaml.safe_load(launch.rayjob(composed()))["spec"]["entrypoint"]
    )


def test_the_recipe_prints_the_file_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from recipes import plan

    config = composed("model=llama31_8b", "cluster=gpu1", "plan.emit=slurm", f"run_dir={tmp_path / 'none'}")
    assert plan.run(config) == 1, "it does not fit"
    message = capsys.readouterr()
    assert message.out.startswith("#!/bin/bash") and "warning: cre: update needs" in message.err
    assert "warning: cre fits with model.lora.rank=" in message.err
    assert list(tmp_path.iterdir()) == []
    assert parse(to_dict(config)) == config


@pytest.mark.parametrize("kind", ["slurm", "rayjob"])
def test_the_command_line_prints_the_file_and_nothing_else(kind: str, tmp_path: Path) -> None:
    more = ["plan.image=registry/pgenrm:1", "plan.volume_claim=runs"] if kind == "rayjob" else []
    command = [
        sys.executable,
        "-m",
        "pgenrm_train",
        "recipe=plan",
        f"plan.emit={kind}",
        "plan.stage=psi",
        "model=qwen3_8b",
        "cluster=gpu8",
        *more,
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash" if kind == "slurm" else "apiVersion: ray.io/v1")
