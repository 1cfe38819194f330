"""Every shipped choice parses, YAML holds only keys of the schema, and each check names its keys."""

import dataclasses
import itertools

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pgenrm_train.__main__ import _module
from pgenrm_train.cli_errors import key_on_command_line, key_with_dashes
from pgenrm_train.config import (
    BASELINES,
    BUDGETS,
    CONFIG_DIR,
    ROOT,
    Config,
    check,
    get,
    masking_of,
    parse,
    register_resolvers,
    sizes,
    to_dict,
)
from pgenrm_train.config.data import QUESTIONS
from pgenrm_train.errors import ConfigError
from recipes.wiring.baselines import scorers


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def hydra():
    register_resolvers()
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        yield


def load(*overrides: str) -> Config:
    return parse(compose("config", overrides=list(overrides)))


def data_keys(data: str) -> list[str]:
    return [f"data={data}", *(["data.path=votes.parquet"] if data in ("pairs", "rmgap") else [])]


SCHEMA = OmegaConf.structured(Config)
RECIPES, DATA, MODELS, CLUSTERS = (choices(group) for group in ("recipe", "data", "model", "cluster"))
BUILT = [model for model in MODELS if model not in ("endpoint", "reward_head", "callable")]


COMBINATIONS = sorted(
    {
        *itertools.product(DATA, [model for model in BUILT if "70b" not in model], ["cpu"]),
        *itertools.product(["pairs"], ["nano", "llama31_8b"], CLUSTERS),
        *itertools.product(DATA, ["llama31_70b_lora"], ["gpu8", "multi_node"]),
    }
)


@pytest.mark.parametrize("data,model,cluster", COMBINATIONS)
def test_every_combination_of_data_model_and_cluster_parses(data, model, cluster):
    batch = ["psi.batch_size=128", "cre.micro_batch_size=1", "curriculum.micro_batch_size=1"]
    batch = [] if cluster == "cpu" else batch  # nano's own are for few processes
    recipe = "evaluate" if data in QUESTIONS else "pipeline"
    config = load(f"recipe={recipe}", *data_keys(data), f"model={model}", f"cluster={cluster}", *batch)
    assert (config.data.name, config.cluster.name) == (data, cluster)
    assert config.model.label.startswith(model)
    assert config.cluster.device == ("cpu" if cluster == "cpu" else "cuda")
    assert f"{data}-{config.model.label}-demo" in config.run_dir


TRAINABLE = [data for data in DATA if data not in QUESTIONS]


@pytest.mark.parametrize("recipe,data", list(zip(RECIPES, itertools.cycle(TRAINABLE))))
def test_every_recipe_composes(recipe, data):
    assert load(f"recipe={recipe}", *data_keys(data)).recipe == recipe


@pytest.mark.parametrize("data", QUESTIONS)
def test_data_for_evaluation_only_are_refused_in_a_pipeline(data):
    with pytest.raises(ConfigError, match=f"data={data} is for evaluation only"):
        load("recipe=pipeline", *data_keys(data))


@pytest.mark.parametrize("data,budget", list(itertools.product(DATA, BUDGETS)))
def test_the_configuration_of_a_run_folder_starts_the_same_run(data, budget):
    config = load("recipe=psi", *data_keys(data), f"pipeline.budget={budget}")
    assert config.pipeline.budget == budget and parse(to_dict(config)) == config


def test_smoke_is_refused_where_nano_could_learn_nothing_in_it():
    with pytest.raises(
        ConfigError, match=r"pipeline\.budget=smoke is too short for nano to learn a chain from data=pairs"
    ):
        load("recipe=pipeline", *data_keys("pairs"), "pipeline.budget=smoke")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_its_file(recipe):
    assert [path.parent.name for path in (ROOT / "recipes").rglob(f"{recipe}.py")][:1] in (
        ["recipes"],
        ["results"],
        ["choosing"],
    )
    assert callable(_module(recipe).run)


@pytest.mark.parametrize("group,choice", [(g, c) for g in ("masking", "tracking") for c in choices(g)])
def test_every_choice_of_the_small_groups_parses(group, choice):
    config = load("recipe=psi", f"{group}={choice}")
    assert {"masking": config.masking.policy or "per_stage", "tracking": config.tracking.kind}[
        group
    ] == choice


