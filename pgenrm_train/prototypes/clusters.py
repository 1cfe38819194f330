"""User prototypes: clusters of preference analyses with their members, and similar users (METHOD §6, §7).

Source: P-GenRM, arXiv 2602.12116.  Where the paper is silent, our choices:
- k is the least number whose largest singular values hold a given share of the sum of all singular values of
  **P**, uncentred.
- A user's similar users are ranked by cosine inside the nearest prototype, one row per user.  If these are
  too few, the search widens to the next nearest prototype.
`refinement` moves the centroids by users' votes.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pgenrm_train.errors import ArtifactError, ConfigError, DataError
from pgenrm_train.files import atomic, read_json, sha256_file, write_json, write_table

LARGE = 20_000  # above this many rows, K-means uses faiss if installed, else mini-batches
FAISS_ROWS = 256  # rows per centroid in the sample that faiss clusters: its own default
TRIES = 3  # starts of K-means on large sets, of which the best counts
CHUNK = 65_536  # rows held in memory at once by passes over a memory-mapped matrix
FORMAT = 2
HASHES = ("model", "embedder", "data")
TENSORS, MEMBERS, MANIFEST = "prototypes.safetensors", "members.parquet", "prototypes.json"


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


# the start of our teachers' chains, and of models that learnt from them
_RECITAL = re.compile(r"Pair \d+:[^.\n]*(?:\.\s*|\n|$)")


def preference_text(analysis: str) -> str:
    """The conclusions of an analysis, which are embedded in the index and in queries to it.

    "Pair 1: …" recitals of the history are cut: they would make users similar who were shown similar
    responses.  An analysis of recitals alone is returned uncut.
    """
    return _RECITAL.sub("", analysis).strip() or analysis


# ---- clusters ----


def suggest_k(P: np.ndarray, mass: float = 0.9) -> tuple[int, np.ndarray]:
    """Return the least k whose largest singular values hold `mass` of their sum, and the curve of shares.

    Entry i of the curve is the share held by the i + 1 largest.  P (N, d) is uncentred as in the paper.  The
    computation uses the smaller Gram matrix in float64, so a memory-mapped P need not fit twice.
    """
    if not 0 < mass <= 1:
        raise ConfigError(f"mass={mass} must lie in (0, 1]")
    _check_matrix(P)
    if len(P) >= P.shape[1]:
        gram = sum(x.T @ x for x in (c.astype(np.float64) for c in chunks(P)))
    else:
        gram = P.astype(np.float64) @ P.astype(np.float64).T
    sigma = np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None))
    if not sigma.sum():
        raise DataError("the matrix of analyses is all zeros: there is nothing to cluster")
    curve = np.cumsum(sigma) / sigma.sum()
    return int(np.searchsorted(curve, mass - 1e-9)) + 1, curve


def cluster(P: np.ndarray, k: int, seed: int, users: Sequence[str] | None = None) -> Prototypes:
    """K-means from k-means++ starts on P (N, d) float32.

    Up to LARGE rows this is scikit-learn's K-means, above it faiss on a sample, or mini-batches.  `users`
    (N,) is the user of each row; without it each row is a user.  Raises ConfigError if k exceeds the number
    of distinct rows, DataError for values that are not finite.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    P = np.asarray(P, dtype=np.float32)
    _check_matrix(P)
    owners = np.arange(len(P)).astype(str) if users is None else np.asarray(users, dtype=str)
    if len(owners) != len(P):
        raise DataError(f"{len(owners)} users for {len(P)} analyses; expected one per row")
    distinct = count_distinct(P, enough=k)
    if not 1 <= k <= distinct:
        raise ConfigError(
            f"prototypes.k={k} must be between 1 and {distinct}, the number of distinct preference analyses"
        )
    if len(P) > LARGE and find_spec("faiss"):
        A = _faiss_centroids(P, k, seed)
        return Prototypes(A, assign(A, P), P, owners)
    if len(P) > LARGE:
        model = MiniBatchKMeans(k, init="k-means++", n_init=TRIES, batch_size=8192, random_state=seed).fit(P)
    else:
        model = KMeans(k, init="k-means++", n_init=4, random_state=seed).fit(P)
    return Prototypes(model.cluster_centers_.astype(np.float32), model.labels_.astype(np.int64), P, owners)


def _faiss_centroids(P: np.ndarray, k: int, seed: int) -> np.ndarray:
    import faiss
    from sklearn.cluster import kmeans_plusplus

    rows = np.random.default_rng(seed).choice(len(P), min(len(P), FAISS_ROWS * k), replace=False)
    sample, fits = np.ascontiguousarray(P[np.sort(rows)]), []
    for attempt in range(TRIES):
        start = kmeans_plusplus(sample, k, random_state=seed + attempt)[0].astype(np.float32)
        model = faiss.Kmeans(P.shape[1], k, max_points_per_centroid=FAISS_ROWS)
        fits.append((model.train(sample, init_centroids=start), attempt, model.centroids))
    return np.asarray(min(fits)[2], dtype=np.float32)


def assign(A: np.ndarray, X: np.ndarray) -> np.ndarray:
    """Index (N,) of the nearest prototype (Euclidean) of each row of X (N, d); the lowest wins a tie."""
    squared = (A * A).sum(axis=1)
    nearest = [(squared - 2 * (chunk @ A.T)).argmin(axis=1) for chunk in chunks(X)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *nearest])


# ---- neighbours ----


