"""`torchrun … -m pgenrm_train.backends.ring nccl|gloo`: one all-reduce over all processes, as preflight asks for it."""

from __future__ import annotations

import os
import sys
from datetime import timedelta


def main(backend: str) -> None:
    """Sum the ranks over all processes; exit code 1 when the sum is wrong, a traceback when it cannot be made."""
    import torch
    from torch import distributed

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, timeout=timedelta(seconds=120))
    world = distributed.get_world_size()
    total = torch.full((1024,), float(distributed.get_rank()), device=device)
    distributed.all_reduce(total)
    right = bool((total == world * (world - 1) / 2).all())
    distributed.destroy_process_group()
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main(sys.argv[1])
