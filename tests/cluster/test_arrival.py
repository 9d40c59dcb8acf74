"""Meetings of several ranks in one process: a thread each, with connections of their own to a real store.

Patience is long where a test expects an answer, and none where it expects silence: no test depends on the time.
"""

import base64
import itertools
import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from hdscale.cluster import arrival, rendezvous
from hdscale.cluster.arrival import all_hosts, check_same, meeting
from hdscale.cluster.launcher import free_port, planned_hosts
from hdscale.cluster.rendezvous import Rendezvous, name_ranks
from hdscale.config.loading import flat_fields, load_recipe
from hdscale.errors import LostRankError, UserError
from tests.helpers.launcher import until

HOSTS = ["node1", "node1", "node2", "node2"]
LONG = 300.0  # seconds: only ends a hang


@pytest.fixture
def ranks(monkeypatch):
    """Four open meetings, and a way to let each do something at once."""
    monkeypatch.setattr(rendezvous, "_FAREWELL_SECONDS", LONG)
    monkeypatch.setattr(rendezvous, "READY_SECONDS", LONG)
    monkeypatch.setattr(rendezvous, "_ROLL_CALL_POLL_SECONDS", 0.05)
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    meetings = [Rendezvous(store.clone(), rank, HOSTS) for rank in range(4)]
    for place in meetings:
        place.open(HOSTS)
    yield meetings
    for place in meetings:
        place.close()


@pytest.fixture
def no_farewell(monkeypatch):
    """Ranks that end listen to nobody any more."""
    monkeypatch.setattr(rendezvous, "_FAREWELL_SECONDS", 0.0)


def call_roll(ranks, *there):
    """Call it as a rank with a broken connection does, and wait for the answers of those who are there."""
    ranks[0].store.set("roll call", "")
    until(lambda: ranks[0].store.check([f"here/{rank}" for rank in there]), "answers to a roll call")


def together(*calls):
    """Call all at once; return results, or what was raised."""

    def run(call):
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def broken():
    return RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:1: Connection reset by peer")


def test_ranks_that_are_all_ready_go_on(ranks):
    assert together(*[place.wait_until_ready for place in ranks]) == [None] * 4


def test_one_rank_s_mistake_ends_all_and_rank_0_names_the_host(ranks, no_farewell):
    mistake = UserError("no shards")
    ends = together(*[place.wait_until_ready for place in ranks[:2]], lambda: ranks[2].refuse(mistake))
    assert [(str(end), end.reported_by) for end in ends[:2]] == [("node2 (rank 2): no shards", 0)] * 2
    assert mistake.reported_by is None  # its own host prints it, too
    with pytest.raises(UserError, match=r"node2 \(rank 2\): no shards"):
        ranks[3].wait_until_ready()  # however late


def test_a_mistake_that_every_rank_finds_is_told_once(ranks):
    mistakes = [UserError("no shards") for _ in ranks]
    together(
        *[lambda place=place, error=error: place.refuse(error) for place, error in zip(ranks, mistakes, strict=True)]
    )
    assert [error.reported_by for error in mistakes] == [None, 0, 0, 0]


def test_of_two_mistakes_the_first_is_told(ranks, no_farewell):
    for rank, what in ((2, "no shards"), (1, "no teacher"), (3, "no masks")):
        ranks[rank].refuse(UserError(what))
        with pytest.raises(UserError, match=r"^node2 \(rank 2\): no shards$"):
            ranks[0].wait_until_ready()


def test_rank_0_keeps_the_store_until_all_others_have_left(ranks):
    def others_have_left():
        ranks[0].refuse(UserError("no shards"))
        return ranks[0].store.check([f"left/{rank}" for rank in (1, 2, 3)])

    with ThreadPoolExecutor(1) as pool:
        left = pool.submit(others_have_left)
        until(lambda: ranks[1].store.check(["left/0"]), "rank 0 to say that it leaves")
        for place in ranks[1:]:
            place.refuse(UserError("no shards"))
        assert left.result()


