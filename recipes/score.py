"""score: one user, one query, N responses → the chain and the scores.

`score.input=FILE.json` holds {"user_id", "history": [{"query", "chosen", "rejected"}], "criteria": str|null, "query",
"responses": [str, …]}.  `score.dry_run=true` prints the chat messages as one JSON array and starts nothing.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgenrm_train.backends.base import GenerationRequest, Generator
from pgenrm_train.chains import ParseFailure, parse_chain
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError, ConfigError, DataError
from pgenrm_train.masking import apply_masking
from pgenrm_train.records import Example, ExplicitSignals, HistoryItem, Message
from pgenrm_train.stages.inputs import PromptWriter
from recipes.llm import api_generator, model_endpoint, plain_writer
from recipes.run import newest


def run(config: Config) -> int:
    if not config.score.input:
        raise ConfigError("recipe=score needs score.input=FILE.json")
    example = read_example(Path(config.score.input))
    # Stated criteria are shown when given: whoever states them wants them used.
    policy = config.masking.policy or ("full" if example.explicit.criteria else "masked")
    view, _ = apply_masking(example, policy, random.Random(config.seed), show_probability=config.masking.show_probability)
    if config.score.dry_run:
        print(json.dumps(plain_writer(config)(view), ensure_ascii=False, indent=2))
        return 0
    if config.model.kind == "endpoint":
        settings = replace(model_endpoint(config), temperature=0.0)
        return score(
            config, api_generator(settings, config.model.prompt, None), plain_writer(config)(view), len(example.responses)
        )
    checkpoint = Path(config.model.path) if config.model.path else newest(config, "curriculum", "cre", "psi").path / "checkpoint"
    from pgenrm_train.backends.vllm_engine import VllmGenerator

    generator = VllmGenerator(config, checkpoint)
    return score(config, generator, PromptWriter(config, generator.tokenizer)(view), len(example.responses))


def score(config: Config, generator: Generator, messages: Sequence[Mapping[str, str]], n_responses: int) -> int:
    """Generate one chain, print it and its scores; exit code 0 only when the chain could be read."""
    answers = list(generator([GenerationRequest("score", tuple(messages), 1, config.seed)], temperature=0.0))
    generator.close()
    if answers[0].text is None:
        raise BackendError(f"the model gave no chain ({answers[0].failure})")
    chain = parse_chain(answers[0].text, n_responses)
    print(answers[0].text)
    if isinstance(chain, ParseFailure):
        raise BackendError(f"the model's chain cannot be read ({chain.kind}: {chain.detail})")
    scores = {f"response_{i}": s for i, s in enumerate(chain.scores, start=1)}
    verified = list(chain.verified_scores) if chain.verified_scores else None
    print(json.dumps({"scores": scores, "verified_scores": verified, "issues": list(chain.issues)}, ensure_ascii=False))
    sys.stdout.flush()
    return 0


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
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(r, str) for r in responses):
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
