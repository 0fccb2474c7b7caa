"""How quantized weights lie in checkpoints: bitsandbytes' names for NF4 and int8, those of GPTQ and AWQ for grids.

Grids are read without any other library, also what AutoGPTQ and AutoAWQ made, such as BAAI's own; so they run wherever
torch does.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from ..config import Aquila2Config
from ..gguf import GGUFFile
from ..model import Aquila2ForCausalLM
from ..model.layouts import half_rotation
from ..model.weights import open_checkpoint, stored_generation_config
from .errors import QuantError
from .grid import GridLinear
from .int4 import Int4Linear, kernel_works
from .int8 import Linear8bit
from .methods import LINEARS, Scheme
from .nf4 import DYNAMIC_CODE, NF4_CODE, SCALES_BLOCK, Linear4bit
from .packing import pack, unpack, unpack_awq

GRIDS = ("gptq", "awq")


def half_type(config: Aquila2Config) -> torch.dtype:
    """The type of what is left unquantized: the checkpoint's, or bfloat16 where that has 32 bits."""
    return config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


# --- writing ---


def stored_as(layer: nn.Module, prefix: str, kept: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a quantized decoder layer, as a checkpoint has them.

    Args:
        layer: with quantized linear maps.
        prefix: before each name.
        kept: the type of what is left unquantized.
    """
    tensors = {}
    for name, module in layer.named_modules():
        if isinstance(module, Linear4bit):
            tensors |= {f"{prefix}{name}.{key}": tensor for key, tensor in _bitsandbytes_4bit(module, kept).items()}
        elif isinstance(module, Linear8bit):
            eight = {"weight": module.codes, "SCB": module.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
            tensors |= {f"{prefix}{name}.{key}": tensor for key, tensor in eight.items()}
        elif isinstance(module, GridLinear):
            tensors |= {f"{prefix}{name}.{key}": tensor for key, tensor in module.state_dict().items()}
        elif name and not list(module.children()):
            tensors[f"{prefix}{name}.weight"] = module.weight.to(kept)
    return tensors


def _bitsandbytes_4bit(layer: Linear4bit, kept: torch.dtype) -> dict[str, Tensor]:
    q, facts = layer.quantized, {"quant_type": "nf4", "blocksize": layer.blocksize}
    facts |= {"dtype": str(kept).removeprefix("torch."), "shape": list(q.shape)}
    tensors = {"weight": q.codes[:, None], "weight.quant_map": NF4_CODE.clone()}
    if isinstance(q.scales, Tensor):
        tensors["weight.absmax"] = q.scales
    else:
        tensors["weight.absmax"], tensors["weight.nested_absmax"] = q.scales.codes, q.scales.absmax
        tensors["weight.nested_quant_map"] = DYNAMIC_CODE.clone()
        facts |= {"nested_blocksize": SCALES_BLOCK, "nested_dtype": "float32", "nested_offset": q.scales.mean.item()}
    text = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return tensors | {"weight.quant_state.bitsandbytes__nf4": text}


def stored_config(config: Aquila2Config, scheme: Scheme) -> Aquila2Config:
    """A configuration that says how the weights are stored."""
    kept = half_type(config)
    if scheme.method == "nf4":
        facts = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": scheme.double_quant,
            "bnb_4bit_compute_dtype": str(kept).removeprefix("torch."),
        }
    elif scheme.method == "int8":
        facts = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    else:
        facts = _grid_facts(scheme.bits, scheme.group)
        facts["meta"] = {"quantizer": ["aquila2-tut"], "method": scheme.method}
    new = Aquila2Config.from_dict(config.to_dict() | {"quantization_config": facts})
    new.dtype = kept
    return new


def _grid_facts(bits: int, group: int, desc_act: bool = False) -> dict[str, Any]:
    """What config.json says of `GridLinear`s."""
    facts = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": bits, "group_size": group}
    return facts | {"desc_act": desc_act, "sym": False, "lm_head": False}


def _refuse_to_save(*arguments: Any, **options: Any) -> None:
    raise QuantError(
        "four-bit codes in the order of torch's kernel cannot be saved: copy the checkpoint that they came from, or "
        "load a GPTQ or AWQ one with torch_dtype='float32'"
    )


# --- reading ---


def with_grids(module: nn.Module, bits: int, group: int) -> nn.Module:
    """Puts empty `GridLinear`s in place of the linear maps of decoder layers.

    Args:
        module: a layer, or a model; changed in place.
        bits: of a code.
        group: columns that share a grid; -1 for all of a row.

    Returns:
        The module.
    """
    for name, child in list(module.named_modules()):
        if name.endswith(LINEARS):
            module.set_submodule(name, GridLinear(child, bits, group if group > 0 else child.in_features))
    return module


def fill(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Fills a module that is on the meta device; the steps of grids keep their type.

    Raises:
        QuantError: a tensor is missing, unknown or of another shape.
    """
    moved = {
        name: t.to(device, dtype if t.is_floating_point() and not name.endswith(".scales") else None)
        for name, t in tensors.items()
    }
    try:
        module.load_state_dict(moved, assign=True)
    except RuntimeError as error:
        raise QuantError(" ".join(str(error).split())[:500]) from None


def load_grids(path: Path, config: Aquila2Config, dtype: torch.dtype, device: torch.device) -> Aquila2ForCausalLM:
    """Loads a checkpoint of GPTQ or AWQ.

    Args:
        path: the folder.
        config: with what it says about its quantization.
        dtype: of what is not quantized, and of the products.
        device: where it goes.

    Returns:
        The model in evaluation mode. Four bits in bfloat16 on a CPU run on torch's kernel for them.

    Raises:
        QuantError: a layout that is not known here, or tensors that do not fit it.
        WeightsError: files are missing or damaged.
    """
    facts = config.quantization_config
    plain = Aquila2Config.from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    plain.attn_backend = config.attn_backend
    bits, group = _bits_and_group(facts, path)
    with torch.device("meta"), no_init_weights():
        model = with_grids(Aquila2ForCausalLM(plain).to(dtype), bits, group)
    try:
        with ExitStack() as stack:
            tensors = _as_gptq_v2(open_checkpoint(path, config, stack).readers, facts, bits)
        if plain.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        fill(model, tensors, dtype, device)
        _check_groups(model)
    except QuantError as error:
        raise QuantError(f"{path}: {error}") from None
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if Int4Linear.fits(module):
            model.set_submodule(name, Int4Linear.of_grid(module))
            model.save_pretrained = _refuse_to_save
    # Not what the file said: the zeros and the order of AWQ's codes are others now, and saving writes them.
    model.config.dtype, model.config.quantization_config = dtype, _grid_facts(bits, group, facts.get("desc_act", False))
    model.generation_config = stored_generation_config(path, plain)
    return model.eval().requires_grad_(False)


def load_gguf_codes(path: Path, config: Aquila2Config, device: torch.device) -> Aquila2ForCausalLM:
    """Loads a GGUF file and leaves its four-bit codes what they are: nothing is rounded twice, or made larger.

    Args:
        path: a file whose linear maps are in Q4_0 or Q4_1.
        config: the model's shape.
        device: a CPU.

    Returns:
        The model in evaluation mode, in bfloat16.

    Raises:
        QuantError: not such a file, or no kernel for it here.
    """
    if not path.is_file() or device.type != "cpu" or not kernel_works():
        raise QuantError('quantization "gguf" is for a GGUF file, on a CPU for which torch has the four-bit kernel')
    dtype = torch.bfloat16
    with torch.device("meta"), no_init_weights():
        model = Aquila2ForCausalLM(config)
    with ExitStack() as stack:
        file, checkpoint = stack.enter_context(GGUFFile(path)), open_checkpoint(path, config, stack)
        for stored in file.tensors:
            if (name := checkpoint.layout.target(stored)) is None:
                continue
            stem = name.removesuffix(".weight")
            if stem.endswith(LINEARS):
                model.set_submodule(stem, _kept_codes(file, stored, stem, model.get_submodule(stem), config))
            else:
                tensor = torch.from_numpy(file.tensor(stored)).to(dtype)
                model.get_submodule(stem).weight = nn.Parameter(tensor)
    model.tie_weights()
    model.save_pretrained = _refuse_to_save
    model.config.dtype, model.generation_config = dtype, stored_generation_config(path, config)
    return model.eval().requires_grad_(False)


def _kept_codes(file: GGUFFile, stored: str, stem: str, linear: nn.Linear, config: Aquila2Config) -> Int4Linear:
    if (found := file.codes(stored)) is None:
        raise QuantError(f"{file.path}: tensor {stored} is not in Q4_0 or Q4_1")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stem.rpartition(".")[2])
    parts = (torch.from_numpy(part) for part in found)
    linear.to(torch.bfloat16)
    return Int4Linear(linear, *(half_rotation(part, heads) if heads else part for part in parts))


