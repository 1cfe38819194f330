"""One pool per grid: its questions, similar users, failures, and adaptive stopping."""

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from prompt_sections import split_prompt

from eval.ask.harness import PredictionStore, ask
from eval.report.summary import headline
from eval.studies import evaluation
from eval.studies.scaling_study import SETTLED, Similar, Study, cells, controlled, replayed, sample_pool
from pgenrm_train.backends.protocols import Generation
from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import Config, load, seeds_of_grid
from pgenrm_train.prompts.messages import chat_messages
from pgenrm_train.records.pairs import HistoryItem, Message, PreferencePair
from recipes.wiring.costs import evaluation_calls

PAIRS = [
    PreferencePair(f"p{i}", f"u{i % 5}", (Message("user", f"q{i}"),), f"good {i}", f"bad {i}")
    for i in range(20)
]
HISTORIES = {p.pair_id: (HistoryItem("earlier", "mine", "other"),) for p in PAIRS}


class Model:
    """Scores the good response higher in `share` of its chains; `broken` chains cannot be read."""

    def __init__(self, share=1.0, broken=lambda request, sample: False):
        self.share, self.broken, self.samples = share, broken, Counter()

    def __call__(self, requests, *, temperature):
        for request in requests:
            sections = dict(split_prompt(request.messages[-1]["content"]))
            self.samples[sections["<chosen>"]] += request.samples
            good = [8.0 if sections[f"<response_{i}>"].startswith("good") else 3.0 for i in (1, 2)]
            for sample in range(request.samples):
                right = np.random.default_rng(request.seed + sample).random() < self.share
                scores = [[s] for s in (good if right else reversed(good))]
                broken = self.broken(request, sample)
                text = (
                    "no chain"
                    if broken
                    else write_chain(f"likes {sections['<query>']}", [("taste", 100)], scores)
                )
                yield Generation(request.key, sample, text)

    def close(self): ...


def find(analyses, users, n):
    """Up to 4 similar users, named by rank."""
    return [
        [
            Similar(f"other{rank}", (HistoryItem("theirs", f"theirs {rank}", "x"),))
            for rank in range(min(n, 4))
        ]
        for _ in users
    ]


def pool_of(folder, model, study, pairs=PAIRS, finder=find, **more):
    def answer(questions):
        return ask(
            questions,
            lambda: model,
            chat_messages,
            PredictionStore(folder, "m"),
            masking="masked",
            temperature=0.7,
            progress=lambda items, *_: items,
            what="test",
        )

    return sample_pool(study, pairs, HISTORIES, answer, finder, **more)


def config(**settings):
    made = Config(recipe="evaluate")
    made.eval.draws = 50
    for name, value in settings.items():
        setattr(made.eval, name, value)
    return made


def test_the_whole_grid_costs_no_more_than_its_largest_cell(tmp_path):
    study, largest = Study("scaling", (0, 1, 4, 8, 16), (0, 4)), Study("scaling", (16,), (4,))
    one, whole = Model(), Model()
    pool_of(tmp_path / "largest", one, largest)
    pool = pool_of(tmp_path / "grid", whole, study)
    assert whole.samples == one.samples and sum(one.samples.values()) == 20 * 2 * (16 + 4)
    rows = cells(pool, study, config())
    assert [(r["ind"], r["pro"]) for r in rows] == [
        (m, n) for m in (0, 1, 4, 8, 16) for n in (0, 4) if m or n
    ]
    assert all(r["ci95"][0] <= r["accuracy"] <= r["ci95"][1] and r["pairs"] == 20 for r in rows)
    assert all("paired difference ci95" in r for r in rows[1:])


def test_random_users_share_the_own_chains_and_differ_only_in_whose_histories_are_read(tmp_path):
    """A model that reads `theirs` right and `strangers` wrong: the whole difference is the similar users'."""

    def strangers(analyses, users, n):
        return [
            [Similar(f"far{rank}", (HistoryItem("theirs", f"strange {rank}", "x"),)) for rank in range(n)]
            for _ in users
        ]

    class Reader(Model):
        def __call__(self, requests, *, temperature):
            for request in requests:
                self.share = 0.0 if "strange" in request.messages[-1]["content"] else 1.0
                yield from super().__call__([request], temperature=temperature)

    model, study = Reader(), Study("scaling", (1, 3), (0, 2), weights=(1.0, 2.0))
    pool = pool_of(tmp_path, model, study)
    asked = sum(model.samples.values())
    control = pool_of(tmp_path, model, study, finder=strangers)
    assert sum(model.samples.values()) - asked == 40 * 2, "own chains are not sampled again"
    rows = controlled(pool, control, study, config())
    assert [(row["ind"], row["pro"]) for row in rows] == [(1, 2), (3, 2)]
    for row in rows:
        assert (row["similar users accuracy"], row["random users accuracy"]) == (1.0, 0.0)
        assert row["similar − random difference"] == 1.0 and row["similar − random difference ci95"] == [1, 1]
    assert rows[0]["own chains accuracy"] == 1.0 and rows[0]["similar − own difference"] == 0.0
    assert "own chains accuracy" not in rows[1], "no cell has five own chains"


