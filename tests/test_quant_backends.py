"""The libraries behind `AutoLoader(quantization_config=…)`: that they quantize, what they leave, what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from aquila2_tut import Aquila2Config, Aquila2ForCausalLM, AutoLoader
from aquila2_tut.locate import LoaderError
from aquila2_tut.model.weights import load_model
from aquila2_tut.quant import QuantError, Scheme, backends, dequantize_nf4, quantize_nf4
from aquila2_tut.quant.backends import CONFIGS, check_device, named_config
from aquila2_tut.quant.checkpoint import quantize_checkpoint
from aquila2_tut.quant.methods import LINEARS

NANO = Path(__file__).resolve().parent.parent / "data" / "Aquila2-Nano"
IDS = torch.arange(40)[None]
CPU, BF16 = torch.device("cpu"), torch.bfloat16
# The kind of a linear map and of its weight, and the largest change of Nano's logits.
EXPECTED = {
    "nf4": ("Linear4bit", "Params4bit", 0.1),
    "nf4-single": ("Linear4bit", "Params4bit", 0.1),
    "int8": ("Linear8bitLt", "Int8Params", 0.025),
    "torchao-int8": ("Linear", "Int8Tensor", 0.02),
    "torchao-int4": ("Linear", "Int4OpaqueTensor", 0.15),
}

for library in ("bitsandbytes", "torchao", "accelerate"):
    pytest.importorskip(library)


def load(settings, folder: Path = NANO, **arguments) -> Aquila2ForCausalLM:
    return AutoLoader("aquila2", folder, quantization_config=settings, device="cpu", **arguments).get_model()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits.double()


def change(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def kinds(model: nn.Module, ends: tuple[str, ...] = LINEARS) -> set[tuple[str, str]]:
    return {(type(m).__name__, type(m.weight).__name__) for n, m in model.named_modules() if n.endswith(ends)}


@pytest.fixture(scope="module")
def numbers():
    return logits(load_model(NANO, torch_dtype="float32"))


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(request):
    return request.param, load(request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = Aquila2ForCausalLM(Aquila2Config(num_attention_heads=4, num_key_value_heads=2, **shape)).to(BF16)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            weight.data.mul_(4)
    model.save_pretrained(folder := tmp_path_factory.mktemp("small"))
    return folder


def test_every_name_is_expected_here():
    assert CONFIGS.keys() == EXPECTED.keys()


def test_the_linear_maps_are_quantized_and_nothing_else(loaded, numbers):
    """Once transformers looked for nn.Linear, found none, said nothing, and all weights stayed numbers."""
    name, model = loaded
    linear, weight, largest = EXPECTED[name]
    assert kinds(model) == {(linear, weight)}
    assert (
        type(model.lm_head) in (nn.Linear, type(load_model(NANO).lm_head))
        and type(model.lm_head.weight) is nn.Parameter
    )
    assert type(model.model.embed_tokens.weight) is nn.Parameter and model.model.embed_tokens.weight.dtype == BF16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(type(m.weight) is nn.Parameter for n, m in model.named_modules() if "norm" in n)
    assert 1e-3 < change(logits(model), numbers) < largest
    assert model.dtype == BF16 and not model.training and model.aquila_name == "Aquila2-Nano"


def test_it_answers(loaded):
    tokenizer = AutoLoader("aquila2", NANO).get_tokenizer()
    asked = {"tokenizer": tokenizer, "sft": False, "max_gen_len": 4, "temperature": 0}
    answer = loaded[1].predict("The moon", **asked)
    assert isinstance(answer, str) and answer
    assert "".join(loaded[1].stream("The moon", **asked)) == answer


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(small, tmp_path, name, used):
    """Also after products, before which bitsandbytes lays codes and scales out anew."""
    model, before = load(name, small), logits(load(name, small))
    if used:
        logits(model)
    if name == "torchao-int4":
        with pytest.raises(
            QuantError, match="torchao cannot save its four-bit weights of a CPU: `aquila2-tut quantize`"
        ):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    model.save_pretrained(tmp_path)
    again = load(None, tmp_path)
    assert kinds(again) == kinds(model)
    # With its order changed, bitsandbytes has its scales in bfloat16.
    assert change(logits(again), before) <= (0.02 if used and name.startswith("nf4") else 0)
    assert change(logits(model), before) <= (0.02 if used and name.startswith("nf4") else 0)


def test_bitsandbytes_has_the_weights_of_the_book():
    """NF4 of nf4.py, number by number."""
    from bitsandbytes.functional import dequantize_4bit

    theirs, numbers = load("nf4-single"), load_model(NANO, torch_dtype=BF16)
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        weight = theirs.model.layers[3].get_submodule(name).weight
        ours = dequantize_nf4(quantize_nf4(numbers.model.layers[3].get_submodule(name).weight))
        assert torch.equal(dequantize_4bit(weight.data, weight.quant_state), ours)


def test_what_is_to_be_left_alone_can_be_said():
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "down_proj"])
    model = load(settings)
    assert kinds(model, ("mlp.down_proj",)) == {("Linear", "Parameter")}
    assert kinds(model, ("mlp.up_proj",)) == {("Linear8bitLt", "Int8Params")}


def test_other_types_of_what_is_not_quantized():
    model = load("nf4", torch_dtype="float32")
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert bool(logits(model).isfinite().all())
    with pytest.raises(QuantError, match=r"int4 kernels are for bfloat16, not torch\.float32: torch_dtype='bfloat16'"):
        load("torchao-int4", torch_dtype="float32")


def test_a_model_that_is_too_narrow_for_the_kernel(tmp_path):
    shape = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    Aquila2ForCausalLM(Aquila2Config(num_attention_heads=2, **shape)).to(BF16).save_pretrained(tmp_path)
    with pytest.raises(QuantError, match=r"among 32 columns or more, .* groups of 8: take 'torchao-int8'"):
        load("torchao-int4", tmp_path)
    assert kinds(load("torchao-int8", tmp_path)) == {("Linear", "Int8Tensor")}
    numbers = logits(load_model(tmp_path, torch_dtype="float32"))
    assert change(logits(load("nf4", tmp_path)), numbers) < 0.3


# --- what is refused before anything is loaded ---


def test_the_first_settings_of_bitsandbytes_named_no_library(small):
    assert kinds(load({"load_in_8bit": True}, small)) == {("Linear8bitLt", "Int8Params")}


def test_numbers_are_never_made_up(small, tmp_path):
    """transformers fills what a folder lacks with random numbers, also where it does not know how it was quantized."""
    lost = "model.layers.1.mlp.up_proj.weight"
    model = load_model(small)
    model.save_pretrained(tmp_path, state_dict={n: t for n, t in model.state_dict().items() if n != lost})
    with pytest.raises(QuantError, match=rf"{tmp_path.name}: 1 tensors of torchao are missing, the first is {lost}"):
        load("torchao-int8", tmp_path)
    grids, config = quantize_checkpoint(small, tmp_path / "out", Scheme("rtn"), progress=False), "config.json"
    for method, said in (("unheard-of", "14 tensors of unheard-of are missing"), (None, "has no quant_method")):
        facts = {"quantization_config": {"quant_method": method} if method else {"bits": 4}}
        (grids / config).write_text(json.dumps(json.loads((grids / config).read_text()) | facts))
        with pytest.raises(QuantError, match=rf"out: .*{said}"):
            load(None, grids)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(backends, "_quietly", lambda *args, **kwargs: pytest.fail("it was loaded"))


def test_names_that_there_are_not(nothing_is_loaded):
    with pytest.raises(
        QuantError, match="quantization 'nf5' is not one of nf4, .*torchao-int4, gguf, nor a configuration"
    ):
        load("nf5")
    with pytest.raises(QuantError, match='"gguf" is for a GGUF file'):
        load("gguf")


@pytest.mark.parametrize(
    ("name", "library"), [("nf4", "bitsandbytes"), ("torchao-int8", "torchao"), ("int8", "accelerate")]
)
def test_a_library_that_is_missing(nothing_is_loaded, monkeypatch, name, library):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x, *rest: None if x == library else real(x, *rest))
    with pytest.raises(QuantError, match=rf"this needs {library}, which is not installed: pip install 'aquila2-tut\["):
        load(name)


@pytest.mark.parametrize(
    ("name", "device", "capability", "said"),
    [
        ("nf4", "mps", None, "bitsandbytes has no kernels for Apple's GPUs: device='cpu'"),
        ("torchao-int8", "mps", None, "torchao has no kernels for Apple's GPUs"),
        ("torchao-int4", "cuda", (7, 5), r"need a GPU of compute capability 8\.0 \(A100\) or later: take 'nf4'"),
        ("torchao-int4", "cuda", (8, 0), None),
        ("torchao-int8", "cuda", (7, 5), None),
        ("nf4", "cuda", (7, 5), None),
    ],
)
def test_what_a_device_cannot_run(monkeypatch, name, device, capability, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = Aquila2Config.preset("Aquila2-7B")
    settings = named_config(name, config, BF16, torch.device(device))
    for form in (settings, settings.to_dict()):  # as an object, and as config.json has it
        if said is None:
            check_device(form, BF16, torch.device(device))
            continue
        with pytest.raises(QuantError, match=said):
            check_device(form, BF16, torch.device(device))


# --- adapters over quantized models ---


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of peft that does something."""
    peft, folder = pytest.importorskip("peft"), tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(load_model(NANO, torch_dtype="float32"), settings).save_pretrained(folder)
    return folder


