"""Settings of evaluate, score, label and best_of_n, and the benchmarks of `eval.tasks`.

A task's version counts changes of ours to the builder or to the measures: results of two versions are not
compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pgenrm_train.config.data import MASKINGS
from pgenrm_train.config.model import BASELINES, PERSONA_BASELINE
from pgenrm_train.config.setting import setting
from pgenrm_train.errors import ConfigError

PROTOCOLS = ("strict", "both_orders", "release", "user_disjoint")
PROBES = ("swapped_history", "empty_history", "shuffled_history", "padded", "injected", "paraphrased")

_IND = "own chains per pair of responses and presentation order"
_PRO = "similar users' chains per pair and presentation order; above 0 needs recipe=prototypes"


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark: its name (also that of `data=`), our version, and the published figure to show."""

    name: str
    version: int
    measure: str  # of the published figure, as in our results
    published: float | None = None
    system: str = ""
    source: str = ""
    protocol: str = ""  # of the published figure

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


_RELEASE = "one random order; ties and failures dropped"
TASKS = {
    task.name: task
    for task in (
        Task("chatbot_arena", 1, "accuracy", 0.7268, "P-GenRM 8B", "arXiv 2602.12116", _RELEASE),
        Task("prism_personalized", 1, "accuracy", 0.6532, "P-GenRM 8B", "arXiv 2602.12116", _RELEASE),
        Task(
            "personalized_rewardbench",
            1,
            "accuracy",
            0.7594,
            "the best of its paper",
            "arXiv 2604.07343",
            "one shuffled order; a failed answer counts as the first response",
        ),
        Task(
            "rmgap",
            1,
            "best of n accuracy",
            0.4927,
            "the best of its paper",
            "arXiv 2605.01831",
            "mean over domains; failures dropped",
        ),
        Task("rm_as_user", 1, "accuracy"),
    )
}


def task_of(text: str) -> Task:
    """The task of `NAME` or `NAME@VERSION`.  ConfigError for another name or version."""
    name, _, version = text.partition("@")
    task = TASKS.get(name)
    if task is None:
        raise ConfigError(f"eval.tasks={text} is not one of {', '.join(map(str, TASKS.values()))}")
    if version not in ("", str(task.version)):
        raise ConfigError(
            f"eval.tasks={text}: this version of the code has {task}; use the commit that made the results "
            "to compare with"
        )
    return task


@dataclass
class EvalConfig:
    protocol: str = setting(
        "strict",
        "the headline accuracy; docs/evaluation.md defines each",
        choices=PROTOCOLS,
    )
    split: str = setting("test", "split to evaluate", choices=("train", "val", "test"))
    masking: str = setting("masked", "masking policy of the stage", choices=MASKINGS)
    seeds: int = setting(5, "evaluation seeds; the standard error is over them", gt=0)
    ind: Any = setting(
        1,
        "own samples per pair and order (Ind-m): a number from 0; a list adds a grid to Ind-1",
    )
    pro: Any = setting(0, "chains from histories of similar users (Pro-n): a number from 0, or a list")
    weights: list[float] = setting(
        [1.0, 1.0], "weights of the means over own samples and over similar users' chains"
    )
    adaptive: float | None = setting(
        None, "error level at which sampling of a pair stops before eval.ind; null: sample all", gt=0, lt=1
    )
    one_pair_ind: list[int] = setting([], "own samples of a second grid, for users with one known vote")
    one_pair_pro: list[int] = setting([], "similar users' chains of that grid")
    random_users: bool = setting(
        False, "control of the grids: histories of random training users in place of similar ones"
    )
    grid_pairs: int | None = setting(None, "pairs of the grids; null: all")
    grid_seeds: int = setting(
        1, "pools of a grid, each with its own samples; the standard error is over them", gt=0
    )
    temperature: float = setting(
        0.7, "sampling temperature; 0 is greedy and needs one sample per question", ge=0
    )
    greedy: bool = setting(
        True, "also judge each pair by the likeliest chain of a local model, without sampling"
    )
    max_in_flight: int = setting(256, "samples at the same time, over all questions", gt=0)
    draws: int = setting(2000, "draws of the bootstrap", gt=0)
    probes: bool = setting(True, "run the robustness probes of the final model")
    probe_kinds: list[str] = setting(list(PROBES), "probes to run", choices=PROBES)
    probe_pairs: int = setting(200, "pairs of these probes", gt=0)
    baselines: list[str] = setting(
        ["random", "longer", "shorter", "majority"],
        "baselines next to the model",
        choices=(*BASELINES, PERSONA_BASELINE),
    )
    personas: str | None = setting(
        None, "folder of SynthesizeMe's personas, for the baseline synthesize_me (docs/evaluation.md)"
    )
    compare: list[str] = setting([], "two run folders: compare them and evaluate nothing")
    tasks: list[str] = setting(
        [],
        "benchmarks, NAME or NAME@VERSION (docs/evaluation.md); each has the settings of its own data=",
    )
    task_paths: dict[str, str] = setting({}, "copies on disk of the benchmarks, by name, in place of the hub")
    cache: str | None = setting(
        None, "a folder of answers that several runs share; null: each run keeps its own"
    )
    chains_in_report: int = setting(12, "chains that the report shows")


@dataclass
class ScoreConfig:
    input: str | None = setting(None, "JSON file with user, history, query and responses")
    ind: int = setting(
        1, "chains from the user's own history; one is the likeliest, several are sampled", gt=0
    )
    pro: int = setting(0, "chains from similar users' histories, one per user", ge=0)
    temperature: float | None = setting(
        None, "sampling temperature; null: 0 for one chain, eval.temperature for several", ge=0
    )
    dry_run: bool = setting(False, "print the chat messages as JSON and start nothing")


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
        "labels of a prompt: the best response against the worst, the best against each other one, or every "
        "two",
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


@dataclass
class LeaderboardConfig:
    runs: list[str] = setting([], "run folders with a finished evaluation, or folders of runs")


def sizes(value: int | Sequence[int]) -> tuple[int, ...]:
    """`eval.ind` or `eval.pro` as a tuple."""
    return (value,) if isinstance(value, int) else tuple(value)


def seeds_of_grid(settings: EvalConfig) -> int:
    """Evaluation seeds of the Ind-m/Pro-n samples: all for one cell, `grid_seeds` for a grid."""
    return (
        settings.grid_seeds
        if isinstance(settings.ind, list) or isinstance(settings.pro, list)
        else settings.seeds
    )
