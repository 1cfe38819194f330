"""The command line: fast help, one sentence per mistake, and no heavy import before a recipe runs."""

import errno
import os
import shlex
import sqlite3
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from pgenrm_train.__main__ import main, run_recipe
from pgenrm_train.cli_errors import explain
from pgenrm_train.config import ROOT, Config, as_typed, load

HEAVY = ("torch", "ray", "verl", "vllm", "transformers", "deepspeed", "wandb", "pandas", "sklearn")


def python(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def pgenrm(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    return python("-m", "pgenrm_train", *arguments, cwd=cwd, **variables)


def test_help_is_quick_and_lists_recipes_and_groups():
    seconds = []
    for _ in range(3):  # the best of a few, because other work on the machine slows some
        started = time.perf_counter()
        done = pgenrm("--help")
        seconds.append(time.perf_counter() - started)
        if seconds[-1] < 0.5:
            break
    assert done.returncode == 0 and done.stderr == ""
    for word in (
        "recipe",
        "pipeline",
        "build_sec",
        "personaworld",
        "llama31_8b",
        "gpu8",
        "run_dir=",
        "--cfg job",
    ):
        assert word in done.stdout
    assert min(seconds) < 1


def test_the_version_is_ours():
    assert pgenrm("--version").stdout.startswith("pgenrm-train 0.")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["recipe=pipeline", "--cfg", "job", "--resolve"], ["recipe=nope"]]
)
def test_nothing_heavy_is_imported_before_a_recipe_runs(arguments):
    code = (
        "import sys\nfrom pgenrm_train.__main__ import main\n"
        f"sys.argv = ['pgenrm_train', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    assert python("-c", code).stderr.splitlines()[-1] == "loaded: []"


def test_the_core_imports_nothing_heavy():
    core = (
        "chains.chain cluster.preflight.checks config curriculum.sampler errors files prompts.history "
        "prompts.masking prompts.messages prompts.writer records.pairs rewards.reward run.folder "
        "run.tracking scaling.combine stages.build_sec"
    )
    code = "".join(f"import pgenrm_train.{name}\n" for name in core.split())
    code += f"import sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


MISTAKES = {
    ("recipe=nope",): ("recipe=nope", "build_data", "pipeline", "psi"),
    (): ("recipe=", "pipeline"),
    ("recipe=psi", "cluter=cpu"): ("cluter", "did you mean cluster?"),
    ("recipe=psi", "data=nope"): ("data=nope", "personaworld, prism"),
    ("recipe=psi", "psi.learning_rat=1"): (
        "psi.learning_rat",
        "did you mean psi.learning_rate?",
        "batch_size",
    ),
    ("recipe=psi", "+psi.learning_rat=1"): ("psi.learning_rat", "did you mean psi.learning_rate?"),
    ("recipe=psi", "data.only.language=en"): ("+data.only.language=VALUE",),
    ("recipe=psi", "psi.batch_size=many"): ("psi.batch_size=many", "Integer"),
    ("recipe=psi", "eval.split=dev"): ("eval.split=dev", "train, val, test"),
    ("recipe=psi", "pipeline.budget=huge"): ("pipeline.budget=huge", "smoke, demo, full"),
    ("recipe=psi", "data=pairs"): ("data.path=",),
    ("recipe=psi", "model=8"): ("data=pairs", "recipe"),
    ("recipe=psi", "nonsense"): ("nonsense", "key=value"),
    ("recipe=psi", "data=pairs", "data.path=a=b.jsonl"): ("data.path=", """'data.path="a=b.jsonl"'"""),
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=lambda a: " ".join(a) or "no recipe")
def test_a_mistake_gives_one_sentence_and_exit_code_2(arguments, monkeypatch, capsys):
    if arguments[1:]:  # in this process, which is quicker
        for name, value in (("argv", ["pgenrm_train", *arguments]), ("path", [*sys.path])):
            monkeypatch.setattr(sys, name, value)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setattr("pgenrm_train.__main__.end_on_sigterm", lambda: None)
        code, (out, err) = main(), capsys.readouterr()
    else:
        done = pgenrm(*arguments)
        code, out, err = done.returncode, done.stdout, done.stderr
    assert code == 2 and out == ""
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert all(part in err for part in MISTAKES[arguments])


def compose_path(argument: str) -> str | None:
    return load("recipe=build_data", "data=pairs", argument).data.path


def parse_argument(argument: str) -> object:
    (override,) = OverridesParser.create().parse_overrides([argument])
    return override.value()


REFUSED = """[x].jsonl|{x}|f(1)|a(1).jsonl|a#b|a=b|=|a= b|it's|a"b|a"b'c|a\\"|a&b|a!b|a;b|`a`|a<b>"""
REFUSED += "|$a=b|\\'=|ü-видео.jsonl|日本語"


@pytest.mark.parametrize(
    ("read", "values"),
    [
        (compose_path, ("[x]", "{x: 1}", "range(1,3)", "a,b.jsonl", "a=b")),
        (parse_argument, REFUSED.split("|")),
    ],
    ids=["composed", "parsed"],
)
def test_the_quoting_that_an_error_names_gives_the_value(read, values):
    for value in values:
        with pytest.raises(HydraException) as error:
            read(f"data.path={value}")
        sentence = explain(error.value)
        assert "data.path=" in sentence and "Exception" not in sentence and "expecting" not in sentence
        command = sentence.split("for the shell: ")[1].removesuffix(", or give -m for one run per value")
        (argument,) = shlex.split(command)
        assert read(argument) == value


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("my votes.jsonl", "'my votes.jsonl' is not key=value"),
        ("+data.only.größe=3", "the key '+data.only.größe' may hold ASCII letters"),
        ("data.path=a\nb=c", "a text on the command line has no control character"),
    ],
)
def test_an_argument_that_no_quotes_mend_is_named(argument, sentence):
    with pytest.raises(HydraException) as error:
        parse_argument(argument)
    assert sentence in explain(error.value)


