"""The configuration: typed sections, their constraints, and how a command line becomes one.

One file per section holds the settings with defaults, constraints and documents; `schema` joins them into `Config`,
and `checks` holds the rules that span several keys.  Values that depend on the size of the run use the resolver
`${budget:SMOKE,DEMO,FULL}`, which picks by `pipeline.budget`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pgenrm_train.config.checks import check
from pgenrm_train.config.cluster import CardConfig, ClusterConfig, RayConfig
from pgenrm_train.config.data import DataConfig, MaskingConfig
from pgenrm_train.config.endpoints import ANSWER_KEYS, EndpointConfig
from pgenrm_train.config.evaluation import EvalConfig, seeds_of_grid, sizes
from pgenrm_train.config.grpo import CurriculumConfig, GrpoConfig
from pgenrm_train.config.model import BASELINES, PROMPTS, LoraConfig, ModelConfig, NanoConfig
from pgenrm_train.config.places import URL, beneath, mirror_of, place, plain_url
from pgenrm_train.config.prototypes import PrototypesConfig
from pgenrm_train.config.psi import PsiConfig, SecConfig
from pgenrm_train.config.schema import (
    BUDGETS,
    Config,
    TrackingConfig,
    get,
    gpus_per_node,
    masking_of,
    seed_of,
    to_dict,
)
from pgenrm_train.config.setting import not_one_of
from pgenrm_train.config.stage_names import STAGES, StageName
from pgenrm_train.errors import ConfigError

__all__ = [
    "ANSWER_KEYS",
    "BASELINES",
    "BUDGETS",
    "CONFIG_DIR",
    "PROMPTS",
    "ROOT",
    "STAGES",
    "CardConfig",
    "ClusterConfig",
    "Config",
    "CurriculumConfig",
    "DataConfig",
    "EndpointConfig",
    "EvalConfig",
    "GrpoConfig",
    "LoraConfig",
    "MaskingConfig",
    "ModelConfig",
    "NanoConfig",
    "PrototypesConfig",
    "PsiConfig",
    "RayConfig",
    "SecConfig",
    "StageName",
    "TrackingConfig",
    "beneath",
    "check",
    "get",
    "gpus_per_node",
    "load",
    "masking_of",
    "mirror_of",
    "parse",
    "register_resolvers",
    "seed_of",
    "seeds_of_grid",
    "sizes",
    "to_dict",
]

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG_DIR = ROOT / "configs"


def register_resolvers() -> None:
    """Make `${budget:…}` and the schema known to OmegaConf and Hydra (idempotent)."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("budget", _by_budget, replace=True)
    OmegaConf.register_new_resolver("on_disk", _on_disk, replace=True)
    ConfigStore.instance().store(name="schema", node=Config)


def load(*overrides: str, checked: bool = True) -> Config:
    """Compose and check a configuration as the command line would, e.g. `load("recipe=psi", "model=nano")`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_resolvers()
    state = GlobalHydra.instance()
    outer = state.hydra  # of a command line that is being run: one command's files name another's
    state.clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            return parse(compose("config", overrides=list(overrides)), checked=checked)
    finally:
        state.hydra = outer


def _by_budget(smoke: Any, demo: Any, full: Any, *, _root_: Any) -> Any:
    budget = _root_.pipeline.budget
    if budget not in BUDGETS:
        raise ConfigError(not_one_of("pipeline.budget", budget, BUDGETS))
    from omegaconf import OmegaConf

    value = {"smoke": smoke, "demo": demo, "full": full}[budget]
    return OmegaConf.create(value) if isinstance(value, list) else value


def _on_disk(run_dir: str, mirror: str) -> str:
    """Hydra's own folder of a multirun must be one of this machine."""
    return mirror_of(plain_url(run_dir), mirror) if URL.fullmatch(run_dir) else run_dir


def parse(composed: Any, checked: bool = True) -> Config:
    """A composed OmegaConf tree → the typed, resolved, checked `Config`.  Raises ConfigError, and OmegaConf's for unknown keys."""
    from omegaconf import OmegaConf

    register_resolvers()
    # Plain values: merging the tree itself would take over keys that `+key=` put past the schema.
    plain = (
        OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        if OmegaConf.is_config(composed)
        else composed
    )
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    assert isinstance(config, Config)
    place(config)
    if checked:
        check(config)
    return config
