"""Sections of a prompt, read back from its text."""

from pgenrm_train.prompts.messages import split_prompt

__all__ = ["split_prompt"]
