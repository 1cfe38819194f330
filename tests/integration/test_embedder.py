"""Real sentence embeddings, offline: the packaged MiniLM."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pgenrm_train.backends.embedding import embedder
from pgenrm_train.backends.embedding.embedder import EmbedderWorkers, SentenceEmbedder
from pgenrm_train.config import load
from pgenrm_train.curriculum.hardness import cosines, similarity
from pgenrm_train.errors import ArtifactError, BackendError, PreflightError
from pgenrm_train.records.pairs import Message, PreferencePair

TEXTS = [
    "I prefer short answers with sources.",
    "Give me brief replies and cite them.",
    "Tell me long funny stories.",
]


@pytest.fixture(scope="module")
def minilm():
    return SentenceEmbedder("minilm", batch_size=16)


def test_rows_are_unit_float32_and_mean_something(minilm):
    vectors = minilm(TEXTS)
    assert vectors.shape == (3, 384)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1


def test_equal_texts_are_embedded_once_and_order_is_kept(minilm, monkeypatch):
    seen = []
    encode = minilm.encode
    monkeypatch.setattr(minilm, "encode", lambda texts: (seen.extend(texts), encode(texts))[1])
    vectors = minilm([TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]])
    assert seen == TEXTS[:2]
    assert np.array_equal(vectors[0], vectors[2])
    assert np.array_equal(vectors[0], vectors[3])
    assert vectors[1] == pytest.approx(minilm([TEXTS[1]])[0], abs=1e-5)


def test_no_texts_give_no_rows(minilm):
    assert minilm([]).shape == (0, 384)


def test_odd_texts_do_not_crash(minilm):
    assert np.isfinite(minilm(["", " ", "\x00", "é🙂" * 2000])).all()


def test_the_hub_is_not_asked_and_nothing_heavy_is_imported_before_use():
    code = (
        "import sys\n"
        "from pgenrm_train.backends.embedding.embedder import SentenceEmbedder\n"
        "e = SentenceEmbedder('minilm')\n"
        "assert not {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)\n"
        "assert e(['hello']).shape == (1, 384)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"},
    )


def test_cache_serves_a_second_run_without_the_model(minilm, tmp_path, monkeypatch):
    first = SentenceEmbedder("minilm", cache_dir=tmp_path)
    vectors = first(TEXTS[:2])
    again = SentenceEmbedder("minilm", cache_dir=tmp_path)
    assert np.array_equal(again(TEXTS[1::-1]), vectors[::-1])
    assert "_model" not in vars(again)
    again(TEXTS)
    assert np.array_equal(SentenceEmbedder("minilm", cache_dir=tmp_path)(TEXTS), again(TEXTS))
    assert [p.name for p in tmp_path.iterdir()] == [f"embeddings-{minilm.fingerprint[:16]}"]


def test_an_interrupted_start_embeds_only_what_is_left(minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(embedder, "BLOCK", 2)
    many = [f"text {n}" for n in range(7)]
    encode, seen = minilm.encode, []

    def interrupted(texts):
        seen.extend(texts)
        if len(seen) > 4:
            raise KeyboardInterrupt
        return encode(texts)

    broken, again = (SentenceEmbedder("minilm", cache_dir=tmp_path) for _ in range(2))
    monkeypatch.setattr(broken, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken(many)
    left: list[str] = []
    monkeypatch.setattr(again, "encode", lambda texts: (left.extend(texts), encode(texts))[1])
    assert again(many) == pytest.approx(minilm(many), abs=1e-5)
    assert left == many[4:]


def test_two_ray_actors_embed_what_one_process_does(minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(embedder, "BLOCK", 3)
    config = load("recipe=prototypes", "model=nano", "data=personaworld", "cluster.processes_per_node=2")
    many = [f"{text} {n}" for n in range(4) for text in TEXTS]
    shared = SentenceEmbedder(
        "minilm", cache_dir=tmp_path, shared=EmbedderWorkers(config, workers=2, least=len(many))
    )
    assert shared(many) == pytest.approx(minilm(many), abs=1e-5)
    assert "_model" not in vars(shared), "the actors hold the model"
    assert len(list(tmp_path.glob("*/part-*.npz"))) == 4
    few = SentenceEmbedder("minilm", shared=EmbedderWorkers(config, workers=2, least=len(many)))
    assert few(many[:-1]).shape == (11, 384) and "_model" in vars(few), (
        "a small set is not worth the start of Ray"
    )


def test_an_actor_that_cannot_load_the_model_ends_in_one_sentence(tmp_path):
    config = load("recipe=prototypes", "model=nano", "data=personaworld", "cluster.processes_per_node=2")
    (tmp_path / "model").mkdir()
    with pytest.raises(BackendError, match="an embedding worker failed"):
        SentenceEmbedder(str(tmp_path / "model"), shared=EmbedderWorkers(config, workers=2, least=1))(TEXTS)


def test_another_model_has_another_fingerprint_and_a_local_folder_works(minilm, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(minilm.folder, copy)
    local = SentenceEmbedder(str(copy))
    assert local.fingerprint == minilm.fingerprint
    assert local(TEXTS) == pytest.approx(minilm(TEXTS), abs=1e-6)
    (copy / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    assert SentenceEmbedder(str(copy)).fingerprint != minilm.fingerprint


def test_embeddings_measure_the_similarity_of_two_responses(minilm):
    """The curriculum's model-free signal: a paraphrase shares the meaning and few trigrams."""
    pairs = [PreferencePair("p", "u", (Message("user", "q"),), TEXTS[0], text) for text in TEXTS[1:]]
    paraphrase, other = cosines(pairs, minilm)
    assert paraphrase > other + 0.1
    assert similarity(TEXTS[0], TEXTS[1]) < 0.5 < paraphrase


def test_a_broken_cache_and_an_unknown_model_end_in_one_sentence(minilm, tmp_path, monkeypatch):
    cache = tmp_path / f"embeddings-{minilm.fingerprint[:16]}"
    cache.mkdir()
    (cache / "part-000000.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ArtifactError, match="delete it"):
        SentenceEmbedder("minilm", cache_dir=tmp_path)(TEXTS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PreflightError, match="no/such-model"):
        SentenceEmbedder("no/such-model")(TEXTS)