def test_defaults_are_the_documented_ones():
    config = load("recipe=pipeline")
    assert (config.data.name, config.model.kind, config.cluster.name, config.tracking.kind) == (
        "personaworld",
        "nano",
        "cpu",
        "offline",
    )
    assert config.run_dir == "runs/personaworld-nano-demo" and config.resume and config.seed == 0
    assert (config.eval.protocol, config.eval.split) == ("strict", "test")


@pytest.mark.parametrize(
    "data,teacher,judge", [("personaworld", "oracle", "oracle"), ("pairs", "features", "none")]
)
def test_data_chooses_teacher_and_judge(data, teacher, judge):
    config = load("recipe=pipeline", *data_keys(data))
    assert (config.teacher.kind, config.judge.kind) == (teacher, judge)
    chosen = load("recipe=pipeline", *data_keys(data), "teacher=features", "judge=none")
    assert (chosen.teacher.kind, chosen.judge.kind) == ("features", "none")


def test_masking_is_each_stages_own_or_one_for_all():
    own = load("recipe=psi", "psi.masking=full")
    assert (masking_of(own, "psi"), masking_of(own, "cre"), masking_of(own, "eval")) == (
        "full",
        "masked",
        "masked",
    )
    assert masking_of(load("recipe=psi", "psi.masking=full", "masking=mixed"), "psi") == "mixed"


# ---- keys of the YAML files ----


