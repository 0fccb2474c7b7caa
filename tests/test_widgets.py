"""The widgets: what JavaScript computes is what Python computes, and the stored output needs neither."""

import json
import random
import re
import shutil

import nbformat
import pytest
from html_words import Words
from nbclient import NotebookClient

from aquila2_tut.show.widgets import token_viewer, tokens, vocabulary_script
from aquila2_tut.show.widgets.base import module_and_style

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MODULE, STYLE = module_and_style("token_viewer")
HAND_PICKED = [
    "",
    " ",
    "  \n\n\t x\r\n",
    "Hello, world!",
    "北京的十大景点是什么?",
    "I'm sure they'll say it's 'round 12,345.67",
    "def f(x):\n\treturn x ** 2  # square\n\n\n",
    "ﬁne ＡＢＣ　全角空格 ¼ ² Ⅷ ٣٤",
    "👩‍🔬🏳️‍🌈 e\u0301 \u0301x 🦅",
    "\ufeffBOM\u00a0nbsp\u2028line\u0085next\u200bzero",
    "x\ud83d y\udc00 \ud83d\ude00",
    "\x00\x07\x1b\x1c\x7f",
    "<|startofpiece|>Hello!<|endofpiece|>Hi!</s>[MASK][CLS]<|endoftext|>",
    "</s></s> [gMASK][sMASK] <|LDWANG|> < / s >",
    "a" * 3000,
    "的" * 1000,
    "𰻝龘𠮷" * 20,
    "ไทย हिन्दी العربية עברית 한국어 日本語 ελληνικά",
]


def random_texts(count, seed=20231013):
    """Texts that change script in the middle of words."""
    rng = random.Random(seed)
    blocks = [(32, 126), (0x4E00, 0x9FFF), (0x3000, 0x30FF), (0xA0, 0x24F), (0x370, 0x52F), (0x600, 0x6FF)]
    blocks += [(0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0x300, 0x36F), (0x2000, 0x206F), (0xAC00, 0xD7A3), (0, 0x1F)]
    words = ["the", " and", "'s", "'ll", "\n", "  ", "人工智能", "，", "。", "2024", " 3.14", "</s>"]
    words += ["[CLS]", "():", "_"]

    def piece():
        if rng.random() < 0.5:
            return rng.choice(words)
        first, last = rng.choice(blocks)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))

    return ["".join(piece() for _ in range(rng.randint(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return token_viewer()._tokenizer


@pytest.fixture(scope="module")
def script(tokenizer):
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return vocabulary_script(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), merges)


@pytest.fixture(scope="module")
def page(script):
    """A browser page in which `vocabulary` encodes and `visible` shows, from the widget's own module."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        pytest.skip("no Chromium on this machine; on Debian and Ubuntu: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(content=script)
        hand_over = "globalThis.vocabulary = new Vocabulary(AQUILA_VOCABULARY); globalThis.visible = visible;"
        page.add_script_tag(content=MODULE + hand_over, type="module")
        page.wait_for_function("!!globalThis.visible")
        yield page
        browser.close()


def run(page, code, values):
    """Values to JavaScript and back; as JSON in ASCII, so that broken surrogates survive."""
    return json.loads(page.evaluate(f"text => JSON.stringify(JSON.parse(text).map({code}))", json.dumps(values)))


@pytest.mark.parametrize("trusted", [False, True])
def test_javascript_encodes_as_python_does(page, tokenizer, trusted):
    texts = [*HAND_PICKED, *random_texts(400)]
    theirs = run(page, f"t => vocabulary.pieces(t, {str(trusted).lower()})", texts)
    for text, found in zip(texts, theirs, strict=True):
        assert [tuple(piece) for piece in found] == tokens.pieces(tokenizer, text, trusted), repr(text)


def test_tokens_look_the_same_from_both(page, tokenizer):
    data = sorted({piece[1] for text in [*HAND_PICKED, *random_texts(100)] for piece in tokens.pieces(tokenizer, text)})
    shown = run(page, "hex => visible(hex).label", data)
    assert shown == [tokens.visible(bytes.fromhex(item)) for item in data]


def test_typed_text_is_text_unless_it_is_trusted(tokenizer):
    text = "Hi!</s>"
    assert not any(control for _, _, control in tokens.pieces(tokenizer, text))
    assert tokens.pieces(tokenizer, text, trusted=True)[-1] == (100007, "3c2f733e", True)


def test_the_vocabulary_script_is_compact_and_says_whose_it_is(script):
    assert len(script) < 620_000
    assert "Apache-2.0" in script
    assert script.isascii()


def test_ids_that_do_not_follow_the_merges_are_refused():
    with pytest.raises(ValueError, match="order of the merges"):
        vocabulary_script(["a", "b", "ab"], [("a", "b")])


def test_the_stored_output_stands_without_scripts():
    text = "a < b & </script> 龘"
    stored = token_viewer(text).stored_html()
    assert stored == token_viewer(text).stored_html(), "the output differs from run to run"
    page = Words(stored)
    assert page.data["text"] == text
    assert page.data["pieces"][0] == [tokens.pieces(token_viewer()._tokenizer, "a")[0][0], "61", False]
    assert "␣<" in "".join(page.words)
    assert "model_id" not in stored


@pytest.mark.parametrize(("language", "word"), [("en", "characters per token"), ("zh", "个词元")])
def test_the_words_are_in_the_language_of_the_page(monkeypatch, language, word):
    monkeypatch.setenv("AQUILA2_TUT_LANG", language)
    assert word in token_viewer("人工智能").counts()
    assert "1 " in token_viewer("人工智能").counts()


def test_python_answers_when_the_text_changes():
    viewer = token_viewer("one")
    before = viewer.pieces
    viewer.text = "北京"
    assert viewer.pieces != before
    viewer.text, viewer.trusted = "</s>", True
    assert viewer.pieces == [(100007, "3c2f733e", True)]


def test_another_vocabulary_stands_still_on_a_page():
    assert token_viewer("Hello", "SmolLM2-135M").vocabulary == ""
    assert token_viewer("Hello").vocabulary == tokens.VOCABULARY_FILE


def test_jupyter_gets_the_live_widget_and_a_page_the_html():
    code = "from aquila2_tut.show.widgets import token_viewer\ntoken_viewer('Hello')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, kernel_name="python3").execute()
    data = notebook.cells[0].outputs[-1].data
    assert set(data) == {WIDGET_VIEW, "text/html", "text/plain"}
    assert re.search(r"tokens? · 5 characters", data["text/plain"])


def test_the_style_reaches_nothing_but_the_widget():
    rules = re.findall(r"(?:^|\}|\*/)\s*([^{}/]+)\{", STYLE)
    assert rules
    assert all(part.strip().startswith(".token-viewer") for rule in rules for part in rule.split(","))
