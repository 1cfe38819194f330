"""label: candidate responses → chosen and rejected ones per user, for DPO (docs/using.md)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_builders.sources.slates import read_slates
from eval.choosing.label_files import LabelFacts, LabelRun, write_labels
from eval.choosing.labels import label, votes_on
from eval.choosing.schemes import Slot, circles
from pgenrm_train.config import Config, StageName
from pgenrm_train.errors import DataError
from pgenrm_train.prompts.writer import load_pairs, pairs_of_split
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.slates import Slate, slates_of, user_by_user
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.tracking import Tracker
from pgenrm_train.stages.stage import prepare, run_stage
from recipes import build_data
from recipes.wiring.choosing.player import chooser, inputs_of, player

ONE = "prompt with one distinct response"


def run(config: Config) -> None:
    settings = config.label
    prepare(config)
    config, made = chooser(config)
    inputs = inputs_of(config, made, settings)
    slates = read_slates(Path(settings.input)) if settings.input else None
    pairs: list[PreferencePair] = []
    if slates is None or settings.pro or any(slate.history is None for slate in slates):
        build_data.run(config)
        pairs, inputs = load_pairs(Path(config.run_dir)), (*inputs, StageName.BUILD_DATA)
    if slates is None:
        slates = slates_of(pairs_of_split(pairs, config.eval.split))
    usable, unused = usable_slates(config, slates, pairs)

    def body(folder: StageFolder, _: Tracker) -> Mapping[str, object]:
        slots = [Slot(number, len(slate.responses)) for number, slate in enumerate(usable)]
        with player(config, folder, made, settings, usable, pairs) as (play, name):
            scores = circles(slots, play)
        held_out = votes_on([pair for pair in pairs if pair.split == config.eval.split])
        labelled = label(usable, scores, play.chains(), held_out, settings.pairs_of, settings.min_margin)
        facts = LabelFacts(
            model=name,
            data=Path(settings.input).name
            if settings.input
            else f"{config.data.name}, split {config.eval.split}",
            totals=config.model.counted,
            rule=settings.pairs_of,
            min_margin=settings.min_margin,
            ind=settings.ind,
            pro=settings.pro,
            temperature=config.eval.temperature,
            seed=config.seed,
        )
        made_of = LabelRun(
            facts, usable, scores, labelled, play, unused, config.eval.draws, config.eval.chains_in_report
        )
        results = write_labels(made_of, folder.path)
        return {key: results[key] for key in ("labels", "prompts", "left_out", "failures", "agreement")}

    summary = "{labels} labels of {prompts} prompts"
    folder = run_stage(config, StageName.LABEL, body, summary, inputs=inputs, renew=True)
    print((folder.path / "table.txt").read_text(), end="")
    print(f"data set: {folder.path / 'dataset'} · report: {folder.path / 'report.html'}")


def usable_slates(
    config: Config, slates: Sequence[Slate], pairs: Sequence[PreferencePair]
) -> tuple[list[Slate], Mapping[str, int]]:
    """Slates of two responses or more, and the number of others.

    Raises DataError if none is left, or for a user of `label.input` without a history and without votes.
    """
    known, where = {pair.user_id for pair in pairs if pair.split == "train"}, config.label.input
    for slate in slates if where else ():
        if slate.history is None and slate.prompt.user_id not in known:
            raise DataError(
                f"label.input={where}: the row {slate.prompt.pair_id!r} of user {slate.prompt.user_id!r} has "
                f"no column history, and run_dir={config.run_dir} holds no votes of this user with "
                "split=train"
            )
    usable = [slate for slate in slates if len(slate.responses) > 1]
    if not usable:
        source = f"label.input={where}" if where else f"eval.split={config.eval.split} of the run's data"
        raise DataError(f"{source} holds no prompt with two different responses; nothing can be labelled")
    counts = Counter({ONE: len(slates) - len(usable)})
    return user_by_user(usable, config.label.max_prompts), counts
