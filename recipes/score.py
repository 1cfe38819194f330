"""score: one user, one query, N responses → the chain and the scores.

`score.ind=m score.pro=n`: the mean of m sampled chains, and of one chain from each of the n most similar
users of the run's prototypes.  `records.question_file` describes `score.input=FILE.json`.
`score.dry_run=true` prints the chat messages as one JSON array and starts nothing.
"""

import json
from pathlib import Path

from pgenrm_train.config import Config
from pgenrm_train.errors import ConfigError
from pgenrm_train.prompts.messages import folded
from pgenrm_train.prompts.writer import view_of
from pgenrm_train.records.question_file import read_question
from pgenrm_train.run.store import publisher
from recipes.wiring.llm import plain_writer
from recipes.wiring.scorer import load_scorer


def run(config: Config) -> int:
    if not config.score.input:
        raise ConfigError("recipe=score needs score.input=FILE.json")
    example = read_question(Path(config.score.input))
    if config.score.dry_run:
        messages = plain_writer(config)(view_of(config, example))
        if config.model.kind == "endpoint" and "system" in config.model.leave_out:
            messages = folded(messages)
        print(json.dumps(messages, ensure_ascii=False, indent=2))
        return 0
    publisher.fetch(config)
    scorer = load_scorer(config)
    try:
        text, facts = scorer.score(example)
    finally:
        scorer.generator.close()
    print(f"{text}\n{json.dumps(facts, ensure_ascii=False)}")
    return 0
