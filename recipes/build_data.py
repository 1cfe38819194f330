"""build_data: raw source → preference pairs, a card, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pgenrm_train.config import Config
from pgenrm_train.errors import ConfigError
from pgenrm_train.records import PreferencePair
from pgenrm_train.stages import build_data
from recipes.run import prepare, run_stage


def run(config: Config) -> None:
    prepare(config)
    run_stage(
        config,
        "build_data",
        build_data.READS,
        [],
        lambda f, _: build_data.run(config, f, builder(config)),
        "{pairs} pairs of {users} users",
    )


def builder(config: Config) -> Callable[..., Iterable[PreferencePair]]:
    """The builder of `data=`; each is one file in data_builders/."""
    from data_builders import pairs, personal_reward_bench, personaworld, prism

    known = {
        "pairs": pairs.build,
        "personaworld": personaworld.build,
        "chatbot_arena": personal_reward_bench.build,
        "prism_personalized": personal_reward_bench.build,
        "prism": prism.build,
    }
    if config.data.name not in known:
        raise ConfigError(f"data.name={config.data.name} is not one of {', '.join(known)}")
    return known[config.data.name]
