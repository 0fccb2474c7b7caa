"""LoRA by hand against peft: values, gradients, training, files; and what a step keeps in memory."""

import copy
import functools
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import BitsAndBytesConfig

from aquila2_tut import AutoLoader, load_tokenizer
from aquila2_tut.assets import shipped
from aquila2_tut.config import Aquila2Config
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.model.layers import Linear
from aquila2_tut.model.weights import load_model
from aquila2_tut.quant import GridLinear, Linear4bit, Linear8bit, round_to_nearest
from aquila2_tut.quant.methods import Scheme, quantize_model
from aquila2_tut.train import (
    LoRALinear,
    TrainError,
    add_lora,
    causal_loss,
    load_lora,
    lora,
    lora_state,
    merge_all,
    merge_checkpoint,
    save_lora,
)
from aquila2_tut.train.lora import lora_layers

INPUTS, OUTPUTS, RANK = 128, 64, 4  # bitsandbytes mixes blocks up on a CPU where a row is no multiple of one
HALVES = (torch.bfloat16, torch.float16)


class Holder(nn.Module):
    """A model of one linear map, for peft."""

    def __init__(self, q_proj: nn.Module) -> None:
        super().__init__()
        self.q_proj = q_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)


def plain(bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INPUTS, OUTPUTS, bias=bias).to(dtype)


def adapted(base: nn.Module, **options) -> LoRALinear:
    """With an update that is not zero."""
    layer = LoRALinear(base, **{"r": RANK, "alpha": 8} | options)
    torch.manual_seed(1)
    nn.init.normal_(layer.lora_B)
    return layer.train()


def pefts(layer: LoRALinear, base: nn.Module | None = None) -> nn.Module:
    """peft's layer with the same adapter, over a copy of the same base."""
    config = LoraConfig(
        r=layer.r,
        lora_alpha=layer.alpha,
        lora_dropout=layer.dropout,
        use_rslora=layer.rslora,
        target_modules=["q_proj"],
    )
    holder = Holder(copy.deepcopy(layer.base_layer) if base is None else base)
    if base is not None:
        holder.is_loaded_in_4bit = True
    theirs = get_peft_model(holder, config).base_model.model.q_proj
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.copy_(layer.lora_B)
    return theirs.train()


