"""Fuzz of user ids: random spellings of known users, written to files and read back.

A user is a whole number or a text, and is spelled at random: as integer, float, decimal or text, in several
Unicode forms, with white space at the ends.  Near misses ("7.0", "07") are users of their own.  Every
spelling must be read as its user, and every float that stands for several numbers must be refused.

    python benchmarks/odd_inputs/user_ids.py [--spellings 10000] [--seed 0]
"""

import argparse
import json
import random
import tempfile
import unicodedata
from collections import defaultdict
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pgenrm_train.errors import DataError
from pgenrm_train.records.rows import read_pairs

BLANKS = ("", "", " ", "\t", "\u00a0", "\u2003", "\ufeff", "\r\n")
LETTERS = "abzAZ09_-.@/ äöéñ漢字한글कि" + "e\u0301o\u0308a\u030a"
VOTE = {"context": "Fix my garden?", "chosen": "Gladly.", "rejected": "No."}


def whole_number(rng: random.Random) -> tuple[str, dict[str, object]]:
    """A user with a number, and its spellings by the type of the column."""
    number = rng.choice((rng.randrange(100), rng.randrange(-(10**6), 10**6), rng.randrange(2**53), 2**53 - 1))
    spelled: dict[str, object] = {
        "int64": number,
        "double": float(number),
        "decimal128(38, 2)": Decimal(number),
        "string": blank(rng, str(number)),
    }
    return str(number), spelled


def text(rng: random.Random) -> tuple[str, dict[str, object]]:
    """A user with a text, and two of its spellings."""
    near_miss = rng.choice(("{}.0", "0{}", "+{}", "{}e0", "{}_", "#{}")).format(rng.randrange(100))
    drawn = "".join(rng.choices(LETTERS, k=rng.randint(1, 12)))
    user = unicodedata.normalize("NFC", rng.choice((near_miss, f"x{drawn}x")))
    return user, {
        "string": blank(rng, unicodedata.normalize(rng.choice(("NFC", "NFD")), user)),
        "large_string": blank(rng, user),
    }


def blank(rng: random.Random, name: str) -> str:
    return f"{rng.choice(BLANKS)}{name}{rng.choice(BLANKS)}"


def read_back(folder: Path, kind: str, values: list[object]) -> list[str]:
    """User ids of one file: parquet with a column of the type, or JSONL."""
    if kind == "jsonl":
        path = folder / "votes.jsonl"
        path.write_text("".join(json.dumps(VOTE | {"user_id": value}) + "\n" for value in values))
    else:
        path = folder / "votes.parquet"
        kinds = {"decimal128(38, 2)": pa.decimal128(38, 2), "double": pa.float64()}
        table = pa.Table.from_pylist([VOTE] * len(values))
        column = pa.array(values, kinds[kind] if kind in kinds else pa.type_for_alias(kind))
        pq.write_table(table.append_column("user_id", column), path)
    return [pair.user_id for pair in read_pairs(path)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spellings", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    columns: dict[str, list[tuple[str, object]]] = defaultdict(list)
    for _ in range(options.spellings):
        user, spelled = rng.choice((whole_number, text))(rng)
        kind = rng.choice(list(spelled))
        in_json = not isinstance(spelled[kind], Decimal) and rng.random() < 0.5
        columns["jsonl" if in_json else kind].append((user, spelled[kind]))
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, drawn in columns.items():
            made = read_back(Path(folder), kind, [value for _, value in drawn])
            wrong += [
                (kind, value, got) for (user, value), got in zip(drawn, made, strict=True) if got != user
            ]
        refused = 0
        large = [float(rng.randrange(2**53, 2**60)) for _ in range(100)]
        for value in large:
            try:
                wrong.append(("float", value, read_back(Path(folder), "double", [value])[0]))
            except DataError:
                refused += 1
    for kind, value, got in wrong[:20]:
        print(f"WRONG {kind}: {value!r} was read as {got!r}")
    users = len({user for drawn in columns.values() for user, _ in drawn})
    counts = ", ".join(f"{kind} {len(drawn)}" for kind, drawn in sorted(columns.items()))
    print(f"{options.spellings} spellings of {users} users ({counts}): {len(wrong)} read wrongly")
    print(f"{refused} of {len(large)} floats from 2^53 refused")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
