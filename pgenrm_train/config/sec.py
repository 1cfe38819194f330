"""Settings of build_sec."""

from __future__ import annotations

from dataclasses import dataclass

from pgenrm_train.config.setting import setting


@dataclass
class SecConfig:
    """Structured evaluation chains by a teacher, filtered by rejection sampling (METHOD §3)."""

    samples_per_pair: int = setting(4, "tries until one chain is kept", gt=0)
    orders_per_pair: int = setting(
        1, "presentation orders per pair; 1 is balanced over pairs", choices=(1, 2)
    )
    max_chains: int | None = setting(None, "most chains to keep; null: all")
    second_chance: bool = setting(
        True, "the next try reads what was wrong with the last one's form, never that its ranking was wrong"
    )
    synthesize_criteria: bool = setting(
        False, "the teacher infers criteria of users who stated none, for CRE's judge (METHOD §4)"
    )
    near_duplicate: float = setting(
        0.9,
        "similarity of two analyses (Jaccard, word triples) from which the second teaches nothing new",
        gt=0,
        le=1,
    )
