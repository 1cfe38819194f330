"""recipe=label: a file or a run's pairs → a data set in TRL's schema with its card; bad input."""

import json

import datasets
import pandas as pd
import pytest
from llm_server import serve
from prompt_sections import split_prompt

from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import load
from pgenrm_train.errors import ArtifactError, ConfigError, DataError
from recipes.choosing import label

HISTORY = [{"query": "earlier", "chosen": "long words", "rejected": "x"}]
ROWS = [
    {"user_id": "ann", "context": "q1", "responses": ["bb", "a", "cccc"], "ratings": [2, 1, 3]},
    {"user_id": "ann", "context": "q2", "responses": ["same", "same"]},
    {"user_id": "bob", "context": [{"role": "user", "content": "q3"}], "responses": ["aa", "bb"]},
    {"user_id": "bob", "context": "q4", "responses": ["a", "fail"]},
    {"user_id": "bob", "context": "q5", "responses": ["a", "bbb"], "ratings": [5, None]},
]
FILE = [{**row, "history": HISTORY} for row in ROWS]


def longest(body, _number):
    """A chain that scores by length; none where a response is `fail`."""
    sections = dict(split_prompt(body["messages"][-1]["content"]))
    texts = [sections[f"<response_{i}>"].strip() for i in (1, 2)]
    if "fail" in texts:
        return "no chain"
    assert sections["<chosen>"].strip() == "long words"
    return write_chain("likes it long", [("length", 100)], [[float(len(text))] for text in texts])


def run(folder, url, *keys):
    label.run(
        load(
            "recipe=label", "model=endpoint", f"model.base_url={url}", "model.name=served", "tracking=none",
            "eval.draws=50", f"run_dir={folder / 'run'}", *keys,
        )
    )  # fmt: skip
    return json.loads((folder / "run" / "label" / "results.json").read_text())


def written(folder, rows):
    path = folder / "candidates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"label.input={path}"


def test_a_file_becomes_a_data_set_of_trl(tmp_path, capsys):
    with serve(longest) as server:
        found = run(tmp_path, server.url, written(tmp_path, FILE))
        asked, place = len(server.bodies), str(tmp_path / "run" / "label" / "dataset")
        cache = str(tmp_path / "cache")
        assert len(datasets.load_dataset(place, split="train", cache_dir=cache)) == 2
        assert run(tmp_path, server.url, written(tmp_path, FILE)) == found
        run(tmp_path, server.url, written(tmp_path, FILE), "label.min_margin=2.5")
        assert len(server.bodies) == asked == 6 + 3 * 2, "a second start asks nothing"
    assert found["labels"] == 2 and found["prompts"] == 4
    assert found["left_out"] == {
        "prompt with one distinct response": 1,
        "tie": 1,
        "response without a score (parse:no_markers)": 2,
    }
    assert found["failures"] == {"parse:no_markers": 2} and found["chains"] == 12
    assert found["agreement"]["compared labels"] == 1 and found["agreement"]["agreement accuracy"] == 1.0
    folder = tmp_path / "run" / "label"
    (row,) = datasets.load_dataset(place, split="train", cache_dir=cache)  # not the older ones
    assert row | {"confidence": None} == {
        "prompt": [{"role": "user", "content": "q1"}],
        "chosen": [{"role": "assistant", "content": "cccc"}],
        "rejected": [{"role": "assistant", "content": "a"}],
        "user_id": "ann",
        "prompt_id": "candidates-1",
        "score_chosen": 4.0,
        "score_rejected": 1.0,
        "margin": 3.0,
        "confidence": None,
        "responses": 3,
        "chains": 6,
        "totals": "declared",
    }
    assert 0.9 < row["confidence"] < 1
    card, report = (folder / "dataset" / "README.md").read_text(), (folder / "report.html").read_text()
    assert "margin below label.min\\_margin | 1 |" in card and "candidates.jsonl" in card
    assert str(tmp_path) not in card and "likes it long" in report and report.count('class="chain"') == 2
    assert "left out: 1 × tie" in capsys.readouterr().out


def test_votes_of_a_run_are_histories_and_the_held_out_ones_are_compared(tmp_path):
    votes = [
        {"user_id": user, "context": f"t{n}", "chosen": "long words", "rejected": "x", "split": "train"}
        for user in ("ann", "bob")
        for n in range(3)
    ] + [
        {"user_id": "ann", "context": "q", "responses": ["aaa", "b", "cc"], "ratings": [2, 3, 1]}
        | {"split": "test"},
        {"user_id": "bob", "context": "q", "chosen": "bbb", "rejected": "a", "split": "test"},
    ]
    pd.DataFrame(votes).to_parquet(tmp_path / "votes.parquet")
    data = "data=pairs", f"data.path={tmp_path / 'votes.parquet'}"
    with serve(longest) as server:
        found = run(tmp_path, server.url, *data, "label.pairs_of=all")
        assert found["labels"] == 4 and found["agreement"]["compared labels"] == 4
        assert found["agreement"]["agreement accuracy"] == 0.5, "bob's vote, and 2 of ann's three"
        stranger = written(tmp_path, [{"user_id": "eve", "context": "q", "responses": ["a", "b"]}])
        with pytest.raises(
            DataError, match=r"user 'eve' has no column history, and run_dir=\S+ holds no votes"
        ):
            run(tmp_path, server.url, *data, stranger)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "holds no rows; expected at least one prompt with candidates|is empty"),
        (
            [{"user_id": "a", "context": "q"}],
            r"row 1, field 'responses': expected a list of two texts or more",
        ),
        (
            [{"user_id": "a", "context": "q", "responses": ["x"]}],
            r"row 1, field 'responses': expected a list",
        ),
        ([FILE[1]], "holds no prompt with two different responses"),
        ([FILE[0] | {"pair_id": "p"}] * 2, "user 'ann' has two rows with pair_id 'p'"),
        ([FILE[0] | {"history": [{"query": "q"}]}], r"row 1, field 'history\[0\]': expected"),
        ([FILE[0] | {"ratings": [1]}], r"field 'ratings': expected one value for each of the 3 responses"),
    ],
)
def test_bad_candidates_end_in_a_sentence(tmp_path, rows, sentence):
    with serve(longest) as server, pytest.raises(DataError, match=sentence):
        run(tmp_path, server.url, written(tmp_path, rows))
    assert not server.bodies


def test_a_missing_file_checkpoint_or_prototypes_end_in_a_sentence(tmp_path):
    with serve(longest) as server:
        with pytest.raises(DataError, match=r"label\.input=absent\.jsonl does not exist"):
            run(tmp_path, server.url, "label.input=absent.jsonl")
        with pytest.raises(ArtifactError, match=r"label.pro=2 needs user prototypes"):
            run(tmp_path, server.url, written(tmp_path, FILE), "label.pro=2")
    with pytest.raises(ArtifactError, match="needs a complete curriculum or cre or psi"):
        label.run(load("recipe=label", f"run_dir={tmp_path / 'other'}", written(tmp_path, FILE)))
    with pytest.raises(ConfigError, match="recipe=label chooses by chains, and model=baseline writes none"):
        load("recipe=label", "model=baseline", "model.name=random")
    with pytest.raises(ConfigError, match=r"needs label\.ind=1"):
        load("recipe=label", "label.ind=2", "eval.temperature=0", "eval.seeds=1", "eval.ind=1")
