"""Rules that span several keys; the constraints of single keys are on their fields."""

from __future__ import annotations

from collections.abc import Iterator

from pgenrm_train.config.cluster import ClusterConfig
from pgenrm_train.config.endpoints import EndpointConfig
from pgenrm_train.config.evaluation import sizes
from pgenrm_train.config.grpo import CurriculumConfig, GrpoConfig
from pgenrm_train.config.model import BASELINES
from pgenrm_train.config.psi import PsiConfig
from pgenrm_train.config.schema import Config
from pgenrm_train.config.setting import not_one_of, violations
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.errors import ConfigError

PIPELINE = "pipeline"
# Recipes of the models that are no weights which write chains.
_RECIPES: dict[str, tuple[str, ...]] = {
    "endpoint": (StageName.EVALUATE, "score"),
    "reward_head": (StageName.EVALUATE,),
    "callable": (StageName.EVALUATE,),
}


def check(config: Config) -> None:
    """Raise ConfigError for the first broken rule: one sentence that names the keys."""
    for sentence in _problems(config):
        raise ConfigError(sentence)


def _problems(config: Config) -> Iterator[str]:
    yield from violations(config)
    yield from _eval(config)
    yield from _engines(config.cluster)
    yield from _data(config)
    for section, grpo in (("cre", config.cre), ("curriculum", config.curriculum)):
        yield from _grpo(section, grpo)
    for section, endpoint in (("teacher", config.teacher), ("judge", config.judge)):
        yield from _endpoint(section, endpoint, config.data.name)
    if config.sec.synthesize_criteria:
        yield from _synthesis(config)
    yield from _model(config)
    if (k := config.prototypes.k) != "auto" and not (isinstance(k, int) and k > 0):
        yield f"prototypes.k={k} must be a number from 1, or auto"
    if config.plan.card not in config.plan.cards:
        yield not_one_of("plan.card", config.plan.card, config.plan.cards)
    yield from _curriculum(config.curriculum)
    if config.psi.patience is not None and not config.psi.evaluate_every:
        yield f"psi.patience={config.psi.patience} needs psi.evaluate_every above 0: it counts validations"
    if config.recipe in (StageName.PSI, PIPELINE):
        yield from psi_problems(config)


def psi_problems(config: Config) -> list[str]:
    """Divisibility of an optimiser step of PSI; each problem is one sentence that names its keys."""
    return list(_psi(config.psi, config.cluster.nodes * config.cluster.processes_per_node))


def _psi(psi: PsiConfig, ranks: int) -> Iterator[str]:
    shared = psi.sequence_parallel
    if shared > 1 and psi.micro_batch_size > 1:
        yield f"psi.sequence_parallel={shared} needs psi.micro_batch_size=1; it is {psi.micro_batch_size}"
    if shared > 1 and psi.packing:
        yield f"psi.sequence_parallel={shared} splits one sequence at a time; psi.packing must be false or null"
    if ranks % shared:
        yield f"psi.sequence_parallel={shared} must divide the {ranks} processes of cluster.processes_per_node"
    elif psi.batch_size * shared % (psi.micro_batch_size * ranks):
        unit = f"{psi.micro_batch_size} × {ranks}" + (f" ÷ {shared}" if shared > 1 else "")
        divisor = "psi.micro_batch_size × processes" + (" ÷ psi.sequence_parallel" if shared > 1 else "")
        yield f"psi.batch_size={psi.batch_size} must be a multiple of {divisor} = {unit}"


def _eval(config: Config) -> Iterator[str]:
    settings = config.eval
    for key, value in (("eval.ind", settings.ind), ("eval.pro", settings.pro)):
        counts = value if isinstance(value, list) else [value]
        if not counts or not all(isinstance(n, int) and n >= 0 for n in counts):
            yield f"{key}={value} must be a number from 0 or a list of them"
    most_own, most_similar = max(sizes(settings.ind)), max(sizes(settings.pro))
    if most_own + most_similar == 0:
        yield "eval.ind=0 needs eval.pro above 0: a score takes at least one chain"
    weights = settings.weights
    if len(weights) != 2 or min(weights) < 0 or not sum(weights):
        yield (
            f"eval.weights={weights} must be two numbers from 0, of own and of similar users' chains, one above 0"
        )
    if settings.scores == "verified" and config.data.name == "lampqa":
        yield "eval.scores=verified is for pairs; data=lampqa ranks by the declared scores"
    if settings.compare and len(settings.compare) != 2:
        yield f"eval.compare={settings.compare} must name two run folders: eval.compare=[runA,runB]"
    if settings.adaptive is not None:
        if isinstance(settings.ind, list) or isinstance(settings.pro, list):
            yield "eval.adaptive draws for one cell and needs eval.ind and eval.pro to be numbers, not lists"
        if most_own == 1:
            yield "eval.adaptive stops the sampling of own chains and needs eval.ind above 1"
    if settings.temperature == 0 and (most_own > 1 or settings.seeds > 1):
        yield "eval.temperature=0 gives the same chain each time; it needs eval.ind=1 and eval.seeds=1"


