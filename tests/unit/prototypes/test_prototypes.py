"""Prototypes on planted data: clusters, refinement against a loop, neighbours, refused artefacts."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from pgenrm_train.config import PrototypesConfig
from pgenrm_train.errors import ArtifactError, ConfigError, DataError
from pgenrm_train.prototypes import clusters as proto
from pgenrm_train.prototypes import refinement

D, H = 16, 3
HASHES = {"model": "m1", "embedder": "e1", "data": "d1"}


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def planted(k=4, users_each=30, per_user=3, noise=0.15, seed=0):
    """Make k groups of users, each with a direction of its analyses and an unrelated taste of its votes."""
    rng = np.random.default_rng(seed)
    centres, tastes = unit(rng.normal(size=(k, D))), unit(rng.normal(size=(k, D)))
    group = np.repeat(np.arange(k), users_each * per_user)
    users = np.repeat([f"u{i}" for i in range(k * users_each)], per_user)
    n = len(group)

    def votes(*shape):
        first, second = (unit(rng.normal(size=(*shape, D))) for _ in range(2))
        taste = tastes[group].reshape(n, *[1] * (len(shape) - 1), D)
        better = ((first - second) * taste).sum(-1, keepdims=True) > 0
        return (
            unit(rng.normal(size=(*shape, D))),
            np.where(better, first, second),
            np.where(better, second, first),
        )

    P = unit(centres[group] + noise * rng.normal(size=(n, D)))
    mask = np.arange(H) < rng.integers(0, H + 1, size=(n, 1))
    return P, group, refinement.RefinementBatch(*votes(n), *votes(n, H), mask, users)


def settings(seed=0, **changes) -> refinement.RefinementSettings:
    section = PrototypesConfig(**{"refine_epochs": 5, "learning_rate": 0.02, **changes})
    return refinement.RefinementSettings.of(section, seed)


@pytest.fixture(scope="module")
def world():
    P, group, samples = planted()
    return proto.cluster(P, 4, seed=0, users=samples.users), group, samples


# --- clusters


def test_planted_clusters_are_found(world):
    prototypes, group, _ = world
    assert adjusted_rand_score(group, prototypes.labels) >= 0.9
    assert prototypes.A.shape == (4, D)
    assert prototypes.A.dtype == np.float32
    again = proto.cluster(prototypes.embeddings, 4, seed=0)
    assert np.array_equal(again.A, prototypes.A)


def test_mini_batches_find_them_too(monkeypatch):
    monkeypatch.setattr(proto, "LARGE", 100)
    monkeypatch.setattr(proto, "find_spec", lambda name: None)
    P, group, _ = planted()
    assert adjusted_rand_score(group, proto.cluster(P, 4, seed=0).labels) >= 0.9


def test_faiss_finds_them_in_a_sample_where_it_is_installed(monkeypatch, tmp_path):
    pytest.importorskip("faiss")
    monkeypatch.setattr(proto, "LARGE", 100)
    monkeypatch.setattr(proto, "FAISS_ROWS", 40)
    monkeypatch.setattr("sklearn.cluster.MiniBatchKMeans.fit", lambda *_: pytest.fail("faiss is there"))
    P, group, samples = planted()
    np.save(tmp_path / "P.npy", P)
    found = proto.cluster(np.load(tmp_path / "P.npy", mmap_mode="r"), 4, seed=0, users=samples.users)
    assert adjusted_rand_score(group, found.labels) >= 0.9
    assert np.array_equal(found.labels, proto.assign(found.A, P))
    assert np.array_equal(proto.cluster(P, 4, seed=0).A, found.A)


def test_more_prototypes_than_distinct_analyses_are_refused():
    P = np.repeat(np.eye(3, D, dtype=np.float32), 5, axis=0)
    assert len(set(proto.cluster(P, 3, seed=0).labels)) == 3
    for k in (0, 4):
        with pytest.raises(ConfigError, match=rf"prototypes\.k={k} must be between 1 and "):
            proto.cluster(P, k, seed=0)
    with pytest.raises(DataError, match="not finite"):
        proto.cluster(np.full((3, 2), np.nan), 1, seed=0)


def test_suggest_k_reads_the_singular_values():
    P = np.random.default_rng(0).normal(size=(50, 3)) @ np.random.default_rng(1).normal(size=(3, D))
    k, curve = proto.suggest_k(P.astype(np.float32), mass=0.999)
    sigma = np.linalg.svd(P, compute_uv=False)
    assert k == 3
    assert curve == pytest.approx(np.cumsum(sigma) / sigma.sum(), abs=1e-4)
    assert proto.suggest_k(P[:5].astype(np.float32))[1] == pytest.approx(
        np.cumsum(s := np.linalg.svd(P[:5], compute_uv=False)) / s.sum(), abs=1e-4
    )
    assert proto.suggest_k(P, 1.0)[0] <= D
    with pytest.raises(ConfigError, match="mass"):
        proto.suggest_k(P, 0)


# --- refinement


def reference_loss(sample, a, mu, previous, maps, c):
    """METHOD §6.3 for one sample, as it is written there."""
    q, chosen, rejected, history = sample
    v = torch.zeros(D)
    if history:
        o = [torch.sigmoid(maps["W"] @ torch.cat([hq, hc - hr])) for hq, hc, hr in history]
        alpha = torch.softmax(
            torch.stack([x @ q / math.sqrt(D) + c.rho * (x @ a) / math.sqrt(D) for x in o]), dim=0
        )
        v = sum(w * x for w, x in zip(alpha, o))
    z = a + c.lambda_query * maps["W_q"] @ q + c.lambda_summary * maps["W_s"] @ v
    delta = z @ chosen - z @ rejected
    penalty = c.lambda_centre * (a - mu).square().sum() + c.lambda_trajectory * (a - previous).square().sum()
    return -torch.nn.functional.logsigmoid(delta) + penalty, delta


def test_batched_loss_and_gradients_equal_a_loop_over_samples(world):
    prototypes, _, samples = world
    c = settings(rho=0.7, lambda_query=0.3, lambda_summary=0.5)
    state = refinement.Refinement(prototypes, c)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the start, where the maps are zero and the penalties vanish
        for value in (*state.maps.values(), state.A):
            value += 0.3 * torch.randn(value.shape, generator=rng)
    rows = np.random.default_rng(0).permutation(len(samples))[:40]
    loss, margin = state.loss(state.batch(samples, rows))
    loss.backward()

    A = state.A.detach().clone().requires_grad_()
    maps = {name: value.detach().clone().requires_grad_() for name, value in state.maps.items()}
    total, margins = torch.zeros(()), []
    for i in rows:
        j = prototypes.labels[i]
        mu = torch.tensor(prototypes.embeddings[prototypes.labels == j].mean(axis=0))
        keys = ("history_query", "history_chosen", "history_rejected")
        history = [
            tuple(torch.tensor(getattr(samples, key)[i, t]) for key in keys)
            for t in range(H)
            if samples.mask[i, t]
        ]
        sample = (
            *(torch.tensor(getattr(samples, key)[i]) for key in ("query", "chosen", "rejected")),
            history,
        )
        one, delta = reference_loss(sample, A[j], mu, torch.tensor(prototypes.A[j]), maps, c)
        total, margins = total + one / len(rows), [*margins, delta]
    total.backward()

    assert loss.item() == pytest.approx(total.item(), abs=1e-5)
    torch.testing.assert_close(margin, torch.stack(margins), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.A.grad.to_dense(), A.grad, atol=1e-5, rtol=1e-4)
    for name in maps:
        torch.testing.assert_close(state.maps[name].grad, maps[name].grad, atol=1e-5, rtol=1e-4)


def test_refinement_lowers_the_loss_and_lifts_held_out_accuracy(world):
    prototypes, group, samples = world
    refined, metrics = refinement.refine(prototypes, samples, settings(), batch_size=64)
    assert metrics["loss"] == sorted(metrics["loss"], reverse=True)
    assert metrics["loss"][-1] < 0.9 * metrics["loss"][0]
    assert metrics["holdout_users"] == 12
    assert metrics["holdout_pairs"] == 36
    assert metrics["holdout_accuracy"] > metrics["holdout_accuracy_centroids"] + 0.15
    assert metrics["train_accuracy"] > metrics["train_accuracy_centroids"] + 0.15
    assert np.array_equal(refined.labels, proto.assign(refined.A, refined.embeddings))
    assert metrics["moved_share"] == (refined.labels != prototypes.labels).mean()
    assert adjusted_rand_score(group, refined.labels) >= 0.9


def test_refinement_is_reproducible_and_leaves_its_input_alone(world):
    prototypes, _, samples = world
    before = prototypes.A.copy()
    first, second = (
        refinement.refine(prototypes, samples, settings(seed=3, refine_epochs=2), batch_size=64)
        for _ in range(2)
    )
    assert np.array_equal(first[0].A, second[0].A)
    assert first[1] == second[1]
    assert np.array_equal(prototypes.A, before)


def test_history_teaches_something(world):
    """With one prototype for all, only the history separates groups whose votes follow their taste."""
    _, _, samples = world
    P, _, _ = planted()
    single = proto.cluster(P, 1, seed=0, users=samples.users)
    c = settings(lambda_summary=1.0, refine_epochs=20)
    _, with_history = refinement.refine(single, samples, c, batch_size=64)
    blind = dataclasses.replace(samples, mask=np.zeros_like(samples.mask))
    _, without = refinement.refine(single, blind, c, batch_size=64)
    assert with_history["train_accuracy"] > without["train_accuracy"] + 0.03


@pytest.mark.parametrize("rows, passes", [(300, 32), (6000, 15), (40_000, 5)])
def test_a_small_set_gets_more_passes(monkeypatch, rows, passes):
    """160 updates of an eighth of the samples, at most 512; five passes of a large set make more."""
    monkeypatch.setattr(refinement.Refinement, "epoch", lambda self, samples, batches: float(len(batches)))
    P = np.zeros((rows, 2), dtype=np.float32)
    users = np.arange(rows).astype(str)
    zeros = np.zeros((rows, 1, 2), dtype=np.float32)
    samples = refinement.RefinementBatch(P, P, P, zeros, zeros, zeros, np.ones((rows, 1), dtype=bool), users)
    one = proto.Prototypes(P[:1], np.zeros(rows, dtype=np.int64), P, users)
    losses = refinement.refine(one, samples, settings(refine_epochs=None))[1]["loss"]
    assert len(losses) == passes and passes * losses[0] >= refinement.UPDATES


def test_new_users_are_judged_by_their_own_votes():
    """Each user has a taste of their own, so only earlier votes predict later ones, the more the better."""
    rng = np.random.default_rng(0)

    def votes_of(users: int, name: str) -> refinement.RefinementBatch:
        taste = unit(rng.normal(size=(users, 1, 1, D)))
        texts = unit(rng.normal(size=(2, users, 4, D)))
        better = ((texts[0] - texts[1])[:, None] * taste).sum(-1)[:, 0, :, None] > 0
        chosen, rejected = (np.where(better, *t).astype(np.float32) for t in (texts, texts[::-1]))
        query = np.zeros((users, D), dtype=np.float32)
        past = chosen[:, 1:], rejected[:, 1:]
        names = np.array([f"{name}{i}" for i in range(users)])
        mask = np.ones((users, 3), dtype=bool)
        return refinement.RefinementBatch(
            query, chosen[:, 0], rejected[:, 0], np.zeros_like(past[0]), *past, mask, names
        )

    known, new = votes_of(300, "known"), votes_of(2000, "new")
    one = proto.cluster(unit(rng.normal(size=(300, D))), 1, seed=0, users=known.users)
    refined, _ = refinement.refine(one, known, settings(refine_epochs=None, learning_rate=1e-3))
    accuracy = []
    for votes in (0, 1, 3):
        seen = dataclasses.replace(new, mask=new.mask & (np.arange(3) < votes))
        facts = refinement.cold_start(refined, seen, np.zeros(2000, dtype=int), settings())
        accuracy.append(facts["accuracy"])
    assert accuracy[0] < 0.53 < accuracy[1] and accuracy[2] > accuracy[1] + 0.02


def test_an_inactive_prototype_keeps_its_bits(world):
    prototypes, _, samples = world
    state = refinement.Refinement(prototypes, settings())
    one, other = (np.flatnonzero(prototypes.labels == j)[:8] for j in (0, 1))
    state.step(state.batch(samples, one))  # gives prototype 0 momentum
    state.step(state.batch(samples, one))
    kept = state.A.detach().clone()
    for _ in range(5):
        state.step(state.batch(samples, other))
    assert torch.equal(state.A[[0, 2, 3]], kept[[0, 2, 3]])
    assert torch.equal(state.A[2], torch.tensor(prototypes.A[2]))
    assert not torch.equal(state.A[1], kept[1])


def test_a_prototype_without_samples_keeps_its_bits_through_refine(world):
    prototypes, _, samples = world
    lonely = dataclasses.replace(
        prototypes, A=np.vstack([prototypes.A, np.full((1, D), 9, dtype=np.float32)])
    )
    refined, metrics = refinement.refine(lonely, samples, settings())
    assert np.array_equal(refined.A[4], lonely.A[4])
    assert metrics["empty_prototypes"] == 1


@pytest.mark.parametrize("name", ["lambda_centre", "lambda_trajectory"])
def test_regularisers_hold_the_prototypes(world, name):
    prototypes, _, samples = world
    moved = {}
    for strength in (0.0, 1000.0):
        weights = {"lambda_centre": 0.0, "lambda_trajectory": 0.0} | {name: strength}
        refined, _ = refinement.refine(
            prototypes, samples, settings(learning_rate=0.005, **weights), batch_size=32
        )
        moved[strength] = np.linalg.norm(refined.A - prototypes.A, axis=1).max()
    assert moved[1000.0] < 0.3 * moved[0.0]


def test_the_trajectory_is_anchored_at_the_start_of_each_epoch(world):
    prototypes, _, samples = world
    state = refinement.Refinement(prototypes, settings())
    for _ in range(2):
        start = state.A.detach().clone()
        state.epoch(samples, [np.arange(64), np.arange(64, 128)])
        assert torch.equal(state.previous, start)
        assert not torch.equal(state.A, start)


def test_rows_without_history_attend_to_nothing(world):
    prototypes, _, samples = world
    state = refinement.Refinement(prototypes, settings())
    unknown = dataclasses.replace(samples, mask=np.zeros_like(samples.mask))
    batch = state.batch(unknown, np.arange(5))
    with torch.no_grad():
        state.maps["W_s"] += 1
        a = state.A[batch.label]
        assert not refinement.attend(batch, a, state.maps, state.settings).any()
        margins = refinement.margins(batch, a, state.maps, state.settings)
    torch.testing.assert_close(margins, (a * batch.difference).sum(-1))


def test_deduplicated_rows_give_the_same_refinement(world, tmp_path):
    prototypes, _, samples = world
    fields = [f.name for f in dataclasses.fields(samples) if f.name not in ("mask", "users")]
    flat = np.concatenate([getattr(samples, name).reshape(-1, D) for name in fields])
    np.save(tmp_path / "table.npy", flat)
    table, start, rows = np.load(tmp_path / "table.npy", mmap_mode="r"), 0, {}
    for name in fields:
        shape = getattr(samples, name).shape[:-1]
        rows[name] = refinement.Lookup(table, np.arange(start, start + math.prod(shape)).reshape(shape))
        start += math.prod(shape)
    dense, _ = refinement.refine(prototypes, samples, settings(refine_epochs=1))
    mapped, _ = refinement.refine(prototypes, dataclasses.replace(samples, **rows), settings(refine_epochs=1))
    assert np.array_equal(dense.A, mapped.A)


def test_refinement_without_history_epochs_or_a_second_user(world):
    prototypes, _, samples = world
    empty = np.zeros((len(samples), 0, D), dtype=np.float32)
    bare = dataclasses.replace(
        samples,
        history_query=empty,
        history_chosen=empty,
        history_rejected=empty,
        mask=np.zeros((len(samples), 0), dtype=bool),
    )
    assert np.isfinite(refinement.refine(prototypes, bare, settings(refine_epochs=1))[0].A).all()
    untouched, metrics = refinement.refine(prototypes, samples, settings(refine_epochs=0))
    assert np.array_equal(untouched.A, prototypes.A)
    assert metrics["loss"] == [] and (untouched.maps["W_q"] == 0).all()
    alone = np.full(len(samples), "u")
    _, metrics = refinement.refine(
        dataclasses.replace(prototypes, users=alone),
        dataclasses.replace(samples, users=alone),
        settings(refine_epochs=1),
    )
    assert metrics["holdout_users"] == 0
    assert math.isnan(metrics["holdout_accuracy"])


def test_samples_that_are_not_the_clustered_rows_are_refused(world):
    prototypes, _, samples = world
    with pytest.raises(DataError, match="same order"):
        refinement.refine(dataclasses.replace(prototypes, users=prototypes.users[::-1]), samples, settings())
    with pytest.raises(DataError, match="'chosen' has shape"):
        dataclasses.replace(samples, chosen=samples.chosen[:5])
    with pytest.raises(ConfigError, match="learning_rate"):
        refinement.refine(prototypes, samples, settings(learning_rate=1e30), batch_size=64)


# --- neighbours


def small() -> proto.Prototypes:
    """Prototype 0 holds a, a, b, c; prototype 1 holds d, b, e; prototype 2, far off, holds f."""
    A = np.array([[1, 0], [0, 1], [-5, -5]], dtype=np.float32)
    angles = np.array([0, 5, 10, 20, 80, 70, 100, 225]) * math.pi / 180
    members = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return proto.Prototypes(A, np.array([0, 0, 0, 0, 1, 1, 1, 2]), members, np.array(list("aabcdbef")))


def near(user: str, n: int, query=(1.0, 0.05), **keywords) -> list[str]:
    p = small()
    rows = proto.Neighbourhood(p).nearest(np.array(query, dtype=np.float32), user, n, **keywords)
    return [f"{p.users[row]}{row}" for row in rows]


def test_neighbours_are_the_most_similar_other_users_one_row_each():
    assert near("x", 2) == ["a1", "b2"]
    assert near("a", 2) == ["b2", "c3"]
    assert near("x", 0) == []


def test_neighbours_widen_to_the_next_nearest_prototype():
    assert near("a", 4) == ["b2", "c3", "d4", "e6"]
    assert near("x", 6) == ["a1", "b2", "c3", "d4", "e6", "f7"]
    assert near("x", 1, query=(0.05, 1.0)) == ["d4"]


def test_too_few_neighbours_are_visible():
    with pytest.raises(DataError, match="user a has 5 other users"):
        near("a", 6)
    assert len(near("a", 6, allow_fewer=True)) == 5


def test_neighbours_are_never_the_user_and_never_twice(world):
    prototypes, _, _ = world
    neighbourhood = proto.Neighbourhood(prototypes)
    for row in range(0, len(prototypes.users), 29):
        user = prototypes.users[row]
        found = neighbourhood.nearest(prototypes.embeddings[row], user, 100)
        users = prototypes.users[found]
        assert user not in users
        assert len(set(users)) == 100
        inside = prototypes.labels[found] == prototypes.labels[row]
        assert inside[:29].all()
        assert not inside[29:].any()


# --- artefacts


def test_saved_prototypes_load_unchanged(world, tmp_path):
    prototypes, _, samples = world
    refined, _ = refinement.refine(prototypes, samples, settings(refine_epochs=1))
    proto.save(refined, tmp_path / "prototypes", HASHES)
    loaded = proto.load(tmp_path / "prototypes", expect=HASHES)
    for name in ("A", "labels", "embeddings", "users"):
        assert np.array_equal(getattr(loaded, name), getattr(refined, name))
    assert {name: value.tolist() for name, value in loaded.maps.items()} == {
        n: v.tolist() for n, v in refined.maps.items()
    }
    assert sorted(p.name for p in (tmp_path / "prototypes").iterdir()) == [
        "members.parquet",
        "prototypes.json",
        "prototypes.safetensors",
    ]


@pytest.mark.parametrize("name", sorted(HASHES))
def test_artefacts_of_another_run_are_refused(world, tmp_path, name):
    proto.save(world[0], tmp_path, HASHES)
    with pytest.raises(ArtifactError, match=f"another {name}: {HASHES[name]} there, other in this run"):
        proto.load(tmp_path, expect={**HASHES, name: "other"})


def test_half_written_artefacts_are_refused(world, tmp_path):
    with pytest.raises(ArtifactError, match="missing or broken"):
        proto.load(tmp_path)
    proto.save(world[0], tmp_path, HASHES)
    tensors = tmp_path / "prototypes.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-10])
    with pytest.raises(ArtifactError, match="half-written"):
        proto.load(tmp_path)
    tensors.write_bytes(whole)
    proto.load(tmp_path)
    (tmp_path / "members.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"members\.parquet is missing"):
        proto.load(tmp_path)
    manifest = json.loads((tmp_path / "prototypes.json").read_text())
    (tmp_path / "prototypes.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ArtifactError, match="format is 99"):
        proto.load(tmp_path)


def test_a_save_that_dies_leaves_no_artefact_and_no_scratch(world, tmp_path, monkeypatch):
    def die(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("pyarrow.parquet.write_table", die)
    with pytest.raises(OSError, match="disk full"):
        proto.save(world[0], tmp_path, HASHES)
    assert [p.name for p in tmp_path.iterdir()] == ["prototypes.safetensors"]
    with pytest.raises(ArtifactError):
        proto.load(tmp_path)


def test_importing_prototypes_and_scaling_loads_nothing_heavy():
    code = (
        "import sys\n"
        "import pgenrm_train.prototypes.clusters, pgenrm_train.prototypes.refinement\n"
        "import pgenrm_train.scaling.combine, pgenrm_train.scaling.stopping\n"
        "heavy = {'torch', 'sklearn', 'pandas', 'scipy', 'safetensors', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
