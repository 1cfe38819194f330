"""recipe=publish: the hub's own types read every file back, and a commit holds exactly what was listed."""

import json
import shutil

import datasets
import jsonschema
import pyarrow.parquet as pq
import pytest
import yaml
from benchmark_files import rewardbench
from hub_server import serve
from huggingface_hub import DatasetCard, ModelCard, parse_eval_result_entries

from pgenrm_train.config import ROOT, load
from pgenrm_train.errors import ArtifactError, BackendError, ConfigError
from pgenrm_train.records import read_pairs
from recipes import evaluate
from recipes.results import publish

SCHEMA = json.loads((ROOT / "tests/data/eval_results.schema.json").read_text())
CARD = """---
library_name: transformers
tags:
- reward-model
---

# nano, cre

Training: GRPO.

## Limits

This card holds no accuracy: `recipe=evaluate` measures it on held-out users.
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint, built pairs, and evaluations of them and of a task."""
    folder = tmp_path_factory.mktemp("publish")
    rows = [
        {"user_id": f"u{n % 5}", "context": f"q{n}", "chosen": "long " * (n + 2), "rejected": f"no {n}"}
        | {"split": "test" if n > 9 else "train", "conversation_id": f"c{n}"}
        for n in range(20)
    ]
    (folder / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ("model=baseline", "model.name=longer", "tracking=none", "eval.draws=20", "eval.baselines=[]")
    run_dir = f"run_dir={folder / 'run'}"
    votes = (f"data.path={folder / 'votes.jsonl'}", "eval.probes=false")
    evaluate.run(load("recipe=evaluate", "data=chatbot_arena", *votes, *keys, run_dir))
    task = ("eval.tasks=[personalized_rewardbench]", "eval.probes=false")
    path = f"+eval.task_paths.personalized_rewardbench={rewardbench(folder / 'prb')}"
    evaluate.run(load("recipe=evaluate", *task, path, *keys, run_dir))
    shutil.copytree(ROOT / "tests/data/psi_nano", folder / "checkpoint")
    (folder / "checkpoint" / "README.md").write_text(CARD)
    return folder


def go(folder, *keys, repo="us/nano-cre"):
    config = load(
        "recipe=publish",
        "data=chatbot_arena",
        f"run_dir={folder / 'run'}",
        f"model.path={folder / 'checkpoint'}",
        f"publish.repo={repo}",
        *keys,
    )
    publish.run(config)
    return folder / "run" / "publish"


def test_the_card_comes_back_through_the_hub_s_types(run, capsys):
    made = go(run, "publish.license=apache-2.0", "publish.source_url=https://example.org/run")
    card = ModelCard.load(made / "model" / "README.md")
    results = {
        result.dataset_type: result for result in card.data.eval_results if "accuracy" in result.metric_name
    }
    assert set(results) == {"MichaelR207/chatbot_arena_personalized_0125", "QiyaoMa/Personalized-RewardBench"}
    ours = results["MichaelR207/chatbot_arena_personalized_0125"]
    assert (ours.metric_value, ours.metric_name) == (1.0, "accuracy, strict protocol")
    assert ours.metric_args == {
        "ci95": [1.0, 1.0],
        "pairs": 10,
        "users": 5,
        "ind": 1,
        "pro": 0,
        "totals": "declared",
    }
    assert ours.source_url == "https://example.org/run" and card.data.license == "apache-2.0"
    assert card.data.model_name == "nano-cre" and card.data.library_name == "transformers"
    text = card.text
    assert text.index("Training: GRPO.") < text.index("## Evaluation") < text.index("## Limits")
    assert "personalized\\_rewardbench@1" in text and "holds no accuracy" not in text
    assert "too few for an interval" in text and str(run) not in str(card)
    assert "dry run: nothing was uploaded" in capsys.readouterr().out


def test_a_checkpoint_without_a_card_gets_one_with_results_and_limits(run, tmp_path):
    shutil.copytree(run / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "README.md").unlink()
    card = ModelCard.load(go(run, f"model.path={tmp_path / 'checkpoint'}") / "model" / "README.md")
    assert "## Evaluation" in card.text and card.text.endswith("`recipe=evaluate` measures others.\n")
    assert len(card.data.eval_results) > 1


def test_eval_results_come_back_and_fit_the_schema(run):
    made = go(run, "publish.source_url=https://example.org/run")
    files = sorted((made / "model" / ".eval_results").iterdir())
    assert [file.name for file in files] == ["chatbot_arena.yaml", "personalized_rewardbench.yaml"]
    for file in files:
        entries = yaml.safe_load(file.read_text())
        jsonschema.validate(entries, SCHEMA)
        (entry,) = parse_eval_result_entries(entries)
        assert entry.task_id == file.stem and entry.value == 1.0 and "strict protocol; Ind-1" in entry.notes
        assert entry.source_url == "https://example.org/run"


def test_the_same_run_writes_the_same_files(run):
    texts = [{p: p.read_bytes() for p in go(run).rglob("*") if p.is_file()} for _ in range(2)]
    assert texts[0] == texts[1]


def test_an_upload_commits_what_was_listed(run, monkeypatch):
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        made = go(run, "publish.dry_run=false", "publish.dataset_repo=us/votes")
    model, dataset = json.loads((made / "files.json").read_text())
    assert set(hub.files["models/us/nano-cre"]) == {file["path"] for file in model["files"]}
    assert set(hub.files["datasets/us/votes"]) == {file["path"] for file in dataset["files"]}
    weights = hub.files["models/us/nano-cre"]["model.safetensors"]
    assert weights == (run / "checkpoint" / "model.safetensors").read_bytes()
    assert b"## Evaluation" in hub.files["models/us/nano-cre"]["README.md"]
    assert [repo["name"] for repo in hub.repos] == ["nano-cre", "votes"]
    assert all("private" in (repo.get("private") and "private", repo.get("visibility")) for repo in hub.repos)
    assert hub.tokens == {"Bearer hf_secret"}
    assert "CC BY" in DatasetCard(hub.files["datasets/us/votes"]["README.md"].decode()).text


def test_datasets_reads_the_pairs_of_a_copy_and_never_those_of_an_older_one(run, tmp_path):
    _, dataset = json.loads((go(run, "publish.dataset_repo=us/votes") / "files.json").read_text())
    assert {".build/card.json", ".build/leaks.json"} < {file["path"] for file in dataset["files"]}
    built, copy = run / "run" / "build_data", tmp_path / "votes"
    sources = {file["path"]: built / file["path"].removeprefix(".build/") for file in dataset["files"]}
    for path, source in sources.items():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy / path)
    for rows in (None, 1):
        for part in (copy / "pairs.parquet").iterdir() if rows else ():
            pq.write_table(pq.read_table(part).slice(0, rows), part)
        loaded = datasets.load_dataset(str(copy), split="train", cache_dir=str(tmp_path / "cache"))
        assert "chosen" in loaded.column_names
        assert len(loaded) == (rows or sum(1 for _ in read_pairs(built / "pairs.parquet")))