def test_ranks_that_do_not_get_ready_are_named(ranks, monkeypatch):
    monkeypatch.setattr(rendezvous, "READY_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"node1 \(rank 1\), node2 \(ranks 2-3\) did not get ready") as caught:
        ranks[0].wait_until_ready()
    assert caught.value.reported_by == 0


class Gone:
    """The store of a rank 0 that has ended."""

    def set(self, *_):
        raise dist.DistNetworkError("Broken pipe")


def test_a_rank_without_a_word_is_named_by_all_others(ranks, no_farewell, monkeypatch):
    ranks[2].close()  # killed: nobody answers
    call_roll(ranks, 0, 1, 3)
    ends = together(*[lambda place=place: place.explain(broken()) for place in (ranks[0], ranks[1])])
    assert all(isinstance(end, LostRankError) and end.reported_by == 0 for end in ends)
    assert all(str(end).startswith("node2 (rank 2) ended without a word") for end in ends)
    # Rank 3 hung in a collective with others, and the store is gone when its own connections break.
    until(lambda: ranks[3]._end, "rank 3 to hear of the end")
    monkeypatch.setattr(ranks[3], "store", Gone())
    late = ranks[3].explain(broken())
    assert (str(late), late.reported_by) == (str(ends[0]), 0)


def test_the_lowest_rank_that_is_left_tells_of_rank_0(ranks, no_farewell):
    ranks[0].close()
    call_roll(ranks, 1, 2, 3)
    end = ranks[3].explain(broken())
    assert str(end).startswith("node1 (rank 0) ended without a word")
    assert end.reported_by == 1


def test_a_rank_that_fails_by_itself_keeps_its_error_and_is_named_by_the_others(ranks):
    own = ValueError("cannot divide\nby zero")
    assert together(lambda: ranks[3].explain(own))[0] is own
    end = ranks[1].explain(broken())
    assert isinstance(end, LostRankError)
    assert str(end) == "node2 (rank 3) failed, see its traceback: ValueError: cannot divide by zero"
    assert end.reported_by == 0


def test_a_broken_connection_while_all_are_there_stays_what_it_is(ranks):
    error = broken()
    assert ranks[1].explain(error) is error


def test_without_the_store_rank_0_is_the_one_that_is_gone(ranks, monkeypatch):
    monkeypatch.setattr(ranks[2], "store", Gone())
    assert str(ranks[2].explain(broken())).startswith("node1 (rank 0) ended without a word")


@pytest.fixture
def as_rank(monkeypatch):
    def pose(rank, world_size, port, address="127.0.0.1"):
        values = {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": rank,
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return pose


def test_ranks_that_do_not_come_are_named(as_rank, monkeypatch):
    monkeypatch.setenv("HDSCALE_HOSTS", "node1,node2")
    as_rank(0, 4, free_port())
    with (
        pytest.raises(UserError, match=r"^node1 \(rank 1\), node2 \(ranks 2-3\) did not come within 0 s"),
        arrival._meeting({}, 0),
    ):
        pass


def test_a_host_of_rank_0_that_does_not_answer_is_named(as_rank, monkeypatch):
    monkeypatch.setenv("HDSCALE_HOSTS", "node1,node2")
    port = free_port()
    as_rank(1, 2, port)
    with (
        pytest.raises(
            UserError, match=rf"^node1 \(127.0.0.1, port {port}\): rank 0 did not answer within 0 s"
        ) as caught,
        arrival._meeting({}, 0),
    ):
        pass
    assert caught.value.reported_by is None


def test_a_port_that_another_run_holds_is_named(as_rank):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        as_rank(0, 2, other.getsockname()[1])
        with pytest.raises(UserError, match=r"ranks cannot meet there .* another --master_port"), meeting():
            pass


def test_a_process_can_meet_again_after_a_refusal(as_rank):
    as_rank(0, 1, free_port())
    with pytest.raises(UserError, match="wrong"), meeting():
        raise UserError("wrong")
    with meeting() as place:
        place.wait_until_ready()
        with meeting() as inner:
            assert inner is place
    assert not [thread for thread in threading.enumerate() if "_answer_roll_calls" in thread.name]


@pytest.mark.usefixtures("unlaunched")
def test_a_process_without_a_launcher_meets_itself_and_leaves_no_trace():
    before = dict(os.environ)
    with meeting() as place:
        place.wait_until_ready()
        assert (place.rank, place.world_size, place.launched) == (0, 1, False)
    # Another command that this process starts must not take itself for a rank.
    assert dict(os.environ) == before


@pytest.fixture
def agent_store():
    """A store that another process than rank 0 keeps for all: its port, and itself."""
    port = free_port()
    return port, dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))


def fail_when_ready(place, mistake):
    place.wait_until_ready()
    raise UserError(mistake)


def test_a_restart_by_torchrun_does_not_hear_of_the_attempt_before(as_rank, agent_store, monkeypatch):
    monkeypatch.setattr(rendezvous, "_FAREWELL_SECONDS", LONG)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    port, _ = agent_store
    as_rank(0, 1, port)
    for attempt in ("0", "1"):
        monkeypatch.setattr(arrival, "_meetings", itertools.count())  # another process
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        with pytest.raises(UserError, match=f"^mistake of attempt {attempt}$"), meeting() as place:
            fail_when_ready(place, f"mistake of attempt {attempt}")


