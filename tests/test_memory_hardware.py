"""The table of cards: units, what the driver withholds, and figures that NVIDIA publishes in two forms."""

import pytest

from aquila2_tut.memory import GPUS

GIB = 2**30


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_the_slower_limit_decides(gpu):
    assert gpu.least_seconds(gpu.flops, 1) == 1
    assert gpu.least_seconds(1, 2 * gpu.bandwidth) == 2
    assert gpu.source and 50 < gpu.ridge < 450


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_a_program_sees_nearly_all_of_the_memory(gpu):
    assert gpu.memory % GIB == 0
    assert 0 <= gpu.withheld <= 0.065 * gpu.memory


def test_error_correction_in_the_memory_itself_takes_a_sixteenth():
    """GDDR6 has no room of its own for it: one bit in sixteen. HBM has."""
    assert GPUS["T4"].withheld == GPUS["T4"].memory / 16
    for name in ("L4", "L20", "A10"):
        assert GPUS[name].withheld == pytest.approx(GPUS[name].memory / 16, rel=0.01)
    assert GPUS["A100-80G"].withheld == 0


# Multiprocessors, tensor operations a clock and multiprocessor (two a multiply-add), boost clock in Hz: what the
# architecture white papers build their peaks from.
UNITS = {
    "T4": (40, 1024, 1590e6),
    "RTX 3090": (82, 512, 1695e6),
    "RTX 4090": (128, 512, 2520e6),
    "L4": (58, 1024, 2040e6),
    "L20": (92, 512, 2520e6),
    "A10": (72, 1024, 1695e6),
    "A100-40G": (108, 2048, 1410e6),
    "A100-80G": (108, 2048, 1410e6),
    "H100": (132, 4096, 1830e6),
}


@pytest.mark.parametrize("name", UNITS)
def test_the_peak_is_that_of_the_units(name):
    units, operations, clock = UNITS[name]
    assert GPUS[name].flops == pytest.approx(units * operations * clock, rel=0.01)


# Bits of the bus and the rate of each in bits a second.
BUSES = {
    "T4": (256, 10e9),
    "RTX 3090": (384, 19.5e9),
    "RTX 4090": (384, 21e9),
    "L4": (192, 12.5e9),
    "L20": (384, 18e9),
    "A10": (384, 12.5e9),
    "A100-40G": (5120, 2.43e9),
    "A100-80G": (5120, 3.186e9),
}


@pytest.mark.parametrize("name", BUSES)
def test_the_bandwidth_is_that_of_the_bus(name):
    bits, rate = BUSES[name]
    assert GPUS[name].bandwidth == pytest.approx(bits * rate / 8, rel=0.01)
