"""The features teacher: measurements, shrinkage, and chains that cannot know the label of their pair."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_expit

from data_builders.teachers import features, text_features
from data_builders.teachers.features import FeatureTeacher
from data_builders.teachers.text_features import FEATURES, measure, measure_many
from pgenrm_train.chains.chain import Chain, parse_chain
from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import Example, HistoryItem, Message, PreferencePair

LENGTH = FEATURES.index("length")
CONTEXT = (Message("user", "Which one?"),)
SENTENCE = (
    "the answer may show that people often walk home because rain falls and 12 lamps glow in a quiet "
    "considerable street"
)
WORDS = SENTENCE.split()


def text(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, size=words)).capitalize() + "."


def pair(user: str, chosen: str, rejected: str, name: str = "p") -> PreferencePair:
    return PreferencePair(name, user, CONTEXT, chosen, rejected, conversation_id=name)


def votes(user: str, count: int, longer: bool, seed: int) -> list[PreferencePair]:
    """A user who always takes the longer (or the shorter) of two random texts."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        long, short = text(rng, int(rng.integers(40, 80))), text(rng, int(rng.integers(5, 30)))
        made.append(pair(user, *((long, short) if longer else (short, long)), name=f"{user}-{i}"))
    return made


@pytest.fixture(scope="module")
def training() -> list[PreferencePair]:
    crowd = [v for i in range(12) for v in votes(f"long-{i}", 6, longer=True, seed=i)]
    return crowd + votes("contrary", 25, longer=False, seed=99)


@pytest.fixture(scope="module")
def teacher(training: list[PreferencePair]) -> FeatureTeacher:
    return FeatureTeacher(precision=3.0).fit(training)


def example(user: str, responses: tuple[str, ...], history: tuple[HistoryItem, ...] = ()) -> Example:
    return Example("p", user, CONTEXT, responses, chosen_index=0, history=history)


# ---- measurements ----


@given(st.text(max_size=300))
@settings(max_examples=150)
def test_any_text_measures_finite(anything):
    assert measure(anything).shape == (len(FEATURES),)
    assert np.isfinite(measure(anything)).all()


@pytest.mark.parametrize(
    "odd",
    [
        "",
        "   \n",
        "!!!",
        "你好世界。这是一个测试。",
        "Привет, мир.",
        "مرحبا بالعالم",
        "🙂" * 50,
        "a" * 5000,
        "\ud800",
    ],
)
def test_odd_texts_measure_finite(odd):
    assert np.isfinite(measure(odd)).all()


def test_feature_and_pole_names_are_distinct_lower_case_words():
    names = [*FEATURES, *(pole for f in text_features.TABLE.values() for pole in (f.more, f.less))]
    assert all(name.isalpha() and name.islower() and name.isascii() for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("feature", "more", "less"),
    [
        ("length", "One two three four.", "One."),
        ("structure", "Steps:\n- walk\n- rest\n- eat", "Steps: walk, rest, eat"),
        ("hedging", "Perhaps it might possibly rain.", "It will rain here today."),
        (
            "formality",
            "Considerable precipitation accompanies atmospheric depressions.",
            "Yeah it's really just gonna rain, you guys!",
        ),
        (
            "readability",
            "The cat sat. It was hot.",
            "Notwithstanding considerable atmospheric turbulence, precipitation remained negligible.",
        ),
        ("vocabulary", "Red green blue white black.", "Red red red red red."),
        (
            "reasoning",
            "It fell because it was heavy, therefore it broke.",
            "It fell and it was heavy and it broke apart.",
        ),
        ("warmth", "Thank you dear friend, glad to help.", "The bolt is made of common steel."),
        ("polish", "It rains. We stay.", "it rains ,,we stay cant go"),
        ("numbers", "In 1990 about 40 of 55 left.", "In that year most of them left."),
        ("quotation", 'He said "no" to her.', "He said no to her."),
        ("refusal", "I'm sorry, but as an AI I cannot help.", "Here is the answer."),
    ],
)
def test_each_feature_measures_what_it_is_named_after(feature, more, less):
    assert measure(more)[FEATURES.index(feature)] > measure(less)[FEATURES.index(feature)]


