"""Rules that span several keys; the constraints of single keys are on their fields.

A rule is a pair: whether it is broken, and the sentence for the user, which names the keys.
"""

import math
from collections.abc import Iterator

from pgenrm_train.config.data import QUESTIONS, VOTES
from pgenrm_train.config.endpoints import api_problems
from pgenrm_train.config.evaluation import TASKS, sizes, task_of
from pgenrm_train.config.grpo import GrpoConfig
from pgenrm_train.config.model import BASELINES, EXACT, PERSONA_BASELINE, Totals
from pgenrm_train.config.schema import Config, places_of, psi_cluster, tokens_per_pass
from pgenrm_train.config.setting import not_one_of, violations
from pgenrm_train.config.stage_names import CHOOSING, GRPO_STAGES, StageName
from pgenrm_train.errors import ConfigError

Rules = list[tuple[bool, str]]
# Recipes of the models that have no weights to train.
RECIPES: dict[str, tuple[str, ...]] = {
    "endpoint": (StageName.EVALUATE, "score", *CHOOSING),
    "reward_head": (StageName.EVALUATE,),
    "callable": (StageName.EVALUATE,),
}
SEVERAL = {"pipeline": GRPO_STAGES, "gpu_check": (StageName.CRE,)}  # recipes that run PSI and these stages


def check(config: Config) -> None:
    """Raise ConfigError for the first broken rule: one sentence that names the keys."""
    for sentence in _problems(config):
        raise ConfigError(sentence)


def _problems(config: Config) -> Iterator[str]:
    # Single keys come first: the other rules compute with valid values.
    yield from violations(config)
    for section, api in (
        ("teacher", config.teacher),
        ("judge", config.judge),
        ("judge_gold", config.judge_gold),
        ("model", config.model),
    ):
        yield from api_problems(section, api)
    yield from _not_counts(config)
    rules = [
        *_evaluation(config),
        *_data(config),
        *_training(config),
        *_endpoints(config),
        *_personas(config),
        *_model(config),
        *_machines(config),
    ]
    yield from (sentence for broken, sentence in rules if broken)
    # all stages of a recipe: hours of PSI must not end at the settings of CRE
    if config.recipe in (StageName.PSI, *SEVERAL):
        yield from psi_problems(config)
    for stage in GRPO_STAGES:
        if config.recipe == stage or stage in SEVERAL.get(config.recipe, ()):
            yield from grpo_problems(config, stage)


def psi_problems(config: Config) -> list[str]:
    """Divisibility of an optimiser step of PSI; each problem is one sentence that names its keys."""
    psi, ranks = config.psi, psi_cluster(config).ranks
    shared, packed = psi.sequence_parallel, psi.packs(config.cluster.device)
    size = 1 if packed else psi.micro_batch_size
    divisor, unit = ("", "") if packed else ("psi.micro_batch_size × ", f"{size} × ")
    divisor += "processes" + (" ÷ psi.sequence_parallel" if shared > 1 else "")
    unit += f"{ranks}" + (f" ÷ {shared}" if shared > 1 else "")
    rules = [
        (
            shared > 1 and psi.micro_batch_size > 1,
            f"psi.sequence_parallel={shared} needs psi.micro_batch_size=1; it is {psi.micro_batch_size}",
        ),
        (
            shared > 1 and bool(psi.packing),
            f"psi.sequence_parallel={shared} splits one sequence at a time; "
            "psi.packing must be false or null",
        ),
        (
            ranks % shared > 0,
            f"psi.sequence_parallel={shared} must divide the {ranks} processes of "
            f"cluster.processes_per_node; the nearest is psi.sequence_parallel={divisor_of(ranks, shared)}",
        ),
        (
            psi.batch_size is not None
            and ranks % shared == 0
            and psi.batch_size * shared % (size * ranks) > 0,
            f"psi.batch_size={psi.batch_size} must be a multiple of {divisor} = {unit}; "
            f"the nearest is psi.batch_size={nearest_multiple(psi.batch_size, size * ranks, shared)}",
        ),
    ]
    return [sentence for broken, sentence in rules if broken]


