"""Texts that begin alike, read once: many sequences of tokens as one tree, for a model to score in one pass.

A few-shot prompt stands before every question, and a question before each of its choices. In a tree every such
beginning is there once, and nothing is filled up: the tokens of all branches lie in one row, and a mask lets each see
its own way back to the root only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Ids = tuple[int, ...]


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    shorter = min(len(one), len(other))
    if tuple(one[:shorter]) == tuple(other[:shorter]):
        return shorter
    return next(i for i in range(shorter) if one[i] != other[i])


class Tree(NamedTuple):
    """Sequences with a common root.

    Attributes:
        held: tokens of the common beginning whose keys and values are there already; they are no part of the tree.
        stem: nodes at the beginning of the tree that all sequences go through.
        tokens: of the nodes, in such an order that each comes after the one before it in its sequence.
        parents: of the nodes, -1 where it is the last held token, or nothing at all.
        paths: for each sequence its nodes, from the root to its end.
    """

    held: int
    stem: int
    tokens: list[int]
    parents: list[int]
    paths: list[list[int]]

    def positions(self) -> list[int]:
        """The place of each node in its sequence, held tokens counted."""
        found: list[int] = []
        for parent in self.parents:
            found.append(self.held if parent < 0 else found[parent] + 1)
        return found

    def visible(self) -> Tensor | None:
        """(T, held + T) truths: which tokens a node sees. None if that is each one before it, as in a plain text."""
        if self.stem == len(self.tokens):
            return None
        sees = torch.zeros(len(self.tokens), self.held + len(self.tokens), dtype=torch.bool)
        sees[:, : self.held] = True
        sees[: self.stem, self.held : self.held + self.stem] = torch.ones(self.stem, self.stem).tril().bool()
        for node in range(self.stem, len(self.tokens)):
            if self.parents[node] >= 0:
                sees[node] = sees[self.parents[node]]
            sees[node, self.held + node] = True
        return sees


def grow(sequences: Sequence[Ids], held: int) -> Tree:
    """The tree of sequences that are in order.

    Args:
        sequences: sorted, so that those with a common beginning are neighbours; none is empty.
        held: tokens at the beginning of all of them that are left out.
    """
    stem = common_length(sequences[0], sequences[-1])
    tokens, parents, paths = list(sequences[0][held:]), list(range(-1, len(sequences[0]) - held - 1)), []
    paths.append(list(range(len(tokens))))
    for before, sequence in itertools.pairwise(sequences):
        shared = common_length(before, sequence) - held
        path = paths[-1][:shared]
        for token in sequence[held + shared :]:
            tokens.append(token)
            parents.append(path[-1] if path else -1)
            path.append(len(tokens) - 1)
        paths.append(path)
    return Tree(held, stem - held, tokens, parents, paths)


def portions(sequences: Sequence[Ids], budget: int) -> Iterator[range]:
    """Sorted sequences in portions of neighbours, to be read together.

    A portion ends before it has more new tokens than the budget; and where a long common beginning ends, so that it
    stays held for all portions that have it.

    Args:
        sequences: sorted.
        budget: tokens; a sequence that has more is a portion of its own.

    Yields:
        Their indices.
    """
    first, new, stem = 0, 0, 0
    for index, sequence in enumerate(sequences):
        shared = common_length(sequences[index - 1], sequence) if index else 0
        if index > first and (new + len(sequence) - shared > budget or stem - shared > budget // 4):
            yield range(first, index)
            first, new = index, max(0, shared - stem)  # of what it shares, only the old portion's stem stays held
        stem = len(sequence) if index == first else min(stem, shared)
        new += len(sequence) - shared
    if sequences:
        yield range(first, len(sequences))
