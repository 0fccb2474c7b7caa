"""Packing: nothing lost, nothing twice, never too long; and a document reads the same in a row as it does alone."""

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from aquila2_tut.config import Aquila2Config
from aquila2_tut.data import DataError, Row, collate, length_batches, pack_best_fit, pack_stream, padding_share
from aquila2_tut.model import Aquila2ForCausalLM

LENGTHS = st.lists(st.integers(1, 24), min_size=1, max_size=40)


def unique_sequences(lengths: list[int]) -> list[list[int]]:
    """No token twice, so that a token says where it came from."""
    ends = np.cumsum(lengths).tolist()
    return [list(range(end - size, end)) for size, end in zip(lengths, ends, strict=True)]


def samples_of(lengths: list[int]) -> list[dict]:
    """Labels on the second half of each sample."""
    return [
        {"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]}
        for ids in unique_sequences(lengths)
    ]


def documents(row: Row) -> list[tuple[list[int], list[int]]]:
    """The row taken apart again, by plain loops."""
    found: list[tuple[list[int], list[int]]] = []
    for token, label, number in zip(*(part.tolist() for part in row), strict=True):
        if number > len(found):
            found.append(([], []))
        assert number == len(found), "documents are numbered 1, 2, ... in order"
        found[-1][0].append(token)
        found[-1][1].append(label)
    return found


@settings(deadline=None)
@given(st.lists(st.integers(0, 24), max_size=40), st.integers(1, 16))
def test_a_stream_loses_nothing(lengths, length):
    sequences = unique_sequences(lengths)
    rows = list(pack_stream(sequences, length))
    assert all(len(row.input_ids) == length for row in rows[:-1])
    assert all(1 <= len(row.input_ids) <= length for row in rows[-1:])
    assert [token for row in rows for token in row.input_ids.tolist()] == [t for s in sequences for t in s]
    for ids, labels in (document for row in rows for document in documents(row)):
        assert any(set(ids) <= set(sequence) for sequence in sequences), "two documents under one number"
        assert labels == [-100, *ids[1:]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 10), max_size=20), st.integers(1, 8))
def test_a_stream_is_cut_only_where_a_row_is_full(lengths, length):
    sequences = unique_sequences(lengths)
    found = [document for row in pack_stream(sequences, length) for document in documents(row)]
    inner = {i for i in range(length, sum(lengths), length)} - set(np.cumsum(lengths).tolist())
    assert len(found) == len(sequences) + len(inner)


def test_a_stream_is_lazy():
    def endless():
        while True:
            yield [1, 2, 3]

    rows = pack_stream(endless(), 4)
    assert [next(rows).input_ids.tolist() for _ in range(3)] == [[1, 2, 3, 1], [2, 3, 1, 2], [3, 1, 2, 3]]


def test_packing_leaves_the_callers_arrays_alone():
    sequence = np.arange(5, dtype=np.int32)
    list(pack_stream([sequence], 3))
    pack_best_fit([{"input_ids": sequence, "labels": sequence}], 5)
    collate([{"input_ids": sequence, "labels": sequence}], 0)
    assert sequence.tolist() == [0, 1, 2, 3, 4]


@settings(deadline=None)
@given(LENGTHS, st.integers(24, 64))
def test_best_fit_keeps_every_sample_whole_and_once(lengths, length):
    samples = samples_of(lengths)
    rows = pack_best_fit(samples, length)
    assert all(len(row.input_ids) <= length for row in rows)
    found = sorted(document for row in rows for document in documents(row))
    assert found == sorted((s["input_ids"], [-100, *s["labels"][1:]]) for s in samples)


def slow_best_fit(lengths: list[int], length: int) -> list[list[int]]:
    """The definition: look at every row."""
    rows: list[list[int]] = []
    for size in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + size <= length]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            rows.append([size])
    return rows


@settings(deadline=None)
@given(LENGTHS, st.integers(24, 64))
def test_best_fit_is_best_fit_decreasing(lengths, length):
    rows = pack_best_fit(samples_of(lengths), length)
    sizes = [[len(ids) for ids, _ in documents(row)] for row in rows]
    # Which of several rows with the same room is taken is free, so fillings are compared, not contents.
    assert sorted(map(sum, sizes)) == sorted(map(sum, slow_best_fit(lengths, length)))


