"""Time and memory of `recipe=build_data data=prism` on generated files of PRISM's size and schema.

    python benchmarks/speed/prism_build.py

1,500 users, 8,011 conversations, 68,371 utterances; texts of PRISM's typical lengths.  Without and with
near duplicates in the leak report: wall clock and CPU seconds, peak memory, and the ratio to reading the
same files with the standard library's json alone.  The limits are 60 s without, 180 s with, and 1.5 GB,
on two idle cores.
"""

import json
import random
import tempfile
import time
from pathlib import Path

from measured import measured

USERS, CONVERSATIONS, UTTERANCES = 1500, 8011, 68_371
WORDS = [f"word{i}" for i in range(5000)]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=max(1, int(rng.gauss(words, words / 3)))))


def conversation(rng: random.Random, number: int, utterances: int) -> dict[str, object]:
    """The first turn shows four responses, later ones two."""
    history, turn = [], 0
    while utterances > 0:
        history.append(
            {"turn": turn, "role": "user", "content": text(rng, 20), "score": None, "if_chosen": None}
        )
        shown = min(4 if turn == 0 else 2, utterances)
        history += [
            {
                "turn": turn,
                "role": "model",
                "content": text(rng, 90),
                "score": rng.randint(1, 100),
                "if_chosen": place == 0,
            }
            for place in range(shown)
        ]
        utterances, turn = utterances - shown, turn + 1
    names = ("values", "fluency", "factuality", "safety", "diversity", "creativity", "helpfulness")
    return {
        "conversation_id": f"c{number}",
        "user_id": f"user{number % USERS}",
        "conversation_type": "unguided",
        "conversation_turns": turn,
        "conversation_history": history,
        "choice_attributes": {n: rng.randint(0, 100) for n in names},
        "open_feedback": text(rng, 30),
    }


def write(folder: Path) -> None:
    rng = random.Random(0)
    with (folder / "survey.jsonl").open("w") as out:
        for user in range(USERS):
            row = {
                "user_id": f"user{user}",
                "self_description": text(rng, 40),
                "system_string": text(rng, 60),
                "stated_prefs": {},
            }
            out.write(json.dumps(row) + "\n")
    with (folder / "conversations.jsonl").open("w") as out:
        for number in range(CONVERSATIONS):
            share = UTTERANCES * (number + 1) // CONVERSATIONS - UTTERANCES * number // CONVERSATIONS
            out.write(json.dumps(conversation(rng, number, share)) + "\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "prism"
        source.mkdir()
        write(source)
        began = time.process_time()
        sum(len(json.loads(line)) for line in (source / "conversations.jsonl").open())
        reading = time.process_time() - began
        for near in ("false", "true"):
            spent = measured(
                "recipe=build_data",
                "data=prism",
                f"data.path={source}",
                f"data.near_duplicates={near}",
                "tracking=none",
                f"run_dir={folder}/near-{near}",
            )
            ratio = spent.cpu_seconds / reading
            print(
                f"near duplicates {near:5}  {spent.wall_seconds:6.1f} s  {spent.cpu_seconds:6.1f} CPU s  "
                f"{ratio:5.0f} × reading the JSON  peak {spent.peak_mib / 1024:.2f} GiB"
            )


if __name__ == "__main__":
    main()
