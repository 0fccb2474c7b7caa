"""NF4 against bitsandbytes, bit for bit, and `Linear4bit` against the linear map with the same rounded weights."""

import copy
import math
from statistics import NormalDist

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from aquila2_tut import assets
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.model.costs import peak_bytes
from aquila2_tut.model.weights import load_model
from aquila2_tut.quant import (
    NF4_CODE,
    Linear4bit,
    NF4Tensor,
    QuantError,
    dequantize_nf4,
    nf4,
    quantize_nf4,
    storage_bytes,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes").functional


@pytest.fixture
def small_spans(monkeypatch):
    monkeypatch.setattr(nf4, "_AT_ONCE", 300)


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([codes >> 4, codes & 15], 1).view(-1)


def scale_values(q: NF4Tensor) -> torch.Tensor:
    return q.scales if isinstance(q.scales, torch.Tensor) else q.scales.values()


def assert_as_bitsandbytes(bnb, x: torch.Tensor, blocksize: int) -> None:
    """Codes, scales and the numbers they stand for, to the last bit."""
    q = quantize_nf4(x, blocksize)
    # Flat, as their kernel for half precision mixes blocks up where a row is shorter than one.
    packed, state = bnb.quantize_4bit(x.reshape(-1), blocksize=blocksize, quant_type="nf4")
    assert torch.equal(q.codes, packed.view(-1))
    assert torch.equal(q.scales, state.absmax.where(state.absmax > 1e-38, 0))  # what they give a last block of zeros
    back = dequantize_nf4(q)
    if x.numel() % 2 == 0:  # for the others it would first compile a kernel
        assert torch.equal(back, bnb.dequantize_4bit(packed, state).view(x.shape))
    wanted = NF4_CODE[unpacked(q.codes).int()][: x.numel()] * state.absmax.repeat_interleave(blocksize)[: x.numel()]
    assert back.dtype == x.dtype
    assert torch.equal(back, wanted.view(x.shape).to(x.dtype))


def random_tensors(many: int):
    """Shapes, types and sizes of all kinds; some with heavy tails, some with rows of zeros."""
    for seed in range(many):
        torch.manual_seed(seed)
        shape = torch.randint(1, 50, (1 + seed % 3,)).tolist()
        x = torch.randn(shape) * 10.0 ** float(torch.randint(-4, 3, ()))
        x = (x**3).clamp(-6e4, 6e4) if seed % 5 == 0 else x
        x[: seed % 2] = 0
        yield seed, x.to(DTYPES[seed % 3])


def test_the_code_is_that_of_bitsandbytes(bnb):
    assert NF4_CODE.dtype == torch.float32
    assert torch.equal(NF4_CODE, bnb.get_4bit_type("nf4", device="cpu"))


def test_the_code_is_that_of_the_paper():
    """Quantiles by another implementation, at the probabilities of the paper."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    tails = [[0.5 + (outermost - 0.5) * i / many for i in range(1, many + 1)] for many in (7, 8)]
    below, above = ([NormalDist().inv_cdf(p) for p in tail] for tail in tails)
    wanted = [x / above[-1] for x in [*(-x for x in reversed(below)), 0.0, *above]]
    assert NF4_CODE.tolist() == pytest.approx(wanted, abs=5e-7)


def entropy(codes: torch.Tensor) -> float:
    shares = torch.bincount(codes.int().view(-1), minlength=16) / codes.numel()
    return float(-(shares * shares.log2()).sum())


def test_normal_weights_use_all_levels_alike():
    """What the levels are for: four bits that carry nearly four bits. Levels at equal distances carry less."""
    torch.manual_seed(0)
    x = torch.randn(1 << 14, 64)
    even = ((x / x.abs().amax(1, keepdim=True) + 1) * 7.5).round()
    assert entropy(unpacked(quantize_nf4(x).codes)) > 3.88 > 3.7 > entropy(even)


def test_a_thousand_random_tensors(bnb):
    for seed, x in random_tensors(1000):
        assert_as_bitsandbytes(bnb, x, (32, 64, 128, 256)[seed % 4])


def test_ties_fall_as_theirs_do(bnb):
    """Numbers exactly between two levels, and their neighbours on both sides."""
    middles = torch.tensor(nf4._NF4_MIDDLES)
    x = torch.cat([torch.ones(1), middles, middles.nextafter(torch.ones(())), middles.nextafter(-torch.ones(()))])
    assert_as_bitsandbytes(bnb, F.pad(x, (0, 64 - len(x))), 64)


@pytest.fixture(scope="module")
def smollm2():
    return load_model(assets.path("smollm2-135m"), torch_dtype="bfloat16")


def test_every_weight_of_smollm2(bnb, smollm2):
    weights = dict(smollm2.named_parameters())
    assert len(weights) > 250
    for weight in weights.values():
        assert_as_bitsandbytes(bnb, weight.detach(), 64)


def test_spans_change_nothing(bnb, small_spans):
    """Many pieces, of several blocks or of less than one: what large weights are cut into."""
    for seed, x in random_tensors(60):
        assert_as_bitsandbytes(bnb, x, (32, 64, 1024)[seed % 3])


def test_the_levels_of_the_scales_are_those_of_bitsandbytes(bnb):
    assert torch.equal(torch.tensor(nf4._DYNAMIC), bnb.create_dynamic_map())


def test_double_quantized_scales(bnb, smollm2):
    """bitsandbytes looks the nearest of 256 levels up in a coarse table, and is sometimes one off; ours is nearest."""
    layer = smollm2.model.layers[3]
    different = scales = 0
    for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
        x = linear.weight.detach()
        q, plain = quantize_nf4(x, double_quant=True), quantize_nf4(x)
        packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        assert torch.equal(q.codes, packed.view(-1))
        assert torch.equal(q.scales.absmax, state.state2.absmax)
        assert torch.equal(q.scales.mean, state.offset)
        assert int((q.scales.codes.int() - state.absmax.view(-1).int()).abs().max()) <= 1
        theirs = bnb.dequantize_blockwise(state.absmax, state.state2).view(-1) + state.offset
        ours, exact = q.scales.values(), plain.scales
        same = q.scales.codes == state.absmax.view(-1)
        assert torch.equal(ours[same], theirs[same])
        assert bool(((ours - exact).abs() <= (theirs - exact).abs() * 1.0001 + 1e-9).all())
        different, scales = different + int((~same).sum()), scales + len(ours)
    assert different / scales < 0.01


def test_scales_in_8_bits_are_nearest():
    torch.manual_seed(0)
    scales = torch.rand(3000) + 0.5
    q = nf4._double_quantized(scales)
    groups = (scales.double() - q.mean).split(256)
    levels = torch.tensor(nf4._DYNAMIC).double()
    for group, absmax, found in zip(groups, q.absmax, q.codes.split(256), strict=True):
        distance = (group[:, None] / absmax - levels).abs()
        chosen = distance.gather(1, found.long()[:, None])[:, 0]
        assert float((chosen - distance.min(1).values).max()) < 1e-6
    assert float((q.values() - scales).abs().max()) < 0.5 * 0.0145 / 2 + 1e-6  # half of the widest gap between levels


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_number_is_further_than_half_a_gap(dtype, double_quant):
    torch.manual_seed(1)
    x = (torch.randn(300, 70) * 0.02).to(dtype)
    q = quantize_nf4(x, 64, double_quant)
    scales = scale_values(q).repeat_interleave(64)[: x.numel()].view(x.shape)
    error = (dequantize_nf4(q, torch.float32) - x.float()).abs()
    widest = float(NF4_CODE.diff().max()) / 2
    assert float((error / scales).max()) <= widest * (1.2 if double_quant else 1.0001)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (63,), (64,), (65,), (7, 9, 11), (), (128, 33)])
def test_odd_sizes_and_predicted_bytes(shape, double_quant):
    torch.manual_seed(0)
    x = torch.randn(shape)
    for blocksize in (2, 64, 1000):
        q = quantize_nf4(x, blocksize, double_quant)
        back = dequantize_nf4(q)
        assert back.shape == x.shape and back.dtype == x.dtype and back.is_contiguous()
        assert q.nbytes == storage_bytes(x.shape, blocksize, double_quant)
        assert not x.numel() or float((back - x).norm() / x.norm()) < 0.35


def test_bits_a_weight():
    """The figures of the paper, section 3: half a bit for the scales, or 0.127 with double quantization."""
    shape = (4096, 4096)
    assert storage_bytes(shape) * 8 / math.prod(shape) == 4.5
    assert storage_bytes(shape, double_quant=True) * 8 / math.prod(shape) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))


@pytest.mark.parametrize("double_quant", [False, True])
def test_zeros_stay_zeros(double_quant):
    x = torch.randn(4, 256)
    x[1] = 0
    back = dequantize_nf4(quantize_nf4(x, 64, double_quant))
    assert not back[1].any() and back[0].any()
    assert not dequantize_nf4(quantize_nf4(torch.zeros(300), 64, double_quant)).any()


def test_tiny_and_huge_numbers():
    tiny = torch.tensor([1e-40, -1e-45, 0.0, 1e-39])
    assert float(dequantize_nf4(quantize_nf4(tiny)).abs().max()) <= 1e-38
    huge = torch.tensor([3.4e38, -1e38, 1.0, 0.0])
    assert dequantize_nf4(quantize_nf4(huge)).tolist() == pytest.approx([3.4e38, -0.28444138 * 3.4e38, 0.0, 0.0])


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (math.nan, torch.float32, "nan"),
        (math.inf, torch.bfloat16, "inf"),
        (-math.inf, torch.float16, "-inf"),
        (1e300, torch.float64, "1e+300"),
    ],
)
def test_what_is_not_finite_is_named(small_spans, value, dtype, said):
    x = torch.zeros(40, 30, dtype=dtype)
    x[17, 5] = value
    with pytest.raises(QuantError) as raised:
        quantize_nf4(x)
    assert f"{said} at [17, 5] of a tensor of shape [40, 30]" in str(raised.value)


def test_what_cannot_be_quantized():
    with pytest.raises(QuantError, match=r"not torch.int64"):
        quantize_nf4(torch.arange(9))
    for blocksize in (0, -64, 7):
        with pytest.raises(QuantError, match=f"even and positive, not {blocksize}"):
            quantize_nf4(torch.ones(9), blocksize)
    with pytest.raises(QuantError, match="too large"):
        quantize_nf4(torch.full((640,), 3e38), double_quant=True)


def test_strided_tensors():
    x = torch.randn(40, 60)
    for view in (x.t(), x[::2, 1::3], x[:1].expand(9, 60)):
        q, same = quantize_nf4(view), quantize_nf4(view.contiguous())
        assert torch.equal(q.codes, same.codes) and q.shape == view.shape


def layers(bias: bool = False, double_quant: bool = False, inputs: int = 96, outputs: int = 50):
    """A `Linear4bit`, and a frozen linear map with the same weights as numbers."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    layer = Linear4bit(linear, double_quant=double_quant)
    with torch.no_grad():
        linear.weight.copy_(dequantize_nf4(quantize_nf4(linear.weight, double_quant=double_quant)))
    return layer, linear


def results(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        out = layer(x)
    (out.float() * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return out.detach(), x.grad


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to roundings. Torch adds a bias before it rounds a half-precision sum, we add it after."""
    within = 2 * torch.finfo(wanted.dtype).eps
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert float((found - wanted).double().norm()) <= within * float(wanted.double().norm())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_values_and_gradients_are_those_of_the_linear_map(dtype, bias, double_quant):
    layer, linear = layers(bias, double_quant)
    x = torch.randn(2, 7, 96).to(dtype)
    found, wanted = results(layer, x), results(linear.to(dtype), x)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert_near(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", DTYPES)
def test_under_autocast(dtype, given):
    layer, linear = layers(bias=True)
    x = torch.randn(5, 96).to(given)
    found, wanted = results(layer, x, dtype), results(linear, x, dtype)
    assert [a.dtype for a in found] == [b.dtype for b in wanted] == [dtype, given]
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b)


def test_under_autocast_weights_are_made_in_its_type(monkeypatch):
    """Not in float32 and then cast, which would take three times the memory."""
    layer, _ = layers()
    made, make = [], Linear4bit.dequantized
    monkeypatch.setattr(Linear4bit, "dequantized", lambda self, dtype: made.append(dtype) or make(self, dtype))
    results(layer, torch.randn(5, 96), torch.bfloat16)
    assert made == [torch.bfloat16] * 2


def test_gradients_are_the_derivatives():
    layer, _ = layers(inputs=8, outputs=5)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_a_trained_bias_gets_its_gradient():
    layer, linear = layers(bias=True)
    layer.bias.requires_grad_(), linear.bias.requires_grad_()
    x = torch.randn(4, 96)
    for module in (layer, linear):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)
    assert layer.bias is not linear.bias or layer.bias.grad is linear.bias.grad


def test_edges_of_the_input():
    layer, linear = layers()
    for x in (torch.randn(96), torch.randn(0, 96), torch.randn(2, 3, 4, 96), torch.randn(96, 5).t()):
        torch.testing.assert_close(layer(x), linear(x))
    assert not layer(torch.randn(3, 96)).requires_grad


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """What autograd keeps for the backward pass, as it says itself."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_nothing_is_saved_for_the_backward_pass(bias, double_quant):
    layer, linear = layers(bias, double_quant)
    x = torch.randn(64, 96, requires_grad=True)
    assert saved_bytes(layer, x) == 0
    assert saved_bytes(linear, x) >= linear.weight.nbytes, "what plain autograd keeps"


def deep(blocks: int, quantized: bool, width: int = 256) -> nn.Sequential:
    torch.manual_seed(0)
    linears = [nn.Linear(width, width, bias=False).requires_grad_(False) for _ in range(blocks)]
    return nn.Sequential(*(Linear4bit(x) if quantized else x for x in linears))


def test_live_memory_does_not_grow_with_depth():
    """Sixteen layers take what two take: an activation or two and one weight at a time."""
    x = torch.randn(32, 256, requires_grad=True)
    few, many = (peak_bytes(lambda d=d: deep_step(d, x)) for d in (deep(2, True), deep(16, True)))
    weight = 256 * 256 * 4
    assert many == few
    # A weight, the levels it is made from, their indices, and a few activations.
    assert many <= 2.5 * weight + weight // 2 + 6 * x.nbytes


def deep_step(model: nn.Sequential, x: torch.Tensor) -> None:
    model(x).sum().backward()


def test_the_naive_way_would_keep_every_weight():
    """The measure can tell: a product with dequantized weights by autograd holds all of them at the end of forward."""
    x = torch.randn(32, 256, requires_grad=True)
    model = deep(16, True)

    def naive() -> None:
        out = x
        for layer in model:
            out = F.linear(out, dequantize_nf4(layer.quantized, torch.float32))
        out.sum().backward()

    assert peak_bytes(naive) > 16 * 256 * 256 * 4 > 3 * peak_bytes(lambda: deep_step(model, x))


def test_a_rehearsal_takes_what_the_step_takes():
    x = torch.randn(32, 256, requires_grad=True)
    measured = peak_bytes(lambda: deep_step(deep(3, True), x))
    with FakeTensorMode():
        fake = torch.empty(32, 256, requires_grad=True)
        rehearsed = peak_bytes(lambda: deep_step(deep(3, True), fake))
    assert rehearsed == measured


def test_with_checkpointing():
    layer, linear = layers()
    x = torch.randn(5, 96)
    found = results(lambda x: checkpoint(layer, x, use_reentrant=False), x)
    for a, b in zip(found, results(linear, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("double_quant", [False, True])
def test_saved_and_loaded(tmp_path, double_quant):
    """Through safetensors, into a layer that never had weights."""
    layer, _ = layers(bias=True, double_quant=double_quant)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    empty = Linear4bit(nn.Linear(96, 50, device="meta"), double_quant=double_quant)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    x = torch.randn(3, 96)
    assert torch.equal(empty(x), layer(x))
    other = Linear4bit(nn.Linear(96, 50, device="meta"), blocksize=32, double_quant=double_quant)
    with pytest.raises(RuntimeError, match="size mismatch for scales"):
        other.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_change_of_type_does_not_round_the_scales(double_quant):
    layer, _ = layers(bias=True, double_quant=double_quant)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    cast = nn.Sequential(copy.deepcopy(layer)).half().bfloat16().double().float()[0]
    for name, tensor in cast.named_buffers():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert torch.equal(cast.dequantized(torch.float32), layer.dequantized(torch.float32))
    assert layer.bfloat16().bias.dtype == torch.bfloat16
    assert layer.to("meta").codes.is_meta


def test_nothing_of_it_is_trained():
    layer, _ = layers()
    assert not list(layer.parameters())
    assert not layer.dequantized(torch.float32).requires_grad
    stored = sum(tensor.nbytes for tensor in layer.state_dict().values())
    assert stored == storage_bytes((50, 96))


def test_it_says_what_it_is():
    layer, _ = layers(bias=True, double_quant=True)
    assert repr(layer) == "Linear4bit(in_features=96, out_features=50, bias=True, blocksize=64, double_quant=True)"


def swapped(model: Aquila2ForCausalLM, make) -> Aquila2ForCausalLM:
    """A copy of a model with every linear map of its layers replaced."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                setattr(block, name, make(linear))
    return model


def test_smollm2_in_four_bits_is_smollm2_with_rounded_weights(smollm2):
    def rounded(linear: nn.Linear) -> nn.Linear:
        linear.weight.data = dequantize_nf4(quantize_nf4(linear.weight))
        return linear

    ids = torch.arange(100, 116)[None]
    with torch.inference_mode():
        four, wanted, exact = (
            m(ids).logits.float() for m in (swapped(smollm2, Linear4bit), swapped(smollm2, rounded), smollm2)
        )
    torch.testing.assert_close(four, wanted)
    assert not torch.equal(four, exact)
    assert float(F.cosine_similarity(four, exact, dim=-1).mean()) > 0.95
