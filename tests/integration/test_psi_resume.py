"""A resumed PSI run equals the uninterrupted one.

It resumes at an epoch's end, inside an epoch, after a kill during a save, and after the last step.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pgenrm_train.backends.protocols import Generation, GenerationRequest, Validated
from pgenrm_train.backends.sft import engine as deepspeed_sft
from pgenrm_train.backends.sft.batches import Chats
from pgenrm_train.config import ROOT, Config, load
from pgenrm_train.errors import ArtifactError, BackendError
from pgenrm_train.files import write_table
from pgenrm_train.run.checkpoints import COMPLETE, step_of
from pgenrm_train.run.folder import weights_digest
from pgenrm_train.run.tracking import METRICS

NANO = ROOT / "tests" / "data" / "psi_nano"
SCORES = {0: 0.1, 2: 0.4, 4: 0.9, 6: 0.5, 8: 0.9}  # accuracies of the validator below, by step


def config_of(**psi: Any) -> Config:
    config = load("recipe=psi", "tracking=none")
    small = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "epochs": 2.0,
        "save_every": 2,
        "log_every": 1,
        "keep_checkpoints": 9,
        "optimizer": "adamw",
        "cpu_processes": 1,
    }
    for name, value in (small | psi).items():
        setattr(config.psi, name, value)
    return config


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 chats: 4 steps an epoch, the last of them short."""
    path = tmp_path_factory.mktemp("rows") / "sec.parquet"
    answers = [f"{'word ' * (1 + 5 * n % 17)}{n}" for n in range(14)]
    write_table(
        path,
        [
            {
                "messages": [
                    {"role": "user", "content": f"Which, {n}?"},
                    {"role": "assistant", "content": text},
                ]
            }
            for n, text in enumerate(answers)
        ],
    )
    return path


