"""Evaluate candidates and baselines on a run's votes, or compare two evaluated runs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from eval.report.compare import compare, write_comparison
from eval.report.summary import Evaluated, write_results
from eval.studies.evaluation import (
    NO_PERSONA,
    Candidate,
    Evaluation,
    Grid,
    ScoredCandidate,
    greedy_headline,
    headline,
)
from eval.studies.scaling_study import FindSimilar, Study
from pgenrm_train.backends.grpo.gold import widened
from pgenrm_train.config import GRPO_STAGES, PERSONA_BASELINE, Config, StageName, seeds_of_grid, sizes
from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.files import link
from pgenrm_train.prompts.writer import histories, load_pairs, pairs_of_split
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.personas import read_personas
from pgenrm_train.run.concurrency import progress
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.timeline import Part, mark
from pgenrm_train.run.tracking import METRICS, Tracker, read
from recipes.wiring.baselines import scorers
from recipes.wiring.ceilings import ceilings, truth_rows
from recipes.wiring.costs import estimate_evaluation
from recipes.wiring.llm import model_endpoint, shown_histories
from recipes.wiring.similar_users import find_random, find_similar, nearest_prototypes


def evaluate(
    config: Config, folder: StageFolder, tracker: Tracker, everyone: Sequence[Candidate | ScoredCandidate]
) -> Mapping[str, object]:
    """Test every candidate and baseline on the same pairs and publish the results."""
    scaling_notes: list[str] = []
    if any(isinstance(candidate, Candidate) for candidate in everyone):
        config, scaling_notes = without_prototypes(config)
    pairs = load_pairs(Path(config.run_dir))
    split = pairs_of_split(pairs, config.eval.split, config.data.max_test_pairs)
    if not split:
        raise DataError(
            f"no pair has split={config.eval.split}, so there is nothing to evaluate; the column split holds "
            "train, val or test"
        )
    check_split(config, split, pairs)
    sampler = histories(config, pairs)
    evaluation = Evaluation(
        config, split, shown_histories(config, sampler, split), {p.user_id for p in pairs if p.trains}
    )
    tested, cost = [], {}
    grids: list[Grid] = []
    fitted = scorers(config, pairs)
    # Personas, and prototypes of another model, raise here, before any question.
    personas = published_personas(config, evaluation)
    find = find_similar(config, pairs) if needs_similar_users(config) else None
    baselines = [
        evaluation.baseline(name, score, final=not everyone and name == list(fitted)[-1])
        for name, score in fitted.items()
    ]
    if config.model.kind == "endpoint":
        expected = estimate_evaluation(config, evaluation, model_endpoint(config))
        folder.manifest.facts["estimate"] = expected.for_manifest()
    for candidate in everyone:
        answers, last = folder.path / candidate.name, candidate is everyone[-1]
        tested.append(evaluation.test(candidate, answers, progress, final=last))
        if isinstance(candidate, Candidate) and likeliest_too(config):
            tested[-1] = evaluation.with_greedy(tested[-1], candidate, answers, progress)
        if last and personas and isinstance(candidate, Candidate):
            baselines.append(evaluation.with_personas(candidate, personas, answers, progress))
        if last and isinstance(candidate, Candidate):  # pure scores do not vary by sample
            grids = scale(config, evaluation, candidate, answers, pairs, find)
            cost[candidate.name] = dict(candidate.cost())
        candidate.close()
    mark(Part.REPORT)
    for step, result in enumerate(tested):
        tracker.log(step, headline(result.report) | greedy_headline(result))
    evaluated = Evaluated(
        config,
        evaluation,
        tested,
        baselines,
        grids,
        [
            *scaling_notes,
            *persona_notes(evaluation, personas),
            *notes(config, [candidate.name for candidate in everyone]),
        ],
        nearest_prototypes(config, tested[-1]) if tested else None,
        cost,
        ceilings(config, sampler, split),
        truth_rows(config, split, evaluation.histories, tested),
    )
    results = write_results(evaluated, folder.path)
    for name, facts in cost.items():
        if facts:
            print(f"{name} cost: {facts}", flush=True)
    return {key: results[key] for key in ("accuracy", "ci95", "model", "judge", "cost")}


def likeliest_too(config: Config) -> bool:
    """Whether each pair is also judged greedily; an endpoint has one temperature, and its calls a price."""
    return config.eval.greedy and config.eval.temperature > 0 and config.model.kind != "endpoint"


def published_personas(config: Config, evaluation: Evaluation) -> Mapping[str, str]:
    """User → persona for the baseline `synthesize_me`; empty without it."""
    if not config.eval.personas:
        return {}
    return read_personas(Path(config.eval.personas), {pair.user_id for pair in evaluation.pairs})


def persona_notes(evaluation: Evaluation, personas: Mapping[str, str]) -> list[str]:
    """A sentence if users have no published persona."""
    users = {pair.user_id for pair in evaluation.pairs}
    lacking = len(users - personas.keys())
    if not personas or not lacking:
        return []
    return [
        f"{PERSONA_BASELINE}: {lacking} of {len(users)} users have no published persona; their pairs fail as "
        f"{NO_PERSONA}."
    ]


def without_prototypes(config: Config) -> tuple[Config, list[str]]:
    """Without prototypes: the configuration without similar users in its grids, and a note.

    Raises ArtifactError, before any question, if the headline needs similar users.
    """
    pro, one_pair = sizes(config.eval.pro), config.eval.one_pair_pro if config.eval.one_pair_ind else []
    folder = StageFolder.read(Path(config.run_dir), StageName.PROTOTYPES)
    if not max(*pro, *one_pair, 0, 0) or folder.complete:
        return config, []
    if max(pro) and not isinstance(config.eval.pro, list):
        raise ArtifactError(
            f"eval.pro={config.eval.pro} needs user prototypes, of which run_dir={config.run_dir} holds "
            "none; run recipe=prototypes there first, or use eval.pro=0"
        )
    return replace(config, eval=replace(config.eval, pro=[0], one_pair_pro=[])), [
        "The grids hold no similar users (Pro-n): this run has no prototypes; recipe=prototypes makes them."
    ]


def check_split(config: Config, evaluated: Sequence[PreferencePair], pairs: Sequence[PreferencePair]) -> None:
    """Raise DataError if `user_disjoint` would evaluate users with training votes."""
    if config.eval.protocol == "user_disjoint" and (
        training := {p.user_id for p in evaluated} & {p.user_id for p in pairs if p.trains}
    ):
        raise DataError(
            f"eval.protocol=user_disjoint: {len(training)} of the evaluated users also train; "
            "use data.split_by=user_disjoint, or eval.protocol=strict, which counts in the same way"
        )


def needs_similar_users(config: Config) -> bool:
    """Whether any cell uses similar users' histories, and the model under test writes chains."""
    most = max(sizes(config.eval.pro)) or (config.eval.one_pair_ind and max(config.eval.one_pair_pro or [0]))
    return bool(most) and config.model.kind in ("nano", "hf", "endpoint")