def test_what_does_not_fit_is_named():
    samples = samples_of([3, 9, 4])
    with pytest.raises(DataError, match=r"sample 1 has 9 tokens, more than the 8 of a row"):
        pack_best_fit(samples, 8)
    with pytest.raises(DataError, match="sample 1 has no tokens"):
        pack_best_fit([samples[0], {"input_ids": [], "labels": []}], 8)
    with pytest.raises(DataError, match="sample 0 has 3 input_ids but 2 labels"):
        collate([{"input_ids": [1, 2, 3], "labels": [1, 2]}], 0)
    with pytest.raises(DataError, match="length must be at least 1, not 0"):
        next(pack_stream([[1]], 0))
    with pytest.raises(DataError, match="at least one"):
        collate([], 0)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 5))
def test_batches_hold_every_sample_once_and_like_lengths(lengths, size, seed):
    batches = length_batches(lengths, batch_size=size, seed=seed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert sorted(map(len, batches), reverse=True)[:-1] == [size] * (len(batches) - 1)
    spans = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches)
    assert all(a[1] <= b[0] for a, b in pairwise(spans)), "lengths of two batches overlap"
    assert batches == length_batches(lengths, batch_size=size, seed=seed)


@settings(deadline=None)
@given(LENGTHS, st.integers(24, 100))
def test_batches_within_a_budget_of_tokens(lengths, budget):
    batches = length_batches(lengths, max_tokens=budget, seed=1)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)
    by_length = sorted(([lengths[i] for i in batch] for batch in batches), key=lambda b: (max(b), min(b), -len(b)))
    for batch, after in pairwise(by_length):
        assert (len(batch) + 1) * min(after) > budget, "the next sample would have fitted too"


def test_batches_differ_from_seed_to_seed():
    orders = [length_batches([5] * 12 + [9] * 12, batch_size=4, seed=seed) for seed in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert sorted(map(sorted, orders[0])) != sorted(map(sorted, orders[1])), "only the order of the batches changed"


def test_faulty_limits():
    for limits in ({}, {"batch_size": 2, "max_tokens": 9}):
        with pytest.raises(DataError, match="exactly one of batch_size and max_tokens"):
            length_batches([1], **limits)
    with pytest.raises(DataError, match="batch_size must be at least 1"):
        length_batches([1], batch_size=0)
    with pytest.raises(DataError, match=r"sample 1 has 7 tokens, more than max_tokens=6"):
        length_batches([1, 7], max_tokens=6)


def test_a_batch_by_hand():
    row = pack_best_fit([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}], 5)
    batch = collate([*row, {"input_ids": [4, 3], "labels": [4, 3]}], 1)
    assert {name: table.tolist() for name, table in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9], [4, 3, 1, 1, 1]],
        "labels": [[-100, 6, 7, -100, 9], [-100, 3, -100, -100, -100]],
        "document_ids": [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]],
    }
    assert all(table.dtype == torch.int64 for table in batch.values())


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 6))
def test_shares_are_those_of_real_batches(lengths, batch_size):
    samples = samples_of(lengths)
    shares = padding_share(lengths, length=32, batch_size=batch_size, seed=3)

    def real(batches: list[list], width: int = 0) -> float:
        tables = [collate(batch, 0)["document_ids"] for batch in batches]
        wide = [F.pad(table, (0, max(0, width - table.shape[1]))) for table in tables]
        return float(sum((table == 0).sum() for table in wide) / sum(table.numel() for table in wide))

    bucketed = [[samples[i] for i in batch] for batch in length_batches(lengths, batch_size=batch_size, seed=3)]
    assert shares["full"] == pytest.approx(real([samples], 32))
    assert shares["bucketed"] == pytest.approx(real(bucketed))
    assert shares["packed"] == pytest.approx(real([pack_best_fit(samples, 32)], 32))
    assert shares["packed"] <= shares["full"] + 1e-9
    assert 0 <= shares["random"] <= 1 - sum(lengths) / (len(lengths) * max(lengths)) + 1e-9


