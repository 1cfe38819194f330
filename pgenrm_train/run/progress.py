"""Progress bar of a stage, on stderr."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str, total: int | None = None, status: object = "") -> Iterator[T]:
    """Yield `items` and show a bar with ETA, with `str(status)` after each item."""
    from tqdm import tqdm

    for item in (bar := tqdm(items, desc=what, total=total, mininterval=0.5, dynamic_ncols=True)):
        yield item
        bar.set_postfix_str(str(status), refresh=False)
