"""A second judge of the validation's chains, which no reward depends on.

A policy may learn what its judge rewards without writing better chains: in a study of rubric rewards the
training judge's scores rose while an independent judge's fell by 3 to 22 points (arXiv 2608.11669).  So
`judge_gold=` rates the chains of each validation of CRE and the curriculum, and never a training chain:

    gap = mean over chains rated by both of (training judge − second judge)

Two judges may differ by a constant.  A gap is a sign only if it widens: if the 95 % interval of the gap, from
users drawn with replacement, is above the gap of the first validation.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from pgenrm_train.backends.grpo.progress import DRAWS, Metrics
from pgenrm_train.backends.grpo.scoring import ScoredChain
from pgenrm_train.backends.protocols import Judge
from pgenrm_train.bootstrap import mean, user_bootstrap
from pgenrm_train.rewards.hacking_signs import OWN
from pgenrm_train.rewards.training_rows import RowExtra, withheld_signals
from pgenrm_train.run.concurrency import concurrently

PREFIX = "validation/judge_gold/"
ROUNDING = 1e-9  # of means: equal gaps must not look wider
Rated = tuple[ScoredChain, RowExtra]


def gold_metrics(
    groups: Sequence[Sequence[ScoredChain]], extras: Sequence[RowExtra], judge: Judge, in_flight: int
) -> Metrics:
    """Scores of both judges on the readable chains with the user's own history, and their gap.

    A chain without a verdict, or whose judge raises, is left out and counted in `null_share`.
    """
    chains: list[Rated] = [
        (chain, extra)
        for group, extra in zip(groups, extras, strict=True)
        for chain in group
        if (extra.get("probe") or OWN) == OWN and chain.failure is None and withheld_signals(extra)
    ]
    verdicts = dict(concurrently(lambda rated: _verdict(judge, *rated), chains, in_flight))
    known = [(*chains[i], score) for i, score in verdicts.items() if score is not None]
    both = [(extra, chain.process, score) for chain, extra, score in known if chain.process is not None]
    low, high = _interval([(extra, process - score) for extra, process, score in both])
    return {
        f"{PREFIX}score": mean([score for *_, score in known]),
        f"{PREFIX}training_judge": mean([process for _, process, _ in both]),
        f"{PREFIX}gap": mean([process - score for _, process, score in both]),
        f"{PREFIX}gap_low": low,
        f"{PREFIX}gap_high": high,
        f"{PREFIX}null_share": 1 - len(known) / len(chains) if chains else None,
    }


def _verdict(judge: Judge, chain: ScoredChain, extra: RowExtra) -> float | None:
    try:
        score = judge(chain.text or "", extra)
    except Exception:  # a judge's failure must not end training
        return None
    return None if score is None or not np.isfinite(score) else float(score)


def _interval(gaps: Sequence[tuple[RowExtra, float]]) -> tuple[float | None, float | None]:
    """95 % interval of the mean gap; None with fewer than two users."""
    of_user: dict[str, list[float]] = {}
    for extra, gap in gaps:
        of_user.setdefault(extra["user_id"], []).append(gap)
    if len(of_user) < 2:
        return None, None
    sums, counts = (np.array([of(values) for values in of_user.values()], dtype=float) for of in (sum, len))
    return user_bootstrap(sums, counts, draws=DRAWS, seed=0)


def widened(lines: Sequence[Mapping[str, object]], stage: str) -> str | None:
    """A sentence if the newest of a stage's validations has a wider gap than the first, else None.

    `lines`: rows of metrics.jsonl, oldest first.
    """

    def of(line: Mapping[str, object], name: str) -> float | None:
        value = line.get(f"{stage}/{PREFIX}{name}")
        return float(value) if isinstance(value, int | float) else None

    rated = [line for line in lines if of(line, "gap") is not None]
    if len(rated) < 2:
        return None
    first, last = of(rated[0], "gap"), of(rated[-1], "gap")
    low, high = of(rated[-1], "gap_low"), of(rated[-1], "gap_high")
    if first is None or last is None or low is None or high is None or low - first < ROUNDING:
        return None
    scores = " to ".join(f"{of(line, 'score') or 0.0:.2f}" for line in (rated[0], rated[-1]))
    return (
        f"{stage}: the training judge's lead over judge_gold grew from {first:.2f} to {last:.2f} [{low:.2f}, "
        f"{high:.2f}] on validation chains, while judge_gold's score went from {scores}: the chains may "
        "please the training judge alone"
    )
