"""Many slow calls at a time, results in the order of completion, and the progress bar of a stage."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def concurrently(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[int, R]]:
    """Yield (index, function(item)) in the order of completion, with at most `workers` calls at a time.

    Items are taken as they are needed, so `items` may be endless.  One worker means no thread at all.
    An exception of a call is raised here and ends the rest.
    """
    numbered = enumerate(items)
    if workers == 1:
        yield from ((index, function(item)) for index, item in numbered)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="call")
    running: dict[Future[R], int] = {}
    try:
        while True:
            # Submit twice as many calls as workers, so that no worker idles while results are consumed.
            for index, item in islice(numbered, 2 * workers - len(running)):
                running[pool.submit(function, item)] = index
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def progress(items: Iterable[T], what: str, total: int | None = None, status: object = "") -> Iterator[T]:
    """Yield `items` and show a bar with ETA on stderr, with `str(status)` after each item."""
    from tqdm import tqdm

    for item in (bar := tqdm(items, desc=what, total=total, mininterval=0.5, dynamic_ncols=True)):
        yield item
        bar.set_postfix_str(str(status), refresh=False)
