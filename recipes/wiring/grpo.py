"""GRPO on veRL for `cre` and `curriculum`, in one session if both are requested."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pgenrm_train.backends.grpo.phase import HardnessSource, Phase
from pgenrm_train.backends.grpo.scoring import JudgeSpec
from pgenrm_train.backends.grpo.supervisor import RESTARTS, launch
from pgenrm_train.cluster.sizes import settle_sizes
from pgenrm_train.config import Config, EndpointConfig, GrpoConfig, StageName, served_judges
from pgenrm_train.config.setting import known
from pgenrm_train.errors import ConfigError
from pgenrm_train.files import read_json, write_json
from pgenrm_train.prompts.writer import PromptWriter, load_pairs, pairs_of_split
from pgenrm_train.rewards.reward import RewardWeights
from pgenrm_train.rewards.training_rows import read_extras, withheld_signals
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.timeline import Part, mark
from pgenrm_train.run.tracking import METRICS, Tracker, read
from pgenrm_train.stages.criteria import load as load_criteria
from pgenrm_train.stages.grpo import (
    MIRROR,
    ROWS,
    SIGNALS,
    VALIDATION,
    RowBuilder,
    mines,
    write_rows,
    write_validation,
)
from pgenrm_train.stages.prototypes import prototype_of_users
from recipes.wiring.costs import estimate_judge, judge_cost
from recipes.wiring.llm import settings_of
from recipes.wiring.models import NO_VAL, load_tokenizer, make_embedder

TRUTH = "recipes.wiring.ceilings:validation_truth"
RULE_JUDGE = "data_builders.teachers.oracle:judge_for_rewards"
LLM_JUDGE = "pgenrm_train.backends.api.roles:judge_for_rewards"


def synthesized(config: Config, stage: StageName) -> bool:
    """Whether a stage is judged by synthetic criteria of users who stated none."""
    return config.sec.synthesize_criteria and bool(getattr(config, stage).process_weight)


def train(
    config: Config, stages: Sequence[StageName], start: Path, folder: StageFolder, tracker: Tracker
) -> dict[str, object]:
    """Run `stages` in one session; returns the facts of the first."""
    for stage in stages:
        config = settle_sizes(config, stage, examples_of(config, stage))
    with ExitStack() as servers:
        running = replace(config)
        for section in served_judges(config, *stages):
            log = folder.path / f"{section}_server.log"
            setattr(running, section, servers.enter_context(settings_of(config, section, log)))
        phases = [phase(running, stage, None if n else start) for n, stage in enumerate(stages)]
        paid = [p for p in phases if p.judge is not None and p.judge.settings is not None]
        if paid:
            folder.note(
                estimate=estimate_judge(
                    config, running.judge, {p.section: p.rows for p in paid}
                ).for_manifest()
            )
        earlier = [p.seconds() for p in phases]
        with ExitStack() as followed:
            first_step = tracker.first_step
            for p, seconds in zip(phases, earlier, strict=True):
                if p is not phases[0] and seconds is None:
                    tracker = Tracker.begin_early(config, p.section, p.work_dir, first_step)
                if p is phases[0] or seconds is None:
                    followed.enter_context(tracker.follow(p.work_dir / METRICS))
                first_step += p.steps
            mark(Part.START)
            trained = launch(config, phases)[0]
    facts: dict[str, object] = {
        "steps": trained.steps,
        "metrics": dict(trained.metrics),
        "judge": config.judge.kind,
    }
    if restarts := read(folder.path / RESTARTS):
        facts["restarts"] = [line["reason"] for line in restarts]
    if (counts := folder.path / "hardness.json").exists():
        facts["hardness"] = read_json(counts)
    for section in ("judge", "judge_gold"):
        caches = [p.work_dir / f"{section}_cache" for p in phases]
        if cost := judge_cost(getattr(config, section), caches):
            print(f"{section} cost: {cost}", flush=True)
            facts[f"{section}_cost"] = cost
    # One session serves several stages: each stage's time goes to its own row of the table.
    others = sum(p.seconds() or 0.0 for p, before in zip(phases[1:], earlier[1:]) if before is None)
    folder.add_seconds((earlier[0] or 0.0) - others)
    return facts


def examples_of(config: Config, stage: StageName) -> int:
    """Training pairs that a stage draws from."""
    train = pairs_of_split(load_pairs(Path(config.run_dir)), "train")
    settings: GrpoConfig = getattr(config, stage)
    return min(settings.rows, len(train))


def phase(config: Config, stage: StageName, start: Path | None) -> Phase:
    """The engine's description of one stage, with its rows on disk.

    `config` has its sizes, and the addresses of judges that the run serves.
    """
    settings: GrpoConfig = getattr(config, stage)
    work_dir = Path(config.run_dir) / stage
    rows, validation = work_dir / ROWS, work_dir / VALIDATION
    if not rows.exists():
        make_rows(config, stage, start or Path(config.run_dir) / StageName.PSI / "checkpoint")
    return Phase(
        section=stage,
        start=start,
        rows=rows,
        work_dir=work_dir,
        steps=known(settings.steps),
        weights=RewardWeights(
            outcome=settings.outcome_weight,
            process=settings.process_weight,
            format_error=settings.format_error,
            verified=settings.verified_weight,
        ),
        judge=judge_spec(config, config.judge, rows) if settings.process_weight else None,
        gold=judge_spec(config, config.judge_gold, rows, "judge_gold") if validation.exists() else None,
        hardness=hardness_source(config, work_dir) if stage == StageName.CURRICULUM else None,
        validation=validation if validation.exists() else None,
        truth=TRUTH if config.data.name == "personaworld" else None,
    )


def make_rows(config: Config, stage: StageName, tokenizer: Path) -> None:
    """Write a stage's rows, and those of its validation."""
    run_dir, settings = Path(config.run_dir), config.curriculum
    folder, pairs = run_dir / stage, load_pairs(run_dir)
    write = PromptWriter(config.model, load_tokenizer(tokenizer))
    builder = RowBuilder(config, stage, write, load_criteria(run_dir) if synthesized(config, stage) else {})
    if stage == StageName.CURRICULUM and settings.prototypes:
        builder = replace(builder, prototype_of=prototype_of_users(Path(settings.prototypes)))
    if stage == StageName.CURRICULUM and settings.similarity != "trigrams" and settings.schedule != "uniform":
        builder = replace(builder, embed=make_embedder(config, settings.similarity))
    if not write_validation(builder, folder, pairs) and getattr(config, stage).validate_every:
        print(f"{stage}: accuracy is not measured while training: {NO_VAL}", flush=True)
    write_rows(builder, folder, pairs)
    write_json(folder / "trimmed.json", dict(write.trimmed))
    write.log_trimmed(f"{stage} prompts")


