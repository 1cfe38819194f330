"""Time and memory of `recipe=build_data` on generated files of the size and schema of the field's benchmarks.

    python benchmarks/speed/benchmark_builds.py [NAME …]

    personalized_rewardbench   2,830 questions with profiles of 30 texts, rubrics and two responses
    rmgap                      1,097 rows of four responses and four groups of three prompts
    rm_as_user                 61,804 prompts with the scores of eight reward models, as two CSV files

The limits are 60 s and 1.5 GB each.  Words are drawn at random; lengths are typical of the published sets.
"""

import csv
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from measured import measured

WORDS = [f"word{i}" for i in range(5000)]
SUBSETS = {
    "Art_and_Entertainment": 767,
    "Lifestyle_and_Personal_Development": 989,
    "Society_and_Culture": 1074,
}
PROFILE = 30
RATERS = [f"org_reward-model-{i}" for i in range(8)]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=max(1, int(rng.gauss(words, words / 3)))))


def personalized_rewardbench(folder: Path, share: float = 1.0) -> Path:
    rng = random.Random(0)
    for subset, count in SUBSETS.items():
        (folder / subset).mkdir(parents=True)
        with (folder / subset / "test.jsonl").open("w") as out:
            for n in range(round(count * share)):
                row = {
                    "id": f"{subset[0]}{n}",
                    "question": text(rng, 40),
                    "profile": [
                        {"id": f"{subset[0]}{n}p{i}", "category": "music", "text": text(rng, 120)}
                        for i in range(PROFILE)
                    ],
                    "rubric_aspects": [
                        {"aspect": text(rng, 6), "evidence": text(rng, 20), "reason": text(rng, 20)}
                        for _ in range(5)
                    ],
                    "narrative": text(rng, 120),
                    "category": "music",
                    "chosen": text(rng, 350),
                    "rejected": text(rng, 350),
                }
                out.write(json.dumps(row) + "\n")
    return folder


def rmgap(folder: Path, share: float = 1.0) -> Path:
    rng = random.Random(0)
    folder.mkdir(parents=True)
    with (folder / "test.jsonl").open("w") as out:
        for n in range(round(1097 * share)):
            row = {
                "id": f"g{n}",
                "domain": ("Chat", "Writing", "Reasoning", "Safety")[n % 4],
                "source": "generated",
                "responses": [{"key": key, "text": text(rng, 250)} for key in "ABCD"],
                "prompt_groups": [
                    {"winner": key, "prompts": [{"text": text(rng, 60)} for _ in range(3)]} for key in "ABCD"
                ],
                "style_assignments": {key: text(rng, 10) for key in "ABCD"},
            }
            out.write(json.dumps(row) + "\n")
    return folder / "test.jsonl"


def rm_as_user(folder: Path, share: float = 1.0) -> Path:
    rng = random.Random(0)
    folder.mkdir(parents=True)
    names = ("chosen", "rejected")
    scores = [f"{rater}_{name}_score" for rater in RATERS for name in names]
    for split, count in (("dedup_reward_model_as_user_train", 60_819), ("reward_model_as_user_test", 985)):
        with (folder / f"merged_{split}.csv").open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["prompt_id", "prompt", *names, *scores])
            for n in range(round(count * share)):
                texts = [text(rng, 80), text(rng, 150), text(rng, 150)]
                writer.writerow([f"{split[-4:]}{n}", *texts, *(rng.gauss(0, 1) for _ in scores)])
    return folder


SOURCES: dict[str, Callable[..., Path]] = {
    "personalized_rewardbench": personalized_rewardbench,
    "rmgap": rmgap,
    "rm_as_user": rm_as_user,
}


def main(names: list[str]) -> None:
    for name in names or list(SOURCES):
        with tempfile.TemporaryDirectory() as folder:
            path = SOURCES[name](Path(folder, "raw"))
            spent = measured(
                "recipe=build_data",
                f"data={name}",
                f"data.path={path}",
                f"run_dir={folder}/run",
                "tracking=none",
            )
        print(
            f"{name}: {spent.wall_seconds:.0f} s wall clock, {spent.cpu_seconds:.0f} s CPU, "
            f"{spent.peak_mib:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
