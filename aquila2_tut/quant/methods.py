"""A model, decoder layer after decoder layer, into few bits: what the rounding sees, and in which order.

Methods that look at inputs see those that the layers before, already rounded, give: so each layer makes up for what
came before it too. Embedding, head and norms stay as they are; AWQ moves its stretches into what comes before each
linear map, so that the result needs nothing special to run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..model.layers import DecoderLayer
from ..model.rope import rotary_tables
from .errors import QuantError, refuse_non_finite
from .gptq import Calibration, Collector, awq_stretch, gptq
from .grid import GridLinear, fitting_group, round_to_nearest
from .int8 import Linear8bit
from .nf4 import Linear4bit
from .sizes import input_widths

if TYPE_CHECKING:
    from ..config import Aquila2Config
    from ..model import Aquila2ForCausalLM

METHODS = {"nf4": (4,), "int8": (8,), "rtn": (2, 3, 4, 8), "gptq": (2, 3, 4, 8), "awq": (2, 3, 4, 8)}
CALIBRATED = ("gptq", "awq")
# What comes before: the linear maps that have its outputs as their inputs.
_SHARED_INPUTS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
LINEARS = tuple(name for names in _SHARED_INPUTS.values() for name in names)


@dataclass(frozen=True)
class Scheme:
    """How weights become codes.

    Args:
        method: a key of `METHODS`.
        bits: of a code; what the method allows.
        group: columns that share a grid, for the methods with grids.
        double_quant: store NF4's scales in 8 bits.

    Raises:
        QuantError: a method or a number of bits that there is not.
    """

    method: str
    bits: int = 4
    group: int = 128
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise QuantError(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        if self.bits not in (possible := METHODS[self.method]):
            allowed = " or ".join(map(str, possible))
            raise QuantError(f"{self.method} has codes of {allowed} bits, not of {self.bits}")
        if self.group < 1:
            raise QuantError(f"a group has one column or more, not {self.group}")

    def fitted(self, config: Aquila2Config) -> Scheme:
        """The same, with a group that divides the inputs of every layer of a model."""
        return replace(self, group=fitting_group(input_widths(config), self.group))


def quantize_model(model: Aquila2ForCausalLM, scheme: Scheme, ids: Tensor | None = None) -> Aquila2ForCausalLM:
    """Replaces the linear maps of all decoder layers.

    Args:
        model: changed in place.
        scheme: how.
        ids: (rows, T) token ids of real text, for the methods that calibrate.

    Returns:
        The model.

    Raises:
        QuantError: a method that calibrates without ids, or weights that cannot be rounded.
    """
    scheme = scheme.fitted(model.config)
    hidden, rotary = embedded(model.model.embed_tokens, model.config, scheme, ids)
    for layer in model.model.layers:
        quantize_layer(layer, scheme, hidden, rotary)
        pass_on(layer, hidden, rotary)
    return model


def check_text(scheme: Scheme, ids: Tensor | None) -> None:
    """Refuses to begin without what a method looks at.

    Args:
        scheme: how weights become codes.
        ids: (rows, T) token ids of real text, for the methods that calibrate.

    Raises:
        QuantError: a method that calibrates without ids.
    """
    if scheme.method in CALIBRATED and (ids is None or not ids.numel()):
        raise QuantError(f"{scheme.method} looks at the inputs of the layers: give the token ids of some text")


@torch.no_grad()
def embedded(
    embedding: nn.Embedding, config: Aquila2Config, scheme: Scheme, ids: Tensor | None
) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
    """What the first layer is given: hidden states, row by row, (1, T, C) each, and the rotary tables.

    Raises:
        QuantError: a method that calibrates without ids.
    """
    if scheme.method not in CALIBRATED:
        return [], None
    check_text(scheme, ids)
    hidden = list(embedding(ids.to(embedding.weight.device)).split(1))
    positions = torch.arange(ids.shape[1], device=embedding.weight.device)[None]
    return hidden, rotary_tables(config, positions, embedding.weight.dtype)


@torch.no_grad()
def quantize_layer(
    layer: DecoderLayer, scheme: Scheme, hidden: list[Tensor], rotary: tuple[Tensor, Tensor] | None
) -> None:
    """Replaces the linear maps of a layer.

    Args:
        layer: changed in place.
        scheme: how.
        hidden: what the layer is given, (1, T, C) each. Empty where nothing calibrates.
        rotary: cosine and sine, see `DecoderLayer`.

    Raises:
        QuantError: a weight that is not finite or too large; its name is told.
    """
    _check_finite(layer)
    seen = look_at_inputs(layer, hidden, rotary) if hidden else {}
    if scheme.method == "awq":
        _stretch(layer, scheme, seen)
    for name in LINEARS:
        try:
            layer.set_submodule(name, _quantized(layer.get_submodule(name), scheme, seen.get(name)))
        except QuantError as error:
            raise QuantError(f"{_full_name(layer, name)}: {error}") from None


@torch.no_grad()
def pass_on(layer: DecoderLayer, hidden: list[Tensor], rotary: tuple[Tensor, Tensor] | None) -> None:
    """Moves the hidden states through a layer.

    Args:
        layer: as the next one is to see it.
        hidden: what the layer is given, (1, T, C) each; becomes what it gives.
        rotary: cosine and sine, see `DecoderLayer`.
    """
    for row, x in enumerate(hidden):
        hidden[row] = layer(x, rotary)[0]


def _full_name(layer: DecoderLayer, name: str) -> str:
    return f"model.layers.{layer.self_attn.layer}.{name}"


def _check_finite(layer: DecoderLayer) -> None:
    """Before anything runs: a nan would be in all inputs that come after it, and none of them tells where it began."""
    for name in LINEARS:
        weight = layer.get_submodule(name).weight
        try:
            refuse_non_finite(weight, weight.detach().float().abs().amax(0))
        except QuantError as error:
            raise QuantError(f"{_full_name(layer, name)}: {error}") from None


def look_at_inputs(
    layer: DecoderLayer, hidden: Iterable[Tensor], rotary: tuple[Tensor, Tensor]
) -> dict[str, Calibration]:
    """What the inputs of each linear map of a layer look like, by its name.

    Args:
        layer: as it is.
        hidden: what the layer is given, (1, T, C) each.
        rotary: cosine and sine, see `DecoderLayer`.
    """
    collectors = {names: Collector() for names in _SHARED_INPUTS.values()}
    hooks = [
        layer.get_submodule(names[0]).register_forward_pre_hook(lambda _, args, c=collector: c.add(args[0]))
        for names, collector in collectors.items()
    ]
    try:
        with torch.no_grad():
            for x in hidden:
                layer(x, rotary)
    finally:
        for hook in hooks:
            hook.remove()
    found = {names: collector.calibration() for names, collector in collectors.items()}
    return {name: calibration for names, calibration in found.items() for name in names}


@torch.no_grad()
def inputs_of(model: Aquila2ForCausalLM, name: str, ids: Tensor) -> list[Tensor]:
    """What one linear map of each decoder layer is given.

    Args:
        model: any.
        name: of the map in a layer, such as "mlp.down_proj".
        ids: (rows, T) token ids.

    Returns:
        (rows * T, in) for each layer.
    """
    found: list[Tensor] = []
    maps = [layer.get_submodule(name) for layer in model.model.layers]
    hooks = [m.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1))) for m in maps]
    try:
        model.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _quantized(linear: nn.Linear, scheme: Scheme, seen: Calibration | None) -> nn.Module:
    if scheme.method == "nf4":
        return Linear4bit(linear, double_quant=scheme.double_quant)
    if scheme.method == "int8":
        return Linear8bit(linear)
    if scheme.method == "gptq":
        weight = gptq(linear.weight, seen.hessian, scheme.bits, scheme.group)
    else:
        weight = round_to_nearest(linear.weight, scheme.bits, scheme.group)
    return GridLinear(linear, scheme.bits, scheme.group, weight)


def _stretch(layer: DecoderLayer, scheme: Scheme, seen: dict[str, Calibration]) -> None:
    """AWQ's stretches: columns of linear maps grow, what comes before them shrinks, and the layer computes the same."""
    for source, names in _SHARED_INPUTS.items():
        before, maps = layer.get_submodule(source), [layer.get_submodule(name) for name in names]
        width = len(before.weight)
        stretch = awq_stretch([m.weight for m in maps], _by_source(seen[names[0]], layer, width), *_grid(scheme))
        for m in maps:
            m.weight.data.mul_(stretch)
        shrink = _heads(stretch, layer, width)[:, 0].reshape(-1)
        before.weight.data.div_(shrink if before.weight.ndim == 1 else shrink[:, None])