ONLY = "data.only= cannot take this value; its keys are set one by one, as in +data.only.KEY=VALUE"
EVAL = "eval= cannot take this value; its keys are set one by one, as in eval.KEY=VALUE"


@pytest.mark.parametrize("text", ["2024_11_30", "1.10", "true", "1e3", "-01", "nan", "+5", "0x10", "my 1.10"])
def test_a_text_stays_as_it_is_typed(text):
    arguments = (
        f"run_dir={text}",
        f"data.path={text}",
        f"model.name={text}",
        f"++eval.compare=[{text}, 1.0]",
    )
    config = load("recipe=build_data", "data=pairs", *arguments)
    assert (config.run_dir, config.data.path, config.model.name) == (text, text, text)
    assert config.eval.compare == [text, "1.0"]


def test_null_and_numbers_stay_what_they_are():
    config = load("recipe=build_data", "model.path=null", "seed=1_0")
    assert config.seed == 10 and config.model.path is None


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        *((f"{form}data.only={value}", ONLY) for form in ("", "+", "++") for value in ("x", "[a]", "")),
        ("data.only={a: b}", ONLY),
        ("eval=3", EVAL),
        ("+eval=3", EVAL),
        ("=x", "an argument is key=value, and one lacks the key"),
        ("data.path=${oc.env:NOPE}", "data.path= cannot be resolved: Environment variable 'NOPE' not found"),
        ("data.path=${nope.x}", "data.path= names the key nope.x, which does not exist"),
        ("data.path=${nope:x}", "data.path= cannot be resolved: unsupported interpolation type nope"),
        ("+seed=3", "seed has a value and takes no plus: seed=VALUE"),
        ("pipeline.budget=Smoke", "pipeline.budget=Smoke is not one of smoke, demo, full"),
        ("hydra/launcher=joblib", "hydra/launcher=joblib is not installed"),
        (
            "model=some/one-7b",
            "model=some/one-7b is not one of baseline, callable, endpoint, llama31_70b_lora, llama31_8b, "
            "nano, nano_1b, qwen3_8b, reward_head; "
            "a model of the hub is model=llama31_8b model.name=some/one-7b",
        ),
        (
            "eval.seeds=[1,2]",
            "eval.seeds=[1,2]: Value '[1, 2]' of type 'list' could not be converted to Integer",
        ),
    ],
)
def test_a_sentence_is_ours_and_gives_no_advice_that_fails(argument, sentence):
    with pytest.raises((HydraException, OmegaConfBaseException)) as error:
        load("recipe=evaluate", argument)
    assert explain(error.value) == sentence


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("run_dir=1.10,1.20", ["1.10", "1.20"]),
        ("run_dir=2024_11_30, runs/a,true", ["2024_11_30", "runs/a", "true"]),
        ("eval.compare=[1.10,x],[2_0]", [["1.10", "x"], ["2_0"]]),
        ("seed=1_0,2", [10, 2]),
    ],
)
def test_each_text_of_several_runs_stays_as_it_is_typed(argument, values):
    (override,) = OverridesParser.create().parse_overrides([as_typed(argument)])
    runs = [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
    assert [parse_argument(run) for run in runs] == values


def test_a_mistake_inside_a_stage_gives_one_sentence_too(tmp_path):
    done = pgenrm(
        "recipe=build_data",
        "data=pairs",
        "data.path=none.parquet",
        f"run_dir={tmp_path / 'run'}",
        "tracking=none",
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: none.parquet does not exist") and len(done.stderr.splitlines()) == 1


def test_a_working_directory_that_is_gone_is_one_sentence(tmp_path):
    code = (
        "import os, subprocess, sys\nos.rmdir(os.getcwd())\n"
        "sys.exit(subprocess.call([sys.executable, '-m', 'pgenrm_train', 'recipe=plan']))"
    )
    (tmp_path / "gone").mkdir()
    done = python("-c", code, cwd=tmp_path / "gone")
    assert done.returncode == 2 and done.stderr.startswith("error: the working directory does not exist")


@pytest.mark.parametrize(
    "arguments",
    ["--help", "recipe=psi --cfg job", "recipe=build_data data.users=3 data.heldout_users=2 tracking=none"],
)
def test_a_closed_pipe_ends_the_output_quietly(tmp_path, arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pgenrm_train", *arguments.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/pairs.parquet")


def during(first: Exception, later: Exception) -> Exception:
    """An error that arises while another one is handled."""
    try:
        try:
            raise first
        finally:
            raise later
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "while runs/x/pairs.parquet was written"),
        (OSError("[Errno 28] Error writing bytes. Detail: [errno 28] No space left on device"), "no space"),
        (sqlite3.OperationalError("database or disk is full"), "no space"),
        (during(FULL, sqlite3.ProgrammingError("Cannot operate on a closed database.")), "pairs.parquet"),
    ],
)
def test_a_full_disk_is_one_sentence(error, words):
    sentence = explain(error)
    assert sentence.startswith("no space is left on the disk") and words in sentence and "\n" not in sentence


