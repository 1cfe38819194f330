"""History-aware attentive refinement of prototypes by users' votes (METHOD §6).

Equations for prototype j and a sample with query q, vote y⁺ over y⁻ and history (q_τ, y_τ⁺, y_τ⁻), all
embeddings:

    o_τ = σ(W [q_τ ; y_τ⁺ − y_τ⁻])      α_τ = softmax_τ( o_τᵀq/√d + ρ o_τᵀa_j/√d )      v = Σ_τ α_τ o_τ
    z = a_j + λ_q W_q q + λ_s W_s v      Δ = zᵀy⁺ − zᵀy⁻
    L = −log σ(Δ) + λ_cent ‖a_j − μ_j‖² + λ_tr ‖a_j − p_j‖²

Source: P-GenRM, arXiv 2602.12116.  Where the paper is silent, our choices:
- W (d, 2d), W_q and W_s (d, d) are *shared* by all prototypes.  One pass trains all of them, and small
  clusters borrow from large ones.
- W_q starts at zero.  W and W_s start so that the history counts at once (`START`): W = [0 ; 5 I] and
  λ_s W_s = 4 (I − 𝟏𝟏ᵀ/d), where σ(x) ≈ ½ + x/4 and W_s cancels the ½.  So before the first update
  Δ ≈ (a_j + 5 Σ_τ α_τ (y_τ⁺ − y_τ⁻))ᵀ (y⁺ − y⁻): a response that resembles earlier choices wins.  From a
  random W, σ is nearly constant, v is almost the same for all users, and a small set never learns more.
- μ_j is the mean of the cluster from K-means; p_j is a_j at the start of the epoch.
- Adam without decay for the maps.  Prototypes are updated by rows (SparseAdam): a prototype absent from a
  batch keeps its bits.
- A sample without history has v = 0.  Held-out users are drawn by seed; their votes never reach the
  optimiser.
- Several processes (`Part`) divide every mini-batch and add up their gradients before each step, so that
  their updates are those of one process.  The all-reduces are explicit, because a call could bypass a
  wrapper, and NCCL does not add up sparse gradients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pgenrm_train.bootstrap import user_bootstrap
from pgenrm_train.errors import ConfigError, DataError
from pgenrm_train.prototypes.clusters import CHUNK, Prototypes, assign, chunks

if TYPE_CHECKING:
    import torch

HOLDOUT = 0.1  # share of the users whose votes measure the refinement
DRAWS = 1000  # of the bootstrap over users
START = (5.0, 4.0)  # slope of W and scale of λ_s W_s before the first update
BATCH, UPDATES = 512, 160  # largest mini-batch; updates that a small set gets at least
RefinementMetrics = dict[str, float | list[float]]


@dataclass(frozen=True, slots=True)
class RefinementSettings:
    """Weights of the equations and settings of the optimiser, named as in the section `prototypes`."""

    seed: int
    refine_epochs: int | None
    learning_rate: float
    rho: float
    lambda_query: float
    lambda_summary: float
    lambda_centre: float
    lambda_trajectory: float

    @classmethod
    def of(cls, section: object, seed: int) -> RefinementSettings:
        """Take the settings from a section of the configuration."""
        names = (field.name for field in dataclasses.fields(cls) if field.name != "seed")
        return cls(seed, **{name: getattr(section, name) for name in names})


@dataclass(frozen=True, slots=True)
class Lookup:
    """A large array with many equal rows: `rows[i]` is `table[index[i]]`, gathered on access.

    `table` (T, d) may be memory-mapped; `index` is (N,) or (N, h) of integers.  Padding may point at any row.
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
    """All samples of a refinement, aligned with the rows that were clustered.

    Arrays, memory maps or `Lookup`: `query`, `chosen`, `rejected` (N, d); `history_*` (N, h, d), padded with
    finite numbers; `mask` (N, h), true for real items; `users` (N,).  Raises DataError if shapes disagree.
    """

    query: np.ndarray | Lookup
    chosen: np.ndarray | Lookup
    rejected: np.ndarray | Lookup
    history_query: np.ndarray | Lookup
    history_chosen: np.ndarray | Lookup
    history_rejected: np.ndarray | Lookup
    mask: np.ndarray
    users: np.ndarray

    def __post_init__(self) -> None:
        n, d = self.query.shape
        h = self.mask.shape[-1]
        expected = {"query": (n, d), "chosen": (n, d), "rejected": (n, d), "mask": (n, h), "users": (n,)}
        expected |= dict.fromkeys(("history_query", "history_chosen", "history_rejected"), (n, h, d))
        for name, shape in expected.items():
            if tuple(np.shape(getattr(self, name))) != shape:
                raise DataError(
                    f"refinement samples: '{name}' has shape {np.shape(getattr(self, name))}, "
                    f"expected {shape}"
                )

    def __len__(self) -> int:
        return int(self.query.shape[0])


