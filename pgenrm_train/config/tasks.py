"""Benchmarks by name and version, for `eval.tasks`: several data sets, one model, one table.

The version counts changes of ours to the builder or to the metrics: results of two versions of a task are not
compared.
"""

from dataclasses import dataclass

from pgenrm_train.errors import ConfigError


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


_RELEASE = "one random order; ties and failures leave"
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
            "mean over domains; failures leave",
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