def test_what_each_way_of_batching_pads():
    """Answers are short and a few are long: the usual shape of instruction data."""
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 2000).clip(8, 2048).astype(int).tolist()
    shares = padding_share(lengths, length=2048, batch_size=8)
    assert 0.85 < shares["full"] < 0.95
    assert 0.5 < shares["random"] < 0.7
    assert shares["bucketed"] < 0.05
    assert shares["packed"] < 0.01
    with pytest.raises(DataError, match="no share of padding"):
        padding_share([], length=8, batch_size=2)


def test_ten_million_tokens_pack_in_seconds():
    lengths = np.random.default_rng(0).integers(10, 390, 50_000)
    sequences = [np.arange(size, dtype=np.int32) for size in lengths]
    start = time.perf_counter()
    streamed = sum(len(row.input_ids) for row in pack_stream(sequences, 2048))
    packed = sum(len(row.input_ids) for row in pack_best_fit([{"input_ids": s, "labels": s} for s in sequences], 2048))
    assert streamed == packed == lengths.sum() > 9_000_000
    assert time.perf_counter() - start < 20


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def model() -> Aquila2ForCausalLM:
    torch.manual_seed(0)
    model = Aquila2ForCausalLM(Aquila2Config(**SHAPE))
    with torch.no_grad():  # so large that logits differ and a leak from one document to another shows
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim == 2 else 1)
    return model.train()


def random_samples(seed: int) -> list[dict]:
    pick = np.random.default_rng(seed)
    sizes = pick.integers(1, 14, 9)
    ids = [pick.integers(3, 97, size) for size in sizes]
    return [{"input_ids": x, "labels": np.where(pick.random(len(x)) < 0.3, -100, x)} for x in ids]


def loss_and_gradients(model: Aquila2ForCausalLM, batches: list[dict]) -> tuple[float, list[torch.Tensor]]:
    """The loss summed over everything, by torch's own cross-entropy."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        logits = model(batch["input_ids"], document_ids=batch["document_ids"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        loss.backward()
        total += loss.item()
    return total, [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("seed", range(4))
def test_a_packed_document_reads_as_it_does_alone(model, seed):
    samples = random_samples(seed)
    batch = collate(pack_best_fit(samples, 24), 0)
    with torch.no_grad():
        together = model(batch["input_ids"], document_ids=batch["document_ids"]).logits
    seen = 0
    for line, ids, numbers in zip(together, batch["input_ids"], batch["document_ids"], strict=True):
        for number in range(1, int(numbers.max()) + 1):
            with torch.no_grad():
                alone = model(ids[numbers == number][None]).logits[0]
            torch.testing.assert_close(line[numbers == number], alone, rtol=1e-5, atol=1e-5)
            seen += 1
    assert seen == len(samples)


@pytest.mark.parametrize("seed", range(4))
def test_packed_loss_and_gradients_are_those_of_the_documents_alone(model, seed):
    samples = random_samples(seed)
    loss, gradients = loss_and_gradients(model, [collate(pack_best_fit(samples, 24), 0)])
    # Alone and without document numbers there is nothing that could go wrong.
    alone = [{"input_ids": torch.tensor(s["input_ids"])[None], "document_ids": None} for s in samples]
    alone = [a | {"labels": torch.tensor(s["labels"])[None]} for a, s in zip(alone, samples, strict=True)]
    wanted, wanted_gradients = loss_and_gradients(model, alone)
    assert loss == pytest.approx(wanted, rel=1e-5)
    for mine, theirs in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_padding_changes_nothing(model):
    samples = random_samples(7)
    rows = list(pack_stream([s["input_ids"] for s in samples], 16))
    assert len(rows[-1].input_ids) < 16
    loss, gradients = loss_and_gradients(model, [collate(rows, 5)])
    wanted, wanted_gradients = loss_and_gradients(model, [collate([row], 0) for row in rows])
    assert loss == pytest.approx(wanted, rel=1e-5)
    for mine, theirs in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
