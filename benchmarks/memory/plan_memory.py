"""Error of `recipe=plan`: predicted against measured peak memory of PSI's steps on this CPU.

Each case runs the engine itself (transformers' Trainer on DeepSpeed) in a process of its own, on chats of
one length. Measured is the rise of the process's peak resident memory over that of the loaded libraries,
before the model is made. Predicted is the plan's sum of weights, gradients, optimizer, activations and
logits.  Sizes are nano's with larger matrices, so that tensors dominate and not libraries.

    python benchmarks/memory/plan_memory.py            # about a minute on two cores
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pgenrm_train.cluster.planning.geometry import read_geometry
from pgenrm_train.cluster.planning.memory import psi_phases
from pgenrm_train.config import ROOT, Config, load

NANO = {"layers": 6, "hidden": 256, "heads": 4, "intermediate": 1024}
CASES = {  # name → (overrides of the shipped nano configuration)
    "nano as shipped": {},
    "larger": {f"model.nano.{k}": v for k, v in NANO.items()},
    "larger, checkpointing": {f"model.nano.{k}": v for k, v in NANO.items()}
    | {"psi.gradient_checkpointing": "true"},
}
WORDS = [
    "calm",
    "brief",
    "proof",
    "warm",
    "plain",
    "exact",
    "long",
    "source",
    "kind",
    "sharp",
    "idea",
    "table",
    "list",
    "note",
]


def config_of(case: str, folder: Path) -> Config:
    overrides = [f"{key}={value}" for key, value in CASES[case].items()]
    return load(
        "recipe=psi",
        "psi.max_steps=2",
        "psi.epochs=1",
        "psi.save_every=1000",
        f"run_dir={folder}",
        "tracking=none",
        *overrides,
    )


def chats(config: Config) -> list[list[dict[str, str]]]:
    """Chats whose prompts and answers are at the model's limits, as the plan assumes."""
    prompt = " ".join(WORDS[i % len(WORDS)] for i in range(config.model.max_prompt_tokens - 3))
    answer = " ".join(WORDS[i % len(WORDS)] for i in range(config.model.max_response_tokens - 2))
    return [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]] * (
        2 * config.psi.batch_size
    )


def measure(case: str, folder: Path) -> None:
    """Train two steps in this child process; print the rise of peak memory and the prediction, in GiB."""
    config = config_of(case, folder)
    from pgenrm_train.backends.sft import engine as deepspeed_sft
    from pgenrm_train.backends.sft.nano import make_nano
    from pgenrm_train.backends.sft.rank import join_processes
    from pgenrm_train.backends.sft.settings import set_variables

    set_variables(config.cluster)
    import deepspeed  # noqa: F401
    import pyarrow as pa
    import pyarrow.parquet as pq
    import transformers  # noqa: F401

    # New words fill the vocabulary, as a real run's texts do.
    texts = [" ".join(f"{w}{i}x{(i * 7919) % 9973}" for w in WORDS) for i in range(400)] + [
        " ".join(WORDS)
    ] * 2000
    make_nano(folder / "base", texts, [f" {w}" for w in WORDS], config.model.nano, seed=0)
    pq.write_table(pa.table({"messages": chats(config)}), folder / "sec.parquet")
    join_processes(config.cluster)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    deepspeed_sft.train(config, folder / "sec.parquet", start=folder / "base", work_dir=folder / "psi")
    geometry = read_geometry(folder / "base" / "config.json")
    phase = max(psi_phases(config, geometry), key=lambda phase: phase.total)
    predicted = {k: v for k, v in phase.parts.items() if k != "Python and libraries"}
    print(
        "RESULT "
        + json.dumps(
            {"measured": resident("VmHWM") - before, "parts": predicted, "parameters": geometry.parameters}
        )
    )


def resident(field: str) -> float:
    """GiB of this process, from the kernel: VmRSS now, VmHWM at its peak."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=CASES, action="append")
    given = parser.parse_args()
    if given.case:
        return measure(given.case, given.folder)
    print(f"{'case':30} {'parameters':>11} {'predicted':>10} {'measured':>9}  error   parts, MiB")
    for case in given.only or CASES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--case", case, "--folder", folder]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "2",
                    "MALLOC_MMAP_THRESHOLD_": "65536",
                },
            )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        result = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
        predicted = sum(result["parts"].values())
        parts = ", ".join(f"{name} {gib * 1024:.0f}" for name, gib in result["parts"].items())
        error = predicted / result["measured"] - 1
        print(
            f"{case:30} {result['parameters']:>11,} {predicted:>6.2f} GiB {result['measured']:>5.2f} GiB "
            f"{error:>+6.0%}  {parts}"
        )
    return None


if __name__ == "__main__":
    main()