def hardness_source(config: Config, work_dir: Path) -> HardnessSource | None:
    """Files and samples from which the engine learns hardness; None for a uniform draw."""
    if config.curriculum.schedule == "uniform":
        return None
    if not mines(config):
        return HardnessSource(work_dir / SIGNALS)
    return HardnessSource(work_dir / SIGNALS, config.curriculum.mining_samples, work_dir / MIRROR)


def judge_spec(config: Config, judge: EndpointConfig, rows: Path, section: str = "judge") -> JudgeSpec | None:
    """The judge of a stage, or its second one.

    `section`: judge or judge_gold.  Raises ConfigError if a language model would have nothing to judge by.
    """
    if judge.kind == "none":
        return None
    if judge.kind == "oracle":
        return JudgeSpec(RULE_JUDGE)
    if judge.kind not in ("endpoint", "vllm"):
        raise ConfigError(f"{section}.kind={judge.kind} has no judge; use oracle, endpoint, vllm or none")
    if not any(withheld_signals(extra) for extra in read_extras(rows)):
        raise ConfigError(
            f"{section}={judge.kind} has nothing to judge by: no training user of data={config.data.name} "
            f"states criteria, style, attributes or a self-description; use {section}=none, or "
            "sec.synthesize_criteria=true to infer criteria from their votes"
        )
    return JudgeSpec(
        LLM_JUDGE,
        settings=judge,
        # Several nodes share no file that SQLite can lock.
        cache=rows.parent / f"{section}_cache" if config.cluster.nodes == 1 else None,
        in_flight=judge.max_in_flight,
    )
