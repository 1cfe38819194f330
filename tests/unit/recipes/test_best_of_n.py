"""recipe=best_of_n on rated responses: choosers, favourite of the population, equal chains, bad input."""

import json

import numpy as np
import pandas as pd
import pytest
from llm_server import serve
from prism_world import CONVERSATION, SURVEY
from prompt_sections import split_prompt

from data_builders.sources import prism
from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import DataConfig, load
from pgenrm_train.errors import ArtifactError, ConfigError, DataError
from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.records.raw_rows import LeftOut
from pgenrm_train.records.slates import slates_of, user_by_user
from recipes.choosing import best_of_n
from recipes.wiring.choosing.references import others_mean, ratings_of, shuffled

TEXTS = ["a", "bb", "ccc", "dddd"]
TRAIN = [
    {"user_id": user, "context": f"t{n}", "chosen": "longer", "rejected": "x", "split": "train"}
    for user in ("ann", "bob", "eve")
    for n in range(2)
]
RATED = [
    {"user_id": user, "context": f"q{n}", "responses": TEXTS, "ratings": ratings, "split": "test"}
    for n in range(2)
    for user, ratings in (("ann", [10, 20, 30, 40]), ("bob", [41, 30, 20, 10]), ("eve", [11, 20, 41, 30]))
]


def longest(body, _number):
    sections = dict(split_prompt(body["messages"][-1]["content"]))
    texts = [sections[f"<response_{i}>"].strip() for i in (1, 2)]
    chain = write_chain("likes it long", [("length", 100)], [[float(len(text))] for text in texts])
    choice = {"finish_reason": "stop", "message": {"content": chain}}
    choices = [{"index": i, **choice} for i in range(body.get("n", 1))]
    return {"completion": {"choices": choices, "usage": {}, "object": "chat.completion", "model": "served"}}


def run(folder, url, rows, *keys):
    pd.DataFrame(rows).to_parquet(folder / "votes.parquet")
    best_of_n.run(
        load(
            "recipe=best_of_n", "model=endpoint", f"model.base_url={url}", "model.name=served", "data=pairs",
            f"data.path={folder / 'votes.parquet'}", "tracking=none", "eval.draws=50",
            "best_of_n.sizes=[2,4,8]", f"run_dir={folder / 'run'}", *keys,
        )
    )  # fmt: skip
    return json.loads((folder / "run" / "best_of_n" / "results.json").read_text())


def test_a_model_that_likes_long_answers_serves_those_who_do(tmp_path, capsys):
    with serve(longest) as server:
        found = run(tmp_path, server.url, [*TRAIN, *RATED])
        asked = len(server.bodies)
        run(tmp_path, server.url, [*TRAIN, *RATED], "eval.draws=60")
        assert len(server.bodies) == asked, "kept answers are not asked again"
    assert (found["prompts"], found["users"], found["failures"]) == (6, 3, {})
    assert found["population"] == "mean rating by the other users" and found["utility"] == "the user's rating"
    of = {(row["n"], row["chooser"]): row for row in found["chosen"]}
    assert {n for n, _ in of} == {2, 4}, "no prompt has eight"
    model, favourite = of[4, "model"], of[4, "population"]
    assert model["utility"] == of[4, "model, knockout"]["utility"] == pytest.approx(80 / 3)
    assert of[4, "random"]["utility"] == 25.25 and of[4, "best"]["utility"] == pytest.approx(122 / 3)
    assert model["best gain share"] == pytest.approx((80 / 3 - 25.25) / (122 / 3 - 25.25))
    # The others of ann and bob like ccc best, those of eve like a.
    assert favourite["utility"] == pytest.approx((30 + 20 + 11) / 3)
    assert [row["chains per prompt"] for row in found["schemes"]] == [2, 8]
    assert found["headline"] == model
    # Circles of four have all pairs of a round but the final's second sample, or a pair across.
    assert 6 * (8 + 2) <= found["chains"] <= 6 * (8 + 2 + 4)
    folder = tmp_path / "run" / "best_of_n"
    report = (folder / "report.html").read_text()
    assert "Over-optimisation" in report and "PolyCollection" in report and 'class="chain"' in report
    assert len(pd.read_parquet(folder / "choices.parquet")) == 6 * 2 * 5
    assert "Best of 4 by the model: utility 26.667" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "keys", "error", "sentence"),
    [
        ([*TRAIN, {**TRAIN[0], "context": "q", "split": "test"}], (), DataError, "no prompt with 2 rated"),
        (TRAIN, (), DataError, r"eval\.split=test of data=pairs holds no prompt"),
        ([*TRAIN, *RATED], ("best_of_n.sizes=[8]",), DataError, "no prompt with 8 rated responses"),
        ([*TRAIN, *RATED], ("best_of_n.pro=1",), ArtifactError, r"best_of_n\.pro=1 needs user prototypes"),
        (TRAIN, ("best_of_n.sizes=[1]",), ConfigError, r"best_of_n\.sizes=1 must be at least 2"),
        (TRAIN, ("best_of_n.sizes=[]",), ConfigError, r"best_of_n\.sizes=\[\] must name one size or more"),
        (TRAIN, ("eval.temperature=0", "eval.seeds=1", "eval.ind=1"), ConfigError, "above 0"),
    ],
)
def test_bad_input_ends_in_a_sentence(tmp_path, rows, keys, error, sentence):
    with serve(longest) as server, pytest.raises(error, match=sentence):
        run(tmp_path, server.url, rows, *keys)
    assert not server.bodies


def pair(user, name, chosen, rejected, scores=(None, None), turn=0):
    return PreferencePair(
        name, user, (Message("user", "q"),), chosen, rejected, "c", *scores, turn=turn, split="test"
    )


def test_pairs_of_one_prompt_become_a_slate_with_ratings():
    pairs = [
        pair("ann", "1", "a", "b", (9.0, 5.0)),
        pair("ann", "2", "a", "c", (9.0, 1.0)),
        pair("ann", "3", "a", "d", turn=1),
        pair("bob", "4", "b", "a", (8.0, 2.0)),
    ]
    first, later, other = slates_of(pairs)
    assert (first.responses, first.values) == (("a", "b", "c"), (9.0, 5.0, 1.0))
    assert (later.responses, later.values) == (("a", "d"), (None, None)) and later.prompt.turn == 1
    assert first.prefers(1, 2) and later.prefers(0, 1) is None and not other.prefers(1, 0)
    assert [s.key for s in user_by_user([first, later, other], 2)] == ["ann/1", "bob/4"]
    means = others_mean(first, ratings_of(pairs))
    assert means[:2].tolist() == [2.0, 8.0] and np.isnan(means[2]), "no other user rated c"
    mixed = shuffled(first, 1)
    assert dict(zip(mixed.responses, mixed.values)) == dict(zip(first.responses, first.values))


def test_turns_of_prism_become_slates_of_all_rated_responses(tmp_path):
    for name, row in (("survey", SURVEY), ("conversations", CONVERSATION)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    pairs = list(prism.build(DataConfig(name="prism", path=str(tmp_path)), 0, LeftOut()))
    found = [dict(zip(slate.responses, slate.values)) for slate in slates_of(pairs)]
    assert found == [{"A": 90, "B": 40, "C": 85}, {"E": 70, "D": 20}], "A and C are too close to be a pair"
