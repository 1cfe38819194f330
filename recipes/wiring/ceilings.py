"""Ceilings of PersonaWorld: what exact readers of the masked prompt reach on the evaluated pairs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from data_builders.teachers.chain_truth import ChainTruth, chain_truth
from data_builders.teachers.ideal import SEEN, TIE, UNSEEN, Ideal, IdealChain, IdealReader, Imitator
from eval.report.chain_section import Ceilings
from eval.report.report import Row
from eval.studies.evaluation import Tested
from pgenrm_train.bootstrap import mean
from pgenrm_train.chains.chain import Chain, parse_chain
from pgenrm_train.config import Config, StageName
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.masking import present
from pgenrm_train.records.pairs import HistoryItem, PreferencePair

COLUMNS = {
    "votes": "votes share",
    "recalled": "criteria recalled share",
    "allowed": "criteria allowed share",
    "responses": "responses share",
    "scores": "scores share",
    "quality": "weight of quality, %",
}
READERS = ("ideal", "ideal_chain", "imitator")
OF_STAGE = {
    StageName.PSI: "imitator",
    StageName.CRE: "ideal_chain",
    StageName.CURRICULUM: "ideal_chain",
}


def ceilings(config: Config, sampler: HistorySampler, pairs: Sequence[PreferencePair]) -> Ceilings:
    """Exact accuracies by reader, prior and known votes; empty for other data."""
    if config.data.name != "personaworld":
        return Ceilings()
    rows: list[Row] = []
    by_reader: dict[str, float] = {}
    for prior, cohorts in (("training users'", (SEEN,)), ("all", (SEEN, UNSEEN))):
        for size in sorted({config.data.history_size, 1, 0}, reverse=True):
            hits = _hits(IdealReader(cohorts), sampler, pairs, size)
            rows += [
                {"reader": name, "personas": prior, "known votes": size, **shares}
                for name, shares in hits.items()
            ]
            by_reader = by_reader or {name: shares["all accuracy"] for name, shares in hits.items()}
    return Ceilings({stage: by_reader[reader] for stage, reader in OF_STAGE.items()}, rows)


def _hits(
    reader: IdealReader, sampler: HistorySampler, pairs: Sequence[PreferencePair], size: int
) -> dict[str, dict[str, float]]:
    """Reader → accuracy over all pairs, by kind and by cohort.

    Presentation order cannot matter, so each pair is read once, with the chosen response first.
    """
    hits: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in READERS}
    for pair in pairs:
        example = present(pair, sampler(pair, size), 0)
        parts = [part for part in ("all", pair.kind, pair.cohort) if part]
        scores = [model.score(example) for model in (Ideal(reader), IdealChain(reader))]
        sure = Imitator(reader).hit_probability(example, 0)
        for name, hit in zip(READERS, (*(float(a - b > TIE) for a, b in scores), sure), strict=True):
            for part in parts:
                hits[name][part].append(hit)
    return {
        name: {f"{part} accuracy": fmean(own) for part, own in sorted(by_part.items())}
        for name, by_part in hits.items()
    }


def truth_rows(
    config: Config,
    pairs: Sequence[PreferencePair],
    histories: Mapping[str, tuple[HistoryItem, ...]],
    tested: Sequence[Tested],
) -> list[Row]:
    """Per model, the mean over readable chains of each share of `ChainTruth`; empty for other data."""
    if config.data.name != "personaworld":
        return []
    reader, by_id = IdealReader(), {pair.pair_id: pair for pair in pairs}
    rows: list[Row] = []
    for model in tested:
        truths = []
        for pair_id, order, text in model.own[["pair_id", "order", "text"]].itertuples(index=False):
            chain = parse_chain(text) if isinstance(text, str) else None
            if isinstance(chain, Chain):
                example = present(by_id[pair_id], histories[pair_id], order)
                truths.append(chain_truth(chain, text, example, by_id[pair_id].explicit, reader))
        if truths:
            rows.append({"model": model.name, "chains": len(truths), **_means(truths)})
    return rows


def _means(truths: Sequence[ChainTruth]) -> Row:
    return {
        column: mean([share for truth in truths if (share := getattr(truth, name)) is not None])
        for name, column in COLUMNS.items()
    }
