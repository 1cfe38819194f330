"""data=chatbot_arena and data=prism_personalized: the two parts of PersonalRewardBench.

Source: SynthesizeMe, Ryan et al. 2025.  `data.path` may name a copy on disk.  Users appear in every split;
the `split` column counts, not the hub's split.  Columns with verdicts of other judges are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_builders.sources import pairs
from pgenrm_train.config import DataConfig
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.raw_rows import LeftOut

HUB = {
    "chatbot_arena": "MichaelR207/chatbot_arena_personalized_0125",
    "prism_personalized": "MichaelR207/prism_personalized_0125",
}


def build(data: DataConfig, seed: int, left_out: LeftOut) -> Iterator[PreferencePair]:
    """Stream the pairs.  Raises DataError with source, row, field and expectation."""
    yield from pairs.read(data.path or HUB[data.name], data, left_out)