def test_every_seed_of_a_grid_has_samples_of_its_own_and_the_standard_error_is_over_them(tmp_path):
    study = Study("scaling", (2,), (1,), seeds=3)
    pool = pool_of(tmp_path, model := Model(0.6), study)
    assert sum(model.samples.values()) == 3 * 20 * 2 * (2 + 1) == len(pool) and set(pool["seed"]) == {0, 1, 2}
    alone = Study("scaling", (2,), (1,))
    one, three = cells(pool[pool["seed"] == 0], alone, config())[0], cells(pool, study, config())[0]
    means = [cells(pool[pool["seed"] == seed], study, config())[0]["accuracy"] for seed in range(3)]
    assert len(set(means)) > 1 and "stderr" not in one
    assert three["accuracy"] == pytest.approx(np.mean(means)) and three["stderr"] == pytest.approx(
        np.std(means, ddof=1) / 3**0.5
    )


def test_a_larger_grid_asks_for_what_is_new(tmp_path):
    pool_of(tmp_path, first := Model(), Study("scaling", (4,), (2,)))
    pool_of(tmp_path, second := Model(), Study("scaling", (1, 16), (0, 4)))
    assert sum(first.samples.values()) == 40 * 6 and sum(second.samples.values()) == 40 * (12 + 2)


def test_similar_users_are_asked_by_their_own_history_and_ranked(tmp_path):
    model = Model()
    pool = pool_of(tmp_path, model, Study("scaling", (1,), (3,)))
    assert model.samples == {"mine": 40, "theirs 0": 40, "theirs 1": 40, "theirs 2": 40}
    similar = pool[pool["source"] == "pro"]
    assert set(zip(similar["sample"], similar["neighbour"])) == {
        (rank, f"{rank}/other{rank}") for rank in range(3)
    }


def test_too_few_similar_users_reduce_n_visibly(tmp_path):
    study = Study("scaling", (1,), (6,))
    pool = pool_of(tmp_path, Model(), study)
    assert (pool["failure"] == "no_neighbour").sum() == 40 * 2 and len(pool) == 40 * 7
    assert cells(pool, study, config())[0]["samples used"] == 1 + 4


def test_chains_that_cannot_be_read_reduce_m_and_n_visibly(tmp_path):
    def broken(request, sample):
        kind, _, _, _, _, neighbour, _ = json.loads(request.key)
        return sample == 1 if kind.endswith("own") else neighbour.startswith("0/")

    study = Study("scaling", (4,), (2,))
    pool = pool_of(tmp_path, Model(broken=broken), study)
    assert len(pool) == 40 * 6 and pool["failure"].notna().sum() == 40 * 2
    assert cells(pool, study, config())[0]["samples used"] == 3 + 1


def test_a_pair_without_a_readable_analysis_keeps_its_place(tmp_path):
    def broken(request, sample):
        return '"p3"' in request.key and sample == 0

    study = Study("scaling", (2,), (2,))
    pool = pool_of(tmp_path, Model(broken=broken), study)
    lost = pool[(pool["pair_id"] == "p3") & (pool["source"] == "pro")]
    assert set(lost["failure"]) == {"no_analysis"} and len(lost) == 2 * 2
    assert cells(pool, study, config())[0]["pairs"] == 20


def test_adaptive_sampling_draws_less_and_decides_the_same(tmp_path):
    study = Study("scaling", (16,), (0,))
    pool_of(tmp_path / "full", full := Model(0.9), study)
    pool = pool_of(tmp_path / "adaptive", fewer := Model(0.9), study, adaptive=0.1)
    assert sum(full.samples.values()) == 640 and sum(fewer.samples.values()) < 0.65 * 640
    assert (pool["failure"] == SETTLED).sum() + sum(fewer.samples.values()) == 640
    row = cells(pool, study, config(adaptive=0.1))[0]
    assert (
        row["saved share"] == pytest.approx(1 - sum(fewer.samples.values()) / 640) and row["accuracy"] == 1.0
    )


def test_adaptive_sampling_draws_as_a_replay_on_the_full_pool(tmp_path):
    study = Study("scaling", (16,), (3,))
    full = pool_of(tmp_path / "full", Model(0.7), study)
    fewer = pool_of(tmp_path / "adaptive", Model(0.7), study, adaptive=0.1)
    saved = replayed(full, study, config())
    assert saved["saved share"] == pytest.approx((fewer["failure"] == SETTLED).sum() / 640)
    assert saved["accuracy"] == cells(fewer, study, config())[0]["accuracy"]
    assert replayed(fewer, study, config()) is None


def test_adaptive_sampling_goes_on_where_it_was_stopped(tmp_path):
    study, model = Study("scaling", (16,), (0,)), Model(0.6)
    pool = pool_of(tmp_path, model, study, adaptive=0.1)
    again = Model(0.6)
    pd.testing.assert_frame_equal(pool_of(tmp_path, again, study, adaptive=0.1), pool)
    assert not again.samples


