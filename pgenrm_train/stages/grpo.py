"""CRE and the curriculum (METHOD §4, §5): the rows that GRPO samples from, with the explicit criteria withheld.

Needs `build_data/pairs.parquet` and a checkpoint.  Makes `rows.parquet`; the engine makes `checkpoint/` and `metrics.jsonl`.
What the policy of masking keeps out of the prompt rides in `extra_info` only, where rewards and judges find it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pgenrm_train.artifacts import write_table
from pgenrm_train.config import ANSWER_KEYS, Config, masking_of, seed_of
from pgenrm_train.errors import DataError
from pgenrm_train.judging import signals
from pgenrm_train.masking import apply_masking, present
from pgenrm_train.records import PreferencePair
from pgenrm_train.stages.inputs import PromptWriter, asked, histories

MODEL_KEYS = ("model.kind", "model.name", "model.path", "model.lora", "model.instructions", "model.max_prompt_tokens",
              "model.max_response_tokens", "model.max_text_tokens")  # fmt: skip


def reads(section: str) -> tuple[str, ...]:
    """Configuration keys that the stage depends on."""
    judge = (f"judge.{key}" for key in ANSWER_KEYS)
    return (section, "data", "seed", *judge, "masking", *MODEL_KEYS, "cluster.processes_per_node", "cluster.nodes")


def write_rows(
    config: Config,
    section: str,
    path: Path,
    pairs: Sequence[PreferencePair],
    writer: PromptWriter,
    progress: Callable[..., Iterable[Any]],
) -> int:
    """Write the rows that the stage's steps can use, in a seeded order; returns their number.

    At most as many as are drawn; presentation orders alternate, so that both are equally frequent.
    """
    settings = getattr(config, section)
    train = asked(pairs, "train")
    random.Random(f"{seed_of(config, section)}/{section}").shuffle(train)
    train = train[: max(settings.rows, settings.prompts_per_step)]
    if len(train) < settings.prompts_per_step:
        raise DataError(f"{len(train)} training pairs are fewer than {section}.prompts_per_step={settings.prompts_per_step}")
    sampler = histories(config, pairs)
    rows = [
        _row(config, section, index, pair, present(pair, sampler(pair), index % 2), writer)
        for index, pair in enumerate(progress(train, f"{section} prompts", len(train)))
    ]
    write_table(path, rows)
    return len(rows)


def _row(config: Config, section: str, index: int, pair: PreferencePair, example: Any, writer: PromptWriter) -> dict[str, Any]:
    rng = random.Random(f"{seed_of(config, section)}/{section}/mask/{pair.pair_id}")
    view, withheld = apply_masking(example, masking_of(config, section), rng, show_probability=config.masking.show_probability)
    return {
        "data_source": config.data.name,
        "prompt": writer(view),
        "reward_model": {"style": "rule", "ground_truth": str(withheld.chosen_index)},
        "extra_info": {
            "index": index,
            "pair_id": pair.pair_id,
            "user_id": pair.user_id,
            "order": index % 2,
            "kind": pair.kind,
            "n_responses": len(example.responses),
            "criteria": withheld.explicit.criteria,
            "explicit": json.dumps(signals(withheld.explicit), ensure_ascii=False),  # all that the user said, for an LLM judge
        },
    }