def test_an_internal_error_keeps_its_traceback(tmp_path):
    """A bug of ours must not look like a mistake of the user."""
    code = (
        "import sys, types\n"
        "recipe = types.ModuleType('recipes.psi')\n"
        "def run(config): raise KeyError('a bug')\n"
        "recipe.run = run\nsys.modules['recipes.psi'] = recipe\n"
        "from pgenrm_train.__main__ import main\nsys.argv = ['pgenrm_train', 'recipe=psi']\nsys.exit(main())"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr


def test_the_composed_configuration_is_printed_resolved():
    """Settings may follow options; the output is UTF-8 under any locale."""
    style = 'teacher.name="größe 漢"'
    arguments = (
        "recipe=pipeline",
        "--cfg",
        "job",
        "pipeline.budget=smoke",
        "data.path=1.10",
        "--resolve",
        style,
    )
    done = pgenrm(*arguments, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and done.stderr == "" and "${" not in done.stdout
    shown = yaml.safe_load(done.stdout)
    assert shown["recipe"] == "pipeline" and shown["teacher"]["kind"] == "oracle"
    assert shown["data"]["path"] == "1.10" and shown["teacher"]["name"] == "größe 漢"
    assert shown["run_dir"] == "runs/personaworld-nano-smoke"


def test_a_run_from_another_directory_writes_there_and_leaves_nothing_else(tmp_path):
    arguments = ["recipe=build_data", "data.users=3", "data.heldout_users=2", "tracking=none"]
    done = pgenrm(*arguments, "run_dir=my run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["my run"]
    names = {p.name for p in (tmp_path / "my run" / "build_data").iterdir()}
    assert {"pairs.parquet", "card.json", "manifest.json", "config.yaml"} <= names
    before = (tmp_path / "my run" / "build_data" / "pairs.parquet").stat().st_mtime_ns
    again = pgenrm(*arguments, "run_dir=my run", cwd=tmp_path)
    assert again.returncode == 0 and "complete" in again.stdout
    assert (tmp_path / "my run" / "build_data" / "pairs.parquet").stat().st_mtime_ns == before
    other = pgenrm(*arguments, "run_dir=my run", "seed=1", cwd=tmp_path)
    assert other.returncode == 2 and "seed: 0 → 1" in other.stderr and len(other.stderr.splitlines()) == 1


def test_multirun_gives_each_job_its_own_folder(tmp_path):
    arguments = [
        "-m",
        "recipe=build_data",
        "seed=1,2",
        "data.users=3",
        "data.heldout_users=2",
        "tracking=none",
    ]
    done = pgenrm(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (runs,) = tmp_path.iterdir()
    names = sorted(p.parent.parent.relative_to(runs).as_posix() for p in runs.rglob("pairs.parquet"))
    assert names == ["personaworld-nano-demo/job-0", "personaworld-nano-demo/job-1"]


@pytest.mark.parametrize(
    "arguments", [("data=pairs", "seed=1,2"), ("data.nope=1,2",)], ids=["every run", "the sweep"]
)
def test_a_refused_multirun_leaves_nothing(tmp_path, arguments):
    done = pgenrm("-m", "recipe=build_data", *arguments, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 2 and "error: " in done.stderr
    assert not list(tmp_path.iterdir())


def test_on_a_cluster_paths_mean_the_same_to_every_worker(monkeypatch):
    configs = []
    monkeypatch.setitem(sys.modules, "recipes.probe", types.SimpleNamespace(run=configs.append))
    config = Config(recipe="probe", run_dir="runs/mine")
    run_recipe(config)
    assert configs[-1].run_dir == "runs/mine"
    config.ray.address, config.model.path = "head:6379", "start"
    run_recipe(config)
    assert (configs[-1].run_dir, configs[-1].model.path) == (
        str(Path("runs/mine").absolute()),
        str(Path("start").absolute()),
    )


def test_public_names_do_not_depend_on_the_order_of_imports():
    code = (
        "import pgenrm_train.rewards.reward, pgenrm_train.chains.chain, pgenrm_train.records.rows\n"
        "import eval.metrics.accuracy\n"
        "from pgenrm_train import PreferencePair, chain_reward, parse_chain, read_pairs\n"
        "from pgenrm_train.rewards import chain_reward as again\n"
        "from eval.metrics import accuracy_report\n"
        "assert callable(accuracy_report) and again is chain_reward\n"
        "print([name.__name__ for name in (PreferencePair, chain_reward, parse_chain, read_pairs)])"
    )
    assert (
        python("-c", code).stdout.strip() == "['PreferencePair', 'chain_reward', 'parse_chain', 'read_pairs']"
    )


def test_the_package_alone_imports_none_of_its_parts():
    code = (
        "import sys, pgenrm_train\nprint([name for name in sys.modules if name.startswith('pgenrm_train.')])"
    )
    assert python("-c", code).stdout.strip() == "['pgenrm_train.lazy']"
