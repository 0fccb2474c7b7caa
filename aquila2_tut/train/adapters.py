"""Adapters on disk, as peft writes and reads them: what was trained here loads there, and the other way round.

A folder holds `adapter_config.json`, which names the model that the adapter is for, and `adapter_model.safetensors`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..model.weights import load_model
from ..tokenizer import load_tokenizer
from .checkpoints import written_whole
from .errors import TrainError
from .lora import add_lora, linears, lora_layers, merge_all

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft wraps a model twice
_ENDINGS = (".lora_A.weight", ".lora_B.weight")
# What peft's LoRA may say without being anything else than `LoRALinear`: names of no consequence, of fields and values.
_HARMLESS = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode", "runtime_config"),
    *("base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    # The tensors' names say which maps were adapted.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size"),  # without the configuration that they belong to
}
_HARMLESS_VALUES = {"bias": "none", "init_lora_weights": True}  # other beginnings may change the base as well


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
    folder, config = Path(folder), _config_of(model)
    folder.mkdir(parents=True, exist_ok=True)
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
    config = check_fit(model, folder)
    _refuse_other_kinds(config, folder)
    tensors = _tensors(folder / WEIGHTS, config["r"])
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    add_lora(model, names, config["r"], config["lora_alpha"], config["lora_dropout"], bool(config.get("use_rslora")))
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)
    return names


def check_fit(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Refuses an adapter that was trained beside another model, whether peft is to load it or `load_lora`.

    peft looks at no names, and leaves out without a word what it finds no place for.

    Args:
        model: without adapters.
        folder: of the adapter.

    Returns:
        What adapter_config.json says.

    Raises:
        TrainError: no adapter, a damaged one, another name (with both), or other maps or sizes than the model's.
    """
    config = read_adapter(folder)
    check_base(config, base_name(model), folder)
    modules = dict(model.named_modules())
    for name, shape in _shapes(folder / WEIGHTS).items():
        owner, _, part = name.rpartition(".")
        if owner not in modules:
            raise TrainError(f"{folder}: {name} is for a linear map that this model does not have")
        side, size = ("in_features", shape[-1]) if part == "lora_A" else ("out_features", shape[0])
        wanted = getattr(modules[owner], side, size)
        if size != wanted:
            raise TrainError(f"{folder}: {name} has shape {shape}; this model's map has {wanted} {side}")
    return config


def read_adapter(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says.

    Raises:
        TrainError: there is none, it is no JSON, or it does not tell of a LoRA.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise TrainError(f"{folder} is no adapter: there is no {CONFIG} in it") from None
    except ValueError as error:
        raise TrainError(f"{file}: no JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise TrainError(f"{file} does not tell of a LoRA: load this adapter with peft")
    config.setdefault("lora_dropout", 0.0)
    if wrong := [name for name in ("r", "lora_alpha", "lora_dropout") if not isinstance(config.get(name), int | float)]:
        raise TrainError(f"{file}: {', '.join(wrong)} should be a number")
    return config


def _refuse_other_kinds(config: dict[str, Any], folder: Path) -> None:
    """What peft can do beyond `LoRALinear` would be lost without a word."""
    more = [name for name, value in config.items() if value and name not in _HARMLESS]
    if more := [name for name in more if config[name] != _HARMLESS_VALUES.get(name)]:
        raise TrainError(
            f"{folder / CONFIG}: {', '.join(more)}: LoRALinear has nothing of the kind; load this adapter with peft"
        )


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
        raise TrainError(
            f"{place} is an adapter for {trained}, and this model is {name}: load {trained} under it. "
            f"If the two are the same, correct base_model_name_or_path in {CONFIG}"
        )


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _plain_name(key: str) -> str:
    """Of a stored tensor, the name of the parameter in `LoRALinear`."""
    return key.removeprefix(_PREFIX).removesuffix(".weight")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The sizes of A and B of linear maps; nothing where peft wrote an older kind of file."""
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as stored:
            keys = [key for key in stored.keys() if key.endswith(_ENDINGS)]  # noqa: SIM118
            return {_plain_name(key): tuple(stored.get_slice(key).get_shape()) for key in keys}
    except SafetensorError as error:
        raise TrainError(f"{file}: damaged: {error}") from None


def _tensors(file: Path, r: int) -> dict[str, Tensor]:
    """The adapter's tensors, by the names of `LoRALinear`'s parameters: A and B of each map, of rank r."""
    if not file.is_file():
        raise TrainError(f"{file} is missing")
    stored = load_file(file)
    for key, tensor in stored.items():
        if not key.endswith(_ENDINGS):
            raise TrainError(f"{file}: {key} is neither A nor B of a linear map; load this adapter with peft")
        if key.replace(*_ENDINGS) not in stored or key.replace(*_ENDINGS[::-1]) not in stored:
            raise TrainError(f"{file}: {key} is there without its counterpart")
        if tensor.shape[key.endswith(_ENDINGS[1])] != r:
            raise TrainError(f"{file}: {key} has shape {tuple(tensor.shape)}, {CONFIG} says r={r}")
    return {_plain_name(key): tensor for key, tensor in stored.items()}


def merge_checkpoint(base: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Writes a checkpoint with an adapter folded in, which needs neither peft nor this package to load.

    An adapter from Q-LoRA was trained beside weights in four bits. Here it is added to the weights as they were before
    that, the usual way; `load_lora` and `merge_all` on a 4-bit model add it to those that it has seen.

    Args:
        base: folder of the model that the adapter is for; its name tells the tokenizer where none is in it.
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
    own = any((base / file).is_file() for file in ("tokenizer.json", "vocab.json"))
    tokenizer = load_tokenizer(base if own else model.aquila_name)
    with written_whole(out) as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        if (base / "chat_template.jinja").is_file():
            shutil.copy(base / "chat_template.jinja", place)
    return out
