"""build_data: raw source → preference pairs, a card and a leak report."""

from collections.abc import Mapping

from pgenrm_train.config import Config, StageName
from pgenrm_train.config.data import QUESTIONS
from pgenrm_train.errors import ConfigError
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.stages import build_data
from pgenrm_train.stages.stage import prepare, run_stage


def run(config: Config) -> None:
    asked = config.data.name in QUESTIONS
    if asked and config.recipe not in (StageName.BUILD_DATA, StageName.EVALUATE):
        raise ConfigError(
            f"data={config.data.name} is for evaluation only; recipe={config.recipe} needs another data="
        )
    prepare(config)
    summary = "{questions} questions, {answers} answers" if asked else "{pairs} pairs of {users} users"
    run_stage(config, StageName.BUILD_DATA, lambda folder, _: build(config, folder), summary)


def build(config: Config, folder: StageFolder) -> Mapping[str, object]:
    """The pairs and the report on them; or questions, which no stage trains on."""
    from data_builders.checks.card import describe

    if config.data.name in QUESTIONS:
        from data_builders.sources import choices, lampqa

        build_questions = lampqa.build if config.data.name == "lampqa" else choices.build
        return build_questions(config, folder.path)
    return describe(config, folder.path, build_data.run(config, folder, builder(config)))


def builder(config: Config) -> build_data.Builder:
    """The builder of `data=`, in data_builders/sources."""
    from data_builders.sources import pairs, personaworld, prism

    builders = {
        "pairs": pairs.build,
        "personaworld": personaworld.build,
        "chatbot_arena": pairs.build,
        "prism_personalized": pairs.build,
        "prism": prism.build,
        "rm_as_user": pairs.build,
    }
    if config.data.name not in builders:
        raise ConfigError(f"data.name={config.data.name} is not one of {', '.join(builders)}")
    return builders[config.data.name]
