"""The stages' own work at a size, with stubs in place of engines: they answer at once.

Every function sets a stage up in `folder`, which holds the built pairs, and returns the work to measure.  The
work begins with the files on disk, so its memory is that of a driver.
"""

import copy
import functools
import itertools
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_builders.sources import personaworld
from data_builders.teachers.oracle import OracleTeacher
from eval.choosing.best_of_n import ChoiceFacts, ChoiceRun, write_best_of_n
from eval.choosing.label_files import LabelFacts, LabelRun, write_labels
from eval.choosing.labels import label, votes_on
from eval.choosing.schemes import Player, Slot, circles, knockouts
from eval.studies.evaluation import Candidate, Evaluation
from eval.studies.probes import disagreement_twins
from pgenrm_train.backends.grpo import mining
from pgenrm_train.backends.grpo.phase import ChainRequest, HardnessSource, Phase, PhaseRun
from pgenrm_train.backends.grpo.progress import chain_metrics, validation_metrics
from pgenrm_train.backends.grpo.scoring import RewardSpec, Sample, ScoredGroup, score, settle
from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.backends.sft.batches import Batching, Chats, Layout, StepOrder, collate, write_chats
from pgenrm_train.backends.sft.checks import encode_rows
from pgenrm_train.chains.chain import JSON_END
from pgenrm_train.config import ROOT, Config, StageName, load
from pgenrm_train.curriculum.hard_negatives import hard_negatives
from pgenrm_train.curriculum.sampler import CurriculumSampler, PairFacts, Schedule
from pgenrm_train.prompts.masking import present
from pgenrm_train.prompts.writer import PromptWriter, histories, load_pairs, pairs_of_split
from pgenrm_train.prototypes.clusters import Neighbourhood
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.rows import pair_schema, pair_tables
from pgenrm_train.records.shards import ShardWriter
from pgenrm_train.records.slates import slates_of
from pgenrm_train.rewards.training_rows import GrpoRow, RowExtra
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.tracking import Tracker
from pgenrm_train.stages import build_sec, prototypes
from pgenrm_train.stages.grpo import RowBuilder, write_rows, write_validation
from recipes import build_data
from recipes.wiring import evaluation
from recipes.wiring.choosing.player import shown_histories
from recipes.wiring.choosing.references import candidates_of, others_mean, ratings_of, values_of
from recipes.wiring.models import load_tokenizer
from recipes.wiring.teachers import RuleTeacher

Work = Callable[[], object]
tokenizer = functools.cache(lambda: load_tokenizer(ROOT / "tests" / "data" / "psi_nano"))
CHAINS = 256  # distinct answers of the stub
SHARED = 20  # contents on which everyone votes


@functools.cache
def composed(data: str) -> Config:
    """Composed once, before any fork: Hydra takes a second."""
    path = ["data.path=votes.parquet"] if data == "pairs" else []
    config = load("recipe=evaluate", f"data={data}", "model=nano", "tracking=none", *path)
    config.model.totals, config.model.max_response_tokens = "declared", 8192
    config.data.history_policy, config.data.history_kind, config.data.max_test_pairs = "random", None, None
    chosen = config.eval
    chosen.ind, chosen.pro, chosen.one_pair_ind, chosen.one_pair_pro = [1], [0], [], []
    chosen.random_users, chosen.grid_pairs, chosen.draws = False, None, 200
    config.prototypes.k, config.prototypes.max_users, config.sec.max_chains = 16, None, None
    return config


def settings(folder: Path, recipe: str, data: str = "personaworld") -> Config:
    config = copy.deepcopy(composed(data))
    config.recipe, config.run_dir = recipe, str(folder)
    return config


# ---- inputs ----


