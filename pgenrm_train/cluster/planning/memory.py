"""Memory of one process and its GPU by part, for the longest texts and a full micro-batch.

Ψ parameters, Ψ_t of them trained (all, or LoRA's), N processes, b bytes per element (2 in bf16, 4 on a
CPU), s tokens per micro-batch.

Model states of PSI on DeepSpeed (ZeRO: Rajbhandari et al. 2020, §3 and §5): weights b·Ψ, gradients
4·Ψ_t (summed over micro-batches in fp32; b·Ψ_t without ZeRO), optimizer 8·Ψ_t for Adam's two moments
and 4·Ψ_t more for fp32 master weights (bf16, or any ZeRO stage).  Stage 1 divides the optimizer by N,
stage 2 also the gradients, stage 3 also the weights.  Offloaded optimizers are in host memory, with 4
bytes per gradient.  Communication buckets are DeepSpeed's defaults: 5e8 elements to reduce, 5e8 to
gather, and under stage 3 up to 1e9 live parameters.

Model states of GRPO on veRL (FSDP2, PyTorch's fully_shard): fp32 weights, gradients and moments,
4·Ψ/N + 12·Ψ_t/N (veRL casts adapters to the type of their base, so a frozen base is fp32 too).  Layers
are gathered in bf16.  The reference model's shards stay in host memory (veRL offloads models that are never
trained).  Offloaded weights and moments leave the GPU while vLLM generates and return for the update.
With `mode=separate_async` N counts the actor's GPUs; vLLM's hold no actor, but the buckets of its weights.

Activations per token and layer follow Korthikanti et al. 2022 (§4.1), recounted for RMSNorm, SwiGLU,
grouped queries and attention without a stored T×T matrix:  2h(4 + 2b) of the two norms (an fp32 copy, the
normalised input, the output), b(q + k + v + out) of attention, 4·b·f of the MLP (gate, its activation, up,
their product).  `sdpa` repeats k and v to the width of q; `eager` adds heads·T probabilities.  With
checkpointing only each layer's input, b·h, stays, and one layer at a time is recomputed.

Logits: PSI computes them for the answer only, 12 bytes each at the peak of the backward pass (fp32
log-probabilities and two gradients).  A trained head adds its own gradient: one copy, or three if the loss
has several pieces.  veRL computes logits for every token: 4 bytes with FlashAttention's in-place
cross-entropy, 8 without, 16 in fp32; with LoRA in chunks.

Tokens of a micro-batch: `micro_batch_tokens` in packed rows of PSI and in GRPO without padding, else
`micro_batch_size` longest sequences.

vLLM (Kwon et al. 2023): weights over tensor-parallel GPUs, a profiled step, and KV cache in the rest of its
share.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from pgenrm_train.cluster.planning.geometry import Geometry, named_geometry
from pgenrm_train.cluster.sizes import PIECE
from pgenrm_train.config import (
    CHOOSING,
    GRPO_STAGES,
    CardConfig,
    Config,
    EndpointConfig,
    GrpoConfig,
    StageName,
    attention_of,
    places_of,
    served_judges,
    tokens_per_pass,
)
from pgenrm_train.config.grpo import VLLM_ALONE
from pgenrm_train.config.schema import FLASH
from pgenrm_train.config.setting import known
from pgenrm_train.errors import ConfigError

GIB = 2.0**30
BUCKET = 5e8  # elements: DeepSpeed's reduce_bucket_size and allgather_bucket_size
LIVE = 1e9  # elements: DeepSpeed's stage3_max_live_parameters
CONTEXT_GIB = 1.5  # CUDA context, NCCL and cuBLAS work spaces
WEIGHT_BUCKETS = 4.0  # GiB: two of veRL's update_weights_bucket_megabytes
VLLM_CONTEXT_GIB = 2.0  # and CUDA graphs
FRAGMENTATION = 0.05  # of activations and logits, lost in the caching allocator
ROOM = 0.8  # of a GPU that PSI may take under a ZeRO stage that the plan chooses
VLLM_SHARE = 0.92  # vLLM's own gpu_memory_utilization, if it has the GPU to itself
GENERATING = (StageName.PROTOTYPES, StageName.EVALUATE, *CHOOSING)
# Python, Ray and libraries of a stage's processes on a CPU.
CPU_PROCESSES_GIB = {StageName.PSI: 1.0} | dict.fromkeys(GRPO_STAGES, 5.5) | dict.fromkeys(GENERATING, 2.0)


@dataclass(frozen=True, slots=True)
class Phase:
    """One moment of a stage: GiB by part on the fullest GPU (on a CPU: of a process), against `available`."""

    stage: StageName
    name: str
    parts: Mapping[str, float]
    available: float
    host_parts: Mapping[str, float] = field(default_factory=dict)  # GiB of a node's memory
    notes: tuple[str, ...] = ()
    problem: str | None = None  # reason why it cannot run at all, whatever the sum is

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.problem is None and self.total <= self.available


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sizes of one micro-batch: all tokens, those with a row of logits, bytes per logit, longest sequence.

    `head_gradients`: copies of the head's gradient that the backward pass makes before it adds them.
    """

    tokens: int
    logits: int
    logit_bytes: int
    length: int
    head_gradients: int = 0


