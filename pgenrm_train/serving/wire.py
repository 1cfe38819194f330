"""Bodies of requests and answers of the service's own routes, and their limits."""

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from pgenrm_train.config import ServeConfig
from pgenrm_train.records.ids import read_id
from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.serving.errors import Refused, bad_request


def _storable(text: str) -> str:
    if "\0" in text:  # PostgreSQL cannot store it
        raise ValueError("expected a text without NUL characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected a text without unpaired surrogates") from None
    return text


def as_user_id(text: str) -> str:
    """An id, spelled as in votes files (`records.ids`)."""
    if not (known := read_id(_storable(text))):
        raise ValueError("expected a user's id, got a blank text")
    return known


Text = Annotated[str, AfterValidator(_storable)]
UserId = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(as_user_id)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Turn(Strict):
    role: str = Field(pattern="^(user|assistant|system)$")
    content: Text


class QueryOrMessages(Strict):
    """A query, or the conversation that ends with it."""

    query: Text | None = None
    messages: list[Turn] | None = None

    @model_validator(mode="after")
    def _check_one_is_given(self) -> Self:
        if (self.query is None) == (self.messages is None):
            raise ValueError("expected one of query and messages")
        if self.messages is not None and (not self.messages or self.messages[-1].role != "user"):
            raise ValueError("messages: expected a last turn of the role user")
        return self

    def context(self) -> tuple[Message, ...]:
        if self.messages is None:
            return (Message("user", self.query or ""),)
        return tuple(Message(turn.role, turn.content) for turn in self.messages)

    def texts(self) -> Iterator[str]:
        yield from (message.content for message in self.context())


class Vote(QueryOrMessages):
    """One earlier vote; `time` in seconds since 1970."""

    chosen: Text
    rejected: Text
    time: FiniteFloat | None = None

    def texts(self) -> Iterator[str]:
        yield from (*super().texts(), self.chosen, self.rejected)

    @classmethod
    def of(cls, pair: PreferencePair) -> Self:
        """The vote of a pair; a single turn is a query."""
        turns = [Turn(role=m.role, content=m.content) for m in pair.context]
        single = len(turns) == 1
        return cls(
            query=pair.query if single else None,
            messages=None if single else turns,
            chosen=pair.chosen,
            rejected=pair.rejected,
            time=pair.time,
        )

    def as_pair(self, user_id: str, number: int = 0) -> PreferencePair:
        """The vote as a pair of a user; `number` makes its id."""
        return PreferencePair(
            str(number), user_id, self.context(), self.chosen, self.rejected, time=self.time
        )


class Votes(Strict):
    votes: Annotated[list[Vote], Field(min_length=1)]


class User(Strict):
    """A stored user, or the votes of another user; optionally with stated criteria."""

    user_id: UserId | None = None
    history: list[Vote] | None = None
    criteria: Text | None = None

    @model_validator(mode="after")
    def _check_one_user(self) -> Self:
        if (self.user_id is None) == (self.history is None):
            raise ValueError("expected one of user_id and history")
        return self


class ScoreRequest(User, QueryOrMessages):
    """Responses to score; `ind` and `pro` are by default those of the configuration."""

    responses: Annotated[list[Text], Field(min_length=1)]
    ind: Annotated[int, Field(ge=1)] | None = None
    pro: Annotated[int, Field(ge=0)] | None = None
    return_chains: bool = False

    def texts(self) -> Iterator[str]:
        yield from (*super().texts(), *self.responses, self.criteria or "")
        for vote in self.history or ():
            yield from vote.texts()


class FailedChains(Strict):
    """Chains of one presentation without a score; `responses` by number, in the order shown."""

    responses: list[int]
    kind: str
    chains: int


class ChainCounts(Strict):
    """Chains behind a score, those from the cache, and tokens that the model wrote."""

    chains: int
    cached_chains: int
    completion_tokens: int


class WrittenChain(Strict):
    """A chain as written; `neighbour` is the similar user whose history it was shown."""

    responses: list[int]
    neighbour: str | None
    text: str | None
    failure: str | None


class ScoreAnswer(Strict):
    scores: list[float | None]
    verified: list[bool]
    probabilities: list[float | None]
    ranking: list[int]
    failures: list[FailedChains]
    usage: ChainCounts
    model: str
    chains: list[WrittenChain] | None = None


def check_limits(texts: Iterator[str], responses: int, settings: ServeConfig) -> None:
    """Raise Refused for a text that is too long, or too many responses."""
    if responses > settings.max_responses:
        raise bad_request(f"responses: expected at most {settings.max_responses}, got {responses}")
    longest = max(map(len, texts), default=0)
    if longest > settings.max_text_characters:
        raise Refused(
            413,
            "text_too_long",
            f"a text has {longest} characters; expected at most {settings.max_text_characters}",
        )
