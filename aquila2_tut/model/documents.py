"""Which tokens belong together: padding and packing as one number a token.

A row of a batch may hold several documents one behind the other (packing), or one document and padding. Both are said
by numbers: 0 at padding, 1, 2, ... at the tokens of each document. A query sees the keys that carry its own number, so
a mask of T x S truths is never needed; here stands what each backend of attention derives from the numbers instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class AttentionError(ValueError):
    """Shapes that do not fit together, or a backend that does not exist or cannot run here."""


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Which keys each query may see when the last query stands at the last key.

    Returns:
        (T, S) bool, True where query i sees key j: j <= i + (S - T).
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class Ragged(NamedTuple):
    """The documents of a batch one behind the other, padding left out: the layout of variable-length kernels.

    `query_order` and `key_order` index the flattened (B * T) queries and (B * S) keys. Document n owns the tokens from
    `query_starts[n]` to `query_starts[n + 1]` of the result, and its keys likewise; `longest_*` are in tokens.
    """

    query_order: Tensor
    key_order: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int


@dataclass(frozen=True, eq=False)
class Documents:
    """The document of every query and of every key.

    With `causal`, query i stands at key i + (S - T), as everywhere in this package; a token that is query and key then
    has the same number twice. Padding sees padding: what comes out there means nothing, and is finite.

    Args:
        queries: (B, T) integers, 0 at padding; at most S, as there are no more documents than keys.
        keys: (B, S) integers, 0 at padding; at most S.
    """

    queries: Tensor
    keys: Tensor

    @classmethod
    def of_tokens(cls, ids: Tensor, queries: int) -> Documents:
        """Self-attention: the queries are the last tokens.

        Args:
            ids: (B, S), 0 at padding. A padding mask of zeros and ones will do: it is one document. Which numbers the
                documents carry, and in which order, does not matter.
            queries: T, how many of the tokens are new.

        Raises:
            AttentionError: numbers that are none of a document.
        """
        if ids.ndim != 2 or ids.is_floating_point():
            raise AttentionError(f"document numbers: (B, S) integers expected, not {tuple(ids.shape)} of {ids.dtype}")
        if ids.min() < 0:
            raise AttentionError(f"document numbers: 0 at padding and 1, 2, ... expected, not {ids.min().item()}")
        ids = _renumbered(ids)
        return cls(ids[:, ids.shape[1] - queries :], ids)

    def to(self, device: torch.device | str, **kwargs: Any) -> Documents:
        """The same on another device; accelerate calls it where the layers of a model are spread over several."""
        if self.keys.device == torch.device(device):
            return self
        return Documents(self.queries.to(device, **kwargs), self.keys.to(device, **kwargs))

    @cached_property
    def visible(self) -> Tensor:
        """(B, 1, T, S) bool: query and key are of one document."""
        return self.queries[:, None, :, None] == self.keys[:, None, None, :]

    @cached_property
    def visible_before(self) -> Tensor:
        """(B, 1, T, S) bool: query and key are of one document, and the key is not behind the query."""
        return self.visible & causal_mask(self.queries.shape[1], self.keys.shape[1], self.keys.device)

    @cached_property
    def key_extent(self) -> tuple[Tensor, Tensor]:
        """First and last key of each query's document, (B, T) each; S and -1 where it has none."""
        return _extent(self.queries, self.keys)

    @cached_property
    def query_extent(self) -> tuple[Tensor, Tensor]:
        """First and last query of each key's document, (B, S) each; T and -1 where it has none."""
        return _extent(self.keys, self.queries)

    @cached_property
    def ragged(self) -> Ragged:
        """The documents one behind the other. Those without a query are left out, and so is padding."""
        rows = torch.arange(len(self.keys), device=self.keys.device)[:, None]
        numbers = 1 + max(self.keys.shape[1], self.queries.shape[1])
        queries, keys = ((rows * numbers + ids).flatten() for ids in (self.queries, self.keys))
        query_counts, key_counts = (torch.bincount(x, minlength=len(rows) * numbers) for x in (queries, keys))
        wanted = (query_counts > 0) & (torch.arange(len(query_counts), device=rows.device) % numbers > 0)
        orders = (x.argsort(stable=True) for x in (queries, keys))
        query_order, key_order = (o[wanted[x[o]]] for o, x in zip(orders, (queries, keys), strict=True))
        counts = query_counts[wanted], key_counts[wanted]
        starts = (F.pad(n.cumsum(0, dtype=torch.int32), (1, 0)) for n in counts)
        return Ragged(query_order, key_order, *starts, *(int(F.pad(n, (0, 1)).max()) for n in counts))


def _renumbered(ids: Tensor) -> Tensor:
    """The same documents numbered 1, 2, ... in every row, so that no number exceeds S; 0 stays 0."""
    ordered, places = ids.int().sort(dim=1)
    steps = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0)).cumsum(1, dtype=torch.int)
    return torch.empty_like(ordered).scatter_(1, places, steps + (ordered[:, :1] > 0).int())


def _extent(ids: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first and the last token with the same number stands in `others`.

    Args:
        ids: (B, N).
        others: (B, M).

    Returns:
        (B, N) each; M and -1 where there is none.
    """
    (batch, many), ids, others = others.shape, ids.long(), others.long()
    numbers = 1 + max(ids.shape[1], many)
    places = torch.arange(many, device=ids.device).expand(batch, many)
    first = places.new_full((batch, numbers), many).scatter_reduce(1, others, places, "amin")
    last = places.new_full((batch, numbers), -1).scatter_reduce(1, others, places, "amax")
    return first.gather(1, ids), last.gather(1, ids)


def _blocks(first: Tensor, last: Tensor, size: int, other_size: int, many: int) -> Tensor:
    """Joins what each token needs into what each block of `size` tokens needs, in blocks of `other_size`."""
    room = (0, -first.shape[1] % size)
    lowest = F.pad(first, room, value=many).unflatten(1, (-1, size)).amin(-1) // other_size
    highest = F.pad(last, room, value=-1).unflatten(1, (-1, size)).amax(-1) // other_size + 1
    return torch.stack((lowest, highest), -1).int().contiguous()


def key_blocks(documents: Documents, *, causal: bool, query_block: int, key_block: int) -> Tensor:
    """Which blocks of keys each block of queries has to visit: the others hold nothing it can see.

    Args:
        documents: of the T queries and S keys.
        causal: whether a query sees nothing behind itself.
        query_block, key_block: tokens a block.

    Returns:
        (B, ceil(T / query_block), 2) int32: the first key block, and one past the last.
    """
    (first, last), keys = documents.key_extent, documents.keys.shape[1]
    if causal:
        stands_at = torch.arange(first.shape[1], device=first.device) + keys - first.shape[1]
        last = last.minimum(stands_at)
    return _blocks(first, last, query_block, key_block, keys)


def query_blocks(documents: Documents, *, causal: bool, query_block: int, key_block: int) -> Tensor:
    """Which blocks of queries look at each block of keys; as `key_blocks`, seen from the keys.

    Returns:
        (B, ceil(S / key_block), 2) int32: the first query block, and one past the last.
    """
    (first, last), queries = documents.query_extent, documents.queries.shape[1]
    if causal:
        stands_at = torch.arange(first.shape[1], device=first.device) - (first.shape[1] - queries)
        first = first.maximum(stands_at)
    return _blocks(first, last, key_block, query_block, queries)
