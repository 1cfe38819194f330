"""Files of SynthesizeMe in the schema of its `save` and of its package's `prompts/` (DSPy 2.6)."""

import json

VERSIONS = {"dependency_versions": {"python": "3.12", "dspy": "2.6.12", "cloudpickle": "3.1"}}


def predictor(instructions, demos, fields):
    signature = {
        "instructions": instructions,
        "fields": [{"prefix": f"{name}:", "description": f"${{{name}}}"} for name in fields],
    }
    return {"traces": [], "train": [], "demos": demos, "signature": signature, "lm": None}


def judge_program(persona):
    """The saved judge of one user: two demonstrations, and the persona in the instructions."""
    instructions = (
        "Given a conversation and two completions, determine which one the human judge prefers.\n"
        f"The user you are judging completions for has the FOLLOWING PERSONA: ===\n{persona}\n===\n\n"
        "Now, given the conversation and two completions, decide which completion the user prefers."
    )
    texts = {"conversation": "[user]: Tea?", "first_completion": "[model]: Yes."}
    demos = [
        {
            "augmented": True,
            **texts,
            "second_completion": "[model]: No.",
            "reasoning": "So.",
            "preference": "First",
        },
        {"conversation": "[user]: Tea?", "completion_one": "[model]: Yes.", "completion_two": "[model]: No."}
        | {"chosen": "Second", "index": 0, "conversation_id": "c", "type": "default", "user_id": "u"},
    ]
    fields = ("Conversation", "First Completion", "Second Completion", "Reasoning", "Preference")
    return {"judge_persona.predict": predictor(instructions, demos, fields), "metadata": VERSIONS}


def persona_program(instructions="Write a vivid persona.", personas=("Anna likes order.",)):
    """A program that writes personas, as in the package's `prompts/`."""
    demos = [
        {"augmented": True, "past_judgements": f"**Conversation**: {n}", "reasoning": "So."}
        | {"synthesized_persona": persona}
        for n, persona in enumerate(personas)
    ]
    fields = ("Past Judgements", "Reasoning", "Synthesized Persona")
    return {"synthesize.predict": predictor(instructions, demos, fields), "metadata": VERSIONS}


def save(folder, user, persona, *, text=True):
    """The two files of `save`, or the program alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if text:
        (folder / f"{user}_persona.txt").write_text(persona)
    (folder / f"{user}.json").write_text(json.dumps(judge_program(persona)))
