"""User prototypes: cluster preference analyses, refine the centroids with users' votes, find similar users (METHOD §6).

Equations, for prototype j and a sample with query q, votes y⁺ over y⁻ and history (q_τ, y_τ⁺, y_τ⁻), all of them embeddings:

    o_τ = σ(W [q_τ ; y_τ⁺ − y_τ⁻])      α_τ = softmax_τ( o_τᵀq/√d + ρ o_τᵀa_j/√d )      v = Σ_τ α_τ o_τ
    z = a_j + λ_q W_q q + λ_s W_s v      Δ = zᵀy⁺ − zᵀy⁻
    L = −log σ(Δ) + λ_cent ‖a_j − μ_j‖² + λ_tr ‖a_j − p_j‖²

Source: P-GenRM, arXiv 2602.12116.  Where the paper is silent, our choices:
- W (d, 2d), W_q and W_s (d, d) are *shared* by all prototypes, so that one pass trains all of them and small clusters borrow
  from large ones.  W_q and W_s start at zero: refinement starts at the unrefined centroids, and what it adds was learned.
- μ_j is the mean of the cluster that K-means found; p_j is a_j at the start of the epoch.
- Adam without decay for the maps.  Prototypes are updated by rows (SparseAdam): a prototype absent from a batch keeps its bits.
- A sample without history has v = 0.  Held-out users are drawn by seed; their votes never reach the optimiser.
- k is suggested by the share of the sum of singular values of **P**, uncentred.

Left out: gradient sync over several processes (one process refines), faiss.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pgenrm_train.config import PrototypesConfig
from pgenrm_train.errors import ArtifactError, ConfigError, DataError

if TYPE_CHECKING:
    import torch

MINI_BATCH_ROWS = 100_000  # above this many rows, K-means goes by mini-batches
CHUNK = 65_536  # rows held in memory at once by passes over a memory-mapped matrix
FORMAT = 1
HASHES = ("model", "embedder", "data")


@dataclass(frozen=True, slots=True)
class Prototypes:
    """`A` (k, d) float32; row i of `embeddings` (N, d) belongs to `users[i]` and to prototype `labels[i]`.

    `maps` holds W, W_q and W_s after refinement and is empty before.
    """

    A: np.ndarray
    labels: np.ndarray
    embeddings: np.ndarray
    users: np.ndarray
    maps: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rows:
    """Stands in for a large array with many equal rows: `rows[i]` is `table[index[i]]`, gathered when asked.

    `table` (T, d) may be memory-mapped; `index` (N,) or (N, h) of integers.  Padding may point at any row.
    """

    table: np.ndarray
    index: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.index.shape, self.table.shape[1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.table[self.index[rows]])


@dataclass(frozen=True, slots=True)
class RefinementBatch:
    """All samples of a refinement, aligned with the rows that were clustered; arrays, memory maps or `Rows`.

    `query`, `chosen`, `rejected` (N, d); `history_*` (N, h, d), padded with finite numbers; `mask` (N, h), true where an item
    is real; `users` (N,).  Raises DataError when the shapes disagree.
    """

    query: np.ndarray | Rows
    chosen: np.ndarray | Rows
    rejected: np.ndarray | Rows
    history_query: np.ndarray | Rows
    history_chosen: np.ndarray | Rows
    history_rejected: np.ndarray | Rows
    mask: np.ndarray
    users: np.ndarray

    def __post_init__(self) -> None:
        n, d = self.query.shape
        h = self.mask.shape[-1]
        expected = {"query": (n, d), "chosen": (n, d), "rejected": (n, d), "mask": (n, h), "users": (n,)}
        expected |= dict.fromkeys(("history_query", "history_chosen", "history_rejected"), (n, h, d))
        for name, shape in expected.items():
            if tuple(np.shape(getattr(self, name))) != shape:
                raise DataError(f"refinement samples: '{name}' has shape {np.shape(getattr(self, name))}, expected {shape}")

    def __len__(self) -> int:
        return int(self.query.shape[0])


# --- clusters -----------------------------------------------------------------------------------------------------------------


def suggest_k(P: np.ndarray, mass: float = 0.9) -> tuple[int, np.ndarray]:
    """The least k whose largest singular values hold `mass` of their sum, and the curve: entry i is the share held by i + 1.

    P (N, d), uncentred as in the paper.  Works on the smaller Gram matrix in float64, so a memory-mapped P need not fit twice.
    """
    if not 0 < mass <= 1:
        raise ConfigError(f"mass={mass} must lie in (0, 1]")
    _check_matrix(P)
    if len(P) >= P.shape[1]:
        gram = sum(x.T @ x for x in (c.astype(np.float64) for c in _chunks(P)))
    else:
        gram = P.astype(np.float64) @ P.astype(np.float64).T
    sigma = np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None))
    if not sigma.sum():
        raise DataError("the matrix of analyses is all zeros: there is nothing to cluster")
    curve = np.cumsum(sigma) / sigma.sum()
    return int(np.searchsorted(curve, mass - 1e-9)) + 1, curve


def cluster(P: np.ndarray, k: int, seed: int, users: Sequence[str] | None = None) -> Prototypes:
    """K-means (scikit-learn, k-means++) on P (N, d) float32; mini-batches above MINI_BATCH_ROWS rows.

    `users` (N,) says whose analysis each row is; without it each row is a user.  Raises ConfigError when k exceeds the number of
    distinct rows, DataError for values that are not finite.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    P = np.asarray(P, dtype=np.float32)
    _check_matrix(P)
    owners = np.arange(len(P)).astype(str) if users is None else np.asarray(users, dtype=str)
    if len(owners) != len(P):
        raise DataError(f"{len(owners)} users for {len(P)} analyses; expected one a row")
    distinct = _count_distinct(P, enough=k)
    if not 1 <= k <= distinct:
        raise ConfigError(f"prototypes.k={k} must be between 1 and {distinct}, the number of distinct preference analyses")
    if len(P) > MINI_BATCH_ROWS:
        model = MiniBatchKMeans(k, init="k-means++", n_init=3, batch_size=8192, random_state=seed).fit(P)
    else:
        model = KMeans(k, init="k-means++", n_init=4, random_state=seed).fit(P)
    return Prototypes(model.cluster_centers_.astype(np.float32), model.labels_.astype(np.int64), P, owners)


