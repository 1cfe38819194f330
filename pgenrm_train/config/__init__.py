"""The configuration: typed sections, their constraints, and how a command line becomes one.

One file per section holds the settings with defaults, constraints and documents.  `schema` joins them into
`Config`, and `checks` holds the rules that span several keys.  Values that depend on the size of the run use
the resolver `${budget:SMOKE,DEMO,FULL}`, which picks by `pipeline.budget`.
"""

import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pgenrm_train.config.checks import check
from pgenrm_train.config.cluster import CardConfig, ClusterConfig, RayConfig
from pgenrm_train.config.data import DataConfig, MaskingConfig
from pgenrm_train.config.endpoints import ANSWER_KEYS, FIELD_KEYS, ApiConfig, EndpointConfig
from pgenrm_train.config.evaluation import BestOfNConfig, EvalConfig, LabelConfig, seeds_of_grid, sizes
from pgenrm_train.config.grpo import CurriculumConfig, GrpoConfig
from pgenrm_train.config.model import (
    BASELINES,
    EXACT,
    PERSONA_BASELINE,
    PROMPTS,
    LoraConfig,
    ModelConfig,
    NanoConfig,
    Totals,
)
from pgenrm_train.config.places import beneath, mirror_of, place
from pgenrm_train.config.prototypes import PrototypesConfig
from pgenrm_train.config.psi import PsiConfig, SecConfig
from pgenrm_train.config.schema import (
    BUDGETS,
    Config,
    Places,
    TrackingConfig,
    attention_of,
    cuts_by_tokens,
    get,
    gpus_per_node,
    machines,
    masking_of,
    places_of,
    psi_cluster,
    seed_of,
    served_judges,
    to_dict,
    tokens_per_pass,
)
from pgenrm_train.config.serving import ServeConfig
from pgenrm_train.config.setting import not_one_of
from pgenrm_train.config.stage_names import CHOOSING, GRPO_STAGES, STAGES, TRAINED, StageName
from pgenrm_train.errors import ConfigError

__all__ = [
    "ANSWER_KEYS",
    "BASELINES",
    "BUDGETS",
    "CHOOSING",
    "CONFIG_DIR",
    "EXACT",
    "FIELD_KEYS",
    "GRPO_STAGES",
    "PERSONA_BASELINE",
    "PROMPTS",
    "ROOT",
    "STAGES",
    "TRAINED",
    "ApiConfig",
    "BestOfNConfig",
    "CardConfig",
    "ClusterConfig",
    "Config",
    "CurriculumConfig",
    "DataConfig",
    "EndpointConfig",
    "EvalConfig",
    "GrpoConfig",
    "LabelConfig",
    "LoraConfig",
    "MaskingConfig",
    "ModelConfig",
    "NanoConfig",
    "Places",
    "PrototypesConfig",
    "PsiConfig",
    "RayConfig",
    "SecConfig",
    "ServeConfig",
    "StageName",
    "Totals",
    "TrackingConfig",
    "as_typed",
    "attention_of",
    "beneath",
    "check",
    "compose",
    "cuts_by_tokens",
    "get",
    "gpus_per_node",
    "load",
    "machines",
    "masking_of",
    "mirror_of",
    "parse",
    "places_of",
    "psi_cluster",
    "register_resolvers",
    "seed_of",
    "seeds_of_grid",
    "served_judges",
    "sizes",
    "to_dict",
    "tokens_per_pass",
]

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG_DIR = ROOT / "configs"
# Texts that Hydra reads as numbers or booleans.
_NO_TEXT = r"[-+]?(?:[\d._]+(?:e[-+]?[\d_]+)?|inf|nan)|true|false"


@cache
def register_resolvers() -> None:
    """Make `${budget:…}` and the schema known to OmegaConf and Hydra."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("budget", _by_budget, replace=True)
    ConfigStore.instance().store(name="schema", node=Config)


def load(*overrides: str, checked: bool = True) -> Config:
    """Compose and check a configuration as the command line does: `load("recipe=psi", "model=nano")`."""
    register_resolvers()
    return parse(compose(CONFIG_DIR, "config", overrides), checked=checked)


def compose(folder: Path, name: str, overrides: Sequence[str] = ()) -> Any:
    """Compose a file of a folder with Hydra (a DictConfig), also while Hydra runs for the command line."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    state = GlobalHydra.instance()
    running = state.hydra  # of the command line, whose files may name another command's
    state.clear()
    try:
        with hydra.initialize_config_dir(str(folder), version_base=None):
            return hydra.compose(name, overrides=list(map(as_typed, overrides)))
    finally:
        state.hydra = running


def as_typed(override: str) -> str:
    """An override whose text Hydra keeps: `run_dir=2024_11_30` would be 20241130, and `1.10` would be 1.1.

    >>> as_typed("run_dir=2024_11_30"), as_typed("seed=1_0")
    ('run_dir="2024_11_30"', 'seed=1_0')
    """
    key, _, value = override.partition("=")
    kind: Any = Config
    for name in key.lstrip("+").split("."):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    if kind not in (str, str | None, list[str]) or set(value) & set("'\"\\(){}$"):
        return override
    # Several values, of a list or of -m, are separated by commas.
    item = r"(?<=[\[,])(\s*)({})(?=\s*[],])" if kind == list[str] else r"(?:^|(?<=,))(\s*)({})(?=\s*(?:,|$))"
    return f"{key}=" + re.sub(item.format(_NO_TEXT), r'\1"\2"', value, flags=re.IGNORECASE)


def parse(composed: Any, checked: bool = True) -> Config:
    """Turn an OmegaConf tree or a plain dict into the typed, resolved, checked `Config`.

    Raises ConfigError, and OmegaConf's errors for unknown keys.
    """
    from omegaconf import OmegaConf

    register_resolvers()
    if OmegaConf.is_config(composed):
        # Plain values: merging the tree itself would take over keys that `+key=` put past the schema.
        composed = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    config = OmegaConf.to_object(OmegaConf.merge(_schema(), composed))
    assert isinstance(config, Config)
    place(config)
    if checked:
        check(config)
    return config


@cache
def _schema() -> Any:
    """The schema with its defaults; `OmegaConf.merge` copies it."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(Config)


def _by_budget(smoke: Any, demo: Any, full: Any, *, _root_: Any) -> Any:
    from omegaconf import OmegaConf

    values = dict(zip(BUDGETS, (smoke, demo, full), strict=True))
    if (budget := _root_.pipeline.budget) not in values:
        raise ConfigError(not_one_of("pipeline.budget", budget, BUDGETS))
    value = values[budget]
    return OmegaConf.create(value) if isinstance(value, list) else value
