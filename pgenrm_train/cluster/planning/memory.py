"""Memory of one process and its GPU by part, for the limits of the configuration (longest prompt and answer, full micro-batch).

Ψ parameters, Ψ_t of them trained (all, or LoRA's), N processes, b bytes an element (2 in bf16, 4 on a CPU), s tokens a micro-batch.

Model states of PSI on DeepSpeed (ZeRO: Rajbhandari et al. 2020, §3 and §5): weights b·Ψ, gradients b·Ψ_t, optimizer 8·Ψ_t for Adam's
two moments and 4·Ψ_t more for fp32 master weights (bf16, or any ZeRO stage).  Stage 1 divides the optimizer by N, stage 2 also
the gradients, stage 3 also the weights.  Offloaded optimizers live in host memory, with 4 bytes a gradient.  Communication buckets are
DeepSpeed's defaults: 5e8 elements to reduce, 5e8 to gather, and under stage 3 up to 1e9 live parameters.

Model states of GRPO on veRL (FSDP2, PyTorch's fully_shard): fp32 weights, gradients and moments, 16·Ψ/N; with LoRA a frozen bf16
base, 2·Ψ/N.  Layers are gathered in bf16.  The reference model's shards stay in host memory (veRL offloads what only goes forward).
Offloaded weights and moments leave the GPU while vLLM generates and are back during the update.

Activations a token and layer, after Korthikanti et al. 2022 (§4.1), counted anew for RMSNorm, SwiGLU, grouped queries and attention
that keeps no T×T matrix:  2h(4 + 2b) of the two norms (an fp32 copy, the normalised input, the output), b(q + k + v + out) of
attention, 4·b·f of the MLP (gate, its activation, up, their product).  `sdpa` repeats k and v to the width of q; `eager` adds
heads·T probabilities.  With checkpointing only each layer's input, b·h, stays, and one layer at a time is computed anew.

Logits: PSI makes them for the answer only, 12 bytes each at the peak of the backward pass (fp32 log-probabilities and two gradients);
veRL for every token, 4 with FlashAttention's in-place cross-entropy and 8 without, 16 in fp32.

vLLM (Kwon et al. 2023): weights over tensor-parallel GPUs, a profiled step, and KV cache in what is left of its share of the GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pgenrm_train.cluster.planning.geometry import Geometry, named_geometry
from pgenrm_train.cluster.sizes import PIECE
from pgenrm_train.config import Config, EndpointConfig, GrpoConfig
from pgenrm_train.errors import ConfigError

GIB = 2.0**30
BUCKET = 5e8  # elements: DeepSpeed's reduce_bucket_size and allgather_bucket_size
LIVE = 1e9  # elements: DeepSpeed's stage3_max_live_parameters
CONTEXT_GIB = 1.5  # CUDA context, NCCL and cuBLAS work spaces
VLLM_CONTEXT_GIB = 2.0  # and CUDA graphs
FRAGMENTATION = 0.05  # of activations and logits, lost in the caching allocator
VLLM_SHARE = 0.92  # vLLM's own gpu_memory_utilization, where it has the GPU to itself
CPU_PROCESSES_GIB = {
    "psi": 1.0,
    "cre": 5.5,
    "curriculum": 5.5,
    "evaluate": 2.0,
    "prototypes": 2.0,
}  # Python, Ray, libraries


@dataclass(frozen=True, slots=True)
class Phase:
    """One moment of a stage: GiB by part on the fullest GPU (on a CPU: of a process), against what there is."""

    stage: str
    name: str
    parts: dict[str, float]
    available: float
    host_parts: dict[str, float] = field(default_factory=dict)  # GiB of a node's memory
    notes: tuple[str, ...] = ()
    problem: str | None = None  # why it cannot run at all, whatever the sum says

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.problem is None and self.total <= self.available


def element_bytes(config: Config) -> int:
    return 4 if config.cluster.device == "cpu" or config.model.dtype == "float32" else 2


def available_gib(config: Config) -> float:
    return config.plan.cards["cpu" if config.cluster.device == "cpu" else config.plan.card].memory_gib


def ranks_of(config: Config) -> int:
    return config.cluster.nodes * config.cluster.processes_per_node


def trained_parameters(config: Config, geometry: Geometry) -> int:
    lora = config.model.lora
    return geometry.lora_parameters(lora.rank, lora.target_modules) if lora.rank else geometry.parameters


def overhead(config: Config, stage: str) -> dict[str, float]:
    if config.cluster.device == "cpu":
        return {"Python and libraries": CPU_PROCESSES_GIB.get(stage, 1.0)}
    return {"CUDA context": CONTEXT_GIB}


# ---- activations ----


def layer_activations(geometry: Geometry, b: int, attention: str, length: int) -> float:
    """Bytes a token that one layer keeps for its backward pass."""
    h, q = geometry.hidden, geometry.query_width
    kv = geometry.kv_width if attention == "flash_attention_2" else q
    scores = geometry.heads * length * (4 if b == 4 else 6) if attention == "eager" else 0
    return 2 * h * (4 + 2 * b) + b * (2 * q + 2 * kv) + 4 * b * geometry.intermediate + scores


def activations(
    config: Config,
    geometry: Geometry,
    tokens: int,
    logits: int,
    loss_bytes: int,
    length: int,
    checkpointing: bool,
) -> dict[str, float]:
    """GiB of activations and logits at the peak of one micro-batch; tokens: all of it, logits: those with a row of logits."""
    b = element_bytes(config)
    attention = "sdpa" if config.cluster.device == "cpu" else config.model.attention
    layer = tokens * layer_activations(geometry, b, attention, length)
    working = tokens * b * (3 * geometry.intermediate + 2 * geometry.hidden)  # gradients inside one layer
    vocabulary = logits * geometry.vocabulary * float(loss_bytes)
    if (
        checkpointing
    ):  # the loss is done with before the layers are computed anew: the larger of the two counts
        kept = tokens * b * geometry.hidden * geometry.layers
        within = {"logits": vocabulary} if vocabulary > layer + working else {"one layer": layer + working}
        parts = {"activations (checkpointed)": kept, **within}
    else:
        parts = {"activations": layer * geometry.layers, "logits": max(vocabulary, working)}
    slack = 1.0 if config.cluster.device == "cpu" else 1.0 + FRAGMENTATION
    return {name: size * slack / GIB for name, size in parts.items()}


# ---- PSI: DeepSpeed ----


def psi_phases(config: Config, geometry: Geometry) -> list[Phase]:
    """Forward and backward pass, and the optimizer's step, on one process."""
    states, host = zero_states(config, geometry)
    n, psi, model = ranks_of(config), config.psi, config.model
    length = model.max_prompt_tokens + model.max_response_tokens
    tokens = math.ceil(psi.micro_batch_size * length / psi.sequence_parallel)
    trained_tokens = min(
        tokens, psi.micro_batch_size * (model.max_response_tokens + 1), math.ceil(PIECE / geometry.vocabulary)
    )
    acts, others = (
        activations(config, geometry, tokens, trained_tokens, 12, length, checkpointing)
        for checkpointing in (psi.gradient_checkpointing, not psi.gradient_checkpointing)
    )
    note = (
        f"activations and logits take {sum(acts.values()):.2f} GiB, and {sum(others.values()):.2f} with "
        f"psi.gradient_checkpointing={str(not psi.gradient_checkpointing).lower()}"
    )
    share, trained = available_gib(config), trained_parameters(config, geometry)
    step = dict(states)
    if config.cluster.zero_stage and not config.cluster.offload_optimizer:
        piece = trained / n
        step["fp32 gradients"] = 4 * (min(piece, LIVE) if config.cluster.zero_stage == 3 else piece) / GIB
    base = overhead(config, "psi")
    return [
        Phase("psi", "forward and backward", {**states, **acts, **base}, share, host, (note,)),
        Phase("psi", "optimizer step", {**step, **base}, share, host),
    ]


