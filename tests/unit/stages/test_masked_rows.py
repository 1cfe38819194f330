"""No builder's withheld signals reach a GRPO prompt, whatever the policy of masking, as text or by any trace.

Two proofs per row: the withheld texts are not in the decoded prompt, and the prompt equals that of a user who
stated nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prism_world import CONVERSATION, SURVEY, model, user

from pgenrm_train.config import ROOT, load
from pgenrm_train.config.data import MASKINGS
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.prompts.writer import PromptWriter
from pgenrm_train.records.pairs import ExplicitSignals, Message, PreferencePair
from pgenrm_train.records.raw_rows import LeftOut
from pgenrm_train.records.rows import pair_to_row
from pgenrm_train.stages.grpo import ROWS, VALIDATION, RowBuilder, write_rows, write_validation
from recipes.build_data import builder

# Words of no other text: a leak cannot hide behind a coincidence.
STATED = ExplicitSignals("zebracriteria", "zebraself", "zebrastyle", (("zebraattribute", 80.0),))
MASKED = [("masked", 0.5), ("history_dropout", 0.5), ("mixed", 0.0)]


def votes(folder: Path) -> str:
    """A file in PersonalRewardBench's schema with optional columns."""
    pairs = [
        PreferencePair(
            f"p{u}{n}",
            f"u{u}",
            (Message("user", f"question {n}"),),
            f"good {u} {n}",
            f"bad {u} {n}",
            explicit=STATED,
            split="val" if n == 5 else "train",
            conversation_id=f"c{u}{n}",
        )
        for u in range(4)
        for n in range(6)
    ]
    (folder / "votes.jsonl").write_text("".join(json.dumps(pair_to_row(pair)) + "\n" for pair in pairs))
    return str(folder / "votes.jsonl")