def _grid(scheme: Scheme) -> tuple[int, int]:
    return scheme.bits, scheme.group


def _heads(x: Tensor, layer: DecoderLayer, width: int) -> Tensor:
    """(in,) -> (Hkv, H / Hkv, D), where H / Hkv inputs come from one row of what is before; else (1, 1, in)."""
    repeated = len(x) // width
    return x.view(-1, repeated, layer.self_attn.head_dim) if repeated > 1 else x.view(1, 1, -1)


def _by_source(seen: Calibration, layer: DecoderLayer, width: int) -> Calibration:
    """With grouped queries several inputs come from one value row: they can only have one stretch."""
    heads = _heads(seen.magnitude, layer, width)
    return replace(seen, magnitude=heads.mean(1, keepdim=True).expand_as(heads).reshape(-1))


def calibration_ids(tokens: Sequence[int], rows: int = 64, length: int = 512) -> Tensor:
    """Cuts a text into rows, spread evenly over it.

    Args:
        tokens: of real text.
        rows: how many; fewer if there is not as much text.
        length: tokens of a row.

    Returns:
        (rows, length)

    Raises:
        QuantError: less than one row of text.
    """
    there = len(tokens) // length
    if not there:
        raise QuantError(f"the text to calibrate with has {len(tokens)} tokens, and one row needs {length}")
    rows = min(rows, there)
    starts = [there * row // rows * length for row in range(rows)]
    return torch.tensor([tokens[start : start + length] for start in starts])