def _check_groups(model: nn.Module) -> None:
    """An index that leads out of the scales would only be noticed by a product, and not by name."""
    for name, module in model.named_modules():
        if not isinstance(module, GridLinear):
            continue
        first, last = (int(x) for x in module.g_idx.aminmax())
        if first < 0 or last >= len(module.scales):
            wrong = first if first < 0 else last
            raise QuantError(f"{name}.g_idx has a group {wrong}, and there are scales for {len(module.scales)}")


def _bits_and_group(facts: dict[str, Any], path: Path) -> tuple[int, int]:
    """Both as the configuration says them, if it is one that can be read.

    Raises:
        QuantError: it is not; the file is named.
    """
    bits, group = facts.get("bits", facts.get("w_bit")), facts.get("group_size", facts.get("q_group_size"))
    said = f"{path / 'config.json'}: quantization_config has"
    is_awq = facts["quant_method"] == "awq"
    version, layout = str(facts.get("version", "gemm")).lower(), str(facts.get("checkpoint_format", "gptq")).lower()
    if is_awq and (bits != 4 or version != "gemm"):
        raise QuantError(f"{said} AWQ with bits {bits!r} and version {version!r}; 4 bits and GEMM can be read")
    if not is_awq and layout not in ("gptq", "gptq_v2"):
        raise QuantError(f"{said} checkpoint_format {layout!r}; 'gptq' and 'gptq_v2' can be read")
    if bits not in (2, 3, 4, 8) or not isinstance(group, int) or group == 0 or group < -1:
        raise QuantError(
            f"{said} bits {bits!r} and group_size {group!r}; 2, 3, 4 or 8 bits can be read, in groups of a whole "
            "number of columns or, with -1, of a row"
        )
    return bits, group


