"""How many bytes a model takes in each format, from its configuration alone; and what is published of real ones.

Counted is what is loaded, tensor by tensor: the codes of every linear map, what turns them back into numbers, and what
stays as it was. A program needs more than that: the cache of keys and values, its activations, and on a GPU the CUDA
context, some hundred megabytes that belong to no tensor.

Source: the tensors that each library keeps, measured in `tests/test_quant_sizes.py`: bitsandbytes 0.50, torchao 0.18,
and GPTQ checkpoints as this package writes and AutoGPTQ reads them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

from ..config import Aquila2Config
from .errors import QuantError
from .grid import fitting_group

KEPT = ("embed_tokens", "lm_head")  # the two matrices with a row for each token
UNITS = {"GB": 10**9, "GiB": 2**30}


@dataclass(frozen=True)
class Format:
    """How a matrix of weights, (out, in), is stored.

    Args:
        bits: of a code.
        kept: bytes of a number in what is not quantized.
        scale: bytes of a scale; 0 where a code is a number by itself.
        share: weights of a row that share a scale, halved until it divides every row of the model; 0: the whole row.
        flat: whether they are weights of the flattened matrix instead, as many as `share` says in any case.
        nested: scales that share a scale of their own in float32, after their mean was taken off; 0 for none.
        zero: bits beside each scale, for the code or the number that stands for zero.
        index: bytes beside each input, for the group that it belongs to.
        levels: bytes of tables of levels.
    """

    bits: int
    kept: int = 2
    scale: int = 0
    share: int = 0
    flat: bool = False
    nested: int = 0
    zero: int = 0
    index: int = 0
    levels: int = 0


def _grid(bits: int) -> Format:
    """As in a GPTQ checkpoint: scales in float16, zeros in the bits of a code, the group of each input in int32."""
    return Format(bits, scale=2, share=128, zero=bits, index=4)


FORMATS: dict[str, Format] = {
    "fp32": Format(32, kept=4),
    "bf16": Format(16),
    "int8": Format(8, scale=4),
    "nf4": Format(4, scale=4, share=64, flat=True, levels=4 * 16),
    "nf4-dq": Format(4, scale=1, share=64, flat=True, nested=256, levels=4 * 16 + 4 * 256),
    "gptq-8": _grid(8),
    "gptq-4": _grid(4),
    "gptq-3": _grid(3),
    "awq-4": _grid(4),
    # Four bits on a CPU: a grid in the order of torch's kernel, and the codes of a GGUF file in Q4_0 or Q4_1.
    "int4-cpu": Format(4, scale=2, share=128, zero=16),
    "gguf": Format(4, scale=2, share=32, zero=16),
    "torchao-int8": Format(8, scale=4, zero=8),
    "torchao-int4": Format(4, scale=2, share=128, zero=16),
}


class MatrixBytes(NamedTuple):
    """What a matrix takes, or several together.

    Args:
        codes: the weights.
        scales: what codes are multiplied with; after double quantization, also the scales of scales and their mean.
        zeros: what stands for zero.
        tables: levels, and the groups of inputs. The layers of this package share one table and have none of their own.
    """

    codes: int
    scales: int
    zeros: int
    tables: int


def matrix_bytes(form: Format, out: int, inputs: int, group: int) -> MatrixBytes:
    """What one matrix takes.

    Args:
        form: how it is stored.
        out, inputs: its shape.
        group: weights that share a scale, from `group_size`; 0: a row.
    """
    scales = -(-out * inputs // group) if form.flat else out * -(-inputs // (group or inputs))
    nested = 4 * -(-scales // form.nested) + 4 if form.nested else 0
    return MatrixBytes(
        codes=-(-out * inputs * form.bits // 8),
        scales=scales * form.scale + nested,
        zeros=-(-scales * form.zero // 8),
        tables=form.index * inputs + form.levels,
    )


def linear_shapes(config: Aquila2Config) -> list[tuple[int, int]]:
    """The shapes (out, in) of a layer's linear maps: q, k, v, o, then gate, up and down."""
    width, ffn = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    attention = [(queries, width), (keys, width), (keys, width), (width, queries)]
    return [*attention, (ffn, width), (ffn, width), (width, ffn)]


def input_widths(config: Aquila2Config) -> set[int]:
    """The numbers of inputs that a layer's linear maps have."""
    return {inputs for _, inputs in linear_shapes(config)}