def nearest_multiple(size: int | None, rows: int, factor: int) -> int:
    """The number nearest to `size` whose product with `factor` is a multiple of `rows`."""
    unit = rows // math.gcd(rows, factor)
    return max(unit, round((size or 0) / unit) * unit)


def divisor_of(number: int, limit: int) -> int:
    """The largest divisor of a number up to a limit."""
    return next(divisor for divisor in range(limit, 0, -1) if number % divisor == 0)


def grpo_problems(config: Config, stage: StageName) -> list[str]:
    """Divisibility of a step of CRE or the curriculum; each problem is one sentence that names its keys.

    Sizes that are null follow from the data, and then divide.
    """
    grpo: GrpoConfig = getattr(config, stage)
    if grpo.separate and (unsplit := list(_split_problems(config, stage))):
        return unsplit
    places = places_of(config, stage)
    cluster, ranks = places.sampler.cluster, places.actor.cluster.ranks
    processes = "the actor's GPUs" if grpo.separate else "cluster.nodes × cluster.processes_per_node"
    mini_batch = grpo.mini_batch_prompts or grpo.prompts_per_step or 0
    rollouts = mini_batch * grpo.group_size
    nearest = nearest_multiple(mini_batch, ranks, grpo.group_size)
    one_part = f"{stage}.process_weight=0" if not grpo.process_weight else "judge=none"
    rules = [
        (
            bool(grpo.rubric_dropout) and (not grpo.process_weight or config.judge.kind == "none"),
            f"{stage}.rubric_dropout={grpo.rubric_dropout:g} hides criteria from the training judge, and "
            f"with {one_part} there is none; leave it out",
        ),
        (
            rollouts % ranks > 0,
            f"{stage}.mini_batch_prompts × {stage}.group_size = {rollouts} must be a multiple of "
            f"{processes} = {ranks}; "
            f"the nearest is {stage}.mini_batch_prompts={nearest}",
        ),
        (
            tokens_per_pass(config, stage) is None and (rollouts // ranks) % grpo.micro_batch_size > 0,
            f"{stage}.micro_batch_size={grpo.micro_batch_size} must divide the {rollouts // ranks} rollouts "
            f"of a process ({stage}.mini_batch_prompts × {stage}.group_size over {ranks} processes); "
            f"the nearest is {stage}.micro_batch_size={divisor_of(rollouts // ranks, grpo.micro_batch_size)}",
        ),
        (
            # a vLLM replica stays on one node
            cluster.processes_per_node % cluster.tensor_parallel > 0,
            f"cluster.tensor_parallel={cluster.tensor_parallel} must divide the {cluster.processes_per_node} "
            f"{'GPUs of vLLM on a node' if grpo.separate else 'processes of cluster.processes_per_node'}; "
            "the nearest is "
            f"cluster.tensor_parallel={divisor_of(cluster.processes_per_node, cluster.tensor_parallel)}",
        ),
    ]
    return [sentence for broken, sentence in rules if broken]


def _split_problems(config: Config, stage: StageName) -> Iterator[str]:
    """Reasons why the GPUs cannot be divided between the actor and vLLM."""
    cluster, unit = config.cluster, 1 if config.cluster.nodes == 1 else config.cluster.processes_per_node
    mode, (other,) = f"{stage}.mode=separate_async", (name for name in GRPO_STAGES if name != stage)
    if cluster.device == "cpu":
        yield (
            f"{mode} needs GPUs, because veRL's nccl checkpoint engine copies the weights to those of vLLM; "
            f"{stage}.mode=async works on a CPU"
        )
    elif config.model.lora.rank:
        yield (
            f"{mode} would sample without the adapter, because veRL sends only the frozen weights to other "
            f"GPUs; use model.lora.rank=0 or {stage}.mode=async"
        )
    elif cluster.ranks < 2:
        yield f"{mode} needs one GPU for vLLM and one for the actor; use cluster=gpu8 or {stage}.mode=async"
    elif other in SEVERAL.get(config.recipe, ()) and not getattr(config, other).separate:
        yield f"{mode} needs {other}.mode=separate_async too, because both stages share a session of veRL"
    elif (gpus := cluster.rollout_gpus) and (gpus % unit or gpus >= cluster.ranks):
        nearest = min(nearest_multiple(gpus, unit, 1), cluster.ranks - unit)
        full = f", full nodes of {unit}," if unit > 1 else ""
        yield (
            f"cluster.rollout_gpus={gpus} must be a part{full} of the {cluster.ranks} GPUs; "
            f"the nearest is cluster.rollout_gpus={nearest}"
        )


def _not_counts(config: Config) -> Iterator[str]:
    for key, value in (("eval.ind", config.eval.ind), ("eval.pro", config.eval.pro)):
        counts = value if isinstance(value, list) else [value]
        if not counts or not all(isinstance(n, int) and n >= 0 for n in counts):
            yield f"{key}={value} must be a number from 0 or a list of them"


def _evaluation(config: Config) -> Rules:
    settings, weights, adaptive = config.eval, config.eval.weights, config.eval.adaptive is not None
    pathless = sorted(set(settings.task_paths) - set(TASKS))
    own, similar = max(sizes(settings.ind)), max(sizes(settings.pro))
    return [
        (own + similar == 0, "eval.ind=0 needs eval.pro above 0: a score takes at least one chain"),
        (
            len(weights) != 2 or min(weights) < 0 or not sum(weights),
            f"eval.weights={weights} must be two numbers from 0, of own and of similar users' chains, "
            "one above 0",
        ),
        (
            bool(pathless),
            f"eval.task_paths names {', '.join(pathless)}, which is not one of {', '.join(TASKS)}",
        ),
        (
            "rmgap" in {task_of(text).name for text in settings.tasks} and "rmgap" not in settings.task_paths,
            "eval.tasks=[rmgap] needs +eval.task_paths.rmgap=test.jsonl, the file data/test.jsonl of "
            "github.com/nanzhi84/RMGAP",
        ),
        (
            len(settings.compare) not in (0, 2),
            f"eval.compare={settings.compare} must name two run folders: eval.compare=[runA,runB]",
        ),
        (
            adaptive and (isinstance(settings.ind, list) or isinstance(settings.pro, list)),
            "eval.adaptive draws for one cell and needs eval.ind and eval.pro to be numbers, not lists",
        ),
        (
            adaptive and own == 1,
            "eval.adaptive stops the sampling of own chains and needs eval.ind above 1",
        ),
        (not config.best_of_n.sizes, "best_of_n.sizes=[] must name one size or more"),
        (
            config.recipe == StageName.LABEL and settings.temperature == 0 and config.label.ind > 1,
            "eval.temperature=0 gives the same chain each time; it needs label.ind=1",
        ),
        (
            config.recipe == StageName.BEST_OF_N and settings.temperature == 0,
            "eval.temperature=0 gives the same chain each time, and recipe=best_of_n samples some questions "
            "twice; use a temperature above 0",
        ),
        (
            settings.temperature == 0 and (own > 1 or settings.seeds > 1),
            "eval.temperature=0 gives the same chain each time; it needs eval.ind=1 and eval.seeds=1",
        ),
    ]


def _data(config: Config) -> Rules:
    data = config.data
    hidden = data.name in QUESTIONS and config.recipe == StageName.EVALUATE
    masking = config.masking.policy or config.eval.masking
    smoke = (config.recipe, config.model.kind, config.pipeline.budget) == ("pipeline", "nano", "smoke")
    return [
        (
            data.name == "pairs" and not data.path,
            "data=pairs needs data.path=FILE, a parquet or JSONL file in PersonalRewardBench's schema",
        ),
        (
            data.name == "rmgap" and not data.path,
            "data=rmgap needs data.path=test.jsonl, the file data/test.jsonl of github.com/nanzhi84/RMGAP",
        ),
        (
            hidden and masking in ("full", "mixed"),
            f"data={data.name} withholds its rubrics from every prompt, and eval.masking={masking} would "
            "show what users stated; use eval.masking=masked",
        ),
        (
            hidden and config.model.prompt == "persona",
            f"model.prompt=persona is written from votes, of which data={data.name} has none; use another "
            "model.prompt=",
        ),
        (
            data.name in QUESTIONS and config.recipe == "pipeline",
            f"data={data.name} is for evaluation only; recipe=pipeline needs another data=",
        ),
        (
            bool(data.only) and data.name not in VOTES,
            f"data.only picks rows of votes, and data={data.name} is made of something else; leave it out",
        ),
        (
            smoke and data.name != "personaworld",
            f"pipeline.budget=smoke is too short for nano to learn a chain from data={data.name}; "
            "use pipeline.budget=demo",
        ),
    ]


def _training(config: Config) -> Rules:
    psi, curriculum, k = config.psi, config.curriculum, config.prototypes.k
    low, high = curriculum.hard_low, curriculum.hard_high
    return [
        (
            psi.patience is not None and not psi.evaluate_every,
            f"psi.patience={psi.patience} needs psi.evaluate_every above 0: it counts validations",
        ),
        *(
            (
                (grpo.prompts_per_step or 0) % (grpo.mini_batch_prompts or 1) > 0,
                f"{section}.prompts_per_step={grpo.prompts_per_step} must be a multiple of "
                f"{section}.mini_batch_prompts={grpo.mini_batch_prompts}; the nearest is "
                f"{section}.mini_batch_prompts="
                f"{divisor_of(grpo.prompts_per_step or 1, grpo.mini_batch_prompts or 1)}",
            )
            for section, grpo in ((StageName.CRE, config.cre), (StageName.CURRICULUM, config.curriculum))
        ),
        (
            not 0 <= low <= high <= 1,
            f"curriculum.hard_low={low:g} and curriculum.hard_high={high:g} must be in this order "
            "within 0 and 1",
        ),
        (
            curriculum.schedule == "self_paced" and curriculum.hard_by != "hardness",
            "curriculum.schedule=self_paced sorts pairs by their pass rates; it needs "
            f"curriculum.hard_by=hardness, not {curriculum.hard_by}",
        ),
        (
            bool(curriculum.prototypes) and not curriculum.construct,
            "curriculum.prototypes is read by curriculum.construct=true alone; give both or neither",
        ),
        (
            curriculum.mine and curriculum.mining_samples < 2,
            f"curriculum.mining_samples={curriculum.mining_samples} must be at least 2, one chain in each "
            "order; or use curriculum.mine=false",
        ),
        (
            k != "auto" and not (isinstance(k, int) and k > 0),
            f"prototypes.k={k} must be a number from 1, or auto",
        ),
    ]


def _endpoints(config: Config) -> Rules:
    data, judge, synthesis = config.data.name, config.judge.kind, config.sec.synthesize_criteria
    endpoints = {"teacher": config.teacher, "judge": config.judge, "judge_gold": config.judge_gold}
    return [
        *(
            (
                endpoint.kind == "endpoint" and not (endpoint.base_url and endpoint.name),
                f"{section}=endpoint needs {section}.base_url (e.g. http://localhost:8000/v1) "
                f"and {section}.name (the served model)",
            )
            for section, endpoint in endpoints.items()
        ),
        *(
            (
                endpoint.kind == "vllm" and not endpoint.name,
                f"{section}=vllm needs {section}.name, a checkpoint folder or a hub name to serve",
            )
            for section, endpoint in endpoints.items()
        ),
        *(
            (
                endpoint.kind == "oracle" and data != "personaworld",
                f"{section}=oracle knows data=personaworld only, and this is data={data}; "
                f"use another {section}=",
            )
            for section, endpoint in endpoints.items()
        ),
        (
            synthesis and config.teacher.kind == "oracle",
            "sec.synthesize_criteria=true needs teacher=features, endpoint or vllm: "
            "the oracle's users state theirs",
        ),
        (
            synthesis and config.recipe in (StageName.CRE, "pipeline") and judge not in ("endpoint", "vllm"),
            f"sec.synthesize_criteria=true makes criteria for a judge to read, and judge={judge} reads none; "
            "use judge=endpoint or vllm",
        ),
    ]


def _personas(config: Config) -> Rules:
    """Rules of the baseline `synthesize_me`, which shows published personas to the model under test."""
    model, asked = config.model, PERSONA_BASELINE in config.eval.baselines
    return [
        (
            asked and not config.eval.personas,
            f"eval.baselines={PERSONA_BASELINE} needs eval.personas=FOLDER, the personas that SynthesizeMe "
            "saved",
        ),
        (
            bool(config.eval.personas) and not asked,
            f"eval.personas is read by the baseline {PERSONA_BASELINE} alone; add it to eval.baselines",
        ),
        (
            asked and model.kind not in ("nano", "hf", "endpoint"),
            f"eval.baselines={PERSONA_BASELINE} shows personas to the model under test, and "
            f"model={model.kind} reads no prompt; use a model that writes chains",
        ),
        (
            asked and model.prompt not in ("p_genrm", "judge_history"),
            f"eval.baselines={PERSONA_BASELINE} adds a persona to a prompt with the user's votes; use "
            f"model.prompt=p_genrm or judge_history, not {model.prompt}",
        ),
    ]


def _model(config: Config) -> Rules:
    model, recipe = config.model, config.recipe
    baseline = [("model.name", model.name)] if model.kind == "baseline" else []
    recipes = RECIPES.get(model.kind, (recipe,))
    return [
        (
            bool(baseline) and model.name not in BASELINES,
            not_one_of("model.name", model.name, BASELINES),
        ),
        *(
            (
                name in EXACT and config.data.name != "personaworld",
                f"{key}={name} knows data=personaworld only, and not data={config.data.name}; leave it out",
            )
            for key, name in (*baseline, *(("eval.baselines", name) for name in config.eval.baselines))
        ),
        (
            recipe not in (StageName.BUILD_DATA, *recipes),
            f"model={model.kind} is for recipe={' or '.join(recipes)}; recipe={recipe} needs one with "
            "weights that writes chains",
        ),
        (
            bool(baseline) and recipe in CHOOSING,
            f"recipe={recipe} chooses by chains, and model=baseline writes none; use a trained model",
        ),
        (
            model.kind == "endpoint" and not model.base_url,
            "model=endpoint needs model.base_url (e.g. http://localhost:8000/v1)",
        ),
        (
            model.kind == "callable" and not all(part.strip() for part in model.name.partition(":")),
            f"model.name={model.name} must be MODULE:FUNCTION, e.g. my_model:score",
        ),
        (
            model.prompt != "p_genrm" and model.counted != Totals.DECLARED,
            f"model.totals={model.totals} recomputes totals from a rubric, and answers to "
            f"model.prompt={model.prompt} have none; leave one of them out",
        ),
        (
            model.prompt != "p_genrm" and recipe not in (StageName.BUILD_DATA, StageName.EVALUATE, "score"),
            f"model.prompt={model.prompt} is for recipe=evaluate and recipe=score; recipe={recipe} "
            "needs p_genrm",
        ),
        (
            bool(model.persona_program) and model.prompt != "persona",
            "model.persona_program writes the personas of model.prompt=persona alone; give both or neither",
        ),
        (
            model.prompt == "persona" and model.kind != "endpoint",
            f"model.prompt=persona takes two calls and needs model=endpoint; model.kind={model.kind}",
        ),
        (
            model.prompt == "persona" and config.eval.split == "train",
            "model.prompt=persona reads one history per user, which may hold pairs of eval.split=train; "
            "use val or test",
        ),
    ]


def _machines(config: Config) -> Rules:
    cluster, plan = config.cluster, config.plan
    needed = (cluster.engines or 0) * cluster.tensor_parallel
    return [
        (
            cluster.device == "cuda" and needed > cluster.ranks,
            f"cluster.engines={cluster.engines} of cluster.tensor_parallel={cluster.tensor_parallel} "
            f"would take {needed} GPUs of {cluster.ranks}",
        ),
        (plan.card not in plan.cards, not_one_of("plan.card", plan.card, plan.cards)),
    ]
