"""Settings of the supervised stages: build_sec and psi.

The paper gives no values for PSI.  Batch, passes and learning rate follow from the number of chains
(`cluster.sizes`).
"""

from dataclasses import dataclass

from pgenrm_train.config.data import MASKINGS
from pgenrm_train.config.setting import setting


@dataclass
class SecConfig:
    samples_per_pair: int = setting(4, "tries until one chain is kept", gt=0)
    orders_per_pair: int = setting(
        1, "presentation orders per pair; 1 is balanced over pairs", choices=(1, 2)
    )
    max_chains: int | None = setting(None, "most chains to keep; null: all", gt=0)
    second_chance: bool = setting(
        True, "the next try sees the last one's fault of form, but never a wrong ranking"
    )
    synthesize_criteria: bool = setting(
        False, "the teacher infers criteria of users who stated none, for CRE's judge (METHOD §4)"
    )
    near_duplicate: float = setting(
        0.9,
        "similarity of two analyses (Jaccard, word triples) from which the second is rejected",
        gt=0,
        le=1,
    )


@dataclass
class PsiConfig:
    masking: str = setting("full", "masking policy of the stage", choices=MASKINGS)
    epochs: float | None = setting(None, "passes over the chains; null: from their number", gt=0)
    max_steps: int | None = setting(None, "most optimiser steps; null: from epochs", gt=0)
    optimizer: str = setting(
        "adamw",
        "muon: DeepSpeed's Muon for matrices of hidden layers, AdamW for the rest",
        choices=("adamw", "muon"),
    )
    learning_rate: float | None = setting(
        None, "peak learning rate of AdamW; null: from the number of chains", gt=0
    )
    muon_learning_rate: float = setting(0.007, "peak learning rate of Muon's matrices", gt=0)
    batch_size: int | None = setting(
        None, "sequences per optimiser step, over all processes; null: from the number of chains", gt=0
    )
    micro_batch_size: int = setting(1, "sequences per process and forward pass, unless they are packed", gt=0)
    micro_batch_tokens: int = setting(
        16384, "packed sequences: tokens per process and forward pass, or one longer sequence", gt=0
    )
    cpu_processes: int = setting(
        1, "fewest processes of PSI on a CPU; cluster.processes_per_node may be more", gt=0
    )
    warmup_ratio: float = setting(0.05, "share of the steps in which the learning rate rises", ge=0, lt=1)
    weight_decay: float = setting(0.0, "AdamW's weight decay", ge=0)
    beta2: float = setting(0.999, "AdamW's second moment", gt=0, lt=1)
    min_learning_rate_ratio: float = setting(0.0, "last learning rate over the peak, on a cosine", ge=0, le=1)
    gradient_checkpointing: bool = setting(True, "recompute activations to save memory")
    save_every: int = setting(200, "steps between checkpoints", gt=0)
    log_every: int = setting(10, "steps between lines of metrics", gt=0)
    keep_checkpoints: int = setting(
        2, "newest checkpoints to keep, next to the best one; a kill may damage the last", ge=2
    )
    packing: bool | None = setting(None, "several sequences in one row without padding; null: on GPUs")
    sequence_parallel: int = setting(
        1, "processes that share one sequence (Ulysses), for chats that one GPU cannot hold", gt=0
    )
    score_weight: float = setting(
        1.0, "loss weight of tokens from <JSON_START> on; tokens of the analysis have 1", gt=0
    )
    liger: bool = setting(False, "Liger's kernels for norms, rotations and activations; needs its package")
    evaluate_every: int | None = setting(
        None,
        "steps between validations, of which the best counts; null: start, middle and end, and the last "
        "checkpoint counts; 0: none",
        ge=0,
    )
    evaluate_pairs: int = setting(256, "validation pairs, each in both orders", gt=0)
    patience: int | None = setting(
        None, "validations without a better accuracy that end training; null: never", gt=0
    )
    nano_start: str | None = setting(
        None, "nano only: a shipped checkpoint to start from; null: random weights"
    )

    def packs(self, device: str) -> bool:
        """Whether sequences share rows: by default on GPUs, and never if processes share a sequence."""
        return self.sequence_parallel == 1 and (device == "cuda" if self.packing is None else self.packing)
