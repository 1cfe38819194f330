"""The service behind all faces: finds the user's votes, checks limits, scores, counts."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pgenrm_train.config import Config
from pgenrm_train.errors import DataError, EngineLostError
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.rows import read_pairs
from pgenrm_train.serving.calibration import Calibration
from pgenrm_train.serving.errors import Refused, bad_request
from pgenrm_train.serving.metrics import Metrics
from pgenrm_train.serving.scoring import NO_PAIR, Scored, Scorer, Task
from pgenrm_train.serving.store import UserStore
from pgenrm_train.serving.wire import (
    FailedChains,
    ScoreAnswer,
    ScoreRequest,
    Usage,
    User,
    Vote,
    WrittenChain,
    check_limits,
)

RETRY_SECONDS = 1
ANONYMOUS = ""  # the user id of a history in the request, which no stored user can have


@dataclass(frozen=True)
class Service:
    """A model, the users' votes and the calibration, if there is one."""

    config: Config
    scorer: Scorer
    store: UserStore
    metrics: Metrics
    calibration: Calibration | None = None

    async def score(self, request: ScoreRequest) -> ScoreAnswer:
        """Scores of at least two responses.  Raises Refused."""
        check_limits(request.texts(), len(request.responses), self.config.serve)
        if len(request.responses) < 2:
            raise bad_request("responses: expected at least two texts, got 1")
        task = await self.task(request, request, request.responses, request.ind, request.pro)
        scored = await self.run(task)
        return self._answer(scored, return_chains=request.return_chains)

    async def task(
        self,
        user: User,
        question: ScoreRequest,
        responses: Sequence[str],
        ind: int | None = None,
        pro: int | None = None,
    ) -> Task:
        """The task of a request, with the user's votes.  Raises Refused for an unknown user or no votes."""
        defaults = self.config.score
        user_id, votes = await self._votes(user)
        return Task(
            user_id=user_id,
            stored=user.user_id is not None,
            votes=tuple(votes),
            context=question.context(),
            responses=tuple(responses),
            criteria=user.criteria,
            ind=defaults.ind if ind is None else ind,
            pro=defaults.pro if pro is None else pro,
        )

    async def run(self, task: Task) -> Scored:
        """Score within the time and the chains that a request may have.  Raises Refused."""
        settings = self.config.serve
        if task.chains() > settings.max_chains:
            raise bad_request(
                f"the request would cost {task.chains()} chains; expected at most {settings.max_chains}: "
                "lower ind, pro or the number of responses"
            )
        try:
            async with asyncio.timeout(settings.timeout_seconds):
                scored = await self.scorer.score(task)
        except TimeoutError:
            message = f"the request took more than {settings.timeout_seconds:g} s"
            raise Refused(503, "timeout", message, RETRY_SECONDS) from None
        except EngineLostError as error:
            raise Refused(503, "engine_lost", str(error), RETRY_SECONDS) from None
        except DataError as error:
            raise bad_request(str(error)) from None
        self.metrics.count(scored)
        return scored

    async def votes(self, user_id: str) -> list[PreferencePair]:
        """The stored votes.  Raises Refused for an unknown user."""
        if not (votes := await asyncio.to_thread(self.store.votes, user_id)):
            raise Refused(404, "unknown_user", "this user has no stored votes; PUT some first")
        return votes

    async def add(self, user_id: str, votes: Sequence[Vote], *, replace: bool) -> None:
        for vote in votes:
            check_limits(vote.texts(), 0, self.config.serve)
        pairs = [vote.as_pair(user_id) for vote in votes]
        await asyncio.to_thread(lambda: self.store.add(pairs, replace=replace))

    async def delete(self, user_id: str) -> int:
        """Delete all of a user; returns the number of votes.  Raises Refused for an unknown user."""
        if not (votes := await asyncio.to_thread(self.store.delete, user_id)):
            raise Refused(404, "unknown_user", "this user has no stored votes")
        return votes

    async def check(self) -> None:
        """Raise Refused if the engine or the store cannot answer."""
        if lost := self.scorer.answers.engine.lost():
            raise Refused(503, "engine_lost", str(lost), RETRY_SECONDS)
        await asyncio.to_thread(self.store.check)

    def model(self) -> dict[str, object]:
        """The entry of `GET /v1/models`."""
        return {
            "id": self.config.model.label,
            "object": "model",
            "created": 0,
            "owned_by": "pgenrm-train",
            "group_size": 2,
            "totals": self.config.model.counted,
            "calibration": asdict(self.calibration) if self.calibration else None,
        }

    async def _votes(self, user: User) -> tuple[str, list[PreferencePair]]:
        if user.user_id is not None:
            return user.user_id, await self.votes(user.user_id)
        if not user.history:
            raise Refused(422, "no_history", "history: expected at least one vote")
        return ANONYMOUS, [vote.as_pair(ANONYMOUS, n) for n, vote in enumerate(user.history)]

    def _answer(self, scored: Scored, *, return_chains: bool) -> ScoreAnswer:
        missing = [i for i, score in enumerate(scored.scores) if score != score]
        failures = [
            FailedChains(responses=list(shown), kind=kind, chains=count)
            for (shown, kind), count in scored.failures().items()
        ]
        if missing:
            failures.append(FailedChains(responses=missing, kind=NO_PAIR, chains=0))
        chains = [
            WrittenChain(
                responses=list(c.shown), neighbour=c.neighbour, text=c.generation.text, failure=c.failure
            )
            for c in scored.chains
        ]
        return ScoreAnswer(
            scores=[None if i in missing else float(score) for i, score in enumerate(scored.scores)],
            verified=scored.verified(),
            probabilities=(
                self.calibration.best(scored.scores) if self.calibration else [None] * len(scored.scores)
            ),
            ranking=scored.ranking(),
            failures=failures,
            usage=usage(scored),
            model=self.config.model.label,
            chains=chains if return_chains else None,
        )


def usage(*scored: Scored) -> Usage:
    """Chains and tokens behind some scores."""
    chains = [chain for one in scored for chain in one.chains]
    return Usage(
        chains=len(chains),
        cached_chains=sum(chain.cached for chain in chains),
        completion_tokens=sum(chain.generation.tokens for chain in chains if not chain.cached),
    )


def import_votes(store: UserStore, path: Path) -> tuple[int, int]:
    """Replace the votes of all users in a file by those of its train split; returns (users, votes)."""
    votes = [pair for pair in read_pairs(path) if pair.split == "train"]
    if votes:
        store.add(votes, replace=True)
    return len({vote.user_id for vote in votes}), len(votes)