@dataclass(frozen=True, slots=True)
class Serving:
    """Share of a GPU's memory that vLLM uses, GPUs per replica, and the longest sequence."""

    utilization: float
    tensor_parallel: int
    length: int


def element_bytes(config: Config) -> int:
    return 4 if config.cluster.device == "cpu" or config.model.dtype == "float32" else 2


def card_name(config: Config) -> str:
    return "cpu" if config.cluster.device == "cpu" else config.plan.card


def card_of(config: Config) -> CardConfig:
    return config.plan.cards[card_name(config)]


def longest(config: Config) -> int:
    """Tokens of the longest prompt and answer."""
    return config.model.max_prompt_tokens + config.model.max_response_tokens


def grpo_of(config: Config, stage: StageName) -> GrpoConfig:
    """The section of CRE or of the curriculum."""
    return config.cre if stage == StageName.CRE else config.curriculum


def trained_parameters(config: Config, geometry: Geometry) -> int:
    lora = config.model.lora
    return geometry.lora_parameters(lora.rank, lora.target_modules) if lora.rank else geometry.parameters


def overhead(config: Config, stage: StageName) -> dict[str, float]:
    if config.cluster.device == "cpu":
        return {"Python and libraries": CPU_PROCESSES_GIB.get(stage, 1.0)}
    return {"CUDA context": CONTEXT_GIB}


# ---- activations ----


def layer_activations(geometry: Geometry, b: int, attention: str, length: int) -> float:
    """Bytes per token that one layer keeps for its backward pass."""
    h, q = geometry.hidden, geometry.query_width
    kv = geometry.kv_width if attention == "flash_attention_2" else q
    scores = geometry.heads * length * (4 if b == 4 else 6) if attention == "eager" else 0
    return 2 * h * (4 + 2 * b) + b * (2 * q + 2 * kv) + 4 * b * geometry.intermediate + scores


def activations(
    config: Config, geometry: Geometry, batch: MicroBatch, checkpointing: bool
) -> dict[str, float]:
    """GiB of activations and logits at the peak of one micro-batch."""
    b = element_bytes(config)
    attention = "sdpa" if config.cluster.device == "cpu" else attention_of(config)
    layer = batch.tokens * layer_activations(geometry, b, attention, batch.length)
    # gradients inside one layer
    working = batch.tokens * b * (3 * geometry.intermediate + 2 * geometry.hidden)
    logits = batch.logits * geometry.vocabulary * float(batch.logit_bytes)
    logits += float(batch.head_gradients) * b * geometry.vocabulary * geometry.hidden
    if checkpointing:
        kept = batch.tokens * b * geometry.hidden * geometry.layers
        # The loss is finished before the layers are recomputed: the larger of the two counts.
        within = {"logits": logits} if logits > layer + working else {"one layer": layer + working}
        parts = {"activations (checkpointed)": kept, **within}
    else:
        parts = {"activations": layer * geometry.layers, "logits": max(logits, working)}
    slack = 1.0 if config.cluster.device == "cpu" else 1.0 + FRAGMENTATION
    return _gib({name: size * slack for name, size in parts.items()})


