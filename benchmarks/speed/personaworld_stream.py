"""Streaming of `recipe=build_data data=personaworld`: pairs per CPU second and peak memory at two sizes.

    python benchmarks/speed/personaworld_stream.py              20k and 100k pairs
    python benchmarks/speed/personaworld_stream.py 200000 1000000

Each build is complete and runs in a process of its own: pairs, index, shards, leak report (without near
duplicates, since these texts are made of few phrases) and card.  Memory that grew with the data would
show in the ratio of the peaks.
"""

import json
import sys
import tempfile
from pathlib import Path

from measured import measured

PAIRS_PER_USER = 12


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or [20_000, 100_000]
    peaks, counts = [], []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            spent = measured(
                "recipe=build_data",
                "data=personaworld",
                f"data.users={size // PAIRS_PER_USER}",
                "data.heldout_users=100",
                "tracking=none",
                f"run_dir={folder}/run",
            )
            count = json.loads(Path(folder, "run", "build_data", "card.json").read_text())["pairs"]
        peaks.append(spent.peak_mib)
        counts.append(count)
        # CPU time, so that other load does not count
        print(
            f"{count:>9,} pairs  {spent.cpu_seconds:7.1f} CPU s  "
            f"{count / spent.cpu_seconds:7,.0f} pairs/CPU s  peak {spent.peak_mib:.0f} MiB"
        )
    print(f"{counts[-1] / counts[0]:.1f} × the pairs, {peaks[-1] / peaks[0]:.2f} × the memory")


if __name__ == "__main__":
    main()