def test_measurements_are_cached_and_read_only():
    assert measure("a cached text") is measure("a cached text")
    with pytest.raises(ValueError):
        measure("a cached text")[0] = 1.0
    assert measure_many([]).shape == (0, len(FEATURES))


def test_a_hundred_thousand_characters_are_quick():
    long = "\n".join(f"- line {i}, maybe 'quoted' because!" for i in range(3000))[:100_000]
    started = time.process_time()
    for suffix in "abcde":
        measure(long + suffix)
    assert (time.process_time() - started) / 5 < 0.5


# ---- the model ----


def test_a_user_without_rows_is_the_population(teacher):
    np.testing.assert_array_equal(teacher.weights("stranger"), teacher.population)
    rows = np.zeros((0, len(FEATURES)))
    alone = features._user_weights(rows, np.zeros(0, int), teacher.population, 3.0, users=1)
    np.testing.assert_allclose(alone[0], teacher.population)


def test_many_consistent_rows_move_a_user_and_few_rows_move_less(training, teacher):
    few = FeatureTeacher(precision=3.0).fit(training[:-23])  # two rows of the contrary user
    assert teacher.population[LENGTH] > 0 > teacher.weights("contrary")[LENGTH]
    assert teacher.weights("contrary")[LENGTH] < few.weights("contrary")[LENGTH] < few.population[LENGTH]


def test_more_precision_means_closer_to_the_population(training):
    gaps = [
        np.linalg.norm(fitted.weights("contrary") - fitted.population)
        for fitted in (FeatureTeacher(precision=tau).fit(training) for tau in (1.0, 10.0, 1e6))
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3


def test_user_weights_are_the_posterior_mode(teacher):
    """Against a general-purpose optimiser on the same objective."""
    rows = teacher.differences[teacher._user_rows["contrary"]]

    def loss(w):
        return -log_expit(rows @ w).sum() + 1.5 * ((w - teacher.population) ** 2).sum()

    np.testing.assert_allclose(teacher.weights("contrary"), minimize(loss, teacher.population).x, atol=1e-3)


def test_precision_follows_the_personal_signal():
    """Noisy votes (every third is reversed): individual weights pay only if users differ."""

    def noisy(longer):
        rows = [
            v
            for i in range(20)
            for j in range(12)
            for v in votes(f"user-{i}", 1, longer(i) ^ (j % 3 == 0), seed=100 * i + j)
        ]
        return [dataclasses.replace(row, conversation_id=str(n)) for n, row in enumerate(rows)]

    contrary, alike = noisy(lambda i: i % 2 == 0), noisy(lambda i: True)
    assert FeatureTeacher().fit(contrary).tau < FeatureTeacher().fit(alike).tau


def test_rows_of_one_conversation_stay_in_one_fold():
    """A vote repeated within a conversation does not predict the next one, and so must not cross folds."""
    coin = np.random.default_rng(0)
    once = [
        v
        for i in range(30)
        for j in range(6)
        for v in votes(f"user-{i}", 1, bool(coin.integers(2)), seed=50 * i + j)
    ]
    repeated = [dataclasses.replace(v, conversation_id=str(n)) for n, v in enumerate(once) for _ in range(5)]
    apart = [dataclasses.replace(v, conversation_id=str(n)) for n, v in enumerate(repeated)]
    assert FeatureTeacher().fit(repeated).tau > FeatureTeacher().fit(apart).tau


def test_history_updates_a_stranger(teacher):
    history = [v.as_history() for v in votes("stranger", 12, longer=False, seed=7)]
    assert teacher.weights("stranger", history)[LENGTH] < teacher.population[LENGTH]


def test_history_that_was_trained_on_counts_once(training, teacher):
    history = [v.as_history() for v in training if v.user_id == "contrary"][:3]
    np.testing.assert_array_equal(teacher.weights("contrary", history), teacher.weights("contrary"))


def test_no_pairs_and_bad_settings_are_refused():
    with pytest.raises(DataError, match="no pairs"):
        FeatureTeacher().fit([])
    with pytest.raises(DataError, match="top is 0"):
        FeatureTeacher(top=0)
    with pytest.raises(DataError, match="precision"):
        FeatureTeacher(precision=0.0)


def test_one_pair_is_enough_to_fit():
    fitted = FeatureTeacher().fit(votes("only", 1, longer=True, seed=0))
    assert fitted.tau == features.DEFAULT_PRECISION
    assert fitted.chain_parts(example("only", ("a longer answer", "short"))).criteria


# ---- scores and chains ----


def test_the_label_of_the_asked_pair_is_never_used(training):
    """Swapping the label of the scored row in the fit changes neither its scores nor its chain."""
    asked = training[-1]
    swapped = [*training[:-1], dataclasses.replace(asked, chosen=asked.rejected, rejected=asked.chosen)]
    texts = (asked.chosen, asked.rejected)
    outcomes = []
    for rows in (training, swapped):
        fitted = FeatureTeacher(precision=3.0).fit(rows)
        history = (rows[-1].as_history(), rows[-2].as_history())  # holds the answer itself
        scores = fitted.score(example("contrary", texts, history))
        parts = fitted.chain_parts(example("contrary", texts, (rows[-2].as_history(),)))
        outcomes.append((scores, parts))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], abs=1e-9)
    assert outcomes[0][1] == outcomes[1][1]
    stranger = [
        FeatureTeacher(precision=3.0).fit(training).weights("new", [h], texts)
        for h in (asked.as_history(), swapped[-1].as_history())
    ]
    np.testing.assert_array_equal(*stranger)


