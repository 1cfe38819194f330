"""Samples per second of the service, relative to an evaluation of the same questions with the same engine.

    python benchmarks/serving/throughput.py run_dir=runs/personaworld-nano-demo    # bar: ratio at least 0.95
    python benchmarks/serving/throughput.py run_dir=RUN score.ind=2 data.max_test_pairs=8

Arguments are those of `recipe=serve`.  Both sides judge the same test pairs in both orders with `score.ind`
samples each, and `eval.max_in_flight` samples at the same time in one engine, whose prefix cache is emptied
before each turn.  The service's side is 64 clients over HTTP with histories in their requests.  The sides
take turns; the ratio is that of the medians.
"""

import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[2]),
    str(Path(__file__).resolve().parents[2] / "tests" / "support"),
]
from serving_world import running  # noqa: E402

from eval.ask.harness import PredictionStore, Question, ask  # noqa: E402
from pgenrm_train.backends.vllm.continuous import ContinuousEngine  # noqa: E402
from pgenrm_train.backends.vllm.engine import VllmGenerator  # noqa: E402
from pgenrm_train.client import PersonalReward  # noqa: E402
from pgenrm_train.config import Config, load  # noqa: E402
from pgenrm_train.prompts.writer import PromptWriter, histories, load_pairs, pairs_of_split  # noqa: E402
from pgenrm_train.records.pairs import PreferencePair  # noqa: E402
from pgenrm_train.serving.wire import Vote  # noqa: E402
from pgenrm_train.stages.stage import with_totals  # noqa: E402
from recipes.wiring.models import load_tokenizer  # noqa: E402
from recipes.wiring.service.local import checkpoint_of, make_service, open_store  # noqa: E402

CLIENTS, TURNS = 64, 3
Votes = list[dict[str, object]]


class Shared:
    """A batch that stays open when the service's engine closes."""

    def __init__(self, batch: VllmGenerator) -> None:
        self.add, self.step, self.abort = batch.add, batch.step, batch.abort

    def close(self) -> None: ...


def evaluated(
    config: Config, generator: VllmGenerator, write: PromptWriter, questions: list[Question], folder: Path
) -> int:
    """Answer the questions as an evaluation does; returns the number of samples."""
    table = ask(
        questions,
        lambda: generator,
        write,
        PredictionStore(folder, "throughput"),
        masking="masked",
        temperature=config.eval.temperature,
        progress=lambda steps, *_: steps,
        what="",
        totals=config.model.counted,
    )
    return len(table)


def served(url: str, asked: list[tuple[PreferencePair, Votes]]) -> int:
    """Score the same pairs over HTTP; returns the number of samples."""
    reward = PersonalReward(url)

    def score(question: tuple[PreferencePair, Votes]) -> int:
        pair, votes = question
        messages = [{"role": turn.role, "content": turn.content} for turn in pair.context]
        answer = reward.score(history=votes, messages=messages, responses=[pair.chosen, pair.rejected])
        return answer.usage["chains"]

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(score, asked))


def main() -> None:
    config = load("recipe=serve", "serve.local=true", "score.ind=16", "eval.max_in_flight=64", *sys.argv[1:])
    checkpoint = checkpoint_of(config)
    config = with_totals(replace(config, eval=replace(config.eval, adaptive=None)), checkpoint)
    pairs = load_pairs(Path(config.run_dir))
    tested = pairs_of_split(pairs, config.eval.split, config.data.max_test_pairs)
    sampler, by_user = histories(config, pairs), {}
    for pair in pairs:
        by_user.setdefault(pair.user_id, []).append(pair)
    questions = [
        Question(pair, order, sampler(pair), samples=config.score.ind) for pair in tested for order in (0, 1)
    ]
    asked = [
        (
            pair,
            [Vote.of(v).model_dump(exclude_none=True) for v in by_user[pair.user_id] if v.split == "train"],
        )
        for pair in tested
    ]
    rates: dict[str, list[float]] = {"evaluate": [], "serve": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = replace(config, serve=replace(config.serve, store=f"sqlite:///{folder}/users.db"))
        write = PromptWriter(config.model, load_tokenizer(checkpoint))
        generator = VllmGenerator(config, checkpoint)
        for turn in range(TURNS):
            generator._llm.reset_prefix_cache()
            start = time.perf_counter()
            samples = evaluated(config, generator, write, questions, folder / f"{turn}")
            rates["evaluate"].append(samples / (time.perf_counter() - start))
            generator._llm.reset_prefix_cache()
            with closing(open_store(config)) as store:
                engine = ContinuousEngine(Shared(generator))
                with running(make_service(config, checkpoint, engine, store, None)) as client:
                    start = time.perf_counter()
                    scored = served(str(client.base_url), asked)
                    rates["serve"].append(scored / (time.perf_counter() - start))
                engine.close()
            assert scored == samples, (scored, samples)
        generator.close()
    medians = {side: statistics.median(values) for side, values in rates.items()}
    report = {f"{side}, samples per second": round(rate, 2) for side, rate in medians.items()}
    report |= {"samples": samples, "turns": TURNS, "ratio": round(medians["serve"] / medians["evaluate"], 4)}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
