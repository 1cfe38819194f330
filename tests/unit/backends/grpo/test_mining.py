"""Files of mining, the caches that it refuses, and a step's metrics of the mix.  No engine is started."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pgenrm_train.backends.grpo.config import verl_variables
from pgenrm_train.backends.grpo.engine import train
from pgenrm_train.backends.grpo.mining import hardness, summarise
from pgenrm_train.backends.grpo.phase import ChainRequest, Draw, HardnessSource, Phase, PhaseRun
from pgenrm_train.backends.grpo.progress import chain_metrics, mix_metrics
from pgenrm_train.backends.grpo.scoring import ScoredChain, ScoredGroup
from pgenrm_train.config import Config
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.curriculum.sampler import CurriculumSampler, PairFacts, Schedule
from pgenrm_train.errors import ArtifactError
from pgenrm_train.rewards.hacking_signs import Ranking


def chain(outcome: float, margin: float | None = None, verified_margin: float | None = None) -> ScoredChain:
    ranking = None if margin is None else Ranking(margin, verified_margin, 1.0, (), margin, False)
    return ScoredChain(5, total=outcome, outcome=outcome, ranking=ranking)


class Measured:
    """A phase of three pairs and a stand-in for the engine's `measure`."""

    def __init__(self, folder: Path, *pair_ids: str) -> None:
        self.calls, self.sampled, rows = 0, list[str](), folder / "rows.parquet"
        self.order = ["turned0", "mine2", "mine0", "mine1", "turned2", "turned1"]
        extras = [{"pair_id": name, "user_id": "u"} for name in pair_ids or ("p0", "p1", "p2")]
        pq.write_table(pa.table({"extra_info": extras}), rows)
        self.run = PhaseRun(Phase(StageName.CURRICULUM, None, rows, folder, 3), Config())

    def record(
        self, start: Path, samples: int, mirror: Path | None = None, signals: Path | None = None
    ) -> Any:
        return hardness(self.run, HardnessSource(signals, samples, mirror), start, self.measure)

    def measure(self, requests: Sequence[ChainRequest]) -> Iterator[tuple[str, list[ScoredChain]]]:
        """All requests in one call, in an order of its own."""
        self.calls += 1
        for request in sorted(requests, key=lambda r: self.order.index(r.uid)):
            self.sampled.append(request.uid)
            outcome = 0 if request.uid in ("mine1", "turned1", "turned2") else 1
            yield request.uid, [chain(outcome, 2.0 if outcome else -2.0)] * request.samples


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "start").mkdir()
    (tmp_path / "start/model.safetensors").write_bytes(b"weights")
    return tmp_path / "start"