@pytest.mark.parametrize(("ind", "stops"), [((8,), True), ((1, 8), False)])
def test_only_a_study_of_one_cell_stops_early(ind, stops, tmp_path):
    """The smaller cells of a grid need the samples that adaptive stopping saves in the largest one."""
    tests = evaluation.Evaluation(config(probes=False, adaptive=0.1), PAIRS, HISTORIES)
    candidate = evaluation.Candidate("psi", "m", lambda: Model(0.9), lambda: chat_messages, lambda: None)
    grid = tests.study(
        Study("one_pair", ind, (0,)), candidate, HISTORIES, tmp_path, lambda items, *_: items, None
    )
    assert (grid.pool["failure"] == SETTLED).any() == stops
    assert all(row["samples used"] == pytest.approx(row["ind"]) for row in grid.rows) or stops


def test_weights_count_in_every_cell_and_in_what_stops_sampling(tmp_path):
    """A neighbour who always prefers the bad response: its weight decides against the own samples."""

    class Contrary(Model):
        def __call__(self, requests, *, temperature):
            for request in requests:
                theirs = dict(split_prompt(request.messages[-1]["content"]))["<chosen>"].startswith("theirs")
                yield from Model(0.0 if theirs else 1.0)([request], temperature=temperature)

    def accuracy(*weights, adaptive=None):
        study = Study("scaling", (8,), (2,), weights)
        pool = pool_of(tmp_path / str((weights, adaptive)), Contrary(), study, adaptive=adaptive)
        return cells(pool, study, config())[0]["accuracy"]

    for adaptive in (None, 0.1):
        found = [accuracy(*weights, adaptive=adaptive) for weights in ((1.0, 0.5), (0.5, 1.0), (1.0, 0.0))]
        assert found == [1.0, 0.0, 1.0]


def test_a_grid_that_varies_both_ways_has_a_heat_map(tmp_path):
    from eval.report.figures import grid_heat_map
    from eval.studies.evaluation import Grid

    study = Study("scaling", (0, 1), (0, 2))
    pool = pool_of(tmp_path, Model(), study, PAIRS[:4])
    [(title, svg)] = grid_heat_map(Grid(study, pool, cells(pool, study, config())))
    assert (
        "m own samples" in title
        and all(name in svg for name in ("Ind-0", "Ind-1", "Pro-0", "Pro-2"))
        and svg.count("100.0") == 3
    )
    assert grid_heat_map(Grid(Study("scaling", (0, 1), (0,)), pool, [])) == []


def test_one_cell_is_the_headline_and_sampled_in_every_seed(tmp_path):
    one, grid = (
        load("recipe=evaluate", f"eval.ind={ind}", "eval.pro=2", "eval.seeds=2") for ind in ("4", "[4]")
    )
    assert (seeds_of_grid(one.eval), seeds_of_grid(grid.eval)) == (2, 1)
    study, model = Study("scaling", (4,), (2,), seeds=3), Model(share=0.7)
    pool = pool_of(tmp_path, model, study)
    assert sum(model.samples.values()) == 3 * 20 * 2 * (4 + 2) and sorted(pool["seed"].unique()) == [0, 1, 2]
    [row] = cells(pool, study, config())
    final = evaluation.Tested("psi", pool, {"model": "psi"}, None, None)
    made = config(ind=4, pro=2)
    found = headline(made, final, [evaluation.Grid(study, pool, [row])])
    assert (found["ind"], found["pro"], found["seeds"]) == (4, 2, [0, 1, 2])
    assert found["stderr"] == row["stderr"] > 0 and found["accuracy"] == row["accuracy"]
    assert "stderr" not in cells(pool, Study("scaling", (4,), (2,)), config())[0]


def test_the_estimate_of_calls_counts_the_seeds_of_the_headline_cell():
    tests = evaluation.Evaluation(config(probes=False), PAIRS, HISTORIES)
    cell, grid = (evaluation_calls(config(ind=ind, pro=2, probes=False), tests) for ind in (4, [4]))
    probes = evaluation_calls(config(ind=4, pro=2, probe_pairs=6), tests) - cell
    control = evaluation_calls(config(ind=4, pro=2, probes=False, random_users=True), tests) - cell
    assert control == 2 * 20 * 5 * 2
    assert probes == 2 * 6 * len(config().eval.probe_kinds) > 0
    assert (cell, grid) == (2 * 20 * 5 * (1 + 4 + 2), 2 * 20 * (5 + 4 + 2))


def test_ties_are_a_share_of_what_a_cell_decides(tmp_path):
    study = Study("scaling", (1, 4), (0,))
    pool = pool_of(tmp_path, Model(), study, PAIRS[:4]).assign(score_chosen=5.0, score_rejected=5.0)
    assert [row["tie share"] for row in cells(pool, study, config())] == [1.0, 1.0], (
        "one sample is drawn four times as often as four"
    )