def prism(folder: Path) -> str:
    conversations, survey = [], []
    for u in range(4):
        survey.append(
            SURVEY | {"user_id": f"user{u}", "self_description": "zebraself", "system_string": "zebrastyle"}
        )
        for c in range(4):
            row = copy.deepcopy(CONVERSATION) | {"conversation_id": f"c{u}{c}", "user_id": f"user{u}"}
            row["choice_attributes"] = {"zebraattribute": 60}
            row["conversation_history"] = [
                user(0, f"Hi {c}"),
                model(0, f"A{u}{c}", 90, True),
                model(0, f"B{u}{c}", 40),
            ]
            conversations.append(row)
    for name, rows in (("survey", survey), ("conversations", conversations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def rated(folder: Path) -> str:
    """Rows of three rated responses, in the same schema."""
    stated = {
        "criteria": "zebracriteria",
        "self_description": "zebraself",
        "attributes": {"zebraattribute": 80},
    }
    rows = [
        {"user_id": f"u{u}", "context": f"question {n}", "conversation_id": f"c{u}{n}", **stated}
        | {
            "responses": [f"{word} {u} {n}" for word in ("good", "fair", "bad")],
            "ratings": [9531.5, 9531.25, 9531],
        }
        | {"split": "val" if n == 5 else "train"}
        for u in range(4)
        for n in range(6)
    ]
    (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rated.jsonl")


def reward_models(folder: Path) -> str:
    """Two reward models as users; their scores are no other number."""
    head = ["prompt_id", "prompt", "chosen", "rejected"]
    head += [f"{side}_org_model-{rater}" for rater in "ab" for side in ("chosen", "rejected")]
    for split in ("train", "test"):
        lines = [
            [f"{split}{i}", f"q {split} {i}", f"good {i}", f"bad {i}", 9531.5, 9531.25, 9531, 9531.75]
            for i in range(8)
        ]
        text = "\n".join(",".join(map(str, line)) for line in (head, *lines))
        (folder / f"merged_reward_model_as_user_{split}.csv").write_text(f"{text}\n")
    return str(folder)


# Data → the function that writes their files; a word after / makes another file for the same builder.
SOURCES: dict[str, Any] = {
    "personaworld": None,
    "pairs": votes,
    "pairs/rated": rated,
    "chatbot_arena": votes,
    "prism_personalized": votes,
    "prism": prism,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "tests/data/psi_nano")


@pytest.fixture(scope="module", params=list(SOURCES))
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], list[PreferencePair]]:
    """(overrides, pairs) of one builder."""
    make = SOURCES[request.param]
    more = ["data.users=12", "data.heldout_users=2"] if make is None else []
    if make is not None:
        folder = tmp_path_factory.mktemp("source")
        more = [f"data.path={make(folder)}", "judge=none", "teacher=features"]
    overrides = [f"data={request.param.partition('/')[0]}", *more]
    config = load("recipe=cre", *overrides)
    pairs = list(builder(config)(config.data, 0, LeftOut()))
    if request.param == "prism":  # its splits are drawn by the stage
        pairs = [replace(pair, split="val" if n % 4 == 3 else "train") for n, pair in enumerate(pairs)]
    return overrides, pairs


def rows(
    tokenizer: Any, overrides: list[str], pairs: list[PreferencePair], folder: Path, **more: Any
) -> list[dict[str, Any]]:
    folder.mkdir()
    config = load(
        "recipe=cre",
        *overrides,
        "cre.prompts_per_step=4",
        "cre.mini_batch_prompts=4",
        "cre.rows=24",
        "cre.validate_pairs=3",
    )
    write = PromptWriter(config.model, tokenizer)
    builder = RowBuilder(config, StageName.CRE, write, **more)
    assert write_validation(builder, folder, pairs) > 0
    write_rows(builder, folder, pairs)
    written = [row for name in (ROWS, VALIDATION) for row in pq.read_table(folder / name).to_pylist()]
    for row in written:
        row["text"] = tokenizer.decode(write.ids(row["prompt"]))
    return written


def withheld_by(pair: PreferencePair) -> Iterator[str]:
    yield from pair.explicit.texts()
    yield from (name for name, _ in pair.explicit.attributes)


@pytest.mark.parametrize(("policy", "share"), MASKED)
def test_nothing_withheld_is_in_a_prompt(
    tokenizer: Any, source: Any, policy: str, share: float, tmp_path: Path
) -> None:
    overrides, pairs = source
    overrides = [*overrides, f"masking={policy}", f"masking.show_probability={share}"]
    written = rows(tokenizer, overrides, pairs, tmp_path / "stated")
    silent = [replace(pair, explicit=ExplicitSignals()) for pair in pairs]
    inferred = {pair.user_id: ExplicitSignals(criteria="zebrainferred", synthetic=True) for pair in pairs}
    other = rows(tokenizer, overrides, silent, tmp_path / "silent", synthetic=inferred)
    assert [row["prompt"] for row in written] == [row["prompt"] for row in other], "the signals left no trace"
    of = {pair.pair_id: pair for pair in pairs}
    for row in written:
        withheld = [text.casefold() for text in withheld_by(of[row["extra_info"]["pair_id"]])]
        assert withheld and not any(text in row["text"].casefold() for text in withheld)
        assert "zebra" not in row["text"]
    assert any(row["extra_info"]["explicit"] != "{}" for row in written), "they are in extra_info"
    assert any("zebrainferred" in row["extra_info"]["explicit"] for row in other), (
        "and so are inferred criteria"
    )


def test_mixed_shows_whole_signals_or_none(tokenizer: Any, source: Any, tmp_path: Path) -> None:
    overrides, pairs = source
    mixed, hidden, shown = (
        rows(
            tokenizer,
            [*overrides, "masking=mixed", f"masking.show_probability={share}"],
            pairs,
            tmp_path / str(share),
        )
        for share in (0.5, 0.0, 1.0)
    )
    triples = [row for row in zip(mixed, hidden, shown) if "probe" not in row[0]["extra_info"]]
    kinds = {
        (row["prompt"] == one["prompt"], row["prompt"] == other["prompt"]) for row, one, other in triples
    }
    assert kinds == {(True, False), (False, True)}, (
        "each prompt is the hidden or the shown one, and both occur"
    )


@pytest.mark.parametrize("policy", MASKINGS)
@pytest.mark.parametrize(("data", "make"), [("rm_as_user", reward_models), ("pairs", rated)])
def test_no_rating_is_in_a_prompt(tokenizer: Any, data: str, make: Any, policy: str, tmp_path: Path) -> None:
    overrides = [f"data={data}", f"data.path={make(tmp_path)}", f"masking={policy}", "judge=none"]
    config = load("recipe=cre", *overrides)
    pairs = list(builder(config)(config.data, 0, LeftOut()))
    assert {pair.chosen_score for pair in pairs} <= {9531.5, 9531.25, 9531.75} and len(pairs) > 8
    pairs = [replace(pair, split="val" if n % 4 == 3 else "train") for n, pair in enumerate(pairs)]
    written = rows(tokenizer, overrides, pairs, tmp_path / "rows")
    assert written and not any("9531" in row["text"] for row in written)
