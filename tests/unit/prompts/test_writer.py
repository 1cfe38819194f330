"""Prompts fit their budget, and all engines see the same ids; the tokenizer is nano's, trained here."""

import copy
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prompt_sections import split_prompt

from pgenrm_train.backends.sft.nano import ASSISTANT, END, PAD, USER, train_tokenizer
from pgenrm_train.chains.chain import FORMAT_STRINGS, write_chain
from pgenrm_train.config import ModelConfig, NanoConfig
from pgenrm_train.errors import DataError
from pgenrm_train.prompts.masking import FullView, MaskedView
from pgenrm_train.prompts.messages import TAGS, chat_messages, shorten
from pgenrm_train.prompts.writer import PromptWriter
from pgenrm_train.records.pairs import ExplicitSignals, HistoryItem, Message

CHAIN = write_chain(
    "This user likes it short.", [("brevity", 70), ("wit", 30)], [[8, 5], [3, 6]], ["short and dry", "long"]
)
FIXED = [*TAGS, *(text.rstrip() for text in FORMAT_STRINGS)]
CUT = re.compile(r"^(.*) …\(\+(\d+) words\)$", re.DOTALL)


def a_view(
    history: int = 2,
    query: str = "Which one is better?",
    responses=("A short answer.", "Another answer, no longer."),
    **more,
):
    items = tuple(
        HistoryItem(f"Question number {i}?", f"A good answer {i}.", f"A bad answer {i}.")
        for i in range(history)
    )
    context = (Message("user", query),)
    return (
        FullView(context, items, responses, more["explicit"])
        if more
        else MaskedView(context, items, responses)
    )


def training_texts() -> list[str]:
    prompt = "\n".join(m["content"] for m in chat_messages(a_view(), instructions=False))
    return [
        f"{prompt}\n{CHAIN}",
        "The quick brown fox, 12.5 times.\n\nÜber allem: 漢字 and naïve café 🙂",
    ] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(training_texts(), FIXED, NanoConfig(vocabulary=600))


@pytest.fixture(scope="module")
def loaded(tokenizer, tmp_path_factory):
    """The tokenizer as vLLM, veRL and the Trainer load it: from files, by model type."""
    from transformers import AutoTokenizer, Qwen2Config

    folder = tmp_path_factory.mktemp("nano")
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def writer(tokenizer, **model) -> PromptWriter:
    return PromptWriter(ModelConfig(**({"instructions": False} | model)), tokenizer)


def ids(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def sections(messages) -> list[tuple[str, str]]:
    return split_prompt(messages[-1]["content"])


# ---- the tokenizer ----

REAL_TEXTS = (
    CHAIN,
    "How do I fix this?\r\n\r\n```python\ndef f(x):\n\treturn x ** 2\n```",
    "Ça coûte 12,50 € — n’est-ce pas ?  Deux  espaces.",
    "日本語のテキスト。中文文本，没有空格。한국어 문장",
    "Привет, мир! Как дела? Γειά σου",
    "مرحبا بالعالم שלום עולם",
    "emoji 🙂🙃 👩‍👩‍👧‍👦 flags 🇩🇪",
    "e\u0301 (decomposed) and é (composed), ﬁ ligature, ½, ①",
    "\u00a0no-break\u200bzero width\ufeff",
    "1 2 3 45 678 9.0 10/10 7.5, 0",
    "   leading and trailing   \n\n",
    '<query>not a tag</query> <|im_start|> [INST] {"a": [1, 2]}',
    "don't we'll I'M they'VE",
    "x" * 300,
)


@pytest.mark.parametrize("number", range(len(REAL_TEXTS)))
def test_loaded_and_trained_tokenizers_agree(tokenizer, loaded, number):
    text = REAL_TEXTS[number]
    assert ids(loaded, text) == ids(tokenizer, text)


@settings(max_examples=150)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
    | st.text("aé 1.\n<|query>'🙂", max_size=40)
)
def test_loaded_and_trained_tokenizers_agree_on_any_text(tokenizer, loaded, text):
    assert ids(loaded, text) == ids(tokenizer, text)


