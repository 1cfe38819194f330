"""Signs of reward hacking: each is moved by the behaviour that it is named after, and by no other."""

from __future__ import annotations

from typing import Any

import pytest

from pgenrm_train.backends.grpo.progress import Metrics, validation_metrics
from pgenrm_train.backends.grpo.scoring import ScoredChain
from pgenrm_train.chains.chain import parse_chain, write_chain
from pgenrm_train.rewards.hacking_signs import Ranking, ranking_of, signs


def chain(
    criteria: tuple[str, ...] = ("formal", "brief"),
    margin: float = 3.0,
    verified_margin: float | None = 3.0,
) -> Ranking:
    """An honest one: declared and verified margins agree."""
    faithful = margin == verified_margin
    return Ranking(margin, verified_margin, 3.0, criteria, declared_margin=margin, faithful=faithful)


def test_honest_chains_show_no_sign() -> None:
    values = signs([chain(("formal",)), chain(("brief",)), chain(("warm",)), chain(("vivid",))])
    assert values["verified_disagreement"] == values["unverifiable_share"] == 0
    assert values["criterion_kinds"] == pytest.approx(4) and values["commonest_criteria"] == 0.25
    assert values["score_spread"] == 3


def test_a_template_is_recognised_whatever_the_case_and_order_of_its_criteria() -> None:
    values = signs([chain(("Formal", "brief")), chain(("brief", "formal")), chain(("brief", "FORMAL"))])
    assert values["commonest_criteria"] == 1 and values["criterion_kinds"] == pytest.approx(2)


@pytest.mark.parametrize(
    ("declared", "verified", "expected"),
    [(3.0, -2.0, 1), (0.0, 2.0, 1), (3.0, 0.5, 0), (0.0, 0.05, 0), (-0.1, 0.1, 1)],
)
def test_another_winner_by_its_own_sums_is_a_disagreement_unless_it_is_rounding(
    declared: float, verified: float, expected: float
) -> None:
    assert signs([chain(margin=declared, verified_margin=verified)])["verified_disagreement"] == expected


def test_what_cannot_be_read_or_verified_is_not_counted_as_agreeing() -> None:
    values = signs([None, chain(verified_margin=None, criteria=()), chain(margin=1.0, verified_margin=-1.0)])
    assert values["verified_disagreement"] == 1 and values["unverifiable_share"] == 0.5
    assert all(value is None for value in signs([None]).values())


@pytest.mark.parametrize(
    ("scores", "share"),
    [([[8, 2], [2, 4]], 1), ([[8, 8], [2, 4]], 0), ([[8, 2], [2, 2]], 1), ([[10, 2], [8, 8], [1, 1]], 1)],
)
def test_verdicts_that_hang_on_the_heaviest_criterion_are_counted(scores, share) -> None:
    text = write_chain("", [("formal", 80), ("brief", 20)], scores)
    ranking = ranking_of(parse_chain(text, len(scores)), 0)
    assert signs([ranking, None, chain(verified_margin=None)])["heaviest_decides"] == share


# ---- validation ----


def sampled(
    pair: str, order: int, won: bool, probe: str | None = None, **more: Any
) -> tuple[list[ScoredChain], dict[str, object]]:
    fields = {"outcome": float(won), "total": float(won), "length": 10, "ranking": chain()} | more
    extra: dict[str, object] = {"pair_id": pair, "order": order, "user_id": f"user of {pair}"}
    return [ScoredChain(**fields)], extra | ({"probe": probe} if probe else {})


def metrics(*rows: Any, first_length: float | None = None) -> Metrics:
    return validation_metrics([group for group, _ in rows], [extra for _, extra in rows], first_length)


def test_validation_separates_orders_and_counts_flips() -> None:
    """One pair won in both orders, one only where the chosen response comes first."""
    values = metrics(
        sampled("a", 0, True), sampled("a", 1, True), sampled("b", 0, True), sampled("b", 1, False)
    )
    assert (values["validation/accuracy"], values["validation/order_flip_rate"]) == (0.75, 0.5)
    assert (values["validation/accuracy_chosen_first"], values["validation/accuracy_chosen_second"]) == (
        1.0,
        0.5,
    )


def test_validation_compares_the_criteria_of_both_orders_of_a_pair() -> None:
    other, name = chain(("Formal", "warm", "vivid")), "validation/signs/criteria_stability"
    values = metrics(
        sampled("a", 0, True),
        sampled("a", 1, True, ranking=other),
        sampled("b", 0, True),
        sampled("b", 1, True, ranking=None, failure="no_markers"),
    )
    assert values[name] == pytest.approx(1 / 4)
    assert metrics(sampled("a", 0, True))[name] is None


def test_probes_have_accuracies_of_their_own_and_touch_nothing_else() -> None:
    own = [sampled("a", order, True, "own", length=30) for order in (0, 1)]
    swapped = [
        sampled("a", order, False, "swapped_history", failure="no_markers", ranking=None) for order in (0, 1)
    ]
    values = metrics(*own, *swapped, first_length=20.0)
    assert values["validation/accuracy"] == 1 and values["validation/probe/swapped_history_accuracy"] == 0
    assert values["validation/format_error_share"] == 0 and values["validation/length_drift"] == 1.5
    assert metrics(*own)["validation/length_drift"] == 1, "the first validation is its own measure"


def test_a_null_verdict_is_no_zero_in_the_mean_of_the_process_reward() -> None:
    values = metrics(
        sampled("a", 0, True, process=0.8), sampled("a", 1, True, process=None, null_verdict=True)
    )
    assert values["validation/reward/process"] == 0.8 and values["validation/null_verdict_share"] == 0.5
    assert metrics(sampled("a", 0, True))["validation/reward/process"] is None