def _gib(sizes: Mapping[str, float]) -> dict[str, float]:
    """Bytes → GiB."""
    return {name: size / GIB for name, size in sizes.items()}


# ---- PSI: DeepSpeed ----


def psi_phases(config: Config, geometry: Geometry) -> list[Phase]:
    """Forward and backward pass, and the optimizer's step, on one process."""
    chosen, config = config.cluster.zero_stage is None, with_zero_stage(config, geometry)
    states, host = zero_states(config, geometry)
    psi, length = config.psi, longest(config)
    if psi.packs(config.cluster.device):
        tokens = answers = max(psi.micro_batch_tokens, length)
        if psi.batch_size:
            # a row holds no more than a process's sequences of a step
            tokens = min(tokens, math.ceil(psi.batch_size / config.cluster.ranks) * length)
    else:
        tokens = math.ceil(psi.micro_batch_size * length / psi.sequence_parallel)
        answers = psi.micro_batch_size * (config.model.max_response_tokens + 1)
    rows = math.ceil(PIECE / geometry.vocabulary)  # of a piece
    # autograd sums the gradients of two pieces into a third tensor
    copies = 0 if config.model.lora.rank else 1 if min(tokens, answers) <= rows else 3
    batch = MicroBatch(tokens, min(tokens, answers, rows), 12, length, copies)
    acts, others = (
        activations(config, geometry, batch, checkpointing)
        for checkpointing in (psi.gradient_checkpointing, not psi.gradient_checkpointing)
    )
    note = (
        f"activations and logits take {sum(acts.values()):.2f} GiB, and {sum(others.values()):.2f} with "
        f"psi.gradient_checkpointing={str(not psi.gradient_checkpointing).lower()}"
    )
    stage = f"cluster.zero_stage=null is {config.cluster.zero_stage}: the lowest that takes at most "
    other = [f"{stage}{ROOM:.0%} of a GPU"] if chosen else _less_sharding(config, geometry)
    notes = (note, *other)
    step = dict(states)
    if config.cluster.zero_stage and not config.cluster.offload_optimizer:
        piece = trained_parameters(config, geometry) / config.cluster.ranks
        step["fp32 gradients"] = 4 * (min(piece, LIVE) if config.cluster.zero_stage == 3 else piece) / GIB
    base, memory = overhead(config, StageName.PSI), card_of(config).memory_gib
    return [
        Phase(StageName.PSI, "forward and backward", {**states, **acts, **base}, memory, host, notes),
        Phase(StageName.PSI, "optimizer step", {**step, **base}, memory, host),
    ]


def with_zero_stage(config: Config, geometry: Geometry) -> Config:
    """The configuration with PSI's ZeRO stage; null is the lowest under which PSI takes at most `ROOM`.

    Stage 1 reduces gradients once per step, 2 in each micro-batch, and 3 also gathers weights in each pass.
    A single GPU shards nothing and takes 2, with which optimizers can be offloaded.
    """
    cluster = config.cluster
    if cluster.zero_stage is not None:
        return config
    stages = (0,) if cluster.device == "cpu" else (1, 2, 3) if cluster.ranks > 1 else (2,)
    for stage in stages:
        tried = replace(config, cluster=replace(cluster, zero_stage=stage))
        if all(phase.total <= ROOM * phase.available for phase in psi_phases(tried, geometry)):
            break
    return tried


def _less_sharding(config: Config, geometry: Geometry) -> Iterator[str]:
    """A note if ZeRO 2 suffices where ZeRO 3 is set."""
    if config.cluster.zero_stage == 3:
        less = replace(config, cluster=replace(config.cluster, zero_stage=2))
        phases = psi_phases(less, geometry)
        if all(phase.fits for phase in phases):
            needed = max(phase.total for phase in phases)
            yield f"cluster.zero_stage=2 fits with {needed:.1f} GiB, and gathers no weights in each pass"