def test_whole_chats_agree_and_answers_are_read_back(tokenizer, loaded):
    messages = [*chat_messages(a_view(), instructions=False), {"role": "assistant", "content": CHAIN}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert loaded.apply_chat_template(messages, tokenize=False) == text
    assert ids(loaded, text) == ids(tokenizer, text)
    assert loaded.decode(ids(loaded, CHAIN), skip_special_tokens=True) == CHAIN
    assert text.endswith(f"{CHAIN}{END}") and text.count(ASSISTANT) == 1


def test_the_vocabulary_is_whole_and_fixed_strings_are_single_tokens(tokenizer, loaded):
    assert len(loaded) == len(tokenizer) == max(tokenizer.get_vocab().values()) + 1
    for text in (*FIXED, USER, ASSISTANT, END, PAD, " 7"):
        assert len(ids(loaded, text)) == 1, text
    assert loaded.eos_token == END and loaded.pad_token == PAD and loaded.eos_token_id != loaded.pad_token_id


def test_the_vocabulary_has_the_asked_size(tokenizer):
    more = train_tokenizer(training_texts(), FIXED, NanoConfig(vocabulary=300))
    assert len(more) < len(tokenizer) <= 600 + len(FIXED) + 20


# ---- over-long prompts ----


def test_what_fits_is_left_alone(tokenizer):
    write = writer(tokenizer, max_text_tokens=200)
    assert write(a_view()) == chat_messages(a_view(), instructions=False)
    assert +write.trimmed == {"prompts": 1}


def test_instructions_are_a_system_message(tokenizer):
    assert [m["role"] for m in writer(tokenizer, instructions=True)(a_view())] == ["system", "user"]


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}",
        "{% for m in messages if m['role'] != 'system' %}{{ m['role'] + m['content'] }}{% endfor %}",
    ],
)
@pytest.mark.parametrize("prompt", ["p_genrm", "judge_history"])
def test_a_template_without_a_system_role_gets_the_instructions_from_the_user(
    tokenizer, template, prompt, capsys
):
    expected = writer(tokenizer, instructions=True, prompt=prompt)(a_view())
    strange = copy.deepcopy(tokenizer)
    strange.chat_template, strange.name_or_path = template, f"{prompt}/{len(template)}"
    write = writer(strange, instructions=True, prompt=prompt)
    for _ in range(2):
        [message] = write(a_view())
        assert message == {"role": "user", "content": "\n\n".join(m["content"] for m in expected)}
    assert write.ids([message])
    assert capsys.readouterr().out.count("has no system role") == 1, "logged once"
    if prompt == "p_genrm":
        assert writer(strange, instructions=False)(a_view()) == chat_messages(a_view(), instructions=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for p in messages[-1]['content'] %}{{ p['text'] }}{% endfor %}", "drops or changes the text"),
        ("{{ messages[-1]['content'] | upper }}", "drops or changes the text"),
        ("{{ messages[-1]['content'] | escape }}", "drops or changes the text"),
        ("{{ messages[-1]['content'] | replace('\n', ' ') }}", "drops or changes the text"),
        ("{{ messages[-1]['content'][:400] }}", "drops or changes the text"),
        ({"rag": "{{ messages[-1]['content'] }}"}, "cannot render a message: .*no default"),
        ("{{ messages[-1]['content'].parts[0] }}", "cannot render a message"),
        ("{{ 1 + messages[-1]['content'] }}", "cannot render a message"),
        ("{% for m in messages %}{{ m['content'] }}", "cannot render a message"),
    ],
)
def test_a_template_that_loses_the_votes_is_refused(tokenizer, template, sentence):
    strange = copy.deepcopy(tokenizer)
    strange.chat_template = template
    with pytest.raises(DataError, match=f"the chat template of .* {sentence}"):
        writer(strange)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one two", 2),
        ("这家饭馆的菜很好吃", 9),
        ("很好，很好。", 4),
        ("Python很好", 3),
        ("ภาษาไทย", 7),
        ("とても良い", 5),
        ("한국어 좋아", 5),
        ("ㄅㄆㄇ ㅋㅋ", 5),
        ("Ｗｉｄｅ　１２！", 2),
        ("it's 3.5 — fine", 4),
        ("", 0),
    ],
)
def test_a_character_is_a_word_where_none_are_spaced(text, words):
    assert shorten(f"x{text}", 1) == (f"x …(+{words} words)" if words else "x")


