"""The prototypes stage on PersonaWorld with the oracle's chains: embedding, recovery and cards."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import HashingVectorizer

from data_builders.sources.personaworld import build
from data_builders.teachers.oracle import OracleTeacher
from eval.report.figures import prototype_curves, prototype_folder, prototype_map, prototype_sections
from eval.report.report import Report, write_report
from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import Config
from pgenrm_train.errors import ArtifactError, ConfigError, DataError
from pgenrm_train.prompts.masking import present
from pgenrm_train.prompts.writer import histories, pairs_of_split
from pgenrm_train.prototypes import clusters as core
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.stages import prototypes
from pgenrm_train.stages.prototypes import ChainSet, prototype_of_users, remarks, reopen_damaged

HASHES = {"model": "m", "embedder": "e", "data": "d"}


class Words:
    """Bags of words, hashed: the same text gives the same vector, and texts with the same words are near."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts):
        self.texts += texts
        return (
            HashingVectorizer(n_features=96, norm="l2", ngram_range=(1, 2))
            .transform(texts)
            .toarray()
            .astype(np.float32)
        )


@pytest.fixture(scope="module")
def world():
    config = Config(recipe="prototypes")
    config.data.users, config.data.heldout_users = 90, 80
    config.data.history_policy, config.data.history_kind = "same_scenario", "medium"
    config.prototypes.k, config.prototypes.analyses_per_user, config.prototypes.refine_epochs = 12, 3, 3
    pairs = list(build(config.data, 0))
    sampler, teacher = histories(config, pairs), OracleTeacher(0)

    def chains(chosen, size=3):
        shown = {p.pair_id: sampler(p, size) for p in chosen}
        return [(p, teacher.write(present(p, shown[p.pair_id], 0))) for p in chosen], shown

    train = prototypes.pairs_to_analyse(config.prototypes, pairs_of_split(pairs, "train"))
    newcomers = pairs_of_split(pairs, "val")
    return config, chains(train), [chains(newcomers, size) for size in range(4)]


def made(world, folder, embed=None, **settings):
    config, (chains, shown), newcomers = world
    for name, value in settings.items():
        setattr(config.prototypes, name, value)
    stage = StageFolder.read(folder, "prototypes")
    stage.begin(config={}, settings={}, inputs={}, seed=0)
    later = [ChainSet(*known) for known in newcomers]
    facts = prototypes.run(config, stage, ChainSet(chains, shown), later, embed or Words(), HASHES)
    stage.finish(**facts)
    return stage, facts


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return made(world, tmp_path_factory.mktemp("run"))


def test_latent_prototypes_are_recovered_where_analyses_are_right(run):
    _, facts = run
    assert facts["k"] == 12 and facts["users"] == 90 and facts["analyses"] == 270
    assert facts["recovery"] >= 0.6


def test_fewer_distinct_preferences_than_prototypes_are_reported(world, tmp_path):
    config, (chains, shown), _ = world
    first = [(pair, chains[0][1]) for pair, _ in chains]
    stage = StageFolder.read(tmp_path, "prototypes")
    stage.begin(config={}, settings={}, inputs={}, seed=0)
    facts = prototypes.run(config, stage, ChainSet(first, shown), [], Words(), HASHES)
    assert facts["k"] == 1
    assert (
        next(remarks(config.prototypes, facts))
        == "prototypes.k=12, but the 270 analyses hold only 1 distinct preferences"
    )
    assert list(remarks(config.prototypes, facts | {"k": 12, "recovery": None})) == []


def test_most_analyses_of_a_user_outvote_a_mistaken_one(world):
    _, (chains, _), _ = world
    pairs = [p for p, _ in chains]
    descriptions = sorted({f"{p.explicit.self_description}/{p.scenario}" for p in pairs})
    right = np.array([descriptions.index(f"{p.explicit.self_description}/{p.scenario}") for p in pairs])
    wrong = (right + 1) % len(descriptions)
    alone = prototypes.recovery(pairs, right)
    assert alone == {"recovery": 1.0, "recovery_of_users": 1.0}
    outvoted = prototypes.recovery(pairs * 3, np.concatenate([right, right, wrong]))
    assert outvoted["recovery"] < 0.7 and outvoted["recovery_of_users"] == 1.0
    unsaid = dataclasses.replace(
        pairs[0], explicit=dataclasses.replace(pairs[0].explicit, self_description=None)
    )
    assert prototypes.recovery([unsaid, *pairs], np.append(right, 0)) == {
        "recovery": None,
        "recovery_of_users": None,
    }


