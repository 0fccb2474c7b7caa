"""The command ``aquila2-tut quantize``: a checkpoint into few bits."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.splits import corpus
from ..terminal import add_common
from .checkpoint import quantize_checkpoint
from .errors import QuantError
from .methods import CALIBRATED, METHODS, Scheme, calibration_ids

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CALIBRATION = (
    "python-docs",
    "jupyterlab-en",
    "jupyterlab-zh",
    "dialogues-en",
    "dialogues-zh",
)  # what the methods that calibrate look at unless a text is given
_DOCUMENTS = 400  # of each of these


def parse(argv: Sequence[str], text: dict[str, str]) -> argparse.Namespace:
    """Reads the command line.

    Args:
        argv: what follows ``quantize``.
        text: the messages in the reader's language.
    """
    parser = argparse.ArgumentParser(prog="aquila2-tut quantize", description=text["quantize"], add_help=False)
    parser.add_argument("model", metavar="MODEL", help=text["quant_model"])
    parser.add_argument("--method", required=True, choices=METHODS, help=text["method"])
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), help=text["quant_bits"])
    parser.add_argument("--group", type=int, default=128, metavar="N", help=text["quant_group"])
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=text["quant_out"])
    parser.add_argument("--calibration", nargs="+", type=Path, metavar="FILE", help=text["calibration"])
    parser.add_argument("--rows", type=int, default=64, metavar="N", help=text["quant_rows"])
    parser.add_argument("--length", type=int, default=512, metavar="N", help=text["quant_length"])
    parser.add_argument("--model-dir", metavar="DIR", help=text["model_dir"])
    parser.add_argument("--device", default="auto", help=text["device"])
    add_common(parser, text)
    return parser.parse_args(argv)


def run(options: argparse.Namespace, source: Path, tokenizer: PreTrainedTokenizerBase, device: str) -> Path:
    """Quantizes a checkpoint, tokenizer and all.

    Args:
        options: from `parse`.
        source: a checkpoint folder or a GGUF file.
        tokenizer: the model's.
        device: what computes.

    Returns:
        The folder.

    Raises:
        QuantError: see `quantize_checkpoint`; or a text that cannot be read.
    """
    scheme = Scheme(
        options.method, options.bits or min(METHODS[options.method], key=lambda b: abs(b - 4)), options.group
    )
    ids = calibration(options, tokenizer) if scheme.method in CALIBRATED else None
    return quantize_checkpoint(source, options.out, scheme, ids, device, tokenizer=tokenizer)


def calibration(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The token ids (rows, length) that methods look at: of the files given, or of the book's own texts.

    Raises:
        QuantError: a file that is not there or no UTF-8, or too little text.
    """
    texts = list(_files(options.calibration) if options.calibration else _own())
    if options.rows < 1 or options.length < 2:
        raise QuantError(f"--rows {options.rows} and --length {options.length}: at least 1 row of 2 tokens")
    tokens = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return calibration_ids(tokens, options.rows, options.length)


def _own() -> Iterator[str]:
    """Training texts in English and Chinese, those that every installation has."""
    for source in CALIBRATION:
        yield from (document.text for document in islice(corpus("train", [source]), _DOCUMENTS))


def _files(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except OSError as error:
            raise QuantError(f"{file}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise QuantError(f"{file}: byte {error.start} is not UTF-8") from None