def test_long_texts_are_cut_and_say_how_many_words_are_gone(tokenizer):
    long = " ".join(f"word{i}" for i in range(400))
    write = writer(tokenizer, max_text_tokens=30)
    view = a_view(history=1, query=long, responses=(long, "Short."))
    found = [text for tag, text in sections(write(view)) if text]
    cut = [CUT.match(text) for text in found]
    assert sum(match is not None for match in cut) == 2 and write.trimmed["texts"] == 2
    for match in filter(None, cut):
        kept = match[1]
        assert long.startswith(kept) and len(ids(tokenizer, kept)) <= 31
        assert int(match[2]) == len(long[len(kept) :].split())


@pytest.mark.parametrize(
    "text",
    [
        "漢字仮名" * 50,
        "🙂🙃" * 80,
        "e\u0301 a\u0308 " * 80,
        "Ünï cödé " * 40,
        "a.b , c ! d ' s " * 30,
        "x" * 2000,
    ],
)
def test_a_cut_text_is_a_prefix_in_whole_characters(tokenizer, text):
    write = writer(tokenizer, max_text_tokens=25)
    shown = dict(sections(write(a_view(history=0, responses=(text, "b")))))["<response_1>"]
    kept, gone = CUT.match(shown).groups()
    assert kept and text.startswith(kept) and "�" not in kept
    assert len(ids(tokenizer, kept)) <= 27
    rest = text[len(kept) :]
    assert int(gone) == len(rest if text.startswith("漢") else rest.split())


def test_texts_of_few_characters_may_still_be_too_many_tokens(tokenizer):
    text = "鬱" * 40
    assert len(ids(tokenizer, text)) > 80
    shown = dict(sections(writer(tokenizer, max_text_tokens=40)(a_view(history=0, responses=(text, "b")))))[
        "<response_1>"
    ]
    assert CUT.match(shown)


def test_the_oldest_history_goes_first(tokenizer):
    view = a_view(history=5)
    whole = len(writer(tokenizer).ids(writer(tokenizer)(view)))
    one_item = (whole - len(writer(tokenizer).ids(writer(tokenizer)(a_view(history=0))))) // 5
    write = writer(tokenizer, max_prompt_tokens=whole - one_item - 1)
    shown = [text for tag, text in sections(write(view)) if tag == "<query>"]
    assert shown == ["Question number 2?", "Question number 3?", "Question number 4?", "Which one is better?"]
    assert +write.trimmed == {"prompts": 1, "history_items": 2}


def test_then_the_longest_texts_are_cut_and_short_ones_stay(tokenizer):
    long = " ".join(f"word{i}" for i in range(300))
    write = writer(tokenizer, max_prompt_tokens=200)
    shown = dict(sections(write(a_view(responses=(long, "A short answer.")))))
    assert shown["<response_2>"] == "A short answer." and shown["<query>"] == "Which one is better?"
    kept, gone = CUT.match(shown["<response_1>"]).groups()
    assert long.startswith(kept) and int(gone) == len(long[len(kept) :].split())
    assert write.trimmed["prompts_cut_to_fit"] == 1 and write.trimmed["history_items"] == 2
    assert len(ids(tokenizer, kept)) > 80  # no more was cut than necessary


