"""Continuations of many prompts at once: what prompts have in common is read once, and who is done makes room.

The prompts are read as trees, see `prefixes.py`. Then each has a row of its own, filled up on the left, and every step
adds a token to each row. A row that has come to its end leaves; when half of the places are free, others come in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from aquila2_tut.chat.generate import Sampling
from aquila2_tut.evaluate.prefixes import Ids, Tree, portions
from aquila2_tut.evaluate.reader import Reader
from aquila2_tut.model.cache import make_cache


class Prompt(NamedTuple):
    """What is to be continued.

    Attributes:
        tokens: at least one.
        stop: texts that end the continuation and are no part of it.
        sampling: how tokens are chosen, and how many at most.
    """

    tokens: Ids
    stop: tuple[str, ...]
    sampling: Sampling


@dataclass
class _Row:
    """One prompt on its way."""

    index: int
    prompt: Prompt
    generator: torch.Generator | None
    written: list[int] = field(default_factory=list)


class Writer:
    """Continues prompts.

    Args:
        model: an `Aquila2ForCausalLM`, with an adapter or not.
        tokenizer: its own.
        batch_size: rows at once.
        ends: token ids that end a continuation.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, ends: frozenset[int]) -> None:
        self.reader, self.tokenizer, self.batch_size, self.ends = Reader(model), tokenizer, batch_size, ends
        self.rows: list[_Row] = []
        self.cache, self.seen = make_cache(), torch.empty(0, 0, dtype=torch.bool)

    @torch.inference_mode()
    def write(self, prompts: Sequence[Prompt], budget: int) -> Iterator[tuple[int, str]]:
        """Continuations, in the order in which they come to their end.

        Args:
            prompts: in any order.
            budget: tokens of prompts that are read together.

        Yields:
            The index of a prompt, and its continuation.
        """
        waiting = sorted(range(len(prompts)), key=lambda index: prompts[index].tokens)
        while waiting or self.rows:
            if waiting and len(self.rows) <= self.batch_size // 2:
                free = self.batch_size - len(self.rows)
                self._admit([(index, prompts[index]) for index in waiting[:free]], budget)
                del waiting[:free]
            else:
                self._step()
            yield from self._leave()

    def _admit(self, arriving: Sequence[tuple[int, Prompt]], budget: int) -> None:
        """Read prompts, choose the first token of each, and put them into the batch."""
        sequences = [prompt.tokens for _, prompt in arriving]
        for portion in portions(sequences, budget):
            chosen = [sequences[place] for place in portion]
            tree, states = self.reader.read(chosen, min(map(len, chosen)) - 1)
            rows = [
                _Row(index, prompt, prompt.sampling.generator())
                for index, prompt in arriving[portion.start : portion.stop]
            ]
            self._choose(rows, states[[path[-1] for path in tree.paths]])
            self._join(*_rows_of_tree(self.reader.cache, tree), rows)
            self.reader.settle()

    def _join(self, keys_values: list[tuple[Tensor, Tensor]], seen: Tensor, rows: list[_Row]) -> None:
        """Add rows to the batch; the shorter rows are filled up on the left.

        Args:
            keys_values: of each layer, (B, Hkv, S, D) each.
            seen: (B, S), False where a row is filled up.
            rows: B of them.
        """
        if self.rows:
            width = max(seen.shape[1], self.seen.shape[1])
            held = [(layer.keys, layer.values) for layer in self.cache.layers]
            both = zip(held, keys_values, strict=True)
            keys_values = [tuple(_stacked(pair, width) for pair in zip(*layer, strict=True)) for layer in both]
            seen = torch.cat([F.pad(part, (width - part.shape[1], 0)) for part in (self.seen, seen)])
        self._put(keys_values, seen, [*self.rows, *rows])

    def _put(self, keys_values: list[tuple[Tensor, Tensor]], seen: Tensor, rows: list[_Row]) -> None:
        self.cache, self.seen, self.rows = make_cache(), seen, rows
        for number, (keys, values) in enumerate(keys_values if rows else []):
            self.cache.update(keys, values, number)

    def _step(self) -> None:
        """One more token for each row."""
        device = self.reader.head.weight.device
        self.seen = F.pad(self.seen, (0, 1), value=True)
        states = self.reader.decoder(
            input_ids=torch.tensor([row.written[-1:] for row in self.rows], device=device),
            attention_mask=self._mask(),
            position_ids=self.seen.sum(1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        self._choose(self.rows, states.last_hidden_state[:, -1])

    def _mask(self) -> Tensor | None:
        """(B, 1, 1, S), minus infinity where a row is filled up; None where none is."""
        if self.seen.all():
            return None
        dtype = self.reader.decoder.norm.weight.dtype
        return torch.zeros(self.seen.shape, dtype=dtype, device=self.seen.device).masked_fill(~self.seen, -torch.inf)[
            :, None, None
        ]

    def _choose(self, rows: Sequence[_Row], states: Tensor) -> None:
        """Choose a token for each row from its last hidden state (B, C)."""
        logits = self.reader.head(states).float()
        likeliest = logits.argmax(-1).tolist()
        for row, own, token in zip(rows, logits, likeliest, strict=True):
            sampling = row.prompt.sampling
            row.written.append(token if sampling.greedy else sampling.pick(own[None], [row.generator])[0])

    def _leave(self) -> Iterator[tuple[int, str]]:
        """Take out the rows that have come to their end."""
        staying = [place for place, row in enumerate(self.rows) if not self._ended(row)]
        if len(staying) == len(self.rows):
            return
        for place in set(range(len(self.rows))) - set(staying):
            yield self.rows[place].index, self._text(self.rows[place])
        at = torch.tensor(staying, dtype=torch.long, device=self.seen.device)
        seen = self.seen[at]
        empty = int((~seen.any(0)).long().sum()) if staying else 0  # columns on the left that nobody needs any more
        held = [(layer.keys[at][:, :, empty:], layer.values[at][:, :, empty:]) for layer in self.cache.layers]
        self._put(held, seen[:, empty:], [self.rows[place] for place in staying])

    def _ended(self, row: _Row) -> bool:
        if row.written[-1] in self.ends or len(row.written) >= row.prompt.sampling.max_gen_len:
            return True
        # A token is a byte at least, so a stop text that ends here began within so many tokens.
        longest = max((len(stop.encode()) for stop in row.prompt.stop), default=0)
        tail = self.tokenizer.decode(row.written[-longest - 1 :], clean_up_tokenization_spaces=False) if longest else ""
        return any(stop in tail for stop in row.prompt.stop)

    def _text(self, row: _Row) -> str:
        tokens = row.written[:-1] if row.written[-1] in self.ends else row.written
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text[: min([len(text), *(at for at in map(text.find, row.prompt.stop) if at >= 0)])]


def _rows_of_tree(cache: Any, tree: Tree) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Keys and values of a tree's sequences, each in a row of its own.

    Returns:
        For each layer keys and values (B, Hkv, S, D), and (B, S), False where a row is filled up on the left.
    """
    ways = [[*range(tree.held), *(tree.held + node for node in path)] for path in tree.paths]
    width = max(map(len, ways))
    at = torch.tensor([[0] * (width - len(way)) + way for way in ways])
    seen = torch.arange(width) >= width - torch.tensor([len(way) for way in ways])[:, None]
    device = cache.layers[0].keys.device
    at, seen = at.to(device), seen.to(device)

    def spread(held: Tensor) -> Tensor:
        return held[0][:, at].transpose(0, 1)

    return [(spread(layer.keys), spread(layer.values)) for layer in cache.layers], seen


def _stacked(parts: Sequence[Tensor], width: int) -> Tensor:
    """Rows (B, Hkv, S, D) of unlike length as one tensor."""
    return torch.cat([F.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])
