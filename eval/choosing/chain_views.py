"""Both chains of some matches for the reader of a report: a chosen answer against a rejected one."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from eval.choosing.schemes import Match, Player
from eval.report.chain_section import chain_view
from eval.report.report import ChainView


class Shown(NamedTuple):
    """A match to show; `first_is_better` is the user's preference, None if unknown."""

    match: Match
    first_is_better: bool | None
    title: str


def match_views(player: Player, shown: Iterable[Shown], model: str) -> list[ChainView]:
    """The first own chain of each match in both positions; nothing for a match that was not played."""
    chains = player.chains()
    rows = chains[(chains["sample"] == 0) & (chains["source"] == "ind")].sort_values("order")
    by_pair = {name: part.to_dict("records") for name, part in rows.groupby("pair_id")}
    views = []
    for match, first_is_better, title in shown:
        slate = player.slates[match.slate]
        pair = slate.pair(match.first, match.second)
        for row in by_pair.get(pair.pair_id, ()):
            view = chain_view(row, pair, player.histories[slate.key], model)
            # `chain_view` takes the first of the two for the preferred one.
            place = {True: view.label, False: 1 - (view.label or 0), None: None}[first_is_better]
            views.append(replace(view, label=place, kind=title))
    return views
