"""Settings of the data: source, history, splits and what a prompt hides."""

from dataclasses import dataclass

from pgenrm_train.config.setting import setting

VOTES = ("pairs", "chatbot_arena", "prism_personalized", "rm_as_user")  # sources whose rows are votes
CHOICES = ("personalized_rewardbench", "rmgap")  # questions with one preferred response, to evaluate on only
QUESTIONS = ("lampqa", *CHOICES)
MASKINGS = ("full", "masked", "history_dropout", "mixed")


@dataclass
class DataConfig:
    name: str = setting("personaworld", "source in data_builders/sources/")
    path: str | None = setting(None, "file or folder of the raw source")
    history_size: int = setting(3, "votes in a history; h, the paper's best (METHOD §1)", gt=0)
    history_policy: str = setting(
        "random",
        "choice of a history's votes: random (the paper's), similar queries, or PersonaWorld's scenario",
        choices=("random", "recent", "most_similar", "same_scenario"),
    )
    history_kind: str | None = setting(None, "draw history only from pairs of this kind")
    max_train_pairs: int | None = setting(None, "most training pairs; null: all", gt=0)
    max_val_pairs: int | None = setting(
        None, "most validation pairs on which prototypes are tested; null: all", gt=0
    )
    max_test_pairs: int | None = setting(None, "most test pairs to evaluate; null: all", gt=0)
    on_bad_row: str = setting(
        "fail",
        "for rows that do not fit the schema; skip counts and lists them",
        choices=("fail", "skip"),
    )
    on_overlap: str = setting(
        "fail",
        "for votes that their user repeats in a later split; drop counts them",
        choices=("drop", "fail"),
    )
    split_by: str = setting(
        "source",
        "source keeps the data's splits; docs/data.md defines the others",
        choices=("source", "within_user", "user_disjoint", "pair"),
    )
    val_share: float = setting(
        0.0,
        "share of training users held out for validation, if the data have no split=val",
        ge=0,
        le=0.5,
    )
    near_duplicates: bool = setting(True, "search near-duplicates, the slow part of the leak report")
    answers: str | None = setting(None, "LaMP-QA: file of the models' answers")
    only: dict[str, str | int | float | bool | None] = setting(
        {}, 'keep rows whose column has this value, e.g. {shared_context: "True"}'
    )
    pairs_of: str = setting(
        "best",
        "pairs of a row with several responses: best against every other, every two, or best against worst",
        choices=("best", "all", "ends"),
    )
    min_rating_gap: float = setting(10.0, "PRISM: least difference of two ratings that makes a pair")
    users: int = setting(3000, "PersonaWorld: users")
    heldout_users: int = setting(300, "PersonaWorld: users that no stage trains on")
    pairs_per_user: int = setting(12, "PersonaWorld: pairs per user")


@dataclass
class MaskingConfig:
    policy: str | None = setting(
        None,
        "one policy for all stages; null: psi.masking, cre.masking, curriculum.masking and eval.masking",
        choices=MASKINGS,
    )
    show_probability: float = setting(
        0.5,
        "probability of showing the criteria under mixed, or the whole history under history_dropout",
        ge=0,
        le=1,
    )
