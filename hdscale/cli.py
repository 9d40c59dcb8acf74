"""What commands share: how they end, and a check of an argument that several take.

They end with a readable line for a mistake of the user's or a lost host, with a traceback for a mistake of ours.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from hdscale.errors import LostRankError, UserError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75

_RANK_ZERO_HEAD_START = 5.0
"""Seconds that other ranks wait before they report: the launcher ends all ranks with the first one that fails, and one
line from rank 0 is better than the same line from every rank."""


def exit_code(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a command; turn errors that name what happened into one line on stderr.

    Returns:
        What the command returns, 2 for a `UserError`, 1 for a `LostRankError`.
    """
    try:
        return main(argv)
    except (UserError, LostRankError) as error:
        _report(error)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED


def _report(error: UserError | LostRankError) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if error.reported_by is None and rank:
        time.sleep(_RANK_ZERO_HEAD_START)
    if error.reported_by in (None, rank):
        where = f" (rank {rank} on {socket.gethostname()})" if rank else ""
        print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command on the process's own arguments and end the process."""
    try:
        code = exit_code(main, sys.argv[1:])
    except Exception:
        if not _among_ranks():
            raise
        traceback.print_exc()
        code = EXIT_FAILED
    if _among_ranks():
        # A failed rank: taking the process group down properly would wait for ranks that wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _among_ranks() -> bool:
    distributed = sys.modules.get("torch.distributed")  # not imported: this module is for light commands, too
    return distributed is not None and distributed.is_initialized()


def check_workers(workers: int) -> None:
    """Check `--workers`.

    Raises:
        UserError: it is below 1.
    """
    if workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}: leave it out for one a core")
