"""Types of votes: a pair, its texts and signals, and the example that a pair becomes.

A *pair* is one vote of one user: the conversation so far, the response chosen and the response rejected.  An
*example* is the input of a reward model: a user's history, a query and b ≥ 2 responses in presentation
order.  Explicit signals (stated criteria, style, self-description) have a field of their own, so that masking
is a matter of type (see `prompts.masking`).

`rows` reads and writes pairs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

ContentKey = tuple[tuple[tuple[str, str], ...], frozenset[str]]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is `user`, `assistant` or `system`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ExplicitSignals:
    """Preferences that a user stated (METHOD §1, `E`); all optional, and an empty text counts as absent."""

    criteria: str | None = None
    self_description: str | None = None
    style: str | None = None
    attributes: tuple[tuple[str, float], ...] = ()
    synthetic: bool = False  # inferred by an LLM from the history, not stated

    def texts(self) -> tuple[str, ...]:
        """All free texts: masking must keep them out of a prompt."""
        return tuple(t for t in (self.criteria, self.self_description, self.style) if t)


@dataclass(frozen=True, slots=True)
class HistoryItem:
    """One earlier vote of the user, as a prompt may show it: no scores, no attributes.

    `query` alone, with both responses empty, is a text that the user wrote (LaMP-QA's profiles).
    """

    query: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One vote: `user_id` preferred `chosen` to `rejected` after `context`, which ends with a user turn.

    >>> pair = PreferencePair("p1", "ann", (Message("user", "Fix my garden?"),), "Gladly.", "No.")
    >>> pair.query, pair.split
    ('Fix my garden?', 'train')
    """

    pair_id: str
    user_id: str
    context: tuple[Message, ...]
    chosen: str
    rejected: str
    conversation_id: str = ""
    chosen_score: float | None = None
    rejected_score: float | None = None
    turn: int = 0
    # The slice of the pair: easy | medium | hard | rival in PersonaWorld, the column `type` elsewhere.
    kind: str | None = None
    scenario: str | None = None
    split: str = "train"  # within the user
    # Across users: val and test mark held-out users, any other word a training user.
    user_split: str = "train"
    cohort: str | None = None  # group of users that reports compare, e.g. seen_persona | unseen_persona
    time: float | None = None  # of the vote, seconds since 1970 (UTC); its history is from before it
    position: int | None = None  # where the user saw the chosen response, from 0; never in a prompt
    # Votes of all other users on the pair, as the source counts them: for chosen, for rejected.
    others: tuple[int, int] | None = None
    explicit: ExplicitSignals = field(default_factory=ExplicitSignals)

    @property
    def query(self) -> str:
        """Text of the last user turn."""
        return self.context[-1].content

    @property
    def trains(self) -> bool:
        """Whether training may use the pair: the train part of a user who is not held out."""
        return self.split == "train" and self.user_split not in ("val", "test")

    def as_history(self) -> HistoryItem:
        """The pair as an item of a later prompt's history."""
        return HistoryItem(self.query, self.chosen, self.rejected)


@dataclass(frozen=True, slots=True)
class Example:
    """One input of a reward model; the user preferred `responses[chosen_index]`."""

    pair_id: str
    user_id: str
    context: tuple[Message, ...]
    responses: tuple[str, ...]
    chosen_index: int
    history: tuple[HistoryItem, ...] = ()
    explicit: ExplicitSignals = field(default_factory=ExplicitSignals)
    kind: str | None = None
    scenario: str | None = None

    @property
    def query(self) -> str:
        """Text of the last user turn."""
        return self.context[-1].content


def content_key(context: Iterable[Message], responses: Iterable[str]) -> ContentKey:
    """Key of a comparison, whoever voted and whichever won: conversation and unordered responses."""
    return tuple((m.role, m.content) for m in context), frozenset(responses)