def zero_states(config: Config, geometry: Geometry) -> tuple[dict[str, float], dict[str, float]]:
    """(GiB on the GPU, GiB in a node's host memory) of weights, gradients, optimizer and buckets under ZeRO."""
    b, n, cluster = element_bytes(config), ranks_of(config), config.cluster
    stage, offload, local = cluster.zero_stage, cluster.offload_optimizer, cluster.processes_per_node
    whole, trained = geometry.parameters, trained_parameters(config, geometry)
    optimizer = trained * (12 if b == 2 or stage else 8) / (n if stage >= 1 else 1)
    gradients = trained * b / (n if stage >= 2 else 1)
    offloaded = offload and stage >= 1
    parts = {
        "weights": whole * b / (n if stage == 3 else 1),
        "gradients": 0.0 if offloaded and stage >= 2 else gradients,
        "optimizer": 0.0 if offloaded else optimizer,
    }
    if stage == 3:
        parts["gathered layers and buckets"] = b * (min(LIVE, whole) + 2 * min(BUCKET, trained))
    elif stage:
        parts["buckets"] = b * 2 * min(BUCKET, trained)
    host = {"offloaded optimizer": local * trained * 16 / n} if offloaded else {}
    return {k: v / GIB for k, v in parts.items() if v}, {k: v / GIB for k, v in host.items()}


# ---- GRPO: veRL ----


