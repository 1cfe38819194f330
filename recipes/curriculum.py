"""curriculum: GRPO on veRL from CRE, with a growing share of hard negatives."""

from pgenrm_train.config import Config, StageName
from recipes.cre_and_curriculum import run_stages


def run(config: Config) -> None:
    run_stages(config, [StageName.CURRICULUM])
