"""Published personas: files as SynthesizeMe saves them, and one sentence for what is not such a file."""

import json

import pytest
from persona_files import judge_program, persona_program, save

from pgenrm_train.errors import DataError
from pgenrm_train.records.personas import PersonaProgram, personas_digest, read_personas, read_program


def test_a_persona_comes_from_the_text_or_else_from_the_judge_s_instructions(tmp_path):
    save(tmp_path, "ann", "Likes tea.\n===\nAnd order.")
    (tmp_path / "ann.json").write_text("never read")
    save(tmp_path / "prompts", "user:7 b", "Hates\n===\nrhymes.", text=False)
    save(tmp_path, "elsewhere", "Not asked for.")
    assert read_personas(tmp_path, {"ann", "user:7 b", "nobody"}) == {
        "ann": "Likes tea.\n===\nAnd order.",
        "user:7 b": "Hates\n===\nrhymes.",
    }


def test_the_hash_changes_with_a_text_and_with_a_user(tmp_path):
    save(tmp_path, "ann", "Likes tea.")
    hashes = [personas_digest(tmp_path)]
    (tmp_path / "ann_persona.txt").write_text("Likes cocoa.")
    hashes.append(personas_digest(tmp_path))
    (tmp_path / "ann_persona.txt").rename(tmp_path / "bea_persona.txt")
    hashes.append(personas_digest(tmp_path))
    assert len(set(hashes)) == 3


NO_END = json.dumps(judge_program("a")).replace(r"\n===\n", " ")
BAD = {
    "ann_persona.txt": [
        (b" \n", "is empty; expected the persona of user 'ann'"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
    ],
    "ann.json": [
        (b"{'judge': 1}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "is not a JSON object; expected a program that DSPy saved"),
        (
            b'{"judge_persona.predict": {"signature": 3}}',
            "field 'judge_persona.predict.signature.instructions'",
        ),
        (NO_END.encode(), "expected a persona between 'FOLLOWING PERSONA: ===' and '==='"),
        (json.dumps(judge_program(" ")).encode(), "is empty; expected the persona of user 'ann'"),
        (json.dumps(persona_program()).encode(), "writes personas; use it as model.persona_program="),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "sentence"), [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_a_file_without_a_persona_is_named(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as failure:
        read_personas(tmp_path, {"ann"})
    assert str(tmp_path / name) in str(failure.value) and "\n" not in str(failure.value)


def test_a_folder_of_no_evaluated_user_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"eval\.personas=.* is not a folder; expected USER_persona\.txt"):
        read_personas(tmp_path / "missing", {"ann"})
    with pytest.raises(DataError, match="holds no persona; expected USER_persona"):
        read_personas(tmp_path, {"ann"})
    save(tmp_path, "zoe", "Likes tea.")
    with pytest.raises(
        DataError, match=r"1 files, such as zoe_persona\.txt, and none is of the 1 evaluated users"
    ):
        read_personas(tmp_path, {"ann"})


def test_a_program_that_writes_personas_gives_instructions_and_complete_demonstrations(tmp_path):
    program = persona_program("Be vivid.", ("Anna likes order.", "Ben likes jokes."))
    program["synthesize.predict"]["demos"][1].pop("past_judgements")
    path = tmp_path / "llama70b.json"
    path.write_text(json.dumps(program))
    assert read_program(path) == PersonaProgram("Be vivid.", (("**Conversation**: 0", "Anna likes order."),))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is not a file; expected a program with the key 'synthesize.predict'"),
        ("{", "is not JSON"),
        (json.dumps(judge_program("a")), "does not write personas; expected a program"),
        ('{"synthesize.predict": []}', "does not write personas"),
    ],
)
def test_another_file_is_no_program_that_writes_personas(tmp_path, content, sentence):
    path = tmp_path / "program.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=sentence):
        read_program(path)
