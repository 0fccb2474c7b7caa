"""int8 against bitsandbytes and float64: codes, the mixed product of LLM.int8(), and `Linear8bit`."""

import math

import pytest
import torch
from torch import nn

from aquila2_tut.model.costs import peak_bytes
from aquila2_tut.quant import (
    Linear8bit,
    QuantError,
    dequantize_int8,
    integer_product,
    mixed_product,
    quantize_int8,
)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes").functional


def matrices(many: int):
    for seed in range(many):
        torch.manual_seed(seed)
        rows, columns = torch.randint(1, 60, (2,)).tolist()
        yield (torch.randn(rows, columns) * 10.0 ** float(torch.randint(-4, 3, ()))).half()


def test_rows_are_those_of_bitsandbytes(bnb):
    for x in matrices(200):
        q = quantize_int8(x)
        codes, absmax, _ = bnb.int8_vectorwise_quant(x)
        # Theirs are scaled in float16, where the scale itself is rounded: a code next to a middle may fall either way.
        assert torch.equal(q.absmax, absmax)
        assert int((q.codes.int() - codes.int()).abs().max()) <= 1
        assert float((q.codes != codes).float().mean()) < 0.05


@pytest.mark.parametrize("per", ["tensor", "row", 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_each_code_is_the_nearest(per, dtype):
    """In float64, group by group."""
    torch.manual_seed(0)
    x = (torch.randn(5, 6, 31) ** 3).to(dtype)
    q = quantize_int8(x, per)
    size = {"tensor": x.numel(), "row": 31}.get(per, per)
    for group, codes, absmax in zip(x.view(-1).split(size), q.codes.view(-1).split(size), q.absmax, strict=True):
        assert float(absmax) == pytest.approx(float(group.abs().max()), rel=1e-6)
        exact = group.double() * 127 / group.double().abs().max()
        assert float((codes - exact).abs().max()) <= 0.5 + 1e-4
        assert int(codes.abs().max()) == 127
    back = dequantize_int8(q)
    assert back.dtype == dtype and back.shape == x.shape
    wanted = torch.cat([c * (a / 127) for c, a in zip(q.codes.view(-1).split(size), q.absmax, strict=True)])
    torch.testing.assert_close(back.view(-1), wanted.to(dtype))


def test_the_smaller_the_group_the_smaller_the_error():
    """One outlier spoils what shares its scale: a tensor, a row, or a block."""
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    x[3, 5] = 100
    errors = [float((dequantize_int8(quantize_int8(x, per)) - x).norm()) for per in ("tensor", "row", 32)]
    assert errors[0] > 3 * errors[1] > 3.5 * errors[2]
    sizes = [quantize_int8(x, per).nbytes for per in ("tensor", "row", 32)]
    assert sizes == [x.numel() + 4, x.numel() + 64 * 4, x.numel() + x.numel() // 32 * 4]


@pytest.mark.parametrize("per", ["tensor", "row", 8])
def test_edges(per):
    for shape in ((0,), (3, 0), (1,), (7, 9, 11), ()):
        x = torch.randn(shape)
        back = dequantize_int8(quantize_int8(x, per))
        assert back.shape == x.shape
        torch.testing.assert_close(back, x, rtol=0, atol=float(x.abs().max()) / 250 if x.numel() else 0)
    assert not dequantize_int8(quantize_int8(torch.zeros(4, 9), per)).any()
    assert float(dequantize_int8(quantize_int8(torch.full((4, 9), 1e-40), per)).abs().max()) < 1e-36


def test_what_cannot_be_quantized():
    x = torch.zeros(4, 9)
    for value in (math.nan, math.inf, -math.inf):
        x[2, 7] = value
        for per in ("tensor", "row", 8):
            with pytest.raises(QuantError, match=rf"{value} at \[2, 7\] of a tensor of shape \[4, 9\]"):
                quantize_int8(x, per)
    with pytest.raises(QuantError, match=r"not torch.int32"):
        quantize_int8(torch.ones(3, dtype=torch.int))
    for per in ("column", 0, -8):
        with pytest.raises(QuantError, match=f"not {per!r}"):
            quantize_int8(torch.ones(3, 3), per)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (5, 37, 9), (17, 64, 24), (3, 20_000, 2)])
def test_integer_products_are_exact(rows, inner, columns):
    """Also where a float32 sum could not be: 20,000 products of 127 by 127 are above 2^24."""
    torch.manual_seed(0)
    a, b = (torch.randint(-127, 128, (n, inner), dtype=torch.int8) for n in (rows, columns))
    a[0], b[0] = 127, 127
    found = integer_product(a, b)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), (a.double() @ b.double().t()).long())


def with_outliers(tokens: int = 40, width: int = 96) -> torch.Tensor:
    """Activations as the paper finds them: a few hidden dimensions, twenty times larger than the others."""
    torch.manual_seed(1)
    x = torch.randn(tokens, width)
    x[:, [3, 50]] *= 20
    return x


