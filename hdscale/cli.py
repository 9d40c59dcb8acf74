"""How every command ends: one readable line for a mistake of the user's, a traceback for one of ours."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import TYPE_CHECKING, NoReturn

from hdscale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75

_RANK_ZERO_HEAD_START = 5.0
"""Seconds that other ranks wait before they report: the launcher ends all ranks with the first one that fails, and one
line from rank 0 is better than the same line from every rank."""


def exit_code(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a command; turn a `UserError` into one line on stderr and exit code 2."""
    try:
        return main(argv)
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(_RANK_ZERO_HEAD_START)
        where = f" (rank {rank})" if rank else ""
        print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command on the process's own arguments and end the process."""
    try:
        code = exit_code(main, sys.argv[1:])
    except Exception:
        if not _among_ranks():
            raise
        traceback.print_exc()
        code = 1
    if _among_ranks():
        # A failed rank: taking the process group down properly would wait for ranks that wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _among_ranks() -> bool:
    distributed = sys.modules.get("torch.distributed")  # not imported: this module is for light commands, too
    return distributed is not None and distributed.is_initialized()
