"""How the ranks of all hosts come together: who is missing, and who has come with something else.

PyTorch's own meeting says how many are missing, not which hosts. Here ranks tell each other more, through the key-value
store that their process group is then built on; what they do once all are there is in `hdscale.cluster.rendezvous`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented there

from hdscale.cluster.launcher import check_hostfile, free_port, planned_hosts, started_by_launcher
from hdscale.cluster.rendezvous import POLL_SECONDS, READY_SECONDS, Rendezvous, name_ranks, one_line
from hdscale.config.loading import flat_fields
from hdscale.config.recipe import Recipe
from hdscale.errors import UserError
from hdscale.hashing import short_value
from hdscale.provenance import source_digest, versions

_current: Rendezvous | None = None
"""The meeting that this process is in."""
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
    """Give the meeting that `all_hosts` has made, or make one in which only code, versions and devices are compared."""
    if _current is not None:
        yield _current
        return
    with _meeting({}, READY_SECONDS) as place:
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
            if error.reported_by is None:
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
    return {**versions(), "hdscale's source": short_value(source_digest()), "kind of device": device}


def _arrive(facts: Mapping[str, Any], seconds: float) -> Rendezvous:
    """Meet the others at MASTER_ADDR:MASTER_PORT, and compare facts with them.

    Raises:
        UserError: who did not come within so many seconds, or has come with something else.
    """
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
            reported_by=0,
        )
    everyone = [json.loads(place.store.get(f"arrived/{other}")) for other in range(world_size)]
    hosts = [one["host"] for one in everyone]
    check_same([one["facts"] for one in everyone], hosts)
    place.open(hosts)
    return place


def check_same(facts: Sequence[Mapping[str, Any]], hosts: Sequence[str | None]) -> None:
    """Compare what each rank has come with, by name.

    Args:
        facts: one mapping per rank, of values that are the same everywhere if all is well.
        hosts: one name per rank; None where nobody knows it.

    Raises:
        UserError: naming what differs, and all hosts that have something else than rank 0's.
    """
    for name in sorted({name for mine in facts for name in mine}):
        values = [mine.get(name) for mine in facts]
        if others := [rank for rank, value in enumerate(values) if value != values[0]]:
            raise UserError(
                f"{name_ranks(others, hosts)}: has another {name} ({values[others[0]]}) than {name_ranks([0], hosts)} "
                f"({values[0]}): give all hosts the same files, devices and versions",
                reported_by=0,
            )


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
            f"{where}: ranks cannot meet there ({one_line(str(error))[:100]}); another run may hold the port: give "
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
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _launched_or_alone() -> Iterator[bool]:
    """Give a process that no launcher has started the environment of a launch of one, while it meets itself.

    Yields:
        Whether a launcher has started it.
    """
    if started_by_launcher():
        yield True
        return
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(free_port())
    os.environ.update(alone)
    try:
        yield False
    finally:
        for name in alone:
            os.environ.pop(name, None)
