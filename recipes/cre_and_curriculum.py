"""cre, then curriculum, with one start of Ray, actor and vLLM for both."""

from __future__ import annotations

from pgenrm_train.config import GRPO_STAGES, Config
from recipes.wiring.grpo import run_stages


def run(config: Config) -> None:
    run_stages(config, GRPO_STAGES)
