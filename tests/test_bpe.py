"""Byte-pair encoding in Python against the Rust library: merges learned, ids, places of tokens, decoded text."""

import ast
import json
import linecache
import pydoc_data.topics
import random
import unicodedata
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from aquila2_tut import assets
from aquila2_tut.data import dialogues, parallel_sentences
from aquila2_tut.tokenizer import BytePairEncoding, TokenizerError, bpe, encode_batch, load_tokenizer
from aquila2_tut.tokenizer.bpe import count_words, learn_merges, repair, replace_pair, to_bytes, to_letters

ROOT = Path(__file__).parent.parent


@cache
def own_text():
    """What the project wrote itself: the pages of the book, the README and the docstrings of the package."""
    pages = [*sorted(ROOT.glob("book/*/*.md")), *sorted(ROOT.glob("README*.md"))]
    texts = [file.read_text(encoding="utf-8") for file in pages]
    for file in sorted(ROOT.glob("aquila2_tut/**/*.py")):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        texts += [found for node in nodes if isinstance(node, kinds) and (found := ast.get_docstring(node))]
    return texts


def train_in_rust(texts, vocab_size):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend, [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [256, 257, 1000, 3000, 100_000])
def test_merges_learned_from_our_own_text_are_those_of_the_rust_library(vocab_size):
    texts = own_text()
    assert sum(map(len, texts)) > 30_000
    ours = BytePairEncoding.train(texts, vocab_size)
    backend, merges = train_in_rust(texts, vocab_size)
    assert ours.merges == merges
    assert ours.vocab == backend.get_vocab()
    for text in texts:
        assert ours.encode(text) == backend.encode(text).ids


@pytest.mark.parametrize("letters", ["ab", "abc", "aab ", "aaaab", "abcd -", "中国 a"])
def test_ties_and_overlaps_are_resolved_as_in_the_rust_library(letters):
    """Short texts of few letters: most pairs are equally frequent, and many overlap as in "aaa"."""
    pick = random.Random(letters)
    for _ in range(60):
        texts = ["".join(pick.choices(letters, k=pick.randrange(1, 60))) for _ in range(pick.randrange(1, 30))]
        vocab_size = 256 + pick.randrange(1, 200)
        assert BytePairEncoding.train(texts, vocab_size).merges == train_in_rust(texts, vocab_size)[1], texts


def learn_by_definition(words, steps):
    """Count every pair anew for every merge; nothing is kept up to date, so nothing can go out of date."""
    order = list(bpe.LETTER_OF_BYTE)
    words = {tuple(order.index(byte) for byte in word.encode()): times for word, times in words.items()}
    for new in range(256, 256 + steps):
        counts = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                counts[pair] += times
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        yield best, counts[best]
        words = {tuple(replace_pair(word, best, new)): times for word, times in words.items()}


def test_counts_stay_right_through_hundreds_of_merges():
    words = count_words(own_text()[:6])
    tokens = [bytes([byte]) for byte in bpe.LETTER_OF_BYTE]
    found = list(learn_merges(words, 256 + 400))
    for merge, (pair, count) in zip(found, learn_by_definition(words, 400), strict=True):
        assert merge == (tokens[pair[0]], tokens[pair[1]], count)
        tokens.append(merge.left + merge.right)


def test_a_small_example_by_hand():
    """ "low" 5 times, "lower" 2, "newest" 6, "widest" 3: e+s and s+t and then est come 9 times."""
    words = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    merges = list(learn_merges(words, 256 + 5))
    assert merges == [(b"e", b"s", 9), (b"es", b"t", 9), (b"l", b"o", 7), (b"lo", b"w", 7), (b"e", b"w", 6)]
    bpe_of_words = BytePairEncoding.train([" ".join(w for w, n in words.items() for _ in range(n))], 256 + 5)
    assert [piece.text for piece in bpe_of_words.pieces("lowest")] == ["low", "est"]


def test_learning_ends_when_every_word_is_one_token():
    learned = BytePairEncoding.train(["ab ab", "ab"], 10_000)
    assert learned.vocab_size == 256 + 2
    assert len(learned.encode("ab ab")) == 2
    assert BytePairEncoding.train([], 1000).vocab_size == 256


@pytest.mark.parametrize(
    ("word", "pair", "expected"),
    [([1, 1, 1], (1, 1), [9, 1]), ([1, 1, 1, 1], (1, 1), [9, 9]), ([1, 2], (2, 1), [1, 2]), ([], (1, 1), [])],
)
def test_a_pair_is_replaced_from_left_to_right(word, pair, expected):
    assert replace_pair(word, pair, 9) == expected


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(TokenizerError, match="cannot hold the 256 bytes"):
        BytePairEncoding.train(["text"], 255)


# --- encoding with the real vocabulary -------------------------------------------------------------------------------