def test_both_orders_are_sampled_and_the_record_is_written(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, mirror = Measured(tmp_path), tmp_path / "mirror.parquet"
    pq.write_table(measured.run.table, mirror)
    record = measured.record(checkpoint, 4, mirror)
    assert (
        record["pass_rate"] == [1.0, 0.0, 0.5]
        and record["order_gap"] == [0.0, 0.0, 1.0]
        and record["samples"] == [4, 4, 4]
    )
    assert record["hard"] == [False, False, True] and record["suspect"] == [False, True, False]
    assert pq.read_table(tmp_path / "suspect.parquet")["pair_id"].to_pylist() == ["p1"]
    assert pq.read_table(tmp_path / "hardness.parquet").to_pydict() == record
    assert json.loads((tmp_path / "hardness.json").read_text()) == {
        "pairs": 3,
        "hard": 1,
        "suspect": 1,
        "measured_by": "model",
    }
    assert "curriculum: 1 of 3 pairs are hard, 1 suspect (down-weighted" in capsys.readouterr().out
    assert measured.record(checkpoint, 4, mirror) == record
    assert measured.calls == 1, "both orders in one queue, and measured once"


def test_a_killed_mining_resumes_after_its_last_block(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgenrm_train.backends.grpo.mining.BLOCK", 1)
    (tmp_path / "whole").mkdir()
    expected = Measured(tmp_path / "whole").record(checkpoint, 4)
    measured, mined = Measured(tmp_path), tmp_path / "mining.parquet"
    measure = measured.measure

    def killed(requests: Sequence[ChainRequest]) -> Iterator[tuple[str, list[ScoredChain]]]:
        yield from list(measure(requests))[:2]
        raise KeyboardInterrupt

    measured.measure = killed
    with pytest.raises(KeyboardInterrupt):
        measured.record(checkpoint, 4)
    assert pq.read_table(mined)["pair_id"].to_pylist() == ["p0"], "p2 ended before p1 and waited for it"
    measured.measure, measured.sampled = measure, []
    assert measured.record(checkpoint, 4) == expected
    assert measured.sampled == ["mine2", "mine1"], "only the other pairs were sampled again"


def test_saving_does_not_cost_the_square_of_the_pairs(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgenrm_train.backends.grpo.mining.BLOCK", 1)
    written: list[int] = []
    monkeypatch.setattr(
        "pgenrm_train.backends.grpo.mining.write_table",
        lambda path, table: written.append(table.num_rows) if path.name == "mining.parquet" else None,
    )
    measured = Measured(tmp_path, *(f"p{n}" for n in range(400)))
    measured.order = [f"mine{n}" for n in range(400)]
    measured.record(checkpoint, 1)
    assert written[-1] == 400 and sum(written) < 20 * 400
    assert max(b - a for a, b in zip([0, *written], written)) <= 400 / 16 + 1


def test_a_cold_start_samples_no_model(tmp_path: Path, checkpoint: Path) -> None:
    measured, signals = Measured(tmp_path), tmp_path / "signals.parquet"
    nothing = pa.array([None] * 3, pa.float64())
    pq.write_table(
        pa.table(
            {
                "similarity": [0.1, 0.9, 0.8],
                "length_ratio": [0.5, 0.9, 0.8],
                "rating_gap": nothing,
                "disagreement": nothing,
                "origin": ["given"] * 3,
            }
        ),
        signals,
    )
    record = measured.record(checkpoint, 0, signals=signals)
    assert measured.calls == 0 and record["hard"] == [False, True, True] and "pass_rate" not in record
    assert record["origin"] == ["given"] * 3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("weights", "was measured with another checkpoint than"),
        ("samples", r"another curriculum\.mining_samples"),
        ("pairs", "other pairs"),
    ],
)
def test_a_foreign_cache_is_refused_before_training(
    tmp_path: Path, checkpoint: Path, change: str, text: str
) -> None:
    measured = Measured(tmp_path)
    measured.record(checkpoint, 4)
    if change == "weights":
        (checkpoint / "model.safetensors").write_bytes(b"other weights")
    if change == "pairs":
        measured = Measured(tmp_path, "p0", "p1", "p3")
    with pytest.raises(ArtifactError, match=text):
        measured.record(checkpoint, 6 if change == "samples" else 4)


def test_a_foreign_cache_is_refused_before_an_engine_is_started(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, measured = Config(recipe="curriculum"), Measured(tmp_path)
    for name, value in verl_variables(config).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "pgenrm_train.backends.grpo.session.Session", lambda *_: pytest.fail("an engine was started")
    )
    measured.record(checkpoint, 4)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    phase = replace(measured.run.phase, start=checkpoint, hardness=HardnessSource(samples=4))
    with pytest.raises(ArtifactError, match="was measured with another checkpoint than"):
        train(config, [phase])


def test_a_failed_chain_ranks_nothing_and_has_no_margin() -> None:
    pair = summarise(0, "p", [chain(1, 3.0, 1.0), chain(0), chain(0, -1.0)])
    assert pair.pass_rate == pytest.approx(1 / 3) and pair.failures == 1
    assert (pair.margin, pair.verified_margin, pair.order_gap) == (1.0, 1.0, None)
    assert summarise(0, "p", [chain(0)]).margin is None


def test_discarded_groups_count_as_evidence_and_as_cost() -> None:
    group = ScoredGroup([chain(outcome) for outcome in (1, 1, 0, 0)], discarded_passes=4, discarded_chains=4)
    assert group.evidence() == (6, 8)
    assert chain_metrics([group, ScoredGroup([chain(1)] * 4)])["groups/discarded_chains"] == 4


def test_the_mix_and_what_its_parts_are_worth_are_in_the_metrics() -> None:
    sampler = CurriculumSampler(
        8,
        prompts_per_step=4,
        steps=2,
        seed=0,
        schedule=Schedule("linear", start=0.5, end=0.5),
        facts=PairFacts([True] * 4 + [False] * 4),
    )
    drawn = sampler.next_batch(1)
    groups = {i: ScoredGroup([chain(float(i >= 4))] * 2) for i in drawn}
    metrics = mix_metrics(groups, sampler, Draw(drawn, 0.5, 0.25))
    assert metrics["curriculum/target_hard_share"] == 0.5
    assert metrics["curriculum/realised_hard_share"] == 0.25, "of this draw, not of the sampler's newest"
    assert (metrics["curriculum/hard_pass_rate"], metrics["curriculum/rest_pass_rate"]) == (0.0, 1.0)
    assert (metrics["curriculum/hard_pairs"], metrics["curriculum/rest_pairs"]) == (4, 4)
    plain = CurriculumSampler(8, prompts_per_step=4, steps=2, seed=0)
    assert mix_metrics({}, plain, Draw([])) == {
        "curriculum/target_hard_share": None,
        "curriculum/realised_hard_share": None,
    }