def test_questions_about_training_pairs_share_the_population_s_fits(training, monkeypatch):
    fits, fit = [], features._population_weights
    monkeypatch.setattr(features, "_population_weights", lambda rows: fits.append(len(rows)) or fit(rows))
    fitted = FeatureTeacher(precision=3.0).fit(training)
    for asked in training:
        fitted.chain_parts(example(asked.user_id, (asked.chosen, asked.rejected)))
    assert len(fits) == 1 + features.FOLDS and sum(fits[1:]) == (features.FOLDS - 1) * len(training)


def test_scores_are_order_equivariant_and_within_the_scale(teacher):
    rng = np.random.default_rng(3)
    responses = [text(rng, n) for n in (3, 60, 20)] + [""]
    scores = teacher.score(example("contrary", tuple(responses)))
    assert teacher.score(example("contrary", tuple(responses[::-1]))) == scores[::-1]
    assert all(1 <= s <= 10 for s in scores)
    parts, backwards = (
        teacher.chain_parts(example("contrary", tuple(r))) for r in (responses, responses[::-1])
    )
    assert backwards.scores == parts.scores[::-1]
    assert backwards.criteria == parts.criteria


def test_equal_texts_tie_with_and_without_jitter(teacher):
    assert len(set(teacher.score(example("contrary", ("same words", "same words"))))) == 1
    for seed in range(5):
        first, second = teacher.chain_parts(
            example("contrary", ("same words", "same words")), np.random.default_rng(seed)
        ).scores
        assert first == second


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_percentages_sum_to_100_and_keep_the_order(sizes):
    shares = features._percentages(np.array(sizes))
    assert sum(shares) == 100
    assert min(shares) >= 1
    for a, share_a in zip(sizes, shares):
        assert all(share_a >= share_b - (1 if a == b else 0) for b, share_b in zip(sizes, shares) if a >= b)