@cache
def production():
    try:
        return load_tokenizer("Aquila2-7B")
    except assets.AssetError as error:
        pytest.skip(f"asset not fetched: {error}")


@cache
def aquila():
    return BytePairEncoding.from_tokenizer(production())


# Python's `regex` and the Rust library know different versions of Unicode: a character that one of them has not heard
# of is a letter to one and a sign to the other. What Python's own, older table has assigned is the same to both.
ASSIGNED = [code for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
BY_CATEGORY = {}
for code in ASSIGNED:
    BY_CATEGORY.setdefault(unicodedata.category(chr(code)), []).append(code)

EMOJI = ["👩‍👩‍👧", "🇨🇳", "👍🏽", "❤️", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "#️⃣", "☃"]
RECIPES = {
    "ascii": lambda pick: chr(pick.randrange(32, 127)),
    "latin": lambda pick: chr(pick.choice([pick.randrange(32, 127), pick.randrange(0xA0, 0x250)])),
    "han": lambda pick: chr(pick.randrange(0x4E00, 0x9FA6)),
    "full-width": lambda pick: chr(
        pick.choice([0x3000, pick.randrange(0xFF01, 0xFFE7), pick.randrange(0x4E00, 0x9000)])
    ),
    "emoji": lambda pick: pick.choice([*EMOJI, chr(pick.randrange(0x1F300, 0x1F650)), " ", "a"]),
    "blanks": lambda pick: pick.choice(" \n\t\r\x0b\x0c\x85\u00a0\u2028\u2029\u3000  \n a1。"),
    "control": lambda pick: chr(pick.choice([*range(32), *range(127, 160), 0xAD, 0x200B, 0x200D, 0x202E, 0xFEFF, 97])),
    "digits": lambda pick: pick.choice("0123456789.,%$-+ ½Ⅷ²三٣৪０９"),
    "contractions": lambda pick: pick.choice(
        ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'", "’s", " I", "we"]
    ),
    "scripts": lambda pick: chr(pick.choice(BY_CATEGORY[pick.choice(list(BY_CATEGORY))])),
    "anything": lambda pick: chr(pick.choice(ASSIGNED)),
    "vocabulary": lambda pick: to_bytes(pick.choice(tokens_of_aquila())).decode(errors="ignore"),
    "typed control": lambda pick: pick.choice(
        ["</s>", "<|endoftext|>", "[CLS]", "[MASK]", "<|LDWANG|>", "<|", "|>", " "]
    ),
    "surrogates": lambda pick: chr(pick.choice([pick.randrange(0xD800, 0xE000), pick.randrange(97, 123), 0x4E2D])),
}


@cache
def tokens_of_aquila():
    return list(aquila().vocab)


def random_strings(how_many):
    pick = random.Random(0)
    for index in range(how_many):
        recipe = list(RECIPES.values())[index % len(RECIPES)]
        yield "".join(recipe(pick) for _ in range(pick.randrange(1, 60)))


def real_strings(how_many):
    """Lines of Python's manual and library, of this repository, and of the bilingual texts where they are fetched."""
    lines = [line for topic in pydoc_data.topics.topics.values() for line in topic.split("\n")]
    for module in (ast, json, random, unicodedata, pytest):
        lines += [line.rstrip("\n") for line in linecache.getlines(getattr(module, "__file__", ""))]
    lines += [line for text in own_text() for line in text.split("\n")]
    try:
        lines += [text for pair in parallel_sentences() for text in pair]
        lines += [turn for language in ("en", "zh") for turns in dialogues(language) for turn in turns]
    except assets.AssetError:
        pass  # there are enough without them
    lines = sorted({line for line in lines if line})
    return random.Random(0).sample(lines, min(how_many, len(lines)))


LONG = {
    "one word of Latin letters": "abcdefghij" * 20_000,
    "one letter again and again": "a" * 200_000,
    "one word of Chinese": "天地玄黄宇宙洪荒日月盈昃辰宿列张" * 5_000,
    "spaces": " " * 200_000,
    "blanks of all kinds": " \t\n\r\u3000" * 30_000 + "end",
    "signs": "-=" * 50_000,
    "a line of code without a break": "x=f(y)+1;" * 20_000,
    "emoji": "👩‍👩‍👧" * 10_000,
}


def test_ids_are_those_of_the_rust_library_on_20_000_strings():
    real = real_strings(10_000)
    texts = [*real, *random_strings(20_000 - len(real))]
    assert len(texts) == 20_000
    assert len(real) >= 8_000
    for text, expected in zip(texts, encode_batch(production(), [repair(text) for text in texts]), strict=True):
        ids = aquila().encode(text)
        assert ids == expected, ascii(text)
        assert aquila().decode(ids) == repair(text)


@pytest.mark.parametrize("name", LONG)
def test_very_long_lines(name):
    text = LONG[name]
    ids = aquila().encode(text)
    assert ids == encode_batch(production(), [text])[0]
    assert aquila().decode(ids) == text


def test_a_cold_and_a_warm_cache_and_none_give_the_same_ids(monkeypatch):
    texts = real_strings(500)
    warm = [aquila().encode(text) for text in texts]
    monkeypatch.setattr(bpe, "CACHED_WORDS", 3)
    monkeypatch.setattr(bpe, "LONGEST_CACHED_WORD", 5)
    fresh = BytePairEncoding(aquila().vocab, aquila().merges)
    assert [fresh.encode(text) for text in texts] == warm
    assert len(fresh._known) <= 3
    assert all(len(word) <= 5 for word in fresh._known)


def test_pieces_lie_where_the_rust_library_says():
    for text in [*real_strings(700), *random_strings(1400), *EMOJI, "中 a👩‍👩‍👧\n"]:
        text = repair(text)
        encoding = production().backend_tokenizer.encode(text)
        pieces = aquila().pieces(text)
        assert [(piece.start, piece.end) for piece in pieces] == encoding.offsets, ascii(text)
        assert [to_letters(piece.data) for piece in pieces] == encoding.tokens
        assert b"".join(piece.data for piece in pieces) == text.encode()


def test_a_piece_of_a_character_has_no_text():
    pieces = aquila().pieces("a☃")
    assert pieces[0].text == "a"
    assert {piece.text for piece in pieces[1:]} <= {None, "☃"}
    assert aquila().pieces("") == []


def test_decoding_any_ids_gives_the_rust_librarys_text():
    pick = random.Random(0)
    for _ in range(2000):
        ids = [pick.randrange(100_008) for _ in range(pick.randrange(1, 12))]
        assert aquila().decode(ids) == production().decode(ids)


def test_typed_control_tokens_stay_text():
    for token in ("</s>", "<|endoftext|>", "[CLS]"):
        assert max(aquila().encode(token)) < 100_000
        assert aquila().encode(token) == production().encode(token)


@pytest.mark.parametrize(
    ("broken", "repaired"),
    [
        ("\ud83d\ude00", "😀"),
        ("a\ud83d", "a\ufffd"),
        ("\ude00b", "\ufffdb"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ud83d\ude00", "\ufffd😀"),
        ("fine 中 😀", "fine 中 😀"),
    ],
)
def test_broken_surrogates(broken, repaired):
    assert repair(broken) == repaired
    assert aquila().encode(broken) == production().encode(repaired)


def test_letters_are_the_rust_librarys():
    assert set(bpe.BYTE_OF_LETTER) == set(pre_tokenizers.ByteLevel.alphabet())
    every = bytes(range(256))
    assert to_bytes(to_letters(every)) == every
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("\x00 é中\u00ad")
    assert to_letters("\x00 é中\u00ad".encode()) == shown[0][0]


# --- files and errors ------------------------------------------------------------------------------------------------


def test_saving_and_loading(tmp_path):
    learned = BytePairEncoding.train(own_text(), 1500)
    learned.save(tmp_path / "new")
    again = BytePairEncoding.load(tmp_path / "new")
    assert (again.vocab, again.merges) == (learned.vocab, learned.merges)
    files = [str(tmp_path / "new" / name) for name in ("vocab.json", "merges.txt")]
    backend = Tokenizer(models.BPE.from_file(*files))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    in_transformers = load_tokenizer(tmp_path / "new")
    for text in own_text():
        assert learned.encode(text) == again.encode(text) == backend.encode(text).ids == in_transformers.encode(text)


def test_another_pattern_cuts_other_words():
    digits = BytePairEncoding.train(["11 11 11"], 300, pattern=r"\d|[^\d]+")
    assert len(digits.encode("11")) == 2
    assert len(BytePairEncoding.train(["11 11 11"], 300).encode("11")) == 1


def test_errors():
    alphabet = {letter: index for index, letter in enumerate(bpe.LETTER_OF_BYTE.values())}
    with pytest.raises(TokenizerError, match=r"lacks 255 of the 256 bytes"):
        BytePairEncoding({"a": 0}, [])
    with pytest.raises(TokenizerError, match=r"merge 0, 'a' \+ 'b': 'ab' is no token"):
        BytePairEncoding(alphabet, [("a", "b")])
    with pytest.raises(TokenizerError, match="has no id 256"):
        BytePairEncoding(alphabet, []).decode([256])


def test_loading_from_a_folder_without_files(tmp_path):
    with pytest.raises(TokenizerError, match="are not both there"):
        BytePairEncoding.load(tmp_path)


def test_a_tokenizer_of_another_kind_is_refused():
    try:
        other = load_tokenizer("SmolLM2-135M")
    except assets.AssetError as error:
        pytest.skip(f"asset not fetched: {error}")
    with pytest.raises(TokenizerError, match="its pre-tokenizer Sequence"):
        BytePairEncoding.from_tokenizer(other)
