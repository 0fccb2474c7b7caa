"""Codes in words against one long number of Python's, and against the words that other programs write."""

import random

import pytest
import torch

from aquila2_tut.quant import QuantError
from aquila2_tut.quant.packing import pack, unpack, unpack_awq


def words_of(column: list[int], bits: int) -> list[int]:
    """The codes of a column as one long number, lowest first, cut into words with a sign."""
    number = sum(code << bits * i for i, code in enumerate(column))
    words = [number >> 32 * i & 0xFFFFFFFF for i in range(len(column) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def random_codes(rows: int, columns: int, bits: int) -> list[list[int]]:
    draw = random.Random(bits)
    return [[draw.randrange(2**bits) for _ in range(columns)] for _ in range(rows)]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("rows", "columns"), [(32, 1), (64, 5), (160, 3)])
def test_words_are_a_long_number_in_pieces(bits, rows, columns):
    codes = torch.tensor(random_codes(rows, columns, bits), dtype=torch.uint8)
    wanted = torch.tensor([words_of(column, bits) for column in codes.t().tolist()]).t()
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32 and torch.equal(packed.long(), wanted)
    back = unpack(packed, bits)
    assert back.dtype == torch.uint8 and torch.equal(back, codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_codes_fill_every_bit(bits):
    codes = torch.full((32, 2), 2**bits - 1, dtype=torch.uint8)
    assert bool((pack(codes, bits) == -1).all())
    assert torch.equal(unpack(torch.full((bits, 2), -1, dtype=torch.int32), bits), codes)


def test_three_bits_lie_as_gptq_has_them():
    """Ten codes, two bits of the eleventh; one bit, ten codes, one bit of the next; two bits and ten codes.

    Source: how GPTQModel's packer fills three words with 32 codes.
    """
    codes = random_codes(32, 1, 3)
    first, second, third = (
        word & 0xFFFFFFFF for word in pack(torch.tensor(codes, dtype=torch.uint8), 3)[:, 0].tolist()
    )
    flat = [row[0] for row in codes]
    assert first == sum(code << 3 * i for i, code in enumerate(flat[:10])) | (flat[10] & 3) << 30
    assert second == flat[10] >> 2 | sum(code << 3 * i + 1 for i, code in enumerate(flat[11:21])) | (flat[21] & 1) << 31
    assert third == flat[21] >> 1 | sum(code << 3 * i + 2 for i, code in enumerate(flat[22:]))


def test_strided_codes_and_words():
    codes = torch.tensor(random_codes(64, 6, 4), dtype=torch.uint8)
    assert torch.equal(pack(codes.t().contiguous().t(), 4), pack(codes, 4))
    words = pack(codes, 4)
    assert torch.equal(unpack(words.t().contiguous().t(), 4), codes)
    assert torch.equal(unpack(words[:, ::2], 4), codes[:, ::2])


def test_codes_that_leave_a_word_open_are_refused():
    with pytest.raises(QuantError, match="33 codes of 3 bits do not fill 32-bit words"):
        pack(torch.zeros(33, 2, dtype=torch.uint8), 3)


def test_awq_has_even_columns_before_odd_ones():
    """Eight columns a word: 0 2 4 6 1 3 5 7, from the lowest four bits to the highest."""
    word = sum(column << 4 * i for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]))
    assert unpack_awq(torch.tensor([[word, word]], dtype=torch.int32)).tolist() == [[*range(8)] * 2]
    codes = random_codes(5, 24, 4)
    words = [
        [sum(row[8 * w + c] << 4 * i for i, c in enumerate([0, 2, 4, 6, 1, 3, 5, 7])) for w in range(3)]
        for row in codes
    ]
    signed = [[word - 2**32 if word >= 2**31 else word for word in row] for row in words]
    assert unpack_awq(torch.tensor(signed, dtype=torch.int32)).tolist() == codes