def test_an_adapter_over_nf4(adapter, tmp_path, numbers):
    """Whether the numbers are rounded now or were before, and near the adapter over the numbers."""
    plain = AutoLoader("aquila2", NANO, lora_dir=adapter, device="cpu").get_model()
    rounded_now = AutoLoader("aquila2", NANO, qlora_dir=adapter, device="cpu").get_model()
    assert ("Linear4bit", "Linear4bit") in {(type(m).__name__, type(m.base_layer).__name__) for m in loras(rounded_now)}
    out = quantize_checkpoint(NANO, tmp_path / "out", Scheme("nf4"), progress=False)
    rounded_before = AutoLoader("aquila2", out, qlora_dir=adapter, device="cpu").get_model()
    wanted = logits(plain)
    assert change(logits(rounded_now), wanted) < 0.5 * change(wanted, numbers)
    assert change(logits(rounded_before), logits(rounded_now)) < 0.02
    text = rounded_now.predict("The", tokenizer=AutoLoader("aquila2", NANO).get_tokenizer(), sft=False, max_gen_len=3)
    assert isinstance(text, str)


def loras(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def test_an_adapter_over_a_grid_says_what_to_do(adapter, tmp_path):
    out = quantize_checkpoint(NANO, tmp_path / "out", Scheme("rtn"), progress=False)
    with pytest.raises(LoaderError, match="peft cannot put .* GPTQ or AWQ"):
        AutoLoader("aquila2", out, lora_dir=adapter, device="cpu").get_model()
