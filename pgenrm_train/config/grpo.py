"""Settings of cre and curriculum.

8B defaults follow RM-R1 on verl: learning rate 1e-6, 8 samples per prompt, at most 128 prompts per step.
Steps and prompts per step follow from the number of pairs (`cluster.sizes`).
"""

from dataclasses import dataclass

from pgenrm_train.config.data import MASKINGS
from pgenrm_train.config.setting import setting

SCHEDULES = ("linear", "cosine", "step", "self_paced", "uniform", "anti")
SYNC, ASYNC, SEPARATE = MODES = ("sync", "async", "separate_async")
# vLLM's share of a GPU of its own: veRL's worker there receives weights in two buffers of 2 GiB.
VLLM_ALONE = 0.85


@dataclass
class GrpoConfig:
    masking: str = setting("masked", "masking policy of the stage", choices=MASKINGS)
    mode: str = setting(
        SYNC,
        "async: the next step's chains are sampled while this step's are judged; separate_async: and while "
        "the actor is updated, by vLLM on GPUs of its own",
        choices=MODES,
    )
    max_staleness: int = setting(
        1,
        "not with mode=sync: most updates since the weights that sampled a chain; as many steps are sampled "
        "ahead",
        ge=1,
    )
    seed: int | None = setting(None, "another seed repeats the stage on the same data; null: the run's")
    rows: int = setting(8192, "training pairs to draw from", gt=0)
    steps: int | None = setting(None, "steps of the stage; null: from the number of pairs", gt=0)
    prompts_per_step: int | None = setting(
        None, "prompts per step; null: from the number of pairs, at most 128", gt=0
    )
    group_size: int = setting(8, "samples per prompt, which GRPO compares", ge=2)
    mini_batch_prompts: int | None = setting(
        None, "prompts per update; divides prompts_per_step; null: all of them", gt=0
    )
    micro_batch_size: int = setting(
        1, "sequences per process and forward pass, unless padding is removed", gt=0
    )
    micro_batch_tokens: int = setting(
        24576, "without padding (flash_attention_2): tokens per process and forward pass", gt=0
    )
    learning_rate: float = setting(1e-6, "peak learning rate", gt=0)
    warmup_steps: int = setting(0, "steps in which the learning rate rises", ge=0)
    weight_decay: float = setting(0.01, "AdamW's weight decay", ge=0)
    kl_coefficient: float = setting(0.001, "weight of the KL loss against the stage's start; 0: none", ge=0)
    clip_ratio: float = setting(0.2, "clip range of the importance ratio", gt=0)
    entropy_coefficient: float = setting(0.0, "weight of the entropy bonus")
    temperature: float = setting(1.0, "sampling temperature of the rollouts", gt=0)
    outcome_weight: float = setting(1.0, "weight of the outcome reward")
    process_weight: float = setting(0.5, "weight of the judge's process reward")
    format_error: float = setting(-0.1, "reward of a chain that cannot be parsed")
    verified_weight: float = setting(
        0.0, "weight of the agreement of declared scores with the rubric's own sums; not in the paper"
    )
    null_policy: str = setting(
        "drop_process_for_group",
        "process reward where the judge gives no verdict",
        choices=("drop_process_for_group", "group_mean", "stop"),
    )
    rubric_dropout: float = setting(
        0.0,
        "share of a user's criteria that the judge does not see, others in each step (arXiv 2608.11669)",
        ge=0,
        lt=1,
    )
    resample: int = setting(0, "times that a group with equal rewards is sampled again", ge=0)
    max_null_share: float = setting(
        0.5,
        "the run stops if a step has a larger share of judged chains without a verdict; it can resume",
        ge=0,
        le=1,
    )
    save_every: int = setting(50, "steps between checkpoints; 0: only the last step", ge=0)
    validate_every: int = setting(
        25, "steps between validations, also at the start and the end; 0: none", ge=0
    )
    validate_pairs: int = setting(
        256, "validation pairs, in both orders, with their own, another user's and no history", gt=0
    )
    keep_checkpoints: int = setting(2, "checkpoints to keep", gt=0)
    stall_seconds: float = setting(
        1800.0, "time without progress after which the watchdog ends the run", gt=0
    )

    @property
    def steps_ahead(self) -> int:
        """Steps that are sampled before their turn."""
        return 0 if self.mode == SYNC else self.max_staleness

    @property
    def separate(self) -> bool:
        """Whether vLLM has GPUs of its own."""
        return self.mode == SEPARATE


@dataclass
class CurriculumConfig(GrpoConfig):
    process_weight: float = setting(0.0, "weight of the judge's process reward; none in the paper")
    schedule: str = setting(
        "linear",
        "how the share of hard pairs grows; uniform and anti are controls",
        choices=SCHEDULES,
    )
    hard_share_start: float = setting(0.3, "share of hard pairs in the first step", ge=0, le=1)
    hard_share_end: float = setting(0.8, "share of hard pairs in the last step", ge=0, le=1)
    hard_by: str = setting(
        "hardness",
        "what makes a pair hard: measured hardness, a short history, or a rare scenario",
        choices=("hardness", "history", "scenario"),
    )
    mine: bool = setting(True, "false: hardness from texts, ratings and other users' votes, without a model")
    similarity: str = setting(
        "trigrams",
        "what compares the two responses: trigrams of characters, or an embedder as in prototypes.embedder",
    )
    mining_samples: int = setting(4, "chains per pair from the CRE model, half of them in each order")
    hard_low: float = setting(
        0.25,
        "least pass rate of a hard pair (share of chains that rank chosen first); below, it may be suspect",
    )
    hard_high: float = setting(0.75, "highest pass rate of a hard pair")
    suspect_weight: float = setting(
        0.5,
        "draws of a suspect pair per draw of a pair that is neither hard nor suspect",
        ge=0,
        le=1,
    )
    user_balanced: bool = setting(False, "users take turns instead of pairs")
    construct: bool = setting(
        False, "up to half of rows: votes against the majority of other users, and near-equal ratings"
    )
    prototypes: str | None = setting(
        None, "a finished prototypes folder: construct also takes votes against another prototype's majority"
    )
