import io
import re

import pytest

from hdscale import progress as module
from hdscale.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets itself."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_elsewhere_than_on_a_terminal_there_is_a_line_a_minute_and_one_at_the_end(clock):
    out = io.StringIO()
    with Progress("masks", 1000, "masks", out) as progress:
        for _ in range(13):
            clock[0] += 10
            progress(20, "loss 0.5")
    lines = out.getvalue().splitlines()
    assert lines == [
        "masks: 120 of 1000 masks, 2 a second, 7.3 minutes left, loss 0.5",
        "masks: 240 of 1000 masks, 2 a second, 6.3 minutes left, loss 0.5",
        "masks: 260 of 1000 masks, 2 a second, 6.2 minutes left, loss 0.5",
    ]


def test_what_an_earlier_start_has_done_does_not_count_for_the_rate(clock):
    out = io.StringIO()
    with Progress("run", 100, "steps", out, done=40) as progress:
        clock[0] += 5
        progress(10)
    assert out.getvalue() == "run: 50 of 100 steps, 2 a second, 0.4 minutes left\n"


def test_nothing_is_shown_without_a_stream(clock, capsys):
    with Progress("run", 10, "steps", None) as progress:
        clock[0] += 100
        progress(1)
    assert capsys.readouterr() == ("", "")


def test_a_failure_has_no_last_line(clock):
    out = io.StringIO()
    with pytest.raises(ZeroDivisionError), Progress("run", 10, "steps", out):
        _ = 1 / 0
    assert out.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_with_the_note():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with Progress("run", 10, "steps", out, done=4) as progress:
        progress(6, "loss 0.25")
    last = out.getvalue().split("\r")[-1]
    assert re.search(r"run: 100%.*10/10.*steps.*loss 0\.25", last), last
