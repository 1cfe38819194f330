"""Scores of responses for one user, averaged and merged as in an evaluation.

Every pair of the circle (`scaling.groups`) is shown in both positions.  Each presentation has m chains from
the user's own history, and one chain from the history of each of n similar users; `scaling.combine` averages
them and `scaling.stopping` may end the sampling early.  `groups.merge` gives one score per response.
"""

import asyncio
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.chains.chain import DECLARED_DIFFERS, Chain, ParseFailure
from pgenrm_train.chains.totals import failure_of, read_chain
from pgenrm_train.config import Config
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.writer import PromptWriter, Write, view_of
from pgenrm_train.records.pairs import Example, ExplicitSignals, HistoryItem, Message, PreferencePair
from pgenrm_train.scaling.combine import scale
from pgenrm_train.scaling.groups import Presentation, circle, merge
from pgenrm_train.scaling.stopping import looks, settled
from pgenrm_train.serving.cached_engine import Answered, CachedEngine, Prompt
from pgenrm_train.serving.errors import Refused

NO_PAIR = "no_complete_pair"  # kind: no pair with scores in both positions


class Neighbour(Protocol):
    """A similar user, and the history from which the user's analysis was written."""

    @property
    def user_id(self) -> str: ...

    @property
    def history(self) -> tuple[HistoryItem, ...]: ...


# (analyses, their users, n) → similar users per analysis, the most similar first
FindNeighbours = Callable[[Sequence[str], Sequence[str], int], Sequence[Sequence[Neighbour]]]


@dataclass(frozen=True, slots=True)
class Task:
    """Responses to a user's query, with the user's votes; `stored` if from the store."""

    user_id: str
    stored: bool
    votes: tuple[PreferencePair, ...]
    context: tuple[Message, ...]
    responses: tuple[str, ...]
    criteria: str | None
    ind: int
    pro: int

    def chains(self) -> int:
        """The most chains that the task may cost."""
        return len(circle(len(self.responses))) * (self.ind + self.pro)


