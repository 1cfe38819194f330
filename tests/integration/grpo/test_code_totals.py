"""`model.totals=code` through veRL and vLLM: CRE, then the evaluation of its checkpoint.

The start is the shipped checkpoint under a manifest of totals=code.  It has learnt to write totals, so there
is something to stop, to mask and to recompute.  A temperature above 1 gives chains without a readable rubric.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import trained_tokens

from pgenrm_train.chains.chain import JSON_END, JSON_START, Chain, parse_chain
from pgenrm_train.chains.totals import STOP
from pgenrm_train.config import ROOT, Totals
from pgenrm_train.run.checkpoints import totals_of, write_manifest

STEPS, PROMPTS, GROUP = 2, 8, 8
FORMAT_ERROR = -0.1
BOTH = """
import sys
from pgenrm_train.config import load
from recipes import cre, evaluate
from recipes.wiring import grpo
grpo.RULE_JUDGE = "trained_tokens:judge"
start, *words = sys.argv[1:]
cre.run(load("recipe=cre", f"model.path={start}", *words))
evaluate.run(load("recipe=evaluate", *words))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of CRE and an evaluation; no setting names the kind of totals."""
    folder = tmp_path_factory.mktemp("code")
    start = shutil.copytree(ROOT / "tests/data/psi_nano", folder / "start")
    write_manifest(start, Totals.CODE)
    words = [
        str(start), "pipeline.budget=smoke", f"run_dir={folder / 'run'}", "tracking=none",
        "data.users=20", "data.heldout_users=12", "data.max_test_pairs=40",
        f"cre.steps={STEPS}", f"cre.prompts_per_step={PROMPTS}", f"cre.mini_batch_prompts={PROMPTS}",
        f"cre.group_size={GROUP}", "cre.micro_batch_size=32", "cre.validate_every=0", "cre.temperature=1.3",
        "eval.ind=1", "eval.pro=0", "eval.one_pair_ind=[]", "eval.one_pair_pro=[]", "eval.probes=false",
        "eval.baselines=[random]", "eval.draws=100", "eval.temperature=1.3",
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(Path(trained_tokens.__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", BOTH, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder / "run"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "tests/data/psi_nano")


@pytest.fixture(scope="module")
def chains(run: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """What the actor was trained on, with the text of each chain."""
    lines = [json.loads(line) for line in (run / "cre" / trained_tokens.FILE).read_text().splitlines()]
    assert len(lines) == STEPS * PROMPTS * GROUP
    return [line | {"text": tokenizer.decode(line["responses"])} for line in lines]


def own_sums(text: str) -> list[float] | None:
    """Totals of a rubric in the written grammar, added up here; None where it is not complete."""
    rationale = text.rpartition('"rationale": "')[2]
    head, *lines = re.split(r"\. Response \d: ", rationale)
    names, weights = zip(*re.findall(r"(\w+) (\d+)%", head), strict=True) if "%" in head else ((), ())
    rows = [re.findall(r"(\w+) (\d+)\b", line.partition(" = ")[0]) for line in lines]
    total = sum(map(int, weights))
    if len(rows) != 2 or any(tuple(name for name, _ in row) != names for row in rows) or not total:
        return None
    return [sum(int(w) * int(s) for w, (_, s) in zip(weights, row, strict=True)) / total for row in rows]


def chosen_of(run: Path) -> dict[str, int]:
    """The prompt's place in its step → index of the chosen response."""
    rows = pq.read_table(run / "cre/rows.parquet")["reward_model"].to_pylist()
    batches = [json.loads(line) for line in (run / "cre/batches.jsonl").read_text().splitlines()]
    return {
        f"s{batch['step']}p{place:05d}": int(rows[row]["ground_truth"])
        for batch in batches
        for place, row in enumerate(batch["rows"])
    }


