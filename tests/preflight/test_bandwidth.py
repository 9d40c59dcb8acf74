"""The numbers of all-reduces; tests/launch/test_preflight.py measures real ones."""

import pytest

from hdscale.preflight.bandwidth import Rate, render_rates, vit_l_seconds


@pytest.mark.parametrize(("ranks", "factor"), [(2, 1.0), (4, 1.5), (32, 1.9375)])
def test_bus_bandwidth_is_what_a_ring_carries_at_each_rank(ranks, factor):
    assert Rate("all ranks", ranks, 64_000_000, 0.064).bus_bandwidth == pytest.approx(factor)


@pytest.mark.parametrize("ranks", [2, 32])
def test_a_step_of_vit_l_is_a_reduce_and_an_all_gather_of_its_parameters(ranks):
    psi = 303_301_632 * 2
    rate = Rate("all ranks", ranks, 64_000_000, 0.1)
    all_reduce = psi / 64_000_000 * 0.1
    assert vit_l_seconds(rate) == pytest.approx(all_reduce)  # which is as much


def test_the_consequence_is_computed_from_the_largest_message_among_all_ranks():
    rates = [
        Rate("all ranks", 4, 1_000_000, 0.01),
        Rate("all ranks", 4, 64_000_000, 0.096),
        Rate("machine 0", 2, 64_000_000, 0.001),
    ]
    lines = render_rates(rates).splitlines()
    assert lines[1] == "all-reduce, all ranks (4 ranks), 64 MB: 96.0 ms, bus bandwidth 1 GB/s"
    assert lines[3].startswith("ViT-L under ZeRO-2 in fp16 moves 1.21 GB x (R - 1) / R a rank and step: 0.91 s at that")