def scale(
    config: Config,
    evaluation: Evaluation,
    candidate: Candidate,
    folder: Path,
    pairs: Sequence[PreferencePair],
    find: FindSimilar | None,
) -> list[Grid]:
    """Test-time user-based scaling of one model, for the grids with more than one sample."""
    settings, sampler = config.eval, histories(config, pairs)
    control = find_random(config, pairs) if find and settings.random_users else None
    ind, pro = sizes(settings.ind), sizes(settings.pro)
    weights = (settings.weights[0], settings.weights[1])
    studies = []
    if max(ind) > 1 or max(pro) > 0:
        scaling = Study("scaling", ind, pro, weights, seeds_of_grid(settings))
        studies.append((scaling, config.data.history_size))
    if settings.one_pair_ind:
        one_pair = tuple(settings.one_pair_ind), tuple(settings.one_pair_pro or [0])
        studies.append((Study("one_pair", *one_pair, weights, settings.grid_seeds), 1))
    return [
        evaluation.study(
            study,
            candidate,
            shown_histories(config, sampler, evaluation.pairs, size),
            folder,
            progress,
            find if study.n else None,
            control if study.n else None,
        )
        for study, size in studies
    ]


def notes(config: Config, tested: Sequence[str]) -> list[str]:
    """Notes that a reader of the figures needs."""
    run_notes = []
    if config.judge.kind == "none" and StageName.CRE in tested:
        run_notes.append("judge=none: no process reward in CRE; outcome and format only.")
    if config.data.name != "personaworld" and config.model.kind == "nano" and StageName.PSI in tested:
        run_notes.append(
            "nano has 0.4M parameters and learnt English from these votes alone: expect accuracy near "
            "chance on real text. This run tests the machinery on real data, not the accuracy of an 8B "
            "model."
        )
    widening = [widened(read(Path(config.run_dir) / stage / METRICS), stage) for stage in GRPO_STAGES]
    run_notes += [f"Judges of {sentence}." for sentence in widening if sentence]
    facts = StageFolder.read(Path(config.run_dir), StageName.BUILD_DATA).manifest.facts
    lost = [f"{n} {what} were left out" for what, n in facts.get("left_out", {}).items() if n]
    return [*run_notes, *(f"Data: {finding}." for finding in (*lost, *facts.get("findings", [])))]


def compare_runs(config: Config) -> None:
    """Write the comparison to `<run_dir>/compare/`; starts no model and changes neither run."""
    first, second = config.eval.compare
    run_dir, folder = Path(config.run_dir), Path(config.run_dir) / "compare"
    comparison = compare((first, second), draws=config.eval.draws, seed=config.seed)
    print(write_comparison(comparison, folder), end="")
    for name in ("comparison.json", "report.html", "report.md"):
        if not (run_dir / name).exists() or (run_dir / name).resolve().parent == folder.resolve():
            link(folder / name, run_dir / name)
    print(f"comparison: {folder / 'comparison.json'} · report: {folder / 'report.html'}")