def test_generation_stops_before_the_closing_block(chains: list[dict[str, Any]]) -> None:
    stopped = [chain for chain in chains if STOP in chain["text"]]
    assert len(stopped) > len(chains) / 2, "this model closes its chains unless it is stopped"
    for chain in stopped:
        assert JSON_END not in chain["text"]
        assert not re.search("[0-9][,.}]", chain["text"].partition(STOP)[2]), "no total follows"


def test_the_update_has_no_loss_on_totals(chains: list[dict[str, Any]], tokenizer: Any) -> None:
    """Masks and advantages as they are in TransferQueue when the actor reads them."""
    masked = 0
    for chain in chains:
        assert chain["response_mask"] == chain["loss_mask"]
        size = sum(chain["response_mask"])
        assert chain["response_mask"] == [1] * size + [0] * (len(chain["responses"]) - size)
        assert not any(chain["advantages"][size:])
        trained = tokenizer.decode(chain["responses"][:size])
        _, block, rubric = trained.rpartition(JSON_START)  # at this temperature some chains have no block
        assert not (block and re.search(r"[0-9] = [0-9]|better_response", rubric))
        masked += size < len(chain["responses"])
    assert masked > len(chains) / 2
    assert any(any(chain["advantages"]) for chain in chains)


def test_rewards_follow_the_recomputed_sums(run: Path, chains: list[dict[str, Any]]) -> None:
    chosen, contradicted = chosen_of(run), 0
    for chain in chains:
        reward, sums = chain["reward"], own_sums(chain["text"])
        if reward["failure"] is not None:
            continue
        assert sums is not None, chain["text"]
        first = chosen[chain["key"].partition("_")[0]]
        assert reward["outcome"] == (sums[first] > sums[1 - first])
        assert reward["total"] == pytest.approx(reward["outcome"] + 0.5 * reward["process"])
        written = [float(total) for total in re.findall(r" = (\d+\.\d+)", chain["text"])]
        contradicted += len(written) == 2 and (written[first] > written[1 - first]) != reward["outcome"]
    assert contradicted, "no written total decided"


def test_chains_without_a_rubric_are_counted_as_such(run: Path, chains: list[dict[str, Any]]) -> None:
    failures = Counter(chain["reward"]["failure"] for chain in chains)
    assert failures["unverified"] > 0
    failed = [chain for chain in chains if chain["reward"]["failure"]]
    assert {chain["reward"]["total"] for chain in failed} == {FORMAT_ERROR}
    assert all(sum(chain["rm_scores"]) == pytest.approx(FORMAT_ERROR) for chain in failed)
    metrics = [json.loads(line) for line in (run / "cre/metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        kinds = [chain["reward"]["failure"] for chain in chains if chain["step"] == line["step"]]
        in_form = kinds.count(None) + kinds.count("unverified")
        share = kinds.count("unverified") / in_form
        assert line["cre/signs/unverifiable_share"] == pytest.approx(share)
        assert line["cre/signs/faithful_share"] == 1
    assert len(metrics) == STEPS


def test_the_evaluation_reads_the_kind_from_the_checkpoint(run: Path) -> None:
    """Its answers are closed by the program, and its failures have their own kind."""
    assert totals_of(run / "cre/checkpoint") is Totals.CODE
    results = json.loads((run / "evaluate/results.json").read_text())
    assert results["totals"] == "code" and results["failures"]["unverified"] > 0
    answers = pd.read_parquet(run / "evaluate/predictions.parquet")
    answers = answers[(answers["model"] == "cre") & (answers["set"] == "own")]
    readable = answers[answers["failure"].isna()]
    assert len(readable) > len(answers) / 2
    for row in readable.to_dict("records"):
        chain = parse_chain(row["text"])
        assert isinstance(chain, Chain) and "declared_differs" not in chain.issues
        scores = [row["score_chosen"], row["score_rejected"]]
        assert list(chain.scores) == (scores if row["order"] == 0 else scores[::-1])
        assert list(chain.scores) == pytest.approx(own_sums(row["text"]))
    assert (answers["failure"] == "unverified").sum() == results["failures"]["unverified"]
