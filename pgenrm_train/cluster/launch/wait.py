"""Wait until a Ray cluster has enough live nodes; exit code 2 if it takes too long.

python -m pgenrm_train.cluster.launch.wait ADDRESS NODES
"""

import sys
import time

SECONDS = 600.0


def main(address: str, nodes: int, seconds: float = SECONDS) -> int:
    """0 if `nodes` nodes are alive within `seconds`; `address` is Ray's control store, host:port."""
    import ray

    end, alive = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        try:
            ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
            alive = sum(1 for node in ray.nodes() if node["Alive"])
        except (ConnectionError, RuntimeError):  # not up yet
            alive = 0
        if alive >= nodes:
            return 0
        time.sleep(1.0)
    print(
        f"error: {alive} of {nodes} Ray nodes are alive at {address} after {seconds:.0f} s; see the job's "
        "log",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
