"""The tables of a demo in README.md and docs/results.md, from its results.json and timeline.json.

python benchmarks/learning/demo_tables.py runs/personaworld-nano-demo
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgenrm_train.config import TRAINED
from pgenrm_train.files import read_json
from pgenrm_train.run import timeline

NAMES = {"psi": "after PSI", "cre": "after CRE", "curriculum": "after the curriculum"}
BASELINES = ("random", "longer", "oracle")
KINDS = ("easy", "hard", "medium", "rival")
ERRORS = (
    ("accuracy by the totals that count", "accuracy"),
    ("accuracy by recomputed totals", "verified accuracy"),
    ("totals that are the rubric's own sums", "faithful share"),
    ("readable chains whose totals can be recomputed", "verifiable share"),
    ("pairs with another verdict in the other order", "order flip rate"),
    ("verdicts that change without the heaviest criterion", "heaviest decides share"),
)
TRUTH = (
    ("earlier votes restated right", "votes share"),
    ("responses described right", "responses share"),
    ("criterion scores that fit", "scores share"),
    ("the user's criteria named", "criteria recalled share"),
    ("chains whose criteria, in their order, the votes allow", "criteria allowed share"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    results = read_json(run / "results.json")
    for part in (accuracies(results), gains(results), scaling(results), control(results), errors(results)):
        print("\n".join(part), end="\n\n")
    print("\n".join(ceilings(results)), end="\n\n")
    print("\n".join(table(timeline.rows(timeline.seconds_by_part(run)))))


def cell(record: Mapping[str, Any], key: str = "accuracy") -> str:
    """Percent, with the interval if there is one that is not a point."""
    value, interval = record[key], record.get("ci95" if key == "accuracy" else f"{key} ci95")
    if value is None:
        return ""
    if not interval or interval[0] == interval[1]:
        return f"{100 * value:.1f}"
    return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def signed(record: Mapping[str, Any], key: str = "difference") -> str:
    low, high = record["ci95" if key == "difference" else f"{key} ci95"]
    return f"{100 * record[key]:+.1f} [{100 * low:.1f}, {100 * high:.1f}]".replace("-", "−")


def table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def accuracies(results: Mapping[str, Any]) -> list[str]:
    everyone = {name: results["stages"][name] for name in TRAINED}
    everyone |= {name: results["baselines"][name] for name in BASELINES}
    probes = results["probe_swapped_history"]
    rows = []
    for name, report in everyone.items():
        slices, probe = report["slices"], probes[name]
        kinds = {kind: cell(slices[kind]) for kind in ("easy", "hard", "rival")}
        twins = {"two users disagree": cell(probe["own"]), "other's history": cell(probe["swapped"])}
        greedy = {"greedy": cell(found) if (found := report.get("greedy")) else ""}
        rows.append({"": NAMES.get(name, name), "all": cell(report), **greedy, **kinds, **twins})
    return table(rows)


def gains(results: Mapping[str, Any]) -> list[str]:
    return table(
        [
            {"": f"{row['from']} → {row['to']}"}
            | {kind: signed(row, f"{kind} difference") for kind in ("all", "greedy", *KINDS)}
            for row in results["gains"]
        ]
    )


def scaling(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for study, cells in results["grids"].items():
        for row in cells:
            gain = next((key for key in row if key.endswith("difference")), None)
            rows.append(
                {"study": study, "own": row["ind"], "similar": row["pro"], "accuracy": cell(row)}
                | {"gain": signed(row, gain) if gain and row.get(f"{gain} ci95") else ""}
            )
    return table(rows)


def control(results: Mapping[str, Any]) -> list[str]:
    rows = [
        {"study": study, "own": row["ind"], "similar": row["pro"]}
        | {key: cell(row, key) for key in row if key.endswith("accuracy")}
        | {key: signed(row, key) for key in row if key.endswith("difference")}
        for study, cells in results["similar_against_random"].items()
        for row in cells
    ]
    return table(rows) if rows else []


def errors(results: Mapping[str, Any]) -> list[str]:
    by_name = [{row["model"]: row for row in results[key]} for key in ("chain_errors", "chain_truth")]
    rows = [
        {"": text, **{NAMES[name]: cell(facts[name], key) for name in TRAINED}}
        for facts, wanted in zip(by_name, (ERRORS, TRUTH), strict=True)
        for text, key in wanted
    ]
    quality = "weight of quality, %"
    rows.append(
        {"": "mean weight of quality", **{NAMES[n]: f"{by_name[1][n][quality]:.1f}" for n in TRAINED}}
    )
    return table(rows)


def ceilings(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for name in TRAINED:
        report = results["stages"][name]
        way = (report["accuracy"] - 0.5) / (report["ceiling"] - 0.5)
        rows.append(
            {
                "": NAMES[name],
                "ceiling": f"{100 * report['ceiling']:.1f}",
                "distance from chance, %": f"{100 * way:.0f}",
            }
        )
    return table(rows)


if __name__ == "__main__":
    main()
