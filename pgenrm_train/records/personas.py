"""Published personas of SynthesizeMe (arXiv 2506.05598), and its programs that write personas.

Its `save` writes two files per user:

    USER_persona.txt   the persona: a text, inferred from the user's votes
    USER.json          the judge, an optimised DSPy program: demonstrations, and a signature whose
                       instructions hold the persona between two lines of "==="

A folder holds them itself or in `prompts/`.  The text counts where a user has both, as in SynthesizeMe.
Demonstrations of a judge are not read: they are votes, and all models see those of the user's history.

The package's own `prompts/` holds programs that write personas, such as `llama70b.json`: instructions, and
demonstrations of votes with the persona that follows from them.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pgenrm_train.errors import DataError
from pgenrm_train.records.raw_rows import UTF8

FOLDER = "prompts"
TEXT, PROGRAM = "_persona.txt", ".json"
JUDGE, WRITER = "judge_persona.predict", "synthesize.predict"
EXPECTED = f"expected USER{TEXT} or USER{PROGRAM} per user, as SynthesizeMe saves them"
EXPECTED_WRITER = f"expected a program with the key '{WRITER}', e.g. SynthesizeMe's prompts/llama70b.json"
_START, _END = "FOLLOWING PERSONA: ===\n", "\n===\n"


@dataclass(frozen=True, slots=True)
class PersonaProgram:
    """How personas are written: instructions, and demonstrations as (votes, persona)."""

    instructions: str
    demonstrations: tuple[tuple[str, str], ...] = ()


def persona_files(folder: Path) -> dict[str, Path]:
    """User → file of the persona.  Raises DataError if there is no such folder, or none in it."""
    if not folder.is_dir():
        raise DataError(f"eval.personas={folder} is not a folder; {EXPECTED}")
    files: dict[str, Path] = {}
    for suffix in (TEXT, PROGRAM):
        for place in (folder, folder / FOLDER):
            for path in sorted(place.glob(f"*{suffix}")):
                files.setdefault(path.name.removesuffix(suffix), path)
    if not files:
        raise DataError(f"eval.personas={folder} holds no persona; {EXPECTED}")
    return files


def read_personas(folder: Path, users: Collection[str]) -> dict[str, str]:
    """User → persona of those `users` that have one.

    Raises DataError for a file without a persona, and if none of the users has a file.
    """
    files = persona_files(folder)
    personas = {user: _persona(files[user], user) for user in users if user in files}
    if not personas:
        raise DataError(
            f"eval.personas={folder} holds {len(files)} files, such as {files[min(files)].name}, and none is "
            f"of the {len(users)} evaluated users, such as {min(users)!r}; {EXPECTED}"
        )
    return personas


def personas_digest(folder: Path) -> str:
    """Hash of all persona files by name and content."""
    files = sorted((path.name, path.read_bytes()) for path in persona_files(folder).values())
    return hashlib.sha256(repr(files).encode()).hexdigest()


def read_program(path: Path) -> PersonaProgram:
    """Parse a program that writes personas; incomplete demonstrations are left out.

    Raises DataError for another file.
    """
    if not path.is_file():
        raise DataError(f"model.persona_program={path} is not a file; {EXPECTED_WRITER}")
    program = _parse(_text(path), path)
    instructions = _instructions(program, WRITER)
    if not instructions:
        raise DataError(f"{path} does not write personas; {EXPECTED_WRITER}")
    part = program[WRITER]
    demos = part.get("demos") if isinstance(part, Mapping) else None
    pairs = [
        (demo.get("past_judgements"), demo.get("synthesized_persona"))
        for demo in (demos if isinstance(demos, list) else [])
        if isinstance(demo, Mapping)
    ]
    complete = ((votes, text) for votes, text in pairs if isinstance(votes, str) and isinstance(text, str))
    return PersonaProgram(instructions, tuple(complete))


def _persona(path: Path, user: str) -> str:
    text = _text(path)
    if path.name.endswith(PROGRAM):
        text = _of_judge(_parse(text, path), path)
    if not text.strip():
        raise DataError(f"{path} is empty; expected the persona of user {user!r}")
    return text.strip()


def _of_judge(program: Mapping[str, object], path: Path) -> str:
    """The persona in the instructions of a saved judge."""
    if _instructions(program, WRITER):
        raise DataError(f"{path} is a program that writes personas; use it as model.persona_program=")
    instructions = _instructions(program, JUDGE) or ""
    persona, end, _ = instructions.partition(_START)[2].rpartition(_END)
    if not end:
        raise DataError(
            f"{path}, field '{JUDGE}.signature.instructions': expected a persona between 'FOLLOWING PERSONA: "
            "===' and '===', as SynthesizeMe saves it"
        )
    return persona


def _instructions(program: Mapping[str, object], name: str) -> str | None:
    """Instructions of one predictor of a DSPy program."""
    value: object = program
    for key in (name, "signature", "instructions"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding=UTF8)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error})") from None


def _parse(text: str, path: Path) -> Mapping[str, object]:
    """A DSPy program: predictor → its state.  Raises DataError for a text that is no JSON object."""
    try:
        program = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); expected a program that DSPy saved") from None
    if not isinstance(program, dict):
        raise DataError(f"{path} is not a JSON object; expected a program that DSPy saved")
    return program