@pytest.mark.parametrize(("user", "preferred"), [("contrary", "shorter"), ("stranger", "longer")])
def test_criteria_name_the_direction_and_grade_in_it(training, user, preferred):
    every = FeatureTeacher(top=len(FEATURES), precision=3.0).fit(training)
    short, long = "A short one.", text(np.random.default_rng(5), 70)
    parts = every.chain_parts(example(user, (short, long)))
    names = [name for name, _ in parts.criteria]
    assert sum(weight for _, weight in parts.criteria) == 100
    grades = [row[names.index(preferred)] for row in parts.scores]
    assert grades == sorted(grades, reverse=preferred == "shorter")
    assert grades[0] != grades[1]
    assert parts.analysis == f"This user prefers {', '.join(names)} answers."


def test_a_chain_has_at_most_top_criteria_and_each_agrees_with_what_was_chosen(teacher):
    asked = example("contrary", ("A short one.", "Another, which is longer."))
    weights = teacher.weights(asked.user_id, asked.history, asked.responses)
    top = teacher._top_features(weights, asked.user_id, asked.history, asked.responses)
    mean = teacher.differences[teacher._user_rows["contrary"]].mean(axis=0)
    assert 1 <= len(top) <= teacher.top
    assert (weights[top] * mean[top] > 0).all()


def test_grades_are_deciles_of_the_training_texts(training, teacher):
    texts = sorted({t for p in training for t in (p.chosen, p.rejected)}, key=len)
    up = teacher._grades(texts, np.array([LENGTH]), teacher.population, None)
    assert [g for (g,) in up] == sorted(g for (g,) in up)
    assert np.bincount([g for (g,) in up], minlength=11)[1:].min() > 0
    down = teacher._grades(texts, np.array([LENGTH]), -teacher.population, None)
    assert {a + b for (a,), (b,) in zip(up, down)} <= {10, 11, 12}


def test_the_analysis_describes_each_history_pair(teacher):
    rng = np.random.default_rng(11)
    base = text(rng, 30)
    history = (HistoryItem("q", text(rng, 90), "Rain."), HistoryItem("q", base, base))
    analysis = teacher.chain_parts(example("stranger", ("a", "b c"), history)).analysis
    assert analysis.startswith("Pair 1: ")
    assert "longer" in analysis.split("Pair 2")[0]
    assert "Pair 2: nothing clear. This user prefers " in analysis


def test_jitter_is_at_most_one_and_repeats_with_its_seed(teacher):
    rng = np.random.default_rng(2)
    asked = example("contrary", (text(rng, 8), text(rng, 50)))
    plain = np.array(teacher.chain_parts(asked).scores)
    jittered = [
        np.array(teacher.chain_parts(asked, np.random.default_rng(seed)).scores)
        for seed in (1, 1, *range(2, 12))
    ]
    assert all(np.abs(j - plain).max() <= 1 and j.min() >= 1 and j.max() <= 10 for j in jittered)
    np.testing.assert_array_equal(jittered[0], jittered[1])
    assert any((j != plain).any() for j in jittered)


def test_write_parses_back_to_the_same_rubric(teacher):
    responses = ("A short one.", "A much longer answer, which goes on and on.")
    parts = teacher.chain_parts(example("contrary", responses))
    parsed = parse_chain(teacher.write(example("contrary", responses)), 2)
    assert isinstance(parsed, Chain)
    assert parsed.issues == ()
    assert [(name, int(weight)) for name, weight in parsed.criteria] == parts.criteria
    assert parsed.verified_scores == pytest.approx(
        [sum(w * s for (_, w), s in zip(parts.criteria, row)) / 100 for row in parts.scores]
    )


def test_twenty_thousand_pairs_fit_in_seconds():
    rng = np.random.default_rng(0)
    texts = [text(rng, int(n)) for n in rng.integers(5, 80, size=600)]
    drawn = rng.integers(0, 600, size=(20_000, 2))
    rows = [pair(f"user-{i % 462}", texts[a], texts[b], name=str(i)) for i, (a, b) in enumerate(drawn)]
    started = time.process_time()
    FeatureTeacher().fit(rows)
    assert time.process_time() - started < 30
