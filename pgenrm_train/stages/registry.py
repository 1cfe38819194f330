"""Registry of the stages: which stages and settings each depends on.

A stage's fingerprint covers the settings in `reads` and the fingerprints of its inputs.  Inputs are the
stages in `after`, plus those that `run_stage(inputs=…)` names, e.g. the stage that made the start checkpoint.
Recipes supply the bodies, since these need engines.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgenrm_train.config import (
    ANSWER_KEYS,
    FIELD_KEYS,
    GRPO_STAGES,
    Config,
    CurriculumConfig,
    GrpoConfig,
    PsiConfig,
    StageName,
    Totals,
    get,
    to_dict,
)
from pgenrm_train.config.data import VOTES
from pgenrm_train.records.file_columns import named_columns
from pgenrm_train.records.personas import personas_digest
from pgenrm_train.records.shards import digest

FREE = (  # a run may continue with other values: they change no step
    "save_every",
    "log_every",
    "micro_batch_tokens",
    "keep_checkpoints",
    "validate_every",
    "validate_pairs",
    "stall_seconds",
)
ADDED: tuple[tuple[str, object], ...] = (
    ("val_share", 0.0),
    ("family", "qwen2"),
    ("pairs_of", "best"),
    ("tasks", []),
    ("task_paths", {}),
    ("random_users", False),
    ("personas", None),
    ("greedy", False),
    # of CRE and curriculum
    ("mode", "sync"),
    ("max_staleness", 1),
    ("rubric_dropout", 0.0),
)
LACKING = {  # settings that older versions did not have, with what they did
    "psi.optimizer": "adamw",
    "psi.cpu_processes": 1,
}
NANO_EPOCHS = 2.0  # of older versions, where psi.epochs=null is the default now
MODEL = ("model.kind", "model.name", "model.path", "model.totals")
PROMPT = ("model.instructions", "model.max_prompt_tokens", "model.max_text_tokens")
TEACHER = tuple(f"teacher.{key}" for key in ANSWER_KEYS)
JUDGE = tuple(f"judge.{key}" for key in ANSWER_KEYS)
CHOICE = (  # of stages that choose among responses
    "data",
    "seed",
    "masking",
    *(f"eval.{key}" for key in ("split", "masking", "temperature", "weights", "draws", "chains_in_report")),
    *MODEL,
    "model.prompt",
    *PROMPT,
    "model.max_response_tokens",
)
RANKS = ("cluster.processes_per_node", "cluster.nodes")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its name, the stages that it always uses, and the settings that it depends on."""

    name: StageName
    after: tuple[StageName, ...]
    reads: tuple[str, ...]
    method: str | None = None  # training method, for the model card; None if it trains nothing

    def settings(self, config: Config) -> dict[str, object]:
        """Values of `reads`.  Raw data counts by content: a moved file is the same data."""
        # On LaMP-QA the reference ranking may be a judge's.
        judged = self.name == StageName.EVALUATE and config.data.name == "lampqa"
        reads = (*self.reads, *(JUDGE if judged else ()))
        settings = {key: _plain(get(config, key)) for key in reads}
        roles = dict.fromkeys(key.partition(".")[0] for key in reads if key.endswith(".name"))
        added = [f"{role}.{key}" for role in roles for key in FIELD_KEYS]
        settings |= {key: value for key in added if (value := get(config, key))}
        if config.model.counted is Totals.DECLARED:  # whether stated or not
            settings.pop("model.totals", None)
        if self.name in GRPO_STAGES:
            for key, value in ADDED:
                if (name := f"{self.name}.{key}") in settings and settings[name] == value:
                    del settings[name]
            if getattr(config, self.name).separate:
                # optimiser states are sharded over the actor's GPUs
                settings["cluster.rollout_gpus"] = config.cluster.rollout_gpus
        if "psi.evaluate_every" in settings and not config.psi.evaluate_every:
            # measured alone, accuracy changes no checkpoint: as in runs that measured none
            settings |= {"psi.evaluate_every": 0, "psi.evaluate_pairs": 64}
        files = {
            key: Path(value)
            for key, value in (("path", config.data.path), ("answers", config.data.answers))
            if value and Path(value).exists()
        }
        if files:
            settings["data"] = _plain(config.data) | dict.fromkeys(files)
        if "path" in files and config.data.name in VOTES and (named := named_columns(files["path"])):
            settings["data.path columns"] = named  # the names of files count where rows lack these columns
        if "label" in reads and (candidates := config.label.input) and Path(candidates).exists():
            settings["label"] = to_dict(config.label) | {"input": None}
            settings["label.input sha256"] = digest(Path(candidates))
        if "model.prompt" in reads and (program := config.model.persona_program) and Path(program).exists():
            settings["model.persona_program sha256"] = digest(Path(program))
        if "eval" in reads and (personas := config.eval.personas) and Path(personas).is_dir():
            settings["eval.personas sha256"] = personas_digest(Path(personas))
        return settings | {f"data.{key} sha256": digest(path) for key, path in files.items()}


