"""Checkpoints of GPTQ and AWQ, made here of known codes by arithmetic of their own; and what a broken one says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aquila2_tut import Aquila2Config, Aquila2ForCausalLM, AutoLoader
from aquila2_tut.model.weights import WeightsError
from aquila2_tut.quant import GridLinear, Int4Linear, QuantError
from aquila2_tut.quant.methods import LINEARS

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(3, 23)[None]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def signed(words: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[w - 2**32 if w >= 2**31 else w for w in row] for row in words], dtype=torch.int32)


def down(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, columns) -> words, each column one long number."""
    numbers = [sum(code << bits * i for i, code in enumerate(column)) for column in codes.t().tolist()]
    return signed([[n >> 32 * i & 0xFFFFFFFF for n in numbers] for i in range(len(codes) * bits // 32)])


def across(codes: torch.Tensor) -> torch.Tensor:
    """(rows, n) four-bit codes -> words of AWQ's."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    rows = codes.view(len(codes), -1, 8).tolist()
    return signed([[sum(word[c] << 4 * i for i, c in enumerate(order)) for word in row] for row in rows])


def layer_tensors(width: int, out: int, facts: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A linear map as the checkpoint has it, and the weight (out, in) that this stands for."""
    bits, group = facts["bits"], facts["group_size"] if facts["group_size"] > 0 else width
    codes = torch.randint(0, 2**bits, (width, out))
    # GPTQ's first version stores zeros less one; a zero of 0 has no agreed form there.
    zeros = torch.randint(1, 2**bits, (-(-width // group), out))
    steps = (torch.rand(zeros.shape) * 0.2 / 2**bits + 0.01 / 2**bits).half()
    index = torch.arange(width) // group
    index = index[torch.randperm(width)] if facts.get("desc_act") else index
    weight = ((codes - zeros[index]) * steps.double()[index]).t()
    if facts["quant_method"] == "awq":
        return {"qweight": across(codes), "qzeros": across(zeros), "scales": steps}, weight
    stored = zeros if facts.get("checkpoint_format") == "gptq_v2" else zeros - 1
    packed = {"qweight": down(codes, bits), "qzeros": down(stored.t(), bits).t().contiguous()}
    return packed | {"scales": steps, "g_idx": index.int()}, weight


def make(folder: Path, facts: dict[str, Any], **shape: Any) -> Aquila2ForCausalLM:
    """Writes a checkpoint; returns the float32 model that it stands for."""
    torch.manual_seed(0)
    model = Aquila2ForCausalLM(Aquila2Config(**SHAPE | shape)).half().float().eval()
    tensors = model.state_dict()
    for name, linear in list(model.named_modules()):
        if name.endswith(LINEARS):
            del tensors[f"{name}.weight"]
            stored, weight = layer_tensors(linear.in_features, linear.out_features, facts)
            tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
            linear.weight.data = weight.float()
    kept = {name: t.half() if t.dtype == torch.float32 else t for name, t in tensors.items()}
    if model.config.tie_word_embeddings:
        del kept["lm_head.weight"]
    folder.mkdir(exist_ok=True)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["AquilaForCausalLM"], "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    return model


def load(folder: Path, dtype: str = "float32") -> Aquila2ForCausalLM:
    return AutoLoader("aquila2", folder, device="cpu", torch_dtype=dtype).get_model()


def changed(folder: Path, change: Any) -> None:
    """Rewrites the tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def assert_same_logits(found: Aquila2ForCausalLM, wanted: Aquila2ForCausalLM) -> None:
    torch.testing.assert_close(found(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "facts",
    [
        GPTQ,  # the first version, which does not say so
        GPTQ | {"checkpoint_format": "gptq"},
        GPTQ | {"checkpoint_format": "gptq_v2"},
        GPTQ | {"desc_act": True},
        GPTQ | {"group_size": -1},
        GPTQ | {"group_size": 64},  # 96 inputs are a group and a half
        GPTQ | {"bits": 2},
        GPTQ | {"bits": 3},
        GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"},
        AWQ,
        AWQ | {"version": "GEMM", "group_size": -1},
    ],
    ids=lambda facts: "-".join(map(str, facts.values())),
)
def test_the_numbers_are_those_of_the_codes(tmp_path, facts):
    wanted = make(tmp_path, facts)
    found = load(tmp_path)
    assert sum(isinstance(m, GridLinear) for m in found.modules()) == 14
    assert not any(p.requires_grad for p in found.parameters())
    assert_same_logits(found, wanted)


def test_the_names_that_autoawq_had_first(tmp_path):
    wanted = make(tmp_path, AWQ)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(load(tmp_path), wanted)


def test_without_an_index_columns_are_in_order(tmp_path):
    wanted = make(tmp_path, GPTQ)
    changed(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("g_idx")])
    assert_same_logits(load(tmp_path), wanted)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_of_0_borrows_from_its_word(tmp_path, bits):
    """GPTQModel subtracts 0x11111111 and the like from whole words of version 2, with every borrow."""
    wanted = make(tmp_path, GPTQ | {"bits": bits, "checkpoint_format": "gptq_v2"})

    def to_the_first_version(tensors):
        for name in [name for name in tensors if name.endswith("qzeros")]:
            tensors[name][0, 0] &= -1 << bits  # the lowest zero of a word
            stem, ones = name.removesuffix(".qzeros"), sum(1 << at for at in range(0, 32, bits))
            codes = tensors[f"{stem}.qweight"][:, 0].tolist()
            column = [code >> at & 2**bits - 1 for code in codes for at in range(0, 32, bits)][:32]
            steps = tensors[f"{stem}.scales"][0, 0].double()
            wanted.get_submodule(stem).weight.data[0, :32] = (torch.tensor(column) * steps).float()
            words = [[word - ones & 0xFFFFFFFF for word in row] for row in tensors[name].tolist()]
            tensors[name] = signed(words)

    changed(tmp_path, to_the_first_version)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(load(tmp_path), wanted)


SAVED = [
    GPTQ,
    GPTQ | {"checkpoint_format": "gptq_v2", "bits": 3},
    GPTQ | {"desc_act": True},
    GPTQ | {"group_size": -1},
    AWQ,
]


@pytest.mark.parametrize("facts", SAVED, ids=lambda facts: "-".join(map(str, facts.values())))
def test_saved_and_loaded(tmp_path, facts):
    """In memory there is one layout, whatever was read; a folder that still said "AWQ" would be read wrongly."""
    wanted = make(tmp_path / "first", facts)
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert_same_logits(load(tmp_path / "second"), wanted)


def test_what_lies_in_the_order_of_the_kernel_is_not_saved(tmp_path):
    make(tmp_path / "first", GPTQ)
    with pytest.raises(QuantError, match=r"cannot be saved: .* with torch_dtype='float32'"):
        load(tmp_path / "first", "bfloat16").save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_head_of_its_own_and_one_that_is_the_embedding(tmp_path):
    for tied in (False, True):
        wanted = make(tmp_path / str(tied), GPTQ, tie_word_embeddings=tied)
        found = load(tmp_path / str(tied))
        assert_same_logits(found, wanted)
        assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied


def test_biases_of_zeros_are_dropped_and_others_refused(tmp_path):
    wanted, name = make(tmp_path, GPTQ), "model.layers.1.mlp.up_proj.bias"
    changed(tmp_path, lambda tensors: tensors.update({name: torch.zeros(96)}))
    assert_same_logits(load(tmp_path), wanted)
    changed(tmp_path, lambda tensors: tensors[name].__setitem__(5, 0.5))
    with pytest.raises(QuantError, match=r"layers\.1\.mlp\.up_proj\.bias is not zero"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (AWQ | {"version": "gemv"}, r"version 'gemv'"),
        (AWQ | {"version": "gemv_fast"}, r"version 'gemv_fast'"),
        (AWQ | {"bits": 8}, r"AWQ .* bits 8"),
        (GPTQ | {"bits": 5}, r"bits 5"),
        (GPTQ | {"bits": None}, r"bits None"),
        (GPTQ | {"group_size": "all"}, r"group_size 'all'"),
        (GPTQ | {"group_size": 0}, r"group_size 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format 'marlin'"),
    ],
)
def test_layouts_that_are_not_known_are_refused(tmp_path, facts, said):
    make(tmp_path, GPTQ)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    with pytest.raises(QuantError, match=rf"{tmp_path.name}/config\.json.*{said}"):
        load(tmp_path)


@pytest.mark.parametrize("facts", [GPTQ, GPTQ | {"checkpoint_format": "gptq_v2"}, AWQ], ids=["v1", "v2", "awq"])
@pytest.mark.parametrize(
    "lost", ["layers.1.mlp.up_proj.qzeros", "layers.0.self_attn.q_proj.qweight", "layers.0.mlp.down_proj.scales"]
)
def test_a_missing_tensor_is_named(tmp_path, facts, lost):
    make(tmp_path, facts)
    changed(tmp_path, lambda tensors: tensors.pop(f"model.{lost}"))
    with pytest.raises(QuantError, match=rf"{tmp_path.name}.*{lost}"):
        load(tmp_path)


@pytest.mark.parametrize("lost", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_that_is_not_quantized_is_named(tmp_path, lost):
    make(tmp_path, GPTQ, tie_word_embeddings=lost == "model.embed_tokens.weight")
    changed(tmp_path, lambda tensors: tensors.pop(lost))
    with pytest.raises(QuantError, match=rf"{tmp_path.name}.*{lost}"):
        load(tmp_path)


def test_another_shape_is_named(tmp_path):
    make(tmp_path, GPTQ)
    name = "model.layers.0.mlp.down_proj.qweight"
    changed(tmp_path, lambda tensors: tensors.update({name: tensors[name][:8].clone()}))
    with pytest.raises(QuantError, match=rf"{tmp_path.name}.*down_proj\.qweight.*\[8, 64\].*\[12, 64\]"):
        load(tmp_path)


def test_groups_beyond_the_steps_are_refused(tmp_path):
    """An index that leads out of the scales would read what is not there."""
    make(tmp_path, GPTQ)
    changed(tmp_path, lambda tensors: tensors["model.layers.0.mlp.down_proj.g_idx"].__setitem__(7, 3))
    with pytest.raises(QuantError, match=rf"{tmp_path.name}.*down_proj\.g_idx .*3"):
        load(tmp_path)


def test_a_file_that_was_cut_short(tmp_path):
    make(tmp_path, GPTQ)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors: damaged or cut short"):
        load(tmp_path)


def test_it_answers_in_half_precision_and_says_so_of_itself(tmp_path):
    wanted = make(tmp_path, GPTQ)
    for dtype in ("float16", "bfloat16"):
        found = load(tmp_path, dtype)
        assert found.dtype == found.config.dtype == getattr(torch, dtype)
        with torch.no_grad():
            logits = found(IDS).logits.float()
            assert (logits - wanted(IDS).logits).abs().max() < 0.05 * wanted(IDS).logits.std()
    assert load(tmp_path).generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 23)


def test_four_bits_in_bfloat16_take_the_kernel_where_it_fits(tmp_path):
    make(tmp_path / "ordered", GPTQ)
    kinds = {type(m) for n, m in load(tmp_path / "ordered", "bfloat16").named_modules() if n.endswith(LINEARS)}
    assert kinds == {Int4Linear}
    for name, facts in (("shuffled", {"desc_act": True}), ("three", {"bits": 3}), ("row", {"group_size": -1})):
        make(tmp_path / name, GPTQ | facts)
        model = load(tmp_path / name, "bfloat16")
        assert isinstance(model.model.layers[0].mlp.down_proj, GridLinear), name