def _as_gptq_v2(readers: dict[str, Any], facts: dict[str, Any], bits: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, those of grids in the layout that `GridLinear` has."""
    tensors = {name: read() for name, read in readers.items() if not name.endswith("rotary_emb.inv_freq")}
    biases = [name for name in tensors if name.endswith(".bias")]
    for name in biases:  # some versions of AutoGPTQ store a bias of zeros where there is none
        if tensors.pop(name).any():
            raise QuantError(f"{name} is not zero, and an Aquila2 model has no bias")
    for stem in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        if missing := [name for name in ("qzeros", "scales") if f"{stem}.{name}" not in tensors]:
            raise QuantError(f"{stem}.{missing[0]} is missing")
        try:
            _make_gptq_v2(stem, tensors, facts, bits)
        except RuntimeError as error:  # words of torch about shapes, which do not say whose
            raise QuantError(f"{stem}: qweight and qzeros are no words of {bits} bits: {error}") from None
    return tensors


def _make_gptq_v2(stem: str, tensors: dict[str, Tensor], facts: dict[str, Any], bits: int) -> None:
    if facts["quant_method"] == "awq":
        tensors |= _from_awq(stem, tensors)
    elif str(facts.get("checkpoint_format", "gptq")).lower() == "gptq":  # the first version stores zeros less one
        tensors[f"{stem}.qzeros"] = _plus_one(tensors[f"{stem}.qzeros"], bits)
    tensors.setdefault(f"{stem}.g_idx", _in_order(facts, len(tensors[f"{stem}.qweight"]) * 32 // bits))


def _plus_one(words: Tensor, bits: int) -> Tensor:
    """One more in each code of (groups, words), as GPTQModel adds it.

    It takes the one from whole words, so that a zero of 0 borrows from its neighbour, and gives it back in the same
    way; only where three bits lie across words it does so code by code.
    """
    if bits == 3:
        zeros = unpack(words.t(), bits) + 1 & 2**bits - 1
        return pack(zeros, bits).t().contiguous()
    ones = sum(1 << at for at in range(0, 32, bits))
    return (words.long() + ones & 0xFFFFFFFF).to(torch.int32)


def _in_order(facts: dict[str, Any], width: int) -> Tensor:
    """The group of each input where a checkpoint does not say: one after the other."""
    group = facts.get("group_size", facts.get("q_group_size"))
    return (torch.arange(width) // (group if group > 0 else width)).to(torch.int32)


def _from_awq(stem: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    codes, zeros = (unpack_awq(tensors[f"{stem}.{name}"]) for name in ("qweight", "qzeros"))
    return {
        f"{stem}.qweight": pack(codes, 4),
        f"{stem}.qzeros": pack(zeros.t().contiguous(), 4).t().contiguous(),
    }