def as_recorded(settings: Mapping[str, object], recorded: Mapping[str, object]) -> dict[str, object]:
    """The settings in the terms of an older version's manifest, if they have the values of then."""
    if settings.get("psi.epochs", 0) is None and settings.get("model.kind") == "nano":
        older = recorded.get("psi.epochs") == NANO_EPOCHS
        settings = {**settings, "psi.epochs": NANO_EPOCHS if older else None}
    lacking = {k for k, v in LACKING.items() if recorded and k not in recorded and settings.get(k) == v}
    if "psi.optimizer" in lacking:
        lacking.add("psi.muon_learning_rate")  # AdamW does not use it
    return {key: value for key, value in settings.items() if key not in lacking}


def _plain(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    # keys that runs of older versions do not have count only with other values
    return {key: item for key, item in to_dict(value).items() if (key, item) not in ADDED}


def _fields(section: StageName, settings: type[PsiConfig] | type[GrpoConfig]) -> Iterator[str]:
    return (f"{section}.{field.name}" for field in dataclasses.fields(settings) if field.name not in FREE)


def _grpo(name: StageName, settings: type[GrpoConfig], method: str) -> Stage:
    reads = (
        *_fields(name, settings),
        "data",
        "seed",
        *JUDGE,
        "masking",
        *MODEL,
        "model.lora",
        *PROMPT,
        "model.max_response_tokens",
        *RANKS,
    )
    return Stage(name, (StageName.BUILD_DATA,), reads, method)


REGISTRY = {
    stage.name: stage
    for stage in (
        Stage(StageName.BUILD_DATA, (), ("data", "seed")),
        Stage(
            StageName.CRITERIA, (StageName.BUILD_DATA,), ("data", "seed", *TEACHER, "sec.samples_per_pair")
        ),
        Stage(
            StageName.BUILD_SEC,
            (StageName.BUILD_DATA,),
            (
                "data",
                "seed",
                *TEACHER,
                "sec.samples_per_pair",
                "sec.orders_per_pair",
                "sec.max_chains",
                "sec.second_chance",
                "sec.near_duplicate",
                "masking",
                "psi.masking",
                "psi.nano_start",
                *MODEL,
                "model.nano",
                *PROMPT,
            ),
        ),
        Stage(
            StageName.PSI,
            (StageName.BUILD_SEC,),
            (*_fields(StageName.PSI, PsiConfig), "seed", *MODEL, "model.lora", "model.nano", *RANKS),
            "persona-guided scoring induction: supervised on a teacher's evaluation chains, "
            "loss on the chain only",
        ),
        _grpo(
            StageName.CRE,
            GrpoConfig,
            "criteria-based reasoning enhancement: GRPO, process and outcome reward, "
            "criteria masked from the prompt",
        ),
        _grpo(
            StageName.CURRICULUM,
            CurriculumConfig,
            "hard-negative curriculum: GRPO on the outcome alone, with a growing share of hard pairs",
        ),
        Stage(
            StageName.PROTOTYPES,
            (StageName.BUILD_DATA,),
            ("prototypes", "data", "seed", "masking", *MODEL, "model.instructions"),
        ),
        Stage(
            StageName.EVALUATE,
            (StageName.BUILD_DATA,),
            (
                "data",
                "seed",
                "eval",
                "masking",
                "prototypes",
                *MODEL,
                "model.prompt",
                *PROMPT,
                "model.max_response_tokens",
            ),
        ),
        Stage(StageName.LABEL, (), ("label", *CHOICE)),
        Stage(StageName.BEST_OF_N, (StageName.BUILD_DATA,), ("best_of_n", *CHOICE)),
    )
}
