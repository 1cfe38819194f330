"""Shape of a decoder-only transformer; from it follow parameters, and FLOPs and bytes of KV cache per token.

The shape alone is enough: a plan needs neither weights nor torch.  Llama, Qwen2 and Qwen3 differ in three
points: biases of q, k and v (Qwen2), norms of q and k (Qwen3), and whether input and output embeddings are
one matrix.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pgenrm_train.config import ROOT, Config, StageName
from pgenrm_train.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes as in a Hugging Face `config.json`."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.hidden * self.query_width + 2 * self.hidden * self.kv_width
        biases = self.query_width + 2 * self.kv_width if self.qkv_bias else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return attention + biases + 3 * self.hidden * self.intermediate + norms

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return embeddings + self.layers * self.layer_parameters + self.hidden

    def lora_parameters(self, rank: int, targets: list[str]) -> int:
        """r·(in + out) for each adapted matrix (Hu et al. 2021, §4.1)."""
        sizes = {
            "q_proj": (self.hidden, self.query_width), "k_proj": (self.hidden, self.kv_width),
            "v_proj": (self.hidden, self.kv_width), "o_proj": (self.query_width, self.hidden),
            "gate_proj": (self.hidden, self.intermediate), "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }  # fmt: skip
        return self.layers * sum(rank * sum(sizes[name]) for name in targets if name in sizes)

    def forward_flops(self, length: float) -> float:
        """FLOPs per token of the forward pass in a sequence of `length` tokens.

        2 per matrix weight, and attention over the tokens before.  PaLM (Chowdhery et al. 2022), appendix B:
        2N + 4·L·(heads·head_dim)·T; half of the T positions are visible on average.  The input embedding is a
        look-up and does no arithmetic.
        """
        matrices = self.parameters - (0 if self.tied else self.embedding_parameters)
        return 2.0 * matrices + 2.0 * self.layers * self.query_width * length

    def kv_bytes(self, dtype_bytes: int) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.layers * self.kv_width * dtype_bytes


# Public geometries of the shipped GPU models, from the config.json on the hub. A local copy (model.path)
# comes first.
KNOWN: dict[str, Geometry] = {
    "meta-llama/Llama-3.1-8B-Instruct": Geometry(32, 4096, 14336, 32, 8, 128, 128256, 131072),
    "meta-llama/Llama-3.1-70B-Instruct": Geometry(80, 8192, 28672, 64, 8, 128, 128256, 131072),
    "Qwen/Qwen3-8B": Geometry(36, 4096, 12288, 32, 8, 128, 151936, 40960, qk_norm=True),
}


def geometry_of(config: Config) -> Geometry:
    """Geometry of the model that the configuration trains.  Raises ConfigError if it is unknown."""
    model = config.model
    if model.kind in ("endpoint", "baseline"):
        raise ConfigError(
            f"model={model.kind} trains nothing, so there is no memory to plan; choose a model with weights"
        )
    for folder in (model.path, ROOT / config.psi.nano_start if config.psi.nano_start else None, model.name):
        if folder and (Path(folder) / "config.json").is_file():
            return read_geometry(Path(folder) / "config.json")
    if model.path:
        raise ConfigError(f"model.path={model.path} is not a checkpoint: it has no config.json")
    if model.kind == "nano":
        nano, base = model.nano, Path(config.run_dir) / StageName.BUILD_SEC / "base" / "config.json"
        return Geometry(
            nano.layers,
            nano.hidden,
            nano.intermediate,
            nano.heads,
            nano.heads,
            nano.hidden // nano.heads,
            # exact once the tokenizer is trained
            read_geometry(base).vocabulary if base.is_file() else nano.vocabulary,
            nano.positions,
            tied=nano.family == "qwen2",
            qkv_bias=nano.family == "qwen2",
        )
    return named_geometry(model.name, "model.name", "model.path")


def named_geometry(name: str, key: str, instead: str) -> Geometry:
    """Geometry of a known hub name or of a local folder."""
    if (Path(name) / "config.json").is_file():
        return read_geometry(Path(name) / "config.json")
    if name not in KNOWN:
        raise ConfigError(
            f"{key}={name} is not one of {', '.join(KNOWN)}; "
            f"give {instead}= a folder that holds its config.json to plan for it"
        )
    return KNOWN[name]


def read_geometry(file: Path) -> Geometry:
    """Read the `config.json` of a Llama, Mistral, Qwen2 or Qwen3.  ConfigError names file and field."""
    expected = "expected the config.json of a Llama- or Qwen-like model"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        kind = str(raw.get("model_type", ""))
        return Geometry(
            layers=int(raw["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(raw["intermediate_size"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            vocabulary=int(raw["vocab_size"]),
            positions=int(raw["max_position_embeddings"]),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=bool(raw.get("attention_bias", kind == "qwen2")),
            qk_norm=kind == "qwen3",
        )
    except KeyError as error:
        raise ConfigError(f"{file} has no field {error}; {expected}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); {expected}") from None
