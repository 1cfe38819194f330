"""Ceilings of PersonaWorld: accuracies of exact readers of the masked prompt on the evaluated pairs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from pgenrm_train.prompts.writer import histories, load_pairs, pairs_of_split
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
    shown: Mapping[str, tuple[HistoryItem, ...]],
    tested: Sequence[Tested],
) -> list[Row]:
    """Means of `ChainTruth` per model, over readable chains; empty for other data."""
    if config.data.name != "personaworld":
        return []
    truth = TruthReader(IdealReader(), {pair.pair_id: pair for pair in pairs}, shown)
    rows: list[Row] = []
    for model in tested:
        truths = truth.of(model.own[["pair_id", "order", "text"]].itertuples(index=False))
        if truths:
            shares = {column: _mean(truths, name) for name, column in COLUMNS.items()}
            rows.append({"model": model.name, "chains": len(truths), **shares})
    return rows


@dataclass(frozen=True)
class TruthReader:
    """Compares chains of known pairs with the truth of PersonaWorld."""

    ideal: IdealReader
    pairs: Mapping[str, PreferencePair]
    histories: Mapping[str, tuple[HistoryItem, ...]]

    def of(self, chains: Iterable[tuple[str, int, str | None]]) -> list[ChainTruth]:
        """`ChainTruth` of the readable ones of `chains`: (pair_id, order, text)."""
        truths = []
        for pair_id, order, text in chains:
            chain = parse_chain(text) if isinstance(text, str) else None
            if isinstance(text, str) and isinstance(chain, Chain):
                pair = self.pairs[pair_id]
                example = present(pair, self.histories[pair_id], order)
                truths.append(chain_truth(chain, text, example, pair.explicit, self.ideal))
        return truths

    def __call__(self, chains: Iterable[tuple[str, int, str | None]]) -> dict[str, float]:
        """Means of the shares of `ChainTruth` that the chains have."""
        truths = self.of(chains)
        means = {name: _mean(truths, name) for name in COLUMNS}
        return {name: value for name, value in means.items() if value is not None}


def validation_truth(config: Config) -> TruthReader:
    """The reader of the chains of a stage's validation, for data=personaworld."""
    pairs = load_pairs(Path(config.run_dir))
    sampler, some = histories(config, pairs), pairs_of_split(pairs, "val")
    return TruthReader(
        IdealReader(), {pair.pair_id: pair for pair in some}, {pair.pair_id: sampler(pair) for pair in some}
    )


def _mean(truths: Sequence[ChainTruth], name: str) -> float | None:
    return mean([share for truth in truths if (share := getattr(truth, name)) is not None])
