"""What is learned from a conversation: published masks, 5,000 random conversations.

What the original loses is in test_upstream_defects.py.
"""

import html.parser
import json
import random
import re
from functools import cache

import pytest

from aquila2_tut import assets, cli
from aquila2_tut.chat import TemplateError, get_template, template_names
from aquila2_tut.data import DataError, MaskReport, encode_conversation, mask_report
from aquila2_tut.data.masking import mask_pieces, show_in_terminal
from aquila2_tut.show import show_mask
from aquila2_tut.tokenizer import load_tokenizer

COLOURS = ("What are the three primary colors?", "The three primary colors are red, blue, and yellow.")
SIGHTS = ("北京的十大景点是什么?", "天安门广场、故宫、颐和园。")


@cache
def tokenizer_of(name):
    try:
        return load_tokenizer(name)
    except assets.AssetError as error:
        pytest.skip(f"asset not fetched: {error}")


def tokenizer_for(template):
    return tokenizer_of("SmolLM2-135M" if template == "chatml" else "Aquila2-7B")


def sample(*texts, identifier="1"):
    turns = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]
    return {"id": identifier, "conversations": turns}


def trained(encoded):
    return [at for at, label in enumerate(encoded["labels"]) if label != -100]


# Published masks


@pytest.mark.parametrize(
    ("template", "texts", "first", "last", "length"),
    [
        ("aquila-v1", COLOURS, 9, 21, 22),
        ("aquila-v1", SIGHTS, 7, 16, 17),
        ("aquila", COLOURS, 42, 54, 55),
        ("aquila", SIGHTS, 42, 51, 52),
    ],
)
def test_masks_are_those_measured_with_the_original(template, texts, first, last, length):
    """The original also learns the space at 41 of the last row; see test_upstream_defects.py."""
    encoded = encode_conversation(sample(*texts), tokenizer_of("Aquila2-7B"), template)
    assert trained(encoded) == list(range(first, last + 1))
    assert len(encoded["input_ids"]) == len(encoded["labels"]) == length
    assert all(encoded["labels"][at] == encoded["input_ids"][at] for at in trained(encoded))


# Random conversations

PIECES = [
    *("Hello", " world", "The colours are red", "naïve", "e\u0301", "don't", "x = 3.14", "e-mail@example.org", "A"),
    *("北京的十大景点", "天安门", "。", "，", "“引号”", "《红楼梦》", "１２", "龘", "你好"),
    *("🦅", "👩\u200d🔬", "🇨🇳", "✓", "\u200b", "ไทย", "שלום"),
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u3000", "."),
    *("###", "###Assistant:", "###Human: ", "### Assistant: ", "\n### Human: ", "#", "Assistant: ", ":"),
    *("</s>", "<|startofpiece|>", "<|endofpiece|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[CLS]", "</", "s>"),
]


def random_text(dice):
    return "".join(dice.choices(PIECES, k=dice.choice((0, 1, 1, 2, 3, 5, 9))))


def random_turns(dice):
    count = dice.choice((2, 2, 2, 3, 4, 5))
    return [(("human", "gpt")[at % 2], random_text(dice)) for at in range(count)]


def learned_runs(encoded, tokenizer):
    return [text for text, learned in mask_pieces(encoded, tokenizer) if learned]


@pytest.mark.parametrize("name", template_names())
def test_of_5000_conversations_the_answers_are_learned_and_nothing_else(name):
    """Against what generating does: the answer's tokens are those after the prompt, up to the token that ends it.

    In "aquila" and "aquila-chat" the prompt leaves a space to the answer: its first word has it in its first token, or
    it stands alone, and then it is not learned.
    """
    template, tokenizer = get_template(name), tokenizer_for(name)
    end = {"aquila-chat": "###", "chatml": "<|im_end|>"}.get(name, "</s>")
    leaves_space = name in ("aquila", "aquila-chat")
    dice = random.Random(name)
    for _ in range(5_000):
        turns = random_turns(dice)
        encoded = encode_conversation(sample(*(text for _, text in turns)), tokenizer, name)
        ids, labels = encoded["input_ids"], encoded["labels"]
        assert ids == template.encode(turns, tokenizer)
        answers = [text for role, text in turns if role == "gpt"]
        learned = learned_runs(encoded, tokenizer)
        assert len(learned) == len(answers)
        for text, answer in zip(learned, answers, strict=True):
            assert text == answer + end or (leaves_space and text == f" {answer}{end}")
        asked = dice.randrange(1, len(turns), 2)
        prompt = template.encode([*turns[:asked], ("gpt", None)], tokenizer)
        assert ids[: len(prompt)] == prompt
        skip = leaves_space and labels[len(prompt)] == -100
        assert not skip or tokenizer.decode(ids[len(prompt)]) == " "
        assert labels[len(prompt) - 1] == -100 and labels[len(prompt) + skip] != -100


