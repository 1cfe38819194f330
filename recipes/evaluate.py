"""evaluate: every checkpoint of the run (or `model.path=`) on unseen users, beside baselines and probes → results and report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.baselines import fit_baseline
from eval.evaluation import Candidate, Evaluation, Grid, Tested
from eval.scaling_study import FindSimilar, Similar, Study
from eval.summary import publish
from pgenrm_train.artifacts import StageFolder, weights_digest
from pgenrm_train.backends.base import Generator
from pgenrm_train.config import Config, sizes
from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.records import Example, PreferencePair
from pgenrm_train.stages.inputs import PromptWriter, asked, histories, load_pairs
from recipes import build_data
from recipes.build_sec import load_tokenizer
from recipes.llm import model_endpoint, plain_writer
from recipes.run import newest, prepare, progress, run_stage

READS = ("data", "seed", "eval", "masking", "prototypes", "model.kind", "model.name", "model.path", "model.instructions", "model.max_prompt_tokens",
         "model.max_response_tokens", "model.max_text_tokens")  # fmt: skip
TRAINED = ("psi", "cre", "curriculum")  # stages that make a checkpoint, in order


def run(config: Config) -> None:
    prepare(config)
    made = [stage for stage in TRAINED if StageFolder.read(Path(config.run_dir), stage).complete]
    if config.model.kind in ("nano", "hf") and not config.model.path and not made:
        raise ArtifactError(
            f"recipe=evaluate found no complete {', '.join(TRAINED)} under run_dir={config.run_dir}; train one there, or give model.path="
        )
    build_data.run(config)
    folder = run_stage(
        config,
        "evaluate",
        READS,
        ["build_data", *made],
        lambda f, t: evaluate(config, f, t, made),
        "accuracy {accuracy:.3f} of {model}",
        renew=True,
    )
    print((folder.path / "table.txt").read_text(), end="")


def evaluate(config: Config, folder: StageFolder, tracker: Any, made: Sequence[str]) -> dict[str, Any]:
    """Test every candidate and baseline on the same pairs; write results.json, predictions.parquet, report.html, table.txt."""
    pairs = load_pairs(Path(config.run_dir))
    split = asked(pairs, config.eval.split, config.data.max_test_pairs)
    if not split:
        raise DataError(
            f"no pair has split={config.eval.split}; nothing to evaluate (rows say theirs in the column split: train, val or test)"
        )
    sampler = histories(config, pairs)
    evaluation = Evaluation(config, split, {p.pair_id: sampler(p) for p in split})
    baselines = [evaluation.baseline(name, scorer) for name, scorer in scorers(config, pairs).items()]
    tested, grids = [], []
    for candidate in (everyone := candidates(config, made)):
        tested.append(evaluation.test(candidate, folder.path / candidate.name, progress))
        if candidate is everyone[-1]:
            grids = scale(config, evaluation, candidate, folder.path / candidate.name, pairs)
        candidate.close()
    for step, result in enumerate(tested):
        tracker.log(step, metrics(result))
    final = publish(config, folder.path, evaluation, tested, baselines, grids, notes(config))
    return {"accuracy": final["accuracy"], "ci95": final["ci95"], "model": final["model"], "judge": config.judge.kind}


def scale(
    config: Config, evaluation: Evaluation, candidate: Candidate, folder: Path, pairs: Sequence[PreferencePair]
) -> list[Grid]:
    """Test-time user-based scaling of one model, where more than one sample is asked for."""
    sampler, studies, grids = histories(config, pairs), [], []
    if max(ind := sizes(config.eval.ind)) > 1 or max(sizes(config.eval.pro)) > 0:
        studies.append((Study("scaling", ind, sizes(config.eval.pro)), config.data.history_size))
    if config.eval.one_pair_ind:
        studies.append((Study("one_pair", tuple(config.eval.one_pair_ind), tuple(config.eval.one_pair_pro or [0])), 1))
    for study, size in studies:
        shown = {p.pair_id: sampler(p, size) for p in evaluation.pairs}
        find = find_similar(config, pairs) if study.n else None
        grids.append(evaluation.study(study, candidate, shown, folder, progress, find))
    return grids


def find_similar(config: Config, pairs: Sequence[PreferencePair]) -> FindSimilar:
    """Nearest training users by the text of an analysis, from the run's prototypes (METHOD §7)."""
    import pandas as pd

    from pgenrm_train import prototypes
    from recipes.prototypes import hashes, make_embedder

    folder = newest(config, "prototypes")
    embedder = make_embedder(config)
    expect = {k: v for k, v in hashes(config, Path("-"), embedder).items() if k != "model"}
    loaded = prototypes.load(folder.path, expect)
    members = pd.read_parquet(folder.path / "analyses.parquet").sort_values("row")
    sampler, by_id = histories(config, pairs), {p.pair_id: p for p in pairs}

    def find(analyses: Sequence[str], users: Sequence[str], n: int) -> list[list[Similar]]:
        found = []
        for vector, user in zip(embedder(analyses), users):
            rows = prototypes.neighbours(loaded, loaded.embeddings, loaded.users, vector, user, n, allow_fewer=True)
            chosen = [by_id[members["pair_id"].iat[row]] for row in rows]
            found.append([Similar(p.user_id, sampler(p)) for p in chosen])
        return found

    return find


