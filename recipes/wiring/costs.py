"""Estimate the cost of paid models before a run, and sum it after the run."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from eval.studies.evaluation import Evaluation
from pgenrm_train.backends.api.answers import Answers
from pgenrm_train.backends.api.costs import ANSWER_TOKENS, announce, characters, estimate
from pgenrm_train.backends.api.usage import dollars
from pgenrm_train.backends.protocols import SAMPLE, Estimate, estimate_sample
from pgenrm_train.config import (
    Config,
    EndpointConfig,
    GrpoConfig,
    StageName,
    masking_of,
    seeds_of_grid,
    sizes,
)
from pgenrm_train.config.setting import known
from pgenrm_train.prompts.masking import apply_masking, present
from pgenrm_train.rewards.judging import judge_messages
from pgenrm_train.rewards.training_rows import read_extras, withheld_signals
from pgenrm_train.stages.build_sec import SEC
from pgenrm_train.stages.grpo import VALIDATION
from recipes.wiring.llm import plain_writer

VERDICT_TOKENS = 80


def estimate_evaluation(config: Config, evaluation: Evaluation, settings: EndpointConfig) -> Estimate:
    """Print and return the estimate for `model=endpoint`; kept answers are not requested again."""
    write, policy = plain_writer(config), masking_of(config, "eval")
    some = estimate_sample(evaluation.pairs)
    examples = [present(pair, evaluation.histories[pair.pair_id], 0) for pair in some]
    prompts = [write(apply_masking(example, policy, random.Random(0))[0]) for example in examples]
    return announce(
        "model", settings, estimate(settings, characters(prompts), evaluation_calls(config, evaluation))
    )


def evaluation_calls(config: Config, evaluation: Evaluation) -> int:
    """Most calls for own and swapped histories in both orders, personas, grids and probes."""
    settings, pairs = config.eval, len(evaluation.pairs)
    calls = 2 * pairs * settings.seeds * (1 + bool(settings.personas)) + 4 * len(evaluation.twins)
    grid = min(pairs, settings.grid_pairs or pairs)
    if max(ind := sizes(settings.ind)) > 1 or max(sizes(settings.pro)) > 0:
        calls += 2 * grid * seeds_of_grid(settings) * (max(ind) + max(sizes(settings.pro)))
    if settings.one_pair_ind:
        calls += (
            2 * grid * settings.grid_seeds * (max(settings.one_pair_ind) + max(settings.one_pair_pro or [0]))
        )
    if settings.random_users:
        borrowed = seeds_of_grid(settings) * max(sizes(settings.pro))
        if settings.one_pair_ind:
            borrowed += settings.grid_seeds * max(settings.one_pair_pro or [0])
        calls += 2 * grid * borrowed
    if settings.probes:
        calls += 2 * len(settings.probe_kinds) * min(pairs, settings.probe_pairs)
    return calls


def estimate_judge(config: Config, judge: EndpointConfig, judged: Mapping[str, Path]) -> Estimate:
    """Print and return the estimate for a judge; `judged`: stage → its rows."""
    calls, longest = 0.0, ""
    for stage, rows in judged.items():
        settings = getattr(config, stage)
        extras = read_extras(rows)
        stated = [extra["explicit"] for extra in extras if withheld_signals(extra)]
        chains = known(settings.steps) * known(settings.prompts_per_step) * settings.group_size
        calls += chains * len(stated) / max(1, len(extras))
        calls += _validation_calls(settings, rows.with_name(VALIDATION))
        longest = max([longest, *stated], key=len)
    task = characters([judge_messages("", {"signals": longest})])
    longest_chain = config.model.max_response_tokens
    chain = _chain_characters(Path(config.run_dir)) or 4.0 * min(ANSWER_TOKENS, longest_chain)
    span = (task + chain, task + max(chain, 3.0 * longest_chain))
    return announce("judge", judge, estimate(judge, span, calls, answer_tokens=VERDICT_TOKENS))


def _validation_calls(settings: GrpoConfig, rows: Path) -> int:
    if not rows.exists():
        return 0
    judged = [extra for extra in read_extras(rows) if withheld_signals(extra)]
    return len(judged) * (1 + -(-known(settings.steps) // settings.validate_every))


def _chain_characters(run_dir: Path) -> float | None:
    """Mean length of the teacher's chains; None before build_sec has made them."""
    path = run_dir / StageName.BUILD_SEC / SEC
    if not path.exists():
        return None
    chats = pq.read_table(path, columns=["messages"])["messages"].slice(0, SAMPLE).to_pylist()
    return sum(len(chat[-1]["content"]) for chat in chats) / len(chats) if chats else None


def judge_cost(settings: EndpointConfig, caches: Sequence[Path]) -> dict[str, float]:
    """Tokens and dollars of the judge over all starts; empty without caches."""
    paid = []
    for folder in filter(Path.exists, caches):
        answers = Answers(folder)
        paid.append(answers.paid())
        answers.close()
    if not paid:
        return {}
    prompts, completions = (sum(part) for part in zip(*paid))
    return {
        "prompt tokens": prompts,
        "completion tokens": completions,
        "dollars": round(dollars(settings, prompts, completions), 4),
    }
