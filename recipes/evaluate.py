"""evaluate: every checkpoint of the run (or `model.path=`) on unseen users, beside baselines and probes → results and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.metrics.slices import first_analyses
from eval.report.compare import compare, publish_comparison
from eval.report.summary import publish
from eval.studies.evaluation import Candidate, Evaluation, Grid, ScoredCandidate, Tested
from eval.studies.scaling_study import FindSimilar, Similar, Study
from eval.studies.validation import headline
from pgenrm_train.backends.vllm.replicas import local_engines
from pgenrm_train.config import Config, seeds_of_grid, sizes
from pgenrm_train.config.stage_names import TRAINED, StageName
from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.files import link
from pgenrm_train.prompts.writer import asked, histories, load_pairs
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.progress import progress
from pgenrm_train.stages.registry import EVALUATE, JUDGE
from pgenrm_train.stages.stage import newest, prepare, run_stage
from recipes import build_data
from recipes.wiring.baselines import scorers
from recipes.wiring.candidates import candidates
from recipes.wiring.costs import tell_evaluation
from recipes.wiring.llm import model_endpoint, shown_histories


def run(config: Config) -> None:
    if config.eval.compare:
        compare_runs(config)
        return
    prepare(config)
    made = [stage for stage in TRAINED if StageFolder.read(Path(config.run_dir), stage).complete]
    if config.model.kind in ("nano", "hf") and not config.model.path and not made:
        raise ArtifactError(
            f"recipe=evaluate found no complete {', '.join(TRAINED)} under run_dir={config.run_dir}; train one there, or give model.path="
        )
    build_data.run(config)
    stage, body, summary = EVALUATE, evaluate, "accuracy {accuracy:.3f} of {model}"
    if config.data.name == "lampqa":
        from recipes.wiring import lampqa

        body, summary = lampqa.evaluate, "Spearman {spearman} of {model}"
        stage = replace(stage, reads=(*stage.reads, *JUDGE))  # the reference ranking may be a judge's
    clustered = StageFolder.read(Path(config.run_dir), StageName.PROTOTYPES).complete
    inputs = (*made, *([StageName.PROTOTYPES] if clustered else []))

    def test(folder: StageFolder, tracker: Any) -> dict[str, Any]:
        with local_engines(config) as load:
            return body(config, folder, tracker, candidates(config, made, folder.path, load))

    folder = run_stage(config, stage, test, summary, inputs=inputs, renew=True)
    print((folder.path / "table.txt").read_text(), end="")


def compare_runs(config: Config) -> None:
    """Two finished runs side by side → `<run_dir>/compare/`; starts no model and touches neither run."""
    first, second = config.eval.compare
    found = compare((first, second), draws=config.eval.draws, seed=config.seed)
    run_dir, folder = Path(config.run_dir), Path(config.run_dir) / "compare"
    print(publish_comparison(found, folder), end="")
    for name in ("comparison.json", "report.html", "report.md"):
        if not (run_dir / name).exists() or (run_dir / name).resolve().parent == folder.resolve():
            link(folder / name, run_dir / name)
    print(f"comparison: {folder / 'comparison.json'} · report: {folder / 'report.html'}")


def evaluate(
    config: Config, folder: StageFolder, tracker: Any, everyone: Sequence[Candidate | ScoredCandidate]
) -> dict[str, Any]:
    """Test every candidate and baseline on the same pairs; write results.json, predictions.parquet, report.html, table.txt."""
    config, left_out = (
        without_prototypes(config) if any(isinstance(c, Candidate) for c in everyone) else (config, [])
    )
    pairs = load_pairs(Path(config.run_dir))
    split = asked(pairs, config.eval.split, config.data.max_test_pairs)
    if not split:
        raise DataError(
            f"no pair has split={config.eval.split}; nothing to evaluate (rows say theirs in the column split: train, val or test)"
        )
    check_split(config, split, pairs)
    sampler = histories(config, pairs)
    evaluation = Evaluation(
        config, split, shown_histories(config, sampler, split), {p.user_id for p in pairs if p.trains}
    )
    tested, grids, cost = [], [], {}
    fitted = scorers(config, pairs)
    find = (
        find_similar(config, pairs) if borrows(config) else None
    )  # refuses other prototypes before anything is asked
    baselines = [
        evaluation.baseline(name, scorer, final=not everyone and name == list(fitted)[-1])
        for name, scorer in fitted.items()
    ]
    if config.model.kind == "endpoint":
        folder.note(estimate=tell_evaluation(config, evaluation, model_endpoint(config)))
    for candidate in everyone:
        last = candidate is everyone[-1]
        tested.append(evaluation.test(candidate, folder.path / candidate.name, progress, final=last))
        if last and isinstance(candidate, Candidate):  # pure scores do not vary by sample
            grids = scale(config, evaluation, candidate, folder.path / candidate.name, pairs, find)
            cost[candidate.name] = dict(candidate.cost())
        candidate.close()
    for step, result in enumerate(tested):
        tracker.log(step, headline(result.report))
    nearest = nearest_prototypes(config, tested[-1]) if tested else None
    said = [*left_out, *notes(config, [candidate.name for candidate in everyone])]
    final = publish(config, folder.path, evaluation, tested, baselines, grids, said, nearest, cost)
    for name, facts in final["cost"].items():
        print(f"{name} was paid: {facts}", flush=True)
    return {key: final[key] for key in ("accuracy", "ci95", "model", "judge", "cost")}


def without_prototypes(config: Config) -> tuple[Config, list[str]]:
    """In a run without prototypes: the configuration without similar users in its grids, and a sentence that says so.

    Raises ArtifactError, before anything is asked, where similar users are part of the headline.
    """
    pro, one_pair = sizes(config.eval.pro), config.eval.one_pair_pro if config.eval.one_pair_ind else []
    if not max(*pro, *one_pair, 0, 0) or StageFolder.read(Path(config.run_dir), "prototypes").complete:
        return config, []
    if max(pro) and not isinstance(config.eval.pro, list):
        raise ArtifactError(
            f"eval.pro={config.eval.pro} needs user prototypes, of which run_dir={config.run_dir} holds none; "
            "run recipe=prototypes there first, or use eval.pro=0"
        )
    note = (
        "The grids hold no similar users (Pro-n): this run has no prototypes; recipe=prototypes makes them."
    )
    return replace(config, eval=replace(config.eval, pro=[0], one_pair_pro=[])), [note]


def check_split(config: Config, asked: Sequence[PreferencePair], pairs: Sequence[PreferencePair]) -> None:
    """Raises DataError when accuracy on users who train would go by the name `user_disjoint`."""
    if config.eval.protocol == "user_disjoint" and (
        known := {p.user_id for p in asked} & {p.user_id for p in pairs if p.trains}
    ):
        raise DataError(
            f"eval.protocol=user_disjoint: {len(known)} of the users who are asked about also train; "
            "use data.split_by=user_disjoint, or eval.protocol=strict, which counts alike"
        )


def borrows(config: Config) -> bool:
    """Whether any cell takes chains from similar users' histories, and the model under test writes chains."""
    asked = max(sizes(config.eval.pro)) or (config.eval.one_pair_ind and max(config.eval.one_pair_pro or [0]))
    return bool(asked) and config.model.kind in ("nano", "hf", "endpoint")


