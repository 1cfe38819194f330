"""Scores of the responses to one query, by one chain or several (METHOD §7)."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.studies.scaling_study import Similar
from pgenrm_train.backends.protocols import GenerationRequest, Generator
from pgenrm_train.backends.vllm.engine import VllmGenerator
from pgenrm_train.chains.chain import Chain, ParseFailure
from pgenrm_train.chains.totals import read_chain
from pgenrm_train.config import Config, StageName
from pgenrm_train.errors import BackendError
from pgenrm_train.prompts.writer import PromptWriter, Write, load_pairs, view_of
from pgenrm_train.records.pairs import Example
from pgenrm_train.scaling.combine import scale
from pgenrm_train.stages.stage import start_of, with_totals
from recipes.wiring.llm import api_generator, model_endpoint, plain_writer
from recipes.wiring.similar_users import find_similar


class ChainText(NamedTuple):
    """A chain as text, and as read with the totals that count."""

    text: str | None
    chain: Chain | ParseFailure


@dataclass(frozen=True)
class Scorer:
    """A model that scores one example at a time; its generator must be closed."""

    config: Config
    generator: Generator
    write: Write

    def score(self, example: Example) -> tuple[str | None, dict[str, object]]:
        """Score by one chain, or by the means of own and of similar users' chains.

        Returns the text of the chain to show, and the facts to print as JSON.
        Raises BackendError if the model wrote no readable chain.
        """
        settings, responses = self.config.score, len(example.responses)
        own = self._chains([example], settings.ind)
        first = next((answer for answer in own if isinstance(answer.chain, Chain)), own[0])
        chain = _readable(first, self.config.model.max_response_tokens)
        if is_single(self.config):
            return first.text, {
                "scores": {f"response_{i}": score for i, score in enumerate(chain.scores, start=1)},
                "verified_scores": list(chain.verified_scores) if chain.verified_scores else None,
                "issues": list(chain.issues),
                "totals": self.config.model.counted,
            }
        users = similar_users(self.config, example, chain.analysis) if settings.pro else []
        similar = self._chains([replace(example, history=user.history) for user in users], 1)
        weights = (self.config.eval.weights[0], self.config.eval.weights[1])
        scaled = scale(_scores(own, responses), _scores(similar, responses), weights)
        return first.text, {
            "scores": {f"response_{i}": round(float(s), 4) for i, s in enumerate(scaled.scores, start=1)},
            "own": _usage(own) | {"asked": settings.ind},
            "similar": _usage(similar) | {"asked": settings.pro, "users": [user.user_id for user in users]},
        }

    def _chains(self, examples: Sequence[Example], samples: int) -> list[ChainText]:
        """`samples` chains per example, in order."""
        requests = [
            GenerationRequest(
                str(number), tuple(self.write(view_of(self.config, example))), samples, self.config.seed
            )
            for number, example in enumerate(examples)
        ]
        generations = self.generator(requests, temperature=temperature(self.config))
        totals, responses = self.config.model.counted, len(examples[0].responses) if examples else 0
        return [
            ChainText(g.text, ParseFailure(g.failure, g.words))
            if g.failure
            else ChainText(*read_chain(g.text or "", totals, responses))
            for g in sorted(generations, key=lambda g: (int(g.key), g.sample))
        ]


def load_scorer(config: Config) -> Scorer:
    """The model of `model=endpoint`, of `model.path`, or the newest checkpoint of the run."""
    if config.model.kind == "endpoint":
        settings = replace(model_endpoint(config), temperature=temperature(config))
        return Scorer(config, api_generator(settings, config.model, None), plain_writer(config))
    checkpoint = start_of(config, StageName.EVALUATE.starts_from).checkpoint
    config = with_totals(config, checkpoint)
    generator = VllmGenerator(config, checkpoint)
    return Scorer(config, generator, PromptWriter(config.model, generator.tokenizer))


def is_single(config: Config) -> bool:
    return (config.score.ind, config.score.pro) == (1, 0)


def temperature(config: Config) -> float:
    """`score.temperature`, else 0 (greedy) for a single chain; several must differ."""
    if (chosen := config.score.temperature) is not None:
        return chosen
    return 0.0 if is_single(config) else config.eval.temperature


def similar_users(config: Config, example: Example, analysis: str) -> list[Similar]:
    """The `score.pro` users of the run's prototypes whose analyses are nearest."""
    find = find_similar(config, load_pairs(Path(config.run_dir)))
    return find([analysis], [example.user_id], config.score.pro)[0]


def _readable(answer: ChainText, limit: int) -> Chain:
    if isinstance(answer.chain, Chain):
        return answer.chain
    if answer.text is None:
        words = f": {answer.chain.detail}" if answer.chain.detail else ""
        raise BackendError(f"the model wrote no chain ({answer.chain.kind}{words})")
    if answer.text:
        print(answer.text)
    if answer.chain.kind == "length":
        raise BackendError(
            f"the model's answer was cut off after {limit} tokens, before its scores; raise "
            "model.max_response_tokens, or switch reasoning off"
        )
    raise BackendError(f"the model's chain cannot be read ({answer.chain.kind}: {answer.chain.detail})")


def _scores(answers: Sequence[ChainText], responses: int) -> np.ndarray:
    """(chains, responses), NaN if a chain could not be read."""
    rows = [a.chain.scores if isinstance(a.chain, Chain) else (math.nan,) * responses for a in answers]
    return np.array(rows, dtype=float).reshape(len(rows), responses)


def _usage(answers: Sequence[ChainText]) -> dict[str, object]:
    failures = Counter(a.chain.kind for a in answers if isinstance(a.chain, ParseFailure))
    return {"used": len(answers) - failures.total(), "failures": dict(failures)}
