"""leaderboard: one HTML page from the results of many runs, `leaderboard.runs=[FOLDER,…]`."""

from pathlib import Path

from eval.report.leaderboard import RESULTS, write_leaderboard
from pgenrm_train.config import Config
from pgenrm_train.errors import ConfigError


def run(config: Config) -> None:
    settings, folder = config.leaderboard, Path(config.run_dir)
    if not settings.runs:
        raise ConfigError(f"recipe=leaderboard needs leaderboard.runs=[FOLDER,…], folders with {RESULTS}")
    content = write_leaderboard(settings.runs, folder, draws=config.eval.draws, seed=config.seed)
    for note in content["notes"]:
        print(f"note: {note}", flush=True)
    print(
        f"{len(content['results'])} results, {len(content['comparisons'])} comparisons: "
        f"{folder / 'leaderboard.html'}"
    )