def test_refinement_is_reported_against_the_unrefined_centroids(run):
    metrics = run[1]["refinement"]
    assert metrics["holdout_users"] == 9 and metrics["loss"] == sorted(metrics["loss"], reverse=True)
    assert metrics["train_accuracy"] > metrics["train_accuracy_centroids"]
    assert metrics["holdout_pairs"] == 27 and all(
        0 <= metrics[f"holdout_accuracy{x}"] <= 1 for x in ("", "_centroids")
    )


def test_users_of_a_finished_run_have_the_prototype_of_most_of_their_analyses(tmp_path):
    folder = StageFolder(tmp_path / "prototypes", "prototypes")
    folder.path.mkdir()
    rows = [("ann", 2), ("ann", 0), ("ann", 2), ("bob", 1)]
    pd.DataFrame(rows, columns=["user_id", "prototype"]).to_parquet(folder.path / "analyses.parquet")
    with pytest.raises(ArtifactError, match=r"curriculum\.prototypes=.* holds no finished prototypes"):
        prototype_of_users(folder.path)
    folder.manifest.status = "complete"
    folder.save()
    assert prototype_of_users(folder.path) == {"ann": 2, "bob": 1}


def test_scores_and_recitals_of_the_history_are_never_embedded(world, tmp_path):
    embed = Words()
    made(world, tmp_path, embed)
    analyses = embed.texts[:270]
    assert all(text.startswith("This ") and "wants" in text for text in analyses)
    assert not any("Pair 1" in t or "JSON" in t or "%" in t or "response_1" in t for t in analyses)


@pytest.mark.parametrize(
    ("analysis", "text"),
    [
        ("Pair 1: formal warm. Pair 2: nothing. This buddy wants brisk.", "This buddy wants brisk."),
        ("Pair 1: formal warm.\nThey like jokes.", "They like jokes."),
        ("Pair 1: formal warm.", "Pair 1: formal warm."),
        ("A careful reader. In pair 2 they chose depth.", "A careful reader. In pair 2 they chose depth."),
        ("Pair 12: a", "Pair 12: a"),
    ],
)
def test_what_is_embedded_of_an_analysis(analysis, text):
    assert core.preference_text(analysis) == text


def test_cards_describe_their_prototype(run):
    stage, _ = run
    cards = json.loads((stage.path / "cards.json").read_text())
    assert len(cards) == 12 and sum(c["analyses"] for c in cards) == 270
    assert [c["analyses"] for c in cards] == sorted((c["analyses"] for c in cards), reverse=True)
    table = pd.read_parquet(stage.path / "analyses.parquet").set_index("row")
    refined = core.load(stage.path, HASHES)
    for card in cards:
        members = table[table["prototype"] == card["prototype"]]
        assert (
            card["users"] == members["user_id"].nunique()
            and card["typical"]
            and 0 < max(card["criteria"].values()) <= 100
        )
        distance = np.linalg.norm(refined.embeddings[members.index] - refined.A[card["prototype"]], axis=1)
        assert card["nearest"]["analysis"] == members["analysis"].iloc[distance.argmin()]
        assert card["farthest"]["analysis"] == members["analysis"].iloc[distance.argmax()]


def test_newcomers_are_assigned_from_what_is_known_of_them(run):
    _, facts = run
    assert [p["history_pairs"] for p in facts["cold_start"]] == [0, 1, 2, 3]
    for point in facts["cold_start"]:
        assert point["pairs"] > 50 and point["users"] == 20 and point["failures"] == {}
        for name in ("accuracy", "without prototypes accuracy"):
            low, high = point[f"{name} ci95"]
            assert 0 <= low <= point[name] <= high <= 1
        assert point["difference"] == pytest.approx(point["accuracy"] - point["without prototypes accuracy"])


def test_a_newcomer_whose_chain_cannot_be_read_is_everyone(world, tmp_path):
    config, train, newcomers = world
    silent = [([(p, None) for p, _ in chains], shown) for chains, shown in newcomers[:1]]
    _, facts = made((config, train, silent), tmp_path)
    point = facts["cold_start"][0]
    assert point["failures"] == {"no_text": point["pairs"]} and point["difference"] == 0.0


