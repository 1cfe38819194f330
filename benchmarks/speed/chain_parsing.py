"""Evaluation chains of about 2 kB that one core parses and verifies per second.

    python benchmarks/speed/chain_parsing.py

Two kinds: the grammar that `write_chain` writes, and the free forms of language models, with criteria of
their own in every chain.  CPU time, best of five rounds.  The ratio is to reading the same JSON with the
standard library alone.
"""

import json
import random
import time
from collections.abc import Callable, Sequence

from pgenrm_train.chains.chain import JSON_END, JSON_START, Chain, parse_chain, write_chain

CHAINS, BYTES, ROUNDS = 2000, 2000, 5
WORDS = [
    f"{a}{b}"
    for a in ("clear", "warm", "brief", "deep", "plain", "wry", "exact", "kind")
    for b in ("", "er", "ness", "ly", "ish")
]


def analysis(rng: random.Random, size: int) -> str:
    text = ""
    while len(text) < size:
        text += " ".join(rng.choices(WORDS, k=12)).capitalize() + ". "
    return text[:size]


def written(rng: random.Random) -> str:
    criteria = [(name, 25) for name in rng.sample(WORDS, 4)]
    scores = [[rng.randint(1, 10) for _ in criteria] for _ in range(2)]
    notes = [analysis(rng, 120).replace(". ", "; ") for _ in scores]
    chain = write_chain("", criteria, scores, notes)
    return analysis(rng, BYTES - len(chain)) + chain


def free(rng: random.Random) -> str:
    """`Clarity (40%)`, then `Clarity: 8/10` by response and the sum written out."""
    names, weights = [name.capitalize() for name in rng.sample(WORDS, 4)], (40, 30, 20, 10)
    rationale = "Criteria: " + ", ".join(f"{name} ({weight}%)" for name, weight in zip(names, weights)) + "."
    totals = []
    for response in (1, 2):
        scores = [rng.randint(1, 10) for _ in names]
        totals.append(sum(w * s for w, s in zip(weights, scores)) / 100)
        marks = ", ".join(f"{name}: {score}/10" for name, score in zip(names, scores))
        total = " + ".join(f"{score}*{weight / 100:g}" for score, weight in zip(scores, weights))
        rationale += (
            f" Response {response}: {marks}. Weighted total: {total} = {totals[-1]:g}. {analysis(rng, 150)}"
        )
    block = {"rationale": rationale, "better_response": {"response_1": totals[0], "response_2": totals[1]}}
    chain = f"{JSON_START}{json.dumps(block)}{JSON_END}"
    return analysis(rng, BYTES - len(chain)) + chain


def read_json(text: str) -> object:
    return json.loads(text[text.index(JSON_START) + len(JSON_START) : text.index(JSON_END)])


def seconds(function: Callable[[str], object], texts: Sequence[str]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.process_time()
        for text in texts:
            function(text)
        best = min(best, time.process_time() - began)
    return best


def main() -> None:
    for kind in (written, free):
        rng = random.Random(0)
        texts = [kind(rng) for _ in range(CHAINS)]
        chains = [parse_chain(text) for text in texts]
        if not all(
            isinstance(chain, Chain) and chain.verified_scores and not chain.issues for chain in chains
        ):
            raise SystemExit(f"{kind.__name__}: a chain of the benchmark was not verified")
        took = seconds(parse_chain, texts)
        size = sum(len(text.encode()) for text in texts) / CHAINS
        print(
            f"{kind.__name__}: {CHAINS / took:,.0f} chains per second and core, {size:,.0f} bytes each; "
            f"{took / seconds(read_json, texts):.0f} × reading their JSON"
        )


if __name__ == "__main__":
    main()