def scale(
    config: Config,
    evaluation: Evaluation,
    candidate: Candidate,
    folder: Path,
    pairs: Sequence[PreferencePair],
    find: FindSimilar | None,
) -> list[Grid]:
    """Test-time user-based scaling of one model, where more than one sample is asked for."""
    sampler, studies, grids = histories(config, pairs), [], []
    weights = (config.eval.weights[0], config.eval.weights[1])
    if max(ind := sizes(config.eval.ind)) > 1 or max(sizes(config.eval.pro)) > 0:
        cells = Study("scaling", ind, sizes(config.eval.pro), weights, seeds_of_grid(config.eval))
        studies.append((cells, config.data.history_size))
    if config.eval.one_pair_ind:
        one_pair = tuple(config.eval.one_pair_ind), tuple(config.eval.one_pair_pro or [0])
        studies.append((Study("one_pair", *one_pair, weights, config.eval.grid_seeds), 1))
    for study, size in studies:
        shown = shown_histories(config, sampler, evaluation.pairs, size)
        grids.append(evaluation.study(study, candidate, shown, folder, progress, find if study.n else None))
    return grids


def find_similar(config: Config, pairs: Sequence[PreferencePair]) -> FindSimilar:
    """Nearest training users by the text of an analysis, from the run's prototypes (METHOD §7)."""
    import pandas as pd

    from pgenrm_train.prototypes import clusters as prototypes

    folder = newest(config, StageName.PROTOTYPES)
    loaded, embedder = load_prototypes(config, folder)
    neighbourhood = prototypes.Neighbourhood(loaded)
    members = pd.read_parquet(folder.path / "analyses.parquet").sort_values("row")
    sampler, by_id = histories(config, pairs), {p.pair_id: p for p in pairs}

    def find(analyses: Sequence[str], users: Sequence[str], n: int) -> list[list[Similar]]:
        found = []
        for vector, user in zip(embedder([prototypes.preference_text(a) for a in analyses]), users):
            rows = neighbourhood.nearest(vector, user, n, allow_fewer=True)
            chosen = [by_id[members["pair_id"].iat[row]] for row in rows]
            found.append([Similar(p.user_id, sampler(p)) for p in chosen])
        return found

    return find