def pair(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of either."""
    if isinstance(layer, LoRALinear):
        return layer.lora_A, layer.lora_B
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def results(layer: nn.Module, x: torch.Tensor, autocast: torch.dtype | None = None) -> list[torch.Tensor]:
    """What comes out, and the gradients of x, A and B; the same dice whenever it is called."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = layer(x)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    gradients = torch.autograd.grad((out.float() * weights).sum(), (x, *pair(layer)))
    return [out.detach(), *gradients]


def assert_near(found: list[torch.Tensor], wanted: list[torch.Tensor], within: float = 1e-6) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert float((a.double() - b.double()).norm()) <= within * float(b.double().norm())
        assert bool(b.any()), "nothing is compared with nothing"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_as_pefts(bias, rslora, dropout):
    """With dropout too: the same dice fall, so the same numbers are dropped."""
    layer = adapted(plain(bias), rslora=rslora, dropout=dropout)
    theirs, x = pefts(layer), torch.randn(2, 7, INPUTS)
    assert_near(results(layer, x), results(theirs, x))
    assert_near(results(layer.eval(), x), results(theirs.eval(), x))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_as_pefts_in_half_precision(dtype, dropout):
    layer = adapted(plain(dtype=dtype), dropout=dropout)
    theirs, x = pefts(layer), torch.randn(2, 7, INPUTS).to(dtype)
    assert pair(theirs)[0].dtype == layer.lora_A.dtype == torch.float32
    found, wanted = results(layer, x), results(theirs, x)
    assert found[0].dtype == dtype
    assert_near(found, wanted, torch.finfo(dtype).eps)
    assert_near(found[2:], wanted[2:], 1e-5)


@pytest.mark.parametrize("autocast", HALVES)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_as_pefts_under_autocast(autocast, given):
    layer = adapted(plain())
    theirs, x = pefts(layer), torch.randn(2, 7, INPUTS).to(given)
    found, wanted = results(layer, x, autocast), results(theirs, x, autocast)
    assert [t.dtype for t in found] == [autocast, given, torch.float32, torch.float32]
    assert_near(found, wanted, 2 * torch.finfo(autocast).eps)


def test_gradients_are_the_derivatives():
    layer = LoRALinear(nn.Linear(6, 5), r=2).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def function(x, a, b):
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("shape", [(INPUTS,), (5, INPUTS), (0, INPUTS), (2, 3, 4, INPUTS)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_shapes(shape, dropout):
    layer = adapted(plain(bias=True), dropout=dropout)
    x = torch.randn(shape)
    for found, wanted in zip(results(layer, x), results(pefts(layer), x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.norm()))


def test_an_input_without_gradient(monkeypatch):
    """As in the first layer of a frozen model: the adapter learns all the same, and one product less is made."""
    layer, x, made = adapted(plain()), torch.randn(5, INPUTS), []
    monkeypatch.setattr(lora, "product", lambda x, w: made.append(w.shape) or F.linear(x, w))
    wanted = results(layer, x)
    assert len(made) == 2 + 4
    made.clear()
    (layer(x) * torch.linspace(-1, 1, 5 * OUTPUTS).view(5, -1)).sum().backward()
    assert_near([layer.lora_A.grad, layer.lora_B.grad], wanted[2:])
    assert layer.base_layer.weight.grad is None
    assert len(made) == 2 + 3


def test_training_or_not_as_the_base():
    assert LoRALinear(plain().train()).training
    assert not LoRALinear(plain().eval()).training


def on_a_grid(linear: nn.Linear) -> GridLinear:
    return GridLinear(linear, 4, 64, round_to_nearest(linear.weight, 4, 64))


BASES = {
    "torch": plain,
    "ours": lambda: Linear(INPUTS, OUTPUTS),
    "4 bits": lambda: Linear4bit(plain(bias=True)),
    "4 bits, double": lambda: Linear4bit(plain(), double_quant=True),
    "8 bits": lambda: Linear8bit(plain()),
    "grid": lambda: on_a_grid(plain()),
    "bfloat16": lambda: plain(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("base", BASES)
def test_the_first_step_starts_from_the_base_to_the_last_bit(base):
    base = BASES[base]()
    layer = LoRALinear(base, dropout=0.5).train()
    x = torch.randn(9, INPUTS).to(getattr(base, "weight", torch.empty(0)).dtype)
    wanted = base(x)
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer.eval()(x), wanted)
    assert float(layer.lora_A.detach().abs().max()) == pytest.approx(INPUTS**-0.5, rel=0.05)


# --- Q-LoRA ---


def bitsandbytes_base(bias: bool, compute: torch.dtype) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    linear = plain(bias)
    theirs = bnb.nn.Linear4bit(
        INPUTS, OUTPUTS, bias, compute_dtype=compute, quant_type="nf4", compress_statistics=False
    )
    theirs.load_state_dict(linear.state_dict())
    return theirs.to("cpu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_qlora_as_peft_over_bitsandbytes(bias, dropout):
    layer = adapted(Linear4bit(plain(bias)), dropout=dropout)
    theirs = pefts(layer, bitsandbytes_base(bias, torch.float32))
    assert type(theirs).__name__ == "Linear4bit"
    x = torch.randn(2, 7, INPUTS)
    assert_near(results(layer, x), results(theirs, x))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_qlora_in_bfloat16_as_peft_over_bitsandbytes(autocast):
    layer = adapted(Linear4bit(plain(dtype=torch.bfloat16)))
    theirs = pefts(layer, bitsandbytes_base(False, torch.bfloat16))
    x = torch.randn(2, 7, INPUTS).bfloat16()
    assert_near(results(layer, x, autocast), results(theirs, x, autocast), 2**-7)


def test_around_bitsandbytes_own_map():
    base = bitsandbytes_base(False, torch.float32)
    layer, by_hand = adapted(base), adapted(Linear4bit(plain()))
    by_hand.load_state_dict({"lora_A": layer.lora_A, "lora_B": layer.lora_B}, strict=False)
    x = torch.randn(2, 7, INPUTS)
    assert_near(results(layer, x), results(by_hand, x))
    assert_near([layer.merge().weight.detach()], [by_hand.merge().weight.detach()])


# --- merging ---


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_merged_as_pefts(dtype):
    layer = adapted(plain(bias=True, dtype=dtype), rslora=True)
    theirs = pefts(layer)
    theirs.merge()
    before, x = layer.base_layer.weight.clone(), torch.randn(5, INPUTS).to(dtype)
    apart = layer(x)
    merged = layer.merge()
    assert_near([merged.weight], [theirs.base_layer.weight], 1e-6)
    assert_near([layer(x).detach()], [theirs(x).detach()], 1e-6)
    assert_near([layer(x).detach()], [apart.detach()], 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
    assert torch.equal(layer(x), apart)
    assert layer.merge() is layer.merge()


QUANTIZED = {
    "4 bits": Linear4bit,
    "8 bits": functools.partial(Linear8bit, threshold=0.0),  # all numbers are outliers, and nothing else is rounded
    "grid": on_a_grid,
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_base_becomes_a_plain_map(kind):
    base = QUANTIZED[kind](plain(bias=True))
    layer = adapted(base)
    x = torch.randn(5, INPUTS)
    apart, merged = layer(x), layer.merge()
    assert type(merged) is nn.Linear and merged.bias is base.bias
    assert_near([merged(x).detach()], [apart.detach()])


def test_rounding_to_4_bits_again_would_lose_a_small_update():
    """Why `merge` does not do it: the merged weights fall back to the levels where they were."""
    layer = LoRALinear(Linear4bit(plain()), r=RANK, alpha=8)
    nn.init.normal_(layer.lora_B, std=1e-3)
    base, merged = layer.base_layer.dequantized(torch.float32), layer.merge()
    update = merged.weight - base
    again = Linear4bit(merged).dequantized(torch.float32) - base
    assert float((again - update).norm()) > 0.9 * float(update.norm())


def test_what_cannot_be_adapted_or_merged():
    with pytest.raises(TrainError, match="not around Embedding"):
        LoRALinear(nn.Embedding(3, 4))
    for wrong in ({"r": 0}, {"dropout": 1.0}, {"dropout": -0.1}):
        with pytest.raises(TrainError, match="r must be at least 1 and dropout from 0"):
            LoRALinear(plain(), **wrong)
    base = plain()
    layer = LoRALinear(base)
    base.weight = nn.Parameter(base.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TrainError, match=r"cannot be added to torch.int8 weights"):
        layer.merge()


# --- memory ---


def kept_bytes(x: torch.Tensor, *layers: nn.Module) -> int:
    """Bytes of what autograd keeps for the backward pass, the layers' weights apart; each storage counts once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sum(layer(x) for layer in layers)
    weights = {tensor.data_ptr() for layer in layers for tensor in layer.state_dict().values()}
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


def three_maps(wrap, dtype: torch.dtype) -> nn.ModuleList:
    """Queries, keys and values: three maps with one input."""
    torch.manual_seed(0)
    return nn.ModuleList(wrap(adapted(Linear(INPUTS, OUTPUTS).to(dtype))) for _ in range(3))


@pytest.mark.parametrize("way", ["bfloat16", "float32", "autocast"])
def test_the_input_is_kept_once_and_as_it_is(way):
    """peft's maps each keep a cast of the input where types differ; the three here share the input itself."""
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    tokens = 200
    x = torch.randn(tokens, INPUTS).to(dtype).requires_grad_() * 1  # no leaf, of which autocast would share one cast
    narrow = 3 * tokens * RANK * (2 if way == "autocast" else 4)
    ours, theirs = three_maps(lambda layer: layer, dtype), three_maps(pefts, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        frozen_maps = kept_bytes(x, *(layer.base_layer for layer in ours))  # autocast keeps its casts of the weights
        ours, theirs = (kept_bytes(x, *maps) - frozen_maps for maps in (ours, theirs))
    assert ours == x.nbytes + narrow
    copies = {"bfloat16": 3 * 4, "autocast": 3 * 2, "float32": 4}[way]  # bytes of a number of x
    assert theirs >= tokens * INPUTS * copies
    assert ours < theirs / 4 if way == "bfloat16" else ours <= theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_dropout_a_byte_is_kept(dtype):
    tokens = 200
    x = torch.randn(tokens, INPUTS).to(dtype).requires_grad_()
    layer = adapted(Linear(INPUTS, OUTPUTS).to(dtype), dropout=0.1)
    theirs = pefts(layer)
    ours = kept_bytes(x, layer)
    assert ours == x.nbytes + tokens * INPUTS + tokens * RANK * 4
    assert ours < kept_bytes(x, theirs) / 1.5


def test_of_a_4_bit_base_nothing_is_kept():
    x = torch.randn(200, INPUTS).requires_grad_()
    layer = adapted(Linear4bit(plain()))
    assert kept_bytes(x, layer) == x.nbytes + 200 * RANK * 4


def test_rehearsed_without_values():
    with FakeTensorMode():
        layer = LoRALinear(nn.Linear(INPUTS, OUTPUTS), dropout=0.1).train()
        layer(torch.empty(3, INPUTS, requires_grad=True)).sum().backward()
        assert layer.lora_A.grad.shape == (8, INPUTS)


# --- models ---


def nano() -> Aquila2ForCausalLM:
    return AutoLoader("aquila2", model_name="Aquila2-Nano").get_model()


def with_peft(model: nn.Module, state: dict[str, torch.Tensor], **options) -> PeftModel:
    """peft's adapters on a copy of a model without any, filled with a given state."""
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **options))
    missing = theirs.load_state_dict(
        {k.replace(".weight", ".default.weight"): v for k, v in state.items()}, strict=False
    )
    assert not missing.unexpected_keys
    return theirs


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    ids = torch.randint(10, 900, (2, 24))
    return {"input_ids": ids, "labels": ids.where(torch.rand(ids.shape) < 0.7, -100)}


def train(model: nn.Module, steps: int = 10) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    torch.manual_seed(3)
    for step in range(steps):
        with torch.random.fork_rng():
            given = batch(step % 3)
        loss = causal_loss(model, given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_ten_steps_as_with_peft(dropout):
    model = nano()
    base = copy.deepcopy(model)
    names = add_lora(model, TARGETS, r=4, alpha=8, dropout=dropout)
    assert len(names) == 3 * model.config.num_hidden_layers
    theirs = with_peft(base, lora_state(model), r=4, lora_alpha=8, lora_dropout=dropout, target_modules=list(TARGETS))
    begun = {name: t.clone() for name, t in lora_state(model).items()}
    ours, wanted = train(model), train(theirs)
    assert ours == pytest.approx(wanted, abs=1e-5)
    assert ours[9] < ours[0] - 0.01
    trained = theirs.state_dict()
    for name, tensor in lora_state(model).items():
        assert not torch.equal(tensor, begun[name]), name
        torch.testing.assert_close(tensor, trained[name.replace(".weight", ".default.weight")], rtol=1e-3, atol=2e-5)
    assert all(
        torch.equal(a, b) for (_, a), (_, b) in zip(frozen(model), frozen(base, everything=True), strict=True)
    ), "a frozen weight has moved"


def test_ten_steps_of_qlora_as_with_peft_over_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    loader = AutoLoader("aquila2", "Aquila2-Nano", quantization_config=settings, torch_dtype="float32", device="cpu")
    model = quantize_model(nano(), Scheme("nf4", double_quant=False))
    add_lora(model, TARGETS, r=4, alpha=8)
    theirs = with_peft(loader.get_model(), lora_state(model), r=4, lora_alpha=8, target_modules=list(TARGETS))
    assert {type(layer.base_layer) for layer in lora_layers(model).values()} == {Linear4bit}
    assert type(theirs.base_model.model.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    ours, wanted = train(model), train(theirs)
    assert ours == pytest.approx(wanted, abs=1e-5)
    assert ours[9] < ours[0] - 0.01
    trained = theirs.state_dict()
    for name, tensor in lora_state(model).items():
        torch.testing.assert_close(tensor, trained[name.replace(".weight", ".default.weight")], rtol=1e-3, atol=2e-5)


def test_a_head_with_an_adapter_learns_without_a_table_of_logits_too():
    model, given = tiny(), tiny_batch()
    add_lora(model, ["lm_head"])
    nn.init.normal_(model.lm_head.lora_B)
    results = []
    for loss in (model(**given).loss, causal_loss(model, given)):
        results.append([loss.detach(), *torch.autograd.grad(loss, pair(model.lm_head))])
    assert_near(*results)


def frozen(model: nn.Module, everything: bool = False) -> list[tuple[str, torch.Tensor]]:
    found = [
        (n.replace(".base_layer", ""), p) for n, p in model.named_parameters() if everything or not p.requires_grad
    ]
    return sorted(found, key=lambda item: item[0])


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def tiny(**changes) -> Aquila2ForCausalLM:
    torch.manual_seed(0)
    return Aquila2ForCausalLM(Aquila2Config(**SHAPE | changes)).train()


def tiny_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(3, 97, (2, 12))
    return {"input_ids": ids, "labels": ids}


def tiny_adapted(model: Aquila2ForCausalLM | None = None, seed: int = 5, **options) -> Aquila2ForCausalLM:
    model = tiny() if model is None else model
    add_lora(model, **options)
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing(reentrant, dropout):
    """With torch's old way a frozen embedding cuts the first layer off, unless its output asks for a gradient."""
    model = tiny_adapted(dropout=dropout)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        torch.manual_seed(9)
        causal_loss(model, tiny_batch()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert len(gradients[0]) == 2 * 2 * 2
    assert_near(gradients[1], gradients[0])


def test_which_maps():
    model = tiny()
    whole = "model.layers.1.mlp.up_proj"
    assert add_lora(model, ("o_proj", whole)) == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
        whole,
    ]
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == 6 and all("lora_" in name for name in trained)
    with pytest.raises(TrainError, match="has adapters already"):
        add_lora(model)
    model = tiny()
    with pytest.raises(
        TrainError, match=r"no linear map is called 'query'; the model has down_proj, gate_proj, .*v_proj"
    ):
        add_lora(model, ("q_proj", "query"))
    assert all(weight.requires_grad for weight in model.parameters()), "a model was changed by a call that failed"


def test_a_suffix_is_a_whole_part_of_a_name():
    model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "not_q_proj": nn.Linear(2, 2)})
    assert add_lora(model, ["q_proj"]) == ["q_proj"]


def test_merge_all():
    model, given = tiny_adapted(), tiny_batch()
    model.eval()
    wanted, plain_names = model(**given).logits, {name for name, _ in tiny().named_parameters()}
    assert len(merge_all(model)) == 4
    assert {name for name, _ in model.named_parameters()} == plain_names
    torch.testing.assert_close(model(**given).logits, wanted, rtol=1e-5, atol=1e-5)


def test_tied_weights_are_not_merged():
    model = tiny(tie_word_embeddings=True)
    add_lora(model, ["lm_head"])
    with pytest.raises(TrainError, match=r"lm_head shares its weights with model.embed_tokens.weight"):
        merge_all(model)


# --- files ---


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny_batch()["input_ids"]).logits


@pytest.mark.parametrize(
    "options", [{}, {"rslora": True, "r": 3}, {"targets": ["model.layers.1.mlp.up_proj", "o_proj"]}]
)
def test_ours_loads_in_peft(tmp_path, options):
    model = tiny_adapted(**options)
    save_lora(model, tmp_path)
    theirs = PeftModel.from_pretrained(tiny(), tmp_path)
    assert theirs.peft_config["default"].use_rslora == bool(options.get("rslora"))
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(lora_layers(model))
    assert float((logits(model) - logits(tiny())).abs().max()) > 0.01
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"layers_to_transform": [1]}, {"target_modules": r".*0.*_proj"}]
)
def test_pefts_loads_here(tmp_path, options):
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, "target_modules": ["k_proj", "gate_proj"]} | options)
    theirs = get_peft_model(tiny(), config)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    theirs.save_pretrained(tmp_path)
    model = tiny()
    names = load_lora(model, tmp_path)
    assert len(names) == sum("lora_A" in name for name, _ in theirs.named_parameters())
    assert float((logits(model) - logits(tiny())).abs().max()) > 0.01
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)


