"""Quantization by the libraries that others use: bitsandbytes and torchao, through transformers' own loading.

`CONFIGS` gives their settings by name; any `quantization_config` of transformers does as well. Embedding, head and
norms stay numbers unless the settings say otherwise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils import logging

from ..config import Aquila2Config
from ..model import Aquila2ForCausalLM
from ..model.weights import load_model, open_checkpoint
from .errors import QuantError
from .grid import fitting_group
from .sizes import input_widths, predicted_bytes

_INSTALL = {
    "bitsandbytes": "pip install 'aquila2-tut[quant]'",
    "torchao": "pip install 'aquila2-tut[quant]'",
    "accelerate": "pip install 'aquila2-tut[train]'",
}

_INT4_GROUP = 32  # columns, the smallest group of torchao's kernels


def nf4_config(compute_dtype: torch.dtype, double_quant: bool = True) -> BitsAndBytesConfig:
    """NF4 with doubly quantized scales, which Q-LoRA adapters are trained on.

    Args:
        compute_dtype: of the products.
        double_quant: store the scales in 8 bits.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _torchao_int8(device: torch.device, group: int) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_int4(device: torch.device, group: int) -> TorchAoConfig:
    """On a CPU torchao has its four bits among the prototypes; on CUDA in tiles for the tensor cores."""
    if group < _INT4_GROUP:
        raise QuantError(
            f"torchao's int4 kernels share a scale among {_INT4_GROUP} columns or more, and the widths of this model "
            f"divide into groups of {group}: take 'torchao-int8' or 'nf4'"
        )
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=group))
    from torchao.quantization import Int4WeightOnlyConfig

    return TorchAoConfig(Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d"))


CONFIGS: dict[str, tuple[str, Callable[[torch.dtype, torch.device, int], Any]]] = {
    "nf4": ("bitsandbytes", lambda dtype, device, group: nf4_config(dtype)),
    "nf4-single": ("bitsandbytes", lambda dtype, device, group: nf4_config(dtype, double_quant=False)),
    "int8": ("bitsandbytes", lambda dtype, device, group: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao-int8": ("torchao", lambda dtype, device, group: _torchao_int8(device, group)),
    "torchao-int4": ("torchao", lambda dtype, device, group: _torchao_int4(device, group)),
}


def named_config(name: str, config: Aquila2Config, dtype: torch.dtype, device: torch.device) -> Any:
    """The settings that a name in `CONFIGS` stands for.

    Args:
        name: of the settings.
        config: of the model that they are for.
        dtype: of the products.
        device: that they run on.

    Raises:
        QuantError: there is no such name, the library is missing, or the device cannot run it.
    """
    if name not in CONFIGS:
        known = ", ".join([*CONFIGS, "gguf"])
        raise QuantError(f"quantization {name!r} is not one of {known}, nor a configuration of transformers")
    library, make = CONFIGS[name]
    need(library)
    return make(dtype, device, fitting_group(input_widths(config)))


def named_bytes(name: str, config: Aquila2Config) -> int:
    """The bytes that a model takes with the settings of a name, see `predicted_bytes`.

    Args:
        name: of the settings; of an unknown one nothing is known, and 0 is returned.
        config: the model's shape.
    """
    form = {"nf4": "nf4-dq", "nf4-single": "nf4"}.get(name, name)
    return predicted_bytes(config, form).total if name in CONFIGS else 0


def need(library: str) -> None:
    """Refuses to begin without a library.

    Raises:
        QuantError: it is not installed; the message says how to.
    """
    if importlib.util.find_spec(library) is None:
        raise QuantError(f"this needs {library}, which is not installed: {_INSTALL[library]}")


def library_of(settings: Any) -> str | None:
    """The library that settings are for: an object of transformers, or the dictionary in a config.json."""
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if method is None and isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"  # the first configurations of it, from before there were others
    return None if method is None else str(getattr(method, "value", method))


def check_device(settings: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses what a device cannot run, before anything is loaded.

    Raises:
        QuantError: says what the device lacks, and what it can run.
    """
    library = library_of(settings)
    if device.type == "mps" and library in ("bitsandbytes", "torchao"):
        raise QuantError(f"{library} has no kernels for Apple's GPUs: device='cpu', or a GPTQ checkpoint")
    if library != "torchao" or not _has_int4(settings):
        return
    if dtype != torch.bfloat16:
        raise QuantError(f"torchao's int4 kernels are for bfloat16, not {dtype}: torch_dtype='bfloat16'")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise QuantError("torchao's int4 kernels need a GPU of compute capability 8.0 (A100) or later: take 'nf4'")


def _has_int4(settings: Any) -> bool:
    return "int4" in str(settings.get("quant_type") if isinstance(settings, dict) else settings.quant_type).lower()


def load_with_library(
    path: Path, config: Aquila2Config, settings: Any, dtype: torch.dtype, device: torch.device
) -> Aquila2ForCausalLM:
    """Loads a model with its linear maps quantized by a library.

    Args:
        path: a checkpoint folder, quantized by the library already or not; or a GGUF file, which is read as numbers
            first.
        config: the model's shape.
        settings: a quantization configuration of transformers; None for a checkpoint that has its own.
        dtype: of what is not quantized.
        device: where it goes.

    Raises:
        QuantError: a library or a tensor is missing, or the device cannot run it.
    """
    library = library_of(settings or config.quantization_config)
    if library is None:
        raise QuantError(f"{path}: the quantization_config has no quant_method, such as 'bitsandbytes'")
    check_device(settings or config.quantization_config, dtype, device)
    for needed in {library, "accelerate"} & set(_INSTALL):
        need(needed)
    where = {"config": config, "dtype": dtype, "device_map": {"": device}}
    if settings is not None:
        where["quantization_config"] = settings
    if path.is_dir() and _is_standard(path, config):
        model, missing = _quietly(path, **where)
    else:
        model, missing = _quietly(None, state_dict=dict(load_model(path, config, dtype).state_dict()), **where)
    if missing:  # transformers makes numbers up for them, and says so in a warning
        raise QuantError(f"{path}: {len(missing)} tensors of {library} are missing, the first is {min(missing)}")
    return _made_safe(model, library, device)


def _made_safe(model: Aquila2ForCausalLM, library: str | None, device: torch.device) -> Aquila2ForCausalLM:
    """What the libraries cannot run or save of a model on a CPU they say late, or not at all."""
    if device.type != "cpu":
        return model
    if library == "torchao" and _has_int4(model.config.quantization_config):
        model.save_pretrained = _refuse_to_save
    for module in model.modules() if library == "bitsandbytes" else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Its other order of the codes is for whole tiles, which it does not check.
            module.support_avx512bf16_for_cpu &= module.in_features % 64 == 0 and module.out_features % 32 == 0
            module.register_state_dict_pre_hook(_scales_in_order)
    return model


def _refuse_to_save(*arguments: Any, **options: Any) -> None:
    raise QuantError(
        "torchao cannot save its four-bit weights of a CPU: `aquila2-tut quantize` writes four bits that can be loaded"
    )


def _scales_in_order(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """On some CPUs bitsandbytes turns the scales before a product, and back for saving only where they are nested."""
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False) and not state.original_nested and state.absmax.ndim == 2:
        state.absmax = state.absmax.t().reshape(-1).float()


def _is_standard(path: Path, config: Aquila2Config) -> bool:
    """Whether transformers knows the names of the tensors itself, or quantized ones that are there already."""
    if getattr(config, "quantization_config", None):
        return True
    with ExitStack() as stack:
        return open_checkpoint(path, config, stack).layout.name == "huggingface"


def _quietly(*arguments: Any, **options: Any) -> tuple[Aquila2ForCausalLM, set[str]]:
    """Loads without the bar of transformers; gives the model, and the parameters that it was not given."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, found = Aquila2ForCausalLM.from_pretrained(*arguments, output_loading_info=True, **options)
        return model, set(found["missing_keys"])
    finally:
        if shown:
            logging.enable_progress_bar()
