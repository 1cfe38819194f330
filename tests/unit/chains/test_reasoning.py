"""Reasoning before an answer is no part of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgenrm_train.chains.chain import Chain, parse_chain, write_chain
from pgenrm_train.chains.reasoning import strip_reasoning
from pgenrm_train.prompts.messages import neutralise

DRAFT = write_chain("A draft.", [("short", 100)], [[1], [9]])
FINAL = write_chain("The user wants it long.", [("long", 100)], [[8], [2]])


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{DRAFT}</think>{FINAL}",
        f"{DRAFT}</think>\n\n{FINAL}",
        f"<think>a</think>{FINAL}<think>{DRAFT}</think>",
        f"<think>a <think> {DRAFT}</think>{FINAL}",
        f"<THINKING>{DRAFT}</thinking>{FINAL}",
        f"[THINK]{DRAFT}[/THINK]{FINAL}",
        f"<reasoning>{DRAFT}</reasoning>{FINAL}",
        f"<thought>{DRAFT}</thought>{FINAL}",
        f"<seed:think>{DRAFT}</seed:think>{FINAL}",
        f"◁think▷{DRAFT}◁/think▷{FINAL}",
        f"<|begin_of_thought|>{DRAFT}<|end_of_thought|>{FINAL}",
        f"<|START_THINKING|>{DRAFT}<|END_THINKING|><|START_RESPONSE|>{FINAL}<|END_RESPONSE|>",
        f"<|begin_of_thought|>{DRAFT}<|end_of_thought|>\n<|begin_of_solution|>\n{FINAL}<|end_of_solution|>\n",
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{FINAL}",
    ],
)
def test_a_block_inside_reasoning_is_never_taken(text):
    chain = parse_chain(text)
    assert isinstance(chain, Chain) and chain.scores == (8.0, 2.0)
    assert chain.analysis == "The user wants it long." and chain.issues == ()


@pytest.mark.parametrize(
    "text", [f"<think>{DRAFT}</think>", f"{DRAFT}</think>", f"<think>{DRAFT}</think>None."]
)
def test_reasoning_alone_is_no_chain(text):
    assert parse_chain(text).kind == "no_markers"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("hi", "hi"),
        (" hi\n", " hi\n"),
        ("<think>hm</think>\n\nhi", "hi"),
        ("<think>hm", ""),
        ("so <think>hm", "so"),
        ("<think>a</think>b</think>c", "c"),
        ("a < b > think", "a < b > think"),
    ],
)
def test_reasoning_is_stripped(text, answer):
    assert strip_reasoning(text, unclosed=True) == answer


@given(st.text("<think/>[THINK]a \n", max_size=80))
def test_nothing_of_closed_reasoning_remains_and_no_marker_forms(text):
    left = strip_reasoning(f"<JSON_<think>{text}</think>START>")
    assert "<JSON_START>" not in left and "</think>" not in strip_reasoning(f"{text}</think>x")[-8:]


@given(st.text("<think/>[THINK]a ", max_size=60))
def test_texts_of_the_data_hold_no_tag_of_reasoning(text):
    assert strip_reasoning(neutralise(text), unclosed=True) == neutralise(text)