@pytest.mark.parametrize("name", template_names())
def test_control_tokens_in_the_ids_are_the_templates_own(name):
    tokenizer = tokenizer_for(name)
    control = set(tokenizer.all_special_ids)

    def count(words):
        ids = encode_conversation(sample(words, words, words, words), tokenizer, name)["input_ids"]
        return [index for index in ids if index in control]

    assert count("".join(tokenizer.all_special_tokens)) == count("word")


# Cutting, errors


def test_a_long_conversation_is_cut_on_the_right_and_never_to_nothing():
    tokenizer = tokenizer_of("Aquila2-7B")
    whole = encode_conversation(sample(*COLOURS), tokenizer, "aquila-v1")
    for length in (10, 15, 22, 1000):
        cut = encode_conversation(sample(*COLOURS), tokenizer, "aquila-v1", max_length=length)
        assert cut == {key: values[:length] for key, values in whole.items()}
    with pytest.raises(DataError, match=r"sample '1': max_length=9 leaves nothing .* begins after 9 tokens; raise"):
        encode_conversation(sample(*COLOURS), tokenizer, "aquila-v1", max_length=9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (sample("Hello!"), "sample '1': there is no answer"),
        (sample(), "there is no answer"),
        ({"conversations": sample("Hi", "Ho")["conversations"][1:]}, "there is no answer"),
        ({"id": 7, "conversations": "Hello!"}, 'sample 7: "conversations" must be a list'),
        ({}, "must be a list"),
        ({"conversations": ["Hello!"]}, "must be a list"),
        (["Hello!"], "must be a list"),
        (sample("a", 7), r"turn 1 \(gpt\) is a int"),
        (sample("a", None, "b"), r"turn 1 \(gpt\) has no text"),
        ({"conversations": [{"from": "system", "value": "a"}]}, "role 'system'"),
        ({"conversations": [{"value": "a"}]}, "turn 0"),
        ({"conversations": [*sample("a")["conversations"] * 2]}, "turns 0 and 1 are both human"),
        (sample("a", "b\ud83d"), r"turn 1 \(gpt\) holds half a character .* position 1"),
        (sample("\udc00", "b"), r"turn 0 \(human\) holds half a character"),
    ],
)
def test_wrong_samples_are_refused_with_their_place(wrong, message):
    with pytest.raises(DataError, match=message):
        encode_conversation(wrong, tokenizer_of("Aquila2-7B"), "aquila-v1")


@pytest.mark.parametrize("length", [0, -1, 2.0, True, "10"])
def test_a_wrong_max_length_is_refused(length):
    with pytest.raises(DataError, match="max_length is .* at least 1"):
        encode_conversation(sample(*COLOURS), tokenizer_of("Aquila2-7B"), "aquila-v1", max_length=length)


def test_wrong_templates_are_refused():
    with pytest.raises(TemplateError, match="aquila-v9"):
        encode_conversation(sample(*COLOURS), tokenizer_of("Aquila2-7B"), "aquila-v9")
    with pytest.raises(TemplateError, match="startofpiece"):
        encode_conversation(sample(*COLOURS), tokenizer_of("SmolLM2-135M"), get_template("aquila-v1"))


def test_an_answer_at_the_beginning_is_skipped_and_an_empty_one_ends():
    tokenizer = tokenizer_of("Aquila2-7B")
    turns = [{"from": "gpt", "value": "Welcome!"}, *sample(*COLOURS)["conversations"]]
    assert encode_conversation({"conversations": turns}, tokenizer, "aquila-v1") == encode_conversation(
        sample(*COLOURS), tokenizer, "aquila-v1"
    )
    assert learned_runs(encode_conversation(sample("a", ""), tokenizer, "aquila-legacy"), tokenizer) == ["</s>"]


