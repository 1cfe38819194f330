"""Prompts: from a view of an example to chat messages.

`history` and `masking` make the view.  `writer.PromptWriter` keeps it within the token budget, `styles`
picks the kind of prompt, and `messages` writes the text.
"""
