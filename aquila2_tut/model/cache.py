"""A key-value cache that is written in place: it grows by large steps, or is made once for a given length.

transformers' own dynamic cache copies everything it holds for every new token. This one reserves room ahead and writes
the new tokens into it; it is a transformers cache all the same, so `generate` can crop it and reorder its rows.

It may hold its numbers in another type than the model computes in. In bfloat16 that halves the cache of a float32
model. In int8 each vector of a head and a token becomes D codes from -127 to 127 and one float32 scale, whose four
bytes lie behind the codes: D + 4 bytes. Attention reads what was stored, turned back into the model's type, one layer
at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .errors import ModelError

CACHE_TYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
_STEP = 256
_SCALE = torch.float32.itemsize


def to_int8(x: Tensor) -> Tensor:
    """Codes, and behind them the scale that the largest number of each vector comes to 127 with.

    Args:
        x: (..., D) numbers.

    Returns:
        (..., D + 4) int8.
    """
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat(((x / scale).round().to(torch.int8), scale.view(torch.int8)), dim=-1)


def from_int8(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that `to_int8` stored: (..., D + 4) int8 -> (..., D) of the given type."""
    scale = stored[..., -_SCALE:].contiguous().view(torch.float32)
    return stored[..., :-_SCALE].to(dtype).mul_(scale.to(dtype))


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer, as views into a larger reserve: (B, Hkv, S, D) each, or D + 4 in int8.

    Args:
        stored: the type they are kept in; None: that in which they come.
        length: tokens for which there is room, all of it from the start; 0: it grows.
    """

    def __init__(self, stored: torch.dtype | None = None, length: int = 0) -> None:
        super().__init__()
        self.stored, self.length = stored, length
        self._reserve: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends T tokens.

        Args:
            key_states, value_states: (B, Hkv, T, D).

        Returns:
            All keys and all values, (B, Hkv, S + T, D) each, in the type in which they came.

        Raises:
            ModelError: there is no room for them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._reserve = None
        old = self.get_seq_length()
        new = old + key_states.shape[2]
        for side, states in enumerate((key_states, value_states)):
            states = self._to_stored(states)
            if side == 0 and (self._reserve is None or new > self._reserve.shape[3] or not self._views_reserve()):
                self._reserve_for(states, old, new)
            self._reserve[side, :, :, old:new] = states
        self.keys, self.values = self._reserve[0, :, :, :new], self._reserve[1, :, :, :new]
        return self._from_stored(self.keys, key_states), self._from_stored(self.values, value_states)

    def get_max_length(self) -> int:
        """Tokens that there is room for; -1 where it grows."""
        return self.length or -1

    def _to_stored(self, x: Tensor) -> Tensor:
        return to_int8(x) if self.stored == torch.int8 else x.to(self.stored or x.dtype)

    def _from_stored(self, x: Tensor, like: Tensor) -> Tensor:
        return from_int8(x, like.dtype) if self.stored == torch.int8 else x.to(like.dtype)

    def _views_reserve(self) -> bool:
        """False after `generate` has replaced the views, for instance to reorder the rows of a beam search."""
        return self.keys.data_ptr() == self._reserve.data_ptr() and self.keys.shape[0] == self._reserve.shape[1]

    def _reserve_for(self, like: Tensor, old: int, new: int) -> None:
        if self.length and new > self.length:
            raise ModelError(f"the cache was made for {self.length} tokens; {old} are in it and {new - old} are new")
        room = self.length or -(-max(new, old * 3 // 2) // _STEP) * _STEP
        reserve = like.new_empty(2, like.shape[0], like.shape[1], room, like.shape[3])
        if old:
            reserve[0, :, :, :old], reserve[1, :, :, :old] = self.keys, self.values
        self._reserve = reserve


def make_cache(stored: str | torch.dtype | None = None, length: int = 0) -> Cache:
    """An empty cache for a model of any number of layers.

    Args:
        stored: the type of its numbers, a key or a value of `CACHE_TYPES`; None: that of the model.
        length: tokens that it is made for, once; 0: it grows.

    Raises:
        ModelError: no such type, or a length below 0.
    """
    known = CACHE_TYPES.get(stored, stored) if isinstance(stored, str) else stored
    if known is not None and known not in CACHE_TYPES.values():
        raise ModelError(f"cache type: {stored!r} is not one of {', '.join(CACHE_TYPES)}")
    if length < 0:
        raise ModelError(f"cache length: {length} tokens; it must be 0 (it grows) or above")
    return Cache(layer_class_to_replicate=functools.partial(ReservedLayer, known, length))


def held_bytes(cache: Cache) -> int:
    """What a cache takes, with the room that is still free."""
    sides = (x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None)
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in sides}.values())
