"""Codes of a few bits in 32-bit words, in the order that GPTQ checkpoints have; and that of AWQ, to be read.

Code i of a column lies at the bits i * b to (i + 1) * b of that column's words, lowest bit first; with 3 bits, two
codes of 32 lie across two words.

Source: the layout of AutoGPTQ's `qweight` and `qzeros`, and of AutoAWQ's "GEMM" version, as checkpoints have them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import QuantError

TOGETHER = 32  # codes that fill whole words, whatever their bits
_AWQ_COLUMN = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours each four bits of a word belong to, lowest first


def pack(codes: Tensor, bits: int) -> Tensor:
    """Puts codes into words.

    Args:
        codes: (n, columns) uint8, each below 2^bits; n a multiple of 32.
        bits: of a code.

    Returns:
        (n * bits / 32, columns) int32.

    Raises:
        QuantError: a number of codes that does not fill its words.
    """
    rows, columns = codes.shape
    if rows % TOGETHER:
        raise QuantError(f"{rows} codes of {bits} bits do not fill 32-bit words: their number must be a multiple of 32")
    codes = codes.view(-1, TOGETHER, columns).long()
    words = codes.new_zeros(len(codes), bits, columns)
    for i in range(TOGETHER):
        word, at = divmod(i * bits, 32)
        words[:, word] |= codes[:, i] << at
        if at + bits > 32:
            words[:, word + 1] |= codes[:, i] >> 32 - at
    return (words & 0xFFFFFFFF).view(-1, columns).to(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Takes codes out of words.

    Args:
        words: (n * bits / 32, columns) int32.
        bits: of a code.

    Returns:
        (n, columns) uint8.
    """
    columns = words.shape[1]
    words = words.view(-1, bits, columns).long() & 0xFFFFFFFF
    codes = words.new_empty(len(words), TOGETHER, columns, dtype=torch.uint8)
    for i in range(TOGETHER):
        word, at = divmod(i * bits, 32)
        code = words[:, word] >> at
        if at + bits > 32:
            code = code | words[:, word + 1] << 32 - at
        codes[:, i] = code & 2**bits - 1
    return codes.view(-1, columns)


def unpack_awq(words: Tensor) -> Tensor:
    """Takes the four-bit codes out of a word of AWQ's, where eight columns share one.

    Args:
        words: (rows, columns / 8) int32.

    Returns:
        (rows, columns) uint8.
    """
    codes = words.new_empty(*words.shape, 8, dtype=torch.uint8)
    for i, column in enumerate(_AWQ_COLUMN):
        codes[:, :, column] = (words >> 4 * i) & 15
    return codes.flatten(1)
