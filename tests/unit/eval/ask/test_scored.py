"""Models that give scores: any function and a reward head, blind to labels, with every failure kept."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from eval.ask.harness import PredictionStore, own_questions
from eval.ask.scored import ask_scores, one_by_one, score_pairs, validate_scores
from eval.metrics.accuracy import accuracy_report
from eval.studies.evaluation import Evaluation, ScoredCandidate
from pgenrm_train.backends.vllm.reward_head import RewardHead, _batches
from pgenrm_train.config import ROOT, Config, load
from pgenrm_train.errors import ArtifactError, ConfigError, DataError
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.records.pairs import ExplicitSignals, HistoryItem, Message, PreferencePair
from pgenrm_train.records.rows import pair_to_row, read_pairs
from recipes.wiring.candidates import candidates
from recipes.wiring.evaluation import check_split

PAIRS = [
    PreferencePair(
        f"p{n}",
        f"u{n % 3}",
        (Message("user", f"q{n}"),),
        "tea" * (1 + n % 2),
        "coffee",
        split="test",
        explicit=ExplicitSignals(criteria="SECRET"),
    )
    for n in range(6)
]
HISTORIES = {p.pair_id: (HistoryItem("earlier", "tea", "milk"),) for p in PAIRS}


def shorter(example):
    return [-len(text) for text in example.responses]


def test_a_function_on_a_file_in_six_lines(tmp_path):
    path = tmp_path / "votes.parquet"
    pd.DataFrame([pair_to_row(p) for p in PAIRS]).to_parquet(path)

    pairs = list(read_pairs(path))
    test = [p for p in pairs if p.split == "test"]
    history = HistorySampler(pairs, size=3, policy="random")
    table = score_pairs(shorter, test, {p.pair_id: history(p) for p in test})
    report = accuracy_report(table, draws=20)
    assert (report["accuracy"], report["ties"], report["n_pairs"], report["stderr"]) == (0.5, 6, 6, None)


def test_a_function_never_sees_label_or_criteria():
    seen = []
    score_pairs(lambda e: seen.append(e) or (1, 2), PAIRS, HISTORIES)
    assert {e.chosen_index for e in seen} == {-1} and all(e.explicit == ExplicitSignals() for e in seen)
    assert seen[0].responses == seen[1].responses[::-1] and all(e.history == HISTORIES["p0"] for e in seen)


@pytest.mark.parametrize(
    "returned,kind",
    [
        (None, "scores:none"),
        ((1,), "scores:count"),
        ((1, 2, 3), "scores:count"),
        (7.0, "scores:count"),
        ((1, float("nan")), "scores:not_numbers"),
        ((1, float("inf")), "scores:not_numbers"),
        ((True, False), "scores:not_numbers"),
        (("9", "2"), "scores:not_numbers"),
        ("92", "scores:not_numbers"),
        ((1, None), "scores:not_numbers"),
    ],
)
def test_what_is_no_score_is_a_failure_of_its_kind(returned, kind):
    report = accuracy_report(score_pairs(lambda e: returned, PAIRS), draws=20)
    assert report["failures"] == {kind: 12} and (report["accuracy"], report["n_pairs"]) == (0.0, 6)


def test_scores_of_other_libraries_are_numbers():
    assert validate_scores(np.array([1, 2], dtype=np.float32), 2) == (1.0, 2.0) and validate_scores(
        iter((1, 2.5, 3)), 3
    ) == (
        1.0,
        2.5,
        3.0,
    )


def test_an_exception_is_one_questions_failure_and_printed_once(capsys):
    def fails(example):
        if example.pair_id == "p1":
            raise KeyError("oh no")
        return shorter(example)

    report = accuracy_report(score_pairs(fails, PAIRS), draws=20)
    assert report["failures"] == {"engine:KeyError": 2}
    assert capsys.readouterr().out.count("the scoring function failed: KeyError: 'oh no'") == 1


def test_pairs_that_cannot_be_asked_are_named():
    with pytest.raises(DataError, match="no pairs to score"):
        score_pairs(shorter, [])
    with pytest.raises(DataError, match="pair_id 'p0' of user 'u0' has no history"):
        score_pairs(shorter, PAIRS, {})


def progress(items, _name, _total, _status):
    return items


def ask(folder, score, questions):
    return ask_scores(
        questions, lambda: one_by_one(score), PredictionStore(folder, "x"), progress=progress, what="test"
    )


def test_a_second_start_asks_what_is_missing_and_what_raised(tmp_path):
    questions, asked = own_questions(PAIRS, HISTORIES), []

    def counted(example):
        asked.append(example.pair_id)
        if len(asked) == 4:
            raise ValueError
        if len(asked) == 8:
            raise KeyboardInterrupt
        return shorter(example)

    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, counted, questions)
    table = ask(tmp_path, counted, questions)
    assert len(asked) == 8 + 1 + 5 and table["failure"].isna().all() and len(table) == 12
    ask(tmp_path, lambda e: pytest.fail("everything was answered"), questions)


def test_an_evaluation_asks_a_scored_model_once_whatever_the_seeds(tmp_path):
    config = Config(recipe="evaluate")
    config.eval.draws = 20
    tested = Evaluation(config, PAIRS, HISTORIES).test(
        ScoredCandidate("mine", "v1", lambda: one_by_one(shorter), lambda: None), tmp_path, progress
    )
    assert (tested.report["accuracy"], tested.report["seeds"], tested.report["n_pairs"]) == (0.5, [0], 6)


# ---- by configuration ----


def test_users_who_train_are_not_called_held_out():
    config = Config()
    check_split(config, PAIRS, [*PAIRS, replace(PAIRS[0], split="train")])
    config.eval.protocol = "user_disjoint"
    check_split(config, PAIRS, [*PAIRS, replace(PAIRS[0], split="train", user_split="test")])
    with pytest.raises(
        DataError, match=r"1 of the evaluated users also train; use data\.split_by=user_disjoint"
    ):
        check_split(config, PAIRS, [*PAIRS, replace(PAIRS[0], split="train")])


MODULE = "def score(example):\n    return [-len(text) for text in example.responses]\nnumber = 3\n"


def test_a_function_by_its_name_is_evaluated_by_the_recipe(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    votes = [
        *PAIRS,
        *(PreferencePair(f"t{n}", f"u{n % 3}", (Message("user", f"t{n}"),), "a", "b") for n in range(9)),
    ]
    pd.DataFrame([pair_to_row(p) for p in votes]).to_parquet(tmp_path / "votes.parquet")
    command = [
        sys.executable,
        "-m",
        "pgenrm_train",
        "recipe=evaluate",
        "model=callable",
        "model.name=mine:score",
        "data=pairs",
        f"data.path={tmp_path / 'votes.parquet'}",
        f"run_dir={tmp_path / 'run'}",
        "tracking=none",
        "eval.baselines=[longer]",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    assert (results["accuracy"], results["model"], results["ties"]) == (0.5, "callable", 6)
    assert results["baselines"]["longer"]["accuracy"] == 0.0


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    "name,sentence",
    [
        ("nowhere:score", "cannot be imported"),
        ("mine:absent", "mine has no function absent"),
        ("mine:number", "no function number"),
    ],
)
def test_a_function_that_is_not_there_is_named(tmp_path, monkeypatch, name, sentence):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=sentence):
        candidates(
            load("recipe=evaluate", "model=callable", f"model.name={name}"), [], tmp_path, no_checkpoint
        )


def no_checkpoint(path):
    raise AssertionError(f"{path} is loaded, and no local model is under test")


# ---- a reward head ----


def tiny_head(folder, labels=1, template=None):
    """A Qwen2 classifier of random weights with the tokenizer of the shipped nano checkpoint."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    settings = Qwen2Config(
        **sizes, vocab_size=len(tokenizer), num_labels=labels, pad_token_id=tokenizer.pad_token_id
    )
    Qwen2ForSequenceClassification(settings).save_pretrained(folder)
    return folder


