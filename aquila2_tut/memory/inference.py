"""How much memory an answer takes, in closed form, and the length of text at which a card is full.

An answer needs the weights, the cache of keys and values, which grows with every token, and the working set: what one
layer holds while a piece of the prompt goes through it. Decoding is the case of a piece of one token. Nothing here is
measured or fitted; `tests/test_inference_memory.py` holds it against runs on a CPU.

n tokens of a piece in all rows, S of the whole text, C, F, V, D, H, Hkv as everywhere, Q = H D and K = Hkv D, a bytes
of a number that the model computes with.

Source: the operators of `aquila2_tut.model`, read one by one, without gradients; for what sdpa does with a mask on a
GPU, aten/src/ATen/native/transformers/attention.cpp, `convert_boolean_attn_mask`. It was not run on one. Some of its
kernels give the result in the order of the last map, and save that copy.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from ..config import Aquila2Config, ConfigError
from ..model.cache import CACHE_TYPES
from ..quant.sizes import predicted_bytes
from .errors import RehearsalError
from .hardware import GPUS
from .unseen import CUDA_CONTEXT, cublas_workspace

WEIGHTS = {"fp32": 4, "bf16": 2, "nf4": 2, "nf4-dq": 2}  # format -> bytes of a number that the model computes with
BACKENDS = ("sdpa", "flash")
_SIZES = ("AquilaChat2-70B-Expr", "AquilaChat2-34B-16K", "AquilaChat2-7B-16K")
_SCALE = 4  # bytes of the scale of a vector in int8


def cache_bytes_per_token(config: Aquila2Config, cache_dtype: str = "bfloat16") -> int:
    """What keys and values of one token take in all layers: 2 L Hkv vectors of D numbers; in int8 each has a scale.

    With a key-value head for each query head it would be H / Hkv times as much: six times in Aquila2-34B, eight times
    in 70B. Aquila2-7B has as many of one as of the other and saves nothing.

    Args:
        config: the model's shape.
        cache_dtype: a key of `CACHE_TYPES`.

    Raises:
        RehearsalError: no such type.
    """
    _known("cache_dtype", cache_dtype, CACHE_TYPES)
    vector = config.head_dim * CACHE_TYPES[cache_dtype].itemsize + (_SCALE if cache_dtype == "int8" else 0)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * vector


@dataclass(frozen=True)
class Answering:
    """A model that answers.

    Args:
        config: the model's shape.
        weights: how they are stored, a key of `WEIGHTS`.
        cache_dtype: a key of `CACHE_TYPES`.
        batch: rows at a time.
        chunk: tokens of a row that go through the model at once; see `aquila2_tut.chat.prefill`.
        backend: of attention, a member of `BACKENDS`: flash is the flash-attn package.

    Raises:
        RehearsalError: a value that makes no sense; the message names the field.
    """

    config: Aquila2Config
    weights: str = "bf16"
    cache_dtype: str = "bfloat16"
    batch: int = 1
    chunk: int = 512
    backend: str = "sdpa"

    def __post_init__(self) -> None:
        _known("weights", self.weights, WEIGHTS)
        _known("cache_dtype", self.cache_dtype, CACHE_TYPES)
        _known("backend", self.backend, BACKENDS)
        for field in ("batch", "chunk"):
            if getattr(self, field) < 1:
                raise RehearsalError(f"{field}: must be at least 1, not {getattr(self, field)}")

    @property
    def each(self) -> int:
        """Bytes of a number that the model computes with."""
        return WEIGHTS[self.weights]

    def terms(self, tokens: int) -> dict[str, int]:
        """What is there when the last piece of a text of so many tokens goes through the model, in bytes."""
        return {
            "weights": predicted_bytes(self.config, self.weights).total,
            "cache": self.batch * tokens * cache_bytes_per_token(self.config, self.cache_dtype),
            "working set": max(self.moments(tokens).values()),
        }

    def moments(self, tokens: int) -> dict[str, int]:
        """The working set at each moment of a layer that it may be largest at.

        In all of them there are the numbers of the tokens and their positions, the embedded tokens, which the model
        keeps to its end, what came into the layer, and the rotation's cosines and sines. Then:

        - *mask*: the norm of what came in, queries, and keys and values as attention reads them; and the T x S truths
          of a piece that has cached keys before it, twice, as they are cut to a triangle. Not with flash.
        - *attention*: the same, its result, and a float32 for each query and head; the truths once, and as numbers to
          add. Where heads are shared, sdpa with a mask on a GPU writes keys and values out for each query head.
        - *output*: its result a second time, in the order of the last map, and what that gives.
        - *feed-forward*: what attention gave, the sum and its norm; gate, up, and their product. Or gate and up, and a
          matrix written out, where weights are in four bits.
        """
        config, new = self.config, min(self.chunk, tokens)
        n, wide, queries = self.batch * new, config.intermediate_size, config.num_attention_heads * config.head_dim
        read, pairs = self._read(tokens), new * tokens if self.backend == "sdpa" and 1 < new < tokens else 0
        before = n * self.each * (3 * config.hidden_size + config.head_dim) + 8 * (self.batch * tokens + new)
        vectors = 2 * self.batch * tokens * config.head_dim * self.each
        shared = config.num_key_value_heads < config.num_attention_heads and pairs > 0
        repeated = vectors * config.num_attention_heads if shared else 0
        scores = pairs * (1 + self.each) + repeated + 4 * n * config.num_attention_heads
        product, written = n * self.each * wide, config.hidden_size * wide * self.each * self.weights.startswith("nf4")
        return {
            "mask": before + n * self.each * queries + read + 2 * pairs,
            "attention": before + n * self.each * 2 * queries + read + scores,
            "output": before + n * self.each * (3 * queries + config.hidden_size) + read,
            "feed-forward": before + n * self.each * 2 * (config.hidden_size + wide) + max(product, written),
        }

    def _read(self, tokens: int) -> int:
        """All keys and values of one layer a second time, where they are stored in another type than is computed with;
        otherwise attention reads the cache itself."""
        stored, config = CACHE_TYPES[self.cache_dtype], self.config
        if stored.is_floating_point and stored.itemsize == self.each:
            return 0
        return 2 * self.batch * tokens * config.num_key_value_heads * config.head_dim * self.each


def context_that_fits(model: str | Aquila2Config, gpu: str, cache_dtype: str = "bfloat16", **changes: int | str) -> int:
    """The length of text, prompt and answer together, at which a card is full.

    The model may not know what to do with so long a text: compare `Aquila2Config.context_length`.

    Args:
        model: a preset, or a configuration.
        gpu: a key of `GPUS`.
        cache_dtype: a key of `CACHE_TYPES`.
        changes: of the other fields of `Answering`.

    Returns:
        Tokens of each row; 0 where not even the weights fit.

    Raises:
        RehearsalError: something that is not known, or makes no sense.
    """
    _known("gpu", gpu, GPUS)
    try:
        config = Aquila2Config.preset(model) if isinstance(model, str) else model
    except ConfigError as error:
        raise RehearsalError(f"model: {error}") from None
    answering, card = Answering(config, cache_dtype=cache_dtype, **changes), GPUS[gpu]
    room = card.usable - CUDA_CONTEXT - cublas_workspace(card)
    least, most = 0, room // cache_bytes_per_token(config, cache_dtype) + 1
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if sum(answering.terms(middle).values()) <= room else (least, middle)
    return least


class Fit(NamedTuple):
    """How long a text fits a card.

    Args:
        model: a preset.
        weights, cache_dtype: see `Answering`.
        tokens: from `context_that_fits`.
        own: tokens that the model can be given, its `context_length`.
    """

    model: str
    weights: str
    cache_dtype: str
    tokens: int
    own: int


def contexts_that_fit(gpu: str) -> list[Fit]:
    """What `context_that_fits` says of the three sizes of Aquila2, for weights and caches of 16 bits and of fewer.

    Args:
        gpu: a key of `GPUS`.

    Raises:
        RehearsalError: there is no such card.
    """
    found = []
    for model, weights, stored in itertools.product(_SIZES, ("bf16", "nf4-dq"), ("bfloat16", "int8")):
        tokens = context_that_fits(model, gpu, stored, weights=weights)
        found.append(Fit(model, weights, stored, tokens, Aquila2Config.preset(model).context_length))
    return [one for one in found if one.tokens]


def _known(field: str, value: str, words: dict | tuple) -> None:
    if value not in words:
        raise RehearsalError(f"{field}: {value!r} is not one of {', '.join(words)}")
