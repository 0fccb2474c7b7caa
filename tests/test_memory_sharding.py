"""Bytes on a device and on the wire, against the paper's table, the closed form of the fine-tuning, and real runs."""

import pytest
import torch

from aquila2_tut.memory import LINKS, SPLIT, STRATEGIES, held_bytes, sent_bytes


def test_the_table_of_the_zero_paper():
    """Figure 1: 7.5 billion parameters on 64 GPUs, GB on each."""
    published = {"copies": 120, "zero1": 31.4, "zero2": 16.6, "zero3": 1.9}
    for strategy, gb in published.items():
        assert held_bytes(strategy, 64, 7_500_000_000).total / 1e9 == pytest.approx(gb, abs=0.06)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_devices_together_hold_everything_and_one_alone_sends_nothing(strategy):
    alone, eight = held_bytes(strategy, 1, 1000, 500), held_bytes(strategy, 8, 1000, 500)
    assert alone.total == 16 * 1000 + 500 and sent_bytes(strategy, 1, 1000, 500) == 0
    for kind, split in zip(("weights", "gradients", "optimizer"), SPLIT[strategy], strict=True):
        assert getattr(eight, kind) * (8 if split else 1) == getattr(alone, kind)


def ring_all_reduce(parts):
    """Sends the parts of N tables around until every device has the sum; returns bytes sent by each."""
    devices, sent = len(parts), 0
    chunks = [list(table.chunk(devices)) for table in parts]
    for round_ in range(2 * (devices - 1)):
        adds = round_ < devices - 1
        moved = [(d, (d - round_) % devices) for d in range(devices)]
        values = [chunks[d][place].clone() for d, place in moved]
        for (d, place), value in zip(moved, values, strict=True):
            there = chunks[(d + 1) % devices]
            there[place] = there[place] + value if adds else value
        sent += values[0].nbytes
    return [torch.cat(table) for table in chunks], sent


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_a_ring_sends_what_the_formula_says(devices):
    tables = [torch.randn(64, dtype=torch.float32) for _ in range(devices)]
    sums, sent = ring_all_reduce(tables)
    for found in sums:
        torch.testing.assert_close(found, sum(tables))
    assert sent == sent_bytes("copies", devices, 64)


def test_sharded_weights_cost_half_as_much_again():
    for devices in (2, 8, 64):
        assert sent_bytes("zero3", devices, 1000) == 1.5 * sent_bytes("zero2", devices, 1000)


def test_links_are_slower_the_farther_they_reach():
    rates = [link.bandwidth for link in LINKS.values()]
    assert rates == sorted(rates, reverse=True) and all(link.source for link in LINKS.values())
