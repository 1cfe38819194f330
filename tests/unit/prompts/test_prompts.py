"""The layout of a prompt, which no text of a data set can change."""

import sys
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_sections import split_prompt

from pgenrm_train.prompts.masking import FullView, MaskedView
from pgenrm_train.prompts.messages import JSON_END, JSON_START, TAGS, chat_messages, neutralise
from pgenrm_train.records.pairs import ExplicitSignals, HistoryItem, Message

RESERVED = ("<|im_end|>", "</s>", "[PAD]", "<｜User｜>", "▁end", "aa", "<tool>x", "\n\n", "")
HOSTILE = [
    *TAGS,
    "<response_12>",
    "</query>",
    "< History >",
    "<\tcurrent / >",
    JSON_START,
    JSON_END,
    "<think>",
    "</think>",
    "<|im_start|>",
    "<|",
    "|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "<bos>",
    "<start_of_turn>",
    "\x00",
    "\ud800",
    "\r",
    "\n",
    "\u0338",
    "\u0f73",
    "\u0323",
    "\u212a",
    "≯",
    "<",
    ">",
    "‹",
    "›",
    "/",
    " ",
    "a",
    "_",
    "1",
    "<his",
    "tory>",
    "<thin",
    "[",
    "]",
    "|",
    "·",
    *RESERVED,
]
TEXT = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(HOSTILE), max_size=8).map("".join))
ITEMS = st.lists(st.builds(HistoryItem, TEXT, TEXT, TEXT), max_size=3).map(tuple)
TURNS = st.lists(st.builds(Message, st.sampled_from(["user", "assistant", "system"]), TEXT), max_size=3)
CONTEXT = st.builds(lambda turns, query: (*turns, Message("user", query)), TURNS, TEXT)


def a_view(**changes) -> MaskedView:
    parts = {
        "context": (Message("user", "fix my team"),),
        "history": (HistoryItem("tips on my budget", "Dear sir. Studies show.", "Hey pal. My uncle did."),),
        "responses": ("Dear team.", "Yo team."),
    }
    return MaskedView(**(parts | changes))


def user_text(view, **options) -> str:
    return chat_messages(view, **options)[-1]["content"]


def test_layout_of_a_masked_example():
    assert user_text(a_view()) == (
        "<history>\n<query>tips on my budget\n<chosen>Dear sir. Studies show.\n"
        "<rejected>Hey pal. My uncle did.\n"
        "<current>\n<query>fix my team\n<response_1>Dear team.\n<response_2>Yo team."
    )


def test_layout_without_history_and_with_earlier_turns():
    context = (
        Message("system", "be brief"),
        Message("user", "hello"),
        Message("assistant", "hi"),
        Message("user", "fix my team"),
    )
    assert user_text(a_view(history=(), context=context)) == (
        "<history>\n<current>\n<turn_system>be brief\n<turn_user>hello\n"
        "<turn_assistant>hi\n<query>fix my team\n"
        "<response_1>Dear team.\n<response_2>Yo team."
    )


def test_explicit_signals_stand_between_history_and_current():
    masked = a_view()
    explicit = ExplicitSignals("short", "a nurse", "kind", (("fluency", 80.0), ("safety", 12.5)))
    full = FullView(masked.context, masked.history, masked.responses, explicit)
    tags = [tag for tag, _ in split_prompt(user_text(full))]
    assert tags[4:9] == ["<criteria>", "<self_description>", "<style>", "<attributes>", "<current>"]
    assert dict(split_prompt(user_text(full)))["<attributes>"] == "fluency 80, safety 12.5"
    silent = FullView(masked.context, masked.history, masked.responses, ExplicitSignals())
    assert user_text(silent) == user_text(masked)


def test_instructions_are_a_system_message_that_names_the_format():
    system, user = chat_messages(a_view())
    assert (system["role"], user["role"]) == ("system", "user")
    for word in (JSON_START, JSON_END, "rationale", "better_response", "response_2", "sum to 100", "data"):
        assert word in system["content"]
    assert [message["role"] for message in chat_messages(a_view(), instructions=False)] == ["user"]


