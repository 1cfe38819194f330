"""Scores of any number of responses from a model that was trained on groups of two.

    N = 2    the pair, in both positions
    N ≥ 3    a circle of pairs: (0, 1), (1, 2), …, (N − 1, 0), each in both positions

    s_i = mean over the pairs of i of (s_i where it is first + s_i where it is second) / 2

So every response is judged equally often at each place, at 2N questions.  A pair counts only if both of its
positions have scores: with one of them, a preference for a place would look like one for a response.  A
response without such a pair has no score.

The circle and the merging are our choices; the paper compares two responses.
"""

import numpy as np

Presentation = tuple[int, int]  # responses by number, in the order shown


def circle(responses: int) -> list[Presentation]:
    """Presentations of `responses` ≥ 2; those at 2k and 2k + 1 are the two positions of one pair.

    >>> circle(3)
    [(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2)]
    """
    pairs = [(0, 1)] if responses == 2 else [(i, (i + 1) % responses) for i in range(responses)]
    return [shown for first, second in pairs for shown in ((first, second), (second, first))]


def merge(presentations: list[Presentation], scores: np.ndarray) -> np.ndarray:
    """Score (N,) per response from `scores` (P, 2) per presentation in the order shown; NaN for none.

    >>> merge(circle(2), np.array([[8.0, 4.0], [5.0, 7.0]]))
    array([7.5, 4.5])
    """
    shown = np.array(presentations)
    both = np.repeat(np.isfinite(scores).all(axis=1).reshape(-1, 2).all(axis=1), 2)
    total, count = np.zeros(shown.max() + 1), np.zeros(shown.max() + 1)
    np.add.at(total, shown[both], scores[both])
    np.add.at(count, shown[both], 1.0)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