def group_size(form: Format, config: Aquila2Config) -> int:
    """Weights that share a scale in a model: 128, or the next smaller power of two that divides every row."""
    return form.share if form.flat else fitting_group(input_widths(config), form.share)


@dataclass(frozen=True)
class ModelBytes:
    """What a loaded model takes, in bytes.

    Args:
        codes, scales, zeros, tables: of the layers' linear maps, see `MatrixBytes`.
        embedding: the table of token vectors.
        head: the last linear map; 0 where it is the embedding.
        norms: their weights.
    """

    codes: int
    scales: int
    zeros: int
    tables: int
    embedding: int
    head: int
    norms: int

    @property
    def terms(self) -> dict[str, int]:
        """All of them by name, in this order."""
        return dict(vars(self))

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self.terms.values())


def predicted_bytes(config: Aquila2Config, name: str, keep: Collection[str] = KEPT) -> ModelBytes:
    """What a model takes once it is loaded.

    Args:
        config: the model's shape.
        name: a key of `FORMATS`.
        keep: which of `KEPT` stay unquantized, as libraries have it if not asked otherwise. Norms always do. Where
            embedding and head are one matrix, they are so only while both stay.

    Raises:
        QuantError: no such format, or something else to keep.
    """
    if name not in FORMATS:
        raise QuantError(f"no format named {name!r}; known: {', '.join(FORMATS)}")
    if strange := set(keep) - set(KEPT):
        raise QuantError(f"keep: {sorted(strange)}: only {' and '.join(KEPT)} can be kept or not")
    form = FORMATS[name]
    group, layers = group_size(form, config), config.num_hidden_layers
    maps = [matrix_bytes(form, out, inputs, group) for out, inputs in linear_shapes(config)]
    linear = (layers * sum(term) for term in zip(*maps, strict=True))
    embedding, head = _vocabulary_bytes(config, form, group, keep if form.scale else KEPT)
    return ModelBytes(*linear, embedding, head, norms=(2 * layers + 1) * config.hidden_size * form.kept)


def _vocabulary_bytes(config: Aquila2Config, form: Format, group: int, keep: Collection[str]) -> tuple[int, int]:
    """Bytes of the embedding and of the head."""
    rows, width = config.vocab_size, config.hidden_size
    kept, quantized = rows * width * form.kept, sum(matrix_bytes(form, rows, width, group))
    embedding, head = (kept if table in keep else quantized for table in KEPT)
    return embedding, 0 if config.tie_word_embeddings and set(KEPT) <= set(keep) else head


def cache_bytes(config: Aquila2Config, tokens: int, bytes_each: int = 2) -> int:
    """What keys and values of a conversation take: 2 L Hkv D numbers a token.

    Args:
        config: the model's shape.
        tokens: of the conversation.
        bytes_each: of one number.
    """
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * bytes_each * tokens


# ---------- against published figures ----------


@dataclass(frozen=True)
class PublishedSize:
    """The memory that a model was seen to take.

    Args:
        model: a preset.
        format: a key of `FORMATS`.
        figure: as printed, in gigabytes.
        units: keys of `UNITS` that they may be. More than one where it is not said.
        counted: what the figure counts.
        source: where it is printed.
    """

    model: str
    format: str
    figure: float
    units: tuple[str, ...]
    counted: str
    source: str

    @property
    def predicted(self) -> ModelBytes:
        """What the loaded model takes."""
        return predicted_bytes(Aquila2Config.preset(self.model), self.format)

    @property
    def beyond(self) -> dict[str, float]:
        """Unit -> bytes of the figure that are no weights. Below 0, it cannot be meant in this unit, or was cut."""
        return {unit: self.figure * UNITS[unit] - self.predicted.total for unit in self.units}

    @property
    def apart(self) -> dict[str, float]:
        """Unit -> the prediction over the figure, less one."""
        return {unit: self.predicted.total / (self.figure * UNITS[unit]) - 1 for unit in self.units}


def published_sizes() -> list[PublishedSize]:
    """The figures of `published.json`."""
    rows: list[dict[str, Any]] = json.loads(
        resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8")
    )["sizes"]
    return [PublishedSize(**row | {"units": tuple(row["units"])}) for row in rows]
