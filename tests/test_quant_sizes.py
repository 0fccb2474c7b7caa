"""Predicted bytes, against the tensors that are really there after loading."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from aquila2_tut import assets
from aquila2_tut.config import PRESETS, Aquila2Config
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.model.cache import make_cache
from aquila2_tut.model.weights import load_model
from aquila2_tut.quant import (
    FORMATS,
    Int4Linear,
    Linear4bit,
    Linear8bit,
    QuantError,
    Scheme,
    predicted_bytes,
    published_sizes,
    quantize_model,
)
from aquila2_tut.quant.int4 import kernel_works
from aquila2_tut.quant.nf4 import storage_bytes
from aquila2_tut.quant.sizes import cache_bytes, group_size, linear_shapes, matrix_bytes
from aquila2_tut.quant.stored import load_gguf_codes

NANO = Path(__file__).resolve().parents[1] / "data/Aquila2-Nano"
MODELS = ("SmolLM2-135M", "Aquila2-Nano")
CLOSE = 0.005
BNB_SETTINGS = ("has_fp16_weights", "quant_type", "compress_statistics")  # of a parameter, as its layer set them


def storages(thing, found, seen):
    """Every storage that can be reached from an object, by its address: whatever a library hides, wherever it does."""
    if id(thing) in seen or isinstance(thing, type | str | bytes):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor) and not hasattr(thing, "__tensor_flatten__") and not thing.is_meta:
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    parts = list(thing.values()) if isinstance(thing, dict) else []
    parts += list(thing) if isinstance(thing, list | tuple | set) else []
    for part in [*parts, *getattr(thing, "__dict__", {}).values()]:
        storages(part, found, seen)


def measured(model):
    """Bytes of all storages of a model, each once."""
    found = {}
    storages(model, found, set())
    return sum(found.values())


def with_linears(model, make, head=False):
    """A copy of a model whose layers' linear maps were made anew."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (head or name != "lm_head"):
            model.set_submodule(name, make(module))
    return model


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    """A model in bfloat16."""
    path = NANO if request.param == "Aquila2-Nano" else assets.path("smollm2-135m")
    return load_model(path, torch_dtype="bfloat16")


@pytest.fixture(scope="module")
def nano():
    return load_model(NANO, torch_dtype="bfloat16")


def bnb_linear(kind):
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear):
        out, inputs = linear.weight.shape
        with torch.device("meta"):  # no time is spent on random weights
            if kind == "int8":
                new = bnb.nn.Linear8bitLt(inputs, out, bias=False, has_fp16_weights=False)
            else:
                double = kind == "nf4-dq"
                new = bnb.nn.Linear4bit(inputs, out, bias=False, quant_type="nf4", compress_statistics=double)
        how = {name: value for name, value in vars(new.weight).items() if name in BNB_SETTINGS}
        new.weight = type(new.weight)(linear.weight.detach(), requires_grad=False, **how)
        return new.to("cpu")

    return make


