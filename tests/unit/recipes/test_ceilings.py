"""Ceilings: exact readers by prior, known votes, kind and cohort, and each stage's share of its ceiling."""

import pytest

from data_builders.sources.personaworld import build
from eval.report.chain_section import Ceilings
from pgenrm_train.config import load
from pgenrm_train.prompts.history import HistorySampler
from recipes.wiring.ceilings import READERS, ceilings


def test_every_reader_has_a_row_per_prior_and_number_of_known_votes():
    config = load("recipe=evaluate", "data.users=6", "data.heldout_users=12")
    pairs = list(build(config.data, 0))
    sampler = HistorySampler(pairs, size=3, policy="same_scenario", kind="medium", seed=0)
    tested = [pair for pair in pairs if pair.split == "test"]
    measured = ceilings(config, sampler, tested)
    rows = {(row["reader"], row["personas"], row["known votes"]): row for row in measured.rows}
    priors = ("training users'", "all")
    assert set(rows) == {(reader, prior, n) for reader in READERS for prior in priors for n in (3, 1, 0)}
    parts = {"all", *(pair.kind for pair in tested), *(pair.cohort for pair in tested)}
    for row in rows.values():
        assert {f"{part} accuracy" for part in parts} <= row.keys()
    first = "training users'", config.data.history_size
    assert measured.by_stage == {
        "psi": rows["imitator", *first]["all accuracy"],
        "cre": rows["ideal_chain", *first]["all accuracy"],
        "curriculum": rows["ideal_chain", *first]["all accuracy"],
    }
    assert ceilings(load("recipe=evaluate", "data=pairs", "data.path=x"), sampler, tested) == Ceilings()


def test_a_stages_share_is_its_way_from_chance_to_its_ceiling():
    cells = Ceilings({"psi": 0.9, "cre": 0.5}).cells
    assert cells("psi", 0.7) == {"ceiling accuracy": 0.9, "of ceiling share": pytest.approx(0.5)}
    assert cells("psi", None) == cells("cre", 0.7) == cells("model", 0.7) == {}
