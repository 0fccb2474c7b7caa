"""A whole model into few bits: what AWQ folds away, what each method replaces, and what is refused."""

import copy

import pytest
import torch

from aquila2_tut import Aquila2Config, Aquila2ForCausalLM
from aquila2_tut.model.rope import rotary_tables
from aquila2_tut.quant import (
    GridLinear,
    Linear4bit,
    Linear8bit,
    QuantError,
    Scheme,
    calibration_ids,
    inputs_of,
    methods,
    quantize_model,
)
from aquila2_tut.quant.grid import fitting_group

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(160).view(5, 32) * 37 % 96
HEADS = [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "head_dim": 32}]


def tiny(**shape) -> Aquila2ForCausalLM:
    torch.manual_seed(0)
    model = Aquila2ForCausalLM(Aquila2Config(**SHAPE | shape)).eval()
    for name, weight in model.named_parameters():
        weight.data.copy_(torch.randn_like(weight) / (1 if "embed" in name else 16))
        if "norm" in name:  # not all ones, or one left out would not be noticed; and a few inputs large
            weight.data.copy_((1 + 0.5 * torch.rand_like(weight)) * (1 + 3 * (torch.arange(64) % 11 == 3)))
    return model


@torch.no_grad()
def logits(model: Aquila2ForCausalLM) -> torch.Tensor:
    return model(IDS).logits.double()


def change(model: Aquila2ForCausalLM, to: torch.Tensor) -> float:
    return float((logits(model) - to).norm() / to.norm())


@pytest.mark.parametrize("shape", HEADS, ids=str)
@torch.no_grad()
def test_awq_folds_its_stretches_away(shape):
    """Every linear map and what is before it are other numbers, and the layer gives what it gave."""
    layer, config = tiny(**shape).model.layers[0], Aquila2Config(**SHAPE | shape)
    hidden = [torch.randn(1, 16, 64) * (1 + 9 * (torch.arange(64) % 11 == 3)) for _ in range(3)]
    rotary = rotary_tables(config, torch.arange(16)[None], torch.float32)
    wanted, before = [layer(x, rotary)[0] for x in hidden], copy.deepcopy(layer.state_dict())
    methods._stretch(layer, Scheme("awq", 3, 32), methods.look_at_inputs(layer, hidden, rotary))
    for x, y in zip(hidden, wanted, strict=True):
        torch.testing.assert_close(layer(x, rotary)[0], y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    same = [name for name, tensor in layer.state_dict().items() if torch.allclose(tensor, before[name], rtol=1e-3)]
    assert same == []


@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "nf4", "int8"])
def test_every_method_on_every_kind_of_heads(shape, method):
    """Eight bits change next to nothing; fewer change more, and no more than they must."""
    model = tiny(**shape)
    before = logits(model)
    bits = {"nf4": 4}.get(method, 8)
    quantize_model(model, Scheme(method, bits, 32), IDS)
    wanted = {"nf4": Linear4bit, "int8": Linear8bit}.get(method, GridLinear)
    kinds = {name: type(m) for name, m in model.named_modules() if name.endswith(methods.LINEARS)}
    assert len(kinds) == 14 and set(kinds.values()) == {wanted}
    assert isinstance(model.lm_head, torch.nn.Linear) and isinstance(model.model.embed_tokens, torch.nn.Embedding)
    assert 0 < change(model, before) < (0.25 if method == "nf4" else 0.05)


def test_looking_at_the_inputs_pays():
    """The reason to calibrate: three bits after GPTQ and AWQ are nearer to the model than three bits to nearest."""
    before, changes = logits(tiny()), {}
    for method in ("rtn", "gptq", "awq"):
        changes[method] = change(quantize_model(tiny(), Scheme(method, 3, 32), IDS), before)
    assert changes["gptq"] < 0.9 * changes["rtn"]
    assert changes["awq"] < changes["rtn"]


