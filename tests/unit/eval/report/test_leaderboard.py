"""The leaderboard: runs under every protocol, paired comparisons, and a page that runs no text of a run."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from eval.report.leaderboard import write_leaderboard
from pgenrm_train.config import load
from pgenrm_train.errors import ArtifactError, ConfigError
from recipes import evaluate
from recipes.results import leaderboard

ATTACK = "</script><script>alert(1)</script>\"'>"


def vote(user, number, split):
    """Of 30 users all but three prefer the longer answer."""
    texts = [f"a much longer answer {number}", f"short {number}"]
    chosen, rejected = texts if user % 10 else texts[::-1]
    row = {"user_id": f"u{user}", "context": f"question {number}", "split": split}
    return row | {"chosen": chosen, "rejected": rejected, "conversation_id": f"{user}-{number}"}


def evaluated(folder, name, *keys, questions=3):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"votes{questions}.jsonl"
    path.write_text(
        "".join(
            json.dumps(vote(user, number, "train" if number == 0 else "test")) + "\n"
            for user in range(30)
            for number in range(questions)
        )
    )
    evaluate.run(
        load(
            "recipe=evaluate",
            "data=pairs",
            f"data.path={path}",
            "model=baseline",
            f"model.name={name}",
            "eval.baselines=[]",
            "eval.draws=50",
            "eval.probes=false",
            "tracking=none",
            f"run_dir={folder / 'runs' / name}{questions if questions != 3 else ''}",
            *keys,
        )
    )


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.scripts, self.loads, self.now = [], [], [], None

    def handle_starttag(self, tag, attributes):
        self.now = tag
        attributes = dict(attributes)
        if tag == "tr" and "data-task" in attributes:
            self.rows.append(attributes)
        self.loads += [v for k, v in attributes.items() if k in ("src", "href") and v != "data:,"]
        self.loads += [k for k in attributes if k.startswith("on")]

    def handle_data(self, data):
        if self.now == "script" and data.strip():
            self.scripts.append(data)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for name in ("longer", "shorter", "user_length"):
        evaluated(folder, name)
    evaluated(folder, "longer", questions=4)
    results = folder / "runs" / "shorter" / "evaluate" / "results.json"
    edited = json.loads(results.read_text())
    edited["totals"] = "verified"
    results.write_text(json.dumps(edited))
    other = folder / "runs" / "ranks" / "evaluate"
    other.mkdir(parents=True)
    (other / "results.json").write_text(json.dumps({"data": "lampqa", "average": {}}))
    content = write_leaderboard([str(folder / "runs")], folder / "board", draws=50, seed=0)
    return folder, content


def test_every_run_stands_under_every_protocol(world):
    _, content = world
    rows = {(r["run"], r["protocol"]): r for r in content["results"]}
    assert len(rows) == 4 * 3
    assert rows["longer", "strict"]["accuracy"] == pytest.approx(0.9)
    assert rows["shorter", "release"]["totals"] == "verified" and rows["longer", "strict"]["users"] == 30
    assert [r["accuracy"] for r in content["results"]] == sorted(
        (r["accuracy"] for r in content["results"]), reverse=True
    )
    assert content["notes"] == ["ranks is left out: its results are no accuracies of votes."]


def test_only_runs_on_the_same_votes_and_totals_are_compared(world):
    _, content = world
    (row,) = content["comparisons"]
    assert {row["first"].partition(":")[0], row["second"].partition(":")[0]} == {"longer", "user_length"}
    assert row["pairs"] == 60 and row["p users, adjusted"] <= 1


def test_a_clear_difference_is_called_significant(tmp_path):
    for name in ("longer", "shorter"):
        evaluated(tmp_path, name)
    (row,) = write_leaderboard([str(tmp_path / "runs")], tmp_path / "board", draws=50, seed=0)["comparisons"]
    assert row["difference"] == pytest.approx(0.8) and row["verdict"] == "first is better"


def test_the_page_is_one_inert_file(world):
    folder, content = world
    page = (folder / "board" / "leaderboard.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert len(reader.rows) == len(content["results"]) + len(content["comparisons"]) and not reader.loads
    values = json.loads(reader.rows[0]["data-values"])
    assert values[0] == content["results"][0]["run"] and content["results"][0]["accuracy"] in values
    heads = re.findall(r'aria-sort="(\w+)"><span class="plain">([^<]+)', page)
    assert heads == [("descending", "accuracy"), ("ascending", "p users, adjusted")]
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert {r["data-protocol"] for r in reader.rows} == {"strict", "both_orders", "release"}


def test_texts_of_a_run_stay_text(tmp_path):
    evaluated(tmp_path, "longer")
    results = tmp_path / "runs" / "longer" / "evaluate" / "results.json"
    edited = json.loads(results.read_text()) | {"data": ATTACK, "totals": ATTACK}
    results.write_text(json.dumps(edited))
    write_leaderboard([str(tmp_path / "runs")], tmp_path / "board", draws=20, seed=0)
    page = (tmp_path / "board" / "leaderboard.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert page.count("<script>") == 1 and not reader.loads
    assert reader.rows[0]["data-task"] == ATTACK and ATTACK in json.loads(reader.rows[0]["data-values"])


def test_the_recipe_names_what_it_lacks(tmp_path):
    with pytest.raises(ConfigError, match=r"needs leaderboard\.runs=\[FOLDER,…\]"):
        leaderboard.run(load("recipe=leaderboard"))
    with pytest.raises(ArtifactError, match="holds no finished evaluation"):
        leaderboard.run(load("recipe=leaderboard", f"leaderboard.runs=[{tmp_path}]", f"run_dir={tmp_path}"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"protocols": {', "is not JSON"),
        ("[]", "its results are no accuracies of votes"),
        ('{"protocols": {}}', "lacks 'model'"),
    ],
)
def test_damaged_results_are_noted(tmp_path, content, said):
    for questions in (3, 4):
        evaluated(tmp_path, "longer", questions=questions)
    (tmp_path / "runs" / "longer" / "evaluate" / "results.json").write_text(content)
    made = write_leaderboard([str(tmp_path / "runs")], tmp_path / "board", draws=20, seed=0)
    assert {row["run"] for row in made["results"]} == {"longer4"}
    assert "longer is left out: " in made["notes"][0] and said in made["notes"][0]


def test_results_of_an_older_version_are_noted(tmp_path):
    evaluated(tmp_path, "longer")
    results = tmp_path / "runs" / "longer" / "evaluate" / "results.json"
    edited = json.loads(results.read_text())
    del edited["ties"]
    results.write_text(json.dumps(edited))
    made = write_leaderboard([str(tmp_path / "runs")], tmp_path / "board", draws=20, seed=0)
    assert not made["results"] and "lacks 'ties'; evaluate this run again" in made["notes"][0]


def test_a_run_without_predictions_is_noted(tmp_path):
    evaluated(tmp_path, "longer")
    (tmp_path / "runs" / "longer" / "evaluate" / "predictions.parquet").unlink()
    content = write_leaderboard([str(tmp_path / "runs")], tmp_path / "board", draws=20, seed=0)
    assert content["results"] == [] and "longer is left out" in content["notes"][0]
