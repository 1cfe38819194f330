"""The service behind all routes: find the user's votes, check limits, score, count."""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from pgenrm_train.config import Config
from pgenrm_train.errors import DataError, EngineLostError
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.rows import read_pairs
from pgenrm_train.run.checkpoints import GROUP_SIZE
from pgenrm_train.serving.cached_engine import Prompt, Samples
from pgenrm_train.serving.errors import Refused, bad_request
from pgenrm_train.serving.metrics import Metrics
from pgenrm_train.serving.probabilities import ProbabilityModel
from pgenrm_train.serving.scoring import NO_PAIR, ReadChain, Scored, Task, TaskScorer
from pgenrm_train.serving.store import UserStore
from pgenrm_train.serving.wire import (
    ChainCounts,
    FailedChains,
    QueryOrMessages,
    ScoreAnswer,
    ScoreRequest,
    User,
    Vote,
    WrittenChain,
    check_limits,
)

Result = TypeVar("Result")
RETRY_SECONDS = 1
# Newest votes whose responses are anchors: 8 presentations per response.
ANCHOR_VOTES = 2
ANONYMOUS = ""  # user of a history in a request; never a stored id


@dataclass(frozen=True, slots=True)
class Single:
    """The probability of a single response, or the kinds of its failures."""

    probability: float | None
    failure: str | None


@dataclass(frozen=True)
class Service:
    """A model, the users' votes and the calibration, if there is one."""

    config: Config
    scorer: TaskScorer
    store: UserStore
    metrics: Metrics
    calibration: ProbabilityModel | None = None

    async def score(self, request: ScoreRequest) -> ScoreAnswer:
        """Scores of at least two responses.  Raises Refused."""
        check_limits(request.texts(), len(request.responses), self.config.serve)
        if len(request.responses) < 2:
            raise bad_request("responses: expected at least two texts, got 1")
        task = await self.task(request, request, request.responses, request.ind, request.pro)
        return self.answer(task, await self.run(task), return_chains=request.return_chains)

    async def task(
        self,
        user: User,
        question: QueryOrMessages,
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
        """Score within a request's limits of time and chains.  Raises Refused."""
        self._check_chains(task.chains())
        scored = await self._in_time(self.scorer.score(task))
        self.metrics.count(scored)
        return scored

    async def generate(self, prompt: Prompt, temperature: float) -> Samples:
        """Chains for a prompt, as the model writes them.  Raises Refused."""
        [answered] = await self._in_time(self.scorer.engine.generate([prompt], temperature))
        self.metrics.count_written(answered.samples)
        return answered.samples

    async def _in_time(self, work: Awaitable[Result]) -> Result:
        seconds = self.config.serve.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError:
            message = f"the request took more than {seconds:g} s"
            raise Refused(503, "timeout", message, RETRY_SECONDS) from None
        except EngineLostError as error:
            raise Refused(503, "engine_lost", str(error), RETRY_SECONDS) from None
        except DataError as error:
            raise bad_request(str(error)) from None

    def _check_chains(self, chains: int) -> None:
        if chains > (most := self.config.serve.max_chains):
            raise bad_request(
                f"the request would cost {chains} chains; expected at most {most}: "
                "lower ind, pro or the number of responses"
            )

    async def singles(self, tasks: Sequence[Task]) -> list[Single]:
        """Score single responses against anchors of their users' votes.

        Raises Refused without a calibration, and for more chains than a request may cost.
        """
        calibration, score = self.calibration, self.config.score
        if calibration is None or not calibration.is_for(score.ind, score.pro):
            raise Refused(
                422,
                "not_calibrated",
                f"a single response needs a calibration for score.ind={score.ind} score.pro={score.pro}; "
                "start with serve.calibrate=PAIRS",
            )
        self._check_chains(sum(pair.chains() for task in tasks for pair in _against_anchors(task)))
        measured = await asyncio.gather(*map(self.margins, tasks))
        return [_single(margins, scored, calibration) for margins, scored in measured]

    async def margins(self, task: Task) -> tuple[tuple[float, float] | None, list[Scored]]:
        """Mean margins of a response against chosen and rejected anchors; None without scores."""
        scored = list(await asyncio.gather(*map(self.run, _against_anchors(task))))
        margins = np.array([s.scores[0] - s.scores[1] for s in scored]).reshape(-1, 2)
        valid = margins[np.isfinite(margins).all(axis=1)]
        if not len(valid):
            return None, scored
        return (float(valid[:, 0].mean()), float(valid[:, 1].mean())), scored

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
        """Delete everything of a user and return the number of deleted votes.

        A user without votes may still be a similar user of the run; they are deleted too.
        """
        return await asyncio.to_thread(self.store.delete, user_id)

    async def check(self) -> None:
        """Raise Refused if the engine or the store cannot answer."""
        if lost := self.scorer.engine.lost():
            raise Refused(503, "engine_lost", str(lost), RETRY_SECONDS)
        await asyncio.to_thread(self.store.check)

    def model(self) -> dict[str, object]:
        """The entry of `GET /v1/models`."""
        return {
            "id": self.config.model.label,
            "object": "model",
            "created": 0,
            "owned_by": "pgenrm-train",
            "group_size": GROUP_SIZE,
            "totals": self.config.model.counted,
            "calibration": asdict(self.calibration) if self.calibration else None,
        }

    async def _votes(self, user: User) -> tuple[str, list[PreferencePair]]:
        if user.user_id is not None:
            return user.user_id, await self.votes(user.user_id)
        if not user.history:
            raise Refused(422, "no_history", "history: expected at least one vote")
        return ANONYMOUS, [vote.as_pair(ANONYMOUS, n) for n, vote in enumerate(user.history)]

    def answer(self, task: Task, scored: Scored, *, return_chains: bool = False) -> ScoreAnswer:
        """The answer to a scored task; probabilities only for the calibrated `ind` and `pro`."""
        calibration = self.calibration
        if calibration and not calibration.is_for(task.ind, task.pro):
            calibration = None
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
                calibration.best_probabilities(scored.scores) if calibration else [None] * len(scored.scores)
            ),
            ranking=scored.ranking(),
            failures=failures,
            usage=_chain_counts(scored.chains),
            model=self.config.model.label,
            chains=chains if return_chains else None,
        )


