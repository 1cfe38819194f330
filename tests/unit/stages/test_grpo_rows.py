"""The rows of GRPO stages: orders, the mirror for mining, signals, and hard negatives in their place."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pgenrm_train.config import Config
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.curriculum.hard_negatives import GIVEN, NEAR_TIE, PROTOTYPE_FLIP
from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.stages import grpo
from pgenrm_train.stages.grpo import (
    MIRROR,
    ROWS,
    SIGNALS,
    RowBuilder,
    training_pairs,
    write_rows,
)


def pairs(count: int = 12) -> list[PreferencePair]:
    """Every user rated three answers to a question of their own: 80, 75 and 40."""
    result = []
    for n in range(count // 2):
        for chosen, score in (("alpha", 80.0), ("beta", 75.0)):
            context = (Message("user", f"question {n}"),)
            result.append(
                PreferencePair(
                    f"p{n}{chosen}",
                    f"u{n}",
                    context,
                    f"{chosen} {n}",
                    f"gamma {n}",
                    chosen_score=score,
                    rejected_score=40.0,
                )
            )
    return result


def config(**changed: Any) -> Config:
    settings = Config(recipe="curriculum")
    settings.curriculum.prompts_per_step, settings.curriculum.rows = 4, 8
    for key, value in changed.items():
        setattr(settings.curriculum, key, value)
    return settings


def written(
    folder: Path, section: str = "curriculum", embed: Any = None, **changed: Any
) -> list[dict[str, Any]]:
    def writer(view: Any) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{view.query}: {' | '.join(view.responses)}"}]

    write_rows(RowBuilder(config(**changed), StageName(section), writer, embed=embed), folder, pairs())
    return list(pq.read_table(folder / ROWS).to_pylist())


def test_the_mirror_is_the_same_rows_in_the_other_order(tmp_path: Path) -> None:
    rows, mirror = written(tmp_path), pq.read_table(tmp_path / MIRROR).to_pylist()
    assert len(rows) == len(mirror) == 8
    for row, turned in zip(rows, mirror, strict=True):
        assert row["extra_info"]["pair_id"] == turned["extra_info"]["pair_id"]
        assert row["extra_info"]["order"] == 1 - turned["extra_info"]["order"]
        assert row["reward_model"]["ground_truth"] != turned["reward_model"]["ground_truth"]
        query, texts = row["prompt"][0]["content"].split(": ")
        assert turned["prompt"][0]["content"] == f"{query}: {' | '.join(reversed(texts.split(' | ')))}"
    assert [row["extra_info"]["order"] for row in rows] == [0, 1] * 4
    signals = pq.read_table(tmp_path / SIGNALS).to_pylist()
    assert [row["pair_id"] for row in signals] == [row["extra_info"]["pair_id"] for row in rows]
    assert {row["rating_gap"] for row in signals} == {35.0, 40.0}


@pytest.mark.parametrize(
    ("changed", "files"),
    [
        ({"mine": False}, {ROWS, SIGNALS}),
        ({"hard_by": "history"}, {ROWS, SIGNALS}),
        ({"schedule": "uniform"}, {ROWS}),
        ({"schedule": "anti"}, {ROWS, SIGNALS, MIRROR}),
    ],
)
def test_only_the_files_that_the_schedule_needs_are_written(
    tmp_path: Path, changed: dict[str, Any], files: set[str]
) -> None:
    written(tmp_path, **changed)
    assert {path.name for path in tmp_path.iterdir()} == files


def test_similarity_is_that_of_the_embedder_where_one_is_given(tmp_path: Path) -> None:
    written(
        tmp_path,
        embed=lambda texts: np.array(
            [[1.0, 0.0] if text.startswith("alpha") else [0.0, 1.0] for text in texts]
        ),
    )
    similarities = {
        row["pair_id"][2:]: row["similarity"] for row in pq.read_table(tmp_path / SIGNALS).to_pylist()
    }
    assert similarities == {"alpha": 0.0, "beta": 1.0}


def test_prototypes_find_more_hard_negatives() -> None:
    """Two camps of three users over one question; the larger is the majority."""
    votes = [("ann", 0), ("fay", 0), ("gil", 0), ("bob", 1), ("cyd", 1)]
    texts = ("x", "y")
    voted = [
        PreferencePair(user, user, (Message("user", "q"),), texts[camp], texts[1 - camp])
        for user, camp in votes
    ]
    settings = config(construct=True, rows=10)
    assert training_pairs(settings, "curriculum", voted)[1].count(PROTOTYPE_FLIP) == 0
    assert training_pairs(settings, "curriculum", voted, dict(votes))[1].count(PROTOTYPE_FLIP) == 3


def test_constructed_pairs_take_up_to_half_of_the_rows() -> None:
    drawn, origins = training_pairs(config(construct=True), "curriculum", pairs())
    assert len(drawn) == 8 and origins.count(NEAR_TIE) == 4 and origins.count(GIVEN) == 4
    for pair, origin in zip(drawn, origins, strict=True):
        if origin == NEAR_TIE:
            assert (pair.chosen.split()[0], pair.rejected.split()[0]) == ("alpha", "beta"), (
                "as the user rated them"
            )
            assert (pair.chosen_score, pair.rejected_score) == (80, 75)
    assert training_pairs(config(construct=True), "curriculum", pairs()) == (drawn, origins), "seeded"


def test_without_construction_nothing_is_new() -> None:
    drawn, origins = training_pairs(config(), "curriculum", pairs())
    assert {pair.pair_id for pair in drawn} <= {pair.pair_id for pair in pairs()} and set(origins) == {GIVEN}


def test_fewer_pairs_than_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"12 training pairs are fewer than curriculum\.prompts_per_step=16"):
        written(tmp_path, prompts_per_step=16, mini_batch_prompts=16)


def test_another_history_is_the_next_one_on_the_ring_of_another_user() -> None:
    rng = random.Random(0)
    for size in (0, 1, 2, 7, 7, 7, 20, 20):
        ring = [
            (PreferencePair(str(n), rng.choice("abc"), (), "", ""), (f"h{n}",) * rng.randint(0, 1))
            for n in range(size)
        ]
        expected = [
            next((h for p, h in ring[n + 1 :] + ring[:n] if p.user_id != pair.user_id and h), None)
            for n, (pair, _) in enumerate(ring)
        ]
        assert grpo._next_histories(ring) == expected  # type: ignore[arg-type]