def candidates(config: Config, made: Sequence[str]) -> list[Candidate]:
    """The models under test, in the order of the table."""
    if config.model.kind == "baseline":
        return []
    if config.model.kind == "endpoint":
        return [_endpoint(config)]
    if config.model.path:
        return [_local(config, config.model.label, Path(config.model.path), None)]
    run_dir = Path(config.run_dir)
    return [
        _local(config, stage, run_dir / stage / "checkpoint", StageFolder.read(run_dir, stage).manifest["wall_seconds"])
        for stage in made
    ]


def _local(config: Config, name: str, checkpoint: Path, seconds: float | None) -> Candidate:
    if not (checkpoint / "config.json").exists():
        raise ArtifactError(f"{checkpoint} is not a Hugging Face checkpoint: it has no config.json")

    @functools.cache
    def start() -> Generator:
        from pgenrm_train.backends.vllm_engine import VllmGenerator

        return VllmGenerator(config, checkpoint)

    def close() -> None:
        if start.cache_info().currsize:
            start().close()
            start.cache_clear()

    return Candidate(
        name, weights_digest(checkpoint), start, lambda: PromptWriter(config, load_tokenizer(checkpoint)), close, seconds
    )


def _endpoint(config: Config) -> Candidate:
    from pgenrm_train.backends.endpoint import Endpoint
    from pgenrm_train.backends.llm import EndpointGenerator

    settings = model_endpoint(config)

    @functools.cache
    def start() -> Generator:
        return EndpointGenerator(Endpoint(settings))  # answers are kept as predictions

    def close() -> None:
        if start.cache_info().currsize:
            start().close()

    return Candidate(config.model.label, f"{settings.base_url}|{settings.name}", start, lambda: plain_writer(config), close)


def scorers(config: Config, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """The LLM-free baselines that were asked for, fitted on training pairs."""
    names = [config.model.name] if config.model.kind == "baseline" else list(config.eval.baselines)
    more: dict[str, Any] = {"features": _features, "oracle": _oracle}
    train = [p for p in pairs if p.trains]
    return {name: fit_baseline(name, train, pairs, seed=config.seed, more=more) for name in names}


class _Fitted:
    """Adapts a function of the example to the baseline protocol."""

    def __init__(self, score: Callable[[Example], tuple[float, ...]]) -> None:
        self.score = score


class _features:  # named as in the registry
    """The features teacher's rule as a scorer."""

    def __init__(self, *, seed: int = 0) -> None:
        from data_builders.features import FeatureTeacher

        self.rule = FeatureTeacher()

    def fit(self, train: Sequence[PreferencePair], _all: Sequence[PreferencePair]) -> _Fitted:
        self.rule.fit(train)
        return _Fitted(lambda e: self.rule.score(e.user_id, e.history, e.query, e.responses))


class _oracle:
    """PersonaWorld's teacher with the stated criteria in sight: the ceiling of the table."""

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, _train: Sequence[PreferencePair], asked_pairs: Sequence[PreferencePair]) -> _Fitted:
        from data_builders.oracle import OracleTeacher
        from pgenrm_train.chains import Chain, parse_chain

        teacher, explicit = OracleTeacher(self.seed), {p.pair_id: p.explicit for p in asked_pairs}

        def score(example: Example) -> tuple[float, ...]:
            import dataclasses

            chain = parse_chain(teacher.write(dataclasses.replace(example, explicit=explicit[example.pair_id])))
            assert isinstance(chain, Chain)
            return chain.scores

        return _Fitted(score)


def metrics(result: Tested) -> dict[str, float]:
    """What W&B and metrics.jsonl get of a tested model."""
    report = result.report
    found = {
        "eval/accuracy": report["accuracy"],
        "eval/macro_accuracy": report["macro_accuracy"],
        "eval/ties": report["ties"],
        "eval/format_failures": sum(report["failures"].values()),
        "eval/order_flip_rate": report["order_flip_rate"],
    }
    return {k: float(v) for k, v in found.items() if v is not None}


def notes(config: Config) -> list[str]:
    """Sentences that a reader must know beside the numbers."""
    notes = []
    if config.judge.kind == "none":
        notes.append("judge=none: no process reward in CRE; outcome and format only.")
    if config.data.name != "personaworld" and config.model.kind == "nano":
        notes.append(
            "nano has 0.4M parameters and learnt English from these votes alone: expect accuracy near chance on real text. "
            "This run shows the machinery on real data, not what an 8B model would reach."
        )
    return notes