def _engines(cluster: ClusterConfig) -> Iterator[str]:
    gpus, needed = (
        cluster.nodes * cluster.processes_per_node,
        (cluster.engines or 0) * cluster.tensor_parallel,
    )
    if cluster.device == "cuda" and needed > gpus:
        yield (
            f"cluster.engines={cluster.engines} of cluster.tensor_parallel={cluster.tensor_parallel} "
            f"would take {needed} GPUs of {gpus}"
        )


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if data.name == "pairs" and not data.path:
        yield "data=pairs needs data.path=FILE, a parquet or JSONL file in PersonalRewardBench's schema"
    if data.only and data.name not in ("pairs", "chatbot_arena", "prism_personalized"):
        yield f"data.only picks rows of votes, and data={data.name} is made of something else; leave it out"
    smoke = (config.recipe, config.model.kind, config.pipeline.budget) == (PIPELINE, "nano", "smoke")
    if smoke and data.name != "personaworld":
        yield (
            f"pipeline.budget=smoke is too short for nano to learn a chain from data={data.name}; "
            "use pipeline.budget=demo"
        )


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.kind == "baseline" and model.name not in BASELINES:
        yield not_one_of("model.name", model.name, BASELINES)
    named = [("model.name", model.name)] if model.kind == "baseline" else []
    for key, name in (*named, *(("eval.baselines", name) for name in config.eval.baselines)):
        if name == "oracle" and config.data.name != "personaworld":
            yield f"{key}=oracle knows data=personaworld only, and not data={config.data.name}; leave it out"
    recipes = _RECIPES.get(model.kind)
    if recipes is not None and config.recipe not in (StageName.BUILD_DATA, *recipes):
        yield (
            f"model={model.kind} is for recipe={' or '.join(recipes)}; recipe={config.recipe} needs one with weights "
            "that writes chains"
        )
    if model.kind == "endpoint" and not model.base_url:
        yield "model=endpoint needs model.base_url (e.g. http://localhost:8000/v1)"
    if model.kind == "callable" and not all(part.strip() for part in model.name.partition(":")):
        yield f"model.name={model.name} must be MODULE:FUNCTION, e.g. my_model:score"
    if model.prompt != "p_genrm" and config.recipe not in (StageName.BUILD_DATA, StageName.EVALUATE, "score"):
        yield (
            f"model.prompt={model.prompt} is for recipe=evaluate and recipe=score; recipe={config.recipe} "
            "needs p_genrm"
        )
    if model.prompt == "persona" and model.kind != "endpoint":
        yield f"model.prompt=persona takes two calls and needs model=endpoint; model.kind={model.kind}"
    if model.prompt == "persona" and config.eval.split == "train":
        yield (
            "model.prompt=persona reads one history per user, which may hold pairs of eval.split=train; "
            "use val or test"
        )


def _synthesis(config: Config) -> Iterator[str]:
    if config.teacher.kind == "oracle":
        yield (
            "sec.synthesize_criteria=true needs teacher=features, endpoint or vllm: the oracle's users state theirs"
        )
    if config.recipe in (StageName.CRE, PIPELINE) and config.judge.kind not in ("endpoint", "vllm"):
        yield (
            f"sec.synthesize_criteria=true makes criteria for a judge to read, and judge={config.judge.kind} "
            "reads none; use judge=endpoint or vllm"
        )


def _endpoint(section: str, endpoint: EndpointConfig, data: str) -> Iterator[str]:
    if endpoint.kind == "endpoint" and not (endpoint.base_url and endpoint.name):
        yield (
            f"{section}=endpoint needs {section}.base_url (e.g. http://localhost:8000/v1) "
            f"and {section}.name (the served model)"
        )
    if endpoint.kind == "vllm" and not endpoint.name:
        yield f"{section}=vllm needs {section}.name, a checkpoint folder or a hub name to serve"
    if endpoint.kind == "oracle" and data != "personaworld":
        yield f"{section}=oracle knows data=personaworld only, and this is data={data}; use another {section}="


def _curriculum(curriculum: CurriculumConfig) -> Iterator[str]:
    low, high = curriculum.hard_low, curriculum.hard_high
    if not 0 <= low <= high <= 1:
        yield f"curriculum.hard_low={low:g} and curriculum.hard_high={high:g} must be in this order within 0 and 1"
    if curriculum.schedule == "self_paced" and curriculum.hard_by != "hardness":
        yield (
            "curriculum.schedule=self_paced sorts pairs by their pass rates; "
            f"it needs curriculum.hard_by=hardness, not {curriculum.hard_by}"
        )
    if curriculum.prototypes and not curriculum.construct:
        yield "curriculum.prototypes is read by curriculum.construct=true alone; give both or neither"
    if curriculum.mine and curriculum.mining_samples < 2:
        yield (
            f"curriculum.mining_samples={curriculum.mining_samples} must be at least 2, one chain in each order; "
            "or use curriculum.mine=false"
        )


def _grpo(section: str, grpo: GrpoConfig) -> Iterator[str]:
    if grpo.prompts_per_step % grpo.mini_batch_prompts:
        yield (
            f"{section}.prompts_per_step={grpo.prompts_per_step} must be a multiple of "
            f"{section}.mini_batch_prompts={grpo.mini_batch_prompts}"
        )
