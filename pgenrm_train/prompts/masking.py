"""Masking: the signals of a user that a stage may see, decided by type.

Stage 2 (METHOD §4) hides a user's explicit criteria and keeps them as supervision.  A prompt is written from
a view:

    MaskedView        context, history, responses; it has no field for a criterion
    └── FullView      the same and the explicit signals
    Supervision       the withheld label and explicit signals, for teachers, judges and rewards only

Policies:
- `full` shows everything (METHOD §3).
- `masked` never shows explicit signals (METHOD §4).
- `history_dropout` is `masked`, and drops a random part of some histories.  *Our choice*, for users with
  little feedback.
- `mixed` draws between full and masked.  *Our choice*: one model for users with and without stated criteria.

`show_probability` is the share of complete histories of `history_dropout`, and of full views of `mixed`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pgenrm_train.config.data import MASKINGS
from pgenrm_train.errors import ConfigError
from pgenrm_train.records.pairs import Example, ExplicitSignals, HistoryItem, Message, PreferencePair


@dataclass(frozen=True)
class MaskedView:
    """A model's view without explicit signals; `responses` are in presentation order."""

    context: tuple[Message, ...]
    history: tuple[HistoryItem, ...]
    responses: tuple[str, ...]

    @property
    def query(self) -> str:
        """Text of the last user turn."""
        return self.context[-1].content


@dataclass(frozen=True)
class FullView(MaskedView):
    """A view with the explicit signals."""

    explicit: ExplicitSignals


@dataclass(frozen=True)
class Supervision:
    """The fields that no prompt of the reward model holds: the choice and the explicit signals."""

    chosen_index: int
    explicit: ExplicitSignals


def present(pair: PreferencePair, history: Sequence[HistoryItem], order: int) -> Example:
    """The example of a pair; order 0 shows the chosen response first, order 1 second.

    Raises ValueError for another order.
    """
    if order not in (0, 1):
        raise ValueError(
            f"order: {order!r} is no presentation order; valid ones are 0 (chosen first) and 1 (second)"
        )
    responses = (pair.chosen, pair.rejected) if order == 0 else (pair.rejected, pair.chosen)
    return Example(
        pair_id=pair.pair_id,
        user_id=pair.user_id,
        context=pair.context,
        responses=responses,
        chosen_index=order,
        history=tuple(history),
        explicit=pair.explicit,
        kind=pair.kind,
        scenario=pair.scenario,
    )


def apply_masking(
    example: Example, policy: str, rng: random.Random, *, show_probability: float = 0.5
) -> tuple[MaskedView | FullView, Supervision]:
    """Split an example into the model's view under `policy` and the withheld supervision.

    Only `history_dropout` and `mixed` draw from `rng`.  Raises ConfigError for an unknown policy, or for a
    `show_probability` outside [0, 1].

    >>> question, stated = (Message("user", "Fix my garden?"),), ExplicitSignals(criteria="be formal")
    >>> example = Example("p1", "ann", question, ("Gladly.", "No."), chosen_index=0, explicit=stated)
    >>> view, supervision = apply_masking(example, "masked", random.Random(0))
    >>> hasattr(view, "explicit"), supervision.explicit.criteria
    (False, 'be formal')
    """
    if policy not in MASKINGS:
        raise ConfigError(
            f"masking.policy: {policy!r} is not a masking policy; valid ones are {', '.join(MASKINGS)}"
        )
    if not 0.0 <= show_probability <= 1.0:
        raise ConfigError(
            f"masking.show_probability: {show_probability!r} is not a probability; valid ones lie in [0, 1]"
        )
    supervision = Supervision(example.chosen_index, example.explicit)
    if policy == "full" or (policy == "mixed" and rng.random() < show_probability):
        return FullView(example.context, example.history, example.responses, example.explicit), supervision
    history = (
        drop_history(example.history, rng, show_probability)
        if policy == "history_dropout"
        else example.history
    )
    return MaskedView(example.context, history, example.responses), supervision


def drop_history(
    history: tuple[HistoryItem, ...], rng: random.Random, show_probability: float
) -> tuple[HistoryItem, ...]:
    """The full history with `show_probability`, else k of its h items in their order, k uniform on 0..h."""
    if rng.random() < show_probability:
        return history
    kept = rng.sample(range(len(history)), rng.randint(0, len(history)))
    return tuple(history[i] for i in sorted(kept))
