"""veRL on a CPU: the platform that verl 0.9.1 does not ship, and three patches to libraries under it.

Loaded by `verl/__init__` in every process when `VERL_USE_EXTERNAL_MODULES=pgenrm_train.backends.grpo.cpu`;
never imported on a GPU.  verl registers its engines for cuda and npu only, so a run also sets
`VERL_ENGINE_DEVICE=cuda` (verl's own override).

`use_gloo`
    Cause: verl requests `cpu:gloo,cpu:gloo` from torch, which refuses a device named twice.
    Goes when verl names one backend where device and host are the same.
`allow_unpinned_offload`
    Cause: FSDP2's reference policy hard-codes `CPUOffloadPolicy(pin_memory=True)`, which needs a GPU.
    Goes when verl passes pin_memory by platform.
`keep_linear_weights`
    Cause: vLLM packs Linear weights for oneDNN at load and frees `layer.weight`, the target of a weight sync.
    Goes when vLLM packs them again on `load_weights`.

`tests/integration/test_verl.py` asserts that the pinned versions still need each of them.
"""

import sys
import types
from contextlib import nullcontext
from functools import partial
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


def _device_module() -> types.ModuleType:
    """`torch.cpu` with the memory and cache calls that verl makes on any device module, without effect."""
    module = types.ModuleType("pgenrm_cpu_device")
    public = {name: value for name, value in vars(torch.cpu).items() if not name.startswith("_")}
    zero = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    nothing = (
        "empty_cache",
        "ipc_collect",
        "synchronize",
        "set_device",
        "reset_peak_memory_stats",
        "set_per_process_memory_fraction",
        "manual_seed",
        "manual_seed_all",
    )
    vars(module).update(
        public | dict.fromkeys(zero, lambda *_, **__: 0) | dict.fromkeys(nothing, lambda *_, **__: None),
        mem_get_info=lambda *_: (psutil.virtual_memory().available, psutil.virtual_memory().total),
        is_available=lambda: False,
        current_device=lambda: "cpu",
        get_device_name=lambda *_: "CPU",
    )
    return module


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """verl's platform interface for a machine without an accelerator; ranks are Ray's *logical* GPUs."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self) -> bool:
        return False

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return not torch.cuda.is_available()

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def _skip(self, *_: object) -> None:
        """Do nothing: a CPU has no such state."""

    set_device = synchronize = set_allocator_settings = empty_cache = _skip
    profiler_start = profiler_stop = cudart = _skip
    nvtx_range = nullcontext

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"  # declared with ray.init(num_gpus=…), so that verl's placement works unchanged

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False  # weights travel to vLLM through shared memory


def use_gloo() -> None:
    """Start process groups on gloo alone instead of `cpu:gloo,cpu:gloo`."""
    import verl.utils.distributed as distributed

    distributed.initialize_global_process_group_ray = partial(
        distributed.initialize_global_process_group_ray, backend="gloo"
    )


def allow_unpinned_offload() -> None:
    """Let `CPUOffloadPolicy(pin_memory=True)` mean pageable memory."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    def init(self: Any, pin_memory: bool = False) -> None:
        object.__setattr__(self, "pin_memory", False)  # a frozen dataclass

    CPUOffloadPolicy.__init__ = init  # type: ignore[method-assign]


def keep_linear_weights() -> None:
    """Keep vLLM's Linear weights plain, so that they can be overwritten.

    vLLM's engine process imports verl through `worker_extension_cls` before it loads the model.  Processes
    that have not imported vLLM are not changed.
    """
    if "vllm" not in sys.modules:
        return
    import vllm.model_executor.layers.utils as layers

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = plain


use_gloo()
allow_unpinned_offload()
keep_linear_weights()
