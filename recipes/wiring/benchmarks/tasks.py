"""`eval.tasks=[…]`: evaluate one model on several benchmarks, and print one table."""

import dataclasses
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

SECTIONS = ("eval", "masking", "teacher", "judge")  # that a choice of data= sets
KEPT = ("history_size", "history_policy", "max_test_pairs", "on_bad_row")  # of the section data


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
    """The configuration of one task: the settings of its data, and of the given ones those that were changed.

    A given setting counts as changed if it differs from its value under the given `data=`.  Otherwise a task
    would have the sizes and baselines of other data.
    """
    given, own = (_defaults(config, name) for name in (config.data.name, task.name))
    of_task = deepcopy(config)
    for section in SECTIONS:
        values = getattr(of_task, section)
        for field in dataclasses.fields(values):
            if getattr(values, field.name) == getattr(getattr(given, section), field.name):
                setattr(values, field.name, getattr(getattr(own, section), field.name))
    changed = {
        key: getattr(config.data, key)
        for key in KEPT
        if getattr(config.data, key) != getattr(given.data, key)
    }
    of_task.data = replace(own.data, **changed, path=config.eval.task_paths.get(task.name))
    of_task.eval.tasks = []
    beneath(of_task, f"tasks/{task.name}")
    return of_task


def _defaults(config: Config, data: str) -> Config:
    """The settings that belong to `data=`; of models only nano has sizes of its own."""
    model = "nano" if config.model.kind == "nano" else "baseline"
    budget = f"pipeline.budget={config.pipeline.budget}"
    return load(f"recipe={StageName.EVALUATE}", f"model={model}", f"data={data}", budget, checked=False)