def test_back_and_forth(tmp_path):
    model = tiny_adapted()
    save_lora(model, tmp_path)
    again = tiny()
    load_lora(again, tmp_path)
    for name, tensor in lora_state(model).items():
        assert torch.equal(tensor, lora_state(again)[name])
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["target_modules"] == ["q_proj", "v_proj"]


def named(name: str | None) -> Aquila2ForCausalLM:
    model = tiny()
    model.aquila_name = name
    return model


def test_an_adapter_for_another_model_is_refused(tmp_path):
    save_lora(tiny_adapted(named("AquilaChat2-7B")), tmp_path)
    for same in ("AquilaChat2-7B", "BAAI/aquilachat2-7b", "models/AquilaChat2-7B/", None):
        load_lora(named(same), tmp_path)
    with pytest.raises(TrainError, match=r"adapter for AquilaChat2-7B, and this model is Aquila2-7B"):
        load_lora(named("Aquila2-7B"), tmp_path)


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    save_lora(tiny_adapted(), tmp_path)
    for other, said in (
        (tiny(hidden_size=64), r"lora_A has shape \(8, 48\); this model's map has 64 in_features"),
        (tiny(num_key_value_heads=1), r"v_proj.lora_B has shape \(24, 8\); this model's map has 12 out_features"),
        (tiny(num_hidden_layers=1), r"layers.1.self_attn.q_proj.lora_. is for a linear map that this model does not"),
    ):
        with pytest.raises(TrainError, match=said):
            load_lora(other, tmp_path)
        assert all(weight.requires_grad for weight in other.parameters())