def _against_anchors(task: Task) -> list[Task]:
    """A single response next to the chosen and the rejected one of each of the newest votes."""
    (response,) = task.responses
    votes = [v for v in task.votes if response not in (v.chosen, v.rejected)][-ANCHOR_VOTES:]
    anchors = [anchor for vote in votes for anchor in (vote.chosen, vote.rejected)]
    return [replace(task, responses=(response, anchor)) for anchor in anchors]


def _single(
    margins: tuple[float, float] | None, scored: Sequence[Scored], calibration: ProbabilityModel
) -> Single:
    if margins is not None:
        return Single(calibration.single_probability(*margins), None)
    kinds = sorted({kind for one in scored for _, kind in one.failures()})
    return Single(None, ", ".join(kinds) or NO_PAIR)


def _chain_counts(chains: Sequence[ReadChain]) -> ChainCounts:
    return ChainCounts(
        chains=len(chains),
        cached_chains=sum(chain.cached for chain in chains),
        completion_tokens=sum(chain.generation.tokens for chain in chains if not chain.cached),
    )


def import_votes(store: UserStore, path: Path) -> tuple[int, int]:
    """Replace votes by those of a file's train split, without deleted users; returns (users, votes)."""
    votes = [pair for pair in read_pairs(path) if pair.split == "train"]
    deleted = store.deleted(vote.user_id for vote in votes)
    votes = [vote for vote in votes if vote.user_id not in deleted]
    if votes:
        store.add(votes, replace=True)
    return len({vote.user_id for vote in votes}), len(votes)