def assign(A: np.ndarray, X: np.ndarray) -> np.ndarray:
    """Index (N,) of the nearest prototype (Euclidean) of each row of X (N, d); the lowest index wins a tie."""
    squared = (A * A).sum(axis=1)
    nearest = [(squared - 2 * (chunk @ A.T)).argmin(axis=1) for chunk in _chunks(X)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *nearest])


# --- refinement ---------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Tensors of B samples; `difference` is y⁺ − y⁻, `items` is [q_τ ; y_τ⁺ − y_τ⁻] (B, h, 2d), `label` the prototype j."""

    label: torch.Tensor
    query: torch.Tensor
    difference: torch.Tensor
    items: torch.Tensor
    mask: torch.Tensor


def attend(batch: Batch, a: torch.Tensor, maps: Mapping[str, torch.Tensor], config: PrototypesConfig) -> torch.Tensor:
    """z (B, d) of the equations above, for prototypes `a` (B, d) already gathered by label."""
    import torch

    o = torch.sigmoid(batch.items @ maps["W"].T)
    # o·q + ρ o·a is one product with q + ρ a
    logits = (o @ (batch.query + config.rho * a).unsqueeze(-1)).squeeze(-1) / math.sqrt(a.shape[1])
    # the lowest finite number instead of −∞, and the mask once more after the softmax: a row without history gives 0, not NaN
    weights = logits.masked_fill(~batch.mask, torch.finfo(logits.dtype).min).softmax(-1) * batch.mask
    v = (weights.unsqueeze(1) @ o).squeeze(1)
    return a + config.lambda_query * batch.query @ maps["W_q"].T + config.lambda_summary * v @ maps["W_s"].T