def nearest_prototypes(config: Config, final: Tested) -> dict[str, int] | None:
    """pair_id → the prototype nearest to the model's own analysis of its user; None where the run has no prototypes.

    A pair whose first chain cannot be read has none, and neither has any pair where the prototypes belong to another model.
    """
    from pgenrm_train.prototypes import clusters as prototypes

    folder = StageFolder.read(Path(config.run_dir), "prototypes")
    analyses = first_analyses(final.predictions) if folder.complete else {}
    if not analyses:
        return None
    try:
        loaded, embedder = load_prototypes(config, folder)
    except ArtifactError as error:  # they were asked for by nobody; the rest of the evaluation stands
        print(f"no slices by prototype: {error}", flush=True)
        return None
    labels = prototypes.assign(
        loaded.A, embedder([prototypes.preference_text(text) for text in analyses.values()])
    )
    return {pair: int(label) for pair, label in zip(analyses, labels, strict=True)}


def load_prototypes(config: Config, folder: StageFolder) -> tuple[Any, Any]:
    """The run's prototypes and the embedder that made them.

    Raises ArtifactError when they belong to another model, embedder or data.  Which weights a server has nobody can check.
    """
    from pgenrm_train.prototypes import clusters as prototypes
    from recipes.prototypes import hashes, make_embedder

    embedder, checkpoint = make_embedder(config), checkpoint_under_test(config)
    expect = dict(hashes(config, checkpoint or Path("-"), embedder))
    if checkpoint is None:
        del expect["model"]
    return prototypes.load(folder.path, expect), embedder


def checkpoint_under_test(config: Config) -> Path | None:
    """The local checkpoint that test-time scaling asks: the given one or the run's newest; None for a model behind an API."""
    if config.model.kind not in ("nano", "hf"):
        return None
    if config.model.path:
        return Path(config.model.path)
    made = (StageFolder.read(Path(config.run_dir), stage) for stage in reversed(TRAINED))
    return next((folder.path / "checkpoint" for folder in made if folder.complete), None)


def notes(config: Config, tested: Sequence[str]) -> list[str]:
    """Sentences that a reader must know beside the numbers."""
    notes = []
    if config.judge.kind == "none" and "cre" in tested:
        notes.append("judge=none: no process reward in CRE; outcome and format only.")
    if config.data.name != "personaworld" and config.model.kind == "nano" and "psi" in tested:
        notes.append(
            "nano has 0.4M parameters and learnt English from these votes alone: expect accuracy near chance on real text. "
            "This run shows the machinery on real data, not what an 8B model would reach."
        )
    built = StageFolder.read(Path(config.run_dir), "build_data").manifest.facts
    lost = [f"{n} {what} were left out" for what, n in built.get("left_out", {}).items() if n]
    return [*notes, *(f"Data: {finding}." for finding in (*lost, *built.get("findings", [])))]
