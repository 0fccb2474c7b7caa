"""Adapters on disk, as peft writes and reads them: what was trained here loads there, and the other way round.

A folder holds `adapter_config.json`, which names the model that the adapter is for, and `adapter_model.safetensors`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..model.weights import load_model
from ..tokenizer import load_tokenizer
from .checkpoints import written_whole
from .errors import TrainError
from .lora import add_lora, linears, lora_layers, merge_all

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft wraps a model twice
# What else peft's LoRA can do, with the values that mean that it was not done.
_UNKNOWN_HERE = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
}


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors, (r, in) and (out, r), under peft's names."""
    return {
        f"{_PREFIX}{name}.{part}.weight": getattr(layer, part).detach()
        for name, layer in lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    }


def base_name(model: nn.Module) -> str | None:
    """The name of a model, as its adapters remember it; None if it has none."""
    return getattr(model, "aquila_name", None) or getattr(model, "name_or_path", None) or None


def save_lora(model: nn.Module, folder: str | Path) -> None:
    """Writes the adapters of a model, for peft or `load_lora`.

    Args:
        model: with adapters from `add_lora`.
        folder: made if it is not there.

    Raises:
        TrainError: a model without adapters, or with adapters of several kinds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _config_of(model)
    save_file({name: t.contiguous().cpu() for name, t in lora_state(model).items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config_of(model: nn.Module) -> dict[str, Any]:
    layers = lora_layers(model)
    kinds = {(layer.r, layer.alpha, layer.dropout, layer.rslora) for layer in layers.values()}
    if len(kinds) != 1:
        raise TrainError(f"one kind of adapter goes into a folder, and the model has {len(kinds)}")
    r, alpha, dropout, rslora = kinds.pop()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(model),
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "target_modules": _short_names(model, list(layers)),
        "bias": "none",
        "inference_mode": True,
    }


def _short_names(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names, if they mean the same maps; peft, like `add_lora`, takes either."""
    short = {name.rpartition(".")[2] for name in names}
    meant = [name for name in linears(model) if name.rpartition(".")[2] in short]
    return sorted(short if meant == names else names)


def load_lora(model: nn.Module, folder: str | Path) -> list[str]:
    """Puts an adapter that `save_lora` or peft wrote on a model. It can be trained further, or merged.

    Args:
        model: without adapters; changed in place.
        folder: holds adapter_config.json and adapter_model.safetensors.

    Returns:
        The names of the adapted maps.

    Raises:
        TrainError: no adapter, a damaged one, one for another model, or one of a kind that `LoRALinear` is not.
    """
    folder = Path(folder)
    config = read_adapter(folder)
    check_base(config, base_name(model), folder)
    tensors = _tensors(folder)
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    there = linears(model)
    _check_shapes(there, tensors, config["r"], folder)
    add_lora(model, names, config["r"], config["lora_alpha"], config["lora_dropout"], bool(config.get("use_rslora")))
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)
    return names


def read_adapter(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says.

    Raises:
        TrainError: there is none, it is no JSON, or it tells of something else than the LoRA that is here.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise TrainError(f"{folder} is no adapter: there is no {CONFIG} in it") from None
    except ValueError as error:
        raise TrainError(f"{file}: no JSON: {error}") from None
    lacking = [name for name in ("peft_type", "r", "lora_alpha", "lora_dropout") if name not in config]
    if lacking or config["peft_type"] != "LORA":
        what = f"has no {', '.join(lacking)}" if lacking else f"is {config['peft_type']}"
        raise TrainError(f"{file} {what}: this reads LoRA adapters, peft reads others")
    if more := [name for name, no in _UNKNOWN_HERE.items() if config.get(name) not in no]:
        raise TrainError(f"{file}: {', '.join(more)}: LoRALinear has nothing of the kind; load this adapter with peft")
    return config


def check_base(config: dict[str, Any], name: str | None, place: str | Path) -> None:
    """Refuses an adapter whose weights were trained beside another model.

    Only the last part of a name counts, as the same model is "BAAI/NAME" here and "some/folder/NAME" there.

    Args:
        config: of the adapter.
        name: of the model, None if it has none; then nothing can be said.
        place: the adapter, for the message.

    Raises:
        TrainError: with both names.
    """
    trained = config.get("base_model_name_or_path")
    if trained and name and _last_part(trained) != _last_part(name):
        raise TrainError(f"{place} is an adapter for {trained}, and this model is {name}: load {trained} under it")


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors, by the names of `LoRALinear`'s parameters."""
    file = folder / WEIGHTS
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise TrainError(f"{file}: missing or damaged: {error}") from None
    wrong = [key for key in stored if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if wrong or not stored:
        raise TrainError(f"{file}: {wrong[0] if wrong else 'it is empty'}; expected lora_A and lora_B of linear maps")
    return {key.removeprefix(_PREFIX).removesuffix(".weight"): tensor for key, tensor in stored.items()}


def _check_shapes(there: dict[str, nn.Module], tensors: dict[str, Tensor], r: int, folder: Path) -> None:
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        base = there.get(owner)
        if base is None:
            raise TrainError(f"{folder}: {name} is for a linear map that this model does not have")
        wanted = (r, base.in_features) if part == "lora_A" else (base.out_features, r)
        if tensor.shape != wanted:
            raise TrainError(f"{folder}: {name} has shape {tuple(tensor.shape)}, this model needs {wanted}")
        if f"{owner}.lora_A" not in tensors or f"{owner}.lora_B" not in tensors:
            raise TrainError(f"{folder}: of {owner} only {part} is there")


def merge_checkpoint(base: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Writes a checkpoint with an adapter folded in, which needs neither peft nor this package to load.

    An adapter from Q-LoRA was trained beside weights in four bits. Here it is added to the weights as they were before
    that, the usual way; `load_lora` and `merge_all` on a 4-bit model add it to those that it has seen.

    Args:
        base: folder of the model that the adapter is for.
        adapter: folder of the adapter.
        out: the folder to make, with the tokenizer beside the weights, and the chat template if the base has one.

    Returns:
        `out`.

    Raises:
        TrainError: `out` is there already, or the adapter does not fit; see `load_lora`.
        WeightsError, TokenizerError: the base is incomplete.
    """
    base, out = Path(base), Path(out)
    if out.exists():
        raise TrainError(f"{out} is there already: remove it, or name another folder")
    model = load_model(base)
    model.aquila_name = base.resolve().name
    load_lora(model, adapter)
    merge_all(model)
    tokenizer = load_tokenizer(base)
    with written_whole(out) as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        if (base / "chat_template.jinja").is_file():
            shutil.copy(base / "chat_template.jinja", place)
    return out
