"""GPTQ against a float64 solution that inverts anew for every column, AWQ, and what both gain on a real layer."""

from pathlib import Path

import pytest
import torch

from aquila2_tut import assets, load_tokenizer
from aquila2_tut.model.weights import load_model
from aquila2_tut.quant import QuantError, awq, calibrate, gptq, output_error, round_to_nearest

ROOT = Path(__file__).resolve().parent.parent


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs, a few of them large, as a layer of a model sees."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, width) @ torch.randn(width, width) / width**0.5 + 0.3 * torch.randn(tokens, 1)
    return x * (1 + 9 * (torch.arange(width) % 11 == 3))


def grid_of(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = rows.min(1, keepdim=True).values.clamp(max=0), rows.max(1, keepdim=True).values.clamp(min=0)
    step = ((high - low) / (2**bits - 1)).half().to(rows.dtype)  # steps are stored in float16
    return step, (-low / step).round().clamp(0, 2**bits - 1)


def nearest(rows: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    return step * ((rows / step + zero).round().clamp(0, 2**bits - 1) - zero)


def column_by_column(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Optimal brain quantization in a fixed order, float64: after each column the rest solves its least squares anew.

    No factor, no inverse that is updated: with F the columns to come and e the error of column j, the best that they
    can do is to move by e H[j, F] H[F, F]^-1.
    """
    rest, hessian = weight.double().clone(), hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    out = torch.empty_like(rest)
    for j in range(rest.shape[1]):
        if j % group == 0:
            step, zero = grid_of(rest[:, j : j + group], bits)
        out[:, j : j + 1] = nearest(rest[:, j : j + 1], step, zero, bits)
        error, later = rest[:, j] - out[:, j], slice(j + 1, None)
        rest[:, later] += error[:, None] * torch.linalg.solve(hessian[later, later], hessian[later, j])
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("width", "group"), [(24, 24), (24, 8), (30, 8), (9, 128), (1, 4)])
def test_gptq_is_the_float64_solution(bits, width, group):
    weight, hessian = torch.randn(7, width), calibrate([inputs(200, width)]).hessian
    found, wanted = gptq(weight, hessian, bits, group).values(), column_by_column(weight, hessian, bits, group)
    # A step in the middle of two float16 numbers may fall to either side, never a weight to another code.
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)
    assert output_error(weight, found, hessian) == pytest.approx(output_error(weight, wanted, hessian), rel=1e-3)


def test_without_correlations_gptq_is_rounding_to_nearest():
    """Nothing to make up with: a diagonal hessian."""
    weight = torch.randn(7, 40)
    found = gptq(weight, torch.diag(torch.rand(40) + 0.5), 3, 16)
    assert torch.equal(found.values(), round_to_nearest(weight, 3, 16).values())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [16, 50, 128])
def test_round_to_nearest(bits, group):
    """Float64 arithmetic, group by group; at most 2^bits values in a row of a group, and zero is among the levels."""
    torch.manual_seed(0)
    weight = torch.randn(5, 100)
    weight[2, 30] = 0
    found = round_to_nearest(weight, bits, group).values()
    wanted = torch.cat([nearest(p, *grid_of(p, bits), bits) for p in weight.double().split(group, 1)], 1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert found[2, 30] == 0
    assert max(len(row.unique()) for part in found.split(group, 1) for row in part) <= 2**bits


def test_calibration_is_the_same_in_batches():
    x = inputs(60, 12).view(4, 15, 12)
    found = calibrate(batch for batch in (*x, x[0, :0]))
    flat = x.view(60, 12).double()
    alike = flat / flat.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(found.hessian.double(), alike.t() @ alike / 60, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.magnitude.double(), flat.abs().mean(0))


def test_the_output_error_is_that_of_the_outputs():
    x, weight, rounded = inputs(60, 12), torch.randn(5, 12), torch.randn(5, 12)
    alike = x / x.square().mean(1, keepdim=True).sqrt()
    wanted = (alike @ (weight - rounded).t()).square().sum() / (alike @ weight.t()).square().sum()
    assert output_error(weight, rounded, calibrate([x]).hessian) == pytest.approx(float(wanted), rel=1e-4)


def test_one_large_token_is_not_all_that_counts():
    """As at some layers of a language model: with X^T X alone, that token takes away all that GPTQ gains."""
    torch.manual_seed(0)
    x, weight = inputs(400, 64), torch.randn(32, 64)
    large, others = torch.cat([3000 * torch.randn(1, 64), x]), calibrate([x]).hessian
    hessians = {"alone": others, "with it": calibrate([large]).hessian, "as it is": large.t() @ large / len(large)}
    lost = {name: output_error(weight, gptq(weight, h, 4, 64).values(), others) for name, h in hessians.items()}
    nearest = output_error(weight, round_to_nearest(weight, 4, 64).values(), others)
    assert lost["with it"] < 1.2 * lost["alone"] < 0.8 * nearest < lost["as it is"]


def test_a_token_of_zeros_says_nothing():
    x = inputs(50, 12)
    silent = calibrate([torch.cat([x, torch.zeros(50, 12)])])
    torch.testing.assert_close(2 * silent.hessian, calibrate([x]).hessian)


def test_awq_takes_the_best_power():
    """Never worse than rounding to nearest, which is the power zero; and better where some inputs are large."""
    torch.manual_seed(0)
    weight, seen = torch.randn(32, 110), calibrate([inputs(400, 110)])
    errors = []
    for power in torch.linspace(0, 1, 21)[:-1]:
        stretch = seen.magnitude**power
        errors.append(output_error(weight, round_to_nearest(weight * stretch, 3, 55).values() / stretch, seen.hessian))
    found = output_error(weight, awq(weight, seen, 3, 55), seen.hessian)
    assert found == pytest.approx(min(errors), rel=0.02)
    assert found < 0.8 * errors[0]


def test_an_input_that_is_never_used():
    x = inputs(100, 20)
    x[:, 7] = 0
    weight, seen = torch.randn(6, 20), calibrate([x])
    for rounded in (gptq(weight, seen.hessian, 4, 8).values(), awq(weight, seen, 4, 8)):
        assert bool(rounded.isfinite().all())
        assert output_error(weight, rounded, seen.hessian) < 0.02


def test_more_columns_than_inputs():
    """A hessian of lower rank: damping makes it one that can be inverted."""
    weight, hessian = torch.randn(6, 64), calibrate([inputs(10, 64)]).hessian
    nearest_error = output_error(weight, round_to_nearest(weight, 4, 32).values(), hessian)
    assert output_error(weight, gptq(weight, hessian, 4, 32).values(), hessian) < nearest_error / 3


def test_what_does_not_fit():
    weight = torch.randn(4, 9)
    with pytest.raises(QuantError, match="no inputs"):
        calibrate([])
    with pytest.raises(QuantError, match="no inputs"):
        calibrate([torch.ones(2, 0, 9)])
    with pytest.raises(QuantError, match=r"nan at \[1, 2\]"):
        calibrate([torch.ones(3, 9).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan))])
    with pytest.raises(QuantError, match=r"9 columns .* not \(8, 8\)"):
        gptq(weight, torch.eye(8))
    with pytest.raises(QuantError, match="not positive definite"):
        gptq(weight, -torch.eye(9))
    for bits in (1, 9):
        with pytest.raises(QuantError, match=f"from 2 to 8 bits, not {bits}"):
            round_to_nearest(weight, bits)
    weight[3, 3] = torch.inf
    for call in (lambda: round_to_nearest(weight), lambda: gptq(weight, torch.eye(9))):
        with pytest.raises(QuantError, match=r"inf at \[3, 3\]"):
            call()


@pytest.fixture(scope="module")
def layer_and_inputs():
    """A projection of SmolLM2, and what it sees of a text: half the parts to calibrate with, half to judge by."""
    model = load_model(assets.path("smollm2-135m"), torch_dtype="float32")
    model.model.layers = model.model.layers[:11]
    seen, linear = [], model.model.layers[10].mlp.up_proj
    linear.register_forward_hook(lambda module, given, out: seen.append(given[0][0]))
    text = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "aquila2_tut/model").glob("*.py")))
    with torch.inference_mode():
        for part in torch.tensor(load_tokenizer("SmolLM2-135M")(text[:32_000])["input_ids"]).split(512):
            model.model(part[None])
    return linear.weight.detach().clone(), torch.cat(seen[::2]).clone(), torch.cat(seen[1::2]).clone()


@pytest.mark.parametrize("bits", [3, 4])
def test_a_real_layer_loses_less(layer_and_inputs, bits):
    """The output changes less than with rounding to nearest, also for parts that were not calibrated with."""
    weight, first, second = layer_and_inputs
    seen, unseen = calibrate([first]), calibrate([second])
    ways = [round_to_nearest(weight, bits, 64).values(), gptq(weight, seen.hessian, bits, 64).values()]
    ways.append(awq(weight, seen, bits, 64))
    plain, compensated, stretched = (output_error(weight, way, seen.hessian) for way in ways)
    assert compensated < 0.5 * plain and stretched < 0.8 * plain
    plain, compensated, stretched = (output_error(weight, way, unseen.hessian) for way in ways)
    assert compensated < 0.6 * plain and stretched < 0.9 * plain


def test_few_inputs_are_learned_by_heart(layer_and_inputs):
    """192 tokens for 576 columns: GPTQ fits these, and gains nothing on others. AWQ has one number to fit."""
    weight, first, second = layer_and_inputs
    seen, unseen = calibrate([first[:192]]), calibrate([second])
    plain, compensated = round_to_nearest(weight, 4, 64).values(), gptq(weight, seen.hessian, 4, 64).values()
    assert output_error(weight, compensated, seen.hessian) < 0.2 * output_error(weight, plain, seen.hessian)
    assert output_error(weight, compensated, unseen.hessian) > 0.9 * output_error(weight, plain, unseen.hessian)
    stretched = awq(weight, seen, 4, 64)
    assert output_error(weight, stretched, unseen.hessian) < 0.9 * output_error(weight, plain, unseen.hessian)
