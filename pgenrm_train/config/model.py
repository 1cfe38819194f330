"""Settings of the model: weights, prompt limits, adapters and the from-scratch nano."""

from dataclasses import dataclass
from enum import StrEnum

from pgenrm_train.config.endpoints import ApiConfig
from pgenrm_train.config.setting import setting

BASELINES = (
    "random",
    "longer",
    "shorter",
    "user_length",
    "majority",
    "features",
    "bradley_terry",
    "bradley_terry_user",
    "oracle",
    "ideal",
    "ideal_all_personas",
    "ideal_chain",
    "imitator",
)
EXACT = BASELINES[-5:]  # they know how PersonaWorld is generated
PERSONA_BASELINE = "synthesize_me"  # the model under test with published personas
PROMPTS = ("p_genrm", "judge", "judge_history", "persona")


class Totals(StrEnum):
    """Which totals of a chain count; see `chains.totals`."""

    DECLARED = "declared"
    VERIFIED = "verified"
    CODE = "code"


@dataclass
class NanoConfig:
    family: str = setting(
        "qwen2",
        "architecture; llama and qwen3 do not tie their embeddings",
        choices=("qwen2", "llama", "qwen3"),
    )
    layers: int = setting(3, "transformer layers", gt=0)
    hidden: int = setting(96, "width", gt=0)
    heads: int = setting(3, "attention heads; vLLM on CPUs needs hidden / heads of 32 or more")
    intermediate: int = setting(256, "width of the feed-forward layers")
    vocabulary: int = setting(4096, "tokens of the tokenizer")
    positions: int = setting(1024, "longest sequence")


@dataclass
class LoraConfig:
    rank: int = setting(0, "0: full-parameter training", ge=0)
    alpha: int = setting(32, "scale of the adapters", gt=0)
    dropout: float = setting(0.0, "dropout before the adapters", ge=0, lt=1)
    target_modules: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "layers that get adapters",
    )


@dataclass
class ModelConfig(ApiConfig):
    kind: str = setting(
        "nano",
        "where chains or scores come from",
        choices=("nano", "hf", "endpoint", "baseline", "reward_head", "callable"),
    )
    name: str = setting("nano", "hub id, served model name, baseline name or MODULE:FUNCTION")
    label: str = setting("nano", "short name for folders and tables")
    path: str | None = setting(None, "a local checkpoint; overrides the run folder's")
    prompt: str = setting(
        "p_genrm", "prompt of evaluate and score (prompts/styles.py); training needs p_genrm", choices=PROMPTS
    )
    persona_program: str | None = setting(
        None,
        "prompt=persona: JSON file of SynthesizeMe that writes the personas, e.g. its prompts/llama70b.json",
    )
    instructions: bool = setting(
        True, "system message with the task; nano learns the task from its chains instead"
    )
    totals: str | None = setting(
        None,
        "totals that count (docs/evaluation.md); null: as in the checkpoint's manifest, else "
        "declared, or code for a nano from scratch on PersonaWorld",
        choices=tuple(Totals),
    )
    max_prompt_tokens: int = setting(4096, "longest prompt; longer histories are cut to it", gt=0)
    max_text_tokens: int | None = setting(
        None, "longer queries and responses are cut to this and counted", ge=1
    )
    max_response_tokens: int = setting(8192, "longest chain", gt=0)
    dtype: str = setting("bfloat16", "type of the weights", choices=("bfloat16", "float32"))
    attention: str | None = setting(
        None,
        "null: flash_attention_2 in bf16 on GPUs where the package flash-attn is installed, else sdpa; with "
        "flash_attention_2 veRL packs without padding",
        choices=("sdpa", "flash_attention_2", "eager"),
    )
    lora: LoraConfig = setting(LoraConfig(), "low-rank adapters")
    nano: NanoConfig = setting(
        NanoConfig(), "the default, for CPUs: a Qwen2 of 0.4 M parameters with its own tokenizer"
    )

    @property
    def counted(self) -> Totals:
        """The kind of totals once `totals` is resolved (`stages.stage.with_totals`)."""
        return Totals(self.totals or Totals.DECLARED)
