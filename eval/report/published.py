"""Published figures, for orientation.  They are not comparable with a run's: see `TEXT` and `LAMPQA_TEXT`.

Source: P-GenRM (arXiv 2602.12116), tables on PersonalRewardBench: Chatbot Arena-personalised (131 users) and
PRISM-personalised (720 users).  8B and 70B are Llama-3.1 models of that size.  Rank correlations on LaMP-QA
are from the same paper.
"""

from collections.abc import Sequence

from eval.report.report import Row

TEXT = (
    "Published figures for orientation only: PersonalRewardBench, mean of 5 runs, as printed in arXiv "
    "2602.12116. The authors' released script shows one random order and drops ties and failures. That is "
    "the protocol release here. The paper does not state how the other systems were counted. Compare only "
    "with a run on the same data, under release, and with its interval in mind."
)

_ACCURACIES = (  # system, Chatbot Arena 8B, 70B, PRISM 8B, 70B, in percent
    ("default judge", 56.37, 57.02, 52.04, 54.02),
    ("judge with history", 58.53, 58.65, 56.24, 57.11),
    ("SynthesizeMe prompt", 61.07, 63.14, 54.70, 58.19),
    ("PSI prompt only", 62.20, 65.55, 58.33, 61.61),
    ("GPO", 57.87, 58.50, 57.29, 59.16),
    ("VPL", 58.12, 59.02, 58.25, 59.70),
    ("PAL", 57.31, 59.40, 56.74, 57.75),
    ("Bradley–Terry reward model", 67.21, 71.12, 63.27, 63.44),
    ("FT-RM + SynthesizeMe", 69.78, 72.05, 62.84, 63.74),
    ("P-GenRM", 72.68, 73.42, 65.32, 66.21),
    ("P-GenRM, Ind-16, Pro-8", 75.92, None, 68.06, None),
)
_RELEASED = "P-GenRM"  # the only system with a released script, so with a known protocol
_COLUMNS = (
    "Chatbot Arena 8B accuracy",
    "Chatbot Arena 70B accuracy",
    "PRISM 8B accuracy",
    "PRISM 70B accuracy",
)


def published_rows() -> Sequence[Row]:
    """One row per system; accuracies as printed, to two decimals, or None."""
    return [
        {
            "published": name,
            "protocol": "release" if name.startswith(_RELEASED) else "not stated",
            **{c: None if a is None else f"{a:.2f} %" for c, a in zip(_COLUMNS, accuracies, strict=True)},
        }
        for name, *accuracies in _ACCURACIES
    ]


BENCHMARK = ("chatbot_arena", "prism_personalized")  # the data of these figures
LAMPQA_TEXT = (
    "Published figures for orientation only, as printed in arXiv 2602.12116: Spearman's correlation "
    "between two rankings of six answering models, so multiples of 1/35. Protocol: three judges rate "
    "rubric aspects for the reference; the reward model reads 3 history items and averages 8 samples. "
    "Compare them with a run's spearman models on the same answers."
)


def published_rankings() -> Sequence[Row]:
    """LaMP-QA by subset; None if only the average is printed."""
    subsets = (
        "Art and Entertainment",
        "Lifestyle and Personal Development",
        "Society and Culture",
        "average",
    )
    return [
        {"published": name, **dict(zip(subsets, figures, strict=True))}
        for name, *figures in (
            ("P-GenRM", 0.543, 0.714, 0.657, 0.638),
            ("Qwen3-235B", None, None, None, 0.619),
        )
    ]
