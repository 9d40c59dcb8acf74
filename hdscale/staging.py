"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Hand out a temporary path beside `path`; on success flush it to the disk and rename it, else remove it."""
    temporary = _temporary(path)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def create_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Create a folder together with its first files, unless somebody else, maybe another machine, has been faster."""
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        fill(temporary)
        temporary.rename(path)  # fails when there is a folder with files in it
        flush(path.parent)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove the temporary files that killed runs left for targets whose names start with `prefix`, a glob."""
    for path in folder.glob(f".{prefix}*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    # The process id keeps apart a killed run's last worker and the run that continues it; the host's name, machines.
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
