"""The meeting of the ranks of all hosts: who has refused to go on, who has failed, who was lost on the way.

A rank whose peer has died sees a broken connection, not a name. Ranks write down what becomes of them in a key-value
store, and ask there who is left; `hdscale.cluster.arrival` opens the meeting.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage] - documented there

from hdscale.errors import LostRankError, UserError

READY_SECONDS = 1800.0
"""Until all ranks have read their shards and built their teachers, which one host may have to fetch first."""
POLL_SECONDS = 0.1
"""Between looks into the store while something is waited for."""

_FAREWELL_SECONDS = 10.0
"""How long an ending rank listens for what has happened to the others."""
_ROLL_CALL_POLL_SECONDS = 1.0
"""Between looks into the store for a roll call, all the time that a run lasts."""
_END, _ROLL_CALL = "end", "roll call"
"""Keys: why the meeting ends; that somebody asks who is still there."""


class Rendezvous:
    """The meeting of this process with all others."""

    def __init__(self, store: Any, rank: int, hosts: Sequence[str | None]) -> None:
        """Take what is known before the others have come.

        Args:
            store: of keys and values that all ranks share.
            rank: of this process.
            hosts: one name per rank, None where nobody knows it yet.
        """
        self.store = store
        self.rank = rank
        self.hosts = tuple(hosts)
        self.launched = True  # by a launcher; False: this process meets itself
        self._end: Exception | None = None
        self._closed = threading.Event()
        self._answering: threading.Thread | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.hosts)

    @property
    def group_store(self) -> Any:
        """Keys for the process group that is built on this meeting."""
        return PrefixStore("group", self.store)

    def open(self, hosts: Sequence[str]) -> None:
        """Go on with all ranks present; from now on this one answers when another asks who is still there.

        Args:
            hosts: one name per rank.
        """
        self.hosts = tuple(hosts)
        self._answering = threading.Thread(target=self._answer_roll_calls, args=(self.store.clone(),), daemon=True)
        self._answering.start()

    def close(self) -> None:
        """Stop answering."""
        self._closed.set()
        if self._answering is not None:
            self._answering.join()

    def refuse(self, error: UserError) -> None:
        """Tell all ranks why this one will not go on, and find out whether rank 0 says the same."""
        with contextlib.suppress(dist.DistError):
            self._post(UserError(f"{name_ranks([self.rank], self.hosts)}: {error}", reported_by=0))
            self.store.set(f"refused/{self.rank}", str(error))
            if self.rank and self._says(0, str(error)):
                error.reported_by = 0
            self._leave()

    def wait_until_ready(self) -> None:
        """Wait for the others to have come through their own checks.

        Raises:
            UserError: another rank has refused, or has not come so far.
            LostRankError: another rank has failed.
        """
        self.store.set(f"ready/{self.rank}", "")
        if missing := self.missing("ready", READY_SECONDS):
            raise UserError(
                f"{name_ranks(missing, self.hosts)} did not get ready within {READY_SECONDS / 60:.0f} minutes: "
                "see its own messages, and what it was doing (reading shards, fetching or building teachers)",
                reported_by=0,
            )

    def explain(self, error: Exception) -> Exception:
        """Find out what has become of the others after an exception of this rank.

        Args:
            error: a broken connection makes this rank ask for the others; with anything else it is the one to be named.

        Returns:
            An error that names ranks and hosts where others are at fault, else `error` itself.
        """
        try:
            if not _is_broken_connection(error):
                who, what = name_ranks([self.rank], self.hosts), f"{type(error).__name__}: {error}"
                self._post(LostRankError(f"{who} failed, see its traceback: {one_line(what)[:300]}", reported_by=0))
                self._leave()
                return error
            self.store.set(_ROLL_CALL, "")
            lost = self.missing("here", _FAREWELL_SECONDS)
            if lost:
                self._post(self._lost(lost))
                self._leave()
                return self._lost(lost)
        except (UserError, LostRankError) as reason:
            self._leave()
            return reason
        except dist.DistError:  # the store is gone, and with it rank 0, perhaps after it has said why
            return self._end or self._lost([0])
        return error

    def missing(self, what: str, seconds: float, *, heed_end: bool = True) -> list[int]:
        """Return the ranks that have not said `what` when the time is up.

        Args:
            what: beginning of the keys in the store; a rank's number ends them.
            seconds: to wait at most.
            heed_end: raise the reason, once a rank has posted why the meeting ends.

        Raises:
            UserError: a rank has refused to go on.
            LostRankError: a rank has failed or is gone.
        """
        missing = list(range(self.world_size))
        deadline = time.monotonic() + seconds
        while True:
            if heed_end and (end := self._posted(self.store)):
                raise end
            missing = [rank for rank in missing if not self.store.check([f"{what}/{rank}"])]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(POLL_SECONDS)

    def _answer_roll_calls(self, store: Any) -> None:
        """Answer in a thread: a rank whose own connections are whole waits in its collective for ever."""
        with contextlib.suppress(dist.DistError):
            while not self._closed.wait(_ROLL_CALL_POLL_SECONDS):
                if store.check([_ROLL_CALL]):
                    store.set(f"here/{self.rank}", "")
                    self._end = self._posted(store)

    def _lost(self, ranks: Sequence[int]) -> LostRankError:
        return LostRankError(
            f"{name_ranks(ranks, self.hosts)} ended without a word: the process was killed, memory ran out, or the "
            "host or its network is down; mend that and start the same command again: it goes on from the last "
            "checkpoint",
            reported_by=min(set(range(self.world_size)) - set(ranks), default=0),
        )

    def _post(self, error: UserError | LostRankError) -> None:
        """Write down for all ranks why the meeting ends; the first reason stays."""
        text = json.dumps([isinstance(error, UserError), str(error), error.reported_by])
        self.store.compare_set(_END, "", text)

    def _posted(self, store: Any) -> UserError | LostRankError | None:
        if not store.check([_END]):
            return None
        is_mistake, text, reported_by = json.loads(store.get(_END))
        return (UserError if is_mistake else LostRankError)(text, reported_by=reported_by)

    def _says(self, rank: int, reason: str) -> bool:
        """Wait a little for another rank's refusal; tell whether it is the same."""
        deadline = time.monotonic() + _FAREWELL_SECONDS / 2
        while not self.store.check([f"refused/{rank}"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return self.store.get(f"refused/{rank}").decode() == reason

    def _leave(self) -> None:
        """Say that this rank ends; the store dies with rank 0, which therefore stays until the others have heard."""
        with contextlib.suppress(dist.DistError):
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                self.missing("left", _FAREWELL_SECONDS, heed_end=False)


def name_ranks(ranks: Sequence[int], hosts: Sequence[str | None]) -> str:
    """Name ranks by host: `node2 (ranks 8-15), node3 (rank 16)`."""
    by_host: dict[str | None, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    return ", ".join(f"{host} ({_spans(own)})" if host else _spans(own) for host, own in by_host.items())


def _spans(ranks: Sequence[int]) -> str:
    """Write ascending ranks as `rank 3`, or `ranks 0-3, 5`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _is_broken_connection(error: Exception) -> bool:
    """Tell a collective that lost a peer from any other failure: gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def one_line(text: str) -> str:
    """Return a text without line breaks and runs of spaces."""
    return " ".join(text.split())
