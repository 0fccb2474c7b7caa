"""The real vocabularies: Aquila's 100,008 tokens, and SmolLM2's 49,152.

Both are byte-level byte-pair encodings. This module reads the vocabulary and the merges, and hands them to the Rust
code of `tokenizers`; `aquila2_tut.tokenizer.bpe` does the same work in Python, to be read.

One rule differs from what is common: typed text is text. ``tokenizer("</s>")`` gives the ids of four characters, not
the token that ends an answer. Whoever writes control tokens on purpose says so with `encode_trusted`.

Environment:
    TOKENIZERS_PARALLELISM: "false" makes `encode_batch` use one thread; otherwise it uses every core.
    RAYON_NUM_THREADS: how many threads instead. It is read once, when the first batch is encoded.

Source: FlagAI's examples/Aquila/Aquila-tokenizer-hf for ids and roles; SmolLM2's tokenizer.json for its pre-
tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from aquila2_tut import assets
from aquila2_tut.config import PRESETS, ConfigError, resolve_preset_name
from aquila2_tut.gguf import GGUFFile
from aquila2_tut.tokenizer.bpe import TokenizerError, read_json, read_merges, repair

# The eight tokens after the 100,000 of vocab.json, in the order of their ids.
AQUILA_CONTROL = (
    "<|startofpiece|>",
    "<|endofpiece|>",
    "<|LDWANG|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "[CLS]",
    "</s>",
)
AQUILA_ROLES = {"bos": "[CLS]", "eos": "</s>", "pad": "<|endoftext|>", "unk": "<|endoftext|>"}
AQUILA_BASE_SIZE = 100_000
ASSET_BY_VOCAB_SIZE = {100_008: "aquila-tokenizer", 49_152: "smollm2-135m"}
_CONTROL_SHAPE = re.compile(r"<\|[^|<>]+\|>")
_GGML_NORMAL = 1


def load_tokenizer(
    name_or_folder: str | Path = "Aquila2-7B",
    *,
    padding_side: str = "right",
    model_max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """The tokenizer of a model.

    No bos or eos is added by itself, decoding gives back the text exactly, and typed text never becomes a control
    token. (SmolLM2's vocabulary lacks a few bytes that ordinary text never has, such as the control character 0x1D;
    these are lost, as they are in its own tokenizer.)

    Args:
        name_or_folder: a model name such as "Aquila2-7B" or "SmolLM2-135M" in any letter case; a folder that holds
            tokenizer.json, or vocab.json and merges.txt; or a .gguf file.
        padding_side: "right", as training wants it, or "left" for generating in batches.
        model_max_length: tokens after which ``truncation=True`` cuts; no limit when not given.

    Raises:
        TokenizerError: no such model or folder, a broken file, or a vocabulary that comes only with its checkpoint.
        AssetError: the vocabulary has not been fetched yet; the message gives the command.
    """
    place = Path(name_or_folder)
    if not place.exists():
        place = assets.shipped(str(name_or_folder)) or place
    if place.is_dir():
        backend, roles = _from_folder(place)
    elif place.suffix == ".gguf":
        backend, roles = _from_gguf(place)
    else:
        backend, roles = _from_gguf(assets.path(_asset_of(str(name_or_folder))))
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    return _wrap(backend, roles, padding_side=padding_side, **limit)


def encode_trusted(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode text in which control tokens are meant: "</s>" becomes the one id that ends an answer.

    Only for text that the program wrote itself. A prompt that contains a user's words goes through a chat template.
    """
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids


def encode_batch(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The ids of many texts at once: the quick way through a corpus.

    The same ids as ``tokenizer(texts).input_ids``, but nothing is built around them: the Rust code gets the whole
    batch, spreads it over its threads (see the environment variables above) and counts no characters for offsets.

    Args:
        tokenizer: what `load_tokenizer` gives.
        texts: typed text, in which no control token is meant. Halves of UTF-16 pairs, which Rust cannot take, are
            replaced as `repair` does it.

    Returns:
        One list of ids a text, neither padded nor cut, without bos or eos.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    except TypeError:  # how the Rust library says that a string is no UTF-8
        encodings = backend.encode_batch_fast([repair(text) for text in texts], add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _asset_of(name: str) -> str:
    """The asset that holds the vocabulary of a named model."""
    try:
        known = resolve_preset_name(name)
    except ConfigError as error:
        raise TokenizerError(f"{name!r} is neither a folder nor a .gguf file, and {error}") from error
    size = PRESETS[known].get("vocab_size", 100_008)
    if size not in ASSET_BY_VOCAB_SIZE:
        raise TokenizerError(
            f"{known} uses a vocabulary of {size:,} tokens that is published only inside its checkpoint: "
            "fetch the checkpoint and give its folder, load_tokenizer('path/to/the/folder')"
        )
    return ASSET_BY_VOCAB_SIZE[size]


def _from_gguf(file: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Read the vocabulary out of a GGUF file's header."""
    with GGUFFile(file) as gguf:
        data = gguf.metadata
    tokens, kinds = data.get("tokenizer.ggml.tokens"), data.get("tokenizer.ggml.token_type")
    if data.get("tokenizer.ggml.model") != "gpt2" or not tokens or not kinds:
        raise TokenizerError(f"{file}: holds no byte-level BPE vocabulary (tokenizer.ggml.model must be 'gpt2')")
    merges = [tuple(merge.split(" ")) for merge in data["tokenizer.ggml.merges"]]
    control = [
        token for token, kind in zip(tokens, kinds, strict=True) if kind != _GGML_NORMAL or _looks_control(token)
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = _byte_level_bpe(vocab, merges, control, split_digits=_splits_digits(data, file), where=file)
    if all(token in vocab for token in AQUILA_CONTROL):
        return backend, AQUILA_ROLES  # the file's own bos and eos, 0 and 0, are wrong
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {role: data.get(f"tokenizer.ggml.{key}_token_id") for role, key in keys.items()}
    return backend, {role: tokens[index] for role, index in ids.items() if index is not None}


def _splits_digits(data: Mapping[str, Any], file: Path) -> bool:
    """Whether every digit is a piece of its own. Older files name no pre-tokenizer and mean GPT-2's."""
    name = data.get("tokenizer.ggml.pre", "gpt-2")
    if name not in ("gpt-2", "gpt2", "default", "smollm"):
        raise TokenizerError(f"{file}: the pre-tokenizer {name!r} is not known here (known: gpt-2, smollm)")
    return name == "smollm"


def _from_folder(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Read tokenizer.json, or vocab.json and merges.txt."""
    if (folder / "tokenizer.json").is_file():
        backend = _from_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _from_vocab_and_merges(folder)
    else:
        raise TokenizerError(f"{folder}: holds neither tokenizer.json nor both of vocab.json and merges.txt")
    return backend, _roles_in_folder(folder, backend)


def _from_tokenizer_json(file: Path) -> Tokenizer:
    """Open a tokenizer.json, and mark its control tokens as such: BAAI's files leave them ordinary."""
    data = read_json(file)
    for token in data.get("added_tokens", []):
        if _looks_control(token["content"]):
            token.update(special=True, normalized=False)
    try:
        return Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{file}: not a tokenizer file: {error}. Fetch it again.") from error


def _from_vocab_and_merges(folder: Path) -> Tokenizer:
    vocab = read_json(folder / "vocab.json")
    if len(vocab) == AQUILA_BASE_SIZE:
        vocab |= {token: AQUILA_BASE_SIZE + index for index, token in enumerate(AQUILA_CONTROL)}
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise TokenizerError(f"{folder / 'vocab.json'}: the ids are not 0 to {len(vocab) - 1}, each once")
    merges = read_merges(folder / "merges.txt")
    control = sorted(filter(_looks_control, vocab), key=vocab.__getitem__)
    return _byte_level_bpe(vocab, merges, control, split_digits=False, where=folder)


def _looks_control(token: str) -> bool:
    return token in AQUILA_CONTROL or _CONTROL_SHAPE.fullmatch(token) is not None


def _byte_level_bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    control: Iterable[str],
    *,
    split_digits: bool,
    where: Path,
) -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting pattern; SmolLM2 also takes digits one by one before it."""
    for left, right in merges:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise TokenizerError(
                f"{where}: vocabulary and merges do not belong together: {left!r} + {right!r} is a merge, "
                "but one of the three is no token"
            )
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level]) if digits else byte_level
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return backend


def _roles_in_folder(folder: Path, backend: Tokenizer) -> dict[str, str]:
    """Which token begins, ends, pads: first from the ids in the model's own files, then from the tokenizer's.

    The order matters: the tokenizer files of some released chat models name "<|endoftext|>" as eos, and the config.json
    of the first generation names id 2, which is a quotation mark. So an id counts only if it is a control token.
    """
    special = {index: token.content for index, token in backend.get_added_tokens_decoder().items() if token.special}
    roles: dict[str, str] = {}
    for source in ("tokenizer_config.json", "config.json", "generation_config.json"):
        if (folder / source).is_file():
            roles |= _roles_in_file(read_json(folder / source), special)
    if set(AQUILA_CONTROL) <= set(special.values()):
        return {**AQUILA_ROLES, **roles}
    return roles


def _roles_in_file(data: Mapping[str, Any], special: Mapping[int, str]) -> dict[str, str]:
    """The roles that one JSON file gives, by token ("eos_token") or by id ("eos_token_id")."""
    roles = {}
    for role in AQUILA_ROLES:
        token, index = data.get(f"{role}_token"), data.get(f"{role}_token_id")
        token = token.get("content") if isinstance(token, dict) else token
        index = index[0] if isinstance(index, list) and index else index
        found = special.get(index) if isinstance(index, int) else token
        if found in special.values():
            roles[role] = found
    return roles


def _wrap(backend: Tokenizer, roles: Mapping[str, str], **options: Any) -> PreTrainedTokenizerFast:
    """Put the transformers interface around a tokenizer of the Rust library."""
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=[token for token in special if token not in roles.values()],
        clean_up_tokenization_spaces=False,  # True would delete the space in "a ,"
        split_special_tokens=True,  # typed text is text
        **{f"{role}_token": token for role, token in roles.items()},
        **options,
    )