@dataclass(frozen=True, slots=True)
class ReadChain:
    """One chain: the responses as shown, the text, and the scores or the failure."""

    shown: Presentation
    sample: int
    neighbour: str | None
    generation: Generation
    chain: Chain | ParseFailure
    cached: bool

    @property
    def failure(self) -> str | None:
        if self.generation.failure:
            return self.generation.failure
        return failure_of(self.chain) if isinstance(self.chain, ParseFailure) else None


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores (N,) with NaN for none, and the chains behind them."""

    scores: np.ndarray
    chains: Sequence[ReadChain]

    def ranking(self) -> list[int]:
        """Responses with a score, best first; equal ones in their order."""
        order = np.argsort(-self.scores, kind="stable")
        return [int(i) for i in order if math.isfinite(self.scores[i])]

    def verified(self) -> list[bool]:
        """Per response, whether the rubric of every chain that counts gives the declared score."""
        read = [(c.shown, c.chain) for c in self.chains if isinstance(c.chain, Chain) and not c.failure]
        wrong = {
            i
            for shown, chain in read
            if chain.verified_scores is None or DECLARED_DIFFERS in chain.issues
            for i in shown
        }
        return [math.isfinite(score) and i not in wrong for i, score in enumerate(self.scores)]

    def failures(self) -> Counter[tuple[Presentation, str]]:
        """Failed chains by presentation and kind."""
        return Counter((c.shown, c.failure) for c in self.chains if c.failure)


class TaskScorer:
    """A model, its prompts and its settings; `find` is None without prototypes."""

    def __init__(
        self, config: Config, engine: CachedEngine, write: Write, find: FindNeighbours | None
    ) -> None:
        self.config, self.engine, self.find, self._write = config, engine, find, write
        # Tokenizers are not thread-safe; one thread also leaves the event loop free.
        self._writer = ThreadPoolExecutor(1, "writer")
        # Special tokens that no text may contain; none for a writer without a tokenizer.
        self.reserved: tuple[str, ...] = write.reserved if isinstance(write, PromptWriter) else ()

    async def score(self, task: Task) -> Scored:
        """Score the responses of a task.

        Raises Refused for similar users without prototypes, EngineLostError, and DataError for a prompt that
        cannot be cut to the model's length.
        """
        if task.pro and self.find is None:
            raise Refused(422, "no_prototypes", "pro: the service has no prototypes; use pro=0")
        return await _Scoring(self, task).run()

    async def prompt_tokens(self, messages: Sequence[dict[str, str]]) -> int:
        """Length of a prompt; 0 for a writer without a tokenizer."""
        if not isinstance(self._write, PromptWriter):
            return 0
        loop = asyncio.get_running_loop()
        return len(await loop.run_in_executor(self._writer, self._write.ids, messages))

    def temperature(self, task: Task) -> float:
        """0 (greedy) for a single chain; several must differ."""
        return 0.0 if (task.ind, task.pro) == (1, 0) else self.config.eval.temperature

    def history(self, task: Task) -> tuple[HistoryItem, ...]:
        """Votes to show, by `data`; never one on the same query with a shown response."""
        query = task.context[-1].content
        usable = [
            vote
            for vote in task.votes
            if vote.query != query or not {vote.chosen, vote.rejected} & set(task.responses)
        ]
        data = self.config.data
        sampler = HistorySampler(
            usable, size=data.history_size, policy=data.history_policy, seed=self.config.seed
        )
        digest = hashlib.sha256(json.dumps([task.user_id, query]).encode()).hexdigest()
        return sampler(PreferencePair(digest, task.user_id, task.context, "", "", split="val"))

    def similar(self, analyses: Sequence[str], users: Sequence[str], n: int) -> list[list[Neighbour]]:
        """`find` without users that were deleted from the store."""
        assert self.find is not None
        deleted: set[str] = set()
        while True:
            found = self.find(analyses, users, n + len(deleted))
            names = {other.user_id for others in found for other in others} - deleted
            if not (more := self.engine.store.deleted(names)):
                return [[o for o in others if o.user_id not in deleted][:n] for others in found]
            deleted |= more

    async def read(
        self, task: Task, shown: Sequence[Presentation], histories: Sequence[Neighbour | None], runs: range
    ) -> list[ReadChain]:
        """Samples `runs` of each presentation, from the user's own history or from a neighbour's."""
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._writer, self._prompts, task, shown, histories, runs)
        answered = await self.engine.generate(prompts, self.temperature(task))
        return [
            self._read(order, other, answer, sample, runs.start)
            for order, other, answer in zip(shown, histories, answered, strict=True)
            for sample in answer.samples
        ]

    def _prompts(
        self, task: Task, shown: Sequence[Presentation], histories: Sequence[Neighbour | None], runs: range
    ) -> list[Prompt]:
        own = self.history(task)
        prompts = []
        for order, other in zip(shown, histories, strict=True):
            example = Example(
                pair_id="",
                user_id=task.user_id,
                context=task.context,
                responses=tuple(task.responses[i] for i in order),
                chosen_index=-1,
                history=other.history if other else own,
                explicit=ExplicitSignals(criteria=task.criteria or None),
            )
            messages = tuple(self._write(view_of(self.config, example)))
            digest = hashlib.sha256(json.dumps(messages).encode()).digest()
            # Engines seed sample i with seed + i, so later samples do not depend on the first request.
            seed = int.from_bytes(digest[:4], "big") ^ self.config.seed
            request = GenerationRequest("", messages, len(runs), seed + runs.start)
            owners = {task.user_id, *([other.user_id] if other else [])} if task.stored else set()
            prompts.append(Prompt(request, frozenset(owners)))
        return prompts

    def _read(
        self, shown: Presentation, other: Neighbour | None, answer: Answered, sample: Generation, first: int
    ) -> ReadChain:
        name = other.user_id if other else None
        if sample.failure is not None:
            chain: Chain | ParseFailure = ParseFailure(sample.failure, "")
        else:
            text, chain = read_chain(sample.text or "", self.config.model.counted)
            sample = replace(sample, text=text)
        return ReadChain(shown, first + sample.sample, name, sample, chain, answer.cached)


class _Scoring:
    """One task in progress, with the chains read so far."""

    def __init__(self, scorer: TaskScorer, task: Task) -> None:
        self.scorer, self.task = scorer, task
        self.shown = circle(len(task.responses))
        self.place = {order: number for number, order in enumerate(self.shown)}
        self.own = np.full((len(self.shown), task.ind, 2), np.nan)
        self.similar = np.full((len(self.shown), task.pro, 2), np.nan)
        self.chains: list[ReadChain] = []

    async def run(self) -> Scored:
        settings, task = self.scorer.config.eval, self.task
        alpha = settings.adaptive if task.ind > 1 else None
        steps = looks(task.ind, alpha) if alpha else (task.ind,)
        open_ones = self.shown
        await self._own(open_ones, range(steps[0]))
        if task.pro:
            await self._similar()
        for before, after in itertools.pairwise(steps):
            assert alpha is not None
            done = settled(self._margins(), before, alpha)
            open_ones = [order for order in open_ones if not done[self.place[order]]]
            if open_ones:
                await self._own(open_ones, range(before, after))
        scaled = scale(self.own, self.similar, (settings.weights[0], settings.weights[1]))
        return Scored(merge(self.shown, scaled.scores), self.chains)

    async def _own(self, shown: Sequence[Presentation], runs: range) -> None:
        for read in await self.scorer.read(self.task, shown, [None] * len(shown), runs):
            self.own[self.place[read.shown], read.sample] = _scores(read)
            self.chains.append(read)

    async def _similar(self) -> None:
        """Chains from the neighbours whose analyses are nearest to that of the first own chain."""
        analyses = {
            read.shown: read.chain.analysis
            for read in self.chains
            if read.sample == 0 and isinstance(read.chain, Chain) and read.chain.analysis
        }
        if not analyses:
            return
        users = [self.task.user_id] * len(analyses)
        found = await asyncio.to_thread(self.scorer.similar, list(analyses.values()), users, self.task.pro)
        ranked = [
            (order, rank, other)
            for order, others in zip(analyses, found, strict=True)
            for rank, other in enumerate(others)
        ]
        histories = [other for _, _, other in ranked]
        reads = await self.scorer.read(self.task, [order for order, _, _ in ranked], histories, range(1))
        for (order, rank, _), read in zip(ranked, reads, strict=True):
            self.similar[self.place[order], rank] = _scores(read)
            self.chains.append(replace(read, sample=rank))

    def _margins(self) -> np.ndarray:
        """Margins (P, m) for the stopping rule: own chains plus the similar users' mean."""
        weights = self.scorer.config.eval.weights
        similar = self.similar[:, :, 0] - self.similar[:, :, 1]
        count = np.isfinite(similar).sum(axis=1)
        mean = np.nansum(similar, axis=1) / np.maximum(count, 1)
        own = self.own[:, :, 0] - self.own[:, :, 1]
        return np.asarray(weights[0] * own + (weights[1] * mean)[:, None])


def _scores(read: ReadChain) -> tuple[float, ...]:
    return read.chain.scores if isinstance(read.chain, Chain) else (math.nan, math.nan)
