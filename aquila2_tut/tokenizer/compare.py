"""How well a vocabulary fits a text: characters a token, bytes a token, and what Chinese costs against English.

The vocabularies of other models come from the assets. Each belongs to its owner and is only measured here; its licence
stands in the manifest and in every `TextTokenizer`.

Source: the splitting patterns and the rules for digits are those that the owners publish with their tokenizers.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from aquila2_tut import assets
from aquila2_tut.gguf import GGUFFile
from aquila2_tut.tokenizer.bpe import TokenizerError, to_letters
from aquila2_tut.tokenizer.train import TextTokenizer, wrap_backend, wrap_sentencepiece

_GGML_CONTROL, _GGML_BYTE = 3, 6
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BREAKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BREAKS}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BREAKS}"
)
# DeepSeek's first pattern lists the letters that have an upper and a lower case one by one; here they are classes.
_DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
)


@dataclass(frozen=True)
class Vocabulary:
    """Where a model's vocabulary comes from and how it is read.

    Args:
        asset: its name in the manifest.
        patterns: regular expressions that cut the text, one after another; none stands for GPT-2's.
        single_digits: whether every digit is cut off before GPT-2's pattern, or after the others.
        composed: whether the text is brought into Unicode's composed form (NFC) first.
    """

    asset: str
    patterns: tuple[str, ...] = ()
    single_digits: bool = False
    composed: bool = False


VOCABULARIES: dict[str, Vocabulary] = {
    "Aquila": Vocabulary("aquila-tokenizer"),
    "GPT-2": Vocabulary("gpt2-tokenizer"),
    "SmolLM2": Vocabulary("smollm2-135m", single_digits=True),
    "Llama 2": Vocabulary("llama2-tokenizer"),
    "Mistral v1": Vocabulary("mistral-tokenizer"),
    "Baichuan": Vocabulary("baichuan-tokenizer"),
    "Llama 3": Vocabulary("llama3-tokenizer", (_LLAMA3,)),
    "Tekken": Vocabulary("tekken-tokenizer"),
    "Command-R": Vocabulary("command-r-tokenizer", single_digits=True, composed=True),
    "DeepSeek-LLM": Vocabulary("deepseek-llm-tokenizer", _DEEPSEEK_LLM, single_digits=True),
    "DeepSeek-V4": Vocabulary("deepseek-v4-tokenizer"),
    "Qwen2": Vocabulary("qwen2-tokenizer", (_QWEN2,), composed=True),
    "Qwen3.6": Vocabulary("qwen36-tokenizer", (_QWEN35,), composed=True),
}


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compression:
    """How many tokens a text becomes.

    Args:
        tokenizer: its name.
        vocab_size: its tokens.
        text: what the text is called.
        characters: Unicode characters of the text.
        bytes: bytes of the text in UTF-8.
        tokens: ids that it becomes.
    """

    tokenizer: str
    vocab_size: int
    text: str
    characters: int
    bytes: int
    tokens: int

    @property
    def characters_per_token(self) -> float:
        """The more, the shorter the sequence that the model has to read."""
        return self.characters / self.tokens

    @property
    def bytes_per_token(self) -> float:
        """As `characters_per_token`, but a Chinese character counts three."""
        return self.bytes / self.tokens


@dataclass(frozen=True)
class Parallel:
    """The same sentences in English and Chinese under one tokenizer."""

    english: Compression
    chinese: Compression

    @property
    def tokenizer(self) -> str:
        """The tokenizer's name."""
        return self.english.tokenizer

    @property
    def ratio(self) -> float:
        """Tokens of the Chinese text for one token of the English: what it costs to say the same thing."""
        return self.chinese.tokens / self.english.tokens


def measure(tokenizer: TextTokenizer, texts: Iterable[str], name: str = "") -> Compression:
    """Encode texts one by one and count.

    Args:
        tokenizer: from `open_vocabulary` or `train_tokenizer`.
        texts: at least one character in all.
        name: what the text is called in a figure.

    Raises:
        TokenizerError: the texts are empty.
    """
    texts = list(texts)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    if not tokens:
        raise TokenizerError(f"{tokenizer.name}: there is nothing to measure, the texts are empty")
    size = sum(len(text.encode(errors="replace")) for text in texts)
    return Compression(tokenizer.name, tokenizer.vocab_size, name, sum(map(len, texts)), size, tokens)


def measure_parallel(tokenizer: TextTokenizer, pairs: Sequence[tuple[str, str]]) -> Parallel:
    """Measure sentences that say the same in two languages.

    Args:
        tokenizer: from `open_vocabulary` or `train_tokenizer`.
        pairs: (English, Chinese).
    """
    english, chinese = zip(*pairs, strict=True)
    return Parallel(measure(tokenizer, english, "en"), measure(tokenizer, chinese, "zh"))


