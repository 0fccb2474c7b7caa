"""Tokenizers: the vocabularies of the Aquila2 models and of SmolLM2."""

from aquila2_tut.tokenizer.aquila import TokenizerError, encode_trusted, load_tokenizer

__all__ = ["TokenizerError", "encode_trusted", "load_tokenizer"]
