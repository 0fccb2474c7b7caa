"""The token viewer: a text and its tokens, in colour, with their ids."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import traitlets
from transformers import PreTrainedTokenizerBase

from aquila2_tut.show.plots import label
from aquila2_tut.tokenizer import encode_trusted, load_tokenizer
from aquila2_tut.tokenizer.aquila import AQUILA_BASE_SIZE, AQUILA_CONTROL
from aquila2_tut.tokenizer.bpe import to_bytes

from .base import BookWidget, escape

VOCABULARY_FILE = "aquila_vocab.js"
_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_FIRST_MERGE = 257
_SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥"}

Shown = tuple[int, str, bool]  # id, bytes in hex, whether it is a control token


def pieces(tokenizer: PreTrainedTokenizerBase, text: str, trusted: bool = False) -> list[Shown]:
    """The tokens of a text as the viewer shows them.

    Args:
        tokenizer: a byte-level one, from `load_tokenizer`.
        text: what was typed.
        trusted: whether control tokens in it are meant.

    Returns:
        For each token its id, its bytes in hex, and whether it is a control token.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = encode_trusted(tokenizer, text) if trusted else tokenizer(text, add_special_tokens=False).input_ids
    control = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [(index, to_bytes(token).hex(), index in control) for index, token in zip(ids, tokens, strict=True)]


