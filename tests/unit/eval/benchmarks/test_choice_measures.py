"""Measures of choices by hand, and eval.tasks end to end on small files."""

import json

import pandas as pd
import pytest
from benchmark_files import reward_models, rewardbench, rmgap
from llm_server import serve

from eval.benchmarks.choices import (
    best_of_n,
    choices_of,
    consistency,
    pointwise,
    refuse_pairwise,
    tasks_of,
    votes_table,
)
from eval.lampqa.ranking import score_tasks
from eval.metrics.accuracy import accuracy_report
from eval.report.compare import compare
from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import load
from pgenrm_train.config.evaluation import task_of
from pgenrm_train.errors import ConfigError, DataError
from pgenrm_train.records.questions import Answer, UserQuestion
from recipes import evaluate
from recipes.wiring.benchmarks.tasks import config_of


def world(*winners, texts=None):
    """One group of prompts per winner, three answers a, b, c of 1, 2 and 3 words."""
    texts = texts or {"a": "x", "b": "x x", "c": "x x x"}
    questions = [
        UserQuestion(f"i/{w}{i}/{n}", f"{w} {n}", (), "", f"part{i}", f"i/{w}{i}", f"i{i}")
        for i, w in enumerate(winners)
        for n in range(3)
    ]
    answers = [Answer(q.id, k, t, float(q.question[0] == k)) for q in questions for k, t in texts.items()]
    return choices_of(questions, answers)


def scored(choices, score, seeds=1):
    tasks = tasks_of(choices, history_size=3, seeds=seeds, seed=0)
    return score_tasks(tasks, lambda examples: [score(e) for e in examples])


def longer(example):
    return [float(len(text)) for text in example.responses]


def test_each_two_responses_are_seen_in_both_orders():
    choices = world("a", "c")
    votes = votes_table(scored(choices, longer), choices)
    assert votes.groupby("pair_id")["order"].apply(sorted).map(tuple).unique().tolist() == [(0, 1)]
    report = accuracy_report(votes, draws=20)
    assert (report["accuracy"], report["n_pairs"], report["n_users"]) == (0.5, 12, 2)
    assert {k: s["accuracy"] for k, s in report["slices"].items()} == {"part0": 0.0, "part1": 1.0}


def test_best_of_n_and_consistency_by_hand():
    choices = world("b", "c")
    table = scored(choices, longer)
    best = best_of_n(table, choices, draws=20, seed=0)
    assert (
        best.overall["accuracy"] == 0.5
        and best.by_subset == {"part0": 0.0, "part1": 1.0}
        and best.macro == 0.5
    )
    assert consistency(table, choices, draws=20, seed=0).overall["accuracy"] == 1.0
    fickle = scored(
        choices, lambda e: [len(t) * (-1 if "0" in e.context[-1].content else 1) for t in e.responses]
    )
    assert consistency(fickle, choices, draws=20, seed=0).overall["accuracy"] == 0.0


def test_a_preference_for_a_place_is_half_right_and_ties_and_failures_are_misses():
    choices = world("a", "b")
    first = accuracy_report(votes_table(scored(choices, lambda e: [3.0, 2.0, 1.0]), choices), draws=20)
    assert first["accuracy"] == 0.5
    for score in (lambda e: [1.0] * 3, lambda e: None):
        table = scored(choices, score)
        assert accuracy_report(votes_table(table, choices), draws=20)["accuracy"] == 0.0
        assert best_of_n(table, choices, draws=20, seed=0).overall["accuracy"] == 0.0
    assert consistency(scored(choices, lambda e: None), choices, draws=20, seed=0).overall["accuracy"] == 0.0


def test_equal_texts_tie():
    choices = world("a", texts={"a": "same", "b": "same"})
    report = accuracy_report(votes_table(scored(choices, lambda e: [2.0, 1.0]), choices), draws=20)
    assert report["accuracy"] == 0.0 and report["ties"] == 6


def test_pointwise_scores_one_response_at_a_time():
    seen = []

    def model(examples):
        seen.extend(len(e.responses) for e in examples)
        return [longer(e) for e in examples]

    two = world("b", texts={"a": "x", "b": "x x"})
    assert pointwise(two, model, history_size=3, draws=20, seed=0).overall["accuracy"] == 1.0
    assert set(seen) == {1} and pointwise(world("a"), model, history_size=3, draws=20, seed=0) is None


def test_a_model_of_pairs_is_refused_in_one_sentence():
    choices = world("a")
    with pytest.raises(DataError, match="mine never returned one score for each of the 3 responses"):
        refuse_pairwise(scored(choices, lambda e: [1.0, 0.0]), choices, "mine")
    refuse_pairwise(scored(choices, longer), choices, "mine")
    refuse_pairwise(pd.DataFrame({"failure": []}), choices, "mine")


def test_a_question_needs_one_preferred_answer():
    question = UserQuestion("q", "?", (), "", "s")
    for grades in ((1.0, 1.0), (0.0, 0.0)):
        with pytest.raises(DataError, match="expected two or more, and one preferred"):
            choices_of([question], [Answer("q", m, m, g) for m, g in zip("ab", grades)])


def go(tmp_path, *keys):
    paths = {
        "personalized_rewardbench": rewardbench(tmp_path / "prb"),
        "rmgap": rmgap(tmp_path / "rmgap.jsonl"),
        "rm_as_user": reward_models(tmp_path / "rm"),
    }
    evaluate.run(
        load(
            "recipe=evaluate",
            "tracking=none",
            "eval.draws=20",
            "eval.seeds=1",
            "eval.probes=false",
            "eval.baselines=[random,majority]",
            *(f"+eval.task_paths.{name}={path}" for name, path in paths.items()),
            f"run_dir={tmp_path / 'run'}",
            *keys,
        )
    )
    return tmp_path / "run"