def zero_states(config: Config, geometry: Geometry) -> tuple[dict[str, float], dict[str, float]]:
    """(GiB on the GPU, GiB in host memory) of weights, gradients, optimizer and buckets under ZeRO."""
    b, n, cluster = element_bytes(config), config.cluster.ranks, config.cluster
    stage, parameters = known(cluster.zero_stage), geometry.parameters
    trained = trained_parameters(config, geometry)
    optimizer = trained * (12 if b == 2 or stage else 8) / (n if stage >= 1 else 1)
    gradients = trained * (4 if stage else b) / (n if stage >= 2 else 1)
    offloaded = cluster.offload_optimizer and stage >= 1
    parts = {
        "weights": parameters * b / (n if stage == 3 else 1),
        "gradients": 0.0 if offloaded and stage >= 2 else gradients,
        "optimizer": 0.0 if offloaded else optimizer,
    }
    if stage == 3:
        parts["gathered layers and buckets"] = b * (min(LIVE, parameters) + 2 * min(BUCKET, trained))
    elif stage:
        parts["buckets"] = b * 2 * min(BUCKET, trained)
    host = {"offloaded optimizer": cluster.processes_per_node * trained * 16 / n} if offloaded else {}
    return _gib({name: size for name, size in parts.items() if size}), _gib(host)


# ---- GRPO: veRL ----


def grpo_phases(config: Config, geometry: Geometry, stage: StageName) -> list[Phase]:
    """Rollout (vLLM next to the resident actor) and update (vLLM asleep), or each on GPUs of its own."""
    grpo, cpu = grpo_of(config, stage), config.cluster.device == "cpu"
    cluster = places_of(config, stage).actor.cluster
    n = cluster.ranks
    lora, trained, parameters = (
        config.model.lora.rank,
        trained_parameters(config, geometry),
        geometry.parameters,
    )
    weights = 4 * parameters / n
    states = {"actor weights": weights, "gradients": 4 * trained / n, "optimizer": 8 * trained / n}
    length = longest(config)
    tokens = tokens_per_pass(config, stage) or grpo.micro_batch_size * length
    logit_bytes = 16 if cpu else 4 if attention_of(config) == FLASH else 8
    batch = MicroBatch(tokens, tokens, logit_bytes, length)
    layers = 2 * geometry.layer_parameters + 2 * geometry.embedding_parameters
    gathered = float(element_bytes(config) * layers if n > 1 or not cpu else 0)
    update = {
        **_gib(states | {"gathered layers": gathered}),
        **activations(config, geometry, batch, checkpointing=not cpu),
        **overhead(config, stage),
    }
    memory = card_of(config).memory_gib
    if cpu:  # vLLM never sleeps on a CPU: its weights and cache stay
        resident = {"vLLM weights": 4 * parameters / GIB, "vLLM KV cache": 1.0}
        return [Phase(stage, "update", update | resident, memory)]
    local, offload = cluster.processes_per_node, cluster.offload_optimizer
    host = {
        "offloaded actor": local * (weights + states["optimizer"]) if offload else 0.0,
        "reference model": local * element_bytes(config) * parameters / n
        if grpo.kl_coefficient and not lora
        else 0.0,
    }
    kept = {} if offload else _gib({name: states[name] for name in ("actor weights", "optimizer")})
    serving = Serving(cluster.gpu_memory_utilization, cluster.tensor_parallel, length)
    if grpo.separate:
        update["buckets of weights"] = WEIGHT_BUCKETS
        serving, kept = replace(serving, utilization=VLLM_ALONE), {"buckets of weights": WEIGHT_BUCKETS}
    return [
        vllm_phase(config, geometry, stage, "rollout", serving, kept),
        Phase(stage, "update", update, memory, _gib({name: size for name, size in host.items() if size})),
    ]


# ---- vLLM ----