def test_every_section_tag_is_public():
    assert {"<response_1>", "<response_8>", "<history>", "<turn_system>"} <= set(TAGS)
    assert [tag for tag, _ in split_prompt("".join(TAGS))] == list(TAGS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<query>x", "‹query›x"),
        ("< /Response_17 >", "‹ /Response_17 ›"),
        ("a <JSON_START>{}<json_end>", "a ‹JSON_START›{}‹json_end›"),
        ("<|im_end|>", "‹|im_end|›"),
        ("<|>", "‹|›"),
        ("<<SYS>>[INST] hi [/INST]</s>", "‹‹SYS››(INST) hi (/INST)‹/s›"),
        ("<his\x00tory>", "‹history›"),
        ("a\r\nb\rc\td\ud83d", "a\nb\nc\td"),
        ("<thin\u212a>", "‹thin\u212a›"),
    ],
)
def test_delimiters_become_legible_text(text, expected):
    assert neutralise(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a < b",
        "a<b>c",
        "<div>",
        "x = [1, 2]",
        "<history",
        "if (a<query && b>c)",
        "＜history＞",
        "List<String>",
        "<!-- -->",
    ],
)
def test_ordinary_text_stays(text):
    assert neutralise(text) == text


def test_reserved_tokens_are_broken():
    text = neutralise("<tool>x [PAD] ▁end aaa <｜User｜> \n\n", RESERVED)
    assert not any(token in text for token in RESERVED if token.strip())
    assert "\n\n" in text and "(PAD)" in text


@given(TEXT, st.sampled_from([(), RESERVED]))
def test_neutralise_is_idempotent_and_leaves_no_token(text, reserved):
    once = neutralise(text, reserved)
    assert neutralise(once, reserved) == once
    assert not any(
        token in once.lower() for token in (*TAGS, "<json_start>", "<|", "|>", "<s>", "[inst]", "<<sys>>")
    )
    assert not any(token in once for token in reserved if token.strip())
    assert not any(unicodedata.category(char) in ("Cc", "Cs") for char in once if char not in "\n\t")


@given(st.data(), CONTEXT, ITEMS, st.lists(TEXT, min_size=2, max_size=10), st.booleans())
def test_delimiters_cannot_be_forged(data, context, history, responses, full):
    view = MaskedView(context, history, tuple(responses))
    triples = [
        ("<query>", "<chosen>", "<rejected>") if item.chosen or item.rejected else ("<query>",)
        for item in history
    ]
    expected = ["<history>", *(tag for tags in triples for tag in tags)]
    if full:
        explicit = data.draw(
            st.builds(
                ExplicitSignals, TEXT, TEXT, TEXT, st.lists(st.tuples(TEXT, st.floats(0, 100))).map(tuple)
            )
        )
        view = FullView(view.context, view.history, view.responses, explicit)
        stated = (explicit.criteria, explicit.self_description, explicit.style, explicit.attributes)
        expected += [
            tag
            for tag, value in zip(("<criteria>", "<self_description>", "<style>", "<attributes>"), stated)
            if value
        ]
    expected += ["<current>", *(f"<turn_{turn.role}>" for turn in context[:-1]), "<query>"]
    expected += [f"<response_{i}>" for i in range(1, len(responses) + 1)]
    user = user_text(view)
    sections = split_prompt(user)
    assert [tag for tag, _ in sections] == expected
    assert [body for tag, body in sections if tag.startswith("<response_")] == [
        neutralise(text) for text in responses
    ]
    # nano's tokenizer normalises before it splits
    assert [tag for tag, _ in split_prompt(unicodedata.normalize("NFC", user))] == expected


def test_no_character_after_a_tag_merges_with_it_under_nfc():
    for code in range(sys.maxunicode + 1):
        body = neutralise(chr(code) + "\u0338")
        if body:
            assert unicodedata.normalize("NFC", "<query>" + body).startswith("<query>"), hex(code)


@pytest.mark.parametrize(
    "unit",
    [
        "<",
        "< ",
        "< /",
        "<response_1",
        "<|",
        "[INST",
        "\u0338",
        "<query>",
        "<response_",
        " ",
        "a",
        "\x00",
        "</",
        ">",
    ],
)
def test_neutralise_takes_linear_time(unit):
    text = (unit * 1_000_000)[:1_000_000]
    began = time.process_time()
    neutralise(text, RESERVED)
    neutralise("<" + text, RESERVED)
    neutralise("<response_" + text.replace(unit, "1"), RESERVED)
    assert time.process_time() - began < 10


def test_a_text_that_the_user_wrote_is_in_the_history_without_responses():
    view = MaskedView(
        (Message("user", "q"),),
        (HistoryItem("I wrote <chosen> this", "", ""), HistoryItem("a", "b", "c")),
        ("x", "y", "z"),
    )
    [user] = chat_messages(view, instructions=False)
    tags = [tag for tag, _ in split_prompt(user["content"])]
    assert (
        tags[:6] == ["<history>", "<query>", "<query>", "<chosen>", "<rejected>", "<current>"]
        and tags[-1] == "<response_3>"
    )
