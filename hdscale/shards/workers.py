"""Tasks in worker processes: a killed worker is one readable line, and no worker outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from hdscale.errors import UserError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def in_processes(function: Callable[[_Task], _Result], tasks: Sequence[_Task], workers: int) -> Iterator[_Result]:
    """Yield the result of every task as soon as it is there.

    Args:
        function: does one task; pickled, and so are tasks and results.
        tasks: one call each.
        workers: processes; 0 or 1 works in this one, in the order of the tasks.

    Raises:
        UserError: a worker was killed. What `function` raises comes through; tasks that have not begun are dropped.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    with ProcessPoolExecutor(min(workers, max(1, len(tasks))), initializer=_prepare_worker) as pool:
        try:
            for future in as_completed([pool.submit(function, task) for task in tasks]):
                yield future.result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?): run again with fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even if it is killed: an idle worker would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
