"""`eval.tasks=[…]`: evaluate one model on several benchmarks, and print one table."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from eval.benchmarks.summary import published_row, tasks_table
from eval.report.console import text_table
from pgenrm_train.config import TRAINED, Config, StageName, beneath, load
from pgenrm_train.config.evaluation import Task, task_of
from pgenrm_train.files import read_json, write_json, write_text
from pgenrm_train.stages.stage import newest


def run_tasks(config: Config, evaluate: Callable[[Config], None]) -> None:
    """Run `evaluate` per task in `<run_dir>/tasks/NAME`, then write and print tasks.json and tasks.txt."""
    tasks = [task_of(text) for text in config.eval.tasks]
    model = config.model
    if model.kind in ("nano", "hf") and not model.path:
        model = replace(model, path=str(newest(config, *reversed(TRAINED)).path / "checkpoint"))
    results = {}
    for task in tasks:
        print(f"== {task}", flush=True)
        of_task = config_of(replace(config, model=model), task)
        evaluate(of_task)
        results[task.name] = read_json(Path(of_task.run_dir) / StageName.EVALUATE / "results.json")
    folder, rows = Path(config.run_dir), tasks_table(results, tasks)
    text = text_table(rows, f"{len(tasks)} tasks: accuracy in % [95 % interval]", 150)
    text += text_table([published_row(task) for task in tasks], "Published, each under its own protocol", 150)
    write_json(folder / "tasks.json", rows)
    write_text(folder / "tasks.txt", text)
    print(text, end="")


def config_of(config: Config, task: Task) -> Config:
    """The configuration of one task: its data, everything else as given."""
    data = load(f"recipe={StageName.EVALUATE}", f"data={task.name}", checked=False).data
    data.path = config.eval.task_paths.get(task.name)
    kept = ("history_size", "history_policy", "max_test_pairs", "on_bad_row")
    for key in kept:
        setattr(data, key, getattr(config.data, key))
    of_task = replace(deepcopy(config), data=data, eval=replace(config.eval, tasks=[]))
    beneath(of_task, f"tasks/{task.name}")
    return of_task
