"""Fuzz of column types: votes whose columns have random Arrow types, in parquet and Arrow files.

Each table must build with the right values or be refused in one sentence that names the file.  Right values
are known for numbers, times and texts; a traceback or another value counts as wrong.

    python benchmarks/odd_inputs/column_types.py [--tables 2000] [--seed 0]
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_builders.sources import pairs
from pgenrm_train.config import DataConfig
from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.raw_rows import LeftOut

ROWS = 3
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
MAP = pa.map_(pa.string(), pa.string())
NUMBERS = [
    *(pa.int8(), pa.int32(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64()),
    *(pa.decimal128(9, 2), pa.decimal256(50, 3)),
]
TIMES = [
    *(
        pa.date32(),
        pa.date64(),
        pa.timestamp("s"),
        pa.timestamp("ms", "UTC"),
        pa.timestamp("us", "Asia/Tokyo"),
    ),
    *(pa.timestamp("ns"), pa.timestamp("us", "+05:30")),
]
TEXTS = [
    *(pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())),
    pa.dictionary(pa.int8(), pa.large_string()),
]
ODD = [
    *(
        pa.null(),
        pa.bool_(),
        pa.binary(),
        pa.binary_view(),
        pa.time32("s"),
        pa.time64("ns"),
        pa.duration("us"),
    ),
    *(
        pa.list_(pa.int8()),
        pa.list_(pa.string(), 2),
        pa.struct([("a", pa.int8())]),
        pa.month_day_nano_interval(),
    ),
    *(
        pa.map_(pa.string(), pa.float32()),
        pa.uuid(),
        pa.bool8(),
        pa.timestamp("us", "Mars/Olympus"),
        pa.list_view(MAP),
    ),
    pa.run_end_encoded(pa.int32(), pa.string()),
]
# column → the field of a pair, and the value that it has for a number, time or text
FIELDS: dict[str, tuple[Callable[[PreferencePair], object], Callable[[Any], object]]] = {
    "user_id": (lambda p: p.user_id, lambda v: v.strip() if isinstance(v, str) else str(int(v))),
    "chosen_score": (lambda p: p.chosen_score, float),
    "turn": (lambda p: p.turn, int),
    "position": (lambda p: p.position, int),
    "time": (lambda p: p.time, lambda v: v.timestamp() if isinstance(v, datetime) else float(v)),
    "criteria": (lambda p: p.explicit.criteria, str.strip),
    "type": (lambda p: p.kind, str.strip),
    "context": (lambda p: p.query, str),
    "chosen": (lambda p: p.chosen, str),
}
SUITED = {  # columns whose values are read from these types, and so must not be refused
    **dict.fromkeys(("chosen_score", "turn", "position"), NUMBERS),
    **dict.fromkeys(("criteria", "type", "context", "chosen"), TEXTS),
    "user_id": [*NUMBERS, *TEXTS],
    "time": [*NUMBERS, *TIMES],
}


def value(rng: random.Random, kind: pa.DataType) -> Any:
    """A random value that the type holds, as Python has it."""
    if kind in NUMBERS:
        number = rng.randrange(100)
        return Decimal(number) if pa.types.is_decimal(kind) else number
    if kind in TIMES:
        day = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=rng.randrange(300))
        return day if pa.types.is_timestamp(kind) else day.date()
    if kind in TEXTS:
        return "".join(rng.choices("abc äß漢", k=5)) + "x"
    return None


def array(rng: random.Random, kind: pa.DataType) -> tuple[pa.Array, list[Any]]:
    """A column of the type, and its values; of an odd type from raw bytes where Python has no value."""
    if kind in (*NUMBERS, *TIMES, *TEXTS):
        values = [value(rng, kind) for _ in range(ROWS)]
        return pa.array(values, kind), values
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    try:
        drawn = pa.array([rng.randrange(5) for _ in range(ROWS)], pa.int64()).cast(storage)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError):
        drawn = odd(rng, storage)
    return (pa.ExtensionArray.from_storage(kind, drawn) if storage != kind else drawn), []


def odd(rng: random.Random, kind: pa.DataType) -> pa.Array:
    made = {
        pa.binary(): [b"\xff\x00"] * ROWS,
        pa.binary_view(): [b"ab"] * ROWS,
        pa.list_(pa.int8()): [[1, None]] * ROWS,
        pa.list_(pa.string(), 2): [["a", "b"]] * ROWS,
        pa.struct([("a", pa.int8())]): [{"a": 1}] * ROWS,
        pa.map_(pa.string(), pa.float32()): [[("a", 1.0), (rng.choice("ab"), 2.0)]] * ROWS,
        pa.month_day_nano_interval(): [(1, 2, 3)] * ROWS,
        pa.list_view(MAP): [[[("role", "user"), ("content", "q")]]] * ROWS,
        pa.binary(16): [bytes(16)] * ROWS,
    }
    if kind in made:
        return pa.array(made[kind], kind)
    if pa.types.is_run_end_encoded(kind):
        return pa.RunEndEncodedArray.from_arrays(pa.array([ROWS], pa.int32()), pa.array(["same"]))
    return pa.nulls(ROWS, kind)


def table(rng: random.Random) -> tuple[pa.Table, dict[str, tuple[pa.DataType, list[Any]]]]:
    """A table of votes with one to three columns of random types, and what they hold."""
    context = [[{"role": "user", "content": f"question {n}"}] for n in range(ROWS)]
    columns: dict[str, pa.Array] = {
        "user_id": pa.array(["ann"] * ROWS),
        "context": pa.array(
            context, rng.choice((pa.list_(MESSAGE), pa.large_list(MESSAGE), pa.list_view(MESSAGE)))
        ),
        "chosen": pa.array([{"role": "assistant", "content": f"yes {n}"} for n in range(ROWS)], MESSAGE),
        "rejected": pa.array([[("role", "assistant"), ("content", f"no {n}")] for n in range(ROWS)], MAP),
    }
    drawn = {}
    for column in rng.sample(list(FIELDS), rng.randint(1, 3)):
        kind = rng.choice(rng.choice((NUMBERS, TIMES, TEXTS, ODD)))
        columns[column], values = array(rng, kind)
        drawn[column] = kind, values
    if rng.random() < 0.2:
        columns["unused"], _ = array(rng, rng.choice(ODD))
    return pa.table(columns), drawn


def check(path: Path, drawn: dict[str, tuple[pa.DataType, list[Any]]]) -> tuple[str, str]:
    """(`read`, `refused` or `WRONG`, detail) of one file."""
    kinds = ", ".join(f"{column}: {kind}" for column, (kind, _) in drawn.items())
    suited = [kind in SUITED[column] for column, (kind, _) in drawn.items()]
    try:
        made = list(pairs.build(DataConfig(name="pairs", path=str(path)), 0, LeftOut()))
    except DataError as error:
        clear = path.name in str(error) and "\n" not in str(error)
        missed = all(suited) and "unused" not in str(error)
        return ("WRONG" if missed or not clear else "refused"), f"{kinds}: {error}"
    except Exception as error:  # a crash is what the fuzz looks for
        return "WRONG", f"{kinds}: {type(error).__name__}: {error}"
    for (column, (_, values)), is_suited in zip(drawn.items(), suited, strict=True):
        field, expected = FIELDS[column]
        if is_suited:
            for pair, given in zip(made, values, strict=True):
                of_day = isinstance(given, date) and not isinstance(given, datetime)
                given = datetime(given.year, given.month, given.day, tzinfo=UTC) if of_day else given
                if field(pair) != expected(given):
                    return "WRONG", f"{kinds}: {column} {given!r} was read as {field(pair)!r}"
    return "read", kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, outcomes = random.Random(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.tables):
            votes, drawn = table(rng)
            path = Path(folder, rng.choice(("votes.parquet", "votes.arrow")))
            try:
                if path.suffix == ".parquet":
                    pq.write_table(votes, path)
                else:
                    with pa.ipc.new_stream(str(path), votes.schema) as stream:
                        stream.write_table(votes)
            except (pa.ArrowException, NotImplementedError):  # parquet has no such type
                outcomes["not written"] += 1
                continue
            outcome, detail = check(path, drawn)
            outcomes[outcome] += 1
            if outcome == "WRONG" and outcomes[outcome] <= 20:
                print(f"WRONG {path.suffix} {detail}")
    print(f"{options.tables} tables: {json.dumps(dict(outcomes))}")
    raise SystemExit(bool(outcomes["WRONG"]))


if __name__ == "__main__":
    main()
