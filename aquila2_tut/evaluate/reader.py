"""How likely a model finds given tokens: forward passes over trees of sequences, with the beginning held in a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from aquila2_tut.evaluate.prefixes import Ids, Tree, common_length, grow, portions
from aquila2_tut.model.cache import make_cache

ROWS_AT_ONCE = 64  # of logits: with a vocabulary of 100,000 they take 26 MB, not gigabytes


class Scored(NamedTuple):
    """A sequence, and from which of its tokens on it is scored (at least 1: the first has nothing before it)."""

    tokens: Ids
    first: int


class Likelihood(NamedTuple):
    """The log-likelihood of the scored tokens in nats, and whether each of them is the likeliest there."""

    total: float
    greedy: bool


class Reader:
    """Reads trees of sequences, and remembers the beginning that the next ones may share.

    Args:
        model: an `Aquila2ForCausalLM`, with an adapter or not.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder, self.head = base.model, base.lm_head
        self.cache: Cache = make_cache()
        self._held: Ids = ()

    def forget(self) -> None:
        """Give the memory of the held beginning back."""
        self.cache, self._held = make_cache(), ()

    @torch.inference_mode()
    def read(self, sequences: Sequence[Ids], needed: int) -> tuple[Tree, Tensor]:
        """One forward pass over sequences; afterwards the cache holds them all, see `settle`.

        Args:
            sequences: sorted.
            needed: the first place whose hidden state is wanted.

        Returns:
            The tree, and the hidden state (T, C) of each of its nodes, after the last norm.
        """
        held = min(common_length(self._held, sequences[0]), common_length(self._held, sequences[-1]), needed)
        self._crop(held)
        tree = grow(sequences, held)
        device = self.head.weight.device
        states = self.decoder(
            input_ids=torch.tensor([tree.tokens], device=device),
            attention_mask=self._mask(tree.visible(), device),
            position_ids=torch.tensor([tree.positions()], device=device),
            past_key_values=self.cache,
            use_cache=True,
        )
        self._held = sequences[0][: held + tree.stem]
        return tree, states.last_hidden_state[0]

    def settle(self) -> None:
        """Keep of the last pass what all its sequences have in common, and drop the branches."""
        self._crop(len(self._held))

    def _crop(self, length: int) -> None:
        self._held = self._held[:length]
        if length == 0:
            self.forget()
        elif length < self.cache.get_seq_length():
            self.cache.crop(length - self.cache.get_seq_length())  # a negative number: so many are taken off

    def _mask(self, visible: Tensor | None, device: torch.device) -> Tensor | None:
        """(1, 1, T, S), 0 where a token is seen and minus infinity elsewhere."""
        if visible is None:
            return None
        dtype = self.decoder.norm.weight.dtype
        return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)[None, None].to(device)

    @torch.inference_mode()
    def score(self, requests: Sequence[Scored], budget: int) -> Iterator[tuple[list[int], list[Likelihood]]]:
        """Log-likelihoods, portion by portion.

        Args:
            requests: what is scored, in any order.
            budget: new tokens of a portion.

        Yields:
            Indices of requests, and what was found for them.
        """
        inputs = [request.tokens[:-1] for request in requests]
        order = sorted(range(len(requests)), key=inputs.__getitem__)
        for portion in portions([inputs[index] for index in order], budget):
            indices = [order[place] for place in portion]
            chosen = [requests[index] for index in indices]
            tree, states = self.read([inputs[index] for index in indices], min(r.first for r in chosen) - 1)
            self.settle()
            yield indices, self._likelihoods(chosen, tree, states)

    def _likelihoods(self, requests: Sequence[Scored], tree: Tree, states: Tensor) -> list[Likelihood]:
        """What the hidden states of a tree say about its sequences; each node is turned into logits at most once."""
        wanted = [
            (path[place - 1 - tree.held], request.tokens[place])
            for request, path in zip(requests, tree.paths, strict=True)
            for place in range(request.first, len(request.tokens))
        ]
        nodes, targets = torch.tensor(wanted, device=states.device).unbind(1)
        logprobs, likeliest = self._logprobs(states, nodes, targets)
        sizes = [len(request.tokens) - request.first for request in requests]
        # Summed in double precision: over thousands of tokens float32 would lose the fourth decimal.
        totals = [part.sum().item() for part in logprobs.double().split(sizes)]
        greedy = [bool(part.all()) for part in likeliest.split(sizes)]
        return list(map(Likelihood, totals, greedy))

    def _logprobs(self, states: Tensor, nodes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """log p (N,) of targets (N,) after nodes (N,), and whether nothing is likelier."""
        rows, row_of = nodes.unique(return_inverse=True)
        logprobs = torch.empty(len(nodes), device=states.device)
        likeliest = torch.empty(len(nodes), dtype=torch.bool, device=states.device)
        for first in range(0, len(rows), ROWS_AT_ONCE):
            logits = self.head(states[rows[first : first + ROWS_AT_ONCE]]).float()
            here = (row_of >= first) & (row_of < first + ROWS_AT_ONCE)
            local, wanted = row_of[here] - first, targets[here]
            best = logits.max(-1)
            logprobs[here] = logits[local, wanted] - logits.logsumexp(-1)[local]
            likeliest[here] = best.indices[local] == wanted
        return logprobs, likeliest
