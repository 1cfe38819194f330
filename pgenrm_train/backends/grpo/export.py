"""Export of a sharded actor in Hugging Face format, one file at a time, with LoRA adapters merged.

Each tensor is gathered on the device, merged there and dropped: rank 0 holds one file of `SHARD` in host
memory, never the model.  70B would take 131 GiB in bf16, and as much again for the merged copy.  The driver
requests the files one by one, so that its watchdog sees progress.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from pgenrm_train.files import write_json

SHARD = "5GB"


@dataclass(frozen=True)
class Source:
    """A tensor of the export: the actor's weight, and its two adapters if it has them."""

    weight: torch.Tensor
    adapters: tuple[torch.Tensor, torch.Tensor] | None


class Export:
    """An export.  All ranks create one and call `write` for the same files; rank 0 writes them."""

    def __init__(self, module: Any, model_config: Any, folder: Path, dtype: torch.dtype, device: str) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        rank = model_config.lora_rank
        self.scale = model_config.lora_alpha / rank if rank > 0 else 0.0
        self.shape = model_config.hf_config
        self.sources = sources(module.state_dict())
        if self.shape.tie_word_embeddings:
            self.sources.pop("lm_head.weight", None)
        split = split_state_dict_into_shards_factory(
            {name: source.weight for name, source in self.sources.items()},
            get_storage_size=lambda weight: weight.numel() * dtype.itemsize,
            get_storage_id=lambda _: None,  # nothing is shared: tied heads are left out above
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=SHARD,
        )
        self.files, self.size = split.filename_to_tensors, split.metadata["total_size"]

    @property
    def writes(self) -> bool:
        return torch.distributed.get_rank() == 0

    def begin(self) -> int:
        """Write the configuration and the index; returns the number of files."""
        if self.writes:
            from transformers import AutoModelForCausalLM

            self.folder.mkdir(parents=True, exist_ok=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(self.shape, dtype=self.dtype)
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(self.folder)
            model.generation_config.save_pretrained(self.folder)
            if len(self.files) > 1:
                places = {name: file for file, names in self.files.items() for name in names}
                index = {"metadata": {"total_size": self.size}, "weight_map": places}
                write_json(self.folder / "model.safetensors.index.json", index)
        return len(self.files)

    def write(self, number: int) -> None:
        """Gather and write the file `number`."""
        file, names = list(self.files.items())[number]
        state = {}
        for name in names:
            tensor = self._tensor(self.sources[name])
            if self.writes:
                state[name] = tensor.to(self.dtype).cpu().contiguous()
        if self.writes:
            save_file(state, self.folder / file, metadata={"format": "pt"})
        torch.distributed.barrier()

    def _tensor(self, source: Source) -> torch.Tensor:
        """The complete tensor on the device: W + scale·B·A for an adapted layer."""
        weight = self._gathered(source.weight)
        if source.adapters is None:
            return weight
        down, up = (self._gathered(adapter).float() for adapter in source.adapters)
        return torch.addmm(weight.float(), up, down, alpha=self.scale) if self.writes else weight

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        on_device = tensor.detach().to(self.device)
        return on_device.full_tensor() if isinstance(on_device, DTensor) else on_device


def sources(state: dict[str, torch.Tensor]) -> dict[str, Source]:
    """Plain Hugging Face name → its source in the state of a model that may be wrapped by peft."""
    found = {}
    for name, weight in state.items():
        if ".lora_" in name:
            continue
        stem, adapters = name.removesuffix(".base_layer.weight"), None
        if stem != name:
            adapters = state[f"{stem}.lora_A.default.weight"], state[f"{stem}.lora_B.default.weight"]
        found[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = Source(weight, adapters)
    return found