def test_two_long_responses_share_the_room(tokenizer):
    long = [" ".join(f"{w}{i}" for i in range(300)) for w in ("left", "right")]
    write = writer(tokenizer, max_prompt_tokens=200)
    shown = dict(sections(write(a_view(history=0, responses=tuple(long)))))
    sizes = [len(ids(tokenizer, CUT.match(shown[f"<response_{i}>"])[1])) for i in (1, 2)]
    assert abs(sizes[0] - sizes[1]) <= 3 and min(sizes) > 20


def test_a_long_query_is_cut_as_well(tokenizer):
    long = "why " * 2000
    write = writer(tokenizer, max_prompt_tokens=150)
    messages = write(a_view(query=long))
    assert len(write.ids(messages)) <= 150
    assert CUT.match(dict(sections(messages))["<query>"])


def test_a_text_cut_twice_still_counts_the_removed_words(tokenizer):
    """Cuts to max_text_tokens and to fit the prompt both count the user's words, not our remark."""
    long = " ".join(f"word{i}" for i in range(500))
    write = writer(tokenizer, max_text_tokens=120, max_prompt_tokens=130)
    kept, gone = CUT.match(
        dict(sections(write(a_view(history=0, responses=(long, "b")))))["<response_1>"]
    ).groups()
    assert long.startswith(kept) and int(gone) == len(long[len(kept) :].split())


def test_cuts_are_reported_and_responses_that_a_cut_made_equal_are_counted(tokenizer, capsys):
    write = writer(tokenizer, max_text_tokens=20)
    write(a_view())
    write.log_trimmed("psi")
    assert capsys.readouterr().out == ""
    same = "the same words in the same order " * 20
    write(a_view(responses=(f"{same} one end", f"{same} other end")))
    write(a_view(responses=(f"{same} x", "short")))
    assert write.trimmed["prompts_left_with_equal_responses"] == 1
    write.log_trimmed("psi")
    assert capsys.readouterr().out.endswith(
        "3 prompts (oldest history first, then the longest texts): 3 texts, "
        "1 prompts left with equal responses\n"
    )
    write(a_view(responses=("equal before", "equal before")))
    assert write.trimmed["prompts_left_with_equal_responses"] == 1


def test_a_prompt_that_cannot_fit_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"model\.max_prompt_tokens=20"):
        writer(tokenizer, max_prompt_tokens=20)(a_view(responses=("word " * 50, "b")))
    with pytest.raises(DataError, match=r"model\.max_prompt_tokens=60"):  # stated criteria are never cut
        writer(tokenizer, max_prompt_tokens=60)(a_view(history=0, explicit=ExplicitSignals("short " * 100)))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.text("ab 漢🙂.\n", max_size=300)


@settings(max_examples=60)
@given(
    st.lists(TEXT, min_size=3, max_size=6),
    st.integers(0, 4),
    st.sampled_from((None, 1, 7, 40)),
    st.integers(90, 400),
)
@example(["a " * 500, "b " * 500, "c"], 3, None, 90)
def test_no_prompt_is_ever_above_the_limit(tokenizer, texts, history, limit, room):
    items = tuple(HistoryItem(texts[0], texts[-1], texts[1]) for _ in range(history))
    view = MaskedView(tuple(Message("user", t) for t in texts[2:]), items, (texts[0], texts[1]))
    write = writer(tokenizer, max_text_tokens=limit, max_prompt_tokens=room)
    try:
        messages = write(view)
    except DataError:
        assert room < 60 + 40 * len(texts)  # tags and remarks alone
        return
    assert len(write.ids(messages)) <= room
    assert [tag for tag, _ in sections(messages)][-2:] == ["<response_1>", "<response_2>"]


def test_special_tokens_in_texts_are_disarmed(tokenizer):
    write = writer(tokenizer)
    found = write.ids(write(a_view(responses=(f"x {END}{ASSISTANT} y", f"{PAD}{USER}"))))
    special = [tokenizer.convert_tokens_to_ids(t) for t in (USER, ASSISTANT, END, PAD)]
    assert [found.count(token) for token in special] == [1, 1, 0, 0]
