"""The four-bit kernel's layer against the grid that it was made of, and the layers that it must leave alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from aquila2_tut.quant import GridLinear, Int4Linear, int4, round_to_nearest
from aquila2_tut.train import LoRALinear

pytestmark = pytest.mark.skipif(not int4.kernel_works(), reason="this torch has no four-bit kernel here")


def grid_layer(width: int = 128, out: int = 64, bits: int = 4, group: int = 32, dtype=torch.bfloat16) -> GridLinear:
    torch.manual_seed(0)
    linear = nn.Linear(width, out, bias=False, dtype=dtype)
    return GridLinear(linear, bits, group, round_to_nearest(linear.weight, bits, group))


def weight_of(layer: GridLinear) -> torch.Tensor:
    """step * (code - zero) in float64, code by code."""
    codes, steps, zeros = (part.double() for part in layer.codes())
    return torch.stack([(codes[i] - zeros[i // layer.group]) * steps[i // layer.group] for i in range(len(codes))], 1)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, bits: float = 8) -> None:
    """As near as numbers of that many bits, in the mean square."""
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < 2**-bits, float(error)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (40,)])
def test_outputs_are_those_of_the_grid(group, rows):
    layer = grid_layer(group=group)
    x = torch.randn(*rows, 128, dtype=torch.bfloat16)
    fast = Int4Linear.of_grid(layer)
    assert fast(x).shape == (*rows, 64) and fast(x).dtype == torch.bfloat16
    exact = x.double() @ weight_of(layer).t()
    assert_near(layer(x), exact, 7)
    assert_near(fast(x), exact, 7)
    assert_near(fast(x.float()), exact, 7)


def test_its_numbers_are_those_of_the_grid():
    layer = grid_layer()
    torch.testing.assert_close(layer.dequantized(torch.float32).double(), weight_of(layer), rtol=1e-6, atol=1e-8)
    assert_near(Int4Linear.of_grid(layer).dequantized(torch.float32), weight_of(layer), 7)


@pytest.mark.parametrize("fast", [False, True])
def test_the_gradient_is_that_of_the_dequantized_linear(fast):
    layer = Int4Linear.of_grid(grid_layer()) if fast else grid_layer()
    x = torch.randn(2, 5, 128, dtype=torch.bfloat16)
    up = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(one).backward(up)
    F.linear(two, layer.dequantized(torch.bfloat16)).backward(up)
    assert_near(one.grad, two.grad)
    assert one.grad.norm() > 0


@pytest.mark.parametrize("fast", [False, True])
def test_a_lora_over_it_learns_as_over_the_dequantized_linear(fast):
    layer = Int4Linear.of_grid(grid_layer()) if fast else grid_layer()
    plain = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    plain.weight.data = layer.dequantized(torch.bfloat16)
    x, found = torch.randn(3, 4, 128, dtype=torch.bfloat16), []
    for base in (layer, plain):
        torch.manual_seed(1)
        lora = LoRALinear(base, r=4, alpha=8)
        lora.lora_B.data.normal_()
        given = x.clone().requires_grad_()
        lora(given).float().square().sum().backward()
        found.append([given.grad, *(p.grad for p in lora.parameters() if p.requires_grad)])
    assert len(found[0]) == 3
    for one, two in zip(*found, strict=True):
        assert_near(one, two, 6)


def test_what_does_not_fit():
    assert Int4Linear.fits(grid_layer())
    for other in ({"bits": 3}, {"bits": 8}, {"group": 16}, {"width": 96, "group": 64}, {"dtype": torch.float32}):
        assert not Int4Linear.fits(grid_layer(**other)), other
    assert not Int4Linear.fits(nn.Linear(128, 64))
    shuffled = grid_layer()
    shuffled.g_idx = shuffled.g_idx.flip(0)
    assert not Int4Linear.fits(shuffled)


def test_a_number_of_outputs_that_the_kernel_cannot_take_does_not_fit():
    """32 divides what a grid can have; the kernel takes that."""
    for out in (32, 96, 160):
        layer = grid_layer(out=out)
        x = torch.randn(3, 128, dtype=torch.bfloat16)
        assert Int4Linear.fits(layer)
        assert_near(Int4Linear.of_grid(layer)(x), x.double() @ weight_of(layer).t(), 7)


def test_without_the_kernel_nothing_fits(monkeypatch):
    def missing(*args):
        raise NotImplementedError

    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", missing)
    int4.kernel_works.cache_clear()
    try:
        assert not Int4Linear.fits(grid_layer())
    finally:
        int4.kernel_works.cache_clear()


def test_a_change_of_type_leaves_the_codes():
    fast = Int4Linear.of_grid(grid_layer())
    before = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
    fast.float()
    assert all(torch.equal(tensor, before[name]) for name, tensor in fast.state_dict().items())
    assert "in_features=128, out_features=64, bias=False, group=32" in repr(fast)
