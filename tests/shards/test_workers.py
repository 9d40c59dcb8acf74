"""Tasks in worker processes, and what becomes of the processes when one of them or their parent ends."""

import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest

from hdscale.errors import UserError
from hdscale.shards import workers
from hdscale.shards.workers import in_processes
from tests.helpers.launcher import environment, is_running, running, until


def half_and_pid(number):
    return number / 2, os.getpid()


def noted(done, number):
    done.append(number)
    return half_and_pid(number)


def touch_or_wait(task):
    """Create a file, or wait for it."""
    path, waits = task
    if waits:
        until(path.exists, path.name)
    else:
        path.touch()
    return waits


def fail_or_wait(task):
    """Fail the first task; note any other, and let it wait."""
    number, folder = task
    if number == 0:
        raise ValueError("the first one")
    (folder / f"begun-{number}").touch()
    until((folder / "go").exists, "go")


def kill_the_second(number):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def interrupt_self(number):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return None
    return number


@pytest.mark.parametrize("count", [0, 1])
def test_one_worker_is_this_process_and_takes_the_tasks_in_order_as_their_results_are_wanted(count):
    done = []
    results = in_processes(partial(noted, done), [3, 1, 2], count)
    assert next(results) == (1.5, os.getpid())
    assert done == [3]
    assert list(results) == [(0.5, os.getpid()), (1.0, os.getpid())]


@pytest.mark.parametrize("tasks", [range(20), range(1), ()])
def test_more_workers_are_other_processes_and_do_every_task_once(tasks):
    found = list(in_processes(half_and_pid, tasks, 2))
    assert sorted(half for half, _ in found) == [number / 2 for number in tasks]
    pids = {pid for _, pid in found}
    assert os.getpid() not in pids
    assert len(pids) <= 2


def test_a_result_is_there_before_those_of_earlier_tasks_that_take_longer(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    results = in_processes(touch_or_wait, [(first, True), (second, False)], 2)
    assert next(results) is False
    first.touch()
    assert list(results) == [True]


def test_an_error_of_a_task_comes_through_and_tasks_that_have_not_begun_are_dropped(tmp_path, monkeypatch):
    as_completed, shutdown, futures = workers.as_completed, ProcessPoolExecutor.shutdown, []

    def note(given):
        futures.extend(given)
        return as_completed(given)

    def let_go(wanted):
        if wanted:
            until(futures[-1].done, "the last task to be dropped")
        (tmp_path / "go").touch()

    def release(pool, wait=True, *, cancel_futures=False):
        """Let the tasks that have begun end as soon as the others are dropped, or at once where they are not."""
        threading.Thread(target=let_go, args=[cancel_futures]).start()
        shutdown(pool, wait, cancel_futures=cancel_futures)

    monkeypatch.setattr(workers, "as_completed", note)
    monkeypatch.setattr(ProcessPoolExecutor, "shutdown", release)
    with pytest.raises(ValueError, match="the first one"):
        list(in_processes(fail_or_wait, [(number, tmp_path) for number in range(20)], 2))
    assert futures[-1].cancelled()
    assert len(list(tmp_path.glob("begun-*"))) < 10  # two processes, and the few that the pool hands out in advance


def test_a_killed_worker_is_one_line_that_says_what_to_do():
    with pytest.raises(UserError, match=r"^a worker process was killed \(out of memory\?\): .* fewer --workers$"):
        list(in_processes(kill_the_second, range(4), 2))


def test_workers_leave_ctrl_c_to_their_parent():
    assert sorted(in_processes(interrupt_self, range(4), 2)) == [0, 1, 2, 3]


PARENT = """
import os
import signal
import sys
from pathlib import Path

from hdscale.shards.workers import in_processes

def work(number):
    Path(sys.argv[1], str(os.getpid())).touch()
    signal.pause()

if __name__ == "__main__":
    list(in_processes(work, [0, 1], 2))
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script, pids = tmp_path / "parent.py", tmp_path / "pids"
    script.write_text(PARENT)
    pids.mkdir()
    with running([sys.executable, str(script), str(pids)], env=environment()) as parent:
        until(lambda: parent.poll() is not None or len(list(pids.iterdir())) == 2, "two workers")
        assert parent.poll() is None
        parent.kill()
        parent.wait()
        for path in pids.iterdir():
            until(lambda pid=path.name: not is_running(pid), "a worker to end with its parent")