def refine(
    prototypes: Prototypes,
    samples: RefinementBatch,
    config: PrototypesConfig,
    seed: int,
    *,
    batch_size: int = 512,
    holdout: float = 0.1,
    device: str = "cpu",
) -> tuple[Prototypes, dict[str, Any]]:
    """History-aware attentive refinement of all prototypes in one pass, then re-assignment of every row to the nearest one.

    Sample i belongs to row i of `prototypes`.  Metrics: `loss` (one a epoch, training samples), accuracy of Δ > 0 for z and for
    the unrefined centroids on held-out users (`holdout` of them; NaN when there are none) and on training users, measured with
    the labels before re-assignment; `moved_share` of rows that changed prototype; `empty_prototypes`.
    Raises DataError when samples and rows disagree, ConfigError when the learning rate makes the loss overflow.
    """
    if len(samples) != len(prototypes.labels) or not np.array_equal(np.asarray(samples.users, dtype=str), prototypes.users):
        raise DataError("refinement samples must be the clustered rows: same number, same users, same order")
    train, held = _split_users(prototypes.users, holdout, seed)
    state = Refinement(prototypes, config, seed, device)
    losses = []
    for epoch in range(config.refine_epochs):
        order = np.random.default_rng([seed, epoch]).permutation(train)
        losses.append(state.epoch(samples, [order[i : i + batch_size] for i in range(0, len(order), batch_size)]))
        if not math.isfinite(losses[-1]):
            raise ConfigError(f"prototypes.learning_rate={config.learning_rate} makes the refinement diverge; lower it")
    metrics: dict[str, Any] = {"loss": losses, "holdout_users": len(set(prototypes.users[held])), "holdout_pairs": len(held)}
    for name, rows in (("holdout", held), ("train", train)):
        margins, unrefined = state.margins(samples, rows, batch_size)
        metrics[f"{name}_accuracy"] = float((margins > 0).mean()) if len(rows) else math.nan
        metrics[f"{name}_accuracy_centroids"] = float((unrefined > 0).mean()) if len(rows) else math.nan
    A = state.A.detach().cpu().numpy()
    labels = assign(A, prototypes.embeddings)
    metrics["moved_share"] = float((labels != prototypes.labels).mean())
    metrics["empty_prototypes"] = len(A) - len(np.unique(labels))
    maps = {name: value.detach().cpu().numpy() for name, value in state.maps.items()}
    return dataclasses.replace(prototypes, A=A, labels=labels, maps=maps), metrics


