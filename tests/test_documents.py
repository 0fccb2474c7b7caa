"""Documents: what the numbers mean, and what each backend derives from them, against the definition."""

import random

import pytest
import torch

from aquila2_tut.model import Documents
from aquila2_tut.model.documents import AttentionError, causal_mask, key_blocks, query_blocks


def random_ids(seed: int, rows: int = 3, tokens: int = 40) -> torch.Tensor:
    """Documents of random length, with padding between some, and one number used twice."""
    pick = random.Random(seed)
    ids = [
        [n for n in (pick.randrange(6) for _ in range(tokens)) for _ in range(pick.randint(1, 15))] for _ in range(rows)
    ]
    return torch.tensor([row[:tokens] for row in ids])


def by_definition(queries: torch.Tensor, keys: torch.Tensor, causal: bool) -> torch.Tensor:
    shift = keys.shape[1] - queries.shape[1]
    return torch.tensor(
        [
            [[a == b and (not causal or j <= i + shift) for j, b in enumerate(row)] for i, a in enumerate(own)]
            for own, row in zip(queries.tolist(), keys.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("queries", [40, 13, 1])
@pytest.mark.parametrize("seed", range(5))
def test_who_sees_whom(seed, queries):
    ids = random_ids(seed)
    documents = Documents.of_tokens(ids, queries)
    wanted = by_definition(ids[:, 40 - queries :], ids, True)
    assert torch.equal(documents.visible_before[:, 0], wanted)
    assert torch.equal(documents.visible[:, 0], by_definition(ids[:, 40 - queries :], ids, False))
    assert ((documents.keys == 0) == (ids == 0)).all() and documents.keys.max() <= 40


def test_numbers_may_be_large_or_in_any_order():
    ids = torch.tensor([[900, 900, 7, 0, 0], [0, 3, 3, 3, 8]])
    assert Documents.of_tokens(ids, 2).keys.tolist() == [[2, 2, 1, 0, 0], [0, 1, 1, 1, 2]]
    assert Documents.of_tokens(torch.tensor([[0, 1, 1]]).bool(), 3).keys.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [40, 13, 1])
@pytest.mark.parametrize("block", [(4, 4), (8, 16), (64, 4)])
def test_blocks_that_are_visited_hold_all_that_is_seen(causal, queries, block):
    """Nothing visible lies outside, and the first and the last block hold something visible."""
    ids, (bq, bk) = random_ids(queries), block
    documents = Documents.of_tokens(ids, queries)
    seen = by_definition(documents.queries, documents.keys, causal)
    sizes = {"causal": causal, "query_block": bq, "key_block": bk}
    for ranges, mask, size, other in (
        (key_blocks(documents, **sizes), seen, bq, bk),
        (query_blocks(documents, **sizes), seen.mT, bk, bq),
    ):
        assert ranges.shape[1] == -(-mask.shape[1] // size)
        for row, row_ranges in zip(mask, ranges.tolist(), strict=True):
            for tokens, (first, end) in zip(row.split(size), row_ranges, strict=True):
                needed = [i for i, part in enumerate(tokens.split(other, dim=1)) if part.any()]
                assert not needed or (first, end) == (needed[0], needed[-1] + 1)
                assert needed or first >= end


@pytest.mark.parametrize("queries", [40, 13, 1])
def test_ragged_is_the_same_tokens_without_padding(queries):
    ids = random_ids(7)
    documents = Documents.of_tokens(ids, queries)
    ragged = documents.ragged
    rows, numbers = torch.arange(3)[:, None], documents.keys.max() + 1
    owner = {
        "query": (rows * numbers + documents.queries).flatten(),
        "key": (rows * numbers + documents.keys).flatten(),
    }
    spans = zip(ragged.query_starts, ragged.query_starts[1:], ragged.key_starts, ragged.key_starts[1:], strict=False)
    found = []
    for a, b, c, d in spans:
        own, theirs = ragged.query_order[a:b], ragged.key_order[c:d]
        (number,) = set(owner["query"][own].tolist())
        assert own.tolist() == (owner["query"] == number).nonzero().flatten().tolist()
        assert theirs.tolist() == (owner["key"] == number).nonzero().flatten().tolist()
        found.append(number)
    assert sorted(found) == sorted({n for n in owner["query"].tolist() if n % numbers})
    assert ragged.longest_query == ragged.query_starts.diff().max()
    assert ragged.longest_key == ragged.key_starts.diff().max()


def test_causal_mask():
    assert causal_mask(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_moves_between_devices():
    documents = Documents.of_tokens(torch.ones(1, 4, dtype=torch.int), 2)
    assert documents.to("cpu") is documents
    assert documents.to("meta", non_blocking=True).queries.device.type == "meta"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, -1]]), "0 at padding and 1, 2, ... expected, not -1"),
        (torch.tensor([[1.0, 2.0]]), r"\(B, S\) integers expected, not \(1, 2\) of torch.float32"),
        (torch.tensor([1, 2]), r"\(B, S\) integers expected, not \(2,\)"),
    ],
)
def test_numbers_that_are_none(ids, message):
    with pytest.raises(AttentionError, match=message):
        Documents.of_tokens(ids, 1)