def embedding_bytes(vocab_size: int, hidden_size: int, *, bytes_per_weight: int = 2, tied: bool = False) -> int:
    """Memory that a vocabulary costs a model: a row in the embedding and one in the output layer for each token.

    Args:
        vocab_size: tokens.
        hidden_size: width of the model, C.
        bytes_per_weight: 2 for bfloat16 and float16, 4 for float32.
        tied: whether both layers are one.

    Returns:
        Bytes.
    """
    return (1 if tied else 2) * vocab_size * hidden_size * bytes_per_weight


# --- opening the vocabularies ----------------------------------------------------------------------------------------


def open_vocabulary(name: str) -> TextTokenizer:
    """A model's tokenizer, for typed text.

    Args:
        name: a key of `VOCABULARIES`.

    Raises:
        TokenizerError: no such name.
        AssetError: the vocabulary has not been fetched yet; the message gives the command.
    """
    if name not in VOCABULARIES:
        raise TokenizerError(f"there is no vocabulary {name!r} to compare with; known: {', '.join(VOCABULARIES)}")
    entry = VOCABULARIES[name]
    file, licence = assets.path(entry.asset), assets.lookup(entry.asset).licence
    if file.name.endswith(".model.v1"):
        return _from_sentencepiece(name, file, licence)
    return wrap_backend(name, _backend(file, entry), licence)


def _backend(file: Path, entry: Vocabulary) -> Tokenizer:
    if file.name == "tokenizer.json":
        return Tokenizer.from_file(str(file))
    if file.suffix == ".tiktoken":
        return _from_ranks(_read_tiktoken(file), entry)
    if file.suffix == ".json":
        return _from_ranks(*_read_tekken(file, entry))
    return _from_gguf(file, entry)


def _from_sentencepiece(name: str, file: Path, licence: str) -> TextTokenizer:
    import sentencepiece

    return wrap_sentencepiece(name, sentencepiece.SentencePieceProcessor(model_file=str(file)), licence)


def _from_gguf(file: Path, entry: Vocabulary) -> Tokenizer:
    with GGUFFile(file) as gguf:
        data = gguf.metadata
    tokens, kinds = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    if data["tokenizer.ggml.model"] == "llama":
        scores = data["tokenizer.ggml.scores"]
        plain = {
            token: scores[index] for token, index in vocab.items() if kinds[index] not in (_GGML_CONTROL, _GGML_BYTE)
        }
        return _sentencepiece_bpe(vocab, plain)
    merges = [tuple(merge.split(" ")) for merge in data["tokenizer.ggml.merges"]]
    return _byte_level(vocab, merges, entry)


def _sentencepiece_bpe(vocab: Mapping[str, int], scores: Mapping[str, float]) -> Tokenizer:
    """SentencePiece's BPE: of all neighbours that make a token, those of the best score are merged first."""
    best_first = sorted(scores, key=lambda token: -scores[token])
    merges = merges_of({token: rank for rank, token in enumerate(best_first)})
    model = models.BPE(vocab=dict(vocab), merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _read_tiktoken(file: Path) -> dict[str, int]:
    """Lines of a token in base64 and its rank; the tokens come back in letters."""
    lines = file.read_text(encoding="ascii").splitlines()
    return {to_letters(base64.b64decode(token)): int(rank) for token, rank in map(str.split, lines)}


def _read_tekken(file: Path, entry: Vocabulary) -> tuple[dict[str, int], Vocabulary]:
    """Mistral's own format; it holds more tokens than the models use, and its pattern."""
    data = json.loads(file.read_text(encoding="utf-8"))
    used = data["config"]["default_vocab_size"] - data["config"]["default_num_special_tokens"]
    ranks = {to_letters(base64.b64decode(token["token_bytes"])): token["rank"] for token in data["vocab"][:used]}
    return ranks, Vocabulary(entry.asset, (data["config"]["pattern"],))


def _from_ranks(ranks: Mapping[str, int], entry: Vocabulary) -> Tokenizer:
    """A vocabulary of which only the order of the tokens is known, as tiktoken keeps it."""
    return _byte_level(ranks, merges_of(ranks), entry)


def merges_of(ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges of a vocabulary that says only which token comes first: every way to make a token of two others."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        ways = [
            (left, right)
            for cut in range(1, len(token))
            if (left := token[:cut]) in ranks and (right := token[cut:]) in ranks
        ]
        merges += sorted(ways, key=lambda way: (ranks[way[0]], ranks[way[1]])) if len(ways) > 1 else ways
    return merges


def _byte_level(vocab: Mapping[str, int], merges: list[tuple[str, str]], entry: Vocabulary) -> Tokenizer:
    # A word that is a token needs no merges: so tiktoken and Llama 3 have it, and for the others it is the same.
    backend = Tokenizer(models.BPE(vocab=dict(vocab), merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(_cuts(entry))
    backend.decoder = decoders.ByteLevel()
    if entry.composed:
        backend.normalizer = normalizers.NFC()
    return backend


def _cuts(entry: Vocabulary) -> list[pre_tokenizers.PreTokenizer]:
    """The steps that cut a text into words."""
    own = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in entry.patterns]
    digits = [pre_tokenizers.Digits(individual_digits=True)] if entry.single_digits else []
    return [*own, *digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not own)]
