"""Fills a model from a checkpoint, tensor by tensor: host memory holds the model and one tensor, never two models.

Reads Hugging Face folders (safetensors, or the older .bin files through torch's restricted reader), GGUF files,
FlagAI-native v1 folders and Megatron checkpoints; `layouts` translates their names.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from ..config import Aquila2Config
from ..gguf import GGUFFile
from .layouts import Layout, config_from_gguf, config_from_native, find_layout
from .modeling import Aquila2ForCausalLM

ARCHITECTURES = ("AquilaModel", "AquilaForCausalLM", "Aquila2ForCausalLM", "LlamaForCausalLM")


class WeightsError(ValueError):
    """A checkpoint that is incomplete, damaged, or does not fit its configuration."""


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Args:
        path: the file or folder, for messages.
        config: the model's shape.
        readers: tensor name -> a function that reads that tensor.
    """

    path: Path
    config: Aquila2Config
    readers: dict[str, Callable[[], Tensor]]

    @functools.cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Every parameter that the model needs of the checkpoint, and its shape; a tied head is none."""
        with torch.device("meta"), no_init_weights():
            model = Aquila2ForCausalLM(self.config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if self.config.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        return shapes

    @property
    def layout(self) -> Layout:
        """How the tensors are named and arranged.

        Raises:
            WeightsError: in no way that is known here.
        """
        if (found := find_layout(self.readers)) is None:
            raise WeightsError(f"{self.path}: tensor names such as {sorted(self.readers)[:3]} are of no known layout")
        return found


def load_model(
    path: str | Path,
    config: Aquila2Config | None = None,
    torch_dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    interleaved: bool | None = None,
) -> Aquila2ForCausalLM:
    """Builds a model and fills it, ready for inference.

    Args:
        path: a .gguf file, or a folder with config.json and weights.
        config: replaces the checkpoint's own.
        torch_dtype: type of the parameters; "auto" keeps the type named in the configuration.
        device: where the parameters go, each as soon as it is read.
        interleaved: whether rotary pairs are neighbours in the stored rows; the layout's habit when not given.
            (FlagScale's 7B is a Megatron checkpoint with interleaved rows.)

    Returns:
        The model in eval mode.

    Raises:
        WeightsError: a file is missing or damaged, a tensor is missing, unknown, or of another shape.
        GGUFError, ConfigError: the file or its configuration cannot be read.
    """
    with ExitStack() as stack:
        checkpoint = open_checkpoint(Path(path), config, stack)
        dtype = _resolve_dtype(torch_dtype, checkpoint.config)
        with torch.device("meta"), no_init_weights():
            model = Aquila2ForCausalLM(checkpoint.config)
        layout = checkpoint.layout
        if interleaved is not None:
            layout = Layout(layout.name, layout.patterns, interleaved, layout.trims_vocabulary, layout.ignored)
        _fill(model, checkpoint, layout, dtype, torch.device(device))
    model.config.dtype = dtype
    model.generation_config = stored_generation_config(Path(path), checkpoint.config)
    return model.eval()


def _resolve_dtype(wanted: torch.dtype | str, config: Aquila2Config) -> torch.dtype:
    found = (config.dtype or torch.float32) if wanted == "auto" else wanted
    found = getattr(torch, found, None) if isinstance(found, str) else found
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise WeightsError(f"torch_dtype: {wanted!r} is not a floating-point type such as 'bfloat16'")
    return found


def stored_generation_config(path: Path, config: Aquila2Config) -> GenerationConfig:
    """What a checkpoint folder says about generating, or what follows from the configuration."""
    if (path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(path)
    return GenerationConfig.from_model_config(config)


def open_checkpoint(path: Path, config: Aquila2Config | None, stack: ExitStack) -> Checkpoint:
    """Opens a file or folder without reading its tensors.

    Args:
        path: a .gguf file, or a folder.
        config: replaces the checkpoint's own.
        stack: closes the files.

    Raises:
        WeightsError: nothing there that can be read.
    """
    if path.is_file():
        return _open_gguf(path, config, stack)
    if not path.is_dir():
        raise WeightsError(f"{path}: no such file or folder")
    readers = _open_folder(path, stack)
    return Checkpoint(path, config or read_config(path), readers)


def read_config(folder: Path) -> Aquila2Config:
    """The configuration of a checkpoint folder, Hugging Face's or FlagAI's own.

    Raises:
        WeightsError: no config.json, or one of another architecture.
        ConfigError: numbers that contradict each other.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise WeightsError(f"{folder}: no config.json, so the model's shape is unknown")
    stored = Aquila2Config._dict_from_json_file(file)
    if "dim" in stored and "n_heads" in stored:
        return config_from_native(stored)
    architectures = stored.get("architectures") or ["AquilaForCausalLM"]
    if not set(architectures) & set(ARCHITECTURES):
        raise WeightsError(f"{file}: architectures {architectures}; this loader knows {', '.join(ARCHITECTURES)}")
    kept = {k: v for k, v in stored.items() if k not in ("auto_map", "model_type", "architectures", "pretraining_tp")}
    return Aquila2Config(**kept)


def _open_gguf(path: Path, config: Aquila2Config | None, stack: ExitStack) -> Checkpoint:
    file = stack.enter_context(GGUFFile(path))

    def reader(name: str) -> Tensor:
        tensor = torch.empty(file.tensors[name].shape)
        file.tensor(name, out=tensor.numpy())
        return tensor

    if config is None:
        try:
            config = config_from_gguf(file.metadata, tied="output.weight" not in file.tensors)
        except KeyError as error:
            raise WeightsError(f"{path}: the header has no {error}, so the model's shape is unknown") from None
    return Checkpoint(path, config, {name: lambda name=name: reader(name) for name in file.tensors})


def _open_folder(folder: Path, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    shards = _shards(folder)
    readers: dict[str, Callable[[], Tensor]] = {}
    for shard in shards:
        readers.update(_open_safetensors(shard, stack) if shard.suffix == ".safetensors" else _open_bin(shard))
    return readers


def _shards(folder: Path) -> list[Path]:
    for kind in ("safetensors", "bin"):
        stem = "model" if kind == "safetensors" else "pytorch_model"
        if (index := folder / f"{stem}.{kind}.index.json").is_file():
            return _indexed_shards(index)
        if found := sorted(folder.glob(f"*.{kind}")):
            return found
    raise WeightsError(f"{folder}: no .safetensors and no .bin file")


def _indexed_shards(index: Path) -> list[Path]:
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for name in set(names.values()):
        if Path(name).name != name:
            raise WeightsError(f"{index}: weight_map names {name!r}, which is not a plain file name")
    shards = [index.parent / name for name in sorted(set(names.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        lost = sum(shard in missing for shard in names.values())
        raise WeightsError(
            f"{index.parent}: {len(missing)} of {len(shards)} shards missing ({', '.join(missing)}), "
            f"and with them {lost} tensors. Fetch the checkpoint again: a finished shard is kept."
        )
    return shards


def _open_safetensors(path: Path, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        raise WeightsError(f"{path}: damaged or cut short ({error}). Fetch the file again.") from error
    return {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _open_bin(path: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise WeightsError(f"{path}: not a readable file of plain tensors ({type(error).__name__}: {error})") from error
    stored = stored.get("module", stored.get("model", stored))
    return {name: lambda t=tensor: t for name, tensor in _flat(stored) if isinstance(tensor, Tensor)}


def _flat(stored: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Megatron saves dictionaries of dictionaries; joins their keys with dots."""
    for key, value in stored.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fill(model: nn.Module, checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
    filled = set()
    for name, tensor in read_parameters(checkpoint, layout=layout):
        # Of a part of a larger tensor only a copy is kept, or the whole would stay alive with it.
        tensor = tensor.to(device, dtype, copy=tensor._is_view() and not tensor.is_contiguous())
        _assign(model, name, tensor.contiguous())
        filled.add(name)
    model.tie_weights()
    wanted = checkpoint.shapes
    if missing := sorted(set(wanted) - filled):
        raise WeightsError(
            f"{checkpoint.path}: {len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]}"
        )


def read_parameters(
    checkpoint: Checkpoint, prefix: str = "", layout: Layout | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Reads those parameters of a checkpoint whose names begin in some way, one by one.

    Args:
        checkpoint: an open one.
        prefix: of the names in `Aquila2ForCausalLM`, such as "model.layers.0.".
        layout: replaces the checkpoint's own.

    Yields:
        (name, tensor), as stored.

    Raises:
        WeightsError: a tensor that has no place in the model, or another shape than it needs.
    """
    layout = layout or checkpoint.layout
    for stored, read in checkpoint.readers.items():
        target = _target(checkpoint, layout, stored)
        if target is None or not target.startswith(prefix):
            continue
        for name, tensor in _pieces(checkpoint, layout, stored, target, read):
            if name == "lm_head.weight" and name not in checkpoint.shapes:
                continue
            _check_fit(checkpoint, stored, name, tensor)
            yield name, tensor


def _target(checkpoint: Checkpoint, layout: Layout, stored_name: str) -> str | None:
    try:
        return layout.target(stored_name)
    except KeyError:
        raise WeightsError(
            f"{checkpoint.path}: tensor {stored_name} has no place in an Aquila2 model ({layout.name} layout)"
        ) from None


def _pieces(
    checkpoint: Checkpoint, layout: Layout, stored_name: str, target: str, read: Callable[[], Tensor]
) -> list[tuple[str, Tensor]]:
    try:
        return layout.pieces(target, read(), checkpoint.config)
    except RuntimeError as error:
        raise WeightsError(f"{checkpoint.path}: tensor {stored_name} does not fit the configuration: {error}") from None


def _check_fit(checkpoint: Checkpoint, stored: str, name: str, tensor: Tensor) -> None:
    wanted = checkpoint.shapes
    if name not in wanted:
        raise WeightsError(
            f"{checkpoint.path}: tensor {stored} would be {name}, which a model of "
            f"{checkpoint.config.num_hidden_layers} layers does not have"
        )
    if tensor.shape == wanted[name]:
        return
    hint = ""
    if name in ("model.embed_tokens.weight", "lm_head.weight") and tensor.shape[1:] == wanted[name][1:]:
        hint = f": the vocabulary has {tensor.shape[0]} entries, vocab_size says {wanted[name][0]}"
    raise WeightsError(
        f"{checkpoint.path}: tensor {stored} has shape {tuple(tensor.shape)}, {name} needs {tuple(wanted[name])}{hint}"
    )


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    if tensor.is_cpu and tensor.dtype == torch.float32 and _reads_better_by_columns(tensor):
        tensor = tensor.t().contiguous().t()
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def _reads_better_by_columns(weight: Tensor) -> bool:
    """Whether one token's product is quicker with the columns in one piece: so it is where outputs are few.

    `benchmarks/inference.py` shows what it gains. The values, the shape and the product stay what they were.
    """
    return weight.ndim == 2 and 512 <= weight.shape[0] <= weight.shape[1]