def grpo_phases(config: Config, geometry: Geometry, section: str) -> list[Phase]:
    """Rollout (vLLM beside the resident actor) and update (vLLM asleep)."""
    grpo: GrpoConfig = getattr(config, section)
    cpu, n, model = config.cluster.device == "cpu", ranks_of(config), config.model
    lora, trained, whole = bool(model.lora.rank), trained_parameters(config, geometry), geometry.parameters
    weights = (2 * whole if lora and not cpu else 4 * whole) / n
    states = {"actor weights": weights, "gradients": 4 * trained / n, "optimizer": 8 * trained / n}
    length = model.max_prompt_tokens + model.max_response_tokens
    tokens = grpo.micro_batch_size * length
    loss_bytes = 16 if cpu else 4 if model.attention == "flash_attention_2" else 8
    acts = activations(config, geometry, tokens, tokens, loss_bytes, length, checkpointing=not cpu)
    b = element_bytes(config)
    gathered = (
        b * (2 * geometry.layer_parameters + 2 * geometry.embedding_parameters) if n > 1 or not cpu else 0
    )
    update = (
        {k: v / GIB for k, v in (states | {"gathered layers": float(gathered)}).items()}
        | acts
        | overhead(config, section)
    )
    host = {}
    if not cpu:
        local = config.cluster.processes_per_node
        offloaded = weights + states["optimizer"] if config.cluster.offload_optimizer else 0.0
        reference = 4 * whole / n if grpo.kl_coefficient and not lora else 0.0
        host = {"offloaded actor": local * offloaded / GIB, "reference model": local * reference / GIB}
    phases = [Phase(section, "update", update, available_gib(config), {k: v for k, v in host.items() if v})]
    if cpu:  # vLLM sleeps on no CPU: its weights and cache stay
        resident = {"vLLM weights": 4 * whole / GIB, "vLLM KV cache": 1.0}
        return [Phase(section, "update", phases[0].parts | resident, available_gib(config))]
    kept = (
        {}
        if config.cluster.offload_optimizer
        else {k: states[k] / GIB for k in ("actor weights", "optimizer")}
    )
    served = vllm_phase(config, geometry, section, "rollout", config.cluster.gpu_memory_utilization,
                        config.cluster.tensor_parallel, length, kept)  # fmt: skip
    return [served, *phases]


# ---- vLLM ----


def vllm_phase(
    config: Config, geometry: Geometry, stage: str, name: str, utilization: float, tensor_parallel: int, length: int,
    beside: dict[str, float] | None = None,
) -> Phase:  # fmt: skip
    """vLLM on one GPU; what is left of its share holds the KV cache, which must hold at least one sequence of `length` tokens."""
    b, available = element_bytes(config), available_gib(config)
    sizes = {
        "vLLM weights": geometry.parameters * b / tensor_parallel,
        "vLLM step": (8192 * (2 * geometry.intermediate / tensor_parallel + 4 * geometry.hidden) * b
                      + 256 * geometry.vocabulary * 8),
    }  # fmt: skip
    parts = {k: v / GIB for k, v in sizes.items()}
    if config.cluster.device == "cpu":
        return Phase(stage, name, {**parts, "vLLM KV cache": 1.0, **overhead(config, stage)}, available)
    parts["CUDA context and graphs"] = VLLM_CONTEXT_GIB
    cache = max(0.0, utilization * available - sum(parts.values()))
    per_token = kv_gib(geometry, b, tensor_parallel)
    held = int(cache / per_token)
    problem = None
    if held < length:
        problem = (
            f"{stage}: vLLM's share of {utilization:g} × {available:g} GiB leaves room for {held:,} tokens of KV cache, and one "
            f"sequence may take {length:,}"
        )
    note = f"KV cache of {held:,} tokens, {held / length:.1f} sequences of the full {length:,}"
    return Phase(
        stage,
        name,
        {**(beside or {}), **parts, "vLLM KV cache": cache},
        available,
        notes=(note,),
        problem=problem,
    )


def kv_gib(geometry: Geometry, b: int, tensor_parallel: int) -> float:
    """KV cache of a token on one GPU: heads are divided, and repeated where there are more GPUs than heads."""
    return geometry.kv_bytes(b) / min(tensor_parallel, geometry.kv_heads) / GIB


def served_phase(config: Config, section: str, stage: str) -> Phase | None:
    """The teacher or judge that vLLM serves here, on GPUs of its own; None where there is none."""
    settings: EndpointConfig = getattr(config, section)
    if settings.kind != "vllm" or config.cluster.device == "cpu":
        return None
    try:
        geometry = named_geometry(settings.name or "", f"{section}.name", f"{section}.name")
    except ConfigError as error:
        return Phase(stage, f"{section} (vLLM)", {}, available_gib(config), notes=(f"not planned: {error}",))
    return vllm_phase(
        config,
        geometry,
        stage,
        f"{section} (vLLM, {settings.gpus} GPUs)",
        VLLM_SHARE,
        settings.gpus,
        geometry.positions,
    )


def phases_of(config: Config, geometry: Geometry, stage: str) -> list[Phase]:
    """Every phase of a stage that holds a model."""
    if stage == "build_sec":
        return [phase for phase in [served_phase(config, "teacher", stage)] if phase]
    if stage == "psi":
        return psi_phases(config, geometry)
    if stage in ("cre", "curriculum"):
        judge = served_phase(config, "judge", stage) if getattr(config, stage).process_weight else None
        return grpo_phases(config, geometry, stage) + ([judge] if judge else [])
    if stage in ("prototypes", "evaluate"):
        length = config.model.max_prompt_tokens + config.model.max_response_tokens
        return [
            vllm_phase(
                config, geometry, stage, "generation", VLLM_SHARE, config.cluster.tensor_parallel, length
            )
        ]
    return []
