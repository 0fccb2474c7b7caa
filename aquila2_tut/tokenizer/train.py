"""Training vocabularies on a text of one's own, three ways, with the number of tokens as the knob.

Byte-level BPE is what Aquila2 and GPT-2 use. SentencePiece, which Llama 2 and Baichuan use, starts from characters and
treats a space as one of them; what its characters do not cover falls back to bytes. Its BPE merges as ours does; its
unigram model goes the other way and drops, from far too many candidates, those that the text misses least.

All three are deterministic: the same texts and size give the same vocabulary.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from aquila2_tut.tokenizer.aquila import AQUILA_CONTROL, AQUILA_ROLES
from aquila2_tut.tokenizer.bpe import TokenizerError, repair

LONGEST_SENTENCE = 1 << 24  # bytes; SentencePiece's own limit of 4,192 leaves longer ones out, silently


@dataclass(frozen=True)
class TextTokenizer:
    """What a comparison needs of a tokenizer, whatever library is behind it.

    Args:
        name: as figures show it.
        vocab_size: tokens, control tokens included if its file has them.
        encode: text -> ids, without bos or eos.
        decode: ids -> text.
        licence: of the vocabulary; empty for one that was trained here.
    """

    name: str
    vocab_size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    licence: str = ""


def train_byte_level(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE, learned by the Rust code of `tokenizers`: the same merges as `BytePairEncoding.train`.

    Args:
        texts: the training texts.
        vocab_size: tokens to learn, the 256 bytes among them; fewer if the texts do not have as many.

    Raises:
        TokenizerError: `vocab_size` is below 256.
    """
    if vocab_size < 256:
        raise TokenizerError(f"a vocabulary of {vocab_size} tokens cannot hold the 256 bytes: ask for 256 or more")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(map(repair, texts), trainer)
    return wrap_backend("byte-level BPE", backend)


def train_sentencepiece_bpe(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """SentencePiece's BPE with byte fallback. See `train_tokenizer` for what it takes and raises."""
    return _train_sentencepiece("SentencePiece BPE", texts, vocab_size, model_type="bpe")


def train_sentencepiece_unigram(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """SentencePiece's unigram model with byte fallback. See `train_tokenizer` for what it takes and raises."""
    return _train_sentencepiece("SentencePiece unigram", texts, vocab_size, model_type="unigram")


TRAINERS: dict[str, Callable[[Iterable[str], int], TextTokenizer]] = {
    "byte-level": train_byte_level,
    "sentencepiece-bpe": train_sentencepiece_bpe,
    "sentencepiece-unigram": train_sentencepiece_unigram,
}


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a vocabulary.

    Args:
        kind: a key of `TRAINERS`.
        texts: the training texts.
        vocab_size: tokens to learn; fewer if the texts do not have as many. The 256 bytes are among them, and for
            SentencePiece three control tokens and the characters that make up 99.95 % of the texts.

    Raises:
        TokenizerError: an unknown kind, or a size too small to hold what every vocabulary of that kind holds.
    """
    if kind not in TRAINERS:
        raise TokenizerError(f"there is no kind of tokenizer {kind!r}; known: {', '.join(TRAINERS)}")
    return TRAINERS[kind](texts, vocab_size)


def wrap_backend(name: str, backend: Tokenizer, licence: str = "") -> TextTokenizer:
    """A tokenizer of the Rust library as a `TextTokenizer` in which typed text is text."""
    backend.encode_special_tokens = True
    return TextTokenizer(
        name=name,
        vocab_size=backend.get_vocab_size(),
        encode=lambda text: backend.encode(repair(text), add_special_tokens=False).ids,
        decode=lambda ids: backend.decode(list(ids), skip_special_tokens=False),
        licence=licence,
    )


def wrap_sentencepiece(name: str, processor: Any, licence: str = "") -> TextTokenizer:
    """A ``sentencepiece.SentencePieceProcessor`` as a `TextTokenizer`."""
    return TextTokenizer(
        name=name,
        vocab_size=processor.get_piece_size(),
        encode=lambda text: processor.encode(repair(text)),
        decode=lambda ids: processor.decode(list(ids)),
        licence=licence,
    )


def _train_sentencepiece(name: str, texts: Iterable[str], vocab_size: int, *, model_type: str) -> TextTokenizer:
    """SentencePiece told to leave the text as it is. (One character is lost: its sign for a space, U+2581.)"""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(repair(text) for text in texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            max_sentence_length=LONGEST_SENTENCE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        least = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        why = f"their characters and the bytes alone are {least.group(1)}" if least else str(error)
        raise TokenizerError(f"SentencePiece cannot learn {vocab_size} tokens from these texts: {why}") from error
    return wrap_sentencepiece(name, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))


def train_aquila_like(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A vocabulary laid out as Aquila's: <|endoftext|> first, what was learned, the eight control tokens last.

    Args:
        texts: the training texts.
        vocab_size: tokens in all, V; fewer if the texts do not have as many.

    Returns:
        What ``save`` writes as the tokenizer.json that `load_tokenizer` opens.

    Raises:
        TokenizerError: `vocab_size` is below 265, the 256 bytes and the control tokens.
    """
    least = 256 + 1 + len(AQUILA_CONTROL)
    if vocab_size < least:
        raise TokenizerError(f"a vocabulary of {vocab_size} tokens cannot hold bytes and control tokens: {least} can")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(AQUILA_CONTROL),
        special_tokens=[AQUILA_ROLES["pad"]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(map(repair, texts), trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in AQUILA_CONTROL])
    return backend
