"""Small files in the schemas of Personalized RewardBench, RMGAP and reward models as users."""

import csv
import json
from pathlib import Path
from typing import Any

from data_builders.sources.lampqa import SUBSETS

SECRETS = ("zebranarrative", "zebraaspect", "zebrareason", "zebraevidence", "zebrastyle")


def rewardbench_row(number: int, **change: Any) -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "question": f"How do I do {number}?",
        "profile": [
            {"id": f"old{number}-{i}", "text": f"I once asked {number}-{i}", "category": "music"}
            for i in range(4)
        ],
        "rubric_aspects": [{"aspect": "zebraaspect", "evidence": "zebraevidence", "reason": "zebrareason"}],
        "narrative": "zebranarrative",
        "category": "music",
        "chosen": f"a good and much longer answer to {number}",
        "rejected": f"bad {number}",
    } | change


def rewardbench(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """One folder per subset, as the hub has it; `rows` replace those of the first one."""
    for n, subset in enumerate(SUBSETS):
        (folder / subset).mkdir(parents=True, exist_ok=True)
        of_subset = rows if rows is not None and n == 0 else [rewardbench_row(10 * n + i) for i in range(3)]
        _jsonl(folder / subset / "test.jsonl", of_subset)
    return folder


def rmgap_row(number: int, **change: Any) -> dict[str, Any]:
    return {
        "id": f"g{number}",
        "domain": ("Chat", "Safety")[number % 2],
        "source": "made up",
        "responses": [{"key": key, "text": f"answer {key} " * (i + 1)} for i, key in enumerate("ABCD")],
        "prompt_groups": [
            {
                "winner": key,
                "prompts": [{"text": f"Write {number} like {key}, wording {i}"} for i in range(3)],
            }
            for key in "ABCD"
        ],
        "style_assignments": dict.fromkeys("ABCD", "zebrastyle"),
    } | change


def rmgap(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    return _jsonl(path, rows if rows is not None else [rmgap_row(n) for n in range(3)])


def reward_models(folder: Path, n: int = 12) -> Path:
    """Two CSV files: the first model likes long texts, the second short ones."""
    folder.mkdir(parents=True, exist_ok=True)
    head = ["prompt_id", "prompt", "chosen", "rejected"]
    head += [f"{side}_org_reward-model-{rater}" for rater in "ab" for side in ("chosen", "rejected")]
    for split, count in (("train", n), ("test", n // 2)):
        with (folder / f"merged_reward_model_as_user_{split}.csv").open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(head)
            for i in range(count):
                texts = [f'Question {split} {i},\n"quoted"', "long " * (i + 3), f"short {i}"]
                writer.writerow([f"{split}{i}", *texts, i + 3, 1, -(i + 3), -1.5])
    return folder


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
