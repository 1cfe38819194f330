"""Model card of a trained checkpoint: its training, its use and its limits.

Written from configuration and manifest, without dates or machine paths, so that the same run writes the same
card.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgenrm_train.config import Config, StageName
from pgenrm_train.files import write_text
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.stages.registry import Stage


def write_card(config: Config, stage: Stage, folder: StageFolder, trained: Mapping[str, Any]) -> None:
    """Write `checkpoint/README.md`, which the Hugging Face hub shows as the page of the model.

    `trained`: facts of the training, with its `steps` and `metrics`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = _base(config, folder.stage)
    hub = (
        base if config.model.kind == "hf" and base == config.model.name and not Path(base).exists() else None
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=hub,
        tags=["reward-model", "personalization", "p-genrm", folder.stage],
    )
    facts = "\n".join(
        f"| {name} | {str(value).replace('|', '/')} |"
        for name, value in _facts(config, folder, trained).items()
    )
    body = f"""# {config.model.label}, {folder.stage}

A personalised generative reward model (P-GenRM, arXiv 2602.12116). It reads earlier preferences of one user
and two or more new responses, and writes an evaluation chain: persona, weighted criteria, a score per
response.

Training: {stage.method}.

| | |
|---|---|
{facts}

## Use

Prompts must be built as in training:

```bash
python -m pgenrm_train recipe=score model={config.model.label} model.path=THIS_FOLDER \\
    score.input=question.json
```

`question.json` holds `user_id`, `query`, `responses` (a list of texts) and `history`, a list of `query`,
`chosen`, `rejected`.

## Limits

This card holds no accuracy: `recipe=evaluate` measures it on held-out users and reports protocol and
intervals. Training data may hold personal preferences; their licence is that of the data and the base model
named above.
"""
    write_text(
        folder.path / "checkpoint" / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))
    )


def _base(config: Config, stage: str) -> str:
    """Model that training began with; later stages start from a checkpoint of this project."""
    return (config.model.path if stage == StageName.PSI else None) or config.model.name


def _facts(config: Config, folder: StageFolder, trained: Mapping[str, Any]) -> dict[str, object]:
    manifest, settings = folder.manifest, getattr(config, folder.stage)
    judge = {"judge": config.judge.name or config.judge.kind} if folder.stage == StageName.CRE else {}
    return {
        "base model": Path(_base(config, folder.stage)).name,
        "data": config.data.name,
        "teacher of the chains": config.teacher.name or config.teacher.kind,
        **judge,
        "masking": config.masking.policy or settings.masking,
        "optimiser steps": trained["steps"],
        "learning rate": settings.learning_rate or trained["metrics"]["psi/peak_learning_rate"],
        "LoRA rank (merged)": config.model.lora.rank or "full parameters",
        "seed": manifest.seed,
        "packages": ", ".join(
            f"{name} {manifest.facts['packages'][name]}"
            for name in ("torch", "transformers", "deepspeed", "verl")
        ),
        "code": (manifest.facts.get("git") or {}).get("commit", "not from a git checkout"),
        "fingerprint": manifest.fingerprint,
    }
