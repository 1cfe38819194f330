"""Sections of a prompt, read back from its text."""

import re

from pgenrm_train.prompts.messages import TAGS

NAMES = sorted({tag.strip("<>") for tag in TAGS if "response" not in tag})
TAG = re.compile(rf"<(?:{'|'.join(NAMES)}|response_[0-9]+)>")


def split_prompt(text: str) -> list[tuple[str, str]]:
    """Split a user message into (tag, text) in order; text before the first tag is dropped."""
    tags = list(TAG.finditer(text))
    ends = [tag.start() - 1 for tag in tags[1:]] + [len(text)]  # − 1: the line break before the next tag
    return [(tag.group(), text[tag.end() : end]) for tag, end in zip(tags, ends, strict=True)]