def test_k_follows_the_singular_values_when_asked(world, tmp_path):
    stage, facts = made(world, tmp_path, k="auto", retained_mass=0.5)
    world[0].prototypes.k = 12
    curve = json.loads((stage.path / "singular_values.json").read_text())["retained_mass"]
    assert (
        facts["k"]
        == facts["k_suggested_by_singular_values"]
        == next(i for i, x in enumerate(curve, 1) if x >= 0.5)
    )


def test_chains_that_cannot_be_read_are_counted(world, tmp_path):
    config, (chains, shown), _ = world
    mixed = [(p, None if i < 5 else "no chain" if i < 8 else text) for i, (p, text) in enumerate(chains)]
    _, facts = made((config, (mixed, shown), []), tmp_path)
    assert facts["failures"] == {"no_text": 5, "parse:no_markers": 3} and facts["analyses"] == 262
    with pytest.raises(DataError, match="none of 270 chains"):
        made((config, ([(p, None) for p, _ in chains], shown), []), tmp_path / "none")


def test_words_of_users_are_shown_and_never_interpreted(world, tmp_path):
    config, (chains, shown), _ = world
    evil = write_chain("<script>alert(1)</script> | [x](y)", [("<b>evil</b>", 100)], [[9], [2]])
    stage, _ = made(
        (config, ([(p, evil if i % 2 else text) for i, (p, text) in enumerate(chains)], shown), []), tmp_path
    )
    folder = prototype_folder(tmp_path)
    report = Report(
        "t",
        sections=prototype_sections(folder),
        curves=prototype_curves(folder),
        drawings=[prototype_map(folder)],
    )
    write_report(tmp_path / "report.html", report)
    html, markdown = (tmp_path / "report.html").read_text(), (stage.path / "cards.md").read_text()
    assert "&lt;script&gt;alert(1)" in html and "<script>alert" not in html and "<b>evil" not in html
    assert "<script>" not in markdown and r"\<b\>evil" in markdown


def test_a_report_shows_prototypes_only_where_there_are_some(run, tmp_path):
    stage, _ = run
    folder = prototype_folder(stage.path.parent)
    assert [s.title for s in prototype_sections(folder)] == [
        "User prototypes",
        "Prototype cards",
        "New users",
    ]
    assert len(prototype_curves(folder)) == 3 and "<svg" in prototype_map(folder)[1]
    assert prototype_folder(tmp_path) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("k", 0),
        ("k", "many"),
        ("k", 2.5),
        ("retained_mass", 0),
        ("retained_mass", 1.1),
        ("analyses_per_user", 0),
        ("max_users", 0),
    ],
)
def test_settings_out_of_range_are_refused(key, value):
    from pgenrm_train.config import check

    config = Config(recipe="prototypes")
    config.teacher.kind = "features"
    setattr(config.prototypes, key, value)
    with pytest.raises(ConfigError, match=rf"prototypes\.{key}="):
        check(config)


def test_queries_and_index_hold_the_same_kind_of_text_and_neighbours_are_others(world, tmp_path, monkeypatch):
    """Similar users are found by the conclusion of the analysis, among other users of the training split."""
    import recipes.wiring.similar_users
    from pgenrm_train.errors import ArtifactError
    from pgenrm_train.files import write_table
    from pgenrm_train.prompts.writer import PAIRS
    from pgenrm_train.records.rows import pair_to_row
    from recipes.wiring.similar_users import find_random, find_similar

    config, (chains, shown), _ = world
    config.run_dir = str(tmp_path)
    pairs = list(build(config.data, 0))
    data = StageFolder.read(tmp_path, "build_data")
    data.begin(config={}, settings={}, inputs={}, seed=0)
    write_table(data.path / PAIRS, [pair_to_row(p) for p in pairs])
    data.finish(sha256="d")
    embed = Words()
    embed.fingerprint = "e"
    monkeypatch.setattr(recipes.wiring.similar_users, "make_embedder", lambda _: embed)
    stage, _ = made((config, (chains, shown), []), tmp_path, embed)
    indexed, embed.texts = embed.texts[: len(chains)], []

    find = find_similar(config, pairs)
    table = pd.read_parquet(stage.path / "analyses.parquet").sort_values("row")
    found = find(table["analysis"].tolist(), table["user_id"].tolist(), 4)
    assert embed.texts == indexed, "the same text, whichever side it is on"
    for user, similar in zip(table["user_id"], found):
        names = [one.user_id for one in similar]
        assert len(set(names)) == 4 and user not in names and all(name.startswith("train-") for name in names)
    written_from = {(p.user_id, shown[p.pair_id]) for p, _ in chains}
    assert all((one.user_id, one.history) in written_from for similar in found for one in similar)

    by_lot = find_random(config, pairs)(table["analysis"].tolist(), table["user_id"].tolist(), 4)
    for user, others in zip(table["user_id"], by_lot):
        names = [one.user_id for one in others]
        assert len(set(names)) == 4 and user not in names
        assert all((one.user_id, one.history) in written_from for one in others)
    assert len({one.user_id for others in by_lot for one in others}) > 4, "by lot, not always the same users"

    embed.fingerprint = "another"
    with pytest.raises(ArtifactError, match="another embedder"):
        find_similar(config, pairs)
    embed.fingerprint = "e"
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "model.safetensors").write_bytes(b"weights")
    config.model.path = str(tmp_path / "trained")
    with pytest.raises(ArtifactError, match="another model: m there, "):
        find_similar(config, pairs)
    config.model.path = None