class Neighbourhood:
    """Index of similar users among the members of `prototypes`; a query costs as much as a few prototypes."""

    def __init__(self, prototypes: Prototypes) -> None:
        self.prototypes = prototypes
        order = np.argsort(prototypes.labels, kind="stable")
        starts = np.searchsorted(prototypes.labels[order], np.arange(1, len(prototypes.A)))
        self.members = np.split(order, starts)

    def nearest(self, query: np.ndarray, user_id: str, n: int, *, allow_fewer: bool = False) -> list[int]:
        """Rows of the n most similar *other* users, most similar first.

        Users are ranked by cosine to `query` (d,) inside its nearest prototype and then, while there are too
        few, inside the next nearest.  One row per user (the closest in the nearest prototype that holds any),
        never one of `user_id`.  Raises DataError if fewer than n other users exist; with `allow_fewer` the
        list is shorter.
        """
        rows: dict[str, int] = {}
        users = self.prototypes.users
        for j in ((self.prototypes.A - query) ** 2).sum(axis=1).argsort(kind="stable"):
            if len(rows) >= n:
                break
            for row in self._ranked(self.members[j], query):
                if len(rows) >= n:
                    break
                if users[row] != str(user_id):
                    rows.setdefault(str(users[row]), int(row))
        if len(rows) < n and not allow_fewer:
            raise DataError(
                f"user {user_id} has {len(rows)} other users to borrow from, {n} are wanted; "
                "lower eval.pro or add users"
            )
        return list(rows.values())

    def _ranked(self, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
        members = self.prototypes.embeddings[rows]
        similarity = members @ query / np.maximum(np.linalg.norm(members, axis=1), 1e-12)
        return np.asarray(rows[np.lexsort((rows, -similarity))])


# ---- artefacts ----


def save(prototypes: Prototypes, folder: str | Path, hashes: Mapping[str, str]) -> None:
    """Write `prototypes.safetensors`, `members.parquet` (user_id, prototype, row), then `prototypes.json`.

    `hashes` are those of the `model`, `embedder` and `data` that the analyses came from.  The JSON holds the
    checksums of the other two files, so that `load` refuses an interrupted write.
    """
    import pandas as pd
    from safetensors.numpy import save_file

    if set(hashes) != set(HASHES):
        raise ArtifactError(
            f"prototypes are saved with hashes of {', '.join(HASHES)}; "
            f"got {', '.join(sorted(hashes)) or 'none'}"
        )
    folder, rows = Path(folder), np.arange(len(prototypes.labels))
    members = pd.DataFrame(
        {"user_id": prototypes.users, "prototype": prototypes.labels, "row": rows}
    ).sort_values(["prototype", "user_id", "row"])
    tensors = {
        "A": prototypes.A,
        "labels": prototypes.labels,
        "embeddings": prototypes.embeddings,
        **prototypes.maps,
    }
    with atomic(folder / TENSORS) as path:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    write_table(folder / MEMBERS, members)
    manifest = {
        "format": FORMAT,
        "k": len(prototypes.A),
        "d": int(prototypes.A.shape[1]),
        "rows": len(members),
        "hashes": dict(hashes),
        "files": {name: sha256_file(folder / name) for name in (TENSORS, MEMBERS)},
    }
    write_json(folder / MANIFEST, manifest)


def load(folder: str | Path, expect: Mapping[str, str] | None = None) -> Prototypes:
    """Read what `save` wrote.

    Raises ArtifactError if it is missing, half-written or of another format, or if a hash in `expect` (any of
    `model`, `embedder`, `data`) differs.
    """
    import pandas as pd
    from safetensors.numpy import load_file

    folder = Path(folder)
    _check_manifest(folder, expect or {})
    tensors = load_file(folder / TENSORS)
    members = pd.read_parquet(folder / MEMBERS).sort_values("row")
    arrays = {name: tensors.pop(name) for name in ("A", "labels", "embeddings")}
    return Prototypes(**arrays, users=np.asarray(members["user_id"], dtype=str), maps=tensors)


def _check_manifest(folder: Path, expect: Mapping[str, str]) -> None:
    try:
        manifest = read_json(folder / MANIFEST)
    except ArtifactError:
        raise _refuse(folder, f"{MANIFEST} is missing or broken, so the write was interrupted") from None
    if manifest.get("format") != FORMAT:
        raise _refuse(folder, f"its format is {manifest.get('format')}, this version reads {FORMAT}")
    for name, checksum in manifest["files"].items():
        if not (folder / name).exists() or sha256_file(folder / name) != checksum:
            raise _refuse(
                folder, f"{name} is missing or half-written: its checksum is not the one in {MANIFEST}"
            )
    for name, wanted in expect.items():
        if (saved := manifest["hashes"].get(name)) != wanted:
            raise _refuse(folder, f"they were made with another {name}: {saved} there, {wanted} in this run")


def _refuse(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"the prototypes in {folder} cannot be used: {reason}; run recipe=prototypes again")


# ---- helpers ----


def chunks(X: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of rows of a matrix that may be memory-mapped."""
    return (np.asarray(X[start : start + CHUNK]) for start in range(0, len(X), CHUNK))


def _check_matrix(P: np.ndarray) -> None:
    if P.ndim != 2 or not P.size:
        raise DataError(
            f"the matrix of analyses has shape {P.shape}; "
            "expected (analyses, dimensions) with at least one row"
        )
    if not all(np.isfinite(chunk).all() for chunk in chunks(P)):
        raise DataError("the matrix of analyses holds values that are not finite; embed the analyses again")


def count_distinct(P: np.ndarray, enough: int) -> int:
    """Count distinct rows, up to `enough`."""
    distinct: set[bytes] = set()
    for row in P:
        distinct.add(row.tobytes())
        if len(distinct) >= enough:
            break
    return len(distinct)
