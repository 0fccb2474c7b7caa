"""A key-value cache that grows in place.

transformers' own dynamic cache copies everything it holds for every new token. This one reserves room ahead and writes
the new token into it; it is a transformers cache all the same, so `generate` can crop it and reorder its rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_STEP = 256


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, (B, Hkv, S, D) each, as views into a larger reserve."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends T tokens.

        Args:
            key_states, value_states: (B, Hkv, T, D).

        Returns:
            All keys and all values, (B, Hkv, S + T, D) each.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._reserve: Tensor | None = None
        old = self.get_seq_length()
        new = old + key_states.shape[2]
        if self._reserve is None or new > self._reserve.shape[3] or not self._views_reserve():
            self._grow(key_states, old, new)
        self._reserve[0, :, :, old:new] = key_states
        self._reserve[1, :, :, old:new] = value_states
        self.keys, self.values = self._reserve[0, :, :, :new], self._reserve[1, :, :, :new]
        return self.keys, self.values

    def _views_reserve(self) -> bool:
        """False after `generate` has replaced the views, for instance to reorder the rows of a beam search."""
        return self.keys.data_ptr() == self._reserve.data_ptr() and self.keys.shape[0] == self._reserve.shape[1]

    def _grow(self, like: Tensor, old: int, new: int) -> None:
        room = -(-max(new, old * 3 // 2) // _STEP) * _STEP
        reserve = like.new_empty(2, like.shape[0], like.shape[1], room, like.shape[3])
        if old:
            reserve[0, :, :, :old], reserve[1, :, :, :old] = self.keys, self.values
        self._reserve = reserve


def growing_cache() -> Cache:
    """An empty cache for a model of any number of layers."""
    return Cache(layer_class_to_replicate=GrowingLayer)
