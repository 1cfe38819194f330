"""score: one user, one query, N responses → the chain and the scores.

`score.ind=m score.pro=n`: the mean of m sampled chains, and of one chain from each of the n most similar users of the run's prototypes.

`score.input=FILE.json` holds {"user_id", "history": [{"query", "chosen", "rejected"}], "criteria": str|null, "query",
"responses": [str, …]}.  `score.dry_run=true` prints the chat messages as one JSON array and starts nothing.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.ask.harness import UNVERIFIED, Write
from eval.studies.scaling_study import Similar
from pgenrm_train.backends.protocols import GenerationRequest, Generator
from pgenrm_train.chains.chain import Chain, ParseFailure, parse_chain
from pgenrm_train.config import Config
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.errors import BackendError, ConfigError, DataError
from pgenrm_train.prompts.masking import FullView, MaskedView, apply_masking
from pgenrm_train.prompts.writer import PromptWriter, load_pairs
from pgenrm_train.records.pairs import Example, ExplicitSignals, HistoryItem, Message
from pgenrm_train.run.store import publisher as publishing
from pgenrm_train.scaling.combine import scale
from pgenrm_train.stages.stage import start_of
from recipes.wiring.llm import api_generator, model_endpoint, plain_writer


class Answer(NamedTuple):
    """A chain as written, and as read."""

    text: str | None
    chain: Chain | ParseFailure


def run(config: Config) -> int:
    if not config.score.input:
        raise ConfigError("recipe=score needs score.input=FILE.json")
    example = read_example(Path(config.score.input))
    if config.score.dry_run:
        print(json.dumps(plain_writer(config)(_view(config, example)), ensure_ascii=False, indent=2))
        return 0
    publishing.fetch(config)
    generator, write = _model(config)
    try:
        ask = functools.partial(_chains, config, generator, write, len(example.responses))
        return _say_one(ask([example], 1)) if _single(config) else _say_mean(config, example, ask)
    finally:
        generator.close()


def _view(config: Config, example: Example) -> MaskedView | FullView:
    """Stated criteria are shown when given: whoever states them wants them used."""
    policy = config.masking.policy or ("full" if example.explicit.criteria else "masked")
    return apply_masking(
        example, policy, random.Random(config.seed), show_probability=config.masking.show_probability
    )[0]


def _model(config: Config) -> tuple[Generator, Write]:
    if config.model.kind == "endpoint":
        settings = replace(model_endpoint(config), temperature=_temperature(config))
        return api_generator(settings, config.model.prompt, None), plain_writer(config)
    checkpoint = start_of(config, StageName.EVALUATE.starts_from).checkpoint
    from pgenrm_train.backends.vllm.engine import VllmGenerator

    made = VllmGenerator(config, checkpoint)
    return made, PromptWriter(config, made.tokenizer)


def _single(config: Config) -> bool:
    return (config.score.ind, config.score.pro) == (1, 0)


def _temperature(config: Config) -> float:
    """One chain alone is the likeliest one; several must differ."""
    return 0.0 if _single(config) else config.eval.temperature


def _chains(
    config: Config,
    generator: Generator,
    write: Write,
    responses: int,
    examples: Sequence[Example],
    samples: int,
) -> list[Answer]:
    """`samples` chains on each example, in order, each as read or with the reason why not."""
    views = [tuple(write(_view(config, example))) for example in examples]
    requests = [GenerationRequest(f"{n}", messages, samples, config.seed) for n, messages in enumerate(views)]
    found = sorted(
        generator(requests, temperature=_temperature(config)),
        key=lambda answer: (int(answer.key), answer.sample),
    )
    return [
        Answer(a.text, ParseFailure(a.failure, "") if a.failure else _read(config, a.text or "", responses))
        for a in found
    ]


def _read(config: Config, text: str, responses: int) -> Chain | ParseFailure:
    """The chain with the scores that `eval.scores` names."""
    chain = parse_chain(text, responses)
    if config.eval.scores == "declared" or isinstance(chain, ParseFailure):
        return chain
    if chain.verified_scores is None:
        return ParseFailure(
            UNVERIFIED, "its rubric gives no scores, and eval.scores=verified counts these alone"
        )
    return replace(chain, scores=chain.verified_scores)


def _say_one(answers: Sequence[Answer]) -> int:
    """Print the chain and its scores.  Raises BackendError when it cannot be read."""
    (answer,) = answers
    chain = _readable(answer)
    scores = {f"response_{i}": s for i, s in enumerate(chain.scores, start=1)}
    verified = list(chain.verified_scores) if chain.verified_scores else None
    print(answer.text)
    print(
        json.dumps(
            {"scores": scores, "verified_scores": verified, "issues": list(chain.issues)}, ensure_ascii=False
        )
    )
    return 0


def _say_mean(config: Config, example: Example, ask: Callable[[Sequence[Example], int], list[Answer]]) -> int:
    """Test-time user-based scaling (METHOD §7) of one question: print the mean scores and what they are made of."""
    own = ask([example], config.score.ind)
    first = next((answer for answer in own if isinstance(answer.chain, Chain)), own[0])
    chain = _readable(first)
    users = _similar(config, example, chain.analysis) if config.score.pro else []
    similar = ask([replace(example, history=user.history) for user in users], 1)
    weights = (config.eval.weights[0], config.eval.weights[1])
    scaled = scale(_scores(own, len(example.responses)), _scores(similar, len(example.responses)), weights)
    print(first.text)
    print(json.dumps({
        "scores": {f"response_{i}": round(float(s), 4) for i, s in enumerate(scaled.scores, start=1)},
        "own": _used(own) | {"asked": config.score.ind},
        "similar": _used(similar) | {"asked": config.score.pro, "users": [user.user_id for user in users]},
    }, ensure_ascii=False))  # fmt: skip
    return 0


def _similar(config: Config, example: Example, analysis: str) -> list[Similar]:
    from recipes.wiring.similar_users import find_similar

    return find_similar(config, load_pairs(Path(config.run_dir)))(
        [analysis], [example.user_id], config.score.pro
    )[0]


def _readable(answer: Answer) -> Chain:
    if isinstance(answer.chain, Chain):
        return answer.chain
    if answer.text is None:
        raise BackendError(f"the model gave no chain ({answer.chain.kind})")
    print(answer.text)
    raise BackendError(f"the model's chain cannot be read ({answer.chain.kind}: {answer.chain.detail})")


def _scores(answers: Sequence[Answer], responses: int) -> np.ndarray:
    """(chains, responses), NaN where a chain could not be read."""
    rows = [a.chain.scores if isinstance(a.chain, Chain) else (math.nan,) * responses for a in answers]
    return np.array(rows, dtype=float).reshape(len(rows), responses)


def _used(answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "used": sum(isinstance(a.chain, Chain) for a in answers),
        "failures": dict(Counter(a.chain.kind for a in answers if isinstance(a.chain, ParseFailure))),
    }


def read_example(path: Path) -> Example:
    """The input file → an example.  Raises DataError naming file, field and expectation."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; expected a JSON file for score.input") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected one JSON object, got {type(raw).__name__}")
    responses = raw.get("responses")
    if (
        not isinstance(responses, list)
        or len(responses) < 2
        or not all(isinstance(r, str) for r in responses)
    ):
        raise DataError(f"{path}, field 'responses': expected a list of at least two texts")
    history = raw.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{path}, field 'history': expected a list of {{query, chosen, rejected}}")
    criteria = raw.get("criteria")
    if criteria is not None and not isinstance(criteria, str):
        raise DataError(f"{path}, field 'criteria': expected a text or null")
    return Example(
        pair_id=path.stem,
        user_id=_text(raw, "user_id", path),
        context=(Message("user", _text(raw, "query", path)),),
        responses=tuple(responses),
        chosen_index=0,  # unknown; nothing here reads it
        history=tuple(_item(item, n, path) for n, item in enumerate(history)),
        explicit=ExplicitSignals(criteria=criteria or None),
    )


def _item(item: Any, number: int, path: Path) -> HistoryItem:
    if not isinstance(item, dict):
        raise DataError(f"{path}, field 'history[{number}]': expected {{query, chosen, rejected}}")
    where = f"history[{number}]."
    return HistoryItem(*(_text(item, name, path, where) for name in ("query", "chosen", "rejected")))


def _text(raw: dict[str, Any], name: str, path: Path, where: str = "") -> str:
    if not isinstance(raw.get(name), str):
        raise DataError(f"{path}, field '{where}{name}': expected a text, got {raw.get(name)!r}")
    return str(raw[name])