class Part(NamedTuple):
    """This process among `of` that refine together, connected by torch's default process group."""

    rank: int = 0
    of: int = 1

    def share(self, rows: np.ndarray) -> np.ndarray:
        return rows[self.rank :: self.of]

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over processes, in place."""
        if self.of > 1:
            import torch

            torch.distributed.all_reduce(tensor)
        return tensor


ALONE = Part()


class Batch(NamedTuple):
    """Tensors of B samples.

    `label` is the prototype j, `difference` is y⁺ − y⁻.  `items` holds [q_τ ; y_τ⁺ − y_τ⁻] (R, 2d) of the R
    real places of `mask` (B, h), in its order.
    """

    label: torch.Tensor
    query: torch.Tensor
    difference: torch.Tensor
    items: torch.Tensor
    mask: torch.Tensor


def attend(
    batch: Batch, a: torch.Tensor, maps: Mapping[str, torch.Tensor], settings: RefinementSettings
) -> torch.Tensor:
    """v (B, d) of the equations above, for prototypes `a` (B, d) already gathered by label."""
    import torch

    real = torch.sigmoid(batch.items @ maps["W"].T)  # padding is multiplied by nothing
    places = batch.mask.flatten().nonzero().squeeze(-1)
    o = (
        real.new_zeros(batch.mask.numel(), a.shape[1])
        .index_copy(0, places, real)
        .view(*batch.mask.shape, a.shape[1])
    )
    # o·q + ρ o·a is one product with q + ρ a
    logits = (o @ (batch.query + settings.rho * a).unsqueeze(-1)).squeeze(-1) / math.sqrt(a.shape[1])
    # the lowest finite number, not −∞, and the mask again after the softmax:
    # rows without history give 0, not NaN
    weights = logits.masked_fill(~batch.mask, torch.finfo(logits.dtype).min).softmax(-1) * batch.mask
    return (weights.unsqueeze(1) @ o).squeeze(1)


def margins(
    batch: Batch, a: torch.Tensor, maps: Mapping[str, torch.Tensor], settings: RefinementSettings
) -> torch.Tensor:
    """Δ (B,), with (W_s v)ᵀy computed as vᵀ(W_sᵀy).

    So no z is built, and the gradient for v needs no product with W_s.
    """
    y = batch.difference
    by_query = (y @ maps["W_q"] * batch.query).sum(-1)
    by_summary = (y @ maps["W_s"] * attend(batch, a, maps, settings)).sum(-1)
    return (a * y).sum(-1) + settings.lambda_query * by_query + settings.lambda_summary * by_summary


def refine(
    prototypes: Prototypes,
    samples: RefinementBatch,
    settings: RefinementSettings,
    *,
    batch_size: int | None = None,
    device: str = "cpu",
    part: Part = ALONE,
) -> tuple[Prototypes, RefinementMetrics]:
    """Refine all prototypes in one pass, then assign every row to the nearest one.

    Sample i belongs to row i of `prototypes`.  Every process of `part` gets all samples and returns the same.
    Unless given, a mini-batch has an eighth of the samples, between 64 and 512, and there are five passes,
    or as many more as make 160 updates.

    Metrics: `loss` (one per epoch, training samples); accuracy of Δ > 0 for z and for the unrefined
    centroids, on held-out users (NaN without any) and on training users, with the labels before
    re-assignment; `moved_share` of rows that changed prototype; `empty_prototypes`.

    Raises DataError if samples and rows disagree, ConfigError if the learning rate makes the loss overflow.
    """
    if len(samples) != len(prototypes.labels) or not np.array_equal(
        np.asarray(samples.users, dtype=str), prototypes.users
    ):
        raise DataError("refinement samples must be the clustered rows: same number, same users, same order")
    train, held = _split_users(prototypes.users, settings.seed)
    batch_size = batch_size or min(BATCH, max(64, len(train) // 8))
    passes = settings.refine_epochs
    if passes is None:
        passes = max(5, math.ceil(UPDATES / math.ceil(max(1, len(train)) / batch_size)))
    state = Refinement(prototypes, settings, device, part)
    losses = []
    for epoch in range(passes):
        order = np.random.default_rng([settings.seed, epoch]).permutation(train)
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        losses.append(state.epoch(samples, batches))
        if not math.isfinite(losses[-1]):
            raise ConfigError(
                f"prototypes.learning_rate={settings.learning_rate} makes the refinement diverge; lower it"
            )
    metrics: RefinementMetrics = {
        "loss": losses,
        "holdout_users": len(set(prototypes.users[held])),
        "holdout_pairs": len(held),
    }
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


def cold_start(
    refined: Prototypes,
    samples: RefinementBatch,
    labels: np.ndarray,
    settings: RefinementSettings,
) -> RefinementMetrics:
    """Accuracy of Δ > 0 on users outside the refinement, with their prototypes and without.

    `labels` (N,): the nearest prototype of each sample's user, −1 for unknown.  Without prototypes, and for
    unknown ones, the mean of all centroids takes their place.  Intervals (95 %) resample users.
    """
    import torch

    A = np.vstack([refined.A, refined.A.mean(axis=0)])  # row −1: the mean
    state = Refinement(dataclasses.replace(refined, A=A), settings)
    state.maps = {name: torch.from_numpy(value) for name, value in refined.maps.items()}
    rows = np.arange(len(samples))
    names, codes = np.unique(samples.users, return_inverse=True)
    facts: RefinementMetrics = {"pairs": len(samples), "users": len(names)}
    hits = {}
    for name, chosen in (
        ("accuracy", labels % len(A)),
        ("without prototypes accuracy", np.full(len(labels), len(A) - 1)),
    ):
        state.labels = chosen
        hits[name] = state.margins(samples, rows, 512)[0] > 0
    hits["difference"] = hits["accuracy"].astype(float) - hits["without prototypes accuracy"]
    for name, hit in hits.items():
        sums, counts = np.bincount(codes, weights=hit), np.bincount(codes).astype(float)
        ci95 = user_bootstrap(sums, counts, draws=DRAWS, seed=settings.seed)
        facts |= {name: float(hit.mean()), f"{name} ci95": list(ci95)}
    return facts


class Refinement:
    """Learnt state: A, the shared maps, their optimisers, and the two anchors of the regularisers."""

    def __init__(
        self,
        prototypes: Prototypes,
        settings: RefinementSettings,
        device: str = "cpu",
        part: Part = ALONE,
    ) -> None:
        import torch

        self.settings, self.labels, self.device, self.part = settings, prototypes.labels, device, part
        d = prototypes.A.shape[1]
        slope, scale = START
        one = torch.eye(d)
        W_s = torch.zeros(d, d)
        if settings.lambda_summary:
            W_s += scale / settings.lambda_summary * (one - 1 / d)
        start = {"W": torch.hstack([torch.zeros(d, d), slope * one]), "W_q": torch.zeros(d, d), "W_s": W_s}
        self.maps = {name: value.to(device).requires_grad_() for name, value in start.items()}
        self.centroids = torch.tensor(prototypes.A, device=device)
        self.A = self.centroids.clone().requires_grad_()
        self.mean = torch.tensor(_cluster_means(prototypes), device=device)
        self.previous = self.centroids.clone()
        self.map_optimiser = torch.optim.Adam(self.maps.values(), lr=settings.learning_rate, fused=True)
        self.row_optimiser = torch.optim.SparseAdam([self.A], lr=settings.learning_rate)

    def epoch(self, samples: RefinementBatch, batches: Sequence[np.ndarray]) -> float:
        """Make one pass, from whose start p_j is taken; return the mean loss per sample during the pass."""
        self.previous = self.A.detach().clone()
        total = sum(
            self.step(self.batch(samples, self.part.share(rows)), len(rows)) * len(rows) for rows in batches
        )
        return total / max(1, sum(map(len, batches)))

    def step(self, batch: Batch, size: int | None = None) -> float:
        """Make one update by a mini-batch of `size` samples, and return their mean loss.

        `batch` holds this process's share of them.
        """
        loss, _ = self.loss(batch, size)
        self.map_optimiser.zero_grad()
        self.row_optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._add_up_gradients()
        self.map_optimiser.step()
        self.row_optimiser.step()  # type: ignore[no-untyped-call]
        return float(self.part.add_up(loss.detach()).item())

    def _add_up_gradients(self) -> None:
        """Add up over processes; a row of A is updated only if some process has its prototype."""
        import torch

        if self.part.of == 1:
            return
        for value in self.maps.values():
            self.part.add_up(value.grad)
        grad = self.A.grad.coalesce()
        present = torch.zeros(len(self.A), device=self.device).index_fill(0, grad.indices()[0], 1.0)
        total = self.part.add_up(grad.to_dense())
        rows = self.part.add_up(present).nonzero().squeeze(-1)
        self.A.grad = torch.sparse_coo_tensor(
            rows[None], total[rows], self.A.shape, is_coalesced=True, check_invariants=False
        )

    def loss(self, batch: Batch, size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of the batch over `size` samples (default: those of the batch), and Δ (B,)."""
        from torch.nn import functional

        # sparse=True: the gradient holds the gathered rows only, so other prototypes stay unchanged
        a = functional.embedding(batch.label, self.A, sparse=True)
        margin = margins(batch, a, self.maps, self.settings)
        centre = (a - self.mean[batch.label]).square().sum(-1)
        trajectory = (a - self.previous[batch.label]).square().sum(-1)
        penalty = self.settings.lambda_centre * centre + self.settings.lambda_trajectory * trajectory
        return (penalty - functional.logsigmoid(margin)).sum() / (size or max(1, len(margin))), margin

    def margins(
        self, samples: RefinementBatch, rows: np.ndarray, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Δ of `rows` with the refined z, and with the unrefined centroid in its place."""
        import torch

        refined, unrefined = [np.zeros(0)], [np.zeros(0)]
        with torch.no_grad():
            for start in range(0, len(rows), batch_size):
                batch = self.batch(samples, rows[start : start + batch_size])
                refined.append(self.loss(batch)[1].cpu().numpy())
                unrefined.append((self.centroids[batch.label] * batch.difference).sum(-1).cpu().numpy())
        return np.concatenate(refined), np.concatenate(unrefined)

    def batch(self, samples: RefinementBatch, rows: np.ndarray) -> Batch:
        """Gather `rows`; this is the only copy of a memory-mapped sample."""
        import torch

        mask = np.asarray(samples.mask[rows], dtype=bool)
        past = samples.history_chosen[rows][mask] - samples.history_rejected[rows][mask]
        items = np.concatenate([samples.history_query[rows][mask], past], axis=-1)
        difference = samples.chosen[rows] - samples.rejected[rows]
        arrays = (self.labels[rows], samples.query[rows], difference, items, mask)
        typed = (x.astype(np.float32) if x.dtype.kind == "f" else np.ascontiguousarray(x) for x in arrays)
        return Batch(*(torch.from_numpy(x).to(self.device) for x in typed))


def _cluster_means(prototypes: Prototypes) -> np.ndarray:
    """μ (k, d): mean of each cluster's rows, or the centroid itself if the cluster is empty."""
    import torch

    totals = torch.zeros(prototypes.A.shape)
    labels = torch.from_numpy(prototypes.labels)
    for start, chunk in zip(range(0, len(labels), CHUNK), chunks(prototypes.embeddings), strict=True):
        totals.index_add_(0, labels[start : start + CHUNK], torch.tensor(chunk))
    sizes = np.bincount(prototypes.labels, minlength=len(prototypes.A))[:, None]
    return np.where(sizes > 0, totals.numpy() / np.maximum(sizes, 1), prototypes.A).astype(np.float32)


def _split_users(users: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of training users and of held-out users; a single user is never held out."""
    names = np.unique(users)
    count = min(len(names) - 1, math.ceil(HOLDOUT * len(names)))
    chosen = np.random.default_rng([seed, len(names)]).permutation(names)[:count]
    held = np.isin(users, chosen)
    return np.flatnonzero(~held), np.flatnonzero(held)
