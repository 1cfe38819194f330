"""Chains of training users and of newcomers, from which prototypes are made."""

from pathlib import Path

from eval.ask.harness import PredictionStore, ask, own_questions, readable_text
from pgenrm_train.backends.vllm.replicas import local_engines
from pgenrm_train.config import Config, masking_of
from pgenrm_train.files import fingerprint
from pgenrm_train.prompts.writer import PromptWriter, histories, load_pairs, pairs_of_split
from pgenrm_train.run.concurrency import progress
from pgenrm_train.run.folder import StageFolder, weights_digest
from pgenrm_train.stages.prototypes import ChainSet, pairs_to_analyse
from recipes.wiring.candidates import once
from recipes.wiring.models import load_tokenizer

NEWCOMERS = 200  # pairs of validation users for the cold-start curve


def write_analyses(config: Config, folder: StageFolder, checkpoint: Path) -> tuple[ChainSet, list[ChainSet]]:
    """Sample chains on training users, and on newcomers with 0, 1, … known votes."""
    pairs = load_pairs(Path(config.run_dir))
    sampler = histories(config, pairs)
    train = pairs_to_analyse(config.prototypes, pairs_of_split(pairs, "train"))
    training_users = {p.user_id for p in pairs if p.trains}
    some = pairs_of_split(pairs, "val", min(NEWCOMERS, config.data.max_val_pairs or NEWCOMERS))
    newcomers = [p for p in some if p.user_id not in training_users]
    sets = {"own": (train, {p.pair_id: sampler(p) for p in train})}
    for size in range(config.data.history_size + 1):
        sets[f"known/{size}"] = newcomers, {p.pair_id: sampler(p, size) for p in newcomers}
    questions = {
        name: own_questions(some, shown, set_name=name, orders=(0,)) for name, (some, shown) in sets.items()
    }
    with local_engines(config) as load:
        start, close = once(lambda: load(checkpoint))
        identity = fingerprint(weights_digest(checkpoint), config.seed)
        table = ask(
            [question for group in questions.values() for question in group],
            start,
            PromptWriter(config.model, load_tokenizer(checkpoint)),
            PredictionStore(folder.path / f"chains-{checkpoint.parent.name}", identity),
            masking=masking_of(config, "eval"),
            temperature=0.0,
            progress=progress,
            what="analyses of users",
            totals=config.model.counted,
        ).set_index("key")
        close()
    training, *others = [
        ChainSet([(q.pair, readable_text(table.loc[q.key])) for q in group], sets[name][1])
        for name, group in questions.items()
    ]
    return training, [written for written in others if written.chains]
