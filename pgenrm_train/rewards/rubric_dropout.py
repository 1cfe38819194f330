"""Rubric dropout (arXiv 2608.11669): each step hides other criteria from the training judge.

A policy that is trained against a fixed rubric learns its judge's weak points.  So each step hides a share f
of the n criteria:

    hidden = floor(f·n) of the n criteria, at least one stays;  drawn by SHA-256 of the pair and the step

All chains of a group are judged by the same criteria, so GRPO compares like with like.  Mining,
validation and the second judge see all criteria.  The paper's shares are 0.3 and 0.5.  *Our choice*: its
rubrics are lists; here a sentence or a line of a user's statements is a criterion, and so is an attribute.
A rule that reads PersonaWorld's statements drops the attributes that they name.
"""

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
_ENDS = re.compile(r"(?<=[.!?;。！？；])\s+|\n+")


@dataclass(frozen=True, slots=True)
class RubricDropout:
    """The share of criteria to hide, and the group that it is drawn for."""

    share: float
    pair_id: str
    step: int

    def keep(self, items: Sequence[Item]) -> list[Item]:
        """The items that stay, in their order."""
        hidden = min(math.floor(self.share * len(items)), len(items) - 1)
        if hidden <= 0:
            return list(items)
        digest = hashlib.sha256(f"{self.pair_id}:{self.step}".encode("utf-8", "surrogatepass")).digest()
        stay = random.Random(digest).sample(range(len(items)), len(items) - hidden)
        return [items[place] for place in sorted(stay)]

    def signals(self, signals: Mapping[str, object]) -> dict[str, object]:
        """The same for the signals of `judging.signals`: texts, and attributes with their weights."""
        items = [
            (name, item)
            for name, value in signals.items()
            for item in (value.items() if isinstance(value, Mapping) else _ENDS.split(str(value).strip()))
        ]
        kept: dict[str, object] = {}
        for name, item in self.keep(items):
            before = kept.get(name)
            if isinstance(item, tuple):
                kept[name] = {**(before if isinstance(before, Mapping) else {}), item[0]: item[1]}
            else:
                kept[name] = item if before is None else f"{before} {item}"
        return kept