def decomposed(x: torch.Tensor, weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """LLM.int8() in float64: equation 8 of the paper."""
    x, weight = x.double(), weight.double()
    outlier = x.abs().amax(0) >= threshold
    rows, columns = x[:, ~outlier], weight.abs().amax(1, keepdim=True)
    codes = (weight * 127 / columns).round()
    scale = rows.abs().amax(1, keepdim=True) if rows.shape[1] else 1
    low = (rows * 127 / scale).round() @ codes[:, ~outlier].t() * scale * columns.t() / 127**2
    return low + x[:, outlier] @ (codes[:, outlier] * columns / 127).t()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0, math.inf])
def test_mixed_product_is_the_papers(threshold):
    x, weight = with_outliers(), torch.randn(50, 96) / 10
    found = mixed_product(x, quantize_int8(weight), threshold)
    assert found.shape == (40, 50)
    assert distance(found, decomposed(x, weight, threshold)) < 1e-5


def test_a_magnitude_at_the_threshold_is_an_outlier():
    x = torch.tensor([[-6.0, 0.1], [0.013, 0.1]])
    out = mixed_product(x, quantize_int8(torch.eye(2)))
    torch.testing.assert_close(out, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_product_in_half_precision(dtype):
    x, weight = with_outliers().to(dtype), torch.randn(50, 96) / 10
    found = mixed_product(x.view(2, 20, 96), quantize_int8(weight))
    assert found.dtype == dtype and found.shape == (2, 20, 50)
    assert distance(found.view(40, 50), decomposed(x, weight, 6.0)) < 4 * torch.finfo(dtype).eps


def test_outliers_kept_apart_save_the_rest():
    x, weight = with_outliers(), torch.randn(50, 96) / 10
    mixed, plain = (distance(mixed_product(x, quantize_int8(weight), t), x @ weight.t()) for t in (6.0, math.inf))
    assert mixed < plain / 2 and mixed < 0.01


def test_as_near_as_bitsandbytes(bnb):
    """The same decomposition, against float64 of the unrounded matrices."""
    x, weight = with_outliers().half(), (torch.randn(50, 96) / 10).half()
    codes, absmax, columns = bnb.int8_vectorwise_quant(x.clone(), threshold=6.0)
    q = quantize_int8(weight)
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm.default(x, codes, q.codes, absmax, q.absmax, columns)
    exact = x.double() @ weight.double().t()
    found = mixed_product(x, q)
    assert distance(found, theirs) < 0.01
    assert distance(found, exact) <= 1.05 * distance(theirs, exact)


def test_an_infinite_activation_is_an_outlier_and_nan_is_refused():
    x, weight = torch.randn(4, 9), quantize_int8(torch.randn(5, 9).abs())
    x[1, 2] = math.inf
    out = mixed_product(x, weight)
    assert bool(out[1].isinf().all()) and bool(out[[0, 2, 3]].isfinite().all())
    x[1, 2] = math.nan
    with pytest.raises(QuantError, match=r"nan at \[1, 2\]"):
        mixed_product(x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 50, bias=bias).requires_grad_(False)
    layer = Linear8bit(linear)
    x = with_outliers().to(dtype).requires_grad_()
    out = layer(x)
    wanted = decomposed(x.detach(), linear.weight, 6.0) + (linear.bias.double() if bias else 0)
    assert out.dtype == dtype and distance(out.detach(), wanted) < max(1e-5, 4 * torch.finfo(dtype).eps)
    (out.float() * torch.linspace(-1, 1, 50)).sum().backward()
    gradient = torch.linspace(-1, 1, 50).double() @ dequantize_int8(quantize_int8(linear.weight)).double()
    assert distance(x.grad, gradient.expand(40, 96)) < max(1e-5, 4 * torch.finfo(dtype).eps)


def test_the_layer_under_autocast():
    layer = Linear8bit(nn.Linear(96, 50, bias=False))
    x = with_outliers()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert torch.equal(out, layer(x.bfloat16())) and out.dtype == torch.bfloat16


def test_what_the_layer_stores_and_keeps():
    torch.manual_seed(0)
    layers = nn.Sequential(*(Linear8bit(nn.Linear(256, 256, bias=False)) for _ in range(8)))
    assert sum(x.nbytes for x in layers.state_dict().values()) == 8 * (256 * 256 + 256 * 4)
    assert not list(layers.parameters())
    kept, x = [], torch.randn(32, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layers(x)
    assert not kept
    few, many = (peak_bytes(lambda m=m: m(x).sum().backward()) for m in (layers[:2], layers))
    assert many == few < 3 * 256 * 256 * 4
    assert repr(layers[0]) == "Linear8bit(in_features=256, out_features=256, bias=False, threshold=6.0)"
    assert layers.half()[0].absmax.dtype == torch.float32
