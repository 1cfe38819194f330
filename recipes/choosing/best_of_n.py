"""best_of_n: the gain of the model's choice among n candidates over other choosers."""

from collections.abc import Mapping
from pathlib import Path

from eval.choosing.best_of_n import ChoiceFacts, ChoiceRun, write_best_of_n
from eval.choosing.schemes import Slot, circles, knockouts
from pgenrm_train.config import Config, StageName
from pgenrm_train.prompts.writer import load_pairs
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.tracking import Tracker
from pgenrm_train.stages.stage import prepare, run_stage
from recipes import build_data
from recipes.wiring.choosing.player import chooser, inputs_of, player
from recipes.wiring.choosing.references import candidates_of, values_of


def run(config: Config) -> None:
    settings = config.best_of_n
    prepare(config)
    config, made = chooser(config)
    inputs = inputs_of(config, made, settings)
    build_data.run(config)

    def body(folder: StageFolder, _: Tracker) -> Mapping[str, object]:
        pairs = load_pairs(Path(config.run_dir))
        slates = candidates_of(config, pairs)
        sizes = sorted(set(settings.sizes))
        slots = [Slot(i, n) for i, slate in enumerate(slates) for n in sizes if n <= len(slate.responses)]
        with player(config, folder, made, settings, slates, pairs) as (play, name):
            values = values_of(config, slates, play.histories, pairs)
            scores, winners = circles(slots, play), knockouts(slots, play)
        facts = ChoiceFacts(
            model=name,
            data=config.data.name,
            split=config.eval.split,
            utility=values.utility,
            population=values.population,
            ideal=values.ideal,
            totals=config.model.counted,
            ind=settings.ind,
            pro=settings.pro,
            temperature=config.eval.temperature,
            seed=config.seed,
        )
        results = write_best_of_n(
            ChoiceRun(
                facts,
                scores,
                winners,
                values.by_slate,
                play,
                [],
                config.eval.draws,
                config.eval.chains_in_report,
            ),
            folder.path,
        )
        return {key: results[key] for key in ("prompts", "users", "chains", "headline", "failures")}

    summary = "{chains} chains for {prompts} prompts of {users} users"
    folder = run_stage(config, StageName.BEST_OF_N, body, summary, inputs=inputs, renew=True)
    print((folder.path / "table.txt").read_text(), end="")
    print(f"report: {folder.path / 'report.html'}")
