"""One survey and one conversation in the form of PRISM's files."""

SURVEY = {
    "user_id": "user0",
    "self_description": "A cook.",
    "system_string": "Be brief.",
    "stated_prefs": {"values": 10, "fluency": 90, "personalisation": None},
    "age": "25-34",
}


def model(turn, text, score, chosen=False, place=0):
    return {
        "turn": turn,
        "role": "model",
        "content": text,
        "model_name": "m",
        "score": score,
        "if_chosen": chosen,
        "within_turn_id": place,
    }


def user(turn, text):
    return {
        "turn": turn,
        "role": "user",
        "content": text,
        "model_name": None,
        "score": None,
        "if_chosen": None,
        "within_turn_id": None,
    }


CONVERSATION = {
    "conversation_id": "c0",
    "user_id": "user0",
    "opening_prompt": "Hi",
    "conversation_type": "unguided",
    "conversation_turns": 2,
    "conversation_history": [
        user(0, "Hi"),
        model(0, "A", 90, True),
        model(0, "B", 40),
        model(0, "C", 85),
        model(0, "EMPTY STRING", 1),
        user(1, "More"),
        model(1, "D", 20),
        model(1, "E", 70, True),
        model(1, "F", None),
    ],
    "choice_attributes": {"values": 60, "factuality": 80.0, "safety": None},
    "performance_attributes": {"values": 99},
    "open_feedback": "I liked the first one: SECRET",
}
