"""cre: GRPO on veRL from the PSI checkpoint; masked criteria supervise through the judge."""

from pgenrm_train.config import Config, StageName
from recipes.cre_and_curriculum import run_stages


def run(config: Config) -> None:
    run_stages(config, [StageName.CRE])