@pytest.fixture(scope="module")
def whole(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that keeps its optimiser's states, as if it had not been published."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_sft, "prune", lambda _: None)
        assert deepspeed_sft.train(config_of(), rows, start=NANO, work_dir=folder).steps == 8
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [(line["step"], line["psi/loss"]) for line in lines if "psi/loss" in line]


@pytest.mark.parametrize(
    "killed_after", [4, 6, 8]
)  # the end of an epoch, its middle, the end before publishing
def test_a_killed_run_resumes_as_if_nothing_had_happened(
    killed_after: int, whole: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"checkpoint-{killed_after}"
    shutil.copytree(whole / "steps" / name, tmp_path / "steps" / name)
    half = tmp_path / "steps" / f"checkpoint-{killed_after + 2}"
    shutil.copytree(whole / "steps" / "checkpoint-2", half)
    (half / COMPLETE).unlink()
    (half / "trainer_state.json").write_text('{"epo')
    logged = [
        line
        for line in (whole / METRICS).read_text().splitlines()
        if json.loads(line)["step"] <= killed_after
    ]
    (tmp_path / METRICS).write_text(
        "\n".join([*logged, '{"step": 9, "stage": "psi", "psi/loss": 7.0}', '{"ste'])
    )
    trained = deepspeed_sft.train(config_of(), rows, start=NANO, work_dir=tmp_path)
    assert f"ignoring half-written checkpoint {half}" in capsys.readouterr().out
    assert trained.steps == 8 and losses(tmp_path)[:killed_after] == losses(whole)[:killed_after]
    if killed_after < 8:
        assert losses(tmp_path) == losses(whole)
    assert weights_digest(tmp_path / "checkpoint") == weights_digest(whole / "checkpoint")
    assert (tmp_path / "checkpoint" / "chat_template.jinja").exists()
    assert not list((tmp_path / "steps").rglob("*optim_states.pt")), "published, so never resumed"
    assert deepspeed_sft.train(config_of(), rows, start=NANO, work_dir=tmp_path).steps == 8


def test_muon_learns_in_two_processes_what_it_learns_in_one_and_resumes(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_sft, "prune", lambda _: None)
    settings = {"optimizer": "muon", "learning_rate": 1e-3, "max_steps": 6}
    alone, shared, resumed = (tmp_path / name for name in ("alone", "shared", "resumed"))
    for folder, processes in ((alone, 1), (shared, 2)):
        folder.mkdir()
        config = config_of(**settings, cpu_processes=processes)
        deepspeed_sft.train(config, rows, start=NANO, work_dir=folder)
    # The fourth step, the epoch's last, is short: with two processes one of them repeats a micro-batch.
    first, second = ([loss for _, loss in losses(folder)][:3] for folder in (shared, alone))
    assert first == pytest.approx(second, rel=1e-3)
    shutil.copytree(alone / "steps" / "checkpoint-4", resumed / "steps" / "checkpoint-4")
    deepspeed_sft.train(config_of(**settings), rows, start=NANO, work_dir=resumed)
    assert weights_digest(resumed / "checkpoint") == weights_digest(alone / "checkpoint")
    adam = tmp_path / "adam"
    deepspeed_sft.train(config_of(learning_rate=1e-3, max_steps=6), rows, start=NANO, work_dir=adam)
    assert losses(adam)[:1] == losses(alone)[:1] and losses(adam)[2:] != losses(alone)[2:]


CHILD = """
import sys
from pathlib import Path
from test_psi_resume import NANO, config_of, deepspeed_sft
deepspeed_sft.train(config_of(), Path(sys.argv[1]), start=NANO, work_dir=Path(sys.argv[2]))
"""


def test_kill_9_while_a_checkpoint_is_being_written(
    whole: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = killed_while_saving(rows, tmp_path)
    while (half / COMPLETE).exists():  # the kill came too late, and the next start writes the next checkpoint
        half = killed_while_saving(rows, tmp_path)
    assert (half.parent / f"checkpoint-{step_of(half) - 2}" / COMPLETE).exists()
    assert deepspeed_sft.train(config_of(), rows, start=NANO, work_dir=tmp_path).steps == 8
    assert f"ignoring half-written checkpoint {half}" in capsys.readouterr().out
    assert losses(tmp_path) == losses(whole)
    assert weights_digest(tmp_path / "checkpoint") == weights_digest(whole / "checkpoint")


def killed_while_saving(rows: Path, folder: Path) -> Path:
    """Train in a child process and kill it during the save of a later checkpoint; return that checkpoint."""
    known = set((folder / "steps").glob("checkpoint-*")) | {folder / "steps" / "checkpoint-2"}
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    with subprocess.Popen([sys.executable, "-c", CHILD, str(rows), str(folder)], env=env) as child:
        while not (begun := [f for f in (folder / "steps").glob("checkpoint-*/*") if f.parent not in known]):
            assert child.poll() is None, "training ended before a save was seen"
        child.kill()
    return begun[0].parent


def test_a_damaged_checkpoint_is_skipped(
    whole: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4, 6):
        shutil.copytree(whole / "steps" / f"checkpoint-{step}", tmp_path / "steps" / f"checkpoint-{step}")
    weights, states = (
        tmp_path / "steps/checkpoint-6/model.safetensors",
        sorted((tmp_path / "steps/checkpoint-4").rglob("*states.pt")),
    )
    os.truncate(weights, weights.stat().st_size - 1)
    states[0].unlink()
    shutil.copy(whole / METRICS, tmp_path / METRICS)
    assert deepspeed_sft.train(config_of(), rows, start=NANO, work_dir=tmp_path).steps == 8
    out = capsys.readouterr().out
    assert "ignoring damaged checkpoint" in out
    assert f"resuming from {(tmp_path / 'steps/checkpoint-2').resolve()}" in out
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize(
    ("rate", "steps", "reason"),
    [(1e30, 8, "the loss of step [23] is (nan|inf)"), (1e39, 1, "weights after step 1 are not finite")],
)
def test_a_training_that_diverges_ends_loudly(
    rate: float, steps: int, reason: str, rows: Path, tmp_path: Path
) -> None:
    config = config_of(learning_rate=rate, max_steps=steps, warmup_ratio=0.0)
    with pytest.raises(BackendError, match=f"PSI has diverged: {reason}; lower psi.learning_rate"):
        deepspeed_sft.train(config, rows, start=NANO, work_dir=tmp_path)
    assert not (tmp_path / "checkpoint").exists() and not list(tmp_path.rglob(COMPLETE))


SEVERAL = """
import sys
from pathlib import Path
from test_psi_resume import NANO, config_of, deepspeed_sft
config = config_of()
config.cluster.processes_per_node, config.cluster.zero_stage = 2, 3
deepspeed_sft.train(config, Path(sys.argv[1]), start=NANO, work_dir=Path(sys.argv[2]))
"""


def test_no_process_outlives_a_killed_run_of_several(rows: Path, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = [sys.executable, "-c", SEVERAL, str(rows)]
    with subprocess.Popen([*command, str(killed)], env=env) as child:
        while not list((killed / "steps").glob(f"checkpoint-*/{COMPLETE}")):
            assert child.poll() is None, "training ended before a save was seen"
            time.sleep(0.01)
        ranks = [p for p in psutil.Process(child.pid).children(recursive=True) if p.is_running()]
        assert len(ranks) >= 3, "torchrun and two ranks"
        child.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    for folder in (killed, undisturbed):
        assert subprocess.run([*command, str(folder)], env=env, timeout=300, check=False).returncode == 0
    assert losses(killed) == losses(undisturbed) and len(losses(killed)) == 8


def test_a_checkpoint_of_another_model_is_refused(whole: Path, rows: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "steps" / "checkpoint-4", tmp_path / "steps" / "checkpoint-4")
    config = config_of()
    config.model.lora.rank = 4
    with pytest.raises(ArtifactError, match="written with another model or adapter"):
        deepspeed_sft.train(config, rows, start=NANO, work_dir=tmp_path)


def rising_and_falling(config: Config) -> Any:
    calls: list[int] = []

    def validate(generator: Any) -> Validated:
        request = GenerationRequest("a", ({"role": "user", "content": "Which?"},))
        answers: list[Generation] = list(generator([request], temperature=0.0))
        calls.append(len(answers))
        return Validated(
            {"eval/accuracy": SCORES[2 * len(calls) - 2]}, [{"text": answer.text} for answer in answers]
        )

    return validate


def test_the_best_checkpoint_is_published_and_patience_ends_training(rows: Path, tmp_path: Path) -> None:
    config = config_of(evaluate_every=2, patience=1, keep_checkpoints=2, save_every=50, packing=True)
    config.model.max_response_tokens = 8
    trained = deepspeed_sft.train(
        config, rows, start=NANO, work_dir=tmp_path, validator=f"{__name__}:rising_and_falling"
    )
    assert trained.steps == 6 and trained.metrics["psi/published_step"] == 4
    assert {folder.name for folder in (tmp_path / "steps").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert weights_digest(tmp_path / "checkpoint") == weights_digest(tmp_path / "steps" / "checkpoint-4")
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert {line["step"]: line["eval/accuracy"] for line in lines if "eval/accuracy" in line} == {
        0: 0.1,
        2: 0.4,
        4: 0.9,
        6: 0.5,
    }
    assert len(list((tmp_path / "samples").glob("step-*.parquet"))) == 4
    again = deepspeed_sft.train(
        config, rows, start=NANO, work_dir=tmp_path, validator=f"{__name__}:rising_and_falling"
    )
    assert again.steps == 6  # training was over: nothing but the publishing is done again


def falling(config: Config) -> Any:
    scores = iter([0.9, 0.8, 0.1])
    return lambda generator: Validated({"eval/accuracy": next(scores), "eval/limit": generator.limit}, [])


def test_the_default_schedule_measures_start_middle_and_end_and_publishes_the_last(
    rows: Path, tmp_path: Path
) -> None:
    """Answers end at 1.5 times the longest training chain; without sample chains there is no table."""
    config = config_of()
    trained = deepspeed_sft.train(
        config, rows, start=NANO, work_dir=tmp_path, validator=f"{__name__}:falling"
    )
    assert trained.steps == 8 == trained.metrics["psi/published_step"]
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    measured = {line["step"]: line["eval/accuracy"] for line in lines if "eval/accuracy" in line}
    assert measured == {0: 0.9, 4: 0.8, 8: 0.1}
    assert not (tmp_path / "samples").exists()
    longest = Chats(tmp_path / "chats.parquet").longest_answer
    limits = {line["eval/limit"] for line in lines if "eval/limit" in line}
    assert limits == {math.ceil(1.5 * longest)} and longest < config.model.max_response_tokens