def vllm_parts(
    config: Config, geometry: Geometry, stage: StageName, utilization: float, tensor_parallel: int
) -> dict[str, float]:
    """GiB of one vLLM process by part; on a GPU the KV cache takes the rest of vLLM's share."""
    b = element_bytes(config)
    width = 2 * geometry.intermediate / tensor_parallel + 4 * geometry.hidden
    parts = _gib(
        {
            "vLLM weights": geometry.parameters * b / tensor_parallel,
            "vLLM step": 8192 * width * b + 256 * geometry.vocabulary * 8,
        }
    )
    if config.cluster.device == "cpu":
        return {**parts, "vLLM KV cache": 1.0, **overhead(config, stage)}
    parts["CUDA context and graphs"] = VLLM_CONTEXT_GIB
    free = utilization * card_of(config).memory_gib - sum(parts.values())
    return {**parts, "vLLM KV cache": max(0.0, free)}


def vllm_phase(
    config: Config,
    geometry: Geometry,
    stage: StageName,
    name: str,
    serving: Serving,
    resident: Mapping[str, float] | None = None,
) -> Phase:
    """vLLM on one GPU next to `resident` parts; its KV cache must hold at least one longest sequence."""
    parts = vllm_parts(config, geometry, stage, serving.utilization, serving.tensor_parallel)
    memory, length = card_of(config).memory_gib, serving.length
    if config.cluster.device == "cpu":
        return Phase(stage, name, parts, memory)
    per_token = kv_gib(geometry, element_bytes(config), serving.tensor_parallel)
    tokens = int(parts["vLLM KV cache"] / per_token)
    problem = (
        f"{stage}: vLLM's share of {serving.utilization:g} × {memory:g} GiB leaves room for {tokens:,} "
        "tokens of "
        f"KV cache, and one sequence may take {length:,}"
    )
    return Phase(
        stage,
        name,
        {**(resident or {}), **parts},
        memory,
        notes=(f"KV cache of {tokens:,} tokens, {tokens / length:.1f} sequences of the full {length:,}",),
        problem=problem if tokens < length else None,
    )


def kv_gib(geometry: Geometry, b: int, tensor_parallel: int) -> float:
    """KV cache per token on one GPU: heads are divided, and repeated if there are more GPUs than heads."""
    return geometry.kv_bytes(b) / min(tensor_parallel, geometry.kv_heads) / GIB


def served_phases(config: Config, section: str, settings: EndpointConfig, stage: StageName) -> list[Phase]:
    """The teacher or judge, if vLLM serves it here on GPUs of its own."""
    if settings.kind != "vllm" or config.cluster.device == "cpu":
        return []
    try:
        geometry = named_geometry(settings.name or "", f"{section}.name", f"{section}.name")
    except ConfigError as error:
        notes = (f"not planned: {error}",)
        return [Phase(stage, f"{section} (vLLM)", {}, card_of(config).memory_gib, notes=notes)]
    serving = Serving(VLLM_SHARE, settings.gpus, geometry.positions)
    phase = vllm_phase(config, geometry, stage, f"{section} (vLLM, {settings.gpus} GPUs)", serving)
    if geometry.heads % settings.gpus:
        problem = (
            f"{stage}: {section}.gpus={settings.gpus} does not divide its model's {geometry.heads} heads"
        )
        return [replace(phase, problem=problem)]
    return [phase]


def phases_of(config: Config, geometry: Geometry, stage: StageName) -> list[Phase]:
    """Every phase of a stage that holds a model."""
    if stage == StageName.BUILD_SEC:
        return served_phases(config, "teacher", config.teacher, stage)
    if stage == StageName.PSI:
        return psi_phases(config, geometry)
    if stage in GRPO_STAGES:
        judges = [
            phase
            for section, judge in served_judges(config, stage).items()
            for phase in served_phases(config, section, judge, stage)
        ]
        return grpo_phases(config, geometry, stage) + judges
    serving = Serving(VLLM_SHARE, config.cluster.tensor_parallel, longest(config))
    return [vllm_phase(config, geometry, stage, "generation", serving)] if stage in GENERATING else []
