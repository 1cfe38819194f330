"""What mining leaves on disk, which caches it refuses, and what a step's metrics say of the mix.  No engine is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pgenrm_train.backends.grpo.engine import Phase, train, verl_variables
from pgenrm_train.backends.grpo.mining import hardness, summary
from pgenrm_train.backends.grpo.progress import chain_metrics, mix_metrics, tried
from pgenrm_train.config import Config
from pgenrm_train.curriculum.sampler import CurriculumSampler
from pgenrm_train.errors import ArtifactError

BAND = (0.25, 0.75)


def info(outcome: float, margin: float | None = None, **more: Any) -> dict[str, Any]:
    return {"outcome": outcome, "margin": margin, "verified_margin": None} | more


class Measured:
    """Stands where the trainer stands: it answers `measure` for a phase of three pairs."""

    def __init__(self, folder: Path) -> None:
        self.run, self.calls = self, 0
        self.stage, self.work_dir, self.pair_ids = "curriculum", folder, ["p0", "p1", "p2"]
        self.table = pa.table({"i": [0, 1, 2]})

    def measure(
        self, table: pa.Table, samples: int, purpose: str, *, places: range
    ) -> list[list[dict[str, Any]]]:
        self.calls += 1
        outcomes = {"mine": [1, 0, 1], "turned": [1, 0, 0]}[purpose]
        return [[info(outcomes[i], 2.0 if outcomes[i] else -2.0)] * samples for i in places]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "start").mkdir()
    (tmp_path / "start/model.safetensors").write_bytes(b"weights")
    return tmp_path / "start"


def test_both_orders_are_asked_and_the_record_is_left(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, mirror = Measured(tmp_path), tmp_path / "mirror.parquet"
    pq.write_table(trainer.table, mirror)
    record = hardness(trainer, checkpoint, 4, mirror, None, BAND)
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
    assert hardness(trainer, checkpoint, 4, mirror, None, BAND) == record
    assert trainer.calls == 2, "measured once"


def test_a_killed_mining_goes_on_after_its_last_block(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgenrm_train.backends.grpo.mining.BLOCK", 1)
    (tmp_path / "whole").mkdir()
    expected = hardness(Measured(tmp_path / "whole"), checkpoint, 4, None, None, BAND)
    trainer = Measured(tmp_path)
    measure, trainer.measure = (
        trainer.measure,
        lambda *asked, places: killed() if trainer.calls == 2 else measure(*asked, places=places),
    )

    def killed() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hardness(trainer, checkpoint, 4, None, None, BAND)
    assert pq.read_metadata(tmp_path / "mining.parquet").num_rows == 2
    trainer.measure, trainer.calls = measure, 0
    assert hardness(trainer, checkpoint, 4, None, None, BAND) == expected
    assert trainer.calls == 1, "only the last pair was asked again"


def test_a_cold_start_asks_no_model(tmp_path: Path, checkpoint: Path) -> None:
    trainer, signals = Measured(tmp_path), tmp_path / "signals.parquet"
    nothing = pa.array([None] * 3, pa.float64())
    pq.write_table(
        pa.table({"similarity": [0.1, 0.9, 0.8], "length_ratio": [0.5, 0.9, 0.8], "rating_gap": nothing, "disagreement": nothing,
                  "origin": ["given"] * 3}), signals,
    )  # fmt: skip
    record = hardness(trainer, checkpoint, 0, None, signals, BAND)
    assert trainer.calls == 0 and record["hard"] == [False, True, True] and "pass_rate" not in record
    assert record["origin"] == ["given"] * 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("weights", "was measured with another checkpoint than"),
        ("samples", r"another curriculum\.mining_samples"),
        ("pairs", "other pairs"),
    ],
)
def test_a_foreign_cache_is_refused_before_training(
    tmp_path: Path, checkpoint: Path, change: str, said: str
) -> None:
    trainer = Measured(tmp_path)
    hardness(trainer, checkpoint, 4, None, None, BAND)
    if change == "weights":
        (checkpoint / "model.safetensors").write_bytes(b"other weights")
    if change == "pairs":
        trainer.pair_ids = ["p0", "p1", "p3"]
    with pytest.raises(ArtifactError, match=said):
        hardness(trainer, checkpoint, 6 if change == "samples" else 4, None, None, BAND)


def test_a_foreign_cache_is_refused_before_an_engine_is_started(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, trainer = Config(recipe="curriculum"), Measured(tmp_path)
    for name, value in verl_variables(config).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "pgenrm_train.backends.grpo.session.Session", lambda *_: pytest.fail("an engine was started")
    )
    hardness(trainer, checkpoint, 4, None, None, BAND)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    pq.write_table(
        pa.table({"extra_info": [{"pair_id": name} for name in trainer.pair_ids]}), tmp_path / "rows.parquet"
    )
    phase = Phase("curriculum", checkpoint, tmp_path / "rows.parquet", tmp_path, 3, mining_samples=4)
    with pytest.raises(ArtifactError, match="was measured with another checkpoint than"):
        train(config, [phase])


def test_a_failed_chain_ranks_nothing_and_has_no_margin() -> None:
    found = summary(0, "p", [info(1, 3.0, verified_margin=1.0), info(0), info(0, -1.0)])
    assert found["pass_rate"] == pytest.approx(1 / 3) and found["failures"] == 1
    assert (found["margin"], found["verified_margin"], found["order_gap"]) == (1.0, 1.0, None)
    assert summary(0, "p", [info(0)])["margin"] is None


def chain(outcome: float, **more: Any) -> dict[str, Any]:
    return info(outcome) | {
        "total": outcome, "process": None, "format": 0.0, "failure": None, "null_verdict": False, "error": None, "length": 5,
        "order": 0, "discarded_passes": 0, "discarded_chains": 0,
    } | more  # fmt: skip


def test_discarded_groups_count_as_evidence_and_as_cost() -> None:
    group = [chain(o, discarded_passes=4, discarded_chains=4) for o in (1, 1, 0, 0)]
    assert tried(group) == (6, 8)
    assert chain_metrics([group, [chain(1)] * 4])["groups/discarded_chains"] == 4


def test_the_mix_and_what_its_parts_are_worth_are_in_the_metrics() -> None:
    sampler = CurriculumSampler(
        8,
        prompts_per_step=4,
        steps=2,
        seed=0,
        schedule="linear",
        hard=[True] * 4 + [False] * 4,
        start=0.5,
        end=0.5,
    )
    drawn = sampler.next_batch(1)
    found = mix_metrics({i: [chain(float(i >= 4))] * 2 for i in drawn}, sampler)
    assert found["curriculum/target_hard_share"] == found["curriculum/realised_hard_share"] == 0.5
    assert (found["curriculum/hard_pass_rate"], found["curriculum/rest_pass_rate"]) == (0.0, 1.0)
    assert (found["curriculum/hard_pairs"], found["curriculum/rest_pairs"]) == (4, 4)
    plain = CurriculumSampler(8, prompts_per_step=4, steps=2, seed=0)
    assert mix_metrics({}, plain) == {
        "curriculum/target_hard_share": None,
        "curriculum/realised_hard_share": None,
    }