class Refinement:
    """The learned state: A, the shared maps, their optimisers, and the two anchors of the regularisers."""

    def __init__(self, prototypes: Prototypes, config: PrototypesConfig, seed: int, device: str = "cpu") -> None:
        import torch

        self.config, self.labels, self.device = config, prototypes.labels, device
        d = prototypes.A.shape[1]
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(6 / (3 * d))  # Xavier's, for d outputs of 2d inputs
        W = (torch.rand(d, 2 * d, generator=generator) * 2 - 1) * bound
        start = {"W": W, "W_q": torch.zeros(d, d), "W_s": torch.zeros(d, d)}
        self.maps = {name: value.to(device).requires_grad_() for name, value in start.items()}
        self.centroids = torch.tensor(prototypes.A, device=device)
        self.A = self.centroids.clone().requires_grad_()
        self.mean = torch.tensor(_cluster_means(prototypes), device=device)
        self.previous = self.centroids.clone()
        self.map_optimiser = torch.optim.Adam(self.maps.values(), lr=config.learning_rate, fused=True)
        self.row_optimiser = torch.optim.SparseAdam([self.A], lr=config.learning_rate)

    def epoch(self, samples: RefinementBatch, batches: Sequence[np.ndarray]) -> float:
        """One pass; the mean loss per sample as met on the way.  p_j becomes the state at its start."""
        self.previous = self.A.detach().clone()
        total = sum(self.step(self.batch(samples, rows)) * len(rows) for rows in batches)
        return total / max(1, sum(map(len, batches)))

    def step(self, batch: Batch) -> float:
        loss, _ = self.loss(batch)
        self.map_optimiser.zero_grad()
        self.row_optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.map_optimiser.step()
        self.row_optimiser.step()  # type: ignore[no-untyped-call]
        return float(loss.item())

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss over the batch, and Δ (B,)."""
        from torch.nn import functional

        # sparse=True: the gradient holds the gathered rows only, so SparseAdam leaves every other prototype as it is
        a = functional.embedding(batch.label, self.A, sparse=True)
        margin = (attend(batch, a, self.maps, self.config) * batch.difference).sum(-1)
        centre = (a - self.mean[batch.label]).square().sum(-1)
        trajectory = (a - self.previous[batch.label]).square().sum(-1)
        penalty = self.config.lambda_centre * centre + self.config.lambda_trajectory * trajectory
        return (penalty - functional.logsigmoid(margin)).mean(), margin

    def margins(self, samples: RefinementBatch, rows: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Δ of `rows` with the refined z, and with the unrefined centroid in z's place."""
        import torch

        refined, unrefined = [np.zeros(0)], [np.zeros(0)]
        with torch.no_grad():
            for start in range(0, len(rows), batch_size):
                batch = self.batch(samples, rows[start : start + batch_size])
                refined.append(self.loss(batch)[1].cpu().numpy())
                unrefined.append((self.centroids[batch.label] * batch.difference).sum(-1).cpu().numpy())
        return np.concatenate(refined), np.concatenate(unrefined)

    def batch(self, samples: RefinementBatch, rows: np.ndarray) -> Batch:
        """Gather `rows`: the only copy of a memory-mapped sample."""
        past = samples.history_chosen[rows] - samples.history_rejected[rows]
        items = np.concatenate([samples.history_query[rows], past], axis=-1)
        difference = samples.chosen[rows] - samples.rejected[rows]
        arrays = (self.labels[rows], samples.query[rows], difference, items, np.asarray(samples.mask[rows], dtype=bool))
        return Batch(*(self._tensor(x) for x in arrays))

    def _tensor(self, x: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(x.astype(np.float32) if x.dtype.kind == "f" else np.ascontiguousarray(x)).to(self.device)


# --- neighbours ---------------------------------------------------------------------------------------------------------------


def neighbours(
    prototypes: Prototypes,
    member_embeddings: np.ndarray,
    member_users: np.ndarray,
    query_embedding: np.ndarray,
    user_id: str,
    n: int,
    *,
    allow_fewer: bool = False,
) -> list[int]:
    """Rows of the n most similar *other* users, most similar first: by cosine to `query_embedding` (d,) inside its nearest
    prototype, then, while there are too few, inside the next nearest.

    One row a user (the closest in the nearest prototype that holds any), never a row of `user_id`.  `member_embeddings` (N, d)
    and `member_users` (N,) are aligned with `prototypes.labels`.  Raises DataError when fewer than n other users exist, unless
    `allow_fewer`, in which case the list is shorter.
    """
    nearness = np.empty(len(prototypes.A), dtype=np.int64)
    nearness[((prototypes.A - query_embedding) ** 2).sum(axis=1).argsort(kind="stable")] = np.arange(len(prototypes.A))
    member_users = np.asarray(member_users, dtype=str)
    distance = nearness[prototypes.labels]
    width, rows = 1, np.zeros(0, dtype=np.int64)
    while True:
        # widening never reorders what was found: rows are sorted by prototype first
        pool = np.flatnonzero(distance < width)
        pool = pool[member_users[pool] != str(user_id)]
        rows = _closest_per_user(pool, distance, member_embeddings, member_users, query_embedding)
        if len(rows) >= n or width >= len(prototypes.A):
            break
        width *= 2
    if len(rows) < n and not allow_fewer:
        raise DataError(f"user {user_id} has {len(rows)} other users to borrow from, {n} are wanted; lower eval.pro or add users")
    return [int(row) for row in rows[:n]]


def _closest_per_user(
    pool: np.ndarray, distance: np.ndarray, embeddings: np.ndarray, users: np.ndarray, query: np.ndarray
) -> np.ndarray:
    candidates = embeddings[pool]
    similarity = candidates @ query / np.maximum(np.linalg.norm(candidates, axis=1), 1e-12)
    order = pool[np.lexsort((pool, -similarity, distance[pool]))]
    _, first = np.unique(users[order], return_index=True)
    return np.asarray(order[np.sort(first)])


# --- artefacts ----------------------------------------------------------------------------------------------------------------


def save(prototypes: Prototypes, folder: str | Path, hashes: Mapping[str, str]) -> None:
    """Write `prototypes.safetensors`, `members.parquet` (user_id, prototype, row) and, last, `prototypes.json`.

    `hashes` names what the analyses came from: `model`, `embedder` and `data`.  Each file is written beside its place and
    renamed; the JSON holds the checksums of the other two, so a write that was cut short is refused by `load`.
    """
    import pandas as pd
    from safetensors.numpy import save_file

    if set(hashes) != set(HASHES):
        raise ArtifactError(f"prototypes are saved with hashes of {', '.join(HASHES)}; got {', '.join(sorted(hashes)) or 'none'}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"A": prototypes.A, "labels": prototypes.labels, "embeddings": prototypes.embeddings, **prototypes.maps}
    rows = np.arange(len(prototypes.labels))
    members = pd.DataFrame({"user_id": prototypes.users, "prototype": prototypes.labels, "row": rows})
    members = members.sort_values(["prototype", "user_id", "row"])
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    _atomically(folder / "prototypes.safetensors", lambda path: save_file(contiguous, path))
    _atomically(folder / "members.parquet", lambda path: members.to_parquet(path, index=False))
    manifest = {
        "format": FORMAT,
        "k": len(prototypes.A),
        "d": int(prototypes.A.shape[1]),
        "rows": len(members),
        "hashes": dict(hashes),
        "files": {name: _sha256(folder / name) for name in ("prototypes.safetensors", "members.parquet")},
    }
    _atomically(folder / "prototypes.json", lambda path: path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8"))


def load(folder: str | Path, expect: Mapping[str, str] | None = None) -> Prototypes:
    """Read what `save` wrote.  Raises ArtifactError when it is missing, half-written, of another format, or when a hash in
    `expect` (any of `model`, `embedder`, `data`) differs."""
    import pandas as pd
    from safetensors.numpy import load_file

    folder = Path(folder)
    _check_manifest(folder, expect or {})
    tensors = load_file(folder / "prototypes.safetensors")
    members = pd.read_parquet(folder / "members.parquet").sort_values("row")
    fixed = {name: tensors.pop(name) for name in ("A", "labels", "embeddings")}
    return Prototypes(**fixed, users=np.asarray(members["user_id"], dtype=str), maps=tensors)


def _check_manifest(folder: Path, expect: Mapping[str, str]) -> None:
    try:
        manifest = json.loads((folder / "prototypes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _refuse(folder, "prototypes.json is missing or broken, so nothing complete was written here") from None
    if manifest.get("format") != FORMAT:
        raise _refuse(folder, f"its format is {manifest.get('format')}, this version reads {FORMAT}")
    for name, checksum in manifest["files"].items():
        if not (folder / name).exists() or _sha256(folder / name) != checksum:
            raise _refuse(folder, f"{name} is missing or half-written, its checksum differs from the one in prototypes.json")
    for name, wanted in expect.items():
        if (found := manifest["hashes"].get(name)) != wanted:
            raise _refuse(folder, f"they were made with another {name}: {found} there, {wanted} in this run")


def _refuse(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"the prototypes in {folder} cannot be used: {reason}; run recipe=prototypes again")


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(scratch)
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- helpers ------------------------------------------------------------------------------------------------------------------


def _chunks(X: np.ndarray) -> Iterator[np.ndarray]:
    return (np.asarray(X[start : start + CHUNK]) for start in range(0, len(X), CHUNK))


def _check_matrix(P: np.ndarray) -> None:
    if P.ndim != 2 or not P.size:
        raise DataError(f"the matrix of analyses has shape {P.shape}; expected (analyses, dimensions) with at least one row")
    if not all(np.isfinite(chunk).all() for chunk in _chunks(P)):
        raise DataError("the matrix of analyses holds values that are not finite; embed the analyses anew")


def _count_distinct(P: np.ndarray, enough: int) -> int:
    """Number of distinct rows, counted no further than `enough`."""
    seen: set[bytes] = set()
    for row in P:
        seen.add(row.tobytes())
        if len(seen) >= enough:
            break
    return len(seen)


def _cluster_means(prototypes: Prototypes) -> np.ndarray:
    """μ (k, d): mean of each cluster's rows, and the centroid itself where a cluster is empty."""
    import torch

    totals = torch.zeros(prototypes.A.shape)
    labels = torch.from_numpy(prototypes.labels)
    for start, chunk in zip(range(0, len(labels), CHUNK), _chunks(prototypes.embeddings), strict=True):
        totals.index_add_(0, labels[start : start + CHUNK], torch.tensor(chunk))
    sizes = np.bincount(prototypes.labels, minlength=len(prototypes.A))[:, None]
    return np.where(sizes > 0, totals.numpy() / np.maximum(sizes, 1), prototypes.A).astype(np.float32)


def _split_users(users: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of training users and rows of held-out users; with a single user nobody is held out."""
    names = np.unique(users)
    count = 0 if len(names) < 2 or share <= 0 else min(len(names) - 1, math.ceil(share * len(names)))
    chosen = np.random.default_rng([seed, len(names)]).permutation(names)[:count]
    held = np.isin(users, chosen)
    return np.flatnonzero(~held), np.flatnonzero(held)
