"""build_sec on small votes: teachers of one line, a prompt writer that cuts nothing, and a runner."""

import json
from collections import Counter

import pandas as pd
import pyarrow.parquet as pq

from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import Config
from pgenrm_train.prompts.messages import chat_messages
from pgenrm_train.records.pairs import Example, ExplicitSignals, Message, PreferencePair
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.stages import build_sec
from recipes.wiring.teachers import RuleTeacher

CRITERIA = [("brevity", 70), ("wit", 30)]
EXAMPLE = Example("p1", "u1", (Message("user", "q"),), ("left", "right"), 0)


def chain(first: float, second: float, analysis: str = "Short is better.", criteria=CRITERIA) -> str:
    return write_chain(analysis, criteria, [[first] * len(criteria), [second] * len(criteria)])


def vote(number: int, user: str = "u", **more) -> PreferencePair:
    explicit = ExplicitSignals(criteria="SECRET-CRITERION", self_description="SECRET-SELF")
    context = (Message("user", f"question {number}"),)
    return PreferencePair(
        f"p{number}", user, context, f"good {number}", f"bad {number}", explicit=explicit, **more
    )


class Prefers:
    """Teacher that prefers texts beginning with `good`, except in the first `wrong` attempts."""

    def __init__(self, wrong: int = 0) -> None:
        self.wrong, self.asked = wrong, []

    def write(self, example: Example, attempt: int) -> str:
        self.asked.append((example.pair_id, example.chosen_index, attempt))
        scores = [[8, 8] if text.startswith("good") else [3, 3] for text in example.responses]
        if attempt < self.wrong:
            scores.reverse()
        return write_chain(f"About {example.pair_id} in order {example.chosen_index}.", CRITERIA, scores)


class Says:
    """A teacher with one answer to everything."""

    def __init__(self, text: str) -> None:
        self.text = text

    def write(self, example: Example, attempt: int) -> str:
        return self.text


class Writer:
    """Prompts that are never cut, of a model that may write `words` words."""

    def __init__(self, words: int = 10_000) -> None:
        self.words, self.trimmed = words, Counter()

    def __call__(self, view):
        return chat_messages(view)

    def can_be_written(self, response: str) -> bool:
        return len(response.split()) <= self.words

    def log_trimmed(self, name: str) -> None: ...


def run(tmp_path, teacher, votes=None, words=10_000, **config):
    """Run the stage; its facts, the rows for SFT and the rejected chains."""
    folder = StageFolder(tmp_path / "build_sec", "build_sec")
    settings = Config(**config)
    settings.psi.masking = settings.psi.masking if "masking" in config else "masked"
    votes = votes or [vote(n, f"u{n % 4}") for n in range(20)]
    teacher = teacher if hasattr(teacher, "in_flight") else RuleTeacher(teacher.write)
    facts = build_sec.run(settings, folder, votes, teacher, lambda kept: Writer(words))
    assert json.loads((folder.path / "yield.json").read_text()) == facts
    rows = pq.read_table(folder.path / "sec.parquet").to_pylist()
    return facts, rows, pd.read_parquet(folder.path / "rejected.parquet")
