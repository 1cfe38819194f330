"""build_sec: teacher chains → rejection sampling → the SFT set; for nano, also the untrained model and its tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pgenrm_train.backends.protocols import Generation, Teacher
from pgenrm_train.chains.chain import FORMAT_STRINGS
from pgenrm_train.config import ROOT, Config, masking_of
from pgenrm_train.prompts.masking import apply_masking
from pgenrm_train.prompts.messages import TAGS, chat_messages
from pgenrm_train.prompts.writer import PromptWriter, load_pairs
from pgenrm_train.records.pairs import Example, PreferencePair
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.progress import progress
from pgenrm_train.stages import build_sec
from pgenrm_train.stages.registry import BUILD_SEC
from pgenrm_train.stages.stage import prepare, run_stage
from recipes import build_data
from recipes.wiring.llm import endpoint

TOKENIZER_SAMPLE = 1500  # chains that train nano's tokenizer


def run(config: Config) -> None:
    prepare(config)
    build_data.run(config)

    def body(folder, _tracker):  # type: ignore[no-untyped-def]
        pairs = load_pairs(Path(config.run_dir))

        writers = []

        def writer_for(kept: Sequence[build_sec.Kept]) -> PromptWriter:
            writers.append(PromptWriter(config, load_tokenizer(make_base(config, kept))))
            return writers[0]

        with teacher(config, pairs, folder.path) as writes:
            facts = build_sec.run(config, folder, pairs, writes, writer_for, progress)
        print(yield_table(facts), flush=True)
        if told := writers[0].told("build_sec prompts"):
            print(told, flush=True)
        return facts

    say = "{chains} chains kept of {asked} asked; teacher: {teacher}"
    # With other settings an unfinished set is begun anew in place: paid answers are known by what was asked.
    begun = not StageFolder.read(Path(config.run_dir), "build_sec").complete
    run_stage(config, BUILD_SEC, body, say, renew=begun)


def yield_table(facts: Mapping[str, Any]) -> str:
    """Chains kept and rejected, a line a reason."""
    counts = {"kept": facts["chains"], **facts["rejected"]}
    return "\n".join(
        f"{count:>9,}  {count / facts['asked']:>6.1%}  {reason}" for reason, count in counts.items()
    )


@contextmanager
def teacher(config: Config, pairs: Sequence[PreferencePair], folder: Path) -> Iterator[Teacher]:
    """The teacher of `teacher=`; `folder` keeps what a language model answered."""
    if config.teacher.kind == "oracle":
        from data_builders.teachers.oracle import OracleTeacher

        yield _Rule(OracleTeacher(config.seed).write)
    elif config.teacher.kind == "features":
        yield _Rule(features_teacher(config, pairs))
    else:
        from pgenrm_train.backends.api.roles import LlmTeacher

        with endpoint(config, "teacher", folder) as found:
            yield LlmTeacher(found)


class _Rule:
    """A teacher that is a rule: instant, free and never without an answer."""

    in_flight = 1
    by_rule = True

    def __init__(self, write: Callable[[Example, int], str]) -> None:
        self.text = write

    def write(self, example: Example, attempt: int, complaint: str | None = None) -> Generation:
        return Generation(example.pair_id, attempt, self.text(example, attempt))

    def expect(self, examples: Sequence[Example], questions: int, tries: int) -> dict[str, Any]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {}


def features_teacher(config: Config, pairs: Sequence[PreferencePair]) -> Callable[[Example, int], str]:
    """The `features` rule, fitted on the training pairs."""
    from data_builders.teachers.features import FeatureTeacher

    rule = FeatureTeacher().fit([p for p in pairs if p.trains])

    def write(example: Example, attempt: int) -> str:
        key = f"{config.seed}/{example.pair_id}/{example.responses[0]}/{attempt}"
        rng = (
            np.random.default_rng(list(key.encode())) if attempt else None
        )  # the first chain is the rule's own, without jitter
        return rule.write(example.user_id, example.history, example.query, example.responses, rng=rng)

    return write


def base_model(config: Config) -> Path | str:
    """Where PSI starts: `model.path`, the hub name, a shipped nano, or the nano that build_sec makes."""
    if config.model.path:
        return Path(config.model.path)
    if config.model.kind != "nano":
        return config.model.name
    if config.psi.nano_start:
        return ROOT / config.psi.nano_start
    return Path(config.run_dir) / "build_sec" / "base"


def make_base(config: Config, kept: Sequence[build_sec.Kept]) -> Path | str:
    """`base_model`, made from the chains at hand where it is a nano from random weights."""
    base = base_model(config)
    if base == Path(config.run_dir) / "build_sec" / "base":
        from pgenrm_train.backends.sft.nano import make_nano

        sample = [_as_text(config, item) for item in kept[:TOKENIZER_SAMPLE]]
        make_nano(
            base, sample, [*TAGS, *(text.rstrip() for text in FORMAT_STRINGS)], config.model.nano, config.seed
        )
    return base


def load_tokenizer(model: Path | str):  # type: ignore[no-untyped-def]
    """Raises DataError for a tokenizer that cannot write chats."""
    from transformers import AutoTokenizer

    from pgenrm_train.backends.sft.checks import check_template

    tokenizer = AutoTokenizer.from_pretrained(model)
    check_template(tokenizer, model)
    return tokenizer


def _as_text(config: Config, item: build_sec.Kept) -> str:
    view, _ = apply_masking(item.example, masking_of(config, "psi"), random.Random(0))
    prompt = "\n".join(m["content"] for m in chat_messages(view, instructions=config.model.instructions))
    return f"{prompt}\n{item.text}"
