"""Measured bytes of real ranks against the formulas: one launch of two ranks, one of four, through the command."""

import json
import runpy
from pathlib import Path

import pytest

from hdscale.cli import exit_code

main = runpy.run_path(str(Path(__file__).resolve().parents[2] / "launch/benchmark.py"))["main"]
SHRINK = "600"  # 1.8 of the four blocks may be live: little enough to see the difference
AT_MOST = ("gathered, at most", "teachers gathered, at most")


class Figures:
    """What the command has written about all trials of one launch."""

    def __init__(self, trials):
        self.trials = {trial["trial"]: trial for trial in trials}

    def __getitem__(self, name):
        return self.trials[name]

    def bytes(self, name, what, kind="memory"):
        return next(figure for figure in self.trials[name][kind] if figure["what"] == what)

    def sent(self, name, who="student"):
        return self.bytes(name, who, "traffic")["measured"]


def measured(world, ranks, *more):
    output = world.folder / f"memory-{ranks}.json"
    arguments = ["memory", "--ranks", str(ranks), "--recipe", str(world.recipe), "--shrink", SHRINK, *more]
    assert exit_code(main, [*arguments, "--micro-batch-size", "2", "--output", str(output)]) == 0
    return Figures(json.loads(output.read_text()))


@pytest.fixture(scope="session")
def two(world):
    return measured(world, 2, "--variants")


@pytest.fixture(scope="session")
def four(world):
    return measured(world, 4, "--stages", "2,3")


@pytest.fixture(params=["two", "four"])
def figures(request):
    return request.getfixturevalue(request.param)


def test_states_shards_activations_and_traffic_are_within_5_percent_of_the_formulas(figures):
    compared = 0
    for name, trial in figures.trials.items():
        for kind in ("memory", "traffic"):
            for figure in trial[kind]:
                # Losses and norms of a few bytes are nobody's formula.
                if figure["formula"] and figure["what"] not in AT_MOST:
                    assert figure["measured"] == pytest.approx(figure["formula"], rel=0.05), (name, figure)
                    compared += 1
                elif not figure["formula"]:
                    assert figure["measured"] <= 64, (name, figure)
    assert compared > 50


def test_gathered_parameters_stay_below_what_is_stated(figures):
    seen = [figure for trial in figures.trials.values() for figure in trial["memory"] if figure["what"] in AT_MOST]
    assert len(seen) >= 6
    for figure in seen:
        assert 0.3 * figure["formula"] < figure["measured"] <= figure["formula"], figure


def test_shards_shrink_with_the_ranks(two, four):
    for what, name in (("optimizer", "ZeRO-2"), ("parameters", "ZeRO-3"), ("optimizer", "ZeRO-3")):
        ratio = two.bytes(name, what)["measured"] / four.bytes(name, what)["measured"]
        assert ratio == pytest.approx(2, rel=0.15), (what, name)
    assert two.bytes("ZeRO-2", "parameters")["measured"] == four.bytes("ZeRO-2", "parameters")["measured"]


def test_checkpointing_blocks_makes_activations_smaller(figures):
    for stage in (2, 3):
        plain = figures.bytes(f"ZeRO-{stage}", "activations")["measured"]
        assert figures.bytes(f"ZeRO-{stage}, blocks checkpointed", "activations")["measured"] < 0.7 * plain


def test_the_graph_keeps_no_gathered_parameters(figures):
    psi = figures["ZeRO-3"]["ranks"] * figures.bytes("ZeRO-3", "parameters")["measured"]
    for name in ("ZeRO-3", "ZeRO-3, 2 micro-steps", "ZeRO-3, blocks checkpointed"):
        assert figures.bytes(name, "gathered, at most")["measured"] < 0.85 * psi, name


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_the_shipped_zero_2_moves_a_plus_1_parameter_sizes_and_its_default_2a_plus_1(two, micro_steps):
    psi = two.bytes("ZeRO-2", "parameters")["measured"]
    name = "ZeRO-2" if micro_steps == 1 else "ZeRO-2, 2 micro-steps"
    assert two.sent(name) == pytest.approx((micro_steps + 1) * psi / 2, rel=0.01)
    whole = f"ZeRO-2, buckets all-reduced, {micro_steps} micro-steps"
    assert two.sent(whole) == pytest.approx((2 * micro_steps + 1) * psi / 2, rel=0.01)
    assert two[whole]["losses"] == two[name]["losses"]


def test_no_other_setting_of_zero_2_moves_fewer_bytes(two):
    for micro_steps, shipped in ((1, "ZeRO-2"), (2, "ZeRO-2, 2 micro-steps")):
        others = [name for name in two.trials if name.endswith(f", {micro_steps} micro-steps") and name != shipped]
        assert len(others) == 4 + (micro_steps == 2) * 2
        for name in others:
            if two[name]["stage"] == 2:
                assert two.sent(name) >= two.sent(shipped), name
                assert two[name]["losses"] == pytest.approx(two[shipped]["losses"], rel=1e-5), name


def test_sharded_teachers_say_bitwise_what_replicated_ones_say(two):
    plain = two["ZeRO-3"]
    assert two["ZeRO-3, teachers replicated"]["targets"] == plain["targets"]
    assert two["ZeRO-3, default reuse distance"]["targets"] == plain["targets"]
    assert two["ZeRO-3, teachers replicated"]["losses"] == plain["losses"]


def test_between_steps_a_rank_holds_its_shard_of_the_teachers_and_their_small_parameters(two, four):
    whole = two.bytes("ZeRO-3, teachers replicated", "teachers")["measured"]
    for figures, ranks in ((two, 2), (four, 4)):
        held = figures.bytes("ZeRO-3", "teachers")
        assert held["measured"] <= held["formula"]
        assert whole / ranks < held["measured"] < whole / ranks + 0.05 * whole
    assert two.sent("ZeRO-3, teachers replicated", "teachers") == 0


def test_the_default_reuse_distance_keeps_the_student_gathered_and_gathers_it_once(two):
    name = "ZeRO-3, default reuse distance, blocks checkpointed"
    psi = 2 * two.bytes("ZeRO-3", "parameters")["measured"]
    kept, live = (two.bytes(one, "gathered, at most")["measured"] for one in (name, "ZeRO-3, blocks checkpointed"))
    assert kept > 0.9 * psi > 1.1 * live
    gather = "student all_gather_into_tensor"
    assert two.bytes(name, gather, "traffic")["measured"] == pytest.approx(psi / 2, rel=0.05)
    assert two.bytes("ZeRO-3, blocks checkpointed", gather, "traffic")["measured"] > 1.3 * psi / 2
