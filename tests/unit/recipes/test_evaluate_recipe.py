"""recipe=evaluate on a file of odd votes: unusable votes are named or counted, the rest is evaluated."""

import json

import pytest
from llm_server import serve

from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import load
from pgenrm_train.errors import ArtifactError, DataError
from recipes import evaluate
from recipes.wiring.evaluation import without_prototypes


def vote(number, user, split, chosen, rejected):
    row = {
        "conversation_id": f"c{number}",
        "user_id": user,
        "context": [{"role": "user", "content": f"question {number}"}],
        "split": split,
    }
    texts = {"chosen": chosen, "rejected": rejected}
    return row | {
        name: {"role": "model", "content": text} for name, text in texts.items() if text is not None
    }


VOTES = [
    *(vote(n, "known", "train", f"a long answer {n}", "short") for n in range(6)),
    vote(10, "known", "test", "a long answer", "short"),
    vote(11, "known", "test", "the same", "the same"),
    vote(12, "stranger", "test", "x" * 100_000, "y"),
    vote(13, "stranger", "test", "良い答えです", "悪い"),
]
UNLABELLED = [vote(14, "known", "test", None, "b"), vote(15, "known", "test", "a", None)]


def results(tmp_path, votes, *keys):
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(v) + "\n" for v in votes))
    evaluate.run(
        load(
            "recipe=evaluate",
            "data=pairs",
            f"data.path={path}",
            "model=baseline",
            "model.name=user_length",
            "eval.baselines=[random]",
            "eval.draws=20",
            "tracking=none",
            f"run_dir={tmp_path / 'run'}",
            *keys,
        )
    )
    folder = tmp_path / "run" / "evaluate"
    return json.loads((folder / "results.json").read_text()), (folder / "report.md").read_text()


def test_a_vote_without_a_label_is_named_or_counted(tmp_path):
    with pytest.raises(DataError, match="row 11, field 'chosen'"):
        results(tmp_path, [*VOTES, *UNLABELLED])
    found, report = results(tmp_path, [*VOTES, *UNLABELLED], "data.on_bad_row=skip")
    assert found["n_pairs"] == 4 and "2 rows that do not fit were left out" in report
    assert found["odd_inputs"] == {
        "identical responses": 1,
        "empty history": 2,
        "a text above 20,000 characters": 1,
    }
    assert "2, 1 without votes in train" in report
    assert (found["accuracy"], found["ties"]) == (0.75, 2), (
        "the stranger takes the population's direction, identical responses tie"
    )


def test_a_file_of_test_votes_alone_can_be_evaluated_and_nothing_is_learnt(tmp_path):
    baselines = "eval.baselines=[random,longer,majority]"
    found, report = results(tmp_path, VOTES[6:], baselines)
    assert found["n_pairs"] == 4 and found["odd_inputs"]["empty history"] == 4 and found["ties"] == 8, (
        "no direction is known"
    )
    assert found["baselines"]["longer"]["accuracy"] == 0.75 and "2, 2 without votes in train" in report
    with pytest.raises(
        DataError, match="features learns from votes with split=train, and the data holds none"
    ):
        results(tmp_path, VOTES[6:], "eval.baselines=[features]")


def test_similar_users_without_prototypes_raise_before_any_question(tmp_path):
    first = write_chain("The first, always.", [("place", 100)], [[9], [2]])
    with serve(lambda body, n: first) as server:
        model = (
            "model=endpoint",
            "model.name=stub",
            f"model.base_url={server.url}",
            "eval.seeds=1",
            "eval.probes=false",
            "eval.baselines=[]",
        )
        with pytest.raises(ArtifactError, match=r"eval\.pro=2 needs user prototypes, .* or use eval\.pro=0"):
            results(tmp_path, VOTES, *model, "eval.ind=2", "eval.pro=2")
        assert server.bodies == []
        found, report = results(
            tmp_path,
            VOTES,
            *model,
            "eval.ind=[1,2]",
            "eval.pro=[0,2]",
            "eval.one_pair_ind=[1]",
            "eval.one_pair_pro=[0,2]",
        )
    assert [(row["ind"], row["pro"]) for row in found["grids"]["scaling"]] == [(1, 0), (2, 0)]
    assert [(row["ind"], row["pro"]) for row in found["grids"]["one_pair"]] == [(1, 0)]
    assert "this run has no prototypes" in report
    plain = load(
        "recipe=evaluate",
        "eval.pro=0",
        "eval.one_pair_ind=[]",
        "eval.one_pair_pro=[0,2]",
        f"run_dir={tmp_path / 'run'}",
    )
    assert without_prototypes(plain) == (plain, []), "no grid, no note"


def test_a_file_of_one_user(tmp_path):
    found, report = results(tmp_path, VOTES[:8])
    assert (found["n_users"], found["ci95"], found["accuracy"]) == (1, [0.0, 1.0], 0.5)
    assert "no interval over users is possible" in report and "was not tested" in report
