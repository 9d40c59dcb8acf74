"""How far long work is: a bar with rate and time left on a terminal, a plain line every minute elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Counts finished units and shows them on a stream; None shows nothing (ranks other than the first)."""

    def __init__(self, label: str, total: int, unit: str, stream: TextIO | None, done: int = 0) -> None:
        """Start counting.

        Args:
            label: what is being done.
            total: units in all.
            unit: what is counted, such as `samples`.
            stream: where to show it.
            done: units that an earlier start has finished; they do not count for the rate.
        """
        self._label, self._total, self._unit, self._stream = label, total, unit, stream
        self._first = self._done = done
        self._started = self._last_line = time.monotonic()
        on_terminal = stream is not None and stream.isatty()
        self._bar = (
            tqdm(desc=label, total=total, unit=f" {unit}", initial=done, file=stream, dynamic_ncols=True)
            if on_terminal
            else None
        )
        self._note = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()

    def __call__(self, count: int, note: str = "") -> None:
        """Count `count` more units; `note` stands behind the figures, such as the loss."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        if self._stream is None:
            return
        rate = (self._done - self._first) / max(1e-9, self._last_line - self._started)
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        note = f", {self._note}" if self._note else ""
        print(
            f"{self._label}: {self._done} of {self._total} {self._unit}, {rate:.4g} a second, "
            f"{left / 60:.1f} minutes left{note}",
            file=self._stream,
            flush=True,
        )