def test_each_layer_sees_what_the_rounded_ones_before_it_give(monkeypatch):
    """GPTQ's second layer is calibrated with the outputs of the first as it is now."""
    model, seen = tiny(), []
    original = methods.gptq
    monkeypatch.setattr(methods, "gptq", lambda w, h, *rest: seen.append(h) or original(w, h, *rest))
    quantize_model(model, Scheme("gptq", 2, 32), IDS)
    assert len(seen) == 14
    now, was = (products(inputs_of(m, "self_attn.q_proj", IDS)[1]) for m in (model, tiny()))
    torch.testing.assert_close(seen[7].double(), now, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen[7].double(), was, rtol=0.01)


def products(x: torch.Tensor) -> torch.Tensor:
    """X^T X over the number of tokens, in float64, with each token scaled to a mean square of 1."""
    x = torch.nn.functional.normalize(x.double(), dim=1) * x.shape[1] ** 0.5
    return x.t() @ x / len(x)


def test_inputs_of_a_linear_map():
    model = tiny()
    found = inputs_of(model, "self_attn.q_proj", IDS)
    assert [x.shape for x in found] == [(160, 64)] * 2
    embedded = model.model.layers[0].input_layernorm(model.model.embed_tokens(IDS)).flatten(0, 1)
    torch.testing.assert_close(found[0], embedded)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_in_half_precision_stays_in_it():
    for method in ("gptq", "awq", "nf4", "int8"):
        model, bits = tiny().to(torch.bfloat16), {"int8": 8}.get(method, 4)
        quantize_model(model, Scheme(method, bits, 32), IDS)
        assert model(IDS).logits.dtype == torch.bfloat16, method


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nf5",), r"method 'nf5' is not one of nf4, int8, rtn, gptq, awq"),
        (("nf4", 3), r"nf4 has codes of 4 bits, not of 3"),
        (("int8", 4), r"int8 has codes of 8 bits, not of 4"),
        (("gptq", 5), r"gptq has codes of 2 or 3 or 4 or 8 bits, not of 5"),
        (("awq", 4, 0), r"a group has one column or more, not 0"),
    ],
)
def test_schemes_that_there_are_not(arguments, said):
    with pytest.raises(QuantError, match=said):
        Scheme(*arguments)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("ids", [None, torch.zeros(0, 8, dtype=torch.long)])
def test_methods_that_calibrate_ask_for_text(method, ids):
    with pytest.raises(QuantError, match=f"{method} looks at the inputs"):
        quantize_model(tiny(), Scheme(method), ids)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "nf4", "int8"])
def test_a_weight_that_is_not_finite_is_named(method):
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(QuantError, match=r"model\.layers\.1\.mlp\.up_proj: nan at \[3, 5\]"):
        quantize_model(model, Scheme(method, 8 if method == "int8" else 4, 32), IDS)


def test_the_group_fits_every_layer():
    assert Scheme("gptq", group=128).fitted(Aquila2Config(**SHAPE)).group == 32
    assert Scheme("gptq", group=16).fitted(Aquila2Config(**SHAPE)).group == 16
    assert Scheme("gptq").fitted(Aquila2Config.preset("Aquila2-7B")).group == 128
    assert Scheme("gptq").fitted(Aquila2Config.preset("SmolLM2-135M")).group == 64
    assert fitting_group({7, 128}) == 1


def test_calibration_is_spread_over_the_text():
    tokens = list(range(1000))
    ids = calibration_ids(tokens, rows=4, length=50)
    assert ids.shape == (4, 50) and all(row.tolist() == list(range(row[0], row[0] + 50)) for row in ids)
    assert ids[:, 0].tolist() == [0, 250, 500, 750]
    assert calibration_ids(tokens, rows=64, length=300).shape == (3, 300)
    with pytest.raises(QuantError, match="has 1000 tokens, and one row needs 1001"):
        calibration_ids(tokens, length=1001)
