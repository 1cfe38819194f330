"""cre, then curriculum, with one start of Ray, actor and vLLM for both."""

from __future__ import annotations

from pgenrm_train.config import Config
from pgenrm_train.config.stage_names import GRPO_STAGES
from recipes.wiring.grpo import run_stages


def run(config: Config) -> None:
    run_stages(config, GRPO_STAGES)