def test_two_ranks_compare_what_they_have_come_with(as_rank, agent_store):
    port, store = agent_store
    as_rank(1, 2, port)
    prefix = f"hdscale/0/{next(arrival._meetings) + 1}"
    facts = {**arrival._code_facts(), "recipe optim.lr": 0.1}
    dist.PrefixStore(prefix, store).set("arrived/0", json.dumps({"host": "node1", "facts": facts}))
    with (
        pytest.raises(
            UserError, match=rf"{socket.gethostname()} \(rank 1\): has another recipe optim.lr \(0.2\) than node1"
        ),
        arrival._meeting({"recipe optim.lr": 0.2}, LONG),
    ):
        pass


@pytest.mark.parametrize("changed", ["recipe optim.lr", "ds_config zero_optimization.stage"])
def test_two_ranks_compare_every_field_of_recipe_and_deepspeed_config(changed, world, as_rank, agent_store):
    port, store = agent_store
    as_rank(1, 2, port)
    recipe = load_recipe(world.recipe, ["run.rendezvous_seconds=300"])
    config = {"zero_optimization": {"stage": 2}}
    fields = {f"recipe {field}": value for field, value in flat_fields(recipe.model_dump(mode="json")).items()}
    facts = {**arrival._code_facts(), **fields, "ds_config zero_optimization.stage": 2}
    answer = json.dumps({"host": "node1", "facts": facts | {changed: 5}})
    dist.PrefixStore(f"hdscale/0/{next(arrival._meetings) + 1}", store).set("arrived/0", answer)
    with (
        pytest.raises(UserError, match=rf"\(rank 1\): has another {changed} \((0.001|2)\) than node1 \(rank 0\) \(5\)"),
        all_hosts(recipe, ds_config=config),
    ):
        pass


def test_facts_are_compared_with_rank_0_s():
    same = {"torch": "2.14", "recipe optim.lr": 0.1}
    check_same([same, dict(same)], ["a", "b"])
    with pytest.raises(
        UserError, match=r"b \(ranks 1-2\), c \(rank 3\): has another torch \(2.13\) than a \(rank 0\) \(2.14\)"
    ):
        check_same([same, *[same | {"torch": "2.13"}] * 3], ["a", "b", "b", "c"])
    with pytest.raises(UserError, match=r"has another recipe optim.lr \(None\)"):
        check_same([same, {"torch": "2.14"}], ["a", "b"])


@pytest.mark.parametrize(
    ("ranks", "hosts", "text"),
    [
        ([3], ["a", "a", "b", "b"], "b (rank 3)"),
        ([0, 1, 3], ["a", "a", "b", "b"], "a (ranks 0-1), b (rank 3)"),
        ([0, 2, 3, 4], ["a"] * 5, "a (ranks 0, 2-4)"),
        ([1, 2], [None] * 3, "ranks 1-2"),
    ],
)
def test_ranks_are_named_by_host(ranks, hosts, text):
    assert name_ranks(ranks, hosts) == text


def world_info(**slots):
    return f"--world_info={base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()}"


def test_deepspeed_s_second_stage_knows_the_host_of_each_rank():
    command = ["python", "-u", "-m", "deepspeed.launcher.launch", world_info(node1=[0, 1], node2=[3]), "--node_rank=1"]
    assert planned_hosts(3, [["bash"], command]) == ["node1", "node1", "node2"]


def test_hosts_of_another_launch_are_not_ours(monkeypatch):
    monkeypatch.setenv("HDSCALE_HOSTS", "a,b")
    command = ["python", world_info(node1=[0, 1], node2=[3])]
    assert planned_hosts(4, [command, ["--world_info=?"]]) == ["a", "a", "b", "b"]
    assert planned_hosts(3, []) == [None] * 3


def test_a_rank_without_a_gpu_among_others_is_named_before_they_join(as_rank, agent_store):
    port, store = agent_store
    as_rank(1, 2, port)
    facts = {**arrival._code_facts(), "kind of device": "GPU"}
    prefix = f"hdscale/0/{next(arrival._meetings) + 1}"
    dist.PrefixStore(prefix, store).set("arrived/0", json.dumps({"host": "node1", "facts": facts}))
    with pytest.raises(UserError, match=r"has another kind of device \(CPU\) than node1 \(rank 0\) \(GPU\)"), meeting():
        pass
