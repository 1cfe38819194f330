"""Results as the Hugging Face hub reads them: a model card with `model-index`, and `.eval_results/`.

Both hold the headline of every evaluation.  The hub shows `model-index` for any data set; a file of
`.eval_results/` counts only where the data set registered a task of that name (in its `eval.yaml`).
No dates or machine paths, so that the same run writes the same files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from eval.report.leaderboard import Entry
from eval.report.report import Row, markdown_table, plain

LIMITS = "## Limits"
UNMEASURED = "This card holds no accuracy: `recipe=evaluate` measures it"
MEASURED = (
    "The accuracies above hold for these data, protocols and samples; `recipe=evaluate` measures others"
)


def card_with_results(
    card: str,
    name: str,
    entries: Sequence[Entry],
    hubs: Mapping[str, str],
    licence: str | None,
    source: str | None,
) -> str:
    """The checkpoint's card with `model-index`, a section of results, and the limits of what was measured.

    `hubs`: name of the data → id of the data set on the hub.  `source`: a link to the evaluation.
    """
    loaded = ModelCard(card, ignore_metadata_errors=True)
    known = {key: value for key, value in loaded.data.to_dict().items() if key != "model-index"}
    known |= {"license": licence} if licence else {}
    ids = sorted({hubs[entry.results["data"]] for entry in entries if entry.results["data"] in hubs})
    data = ModelCardData(
        **known,
        model_name=name,
        datasets=ids or None,
        metrics=["accuracy"],
        eval_results=[result for entry in entries for result in _index(entry, hubs, source)] or None,
    )
    before, _, limits = loaded.text.partition(LIMITS)
    limits = limits.strip() or f"{MEASURED}."
    measured = f"{before.rstrip()}\n\n## Evaluation\n\n{_section(entries)}\n\n{LIMITS}\n\n{limits}"
    text = measured if entries else loaded.text
    text = text.replace(UNMEASURED, MEASURED) if entries else text
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"))


def eval_results(entries: Sequence[Entry], hubs: Mapping[str, str], source: str | None) -> dict[str, str]:
    """File name → YAML of `.eval_results/`, for the data that are on the hub."""
    files: dict[str, list[EvalResultEntry]] = {}
    for entry in entries:
        data = str(entry.results["data"])
        if data not in hubs or entry.results["accuracy"] is None:
            continue
        files.setdefault(f"{data}.yaml", []).append(
            EvalResultEntry(
                dataset_id=hubs[data],
                task_id=data,
                value=round(entry.results["accuracy"], 6),
                source_url=source,
                notes=_notes(entry),
            )
        )
    return {
        name: yaml.safe_dump(eval_result_entries_to_yaml(of_file), sort_keys=False, allow_unicode=True)
        for name, of_file in files.items()
    }


def _index(entry: Entry, hubs: Mapping[str, str], source: str | None) -> list[EvalResult]:
    results, data = entry.results, str(entry.results["data"])
    values: dict[str, Any] = {"accuracy": results["accuracy"]}
    values |= {name: measure["accuracy"] for name, measure in (results.get("measures") or {}).items()}
    return [
        EvalResult(
            task_type="text-ranking",
            dataset_type=hubs.get(data, data),
            dataset_name=entry.key["task"],
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"{name.replace('_', ' ')}, {results['protocol']} protocol",
            metric_value=round(value, 6),
            metric_args=_arguments(entry) if name == "accuracy" else None,
            source_name="evaluation" if source else None,
            source_url=source,
        )
        for name, value in values.items()
        if value is not None
    ]


def _arguments(entry: Entry) -> dict[str, Any]:
    results = entry.results
    return {
        "ci95": [round(bound, 6) for bound in results["ci95"]],
        "pairs": results["n_pairs"],
        "users": results["n_users"],
        "ind": results.get("ind", 1),
        "pro": results.get("pro", 0),
        "totals": entry.key["totals"],
    }


def _notes(entry: Entry) -> str:
    results = entry.results
    low, high = (f"{100 * bound:.1f}" for bound in results["ci95"])
    return (
        f"{results['protocol']} protocol; Ind-{results.get('ind', 1)}, Pro-{results.get('pro', 0)}; 95 % "
        f"interval over users {low} to {high} %; {results['n_pairs']} pairs of {results['n_users']} users; "
        f"totals {entry.key['totals']}"
    )


def _section(entries: Sequence[Entry]) -> str:
    rows = [_row(entry) for entry in entries]
    notes = [
        note for entry in entries for note in (entry.results["ci95_note"], *entry.results["notes"]) if note
    ]
    text = (
        "Accuracy of the chosen response against the rejected one on held-out votes, with a 95 % interval "
        "that resamples users. A ceiling is the accuracy of the best reader of the same prompt, where known."
    )
    listed = "\n".join(f"- {plain(str(note))}" for note in dict.fromkeys(notes))
    return "\n\n".join(part for part in (text, markdown_table(rows), listed) if part)


def _row(entry: Entry) -> Row:
    results = entry.results
    stage = (results.get("stages") or {}).get(results["model"], {})
    row: dict[str, object] = {
        "task": entry.key["task"],
        "protocol": results["protocol"],
        "samples": f"Ind-{results.get('ind', 1)}, Pro-{results.get('pro', 0)}",
        "accuracy": results["accuracy"],
        "ci95": results["ci95"],
        "ceiling accuracy": stage.get("ceiling"),
    }
    for name, measure in (results.get("measures") or {}).items():
        row |= {f"{name.replace('_', ' ')} accuracy": measure["accuracy"]}
    return row | {
        "pairs": results["n_pairs"],
        "users": results["n_users"],
        "ties": results["ties"],
        "failures": sum(results["failures"].values()),
    }
