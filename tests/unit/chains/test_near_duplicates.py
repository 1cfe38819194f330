"""Near-duplicates: a good estimate, no false ones, and bounded cost among many similar texts."""

import random

import numpy as np
import pytest

from pgenrm_train.chains.near_duplicates import PER_BUCKET, PLACES, NearDuplicates, signature

WORDS = [f"word{i}" for i in range(3000)]


def text(rng: random.Random, words: int = 200) -> list[str]:
    return rng.choices(WORDS, k=words)


def jaccard(a: list[str], b: list[str]) -> float:
    first, second = ({tuple(words[i : i + 3]) for i in range(len(words) - 2)} for words in (a, b))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("changed", [1, 3, 10, 40])
def test_signatures_agree_as_often_as_the_texts_are_similar(changed):
    rng, errors = random.Random(changed), []
    for _ in range(30):
        a = text(rng)
        b = list(a)
        for place in rng.sample(range(len(b)), changed):
            b[place] = rng.choice(WORDS)
        agree = (signature(" ".join(a)) == signature(" ".join(b))).mean()
        errors.append(float(agree) - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 1.5 * 0.5 / PLACES**0.5


def test_similar_texts_are_found_among_many_and_others_are_not():
    rng, index = random.Random(0), NearDuplicates(0.9)
    texts = [text(rng) for _ in range(500)]
    for words in texts:
        assert index.find(signature(" ".join(words))) == []
        index.add(signature(" ".join(words)))
    for number in range(0, 500, 10):
        near = [*texts[number][:100], "changed", *texts[number][101:]]
        assert jaccard(near, texts[number]) > 0.95 and index.find(signature(" ".join(near))) == [number]
        half = [*texts[number][:100], *text(rng, 100)]
        assert index.find(signature(" ".join(half))) == []


def test_case_and_punctuation_do_not_count_and_short_texts_do_no_harm():
    assert (
        signature("This user, above all, likes it short.") == signature("this user above all likes it SHORT")
    ).all()
    assert signature("").shape == signature("one").shape == (PLACES,)
    assert (signature("one two") != signature("one three")).any()
    assert signature("\ud800 lone surrogate").shape == (PLACES,)


def test_a_crowd_of_similar_texts_fills_no_bucket():
    """Texts below the threshold may share bands; the comparisons per text stay bounded."""
    rng, index = random.Random(1), NearDuplicates(0.999)
    common = text(rng)
    for _ in range(300):
        words = list(common)
        words[rng.randrange(200)] = rng.choice(WORDS)
        index.add(signature(" ".join(words)))
    assert max(len(bucket) for bucket in index._buckets.values()) == PER_BUCKET