def keys(node: dict, prefix: str = ""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize(
    "path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_key_in_yaml_is_in_the_schema(path):
    text = path.read_text(encoding="utf-8")
    content = {k: v for k, v in (yaml.safe_load(text) or {}).items() if k not in ("defaults", "hydra")}
    group = "" if path.parent == CONFIG_DIR or "@package _global_" in text else f"{path.parent.name}."
    for key in keys(content, group):
        parent = OmegaConf.select(SCHEMA, key.rpartition(".")[0]) if "." in key else SCHEMA
        assert parent is not None and key.rpartition(".")[2] in list(parent.keys()), f"{path.name}: {key}"


def test_every_checked_key_exists_and_every_default_passes_its_own_check():
    config = Config(recipe="psi")
    config.teacher.kind, config.judge.kind = "oracle", "oracle"
    check(config)
    for field in dataclasses.fields(Config):
        get(config, field.name)


# ---- the budget resolver ----


def budgeted(expression: str, budget: str):
    tree = OmegaConf.create({"pipeline": {"budget": budget}, "value": expression})
    return OmegaConf.to_container(tree, resolve=True)["value"]


@pytest.mark.parametrize("budget,value", list(zip(BUDGETS, (1, 20, None), strict=True)))
def test_the_budget_picks_a_value(budget, value):
    assert budgeted("${budget:1,20,null}", budget) == value


@pytest.mark.parametrize("budget,value", list(zip(BUDGETS, ([1, 2], [], [0.5]), strict=True)))
def test_the_budget_picks_lists(budget, value):
    assert budgeted("${budget:[1,2],[],[0.5]}", budget) == value


def test_budgets_differ_in_size_and_smoke_is_the_smallest():
    users = [load("recipe=pipeline", f"pipeline.budget={b}").data.users for b in BUDGETS]
    assert users == sorted(users) and len(set(users)) == 3


def test_an_unknown_budget_names_the_valid_ones():
    with pytest.raises(
        (ConfigError, OmegaConfBaseException), match=r"pipeline\.budget=huge is not one of smoke, demo, full"
    ):
        load("recipe=pipeline", "pipeline.budget=huge")


# ---- checks ----

MISTAKES = {
    "sec.near_duplicate=0": ("sec.near_duplicate=0", "above 0 and at most 1"),
    "data.history_policy=oldest": (
        "data.history_policy=oldest",
        "random, recent, most_similar, same_scenario",
    ),
    "run_dir=a:b": ("run_dir=a:b", "begins like a URL", "full path"),
    "seed=-1": ("seed=-1", "at least 0"),
    "data.on_bad_row=ignore": ("data.on_bad_row=ignore", "fail, skip"),
    "model.kind=huge": ("model.kind=huge", "nano, hf"),
    "model.kind=endpoint": ("model=endpoint", "needs one with weights"),
    "cluster.device=tpu": ("cluster.device=tpu", "cpu, cuda"),
    "judge.kind=features": ("judge.kind=features", "oracle, none"),
    "teacher.kind=none": ("teacher.kind=none", "oracle, features"),
    "tracking.kind=mlflow": ("tracking.kind=mlflow", "offline, wandb, none"),
    "teacher.api_key_env=sk-proj-1": ("teacher.api_key_env", "never the key itself"),
    "judge.api_key_env=gsk_abc1": ("judge.api_key_env", "never the key itself"),
    "model.api_key_env=a1b2c3d4e5f6a7b8c9d0e1": ("model.api_key_env", "never the key itself"),
    "teacher.base_url=localhost:8000/v1": ("teacher.base_url=localhost:8000/v1", "http://"),
    "teacher.base_url='http://[::1'": ("teacher.base_url=http://[::1", "name a host"),
    "teacher.base_url=http://..example/v1": ("teacher.base_url=http://..example/v1", "name a host"),
    "teacher.base_url=http://h:port/v1": ("a port is a number",),
    "teacher.base_url='http://a b/v1'": ("name a host",),
    "teacher.base_url='http://h/v1 '": ("blanks and # are no part of it",),
    "teacher.base_url='http://h/v1#x'": ("blanks and # are no part of it",),
    "seed=4294967296": ("seed=4294967296", "at most 4294967295"),
    "teacher.base_url=https://token@h/v1": ("teacher.base_url holds a user", "teacher.api_key_env"),
    "run_dir=''": ("run_dir= is empty",),
    "judge.base_url=https://u:p@h/v1": ("judge.base_url holds a user", "judge.api_key_env"),
    "model.leave_out=[top_p]": ("model.leave_out=top_p", "seed, temperature, system"),
    "judge.extra_body={api_key: some-text}": ("judge.extra_body.api_key holds a key", "judge.api_key_env"),
    "teacher.extra_body={x: {y: sk-proj-0123456789}}": ("teacher.extra_body.x.y", "teacher.api_key_env"),
    "model.extra_body={temperature: 1}": ("model.extra_body.temperature", "already"),
    "model.attempts=0": ("model.attempts=0", "above 0"),
    "run_dir=~nobody-here/x": ("run_dir=~nobody-here/x", "no home"),
    "eval.protocol=loose": ("eval.protocol=loose", "strict, both_orders, release, user_disjoint"),
    "eval.split=dev": ("eval.split=dev", "train, val, test"),
    "psi.masking=none": ("psi.masking=none", "full, masked, history_dropout, mixed"),
    "masking.policy=some": ("masking.policy=some", "full, masked, history_dropout, mixed"),
    "curriculum.schedule=fast": (
        "curriculum.schedule=fast",
        "linear, cosine, step, self_paced, uniform, anti",
    ),
    "curriculum.hard_by=luck": ("curriculum.hard_by=luck", "hardness, history, scenario"),
    "curriculum.mining_samples=1": ("curriculum.mining_samples=1", "curriculum.mine=false"),
    "curriculum.hard_share_end=1.5": ("curriculum.hard_share_end=1.5", "at least 0 and at most 1"),
    "curriculum.suspect_weight=2": ("curriculum.suspect_weight=2", "at least 0 and at most 1"),
    "cre.resample=-1": ("cre.resample=-1", "at least 0"),
    "curriculum.hard_low=0.9": ("curriculum.hard_low=0.9", "curriculum.hard_high=0.75"),
    "eval.ind=many": ("eval.ind=many", "a number"),
    "eval.pro=-1": ("eval.pro=-1", "from 0"),
    "score.ind=0": ("score.ind=0", "above 0"),
    "cluster.max_failures=-1": ("cluster.max_failures=-1", "at least 0"),
    "score.pro=-1": ("score.pro=-1", "at least 0"),
    "eval.ind=[]": ("eval.ind=[]", "a number"),
    "eval.weights=[0,0]": ("eval.weights=[0.0, 0.0]", "one above 0"),
    "eval.weights=[1]": ("eval.weights=[1.0]", "two numbers"),
    "eval.weights=[-1,2]": ("eval.weights=[-1.0, 2.0]", "from 0"),
    "model.totals=summed": ("model.totals=summed", "declared, verified, code"),
    "eval.probe_kinds=[padded,poked]": ("eval.probe_kinds=poked", "swapped_history, empty_history"),
    "eval.probe_pairs=0": ("eval.probe_pairs=0", "above 0"),
    "eval.compare=[a]": ("eval.compare=['a']", "two run folders"),
    "psi.batch_size=0": ("psi.batch_size=0", "above 0"),
    "psi.max_steps=0": ("psi.max_steps=0", "above 0"),
    "psi.log_every=0": ("psi.log_every=0", "above 0"),
    "psi.score_weight=0": ("psi.score_weight=0", "above 0"),
    "psi.keep_checkpoints=1": ("psi.keep_checkpoints=1", "at least 2"),
    "psi.patience=2": ("psi.patience=2", "psi.evaluate_every"),
    "psi.evaluate_every=-1": ("psi.evaluate_every=-1", "at least 0"),
    "psi.learning_rate=-1": ("psi.learning_rate=-1", "above 0"),
    "data.history_size=-3": ("data.history_size=-3", "above 0"),
    "eval.seeds=0": ("eval.seeds=0", "above 0"),
    "cluster.nodes=0": ("cluster.nodes=0", "above 0"),
    "cluster.engines=0": ("cluster.engines=0", "above 0"),
    "cre.group_size=1": ("cre.group_size=1", "at least 2"),
    "cre.mini_batch_prompts=0": ("cre.mini_batch_prompts=0", "above 0"),
    "cluster.tensor_parallel=0": ("cluster.tensor_parallel=0", "above 0"),
    "cluster.zero_stage=4": ("cluster.zero_stage=4", "0, 1, 2, 3"),
    "cluster.gpu_memory_utilization=60": ("cluster.gpu_memory_utilization=60", "below 1"),
    "model.lora.rank=-8": ("model.lora.rank=-8", "at least 0"),
    "model.lora.dropout=1": ("model.lora.dropout=1", "below 1"),
    "data.max_train_pairs=0": ("data.max_train_pairs=0", "above 0, or null"),
    "sec.max_chains=0": ("sec.max_chains=0", "above 0, or null"),
    "psi.warmup_ratio=5": ("psi.warmup_ratio=5", "below 1"),
    "psi.min_learning_rate_ratio=2": ("psi.min_learning_rate_ratio=2", "at most 1"),
    "cre.rows=-5": ("cre.rows=-5", "above 0"),
    "cre.temperature=0": ("cre.temperature=0", "above 0"),
    "cre.clip_ratio=-1": ("cre.clip_ratio=-1", "above 0"),
    "cre.keep_checkpoints=0": ("cre.keep_checkpoints=0", "above 0"),
    "cre.save_every=-1": ("cre.save_every=-1", "at least 0"),
    "cre.mini_batch_prompts=12": ("a multiple of cre.mini_batch_prompts=12", "cre.mini_batch_prompts=8"),
    "cre.max_null_share=2": ("cre.max_null_share=2", "cre.max_null_share=2"),
    "curriculum.max_null_share=-1": ("curriculum.max_null_share=-1", "curriculum.max_null_share=-1"),
    "curriculum.prompts_per_step=17": ("curriculum.prompts_per_step=17", "curriculum.mini_batch_prompts=16"),
    "psi.batch_size=12": ("psi.batch_size=12", "psi.micro_batch_size", "the nearest is psi.batch_size=16"),
    "cre.micro_batch_size=3": ("must divide the 128 rollouts", "the nearest is cre.micro_batch_size=2"),
    "cluster.tensor_parallel=2": ("must divide the 1 processes", "nearest is cluster.tensor_parallel=1"),
    "teacher.tokens_per_minute=0": ("teacher.tokens_per_minute=0", "above 0"),
    "cluster.processes_per_node=3": ("psi.batch_size=8", "4 × 3"),
    "psi.sequence_parallel=2": ("psi.sequence_parallel=2", "psi.micro_batch_size=1"),
    "plan.mfu=5": ("plan.mfu=5", "at most 1"),
    "model.nano.layers=-3": ("model.nano.layers=-3", "above 0"),
    "psi.sequence_parallel=0": ("psi.sequence_parallel=0", "above 0"),
    "data.name=pairs": ("data.path=", "data=pairs"),
    "data.name=rmgap": ("data.path=", "data=rmgap"),
    "teacher.kind=vllm": ("teacher=vllm", "teacher.name"),
    "judge.kind=endpoint": ("judge=endpoint", "judge.base_url"),
    "judge.structured=xml": ("judge.structured=xml", "json_schema, json_object, none"),
    "teacher.max_in_flight=0": ("teacher.max_in_flight=0", "above 0"),
}


def test_a_sampling_of_one_chain_has_nothing_to_stop(hydra):
    keys_given = ("recipe=evaluate", "eval.adaptive=0.1", "eval.pro=4")
    assert load(*keys_given, "eval.ind=16").eval.adaptive == 0.1
    with pytest.raises(ConfigError, match=r"needs eval\.ind above 1"):
        load(*keys_given, "eval.ind=1")


def test_processes_that_share_a_sequence_divide_processes_and_batch(hydra):
    keys_given = ("recipe=psi", "psi.micro_batch_size=1", "cluster.processes_per_node=4")
    assert load(*keys_given, "psi.sequence_parallel=2", "psi.batch_size=6").psi.batch_size == 6
    for more, words in {
        ("psi.sequence_parallel=3",): r"must divide the 4 processes .* nearest is psi\.sequence_parallel=2",
        ("psi.sequence_parallel=2", "psi.packing=true"): "psi.packing must be false or null",
        ("psi.sequence_parallel=2", "psi.batch_size=7"): r"processes ÷ psi.sequence_parallel = 1 × 4 ÷ 2",
    }.items():
        with pytest.raises(ConfigError, match=words):
            load(*keys_given, *more)


def test_gpu_check_refuses_batches_that_do_not_divide_before_it_starts(hydra):
    for key in ("psi.batch_size=12", "cre.micro_batch_size=3"):
        with pytest.raises(ConfigError, match=key):
            load("recipe=gpu_check", key)
    assert load("recipe=gpu_check", "curriculum.micro_batch_size=3"), "it trains no curriculum"


def test_no_more_engines_than_gpus(hydra):
    keys_given = (
        "recipe=evaluate",
        "model=llama31_8b",
        "cluster=gpu8",
        "data=personaworld",
        "cluster.tensor_parallel=2",
    )
    assert load(*keys_given, "cluster.engines=4").cluster.engines == 4
    with pytest.raises(
        ConfigError, match=r"cluster.engines=5 of cluster.tensor_parallel=2 would take 10 GPUs of 8"
    ):
        load(*keys_given, "cluster.engines=5")


@pytest.fixture(scope="module")
def plain(hydra):
    return to_dict(load("recipe=pipeline"))


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_gives_one_sentence_that_names_its_key(override, plain):
    key, _, value = override.partition("=")
    changed = OmegaConf.create(plain)
    OmegaConf.update(changed, key, yaml.safe_load(value))
    with pytest.raises(ConfigError) as error:
        parse(changed)
    assert all(part in str(error.value) for part in MISTAKES[override]) and "\n" not in str(error.value)


def test_a_key_is_never_repeated(plain):
    for key in ("sk-proj-1", "gsk_abc1", "a1b2c3d4e5f6a7b8c9d0e1", "p@ss word"):
        changed = OmegaConf.create(plain)
        OmegaConf.update(changed, "judge.api_key_env", key)
        with pytest.raises(ConfigError) as error:
            parse(changed)
        assert key not in str(error.value)
        assert key not in (key_on_command_line([f"judge.api_key_env='{key}'"]) or key)
    for name in ("OPENAI_API_KEY", "my_key", "KEY2"):
        assert load("recipe=psi", f"judge.api_key_env={name}").judge.api_key_env == name
        assert key_on_command_line([f"judge.api_key_env={name}", "judge.name=sk-1", "seed=1"]) is None


def test_a_home_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(
        "recipe=evaluate",
        "run_dir='~/run'",
        "model.path='~/m'",
        "eval.compare=['~/a','~/b']",
        "score.input='~'",
    )
    assert (config.run_dir, config.model.path) == (f"{tmp_path}/run", f"{tmp_path}/m")
    assert config.eval.compare == [f"{tmp_path}/a", f"{tmp_path}/b"] and config.score.input == str(tmp_path)


def test_rows_are_picked_of_votes_only():
    votes = load("recipe=build_data", "data=chatbot_arena", "+data.only.type=single")
    assert votes.data.only == {"type": "single"}
    with pytest.raises(
        ConfigError, match=r"data\.only picks rows of votes, and data=prism is made of something else"
    ):
        load("recipe=build_data", "data=prism", "+data.only.type=single")


def test_the_oracle_knows_its_own_world_only():
    for section in ("teacher", "judge"):
        with pytest.raises(ConfigError, match=f"{section}=oracle knows data=personaworld only"):
            load("recipe=pipeline", *data_keys("pairs"), f"{section}=oracle")


@pytest.mark.parametrize(
    "override", ["psi.batch_siz=8", "modle.kind=nano", "psi.learning_rate=fast", "recipe=nope", "data=nope"]
)
def test_hydra_refuses_unknown_keys_choices_and_types(override):
    with pytest.raises(HydraException):
        load("recipe=pipeline", override)


@pytest.mark.parametrize("override", ["+psi.batch_siz=8", "++nothing=1", "+data.foo.bar=1"])
def test_a_plus_does_not_carry_a_key_past_the_schema(override):
    with pytest.raises(OmegaConfBaseException, match="not in"):
        load("recipe=pipeline", override)


def test_prototypes_are_read_for_hard_negatives_alone():
    with pytest.raises(
        ConfigError, match=r"curriculum\.prototypes is read by curriculum\.construct=true alone"
    ):
        load("recipe=curriculum", "curriculum.prototypes=runs/a/prototypes")


def test_a_self_paced_curriculum_needs_pass_rates():
    with pytest.raises(
        ConfigError, match=r"schedule=self_paced .* needs curriculum\.hard_by=hardness, not history"
    ):
        load("recipe=curriculum", "curriculum.schedule=self_paced", "curriculum.hard_by=history")


def test_free_dictionaries_take_keys():
    config = load(
        "recipe=build_data", *data_keys("pairs"), "+data.only.shared_context='True'", "+data.only.language=en"
    )
    assert config.data.only == {"shared_context": "True", "language": "en"}


def test_sizes_of_scaling():
    assert sizes(4) == (4,) and sizes([1, 4]) == (1, 4)
    assert (
        load("recipe=evaluate", "eval.ind=[1,8]").eval.ind == [1, 8]
        and load("recipe=evaluate", "eval.ind=2").eval.ind == 2
    )


@pytest.mark.parametrize(
    "given_keys,sentence",
    [
        (["model=baseline", "model.name=taller"], r"model\.name=taller is not one of random, longer"),
        (
            ["eval.baselines=[longer,bradly_terry]"],
            r"eval\.baselines=bradly_terry is not one of .*bradley_terry",
        ),
        (
            ["data=pairs", "data.path=x.parquet", "eval.baselines=[oracle]"],
            r"eval\.baselines=oracle knows data=personaworld only",
        ),
        (["model=callable", "model.name=score"], r"model\.name=score must be MODULE:FUNCTION"),
        (
            ["model=llama31_8b", "model.dtype=bfoat16"],
            r"model\.dtype=bfoat16 is not one of bfloat16, float32",
        ),
        (
            ["model=llama31_8b", "model.attention=flash"],
            r"model\.attention=flash is not one of sdpa, flash_attention_2, eager",
        ),
        (["model=endpoint", "model.name=x"], r"model=endpoint needs model\.base_url"),
        (
            ["model=endpoint", "model.name=x", "model.base_url=http://h", "model.prompt=judge2"],
            r"model\.prompt=judge2 is not one of p_genrm, judge",
        ),
        (
            ["model=llama31_8b", "model.prompt=persona"],
            r"model\.prompt=persona takes two calls and needs model=endpoint",
        ),
        (
            [
                "model=endpoint",
                "model.name=x",
                "model.base_url=http://h",
                "model.prompt=persona",
                "eval.split=train",
            ],
            "reads one history per user",
        ),
    ],
)
def test_models_to_evaluate_are_checked_before_anything_is_built(given_keys, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load("recipe=evaluate", *given_keys)


@pytest.mark.parametrize("model", ["endpoint", "reward_head", "callable"])
def test_models_without_training_are_for_evaluation_only(model):
    keys = [f"model={model}", "model.name=m:f", "model.base_url=http://h"]
    assert load("recipe=evaluate", *keys).model.kind == model
    with pytest.raises(
        ConfigError, match=rf"model={model} is for recipe=evaluate.*recipe=psi needs one with weights"
    ):
        load("recipe=psi", *keys)


def test_a_judges_prompt_is_no_prompt_to_train_with():
    with pytest.raises(ConfigError, match=r"model\.prompt=judge is for recipe=evaluate"):
        load("recipe=psi", "model.prompt=judge")


def test_every_baseline_that_may_be_named_is_one():
    config = load("recipe=evaluate")
    config.eval.baselines = ["unknown"]
    with pytest.raises(ConfigError) as refusal:
        scorers(config, [])
    assert set(str(refusal.value).partition("one of ")[2].split(", ")) == set(BASELINES)


def test_a_key_with_dashes_is_one_sentence():
    sentence = "--data.path=a b begins with a dash, and a key has none: 'data.path=a b'"
    assert key_with_dashes(["recipe=score", "--data.path=a b"]) == sentence
    assert (
        key_with_dashes(["-recipe", "score"]) == "-recipe begins with a dash, and a key has none: 'recipe=…'"
    )
    assert key_with_dashes(["recipe=score", "--cfg", "job", "--resolve", "-m", "run_dir=-x"]) is None
