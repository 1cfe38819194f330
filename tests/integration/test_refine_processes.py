"""Refinement by two processes over gloo equals that of one; a prototype without samples does not move."""

from __future__ import annotations

import numpy as np
import pytest

from pgenrm_train.backends.embedding import refine_processes
from pgenrm_train.backends.embedding.refine_processes import refine_in_processes
from pgenrm_train.config import PrototypesConfig
from pgenrm_train.errors import ConfigError
from pgenrm_train.prototypes import refinement
from pgenrm_train.prototypes.clusters import Prototypes
from pgenrm_train.prototypes.refinement import RefinementSettings

N, D, H, K = 603, 12, 3, 5  # 603: batches that two processes cannot halve, the last one of odd size


@pytest.fixture(scope="module")
def world() -> tuple[Prototypes, refinement.RefinementBatch]:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((200, D)).astype(np.float32)

    def votes(*shape: int) -> refinement.Lookup:
        return refinement.Lookup(table, rng.integers(0, len(table), (N, *shape)))

    users = np.array([f"u{i // 3}" for i in range(N)])
    samples = refinement.RefinementBatch(
        votes(), votes(), votes(), votes(H), votes(H), votes(H), rng.random((N, H)) < 0.7, users
    )
    A = rng.standard_normal((K, D)).astype(np.float32)
    return Prototypes(
        A, rng.integers(0, K - 1, N), rng.standard_normal((N, D)).astype(np.float32), users
    ), samples


def test_two_processes_refine_as_one_does(world) -> None:
    prototypes, samples = world
    settings = RefinementSettings.of(PrototypesConfig(refine_epochs=3, learning_rate=0.01), seed=0)
    alone, expected = refinement.refine(prototypes, samples, settings)
    shared, found = refine_in_processes(prototypes, samples, settings, device="cpu", processes=2)
    assert found.pop("loss") == pytest.approx(expected.pop("loss"), abs=1e-5)
    assert found == pytest.approx(expected, abs=1e-6)
    for name, value in {"A": alone.A, **alone.maps}.items():
        ours = shared.A if name == "A" else shared.maps[name]
        start = prototypes.A if name == "A" else None
        assert np.abs(ours - value).max() < 2e-4, name
        assert start is None or np.abs(value - start).max() > 0.02, "what was compared did move"
    assert np.array_equal(shared.labels, alone.labels)
    assert np.array_equal(shared.A[K - 1], prototypes.A[K - 1]), "a prototype without members keeps its bits"
    assert shared.users is prototypes.users and shared.embeddings is prototypes.embeddings


def test_processes_that_do_not_add_up_their_gradients_refine_otherwise(world, monkeypatch) -> None:
    """The comparison above is sensitive: half of every mini-batch gives another result."""
    prototypes, samples = world
    settings = RefinementSettings.of(PrototypesConfig(refine_epochs=3, learning_rate=0.01), seed=0)
    alone, _ = refinement.refine(prototypes, samples, settings)
    monkeypatch.setattr(refinement.Part, "add_up", lambda self, tensor: tensor)
    half, _ = refinement.refine(prototypes, samples, settings, part=refinement.Part(0, 2))
    assert np.abs(half.A - alone.A).max() > 2e-3


def test_a_learning_rate_that_diverges_is_reported_as_by_one_process(world) -> None:
    prototypes, samples = world
    settings = RefinementSettings.of(PrototypesConfig(refine_epochs=2, learning_rate=1e30), seed=0)
    with pytest.raises(ConfigError, match=r"learning_rate=1e\+30 makes the refinement diverge"):
        refine_in_processes(prototypes, samples, settings, device="cpu", processes=2)


def test_a_table_that_many_columns_share_is_written_once(world, tmp_path) -> None:
    refine_processes._write_arrays(tmp_path / "samples", world[1])
    tables = list(tmp_path.glob("samples/*.rows/table.npy"))
    assert len(tables) == 6 and len({path.stat().st_ino for path in tables}) == 1
    again = refinement.RefinementBatch(**refine_processes._read_arrays(tmp_path / "samples"))
    rows = np.arange(0, N, 50)
    assert np.array_equal(again.history_chosen[rows], world[1].history_chosen[rows]) and np.array_equal(
        again.mask, world[1].mask
    )
