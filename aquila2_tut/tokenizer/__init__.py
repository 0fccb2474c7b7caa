"""Tokenizers: the vocabularies of the Aquila2 models and of SmolLM2, byte-pair encoding from scratch, comparisons."""

from aquila2_tut.tokenizer.aquila import encode_batch, encode_trusted, load_tokenizer
from aquila2_tut.tokenizer.bpe import BytePairEncoding, TokenizerError

__all__ = ["BytePairEncoding", "TokenizerError", "encode_batch", "encode_trusted", "load_tokenizer"]
