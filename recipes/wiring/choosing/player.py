"""The model that chooses among candidate responses, and the histories in its prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from eval.choosing.schemes import Player
from eval.studies.evaluation import Candidate, Evaluation
from pgenrm_train.backends.vllm.replicas import local_engines
from pgenrm_train.config import BestOfNConfig, Config, LabelConfig, StageName
from pgenrm_train.errors import ArtifactError
from pgenrm_train.prompts.writer import histories
from pgenrm_train.records.pairs import HistoryItem, PreferencePair
from pgenrm_train.records.slates import Slate
from pgenrm_train.run.concurrency import progress
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.stages.stage import start_of, with_totals
from recipes.wiring.candidates import candidates
from recipes.wiring.similar_users import find_similar


def chooser(config: Config) -> tuple[Config, tuple[StageName, ...]]:
    """The configuration with the checkpoint's totals, and the stage that made it.

    Raises ArtifactError without a checkpoint.
    """
    if config.model.kind == "endpoint":
        return config, ()
    start = start_of(config, StageName(config.recipe).starts_from)
    return with_totals(config, start.checkpoint), start.made_by


def inputs_of(
    config: Config, made: tuple[StageName, ...], settings: LabelConfig | BestOfNConfig
) -> tuple[StageName, ...]:
    """Stages whose products a choice uses.  Raises ArtifactError if it needs prototypes and has none."""
    if not settings.pro:
        return made
    if not StageFolder.read(Path(config.run_dir), StageName.PROTOTYPES).complete:
        raise ArtifactError(
            f"{config.recipe}.pro={settings.pro} needs user prototypes, of which run_dir={config.run_dir} "
            f"holds none; run recipe=prototypes there first, or use {config.recipe}.pro=0"
        )
    return (*made, StageName.PROTOTYPES)


@contextmanager
def player(
    config: Config,
    folder: StageFolder,
    made: tuple[StageName, ...],
    settings: LabelConfig | BestOfNConfig,
    slates: Sequence[Slate],
    pairs: Sequence[PreferencePair],
) -> Iterator[tuple[Player, str]]:
    """A player with the model, and the model's name; prototypes of another model raise ArtifactError."""
    find = find_similar(config, pairs) if settings.pro else None
    with local_engines(config) as load:
        (model,) = candidates(config, made, folder.path, load)
        assert isinstance(model, Candidate)
        asker = Evaluation(config, [], {}).asker(
            model, folder.path / model.name, progress, "chains", str(folder.stage)
        )
        weights = config.eval.weights[0], config.eval.weights[1]
        shown = shown_histories(config, slates, pairs)
        try:
            yield Player(slates, shown, asker, find, settings.ind, settings.pro, weights), model.name
        finally:
            model.close()


def shown_histories(
    config: Config, slates: Sequence[Slate], pairs: Sequence[PreferencePair]
) -> dict[str, tuple[HistoryItem, ...]]:
    """Key of a slate → its own history, or one drawn from the user's votes."""
    sampler, size = histories(config, pairs), config.data.history_size
    return {
        slate.key: sampler(slate.prompt, shown=slate.responses)
        if slate.history is None
        else slate.history[-size:]
        for slate in slates
    }
