"""Quantized checkpoints beside those of bitsandbytes, loaded by other programs, cut off and gone on with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_weights import interleaved, megatron, native
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from aquila2_tut import Aquila2Config, Aquila2ForCausalLM, AutoLoader, assets
from aquila2_tut.locate import LoaderError
from aquila2_tut.model.layouts import ffn_width
from aquila2_tut.model.weights import WeightsError, load_model
from aquila2_tut.quant import GridLinear, QuantError, Scheme, quantize_model
from aquila2_tut.quant.checkpoint import quantize_checkpoint, shard_name

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "data" / "Aquila2-Nano"
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}
IDS = torch.arange(96).view(3, 32) * 37 % 96
SCHEMES = [Scheme("nf4"), Scheme("nf4", double_quant=False), Scheme("int8", 8)]
SCHEMES += [Scheme("rtn", 4), Scheme("gptq", 3), Scheme("awq", 4)]
# A run that dies of itself: after some shards, with the next one half written.
DIES = """
import os, signal, sys
from pathlib import Path
import torch
from aquila2_tut.quant import checkpoint
from aquila2_tut.quant.methods import Scheme
source, out, method, after = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
replace = os.replace
def die(a, b):
    if Path(b).name == after:
        os.truncate(a, 100)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
checkpoint.os.replace = die
ids = torch.arange(96).view(3, 32) * 37 % 96
checkpoint.quantize_checkpoint(source, out, Scheme(method, 4), ids, progress=False)
"""


def tiny(**shape) -> Aquila2ForCausalLM:
    torch.manual_seed(0)
    model = Aquila2ForCausalLM(Aquila2Config(**SHAPE | shape)).eval()
    for name, weight in model.named_parameters():
        weight.data.copy_(1 + 0.5 * torch.rand_like(weight) if "norm" in name else torch.randn_like(weight) / 16)
    model.model.embed_tokens.weight.data.mul_(16)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny().to(torch.bfloat16).save_pretrained(folder)
    return folder


def write(source: Path, out: Path, scheme: Scheme, ids: torch.Tensor | None = IDS) -> Path:
    return quantize_checkpoint(source, out, scheme, ids, progress=False)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def by_bitsandbytes(source: Path, scheme: Scheme) -> Aquila2ForCausalLM:
    pytest.importorskip("bitsandbytes")
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": scheme.double_quant}
    four |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    settings = BitsAndBytesConfig(**four if scheme.method == "nf4" else {"load_in_8bit": True})
    where = {"quantization_config": settings, "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    return AutoModelForCausalLM.from_pretrained(source, **where).eval()


@torch.no_grad()
def logits(model: Aquila2ForCausalLM) -> torch.Tensor:
    return model(IDS).logits.double()


def change(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=str)
@pytest.mark.parametrize("model", ["tiny", "nano"])
def test_it_is_what_bitsandbytes_saves(source, tmp_path, scheme, model):
    """Names, shapes, types and values; and plain transformers gives the same logits from both."""
    original = NANO if model == "nano" else source
    theirs = by_bitsandbytes(original, scheme)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = write(original, tmp_path / "ours", scheme, None)
    wanted, found = tensors_of(tmp_path / "theirs"), tensors_of(ours)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype) or "quant_state" in name, name
        assert_same_stored(name, found, wanted)
    loaded = AutoModelForCausalLM.from_pretrained(ours, device_map={"": "cpu"}).eval()
    assert type(loaded.model.layers[0].mlp.up_proj) is type(theirs.model.layers[0].mlp.up_proj)
    double = scheme.method == "nf4" and scheme.double_quant
    assert change(logits(loaded), logits(theirs)) <= (1e-2 if double else 0)


def assert_same_stored(name: str, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    stem = name.rpartition(".")[0]
    if "quant_state" in name:
        one, two = (json.loads(bytes(tensors[name].tolist())) for tensors in (found, wanted))
        offsets = one.pop("nested_offset", 0), two.pop("nested_offset", 0)
        assert one == two and offsets[0] == pytest.approx(offsets[1], rel=1e-6)
    elif name.endswith("nested_absmax"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-8)
    elif f"{stem}.nested_absmax" in wanted and name.endswith(".absmax"):
        apart = (found[name].int() - wanted[name].int()).abs()  # the mean is summed in another order
        assert apart.max() <= 1 and apart.count_nonzero() <= 1 + len(apart) // 20, name
    else:
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_loaded_it_is_the_model_quantized_in_memory(source, tmp_path, scheme):
    wanted = quantize_model(load_model(source, torch_dtype="float32"), scheme, IDS)
    out = write(source, tmp_path / "out", scheme)
    found = AutoLoader("aquila2", out, device="cpu", torch_dtype="bfloat16").get_model()
    assert change(logits(found), logits(wanted)) < 0.02
    if scheme.method not in ("rtn", "gptq"):  # AWQ's norms are rounded as they are written
        return
    found = AutoLoader("aquila2", out, device="cpu", torch_dtype="float32").get_model()
    for name, module in wanted.named_modules():
        if isinstance(module, GridLinear):
            assert torch.equal(found.get_submodule(name).dequantized(torch.float32), module.dequantized(torch.float32))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_lies_in_the_folder(source, tmp_path, scheme):
    out = write(source, tmp_path / "out", scheme)
    shards = [shard_name(i, 2) for i in range(2)]
    rest = ["config.json", "generation_config.json", "model-rest.safetensors", "model.safetensors.index.json"]
    assert sorted(files_of(out)) == sorted([*shards, *rest])
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    index = json.loads((out / rest[-1]).read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(out / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert index.keys() == tensors_of(out).keys()
    assert {t.dtype for n, t in tensors_of(out).items() if "norm." in n or "embed" in n} == {torch.bfloat16}


def test_the_tokenizer_comes_along(tmp_path):
    tokenizer = AutoLoader("aquila2", NANO).get_tokenizer()
    quantize_checkpoint(NANO, tmp_path / "out", Scheme("nf4"), tokenizer=tokenizer, progress=False)
    loaded = AutoLoader("aquila2", tmp_path / "out", device="cpu")
    assert loaded.get_tokenizer()("the moon")["input_ids"] == tokenizer("the moon")["input_ids"]
    answer = loaded.get_model().predict("The", tokenizer=loaded.get_tokenizer(), sft=False, max_gen_len=4)
    assert isinstance(answer, str) and answer


# --- other layouts as the source ---


def native_folder(folder: Path) -> Aquila2ForCausalLM:
    config = {"vocab_size": 96, "dim": 64, "n_heads": 4, "n_layers": 2, "multiple_of": 32, "norm_eps": 1e-5}
    model = tiny(num_key_value_heads=4, intermediate_size=ffn_width(64, 32))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(native(model), folder / "pytorch_model.bin")
    return model


def megatron_folder(folder: Path) -> Aquila2ForCausalLM:
    model = tiny()
    model.config.save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in megatron(model).items()}, folder / "model.safetensors")
    return model


def sharded_folder(folder: Path) -> Aquila2ForCausalLM:
    (model := tiny(tie_word_embeddings=True)).save_pretrained(folder, max_shard_size="60KB")
    return model


def gguf_file(path: Path) -> Aquila2ForCausalLM:
    gguf, model = pytest.importorskip("gguf"), tiny()
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 2),
        (writer.add_context_length, 2048),
        (writer.add_embedding_length, 64),
        (writer.add_feed_forward_length, 128),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, model.config.rms_norm_eps),
        (writer.add_vocab_size, 96),
    ):
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        tensor = interleaved(tensor, heads) if heads else tensor
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return model


@pytest.mark.parametrize("make", [native_folder, megatron_folder, sharded_folder, gguf_file])
@pytest.mark.parametrize("scheme", [Scheme("nf4"), Scheme("gptq", 8)], ids=str)
def test_every_layout_as_the_source(tmp_path, make, scheme):
    model = make(tmp_path / "source")
    out = write(tmp_path / "source", tmp_path / "out", scheme)
    found = logits(AutoLoader("aquila2", out, device="cpu", torch_dtype="bfloat16").get_model())
    assert change(found, logits(quantize_model(model, scheme, IDS))) < 0.03


@pytest.mark.slow
def test_the_embedded_model_from_its_gguf_file(tmp_path):
    file = assets.path("smollm2-135m")
    out = write(file, tmp_path / "out", Scheme("rtn", 8), None)
    ids = torch.arange(1000, 1040)[None]
    with torch.no_grad():
        found = AutoLoader("aquila2", out, device="cpu", torch_dtype="float32").get_model()(ids).logits
        wanted = load_model(file, torch_dtype="float32")(ids).logits
    assert change(found.double(), wanted.double()) < 0.02
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) < 0.66 * 2 * 134_515_008


# --- cut off ---


@pytest.mark.parametrize(("method", "stored"), [("gptq", "bfloat16"), ("awq", "float32")])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path, method, stored):
    """With float32 weights a norm is another number in the file than before: later layers must see the file's."""
    source = tmp_path / "source"
    tiny(num_hidden_layers=4, dtype=stored).to(getattr(torch, stored)).save_pretrained(source)
    wanted = files_of(write(source, tmp_path / "whole", Scheme(method, 4)))
    command = [sys.executable, "-c", DIES, source, tmp_path / "out", method, shard_name(2, 4)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    part = tmp_path / ".out.part"
    assert not (tmp_path / "out").exists()
    there = [shard_name(0, 4), shard_name(1, 4), "model-rest.safetensors"]
    assert sorted(file.name for file in part.glob("*.safetensors")) == there
    before = files_of(part)
    for other in (Scheme(method, 3), Scheme("rtn", 4), Scheme(method, 4, 16)):
        with pytest.raises(QuantError, match=r"\.out\.part holds an unfinished run with another (bits|method|group)"):
            write(source, tmp_path / "out", other)
    with pytest.raises(QuantError, match="another text: remove it to begin"):
        write(source, tmp_path / "out", Scheme(method, 4), IDS.flip(0))
    assert files_of(part) == before
    assert files_of(write(source, tmp_path / "out", Scheme(method, 4))) == wanted
    assert not part.exists()


def test_what_is_there_is_never_written_over(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(source, out, Scheme("nf4"), None)  # an empty folder is no loss
    before = files_of(out)
    with pytest.raises(QuantError, match=r"out is there already: remove it, or name another folder"):
        write(source, out, Scheme("nf4"), None)
    assert files_of(out) == before
    with pytest.raises(QuantError, match="is there already"):
        write(source, source, Scheme("nf4"), None)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(QuantError, match="file is there already"):
        write(source, tmp_path / "file", Scheme("nf4"), None)
    assert (tmp_path / "file").read_text() == "mine"


def test_without_a_text_nothing_is_begun(source, tmp_path):
    """Or the next run, with a text, would find one that was begun without."""
    with pytest.raises(QuantError, match="gptq looks at the inputs"):
        write(source, tmp_path / "out", Scheme("gptq"), None)
    assert not list(tmp_path.iterdir())
    assert write(source, tmp_path / "out", Scheme("gptq")).is_dir()


def test_quantized_once_is_enough(source, tmp_path):
    once = write(source, tmp_path / "once", Scheme("nf4"), None)
    with pytest.raises(QuantError, match="once is quantized already: begin with the model as it was"):
        write(once, tmp_path / "twice", Scheme("rtn"), None)
    with pytest.raises(LoaderError, match="once is quantized already"):
        AutoLoader("aquila2", once, quantization_config="nf4", device="cpu").get_model()


# --- broken sources ---


@pytest.mark.parametrize(
    "lost", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_tensor_that_the_source_lacks(source, tmp_path, lost):
    model, folder = load_model(source), tmp_path / "broken"
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"broken: {lost} is missing"):
        write(folder, tmp_path / "out", Scheme("nf4"), None)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_or_too_large(tmp_path):
    for value, said in ((torch.inf, r"inf at \[3, 5\]"), (1e7, r"magnitude 1e\+07 is too large for steps in float16")):
        model, folder = tiny(dtype="float32"), tmp_path / str(value)
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
        model.save_pretrained(folder)
        with pytest.raises(QuantError, match=rf"model\.layers\.1\.mlp\.up_proj: .*{said}"):
            write(folder, tmp_path / f"out-{value}", Scheme("rtn"), None)


def test_widths_that_leave_words_open_are_refused(tmp_path):
    model = tiny(hidden_size=48, intermediate_size=80, head_dim=12)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(QuantError, match=r"layers\.0\.self_attn\.q_proj: 48 codes of 4 bits do not fill 32-bit words"):
        write(tmp_path / "source", tmp_path / "out", Scheme("rtn"), None)
