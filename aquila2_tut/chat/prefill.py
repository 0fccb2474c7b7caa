"""Reading a long prompt: in pieces, and into a cache of a chosen type.

A prompt that goes through a model in one piece needs room for all its tokens in every layer: queries, keys, and the
wide vectors of the feed-forward block. Only the keys and values are wanted afterwards. In pieces, each of which sees
the cache of those before it, the rest is as large as one piece, however long the prompt. Every token still sees the
same keys, so the logits are the same up to the rounding of the arithmetic; only those of the last position are made.

Source: Agrawal et al. 2023 (arXiv 2308.16369), section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class ChatError(ValueError):
    """A question, a history or a setting that no answer can be generated from."""


@dataclass(frozen=True)
class Reading:
    """How a prompt is read; the fields are arguments of `PredictMixin.predict`.

    Args:
        prefill_chunk: tokens of a piece; 0: all in one.
        cache_dtype: type of the numbers in the cache, see `aquila2_tut.model.cache`; None: that of the model.

    Raises:
        ChatError: a value out of range; the message names the field.
    """

    prefill_chunk: int = 0
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prefill_chunk, bool) or not isinstance(self.prefill_chunk, int) or self.prefill_chunk < 0:
            raise ChatError(f"prefill_chunk is {self.prefill_chunk!r}: it must be an integer of at least 0")

    def new_cache(self, model: Any, length: int = 0) -> Any:
        """A cache made once for so many tokens; None, the model's own that grows, where nothing was asked for.

        Raises:
            ChatError: the model is none of this package's.
            ModelError: there is no such type.
        """
        if not self.prefill_chunk and self.cache_dtype is None:
            return None
        if not hasattr(model, "new_cache"):
            raise ChatError(f"prefill_chunk and cache_dtype need an Aquila2ForCausalLM, not a {type(model).__name__}")
        return model.new_cache(self.cache_dtype, length)


@torch.inference_mode()
def prefill(model: Any, ids: Tensor, chunk: int = 0, cache: Any = None, mask: Tensor | None = None) -> Any:
    """Runs tokens through a model piece by piece, behind those that are in its cache.

    Args:
        model: an `Aquila2ForCausalLM`; in one piece any causal model of transformers.
        ids: (B, T) token ids.
        chunk: tokens of a piece; 0: all in one.
        cache: of earlier tokens, is given the new ones; None: a new one.
        mask: (B, S + T) with zeros at padding, S tokens being cached; None: there is none.

    Returns:
        The model's output for the last piece: logits (B, 1, V) of the last position, and past_key_values.

    Raises:
        ChatError: no tokens, or more than the context holds; nothing is ever cut off.
    """
    past = 0 if cache is None else int(cache.get_seq_length())
    _check_length(model, past, ids.shape[1])
    pieces = ids.split(chunk or ids.shape[1], dim=1)
    # Dynamic scaling turns a text by its length, which the first pieces cannot know.
    whole = {"rotary_length": _real_length(mask, past + ids.shape[1])} if len(pieces) > 1 else {}
    for piece in pieces:
        past += piece.shape[1]
        padding = {} if mask is None else padding_arguments(mask[:, :past], piece.shape[1])
        out = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1, **padding, **whole)
        cache = out.past_key_values
    return out


def _check_length(model: Any, past: int, new: int) -> None:
    limit = getattr(model.config, "context_length", model.config.max_position_embeddings)
    if not new:
        raise ChatError("there are no tokens to read")
    if past + new > limit:
        raise ChatError(
            f"{past} tokens are cached and {new} are new, but the context holds {limit}: read fewer, or load the "
            "model with config.stretched(...), which scales its rotation"
        )


def _real_length(mask: Tensor | None, width: int) -> int:
    """Tokens of the longest row, padding not counted."""
    return width if mask is None else int(mask.sum(-1).max())


def padding_arguments(seen: Tensor, new: int) -> dict[str, Tensor]:
    """The arguments that padding needs in a forward pass of the last tokens of `seen`.

    Positions count real tokens only; padding gets position 0, which its mask makes harmless.

    Args:
        seen: (B, S) with zeros at padding.
        new: how many of the tokens go through the model now.
    """
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": seen, "position_ids": positions[:, -new:]}
