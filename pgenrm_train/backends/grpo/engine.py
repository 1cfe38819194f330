"""GRPO on veRL: the phases of CRE and of the curriculum, in one warm session (METHOD §4 and §5).

A phase is complete when `<work_dir>/checkpoint` (Hugging Face format, tokenizer included) and
`<work_dir>/trained.json` exist; complete phases are kept.  An interrupted phase resumes after its newest
complete veRL checkpoint, with the same batches in the same order, sampling seeds, optimiser, schedule and
step count.  Two things are not bit-exact then: sums over a batch when several ranks or vLLM servers finish in
another order, and the kernels of a GPU.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgenrm_train.backends.grpo.config import to_verl, verl_variables
from pgenrm_train.backends.grpo.mining import Measure, check_cache, hardness
from pgenrm_train.backends.grpo.phase import REPORT, Phase, PhaseRun
from pgenrm_train.backends.protocols import Trained
from pgenrm_train.config import Config, CurriculumConfig
from pgenrm_train.config.setting import known
from pgenrm_train.curriculum.sampler import CurriculumSampler, PairFacts, Schedule
from pgenrm_train.errors import ArtifactError, BackendError, ConfigError, NothingTrainedError
from pgenrm_train.files import staged_folder
from pgenrm_train.run.timeline import Part

if TYPE_CHECKING:
    from pgenrm_train.backends.grpo.trainer import ChainTrainer

# Copied as they are: saving a loaded tokenizer again may change how it splits text.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)


def train(config: Config, phases: Sequence[Phase], report: Path | None = None) -> list[Trained]:
    """Run the incomplete phases in order on one session.

    With LoRA each has a session of its own, because the adapter is merged in between.
    Must run in the environment of `verl_variables(config)`.  `report`: file for the watchdog's message.
    """
    needed = verl_variables(config)
    names = ("VERL_USE_EXTERNAL_MODULES", "TRANSFER_QUEUE_ENABLE")
    if wrong := [name for name in names if os.environ.get(name) != needed[name]]:
        raise BackendError(
            f"{', '.join(wrong)} must be set by verl_variables(config) before verl is imported; use launch()"
        )
    if not phases or phases[0].start is None:
        raise ConfigError("the first phase needs a start checkpoint")
    starts = [phase.start or phases[i - 1].checkpoint for i, phase in enumerate(phases)]
    todo = [(phase, start) for phase, start in zip(phases, starts, strict=True) if phase.trained() is None]
    sessions = [[each] for each in todo] if config.model.lora.rank else [todo] if todo else []
    for session in sessions:
        _run_session(config, session, report or phases[0].work_dir / REPORT)
    return [trained for phase in phases if (trained := phase.trained()) is not None]


def _run_session(config: Config, phases: Sequence[tuple[Phase, Path]], report: Path) -> None:
    from pgenrm_train.backends.grpo.session import Session

    for phase, start in phases:
        check_cache(phase, start)
    sections = [getattr(phase.config(config), phase.section) for phase, _ in phases]
    verl = _verl(config, *phases[0])
    verl.actor_rollout_ref.actor.use_kl_loss = any(grpo.kl_coefficient > 0 for grpo in sections)
    with Session(config, verl, min(grpo.stall_seconds for grpo in sections), report) as session:
        for phase, start in phases:
            session.watchdog.folder = phase.work_dir
            _run_phase(PhaseRun(phase, config, session.watchdog.beat), start, session.trainer)


def _verl(config: Config, phase: Phase, start: Path) -> Any:
    phase.work_dir.mkdir(parents=True, exist_ok=True)
    return to_verl(
        phase.config(config),
        phase.section,
        start=start,
        rows=phase.rows,
        work_dir=phase.work_dir,
        total_steps=phase.steps,
    )


def _run_phase(run: PhaseRun, start: Path, trainer: "ChainTrainer") -> None:
    """Measure hardness if needed, train to the planned step, export, and write `trained.json`."""
    config, phase = run.config, run.phase
    run.beat(0, "preparing the phase", Part.START)
    trainer.prepare(run, _verl(config, phase, start), start)
    if trainer.begin(_sampler(run, start, trainer.measure)) < phase.steps:
        trainer.fit()
    if (saved := trainer.last_saved()) != phase.steps:
        raise NothingTrainedError(
            f"{phase.section} planned {phase.steps} steps and its newest checkpoint is of step {saved}; "
            f"see {phase.work_dir / 'metrics.jsonl'}"
        )
    run.beat(phase.steps, "exporting the checkpoint", Part.EXPORT)
    trainer.sleep()
    dtype = "float32" if config.cluster.device == "cpu" else config.model.dtype
    with staged_folder(phase.checkpoint) as draft:
        actors = trainer.actor_rollout_wg
        files = actors.begin_export(str(draft), dtype)[0]
        for number in range(files):
            actors.export_file(number)
            run.beat(phase.steps, f"exporting the checkpoint, file {number + 1} of {files}")
        for file in TOKENIZER_FILES:
            if (start / file).exists():
                shutil.copyfile(start / file, draft / file)
        check_export(draft)
    run.write_report()


def _sampler(run: PhaseRun, start: Path, measure: Measure) -> CurriculumSampler:
    """The phase's sampler; measures hardness first if the schedule needs it."""
    grpo, source = run.grpo, run.phase.hardness
    schedule, facts = Schedule(), PairFacts()
    if isinstance(grpo, CurriculumConfig):
        schedule = Schedule(
            name=grpo.schedule,
            start=grpo.hard_share_start,
            end=grpo.hard_share_end,
            band=(grpo.hard_low, grpo.hard_high),
            suspect_weight=grpo.suspect_weight,
        )
        users = run.user_ids if grpo.user_balanced else None
        facts = PairFacts(users=users)
        if source is not None:
            run.beat(0, "measuring hardness", Part.GENERATION)
            record = hardness(run, source, start, measure)
            facts = PairFacts(
                hard=record["hard"],
                suspect=record["suspect"],
                users=users,
                pass_rates=record.get("pass_rate"),
                chains=source.samples,
            )
            if warning := schedule.warning(record["hard"]):
                print(f"{run.phase.section}: {warning}", flush=True)
    return CurriculumSampler(
        run.table.num_rows,
        prompts_per_step=known(grpo.prompts_per_step),
        steps=run.phase.steps,
        seed=run.seed,
        schedule=schedule,
        facts=facts,
    )


def check_export(checkpoint: Path) -> None:
    """Compare names and shapes in the headers of the files with the model's; no weight is read.

    Raises ArtifactError if they differ.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(checkpoint)
    shape = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if shape.tie_word_embeddings:
        expected.pop("lm_head.weight")
    written: dict[str, list[int]] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                names = list(tensors.keys())
                written |= {name: tensors.get_slice(name).get_shape() for name in names}
        except SafetensorError as error:
            raise ArtifactError(f"the exported file {file} is damaged: {error}") from None
    if wrong := sorted(
        name for name in expected.keys() | written.keys() if expected.get(name) != written.get(name)
    ):
        raise ArtifactError(
            f"the exported checkpoint {checkpoint} differs from the model in {len(wrong)} tensors, the first "
            f"{wrong[0]}: shape {written.get(wrong[0])} instead of {expected.get(wrong[0])}"
        )