def test_what_is_no_adapter_of_ours(tmp_path):
    with pytest.raises(TrainError, match="no adapter: there is no adapter_config"):
        load_lora(tiny(), tmp_path)
    save_lora(tiny_adapted(), tmp_path)
    file = tmp_path / "adapter_config.json"
    good = json.loads(file.read_text(encoding="utf-8"))
    for change, said in (
        ({"use_dora": True, "bias": "all"}, "bias, use_dora: LoRALinear has nothing"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: LoRALinear has nothing"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: LoRALinear has nothing"),
        ({"something": "new"}, "something: LoRALinear has nothing"),
        ({"peft_type": "IA3"}, "does not tell of a LoRA"),
        ({"r": None, "lora_alpha": "8"}, "r, lora_alpha should be a number"),
        ({"r": 4}, r"has shape \(.*8.*\), adapter_config.json says r=4"),
    ):
        file.write_text(json.dumps(good | change), encoding="utf-8")
        with pytest.raises(TrainError, match=said):
            load_lora(tiny(), tmp_path)
    for text, said in (("{", "no JSON"), ("[]", "does not tell of a LoRA")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(TrainError, match=said):
            load_lora(tiny(), tmp_path)
    file.write_text(json.dumps(good), encoding="utf-8")
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    for change, said in (
        ({f"{first}.weight": None}, r"q_proj.lora_B.weight is there without its counterpart"),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(8, 97)},
            "neither A nor B of a linear map",
        ),
    ):
        save_file({name: t for name, t in (tensors | change).items() if t is not None}, weights)
        with pytest.raises(TrainError, match=said):
            load_lora(tiny(), tmp_path)
    weights.write_bytes(b"not this")
    with pytest.raises(TrainError, match="damaged"):
        load_lora(tiny(), tmp_path)
    weights.unlink()
    with pytest.raises(TrainError, match="adapter_model.safetensors is missing"):
        load_lora(tiny(), tmp_path)


