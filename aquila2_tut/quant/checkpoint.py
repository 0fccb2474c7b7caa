"""A checkpoint into few bits, read, rounded and written layer by layer: it never lies in memory as a whole.

What is written, other programs read as well: NF4 and int8 in bitsandbytes' names, grids in those of GPTQ (AWQ's
stretches are already in the weights before them). A run that was cut off goes on with the layers that it has not
written yet.

Source: the tensors that transformers 5 reads with bitsandbytes, and GPTQModel's "gptq_v2" layout, whose zeros are
stored as they are.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from ..model.layers import DecoderLayer
from ..model.weights import Checkpoint, WeightsError, open_checkpoint, read_parameters, stored_generation_config
from .errors import QuantError
from .methods import Scheme, check_text, embedded, pass_on, quantize_layer
from .stored import fill, half_type, stored_as, stored_config, with_grids

_SETTINGS = "settings.json"
_REST = "model-rest.safetensors"


def quantize_checkpoint(
    source: Path,
    out: Path,
    scheme: Scheme,
    ids: Tensor | None = None,
    device: torch.device | str = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True,
) -> Path:
    """Writes a quantized copy of a checkpoint.

    Args:
        source: a checkpoint folder or a GGUF file.
        out: the folder to make. Until it is whole, its files are in a hidden folder beside it.
        scheme: how.
        ids: (rows, T) token ids of real text, for the methods that calibrate.
        device: what computes.
        tokenizer: written beside the weights, so that the folder is all that is needed.
        progress: show a bar.

    Returns:
        `out`.

    Raises:
        QuantError: `out` is there, an unfinished run there had other settings, a method that calibrates has no ids,
            or weights cannot be rounded.
        WeightsError: the checkpoint is incomplete or damaged.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuantError(f"{out} is there already: remove it, or name another folder")
    check_text(scheme, ids)  # before there is a folder that says with what it was begun
    with ExitStack() as stack:
        checkpoint = open_checkpoint(source, None, stack)
        if getattr(checkpoint.config, "quantization_config", None):
            raise QuantError(f"{source} is quantized already: begin with the model as it was")
        scheme = scheme.fitted(checkpoint.config)
        place = _claim(out, {"source": str(source.resolve()), **asdict(scheme), "text": _fingerprint(ids)})
        run = _Run(checkpoint, scheme, place, torch.device(device))
        run.write_rest()
        run.write_layers(ids, progress)
    config = stored_config(run.checkpoint.config, scheme)
    _write_index(place, config.num_hidden_layers)
    config.save_pretrained(place)
    stored_generation_config(source, config).save_pretrained(place)
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
    if out.exists():
        out.rmdir()
    os.replace(place, out)
    (out / _SETTINGS).unlink()  # not before: without it nobody would know whose the layers in `place` are
    return out


def _claim(out: Path, settings: dict[str, Any]) -> Path:
    """The folder in which the run works, if it is new or was begun with the same settings."""
    place = out.parent / f".{out.name}.part"
    place.mkdir(parents=True, exist_ok=True)
    file = place / _SETTINGS
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if other := [name for name in settings if before.get(name) != settings[name]]:
            raise QuantError(f"{place} holds an unfinished run with another {' and '.join(other)}: remove it to begin")
        return place
    fresh = file.with_suffix(".writing")
    fresh.write_text(json.dumps(settings), encoding="utf-8")
    os.replace(fresh, file)
    return place


def _fingerprint(ids: Tensor | None) -> str | None:
    return None if ids is None else sha256(ids.cpu().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class _Run:
    """One run over a checkpoint.

    Args:
        checkpoint: an open one.
        scheme: how.
        place: where the shards go.
        device: what computes.
    """

    checkpoint: Checkpoint
    scheme: Scheme
    place: Path
    device: torch.device

    def write_rest(self) -> None:
        """Embedding, last norm and head, which stay numbers."""
        if (self.place / _REST).is_file():
            return
        kept = half_type(self.checkpoint.config)
        rest = {
            name: tensor.to(kept).contiguous()
            for prefix in ("model.embed_tokens.", "model.norm.", "lm_head.")
            for name, tensor in read_parameters(self.checkpoint, prefix)
        }
        wanted = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        if self.checkpoint.config.tie_word_embeddings:
            wanted.remove("lm_head.weight")
        self._refuse_missing(wanted - set(rest))
        _save(rest, self.place / _REST)

    def _refuse_missing(self, names: set[str]) -> None:
        if names:
            raise WeightsError(f"{self.checkpoint.path}: {min(names)} is missing")

    def write_layers(self, ids: Tensor | None, progress: bool) -> None:
        """One shard after the other; those that are there are only run through."""
        config = self.checkpoint.config
        hidden, rotary = embedded(self._embedding() if ids is not None else None, config, self.scheme, ids)
        for i in tqdm(range(config.num_hidden_layers), desc=self.scheme.method, unit="layer", disable=not progress):
            shard = self.place / shard_name(i, config.num_hidden_layers)
            if not shard.is_file():
                layer = self._read_layer(i)
                quantize_layer(layer, self.scheme, hidden, rotary)
                _save(stored_as(layer, f"model.layers.{i}.", half_type(config)), shard)
            if hidden:  # through what was written, as a run that goes on later does: both end in the same bits
                self._pass_through(i, load_file(shard), hidden, rotary)

    def _embedding(self) -> nn.Embedding:
        weight = load_file(self.place / _REST)["model.embed_tokens.weight"].to(self.device, self._dtype)
        return nn.Embedding.from_pretrained(weight)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else half_type(self.checkpoint.config)

    def _read_layer(self, i: int) -> DecoderLayer:
        prefix = f"model.layers.{i}."
        with torch.device("meta"), no_init_weights():
            layer = DecoderLayer(self.checkpoint.config, i)
        read = {name.removeprefix(prefix): t for name, t in read_parameters(self.checkpoint, prefix)}
        self._refuse_missing({prefix + name for name in set(layer.state_dict()) - set(read)})
        read = {name: tensor.to(self.device, self._dtype) for name, tensor in read.items()}
        layer.load_state_dict(read, assign=True)
        return layer.eval().requires_grad_(False)

    def _pass_through(self, i: int, shard: dict[str, Tensor], hidden: list[Tensor], rotary: Any) -> None:
        """The hidden states through a layer as it is in its file."""
        prefix = f"model.layers.{i}."
        with torch.device("meta"), no_init_weights():
            layer = with_grids(DecoderLayer(self.checkpoint.config, i), self.scheme.bits, self.scheme.group)
        fill(layer, {name.removeprefix(prefix): t for name, t in shard.items()}, self._dtype, self.device)
        pass_on(layer, hidden, rotary)


def shard_name(layer: int, layers: int) -> str:
    """The file of one layer."""
    return f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """All of it or nothing: a file that is there is whole."""
    fresh = file.with_suffix(".writing")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, fresh, {"format": "pt"})
    os.replace(fresh, file)


def _write_index(place: Path, layers: int) -> None:
    """Which file holds which tensor, as Hugging Face's libraries look for it."""
    where, total = {}, 0
    for name in (_REST, *(shard_name(i, layers) for i in range(layers))):
        with safe_open(place / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                where[key] = name
        total += (place / name).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (place / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