def test_a_dry_run_and_a_missing_token_upload_nothing(run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        go(run, "publish.weights=false")
        with pytest.raises(ConfigError, match="needs a token with write access in HF_TOKEN"):
            go(run, "publish.dry_run=false")
    assert not hub.repos and not hub.files
    listed = json.loads((run / "run" / "publish" / "files.json").read_text())[0]["files"]
    assert not any("safetensors" in file["path"] for file in listed)


def test_a_refusing_hub_ends_in_one_sentence(run, monkeypatch):
    with serve() as hub:
        hub.fails = True
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        with pytest.raises(BackendError, match="the upload to us/nano-cre failed") as failure:
            go(run, "publish.dry_run=false")
    assert "hf_secret" not in str(failure.value)


def test_what_is_missing_is_named(run, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"needs publish\.repo=NAMESPACE/NAME"):
        publish.run(load("recipe=publish"))
    for key in ("repo", "dataset_repo"):
        for name in ("a b/c", "one/two/three", "alone", "us/x--y"):
            with pytest.raises(ConfigError, match=rf"publish\.{key}={name} must be NAMESPACE/NAME"):
                publish.run(load("recipe=publish", "publish.repo=us/m", f"publish.{key}='{name}'"))
    shutil.copytree(run / "checkpoint", tmp_path / "checkpoint")
    made = go(tmp_path)
    assert "holds no finished evaluation" in capsys.readouterr().out
    assert "holds no accuracy" in (made / "model" / "README.md").read_text()
    with pytest.raises(ArtifactError, match=r"publish\.dataset_repo needs built pairs"):
        go(tmp_path, "publish.dataset_repo=us/votes")