def test_the_recipe_closes_the_engine_before_it_embeds_and_every_chain_reaches_the_matrix(
    tmp_path, monkeypatch
):
    """On one GPU the engine's cache leaves no room for the embedder; every sampled chain is clustered."""
    import recipes.prototypes
    import recipes.wiring.analyses
    from pgenrm_train.backends.protocols import Generation
    from pgenrm_train.config import ROOT, load
    from pgenrm_train.files import write_table
    from pgenrm_train.prompts.writer import PAIRS
    from pgenrm_train.records.rows import pair_to_row

    overrides = ("data.users=6", "data.heldout_users=4", "prototypes.k=3", "prototypes.refine_epochs=1")
    config = load("recipe=prototypes", "model=nano", "data=personaworld", f"run_dir={tmp_path}", *overrides)
    pairs = list(build(config.data, 0))
    data = StageFolder.read(tmp_path, "build_data")
    data.begin(config={}, settings={}, inputs={}, seed=0)
    write_table(data.path / PAIRS, [pair_to_row(p) for p in pairs])
    data.finish(sha256="d")
    events: list[str] = []

    class Engine:
        def __call__(self, requests, *, temperature):
            for n, request in enumerate(requests):
                yield Generation(
                    request.key, 0, write_chain(f"This one wants {n}.", [("taste", 100)], [[9], [2]])
                )

        def close(self):
            events.append("closed")

    class Embedder(Words):
        fingerprint = "e"

        def __call__(self, texts):
            events.append("embeds")
            return super().__call__(texts)

    @contextlib.contextmanager
    def engines(_):
        yield lambda checkpoint: Engine()
        events.append("ended")

    monkeypatch.setattr(recipes.wiring.analyses, "local_engines", engines)
    monkeypatch.setattr(recipes.prototypes, "make_embedder", lambda *_, **__: Embedder())
    stage = StageFolder.read(tmp_path, "prototypes")
    stage.begin(config={}, settings={}, inputs={}, seed=0)
    facts = recipes.prototypes.make(config, stage, ROOT / "tests" / "data" / "psi_nano")
    assert (
        events.index("closed") < events.index("ended") < events.index("embeds")
        and events.count("closed") == 1
    )
    asked_for = prototypes.pairs_to_analyse(config.prototypes, pairs_of_split(pairs, "train"))
    assert facts["analyses"] == len(asked_for) > 0 and facts["failures"] == {}
    assert (
        len(core.load(stage.path).labels)
        == len(pd.read_parquet(stage.path / "analyses.parquet"))
        == len(asked_for)
    )


def test_damaged_prototypes_are_rebuilt(world, tmp_path, capsys):
    stage, _ = made(world, tmp_path)
    capsys.readouterr()
    reopen_damaged(stage)
    assert stage.complete and capsys.readouterr().out == ""
    tensors = stage.path / "prototypes.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    reopen_damaged(stage)
    assert not StageFolder.read(tmp_path, "prototypes").complete
    assert "missing or damaged; they are rebuilt" in capsys.readouterr().out


def test_large_sets_are_refined_by_all_processes_of_the_node():
    from pgenrm_train.prototypes.refinement import refine
    from recipes.wiring.models import LARGE, refiner

    config = Config(recipe="prototypes")
    config.cluster.processes_per_node = 4
    assert refiner(config, LARGE - 1) is refine and refiner(config, LARGE).keywords == {"processes": 4}
    config.cluster.processes_per_node = 1
    assert refiner(config, LARGE) is refine
