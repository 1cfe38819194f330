"""Settings of label and best_of_n, which choose among responses with a trained model."""

from dataclasses import dataclass

from pgenrm_train.config.setting import setting

_IND = "own chains per two responses and position"
_PRO = "similar users' chains per two responses and position; above 0 needs recipe=prototypes"


@dataclass
class LabelConfig:
    input: str | None = setting(
        None,
        "parquet or JSONL file of user_id, context and responses (docs/using.md); null: the responses of the "
        "run's pairs in eval.split",
    )
    max_prompts: int | None = setting(None, "prompts to label at most; null: all", gt=0)
    pairs_of: str = setting(
        "ends",
        "labels of a prompt: the best response against the worst, the best against each other one, or all two",
        choices=("ends", "best", "all"),
    )
    min_margin: float = setting(0.0, "labels whose two scores are closer than this are left out", ge=0)
    ind: int = setting(1, _IND, gt=0)
    pro: int = setting(0, _PRO, ge=0)


@dataclass
class BestOfNConfig:
    sizes: list[int] = setting([2, 4, 8, 16, 32], "numbers of candidates to choose from", ge=2)
    prompts: int = setting(120, "prompts, of as many users as possible; 0: all", ge=0)
    ind: int = setting(1, _IND, gt=0)
    pro: int = setting(0, _PRO, ge=0)