def pairs_of(users: int, votes: int) -> list[PreferencePair]:
    """PersonaWorld of `users` training users with `votes` each; every pair is rated."""
    config = Config(recipe="build_data").data
    config.users, config.heldout_users, config.pairs_per_user = users, max(4, users // 4), votes
    rng = random.Random(0)
    return [
        replace(pair, chosen_score=float(rng.randint(6, 10)), rejected_score=float(rng.randint(1, 5)))
        for pair in personaworld.build(config, 0)
    ]


def shared_pairs(users: int) -> list[PreferencePair]:
    """One vote of every user on one of SHARED contents."""
    contents, rng, shared = pairs_of(4, 7)[:SHARED], random.Random(0), []
    for number in range(users):
        content = contents[number % SHARED]
        texts = [content.chosen, content.rejected]
        rng.shuffle(texts)
        name = f"shared-{number}"
        shared.append(replace(content, pair_id=name, user_id=name, chosen=texts[0], rejected=texts[1]))
    return shared


def write_pairs(folder: Path, pairs: Iterable[PreferencePair]) -> None:
    with ShardWriter(folder / "build_data" / "pairs.parquet", pair_schema()) as writer:
        for table in pair_tables(pairs):
            writer.table(table)


def write_votes(folder: Path, pairs: Iterable[PreferencePair]) -> None:
    """The source of data=pairs, with texts of their own, so that no vote repeats another."""
    rows = [
        {
            "user_id": pair.user_id,
            "context": f"{pair.query} ({number})",
            "chosen": f"{pair.chosen} Take {number % 997}.",
            "rejected": f"{pair.rejected} Take {number % 991}.",
            "split": pair.split,
        }
        for number, pair in enumerate(pairs)
    ]
    pd.DataFrame(rows).to_parquet(folder / "votes.parquet")


def write_chat_rows(folder: Path, pairs: Sequence[PreferencePair]) -> None:
    """Chats as build_sec writes them, the chains from the stub."""
    answers, system = Stub().texts, "Judge the two responses as this user would. " * 5
    rows = [
        {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": f"{pair.query} {pair.chosen} {pair.rejected} " * 4},
                {"role": "assistant", "content": answers[number % CHAINS]},
            ]
        }
        for number, pair in enumerate(pairs)
    ]
    pd.DataFrame(rows).to_parquet(folder / "sec.parquet")


class Stub:
    """A generator that answers at once with a chain of PersonaWorld's teacher."""

    def __init__(self) -> None:
        teacher, pairs = OracleTeacher(0), itertools.islice(pairs_of(40, 12), CHAINS)
        self.texts = [teacher.write(present(pair, (), number % 2)) for number, pair in enumerate(pairs)]

    def __call__(self, requests: Iterable[GenerationRequest], *, temperature: float) -> Iterator[Generation]:
        for request in requests:
            for sample in range(request.samples):
                text = self.texts[(zlib.crc32(request.key.encode()) + sample) % CHAINS]
                yield Generation(request.key, sample, text, None, 100)

    def close(self) -> None: ...


class Various(RuleTeacher):
    """A teacher whose analyses differ, as a language model's: near duplicates are searched."""

    by_rule = False

    def __init__(self) -> None:
        teacher = OracleTeacher(0)
        words = [
            f"{a}{b}" for a in ("clear", "warm", "brief", "plain", "wry") for b in ("", "er", "ly", "ish")
        ]

        def write(example: Any, attempt: int) -> str:
            rng = random.Random(f"{example.pair_id}/{example.responses[0]}")
            return f"{' '.join(rng.choices(words, k=40))}. {teacher.write(example, attempt)}"

        super().__init__(write)