def visible(data: bytes) -> str:
    """A token as it can be seen: signs for white space, code points for the invisible, hex for parts of characters."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return data.hex(" ").upper()
    return "".join(_SIGNS.get(c) or (f"U+{ord(c):04X}" if _hidden(c, at) else c) for at, c in enumerate(text))


def _hidden(character: str, at: int) -> bool:
    kind = unicodedata.category(character)[0]
    return kind in "CZ" or (kind == "M" and at == 0)  # a mark needs a letter before it


class TokenViewer(BookWidget):
    """See `token_viewer`."""

    widget = "token_viewer"
    state = ("text", "trusted", "pieces", "examples", "words", "vocabulary")

    text = traitlets.Unicode().tag(sync=True)
    trusted = traitlets.Bool(False).tag(sync=True)
    pieces = traitlets.List().tag(sync=True)
    examples = traitlets.List().tag(sync=True)
    words = traitlets.Dict().tag(sync=True)
    vocabulary = traitlets.Unicode().tag(sync=True)  # the file that a page loads it from; without one it stands still

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        whole = tuple(tokenizer.convert_ids_to_tokens(range(AQUILA_BASE_SIZE, len(tokenizer)))) == AQUILA_CONTROL
        super().__init__(
            text=text,
            pieces=pieces(tokenizer, text),
            examples=_examples(),
            words=_words(),
            vocabulary=VOCABULARY_FILE if whole else "",
        )
        self._tokenizer = tokenizer
        self.observe(self._cut, ["text", "trusted"])

    def _cut(self, _change: object) -> None:
        self.pieces = pieces(self._tokenizer, self.text, self.trusted)

    def counts(self) -> str:
        """How many tokens, characters and bytes there are."""
        size = sum(len(data) // 2 for _, data, _ in self.pieces)
        each = f"{len(self.text) / len(self.pieces):.2f}" if self.pieces else "–"
        counts = {"tokens": len(self.pieces), "characters": len(self.text), "bytes": size}
        return self.words["counts"].format(each=each, **{key: f"{n:,}" for key, n in counts.items()})

    def first_look(self) -> str:
        """The tokens as a list, and the counts."""
        tokens = "".join(_token_html(at, *piece) for at, piece in enumerate(self.pieces))
        name = escape(self.words["tokens"])
        listing = f'<div class="tokens" role="list" aria-label="{name}">{tokens}</div>'
        return f'{listing}<p class="counts">{self.counts()}</p>'

    def title(self) -> str:
        """The counts."""
        return self.counts()


def _token_html(at: int, index: int, data: str, control: bool) -> str:
    raw = bytes.fromhex(data)
    part = raw.decode(errors="ignore").encode() != raw
    kinds = f"token c{at % 5}{' part' if part else ''}{' control' if control else ''}"
    gap = "<br>" if b"\n" in raw and not part else " "
    return f'<span class="{kinds}" role="listitem">{escape(visible(raw))}<sub>{index}</sub></span>{gap}'


def token_viewer(text: str = "", name: str = "Aquila2-7B") -> TokenViewer:
    """Show a text as coloured tokens with their ids; the reader can type another.

    In Jupyter any vocabulary follows the reader's typing; in the book's pages Aquila's does, and others stand still.

    Args:
        text: what stands there first.
        name: what `load_tokenizer` takes: the name of a model, a folder, a .gguf file.
    """
    default = label("The tokenizer cuts before the model reads.", "模型读到的不是字，而是词元。")
    return TokenViewer(text or default, load_tokenizer(name))


def _examples() -> list[tuple[str, str]]:
    """Texts to begin with, and what their buttons say."""
    return [
        ("English", "It's unbelievable: antidisestablishmentarianism has 28 letters, and 3.14159 isn't one token."),
        ("中文", "北京的十大景点是什么？人工智能正在改变世界，而模型读到的只是一串编号。"),
        (label("Code", "代码"), "def area(r):\n    return 3.14159 * r ** 2\n"),
        (label("Rare characters", "生僻字与表情"), "𰻝𰻝面 龘 🦅 👩‍🔬 e\u0301"),
        (label("Control tokens", "控制词元"), "<|startofpiece|>Hello!<|endofpiece|>Hi!</s>"),
    ]


def _words() -> dict[str, str]:
    """What the viewer says, in the language of the page."""
    return {
        "type": label("Type or paste a text", "输入或粘贴一段文字"),
        "examples": label("Examples", "示例"),
        "tokens": label("Tokens", "词元"),
        "trusted": label("control tokens count (trusted text)", "识别控制词元（可信文本）"),
        "counts": label(
            "{tokens} tokens · {characters} characters · {bytes} bytes · {each} characters per token",
            "{tokens} 个词元 · {characters} 个字符 · {bytes} 个字节 · 平均每个词元 {each} 个字符",
        ),
        "loading": label("The vocabulary is being loaded (0.6 MB) …", "正在载入词表（0.6 MB）……"),
        "failed": label("The vocabulary could not be loaded.", "词表载入失败。"),
    }


# ---------- the vocabulary for the browser ----------


def vocabulary_script(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> str:
    """Aquila's vocabulary as a classic script, which a page may load even from a file.

    Its ids follow the order of its merges, so the merges are all there is to write: six base64 digits each, three for
    the left id and three for the right.

    Args:
        tokens: all 100,008, in the order of their ids.
        merges: pairs of tokens in the order in which they were learned.

    Raises:
        ValueError: the ids of some vocabulary do not follow its merges.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    if any(ids[left + right] != _FIRST_MERGE + n for n, (left, right) in enumerate(merges)):
        raise ValueError("this form of a vocabulary needs ids in the order of the merges, as Aquila's are")
    packed = "".join(_three_digits(ids[left]) + _three_digits(ids[right]) for left, right in merges)
    control = {token: ids[token] for token in (tokens[0], *AQUILA_CONTROL)}
    data: dict[str, Any] = {"control": control, "merges": packed}
    return f"{_NOTICE}globalThis.AQUILA_VOCABULARY = {json.dumps(data)};\n"


_NOTICE = """\
// Aquila's vocabulary, for the token viewer. It is BAAI's, published in the FlagAI repository under Apache-2.0
// (https://github.com/FlagAI-Open/FlagAI). Taken from the copy in llama.cpp (MIT), and only written in another form.
"""


def _three_digits(number: int) -> str:
    return _BASE64[number >> 12] + _BASE64[number >> 6 & 63] + _BASE64[number & 63]
