"""Exact configuration of an engine as YAML, with our keys as comments.

The comments are computed: `sources` changes one key of ours at a time.  Null sizes follow from the planned
number of pairs; in a run they follow from the true one.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pgenrm_train.cluster.planning.geometry import geometry_of
from pgenrm_train.cluster.planning.memory import with_zero_stage
from pgenrm_train.cluster.planning.work import with_planned_sizes
from pgenrm_train.config import GRPO_STAGES, Config, StageName, psi_cluster
from pgenrm_train.config.setting import known
from pgenrm_train.errors import ConfigError

Values = Mapping[str, object]  # dotted key of the engine → value
DEVICE = "cluster.device"
CONSTANT = "fixed"  # the comment of a value that no key of ours changes


def engine_yaml(config: Config, engine: str) -> str:
    """One YAML document per stage that `plan.stage` selects and the engine trains or generates for.

    Raises ConfigError if it selects none.
    """
    parts = {"verl": _verl, "deepspeed": _deepspeed, "vllm": _vllm}[engine](config)
    documents = [f"# {title}\n" + "\n".join(_lines(values, comments)) for title, values, comments in parts]
    if not documents:
        raise ConfigError(f"plan.stage={config.plan.stage} does not use plan.emit={engine}")
    return "\n---\n".join(documents) + "\n"


Part = tuple[str, Mapping[str, Any], Mapping[str, str]]  # title, nested values, comments by dotted key


def _verl(config: Config) -> Iterator[Part]:
    from omegaconf import OmegaConf

    from pgenrm_train.backends.grpo.config import verl_keys, with_defaults

    for stage in _selected(config, GRPO_STAGES):

        def keys(config: Config, stage: StageName = stage) -> Values:
            config = with_planned_sizes(config)
            folder, run = Path(config.run_dir) / stage, Path(config.run_dir)
            start = Path(config.model.path or run / _before(stage) / "checkpoint")
            steps = known(getattr(config, stage).steps)
            return verl_keys(
                config, stage, start=start, rows=folder / "rows.parquet", work_dir=folder, total_steps=steps
            )

        values: Any = OmegaConf.to_container(with_defaults(keys(config)), resolve=True)
        yield f"{stage}: verl's ppo_trainer", values, _comments(config, keys)


def _deepspeed(config: Config) -> Iterator[Part]:
    from pgenrm_train.backends.sft.batches import batching_of
    from pgenrm_train.backends.sft.settings import deepspeed_settings, trainer_settings

    def keys(config: Config) -> Values:
        config = with_planned_sizes(dataclasses.replace(config, cluster=psi_cluster(config)))
        config = with_zero_stage(config, geometry_of(config))
        folder = Path(config.run_dir) / StageName.PSI
        accumulated = batching_of(config.psi, config.cluster).accumulation
        trainer = trainer_settings(config, folder / "steps", accumulated)
        micro = trainer["per_device_train_batch_size"]
        known = {
            "train_batch_size": accumulated and micro * accumulated * config.cluster.ranks,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulated,
            "gradient_clipping": trainer["max_grad_norm"],
        }
        deepspeed = deepspeed_settings(config.cluster, config.model, config.psi) | known
        if "optimizer" in deepspeed:
            deepspeed["optimizer"] = _without_auto(deepspeed["optimizer"], trainer)
        return _flat({"deepspeed": deepspeed, "trainer": trainer | {"deepspeed": "the section above"}})

    if _selected(config, (StageName.PSI,)):
        title = (
            "psi: DeepSpeed, and the arguments of transformers' Trainer (batches count micro-batches; "
            "null: from the lengths of the chains)"
        )
        yield title, _nested(keys(config)), _comments(config, keys)


def _without_auto(optimizer: Any, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's optimizer with the values that transformers fills in for `auto`."""
    from transformers import TrainingArguments

    default = TrainingArguments.__dataclass_fields__
    filled = {
        "lr": trainer["learning_rate"],
        "betas": [default["adam_beta1"].default, trainer["adam_beta2"]],
        "eps": default["adam_epsilon"].default,
        "weight_decay": trainer["weight_decay"],
    }
    return {**optimizer, "params": optimizer["params"] | filled}


def _vllm(config: Config) -> Iterator[Part]:
    from pgenrm_train.backends.vllm.engine import engine_settings, vllm_variables
    from pgenrm_train.backends.vllm.server import server_arguments

    def keys(config: Config) -> Values:
        served = {
            role: " ".join(server_arguments(config, settings))
            for role in ("teacher", "judge", "judge_gold")
            if (settings := getattr(config, role)).kind == "vllm"
        }
        return _flat(
            {
                "engine": engine_settings(config),
                "servers": served,
                "environment": vllm_variables(config.cluster.device),
            }
        )

    if _selected(config, (StageName.PROTOTYPES, StageName.EVALUATE)):
        title = "arguments of vllm.LLM in prototypes and evaluate, of servers, and environment variables"
        yield title, _nested(keys(config)), _comments(config, keys)


def _comments(config: Config, table: Callable[[Config], Values]) -> dict[str, str]:
    return {key: ", ".join(names) or CONSTANT for key, names in sources(config, table).items()}


def sources(config: Config, table: Callable[[Config], Values]) -> dict[str, list[str]]:
    """Per value of `table(config)`, the keys that change it, in the schema's order.

    `cluster.device` counts only if no other key does, because it chooses between complete tables.
    """
    changed, values = copy.deepcopy(config), table(config)
    found: dict[str, list[str]] = {key: [] for key in values}
    for name, section, field in _leaves(changed, ""):
        original = getattr(section, field.name)
        for value in _others(field, original):
            setattr(section, field.name, value)
            try:
                others = table(changed)
            except Exception:
                # This value is invalid, but another one of its kind may be valid.
                continue
            for key in values:
                if others.get(key, values) != values[key] and name not in found[key]:
                    found[key].append(name)
        setattr(section, field.name, original)
    for names in found.values():
        if len(names) > 1 and DEVICE in names:
            names.remove(DEVICE)
    return found


def _leaves(section: Any, prefix: str) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", section, field


def _others(field: dataclasses.Field[Any], value: object) -> list[object]:
    """Other values of a setting, valid or not, on both sides of thresholds."""
    if field.metadata["choices"]:
        return [choice for choice in field.metadata["choices"] if choice != value]
    match value:
        case bool():
            return [not value]
        case int() | float():
            return [0, value + 1, 2 * value, value + 10**6]
        case None:
            return [False, 1, 10**6, "other"]
        case str():
            return [f"{value}-other"]
        case list():
            return [[], ["other"]]
    return []


def _selected(config: Config, stages: tuple[StageName, ...]) -> list[StageName]:
    return [stage for stage in stages if config.plan.stage in ("all", stage)]


def _before(stage: StageName) -> StageName:
    return StageName.CRE if stage == StageName.CURRICULUM else StageName.PSI


def _lines(values: Mapping[str, Any], comments: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, value in values.items():
        key, head = f"{prefix}{name}", f"{indent}{_inline(name)}:"
        comment = f"  # {comments[key]}" if key in comments else ""
        if isinstance(value, Mapping) and value and not comment:
            yield head
            yield from _lines(value, comments, f"{key}.")
        else:
            yield f"{head} {_inline(value)}{comment}"


def _inline(value: object) -> str:
    """One line of YAML."""
    return yaml.safe_dump([value], default_flow_style=True, width=10**9).strip()[1:-1]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _nested(flat: Values) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return nested