FUNCTIONS = """
def lengths(example):
    return [float(len(response)) for response in example.responses]

def first_of_two(example):
    return [1.0, 0.0]
"""


def test_a_function_is_asked_in_both_orders(tmp_path, monkeypatch):
    (tmp_path / "functions_of_a_user.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = ("model=callable", "model.name=functions_of_a_user:lengths")
    run = go(tmp_path, *model, "eval.tasks=[personalized_rewardbench,rmgap]")
    rows = {row["task"]: row for row in json.loads((run / "tasks.json").read_text())}
    assert rows["personalized_rewardbench@1"]["accuracy"] == 1.0
    assert rows["personalized_rewardbench@1"]["pointwise accuracy"] == 1.0
    assert rows["rmgap@1"]["best of n accuracy"] == 0.25
    with pytest.raises(DataError, match="never returned one score for each of the 4 responses"):
        go(
            tmp_path / "two",
            "model=callable",
            "model.name=functions_of_a_user:first_of_two",
            "eval.tasks=[rmgap]",
        )


def test_several_tasks_make_one_table_beside_published_figures(tmp_path, capsys):
    keys = ("model=baseline", "model.name=longer", "eval.tasks=[personalized_rewardbench@1,rmgap,rm_as_user]")
    run = go(tmp_path, *keys)
    rows = {row["task"]: row for row in json.loads((run / "tasks.json").read_text())}
    assert (
        rows["personalized_rewardbench@1"]["accuracy"]
        == rows["personalized_rewardbench@1"]["pointwise accuracy"]
        == 1.0
    )
    assert rows["rmgap@1"]["best of n accuracy"] == 0.25 and rows["rmgap@1"]["consistency accuracy"] == 1.0
    assert rows["rm_as_user@1"]["accuracy"] == 0.5
    shown = capsys.readouterr().out
    assert "49.3" in shown and "2605.01831" in shown and "Skipped baselines" in shown
    folder = run / "tasks" / "rmgap"
    results = json.loads((folder / "evaluate" / "results.json").read_text())
    assert (results["task"], results["task_version"], results["n_users"]) == ("rmgap", 1, 3)
    of_votes = json.loads((run / "tasks" / "rm_as_user" / "evaluate" / "results.json").read_text())
    assert (of_votes["task"], of_votes["task_version"]) == ("rm_as_user", 1)
    assert "Published figure" in (folder / "evaluate" / "report.md").read_text()
    same = compare((str(folder), str(folder)), draws=20, seed=0)
    assert same["overall"]["difference"] == 0.0 and same["overall"]["n_pairs"] == 108


def test_a_model_that_writes_chains_ranks_four_responses(tmp_path):
    chain = write_chain("The first.", [("place", 100)], [[9], [7], [4], [2]])
    with serve(lambda body, n: chain) as server:
        keys = ("model=endpoint", "model.name=stub", f"model.base_url={server.url}", "model.label=stub")
        run = go(tmp_path, *keys, "eval.tasks=[rmgap]")
        first = len(server.bodies)
    results = json.loads((run / "tasks" / "rmgap" / "evaluate" / "results.json").read_text())
    assert first == 36 * 2 and results["accuracy"] == 0.5 and results["failures"] == {}
    assert not any("zebra" in json.dumps(body) for body in server.bodies)


def test_a_task_has_the_settings_of_its_data_and_those_that_the_user_changed():
    """The default data are PersonaWorld, with a limit of test pairs and baselines that know its texts."""
    paths = "+eval.task_paths.rmgap=test.jsonl"
    tasks = ("recipe=evaluate", "model=baseline", "eval.tasks=[rmgap,chatbot_arena]", paths)
    config = load(*tasks, "eval.draws=7")
    assert config.data.max_test_pairs and "oracle" in config.eval.baselines
    of_task = config_of(config, task_of("rmgap"))
    assert (of_task.data.name, of_task.data.path, of_task.data.max_test_pairs) == (
        "rmgap",
        "test.jsonl",
        None,
    )
    assert (of_task.eval.baselines, of_task.eval.seeds) == (["random", "longer", "shorter"], 1)
    assert (of_task.eval.draws, of_task.eval.tasks, of_task.judge.kind) == (7, [], "none")
    arena = config_of(config, task_of("chatbot_arena"))
    assert (arena.eval.ind, arena.data.history_policy, arena.data.path) == ([1, 4], "random", None)
    chosen = ("eval.baselines=[random]", "data.max_test_pairs=9", "data.history_size=5", "eval.ind=2")
    changed = config_of(load(*tasks, *chosen), task_of("rmgap"))
    assert (changed.eval.baselines, changed.eval.ind) == (["random"], 2)
    assert (changed.data.max_test_pairs, changed.data.history_size) == (9, 5)
    nano = config_of(load("recipe=evaluate", "eval.tasks=[rmgap]", paths), task_of("rmgap"))
    assert (
        nano.data.max_test_pairs == load("recipe=evaluate", "data=rmgap", checked=False).data.max_test_pairs
    ), "nano's own"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("eval.tasks=[rmgab]", "rmgab is not one of chatbot_arena@1"),
        ("eval.tasks=[rm_as_user@7]", "this version of the code has rm_as_user@1"),
        ("eval.tasks=[rmgap]", r"needs \+eval\.task_paths\.rmgap="),
        ("+eval.task_paths.rmgab=x", r"eval\.task_paths names rmgab"),
    ],
)
def test_an_unknown_task_is_named(key, said):
    with pytest.raises(ConfigError, match=said):
        load("recipe=evaluate", key)
    assert str(task_of("rmgap")) == "rmgap@1"
