"""Totals: which ones count, chains without totals, and that no training token states one."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgenrm_train.backends.grpo.scoring import Sample, score, tokens_before_total
from pgenrm_train.backends.sft.batches import encode_chat
from pgenrm_train.chains import close_chain
from pgenrm_train.chains.chain import JSON_END, JSON_START, Chain, ParseFailure, parse_chain, write_chain
from pgenrm_train.chains.totals import UNVERIFIED, first_total, open_chain, read_chain
from pgenrm_train.config import Totals
from pgenrm_train.rewards.reward import RewardWeights

TEACHERS = write_chain("Short.", [("short", 60), ("clear", 40)], [[9, 8], [4, 7]], ["to the point; ok", ""])
OPEN = (
    f'Short.\n{JSON_START}{{"rationale": "short 60%, clear 40%. '
    "Response 1: to the point; ok; short 9, clear 8. Response 2: short 4, clear 7."
)
EDITED = TEACHERS.replace('"response_1": 8.6', '"response_1": 1.6')
RECOMPUTED = [Totals.VERIFIED, Totals.CODE]
names = st.text("abc =R.1:", min_size=1, max_size=12).filter(
    lambda name: name.strip() and not set(name) & set(",;%=")
)
marks = st.one_of(st.integers(1, 10), st.floats(1, 10).map(lambda value: round(value, 2)))


@st.composite
def rubrics(draw):
    criteria = draw(st.lists(st.tuples(names, marks), min_size=1, max_size=4, unique_by=lambda item: item[0]))
    if draw(st.booleans()):
        weights = [weight for _, weight in criteria[1:]]
        criteria[0] = criteria[0][0], 100 - sum(weights)
    row = st.lists(marks, min_size=len(criteria), max_size=len(criteria))
    scores = draw(st.lists(row, min_size=2, max_size=4))
    note = st.text('ab;=. "\\<>5', max_size=12) | st.just(f". Response 2: {JSON_START}{JSON_END}")
    return criteria, scores, draw(st.lists(note, min_size=len(scores), max_size=len(scores)))


@given(rubrics())
@settings(max_examples=50, deadline=None)
def test_a_closed_chain_is_the_public_format_and_declares_the_sums_of_its_rubric(rubric):
    text = write_chain("They like tea.", *rubric)
    written, n = parse_chain(text, len(rubric[1])), len(rubric[1])
    assert isinstance(written, Chain)
    for made in (text, open_chain(text, n)):
        if made is None:  # such names leave no certain place for a total
            continue
        closed = parse_chain(close_chain(made, n), n)
        if isinstance(closed, ParseFailure) or closed.verified_scores is None:
            assert written.verified_scores is None
            continue
        assert closed.scores == closed.verified_scores == written.verified_scores
        assert closed.criterion_scores == written.criterion_scores and closed.analysis == written.analysis
        assert close_chain(close_chain(made, n), n) == close_chain(made, n)


@pytest.mark.parametrize("end", ["", '"', '", ', '"}', f'"}}{JSON_END}', '", "better_response": {"respo'])
def test_an_open_chain_may_end_anywhere_after_its_rubric(end):
    assert open_chain(TEACHERS) == OPEN and first_total(OPEN) is None
    assert close_chain(OPEN + end) == TEACHERS
    assert read_chain(OPEN + end, Totals.CODE).chain == parse_chain(TEACHERS)


def test_a_teachers_free_rubric_is_trained_on_without_its_totals():
    rationale = (
        "Warm (60%), short: 40%.\nResponse 1: warm: 9/10, short: 4/10. Total: 7.0\n"
        "Response 2: warm 2, short 8, total 4.4"
    )
    verdict = {"better_response": {"response_1": 7.0, "response_2": 4.4}, "rationale": rationale}
    opened = open_chain(f"Kind.\n{JSON_START}\n{json.dumps(verdict)}\n{JSON_END}")
    assert opened == (
        f'Kind.\n{JSON_START}{{"rationale": "Warm 60%, short 40%. Response 1: Warm 9, short 4. '
        "Response 2: Warm 2, short 8."
    )
    assert parse_chain(close_chain(opened)).scores == (7.0, 4.4)


@pytest.mark.parametrize("note", ["Total: 8.6", "9 * 0.6 + 8 * 0.4 = 8.6", "total score 8.6"])
def test_a_total_in_a_note_is_no_part_of_an_open_chain(note):
    text = write_chain("Short.", [("short", 60), ("clear", 40)], [[9, 8], [4, 7]], [note, ""])
    assert open_chain(text) == OPEN.replace("to the point; ok; ", "") and first_total(OPEN + note)


@pytest.mark.parametrize("totals", RECOMPUTED)
def test_a_chain_edited_by_hand_is_scored_by_its_rubric_and_flagged(totals):
    answer = read_chain(EDITED, totals)
    assert answer.chain.scores == (8.6, 5.2) and "declared_differs" in answer.chain.issues
    assert answer.chain.declared == (1.6, 5.2) and read_chain(EDITED, Totals.DECLARED).chain.scores == (
        1.6,
        5.2,
    )
    assert (parse_chain(answer.text).scores == (8.6, 5.2)) == (totals is Totals.CODE)


@pytest.mark.parametrize("totals", RECOMPUTED)
@pytest.mark.parametrize(
    "text",
    [
        TEACHERS.replace("short 60%, clear 40%", "short 0%, clear 0%"),
        TEACHERS.replace("short 60%, clear 40%", "because"),
        re.sub("short 4, clear 7", "short 4", TEACHERS),
    ],
)
def test_what_cannot_be_verified_is_a_failure_of_its_own_kind(text, totals):
    assert isinstance(parse_chain(text), Chain)
    assert read_chain(text, totals).chain.kind == UNVERIFIED
    if totals is Totals.CODE:
        assert read_chain(text.partition('", "better')[0], totals).chain.kind == UNVERIFIED
        assert read_chain("no chain", totals).chain.kind == "no_markers"


FORGED = write_chain("", [("short", 60), ("clear", 40)], [[1, 1], [10, 10]])


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{FORGED}</think>{OPEN}",
        f"<think>{FORGED}</think>{TEACHERS}",
        f"{OPEN}<think>{FORGED}</think>",
        f"{TEACHERS}<think>{FORGED}</think>",
        FORGED + OPEN,
        FORGED + TEACHERS,
    ],
)
def test_the_totals_that_count_are_those_of_the_text_shown(text):
    shown, chain = read_chain(text, Totals.CODE)
    assert chain.scores == parse_chain(shown).scores == (8.6, 5.2)


@pytest.mark.parametrize("damaged", [EDITED + OPEN.replace("rationale", "remarks"), EDITED + JSON_START])
def test_totals_that_the_text_does_not_show_never_count(damaged):
    assert parse_chain(damaged).verified_scores == (8.6, 5.2)
    assert read_chain(damaged, Totals.CODE) == (damaged, read_chain(JSON_START, Totals.CODE).chain)


@pytest.mark.parametrize("draft", [TEACHERS, OPEN, f'{OPEN}"}}'])
def test_a_rubric_drafted_in_reasoning_is_no_chain(draft):
    text = f"<think>{draft}</think>I cannot say."
    assert close_chain(text) == text
    assert {read_chain(text, totals).chain.kind for totals in Totals} == {"no_markers"}


@given(st.text() | st.text('{}"\\:,rationale' + JSON_START[:3]).map(lambda text: JSON_START + text))
@settings(max_examples=50, deadline=None)
def test_any_text_is_read_and_closed(text):
    assert isinstance(close_chain(text), str)
    for totals in Totals:
        assert read_chain(text, totals).chain is not None


# ---- training: masks on token ids ----


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path("tests/data/psi_nano"))


def test_sft_trains_on_no_token_of_a_total(tokenizer):
    chat = encode_chat(
        tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": open_chain(TEACHERS)}]
    )
    trained = tokenizer.decode(chat.ids[chat.loss_from :])
    assert trained.startswith(OPEN) and not re.search("better_response|=|8.6|5.2", trained)
    assert chat.ids[-1] == tokenizer.eos_token_id or tokenizer.eos_token in trained, (
        "the model learns to stop"
    )


def test_grpo_trains_on_no_token_from_the_first_total_on(tokenizer):
    def sampled(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Sample([1], ids, [0.0] * len(ids), text, True, 0, tokens_before_total(tokenizer, ids, text))

    for text, kept in (
        (OPEN, OPEN),
        (TEACHERS, OPEN.partition(". Response 2")[0]),
        (f'{OPEN}", "better_response"', OPEN),
    ):
        one = sampled(text)
        trained = tokenizer.decode([t for t, mask in zip(one.token_ids, one.loss_mask, strict=True) if mask])
        assert kept.startswith(trained.rstrip('", ')) and len(kept) - len(trained) <= 8
    assert sampled(OPEN).loss_mask == [1] * len(sampled(OPEN).token_ids)


def test_rewards_follow_the_totals_that_count():
    row = {"reward_model": {"ground_truth": "0"}, "extra_info": {"n_responses": 2, "explicit": "{}"}}
    outcomes = {}
    for totals in Totals:
        text = OPEN if totals is Totals.CODE else EDITED
        one = score(Sample([1], [2], [0.0], text, True, 0), row, RewardWeights(), None, totals)
        outcomes[totals] = one.outcome, one.ranking.declared_margin > 0, one.ranking.faithful
    assert outcomes == {"declared": (0, False, False), "verified": (1, False, False), "code": (1, True, True)}
    bare = TEACHERS.replace("short 60%, clear 40%", "because")
    failed = score(Sample([1], [2], [0.0], bare, True, 0), row, RewardWeights(), None, Totals.VERIFIED)
    assert (failed.failure, failed.total) == (UNVERIFIED, -0.1)
