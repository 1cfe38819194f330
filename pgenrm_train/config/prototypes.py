"""Settings of prototypes."""

from dataclasses import dataclass
from typing import Any

from pgenrm_train.config.setting import setting


@dataclass
class PrototypesConfig:
    k: Any = setting(
        50, "number of prototypes from 1; auto: the number of largest singular values that hold retained_mass"
    )
    retained_mass: float = setting(
        0.8,
        "share of the singular values' sum for k=auto; 0.8 gives 8 to 12 on PersonaWorld's 12 groups",
        gt=0,
        le=1,
    )
    embedder: str = setting("Qwen/Qwen3-Embedding-0.6B", "a sentence-transformers path or hub id, or minilm")
    analyses_per_user: int = setting(2, "pairs per training user that are analysed", gt=0)
    max_users: int | None = setting(None, "most training users; null: all", gt=0)
    refine_epochs: int | None = setting(
        None, "passes of the refinement; 0: centroids as clustered; null: 5, or 160 updates", ge=0
    )
    learning_rate: float = setting(1e-3, "learning rate of the refinement")
    rho: float = setting(1.0, "ρ: weight of the prototype in the attention over the history")
    lambda_query: float = setting(0.1, "λ_q: weight of the query in z")
    lambda_summary: float = setting(0.1, "λ_s: weight of the history's summary in z")
    lambda_centre: float = setting(0.1, "λ_cent: pull towards the cluster's mean")
    lambda_trajectory: float = setting(0.1, "λ_tr: pull towards the start of the epoch")
