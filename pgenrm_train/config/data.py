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
        "which votes enter a history; random is the paper's, most_similar compares queries, "
        "same_scenario is PersonaWorld's",
        choices=("random", "recent", "most_similar", "same_scenario"),
    )
    history_kind: str | None = setting(None, "draw history only from pairs of this kind")
    max_train_pairs: int | None = setting(None, "most training pairs; null: all")
    max_val_pairs: int | None = setting(None, "most validation pairs that prototypes are tried on; null: all")
    max_test_pairs: int | None = setting(None, "most test pairs to evaluate; null: all")
    on_bad_row: str = setting(
        "fail",
        "what happens to a row that cannot be read; skip counts and lists it",
        choices=("fail", "skip"),
    )
    on_overlap: str = setting(
        "fail",
        "what happens to a vote that its user casts again in a later split; drop counts it",
        choices=("drop", "fail"),
    )
    split_by: str = setting(
        "source",
        "source keeps the split of the records; pair puts all voters on a pair into one split",
        choices=("source", "within_user", "user_disjoint", "pair"),
    )
    val_share: float = setting(
        0.0,
        "share of the training users to hold out for validation, where the data has no split=val",
        ge=0,
        le=0.5,
    )
    near_duplicates: bool = setting(True, "search near-duplicates for the leak report; its slow part")
    answers: str | None = setting(None, "LaMP-QA: file of the models' answers")
    only: dict[str, str | int | float | bool | None] = setting(
        {}, 'keep rows whose column has this value, e.g. {shared_context: "True"}'
    )
    pairs_of: str = setting(
        "best",
        "pairs of a row with several rated responses: the best against each other one, all two, or the best "
        "against the worst",
        choices=("best", "all", "ends"),
    )
    min_rating_gap: float = setting(
        10.0, "PRISM: points between two ratings that make a pair; closer ones are near-equal"
    )
    users: int = setting(3000, "PersonaWorld: users")
    heldout_users: int = setting(300, "PersonaWorld: users whose votes no stage trains on")
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