def assert_close(found, predicted):
    assert found == pytest.approx(predicted, rel=CLOSE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_numbers(loaded, dtype):
    model = copy.deepcopy(loaded).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    assert measured(model) == predicted_bytes(model.config, dtype).total
    assert predicted_bytes(model.config, dtype).total == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-dq"])
def test_modules_of_bitsandbytes(loaded, kind):
    model = with_linears(loaded, bnb_linear(kind))
    assert_close(measured(model), predicted_bytes(model.config, kind).total)


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-dq"])
def test_using_a_model_adds_nothing(nano, kind):
    model = with_linears(nano, bnb_linear(kind))
    before = measured(model)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert measured(model) == before


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-dq"])
def test_loaded_by_transformers(tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    config = Aquila2Config.preset("Aquila2-Nano")
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields += ("num_key_value_heads", "head_dim", "tie_word_embeddings")
    LlamaForCausalLM(LlamaConfig(**{field: getattr(config, field) for field in fields})).save_pretrained(tmp_path)
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": kind == "nf4-dq"}
    how = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else BitsAndBytesConfig(load_in_4bit=True, **four)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype=torch.bfloat16)
    assert_close(measured(model), predicted_bytes(config, kind).total)


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-dq"])
def test_by_hand(loaded, kind):
    makers = {"int8": Linear8bit, "nf4": Linear4bit, "nf4-dq": lambda linear: Linear4bit(linear, double_quant=True)}
    predicted = predicted_bytes(loaded.config, kind)
    assert measured(with_linears(loaded, makers[kind])) == predicted.total - predicted.tables


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-int4"])
def test_torchao(loaded, kind):
    quantization = pytest.importorskip("torchao.quantization")
    prototype = pytest.importorskip("torchao.prototype.quantization.int4.inference_workflow")
    model = copy.deepcopy(loaded)
    group = group_size(FORMATS["torchao-int4"], model.config)
    how = {
        "torchao-int8": quantization.Int8WeightOnlyConfig(),
        "torchao-int4": prototype.PrototypeInt4WeightOnlyConfig(group_size=group),
    }
    quantization.quantize_(model.model, how[kind], lambda module, _: isinstance(module, nn.Linear))
    assert_close(measured(model), predicted_bytes(model.config, kind).total)


def gptq_tensors(out, inputs, bits, group):
    """The tensors of a GPTQ checkpoint for one linear map."""
    groups = -(-inputs // group)
    return [
        torch.empty(inputs * bits // 32, out, dtype=torch.int32, device="meta"),
        torch.empty(groups, out * bits // 32, dtype=torch.int32, device="meta"),
        torch.empty(groups, out, dtype=torch.float16, device="meta"),
        torch.empty(inputs, dtype=torch.int32, device="meta"),
    ]


@pytest.mark.parametrize(("kind", "bits"), [("gptq-8", 8), ("gptq-4", 4), ("gptq-3", 3), ("awq-4", 4)])
@pytest.mark.parametrize(("name", "group"), [("SmolLM2-135M", 64), ("Aquila2-Nano", 128), ("Aquila2-34B", 128)])
def test_grids(kind, bits, name, group):
    config = Aquila2Config.preset(name)
    with torch.device("meta"):
        model = Aquila2ForCausalLM(config).to(torch.bfloat16)
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    rest = sum(p.nbytes for p in model.parameters()) - sum(m.weight.nbytes for m in linears)
    tensors = [t for m in linears for t in gptq_tensors(m.out_features, m.in_features, bits, group)]
    assert predicted_bytes(config, kind).total == rest + sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(("kind", "bits"), [("gptq-4", 4), ("gptq-3", 3), ("gptq-8", 8)])
def test_grids_that_are_there(loaded, kind, bits):
    model = quantize_model(copy.deepcopy(loaded), Scheme("rtn", bits))
    assert measured(model) == predicted_bytes(loaded.config, kind).total


@pytest.mark.skipif(not kernel_works(), reason="this torch has no four-bit kernel for the CPU")
def test_four_bits_in_the_order_of_the_kernel(loaded):
    model = quantize_model(copy.deepcopy(loaded), Scheme("rtn", 4))
    for name, module in list(model.named_modules()):
        if Int4Linear.fits(module):
            model.set_submodule(name, Int4Linear.of_grid(module))
    assert measured(model) == predicted_bytes(loaded.config, "int4-cpu").total


@pytest.mark.skipif(not kernel_works(), reason="this torch has no four-bit kernel for the CPU")
def test_the_codes_of_a_gguf_file():
    config = Aquila2Config.preset("SmolLM2-135M")
    model = load_gguf_codes(assets.path("smollm2-135m"), config, torch.device("cpu"))
    assert measured(model) == predicted_bytes(config, "gguf").total


def test_a_group_divides_every_row():
    narrow = Aquila2Config.preset("Aquila2-Nano", intermediate_size=736)
    assert group_size(FORMATS["gptq-4"], narrow) == 32
    assert group_size(FORMATS["nf4"], narrow) == 64
    assert group_size(FORMATS["int8"], narrow) == 0


@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (3, 100), (576, 1536), (1, 1)])
def test_a_matrix_of_any_shape_in_nf4(shape):
    for kind, double in (("nf4", False), ("nf4-dq", True)):
        found = matrix_bytes(FORMATS[kind], *shape, group=64)
        assert sum(found) - found.tables == storage_bytes(shape, double_quant=double)


def test_shapes_are_those_of_the_model():
    for name in ("SmolLM2-135M", "Aquila2-34B"):
        config = Aquila2Config.preset(name)
        with torch.device("meta"):
            layer = Aquila2ForCausalLM(config).model.layers[0]
        real = [tuple(m.weight.shape) for m in layer.modules() if isinstance(m, nn.Linear)]
        assert sorted(linear_shapes(config)) == sorted(real)


@pytest.mark.parametrize("name", PRESETS)
def test_unquantized_models_have_their_parameters(name):
    config = Aquila2Config.preset(name)
    for kind, each in (("fp32", 4), ("bf16", 2)):
        assert predicted_bytes(config, kind).total == each * config.parameter_count
        assert predicted_bytes(config, kind, keep=()).total == each * config.parameter_count


# ---------- what stays as it is ----------


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-dq"])
def test_a_head_of_its_own(nano, kind):
    """A head that was the embedding becomes a matrix of its own, and costs extra."""
    predicted = predicted_bytes(nano.config, kind, keep=["embed_tokens"])
    assert_close(measured(with_linears(nano, bnb_linear(kind), head=True)), predicted.total)
    assert predicted.head > 0 and predicted.total - predicted.head == predicted_bytes(nano.config, kind).total


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("head", [False, True])
def test_an_embedding_too(nano, kind, head):
    """The head that was the same matrix, quantized or not, is then one of its own."""
    bnb = pytest.importorskip("bitsandbytes")
    make = {"int8": bnb.nn.Embedding8bit, "nf4": bnb.nn.EmbeddingNF4}[kind]
    model = with_linears(nano, bnb_linear(kind), head=head)
    table = make(model.config.vocab_size, model.config.hidden_size)
    table.load_state_dict({"weight": model.model.embed_tokens.weight.detach()})
    model.model.embed_tokens = table.to("cpu")
    predicted = predicted_bytes(model.config, kind, keep=[] if head else ["lm_head"])
    assert_close(measured(model), predicted.total)
    assert predicted.embedding < predicted.head or head


def test_separate_matrices_shrink_apart():
    config = Aquila2Config.preset("Aquila2-7B")
    both, neither = predicted_bytes(config, "nf4"), predicted_bytes(config, "nf4", keep=[])
    assert both.embedding == both.head == 2 * config.vocab_size * config.hidden_size
    assert neither.embedding == neither.head == storage_bytes((config.vocab_size, config.hidden_size)) + 4 * 16
    assert predicted_bytes(config, "nf4", keep=["lm_head"]).total == both.total - both.embedding + neither.embedding


def test_what_is_not_known():
    config = Aquila2Config.preset("Aquila2-Nano")
    with pytest.raises(QuantError, match="int5.*known.*nf4"):
        predicted_bytes(config, "int5")
    with pytest.raises(QuantError, match="norm"):
        predicted_bytes(config, "nf4", keep=["norm", "lm_head"])


def test_the_cache(nano):
    cache, tokens = make_cache(), torch.arange(1, 12)[None]
    with torch.inference_mode():
        nano(input_ids=tokens, past_key_values=cache, use_cache=True)
    found = sum(side.nbytes for layer in cache.layers for side in (layer.keys, layer.values))
    assert cache_bytes(nano.config, 11) == found
    assert cache_bytes(Aquila2Config.preset("Aquila2-34B"), 1) == 245_760  # 8 of 48 heads have keys of their own


# ---------- published figures ----------


@pytest.mark.parametrize("seen", published_sizes(), ids=lambda seen: f"{seen.model}-{seen.format}")
def test_published_sizes(seen):
    """In one of the units that a figure may have, the weights are within 3 % of it."""
    assert min(map(abs, seen.apart.values())) < 0.03
    for unit, beyond in seen.beyond.items():
        assert beyond == pytest.approx(-seen.apart[unit] * seen.figure * {"GB": 1e9, "GiB": 2**30}[unit])


def test_the_34b_in_nf4():
    seen = next(seen for seen in published_sizes() if seen.format == "nf4-dq")
    assert seen.figure == 19.7 and -0.03 < seen.apart["GB"] < 0
    # By hand: half a byte a weight; a byte for each 64 of them, 4 for each 256 of those, and a mean; tables of levels.
    weights, matrices = 60 * (2 * 6144 * 128 * (48 + 8) + 3 * 6144 * 24576), 60 * 7
    by_hand = {
        "codes": weights // 2,
        "scales": weights // 64 + 4 * (weights // 64 // 256) + 4 * matrices,
        "zeros": 0,
        "tables": (64 + 1024) * matrices,
        "embedding": 2 * 100008 * 6144,
        "head": 2 * 100008 * 6144,
        "norms": 2 * 121 * 6144,
    }
    assert seen.predicted.terms == by_hand