def test_one_kind_of_adapter_goes_into_a_folder(tmp_path):
    model = tiny_adapted()
    model.set_submodule("lm_head", LoRALinear(model.lm_head, r=3))
    with pytest.raises(TrainError, match="the model has 2"):
        save_lora(model, tmp_path)
    with pytest.raises(TrainError, match="the model has 0"):
        save_lora(tiny(), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_merged_checkpoint(tmp_path):
    """From a trained adapter to a folder that loads like any other, and answers the same."""
    model = nano()
    add_lora(model, TARGETS)
    train(model, 3)
    save_lora(model, tmp_path / "adapter")
    out = merge_checkpoint(shipped("Aquila2-Nano"), tmp_path / "adapter", tmp_path / "merged")
    loader = AutoLoader("aquila2", model_name=str(out))
    ids = batch()["input_ids"]
    with torch.no_grad():
        wanted, found, before = (m.eval()(input_ids=ids).logits for m in (model, loader.get_model(), nano()))
    assert float((wanted - before).abs().max()) > 0.05
    assert float((found - wanted).norm()) < 0.02 * float((wanted - before).norm()) + 2**-8 * float(wanted.norm())
    text = "天空是蓝色的 and so on"
    assert loader.get_tokenizer()(text).input_ids == load_tokenizer("Aquila2-Nano")(text).input_ids
    assert load_model(out).dtype == load_model(shipped("Aquila2-Nano")).dtype
    with pytest.raises(TrainError, match="is there already"):
        merge_checkpoint(shipped("Aquila2-Nano"), tmp_path / "adapter", out)
    with pytest.raises(TrainError, match="adapter for Aquila2-Nano, and this model is Aquila2-Nano-Chat"):
        merge_checkpoint(shipped("Aquila2-Nano-Chat"), tmp_path / "adapter", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_merged_checkpoint_of_a_base_without_a_tokenizer_gets_that_of_its_name(tmp_path):
    base = tmp_path / "Aquila2-Nano"
    ignored = shutil.ignore_patterns("tokenizer.json")
    shutil.copytree(shipped("Aquila2-Nano"), base, ignore=ignored)
    (base / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    model = nano()
    add_lora(model)
    save_lora(model, tmp_path / "adapter")
    out = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert load_tokenizer(out).get_vocab() == load_tokenizer("Aquila2-Nano").get_vocab()
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"
    assert torch.equal(load_model(out).lm_head.weight, load_model(base).lm_head.weight)
