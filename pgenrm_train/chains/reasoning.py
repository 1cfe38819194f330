"""Reasoning that a model writes before its answer, as in `<think>…</think>`; it is no part of the answer.

Tags are those of DeepSeek, Qwen, Mistral, Kimi, Seed, Command and Gemini, and the channels of gpt-oss.

A chat template may write the opening tag into the prompt, so that the model's text has the closing tag alone.
Prompts hold no such tag, because `messages.neutralise` removes them from the data.
"""

import re

_TAG = re.compile(
    r"<\s*+(/?)\s*+(?:think(?:ing)?|thoughts?|reasoning|seed:think)\s*+>|\[(/?)THINK\]|◁(/?)think▷"
    r"|<\|(?:begin|(end))_of_thought\|>|<\|(?:start|(end))_thinking\|>"
    # Tags that open the answer.
    r"|<\|(begin)_of_solution\|>|<\|(start)_response\|>"
    r"|<\|channel\|>(?:(?:analysis|commentary)|(final))<\|message\|>",
    re.IGNORECASE,
)
_END = re.compile(r"<\|end_(?:of_solution|response)\|>\s*\Z", re.IGNORECASE)


def strip_reasoning(text: str, *, unclosed: bool = False) -> str:
    """The text without its reasoning; `unclosed` also drops reasoning that never ends.

    Linear in the length.  A line break takes the place of what is dropped, so that no tag forms there.

    >>> strip_reasoning("<think>Let me see.</think>\\n\\nYes."), strip_reasoning("Let me see.</think>Yes.")
    ('Yes.', 'Yes.')
    """
    kept: list[str] = []
    start, opened = 0, -1
    for tag in _TAG.finditer(text):
        if not any(tag.groups()):
            opened = tag.start() if opened < 0 else opened
            continue
        # A closing tag alone: all before it is reasoning.
        kept = [*kept, text[start:opened]] if opened >= 0 else []
        start, opened = tag.end(), -1
    cut = unclosed and opened >= 0
    kept.append(text[start:opened] if cut else text[start:])
    return _END.sub("", "\n".join(kept)).strip() if start or cut else text