NANO = ROOT / "tests" / "data" / "psi_nano"
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def head(folder, **model):
    config = load("recipe=evaluate", "model=reward_head", f"model.path={folder}")
    for key, value in model.items():
        setattr(config.model, key, value)
    return RewardHead(config.model, config.cluster.device, folder)


def one(chosen, rejected, context="q"):
    return PreferencePair("p", "u", (Message("user", context),), chosen, rejected)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_reward_head_scores_each_response_by_itself(tmp_path, template):
    import torch

    model = head(tiny_head(tmp_path, template=template))
    pairs = [one("tea", "coffee milk tea"), one("coffee", "tea " * 30)]
    from eval.ask.scored import blind

    examples = [blind(q) for p in pairs for q in own_questions([p], {"p": ()})]
    scores = list(model(examples))
    assert scores[0] == scores[1][::-1] and scores[2] == scores[3][::-1], "presentation order is irrelevant"
    with torch.inference_mode():
        text = model.text(examples[0], "coffee milk tea")
        alone = model.model(
            **model.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        ).logits.item()
    assert scores[0][1] == pytest.approx(alone, abs=1e-5), "padding is irrelevant"
    assert text.split()[-3:] == ["coffee", "milk", "tea"] and (template is None or text.split()[0] == "user")


def test_a_text_that_is_too_long_keeps_its_end_and_is_counted(tmp_path):
    from eval.ask.scored import blind

    model = head(tiny_head(tmp_path), max_prompt_tokens=4, max_response_tokens=4)
    [question] = own_questions([one("tea " * 25_000, "milk " * 3)], {"p": ()})[:1]
    [scores] = model([blind(question)])
    assert model.cut >= 1 and len(scores) == 2 and np.isfinite(scores).all()
    ids = model.tokenizer("tea " * 25_000, add_special_tokens=False)["input_ids"]
    assert model._ids("milk " + "tea " * 25_000) == ids[-8:]


def test_batches_hold_all_texts_once_within_the_budget():
    ids = [[0] * n for n in (9000, 5, 9000, 20_000, 7, 5)]
    batches = list(_batches(ids))
    assert sorted(i for b in batches for i in b) == list(range(6)) and max(map(len, batches)) < 6
    assert all(len(b) * max(len(ids[i]) for i in b) <= 16_384 for b in batches if len(b) > 1)


def test_other_checkpoints_are_refused(tmp_path):
    with pytest.raises(
        ArtifactError, match="Qwen2ForSequenceClassification with 2 labels; model=reward_head needs"
    ):
        head(tiny_head(tmp_path, labels=2))
    with pytest.raises(ArtifactError, match="Qwen2ForCausalLM"):
        head(NANO)
    with pytest.raises(ArtifactError, match="not a Hugging Face checkpoint"):
        candidates(
            load("recipe=evaluate", "model=reward_head", f"model.path={tmp_path / 'none'}"),
            [],
            tmp_path,
            no_checkpoint,
        )