def embed(texts: Sequence[str]) -> np.ndarray:
    """A unit vector (64,) per text, near one of 16 directions."""
    rng = np.random.default_rng(0)
    centres, table = rng.standard_normal((16, 64)), rng.standard_normal((4096, 64))
    keys = np.array([zlib.crc32(text.encode()) for text in texts])
    vectors = centres[keys % 16] + 0.5 * table[keys % 4096] + 0.01 * table[keys // 4096 % 4096]
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


# ---- stages ----


def personaworld_data(folder: Path, size: int) -> Work:
    config = settings(folder, "build_data")
    config.data.users, config.data.heldout_users = size, 40
    return lambda: build_data.build(config, StageFolder.read(folder, "built"))


def votes_data(folder: Path, size: int) -> Work:
    config = settings(folder, "build_data", data="pairs")
    config.data.path = str(folder / "votes.parquet")
    return lambda: build_data.build(config, StageFolder.read(folder, "built"))


def sec(folder: Path, teacher: RuleTeacher, samples: int = 4) -> Work:
    config = settings(folder, "build_sec")
    config.sec.samples_per_pair = samples
    writer = PromptWriter(config.model, tokenizer())

    def work() -> object:
        out = StageFolder.read(folder, "sec")
        return build_sec.run(config, out, load_pairs(folder), teacher, lambda _: writer)

    return work


def sec_by_rule(folder: Path, size: int) -> Work:
    return sec(folder, RuleTeacher(OracleTeacher(0).write))


def sec_by_model(folder: Path, size: int) -> Work:
    return sec(folder, Various())


def sec_samples(folder: Path, size: int) -> Work:
    """Chains that cannot be read until the last of `size`."""
    wrong, right = Stub().texts[0].replace(JSON_END, ""), OracleTeacher(0).write
    teacher = RuleTeacher(lambda example, n: wrong if n + 1 < size else right(example, n))
    return sec(folder, teacher, size)


def psi(folder: Path, size: int, ranks: int = 1) -> Work:
    """Encode, write, order and lay out all chats of an epoch, on every rank."""

    def work() -> None:
        write_chats(folder / "chats.parquet", encode_rows(tokenizer(), folder / "sec.parquet", 4096))
        for rank in range(ranks):
            chats = Chats(folder / "chats.parquet")
            order = StepOrder(chats.lengths, Batching(Layout.PACKED, 64, 4096, ranks), 0)
            for batch in itertools.islice(order, rank, None, ranks):
                collate(chats[batch], pad=0, packed=True)

    return work


def psi_ranks(folder: Path, size: int) -> Work:
    return psi(folder, size, size)


def grpo_rows(folder: Path, size: int) -> Work:
    config = settings(folder, "curriculum")
    chosen = config.curriculum
    chosen.rows = chosen.validate_pairs = 10**9
    chosen.schedule, chosen.construct, chosen.mine, chosen.prompts_per_step = "linear", True, True, 8
    writer = PromptWriter(config.model, tokenizer())

    def work() -> None:
        pairs, builder = load_pairs(folder), RowBuilder(config, StageName.CURRICULUM, writer)
        write_validation(builder, folder / "rows", pairs)
        write_rows(builder, folder / "rows", pairs)

    return work


def _chains(row: GrpoRow, samples: int, texts: Sequence[str]) -> list[Any]:
    spec = RewardSpec()
    start = zlib.crc32(row["extra_info"]["pair_id"].encode())
    return settle(
        [
            score(
                Sample([0] * 8, [0] * 8, [0.0] * 8, texts[(start + n) % CHAINS], True, 0),
                row,
                spec.weights,
                None,
            )
            for n in range(samples)
        ],
        spec,
    )


def mined(folder: Path, size: int) -> Work:
    """The mining of hardness: requests, summaries, saved blocks and the record; no chain is parsed."""
    config = settings(folder, "curriculum")
    start, row = ROOT / "tests/data/psi_nano", _row("p", 0)
    groups = [_chains(_row(f"p{n}", 0), 2, Stub().texts) for n in range(16)]
    extras = [{"pair_id": f"p{n}", "user_id": f"u{n // 8}"} for n in range(size)]
    folder = folder / f"mined-{size}"
    folder.mkdir()
    pd.DataFrame({"extra_info": extras, "prompt": [row["prompt"]] * size}).to_parquet(folder / "rows.parquet")

    def measure(requests: Sequence[ChainRequest]) -> Iterator[tuple[str, list[Any]]]:
        for number, request in enumerate(requests):
            yield request.uid, groups[number % 16]

    def work() -> None:
        rows = folder / "rows.parquet"
        run = PhaseRun(Phase(StageName.CURRICULUM, None, rows, folder, 3), config)
        mining.hardness(run, HardnessSource(None, 4, rows), start, measure)

    return work


def _row(name: str, order: int) -> GrpoRow:
    extra: Any = {"pair_id": name, "user_id": name, "order": order, "n_responses": 2, "explicit": "{}"}
    return {
        "data_source": "x",
        "prompt": [{"role": "user", "content": "Fix my report? " * 20}],
        "reward_model": {"style": "rule", "ground_truth": str(order)},
        "extra_info": extra,
    }


def sampled(folder: Path, size: int) -> Work:
    """An epoch of draws with observations, and a saved state."""

    def work() -> None:
        rng = np.random.default_rng(0)
        rates = rng.integers(0, 5, size) / 4
        facts = PairFacts((rates > 0.2) & (rates < 0.8), rates == 0, rng.integers(0, size // 8, size))
        sampler = CurriculumSampler(
            size, prompts_per_step=64, steps=size // 64, seed=0, schedule=Schedule("self_paced"), facts=facts
        )
        for step in range(1, size // 64 + 1):
            sampler.observe([(pair, 2, 4) for pair in sampler.next_batch(step)])
        sampler.load_state_dict(sampler.state_dict())

    return work


def sampler_set_up(folder: Path, size: int) -> Work:
    """Ten million pairs fit: set-up and one batch."""
    rng = np.random.default_rng(0)
    rates, users = rng.integers(0, 5, size) / 4, rng.integers(0, size // 8, size)

    def work() -> None:
        facts = PairFacts((rates > 0.2) & (rates < 0.8), rates == 0, users)
        CurriculumSampler(
            size, prompts_per_step=64, steps=100, seed=0, schedule=Schedule("linear"), facts=facts
        ).next_batch(1)

    return work


def scored(folder: Path, prompts: int, samples: int) -> Work:
    """Parse, verify, score and settle chains; metrics of a step and of a validation."""
    texts = Stub().texts

    def work() -> None:
        rows = [_row(f"p{n}", n % 2) for n in range(prompts)]
        groups = [ScoredGroup(_chains(row, samples, texts), n % 2) for n, row in enumerate(rows)]
        chain_metrics(groups)
        extras: list[RowExtra] = [row["extra_info"] for row in rows]
        validation_metrics([group.chains for group in groups], extras)

    return work


def scored_prompts(folder: Path, size: int) -> Work:
    return scored(folder, size, 8)


def scored_samples(folder: Path, size: int) -> Work:
    return scored(folder, 64, size)


def clustered(folder: Path, size: int) -> Work:
    """Clusters, refinement and files; the embedder is a stub."""
    config = settings(folder, "prototypes")

    def work() -> None:
        pairs = load_pairs(folder)
        sampler, texts = histories(config, pairs), Stub().texts
        train = prototypes.pairs_to_analyse(config.prototypes, pairs_of_split(pairs, "train"))
        chains = prototypes.ChainSet(
            [(pair, texts[zlib.crc32(pair.pair_id.encode()) % CHAINS]) for pair in train],
            {pair.pair_id: sampler(pair) for pair in train},
        )
        hashes = {"model": "m", "embedder": "e", "data": "d"}
        prototypes.run(config, StageFolder.read(folder, "prototypes"), chains, [], embed, hashes)

    return work


def neighbours(folder: Path, size: int) -> Work:
    """An index of `size` users, and 500 searches for 8 similar ones."""
    from pgenrm_train.prototypes.clusters import Prototypes, assign

    def work() -> None:
        members, centres = embed([f"u{n}" for n in range(size)]), embed([f"c{n}" for n in range(16)])
        users = np.char.add("u", np.arange(size).astype(str))
        index = Neighbourhood(Prototypes(centres, assign(centres, members), members, users))
        for number in range(500):
            index.nearest(members[number], users[number], 8)

    return work


def _candidate(config: Config) -> Candidate:
    return Candidate("stub", "stub", Stub, lambda: PromptWriter(config.model, tokenizer()), lambda: None)


def evaluated(folder: Path, size: int, samples: int = 1) -> Work:
    """Plan questions, parse, merge, measure, bootstrap, report; with baselines and ideal readers."""
    config = settings(folder, "evaluate")
    config.eval.ind = sorted({1, samples})
    candidate = _candidate(config)

    def work() -> None:
        out = StageFolder.read(folder, f"evaluate-{size}")
        out.path.mkdir()
        evaluation.evaluate(config, out, Tracker(config, "evaluate", out.path), [candidate])

    return work


def evaluated_samples(folder: Path, size: int) -> Work:
    return evaluated(folder, size, size)


def _player(config: Config, slates: Sequence[Any], pairs: Sequence[PreferencePair], out: Path) -> Player:
    ask = Evaluation(config, [], {}).asker(
        _candidate(config), out, lambda items, *_: items, "chains", "choose"
    )
    return Player(slates, shown_histories(config, slates, pairs), ask, None)


def labelled(folder: Path, size: int) -> Work:
    config = settings(folder, "label")

    def work() -> None:
        pairs, out = load_pairs(folder), folder / f"label-{size}"
        slates = slates_of(pairs_of_split(pairs, "test"))
        play = _player(config, slates, pairs, out)
        scores = circles([Slot(number, len(slate.responses)) for number, slate in enumerate(slates)], play)
        labels = label(slates, scores, play.chains(), votes_on(pairs), "ends")
        facts = LabelFacts("stub", "personaworld", "declared", "ends", 0.0, 1, 0, 1.0, 0)
        write_labels(LabelRun(facts, slates, scores, labels, play, {}, 200, 8), out)

    return work


def best_of_n(folder: Path, size: int) -> Work:
    config = settings(folder, "best_of_n")
    config.best_of_n.sizes, config.best_of_n.prompts = [2, 4], 0

    def work() -> None:
        pairs, out = load_pairs(folder), folder / f"best-{size}"
        slates = candidates_of(config, pairs)
        slots = [Slot(number, n) for number in range(len(slates)) for n in (2, 4)]
        play = _player(config, slates, pairs, out)
        values = values_of(config, slates, play.histories, pairs)
        scores, winners = circles(slots, play), knockouts(slots, play)
        facts = ChoiceFacts("stub", "personaworld", "test", "u", "p", "i", "declared", 1, 0, 1.0, 0)
        write_best_of_n(ChoiceRun(facts, scores, winners, values.by_slate, play, [], 200, 8), out)

    return work


def shared(folder: Path, size: int) -> Work:
    """Users who all vote on the same few contents: twins, hard negatives, other users' ratings."""

    def work() -> None:
        pairs = load_pairs(folder)
        disagreement_twins(pairs)
        hard_negatives(pairs, near=0.5)
        ratings = ratings_of(pairs)
        for slate in slates_of(pairs):
            others_mean(slate, ratings)

    return work