# To look at


def test_the_report_counts():
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [1, 2], "labels": [-100, -100]},
        {"input_ids": [0], "labels": [0]},
    ]
    assert mask_report(rows) == MaskReport(samples=3, tokens=6, trained_tokens=3, without_labels=1, longest=3)
    assert mask_report([]) == MaskReport(0, 0, 0, 0, 0)


EVIL = sample('a\x1b[2J<script>alert("1")</script>\u202e & b', "Hi\x07 </mark><b>\n  you")


def test_the_terminal_shows_what_is_learned_and_obeys_no_text():
    tokenizer = tokenizer_of("Aquila2-7B")
    encoded = encode_conversation(EVIL, tokenizer, "aquila-v1")
    plain = show_in_terminal(encoded, tokenizer, colour=False)
    assert plain.endswith("<|endofpiece|>«Hi </mark><b>\n  you</s>»")
    assert all(c.isprintable() or c == "\n" for c in plain)
    coloured = show_in_terminal(encoded, tokenizer)
    assert re.findall("\x1b[^m]*m", coloured) == ["\x1b[1;32m", "\x1b[0m"]
    assert re.sub("\x1b[^m]*m", "", coloured) == re.sub("[«»]", "", plain)


class Page(html.parser.HTMLParser):
    """The text of a page, marked and not, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.marked, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        self.tags.append("/" + tag)

    def handle_data(self, data):
        self.text.append(data)
        if self.tags[-1] == "mark":
            self.marked.append(data)


@pytest.mark.parametrize(("language", "legend"), {"en": "marked", "zh": "标出的部分"}.items())
def test_the_notebook_shows_what_is_learned_and_obeys_no_text(language, legend, shown, monkeypatch):
    from aquila2_tut.show import mask_view

    monkeypatch.setenv("AQUILA2_TUT_LANG", language)
    monkeypatch.setattr(mask_view, "display", lambda bundle, raw: shown.append(bundle))
    tokenizer = tokenizer_of("Aquila2-7B")
    encoded = encode_conversation(EVIL, tokenizer, "aquila-v1")
    show_mask(encoded, tokenizer)
    page = Page(shown[0]["text/html"])
    assert set(page.tags) == {"div", "/div", "p", "/p", "mark", "/mark"}
    assert page.marked == ["Hi[U+0007] </mark><b>\n  you</s>", legend]
    assert 'a[U+001B][2J<script>alert("1")</script>[U+202E] & b' in "".join(page.text)
    assert f"{len(trained(encoded))}" in page.text[-1]
    assert shown[0]["text/plain"] == show_in_terminal(encoded, tokenizer, colour=False)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_command_shows_the_first_ones_and_counts_all(language, tmp_path, capsys):
    tokenizer = tokenizer_of("Aquila2-7B")
    file = tmp_path / "a.json"
    texts = [COLOURS, SIGHTS, (*COLOURS, "Thanks."), ("a",), ("word " * 40, "b")]
    rows = [sample(*text, identifier=f"sample {at}") for at, text in enumerate(texts)]
    file.write_text(json.dumps(rows), encoding="utf-8")
    options = ["--model", "AquilaChat2-7B", "-n", "2", "--max-length", "30", "--lang", language]
    assert cli.main(["data", "show", str(file), *options]) == 1
    said = capsys.readouterr().out
    assert re.findall("--- (.*) ---", said) == ["sample 0", "sample 1"]
    assert "<|startofpiece|>What are the three primary colors?<|endofpiece|>«The three" in said
    report = mask_report(encode_conversation(row, tokenizer, "aquila-v1", 30) for row in rows[:3])
    assert (report.samples, report.without_labels) == (3, 0) and report.trained_tokens == 13 + 10 + 13
    assert re.findall(r"\d+", said.splitlines()[-4])[:3] == ["3", str(report.tokens), "36"]
    lost = said.splitlines()[-2:]
    assert "max_length=30" in lost[1] and str(file) in lost[0] and str(file) in lost[1]
    assert cli.main(["data", "show", str(file), *options[:2], "--template", "aquila-v9"]) == 2
    assert "aquila-v9" in capsys.readouterr().err
