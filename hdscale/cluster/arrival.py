"""Where the ranks of all hosts meet: who is missing, who has come with something else, who was lost on the way.

PyTorch's own meeting says how many are missing, not which hosts; and a rank whose peer has died sees a broken
connection, not a name. Here ranks tell each other more, through the key-value store that their process group is then
built on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented there

from hdscale.cluster.launcher import check_hostfile, planned_hosts
from hdscale.config.loading import flat_fields
from hdscale.errors import LostRankError, UserError
from hdscale.provenance import source_digest, versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hdscale.config.recipe import Recipe

_READY_SECONDS = 1800.0
"""Until all ranks have read their shards and built their teachers, which one host may have to fetch first."""
_FAREWELL_SECONDS = 10.0
"""How long an ending rank listens for what has happened to the others."""
_POLL_SECONDS = 0.1
_ROLL_CALL_POLL_SECONDS = 1.0
_END, _ROLL_CALL = "end", "roll call"


class Rendezvous:
    """The meeting of this process with all others."""

    def __init__(self, store: Any, rank: int, hosts: Sequence[str | None]) -> None:
        """Take what is known before the others have come.

        Args:
            store: of keys and values that all ranks share.
            rank: of this process.
            hosts: a name a rank, None where nobody knows it yet.
        """
        self.store = store
        self.rank = rank
        self.hosts = tuple(hosts)
        self.launched = True
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
        """Go on with all ranks present; from now on this one answers when another asks who is still there."""
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
            self._post(UserError(f"{name_ranks([self.rank], self.hosts)}: {error}", told_by=0))
            self.store.set(f"refused/{self.rank}", str(error))
            if self.rank and self._says(0, str(error)):
                error.told_by = 0
            self._leave()

    def wait_until_ready(self) -> None:
        """Wait for the others to have come through their own checks.

        Raises:
            UserError: another rank has refused, or has not come so far.
            LostRankError: another rank has failed.
        """
        self.store.set(f"ready/{self.rank}", "")
        if missing := self.missing("ready", _READY_SECONDS):
            raise UserError(
                f"{name_ranks(missing, self.hosts)} did not get ready within {_READY_SECONDS / 60:.0f} minutes: "
                "see its own messages, and what it was doing (reading shards, fetching or building teachers)",
                told_by=0,
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
                self._post(LostRankError(f"{who} failed, see its traceback: {_one_line(what)[:300]}", told_by=0))
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
            time.sleep(_POLL_SECONDS)

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
            told_by=min(set(range(self.world_size)) - set(ranks), default=0),
        )

    def _post(self, error: UserError | LostRankError) -> None:
        """Write down why the meeting ends; the first reason stays."""
        text = json.dumps([isinstance(error, UserError), str(error), error.told_by])
        self.store.compare_set(_END, "", text)

    def _posted(self, store: Any) -> UserError | LostRankError | None:
        if not store.check([_END]):
            return None
        is_mistake, text, told_by = json.loads(store.get(_END))
        return (UserError if is_mistake else LostRankError)(text, told_by=told_by)

    def _says(self, rank: int, reason: str) -> bool:
        """Wait a little for another rank's refusal; tell whether it is the same."""
        deadline = time.monotonic() + _FAREWELL_SECONDS / 2
        while not self.store.check([f"refused/{rank}"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return self.store.get(f"refused/{rank}").decode() == reason

    def _leave(self) -> None:
        """Say that this rank ends; the store dies with rank 0, which therefore stays until the others have heard."""
        with contextlib.suppress(dist.DistError):
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                self.missing("left", _FAREWELL_SECONDS, heed_end=False)


_current: Rendezvous | None = None
_meetings = itertools.count()
"""Of this process: each has its own keys in the store."""


@contextlib.contextmanager
def all_hosts(recipe: Recipe, **ds_configs: Mapping[str, Any]) -> Iterator[Rendezvous]:
    """Wait until all ranks have come with the same code and settings; inside, one rank's mistake ends all of them.

    Args:
        recipe: resolved.
        ds_configs: checked DeepSpeed configs, by what they are for.

    Raises:
        UserError: naming the hosts that did not come, or that have something else.
    """
    check_hostfile()
    facts = {f"recipe {field}": value for field, value in flat_fields(recipe.model_dump(mode="json")).items()}
    for name, values in ds_configs.items():
        facts |= {f"{name} {field}": value for field, value in flat_fields(values).items()}
    with _meeting(facts, recipe.run.rendezvous_seconds) as place:
        yield place


@contextlib.contextmanager
def meeting() -> Iterator[Rendezvous]:
    """Give the meeting that `all_hosts` has made, or make one in which only versions are compared."""
    if _current is not None:
        yield _current
        return
    with _meeting({}, _READY_SECONDS) as place:
        yield place


@contextlib.contextmanager
def _meeting(facts: Mapping[str, Any], seconds: float) -> Iterator[Rendezvous]:
    global _current
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # its launcher numbers CPUs as visible GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with _launched_or_alone() as launched:
        _current = place = _arrive({**_code_facts(), **facts}, seconds)
        place.launched = launched
        try:
            yield place
        except UserError as error:
            if error.told_by is None:
                place.refuse(error)
            raise
        except Exception as error:
            explained = place.explain(error)
            if explained is error:
                raise
            raise explained from error
        finally:
            _current = None
            place.close()


def _code_facts() -> dict[str, str]:
    # Ranks with and without a GPU would wait for each other in different backends.
    device = "GPU" if torch.cuda.is_available() else "CPU"
    return {**versions(), "hdscale's source": f"sha256 {source_digest()[:12]}...", "kind of device": device}


def _arrive(facts: Mapping[str, Any], seconds: float) -> Rendezvous:
    """Meet the others at MASTER_ADDR:MASTER_PORT."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    planned = planned_hosts(world_size)
    place = Rendezvous(_open_store(rank, planned[0], seconds), rank, planned)
    # Where nobody has planned hosts, each says where it is.
    mine = {"host": planned[rank] or socket.gethostname(), "facts": facts}
    place.store.set(f"arrived/{rank}", json.dumps(mine))
    if missing := place.missing("arrived", seconds):
        raise UserError(
            f"{name_ranks(missing, planned)} did not come within {seconds:g} s (run.rendezvous_seconds): see what "
            "SSH and its own processes say; `python launch/preflight.py --hostfile HOSTS` checks every host",
            told_by=0,
        )
    everyone = [json.loads(place.store.get(f"arrived/{other}")) for other in range(world_size)]
    hosts = [one["host"] for one in everyone]
    check_same([one["facts"] for one in everyone], hosts)
    place.open(hosts)
    return place


def check_same(facts: Sequence[Mapping[str, Any]], hosts: Sequence[str | None]) -> None:
    """Compare what each rank has come with, by name.

    Args:
        facts: a mapping a rank, of values that are the same everywhere if all is well.
        hosts: of the ranks.

    Raises:
        UserError: naming what differs, and all hosts that have something else than rank 0's.
    """
    for name in sorted({name for mine in facts for name in mine}):
        values = [mine.get(name) for mine in facts]
        if others := [rank for rank, value in enumerate(values) if value != values[0]]:
            raise UserError(
                f"{name_ranks(others, hosts)}: has another {name} ({values[others[0]]}) than {name_ranks([0], hosts)} "
                f"({values[0]}): give all hosts the same files, devices and versions",
                told_by=0,
            )


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


def _open_store(rank: int, host: str | None, seconds: float) -> Any:
    """Open the key-value store that rank 0 keeps, or that torchrun keeps for all ranks."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where = f"{host or address} ({address}, port {port})"
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not keeps and (reason := _unanswered(address, port, seconds)):
        raise UserError(
            f"{where}: rank 0 did not answer within {seconds:g} s ({reason}): see its own messages, or, if it waits as "
            "well, open that port between the hosts"
        )
    try:
        store = TCPStore(
            address,
            port,
            is_master=keeps,
            wait_for_workers=False,
            multi_tenant=True,  # the next meeting of this process is at the same port
            timeout=timedelta(seconds=max(seconds, 30)),
        )
    except dist.DistError as error:
        raise UserError(
            f"{where}: ranks cannot meet there ({_one_line(str(error))[:100]}); another run may hold the port: give "
            "the launcher another --master_port"
        ) from error
    # A restart by torchrun meets in the same store.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"hdscale/{restart}/{next(_meetings)}", store)


def _unanswered(address: str, port: int, seconds: float) -> str | None:
    """Wait for somebody to listen; return why that was in vain. The store's own client prints its stack meanwhile."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(seconds, 1)).close()
            return None
        except OSError as error:
            if time.monotonic() > deadline:
                return error.strerror or str(error)
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _launched_or_alone() -> Iterator[bool]:
    """Give a process that no launcher has started the environment of a launch of one, while it meets itself.

    Yields:
        Whether a launcher has started it.
    """
    if "RANK" in os.environ:
        yield True
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)
    try:
        yield False
    finally:
        for name in alone:
            os.environ.pop(name, None)


def _is_broken_connection(error: Exception) -> bool:
    """Tell a collective that lost a peer from any other failure: gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _one_line(text: str) -> str:
    return " ".join(text.split())
