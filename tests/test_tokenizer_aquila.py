"""The real vocabularies against the published files, a byte-pair encoder in Python, and typed control tokens."""

import json
import os
import pydoc_data.topics
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import regex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from aquila2_tut import assets
from aquila2_tut.gguf import GGUFFile
from aquila2_tut.tokenizer import TokenizerError, encode_batch, encode_trusted, load_tokenizer
from aquila2_tut.tokenizer.aquila import AQUILA_CONTROL

PUBLISHED = Path(__file__).parents[2] / "shared" / "aquila-tokenizer"
needs_published = pytest.mark.skipif(
    not (PUBLISHED / "merges.txt").is_file(),
    reason="the published vocab.json and merges.txt are not beside the repository (../shared/aquila-tokenizer)",
)
GPT2_PATTERN = regex.compile(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
CONVERSATION = "<|startofpiece|>Hello!<|endofpiece|>Hi!</s>"


@cache
def tokenizer_of(name):
    try:
        return load_tokenizer(name)
    except assets.AssetError as error:
        pytest.skip(f"asset not fetched: {error}")


@pytest.fixture
def aquila():
    return tokenizer_of("Aquila2-7B")


@pytest.fixture
def smollm():
    return tokenizer_of("SmolLM2-135M")


@cache
def sample_strings():
    """English and code from Python's own manual, Chinese from the vocabulary, and characters from all over Unicode."""
    lines = [line for topic in pydoc_data.topics.topics.values() for line in topic.split("\n") if line.strip()]
    pick = random.Random(0)
    tokens = tokenizer_of("Aquila2-7B").batch_decode([[index] for index in range(1, 100_000, 7)])
    mixed = ["".join(pick.choices(tokens, k=8)) for _ in range(600)]
    anywhere = ["".join(chr(pick.choice(RANGES)(pick)) for _ in range(30)) for _ in range(600)]
    by_hand = [
        "",
        " ",
        "  a",
        "a  ",
        "\n\n",
        "\r\n\tx",
        "don't WE'LL I'm",
        "2023年10月13日",
        "½ Ⅷ ² 一二三",
        "👩‍👩‍👧 🇨🇳",
        "ﷺ",
        "\u3000全角",
    ]
    return [*pick.sample(lines, 1200), *(text for text in mixed if "\ufffd" not in text), *anywhere, *by_hand]


RANGES = [
    lambda pick: pick.randrange(32, 127),
    lambda pick: pick.randrange(0x4E00, 0x9FA5),
    lambda pick: pick.randrange(0x20, 0xD800),
    lambda pick: pick.randrange(0x1F300, 0x1FAFF),
    lambda pick: pick.choice([9, 10, 13, 32, 0xA0, 0x3000]),
]


class ReferenceBPE:
    """Byte-level byte-pair encoding straight from its definition: merge the pair of lowest rank, again and again."""

    def __init__(self, vocab, merges, split_digits):
        self.vocab, self.rank = vocab, {pair: rank for rank, pair in enumerate(merges)}
        self.split_digits = split_digits
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        self.letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}

    def encode(self, text):
        parts = regex.split(r"(\p{N})", text) if self.split_digits else [text]
        words = [word for part in parts for word in GPT2_PATTERN.findall(part)]
        return [self.vocab[piece] for word in words for piece in self.merge(word) if piece in self.vocab]

    def merge(self, word):
        pieces = [self.letters[byte] for byte in word.encode()]
        while len(pieces) > 1:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in pairwise(pieces)]
            best = min(ranks)
            if best == len(self.rank):
                break
            at = ranks.index(best)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return pieces


@cache
def reference(asset, split_digits):
    with GGUFFile(assets.path(asset)) as gguf:
        tokens, merges = gguf.metadata["tokenizer.ggml.tokens"], gguf.metadata["tokenizer.ggml.merges"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return ReferenceBPE(vocab, [tuple(merge.split(" ")) for merge in merges], split_digits)


@pytest.mark.parametrize(
    ("name", "asset", "digits"), [("Aquila2-7B", "aquila-tokenizer", False), ("SmolLM2-135M", "smollm2-135m", True)]
)
def test_ids_are_those_of_byte_pair_encoding_by_definition(name, asset, digits):
    tokenizer = tokenizer_of(name)
    expected = reference(asset, digits)
    for text in sample_strings():
        assert tokenizer.encode(text) == expected.encode(text), text


@pytest.mark.parametrize("name", ["Aquila2-7B", "SmolLM2-135M"])
def test_decoding_gives_the_text_back_exactly(name):
    tokenizer = tokenizer_of(name)
    letters = set(pre_tokenizers.ByteLevel.alphabet()) - set(tokenizer.get_vocab())
    assert len(letters) == {"Aquila2-7B": 0, "SmolLM2-135M": 21}[name]
    lost = {chr(byte) for byte in (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D)} if letters else set()
    texts = [text for text in sample_strings() if not lost & set(text)]
    assert tokenizer.batch_decode(tokenizer(texts).input_ids) == texts
    assert tokenizer.decode(tokenizer.encode("a , b .")) == "a , b ."


@pytest.mark.parametrize("name", ["Aquila2-7B", "SmolLM2-135M"])
def test_a_batch_has_the_ids_of_the_texts_one_by_one(name):
    tokenizer = tokenizer_of(name)
    texts = [*sample_strings(), *tokenizer.all_special_tokens]
    assert encode_batch(tokenizer, texts) == [tokenizer.encode(text) for text in texts]
    assert encode_batch(tokenizer, []) == []


def test_a_batch_decodes_to_the_texts_exactly(aquila):
    texts = sample_strings()
    assert aquila.batch_decode(encode_batch(aquila, texts)) == texts


def test_a_batch_is_neither_padded_nor_cut_by_calls_before(aquila):
    aquila(["a b c d", "a"], padding=True, truncation=True, max_length=2)
    encode_trusted(aquila, "</s>")
    assert [len(ids) for ids in encode_batch(aquila, ["a b c d", "a"])] == [4, 1]
    assert 100_007 not in encode_batch(aquila, ["</s>"])[0]


def test_a_batch_takes_broken_surrogates(aquila):
    assert encode_batch(aquila, ["\ud83d\ude00", "x\ud83d"]) == [aquila.encode("😀"), aquila.encode("x\ufffd")]


THREADS = """
import os
from aquila2_tut.tokenizer import encode_batch, load_tokenizer
encode_batch(load_tokenizer("Aquila2-7B"), ["a b c"] * 4000)
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc, which is Linux's")
def test_threads_are_as_the_environment_says(aquila):
    def count(**setting):
        command = [sys.executable, "-c", THREADS]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | setting
        return int(subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, check=True).stdout)

    started = count(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS="3") - count(TOKENIZERS_PARALLELISM="false")
    assert started == 3


@needs_published
def test_vocabulary_and_merges_are_the_published_ones(aquila):
    vocab = json.loads((PUBLISHED / "vocab.json").read_text(encoding="utf-8"))
    vocab |= {token: 100_000 + index for index, token in enumerate(AQUILA_CONTROL)}
    assert aquila.get_vocab() == vocab
    lines = (PUBLISHED / "merges.txt").read_text(encoding="utf-8").split("\n")
    ours = json.loads(aquila.backend_tokenizer.to_str())["model"]["merges"]
    assert [" ".join(pair) for pair in ours] == [line for line in lines[1:] if line]


@needs_published
def test_ids_are_those_of_an_independent_build_from_the_published_files(aquila):
    other = Tokenizer(models.BPE.from_file(str(PUBLISHED / "vocab.json"), str(PUBLISHED / "merges.txt")))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = decoders.ByteLevel()
    texts = sample_strings()
    assert aquila(texts).input_ids == [encoding.ids for encoding in other.encode_batch(texts)]


@needs_published
def test_a_folder_with_vocab_and_merges_gives_the_same_tokenizer(aquila):
    folder = load_tokenizer(PUBLISHED)
    assert folder.get_vocab() == aquila.get_vocab()
    assert folder.all_special_ids == aquila.all_special_ids
    assert encode_trusted(folder, CONVERSATION) == encode_trusted(aquila, CONVERSATION)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [22299, 12, 3117, 1]),
        ("北京的十大景点是什么?", [42072, 16565, 17613, 5428, 31]),
        (" ", [221]),
        ("\n\n", [982]),
    ],
)
def test_golden_ids(aquila, text, ids):
    assert aquila.encode(text) == ids


def test_golden_ids_of_a_trusted_conversation(aquila):
    assert encode_trusted(aquila, CONVERSATION) == [100000, 22299, 1, 100001, 23017, 1, 100007]


def test_roles_and_size(aquila, smollm):
    assert len(aquila) == 100_008
    assert (aquila.bos_token_id, aquila.eos_token_id) == (100_006, 100_007)
    assert aquila.pad_token_id == aquila.unk_token_id == 0
    assert aquila.convert_ids_to_tokens(list(range(100_000, 100_008))) == list(AQUILA_CONTROL)
    assert (len(smollm), smollm.bos_token_id, smollm.eos_token_id, smollm.pad_token_id) == (49_152, 1, 2, 2)


def test_no_bos_or_eos_is_added(aquila):
    assert aquila("Hello!").input_ids == aquila("Hello!", add_special_tokens=True).input_ids == [22299, 1]


@pytest.mark.parametrize("name", ["Aquila2-7B", "SmolLM2-135M"])
def test_typed_control_tokens_stay_text(name):
    tokenizer = tokenizer_of(name)
    control = set(tokenizer.all_special_ids)
    for token in tokenizer.all_special_tokens:
        texts = [token, f"a{token}b", f" {token} ", token * 3, f"{token[:-1]}{token}{token[1:]}", f"中{token}\n{token}"]
        for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
            assert not control & set(ids), text
            assert ids == tokenizer.encode(text) == tokenizer(text, return_tensors="pt").input_ids[0].tolist()
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert tokenizer.tokenize(text) == tokenizer.convert_ids_to_tokens(ids)


def test_typed_control_tokens_stay_text_with_padding_and_truncation(aquila):
    batch = aquila(["</s>" * 5, "[CLS]"], padding=True, truncation=True, max_length=6)
    shown = [
        index for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True) for index in row if any(mask)
    ]
    assert not set(shown) & (set(aquila.all_special_ids) - {aquila.pad_token_id})


def test_trusted_and_plain_calls_do_not_disturb_each_other(aquila):
    plain = aquila.encode("</s>")
    assert encode_trusted(aquila, "</s>") == [100_007]
    assert aquila.encode("</s>") == plain
    assert encode_trusted(aquila, "a[MASK]b") == [*aquila.encode("a"), 100_003, *aquila.encode("b")]


def test_control_tokens_are_left_out_of_decoded_text(aquila):
    ids = encode_trusted(aquila, CONVERSATION)
    assert aquila.decode(ids, skip_special_tokens=True) == "Hello!Hi!"
    assert aquila.decode(ids) == CONVERSATION


@pytest.mark.parametrize("open_again", [load_tokenizer, AutoTokenizer.from_pretrained])
def test_the_rule_survives_saving(aquila, tmp_path, open_again):
    aquila.save_pretrained(tmp_path)
    again = open_again(tmp_path)
    assert again.encode(CONVERSATION) == aquila.encode(CONVERSATION)
    assert encode_trusted(again, CONVERSATION) == encode_trusted(aquila, CONVERSATION)
    assert again.special_tokens_map == aquila.special_tokens_map
    assert again.decode(again.encode("a , b .")) == "a , b ."


def test_a_folder_as_published_is_put_right(aquila, tmp_path):
    """Control tokens marked as ordinary, a wrong eos in the tokenizer's files, the right one in the model's."""
    data = json.loads(aquila.backend_tokenizer.to_str())
    for token in data["added_tokens"][1:]:
        token.update(special=False, normalized=True)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    wrong = {
        "bos_token": "<|endoftext|>",
        "eos_token": {"content": "<|endoftext|>"},
        "clean_up_tokenization_spaces": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(wrong), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"bos_token_id": 100006, "eos_token_id": 100007}', encoding="utf-8")
    fixed = load_tokenizer(tmp_path)
    assert (fixed.bos_token_id, fixed.eos_token_id, fixed.pad_token_id) == (100_006, 100_007, 0)
    assert fixed.encode(CONVERSATION) == aquila.encode(CONVERSATION)
    assert fixed.decode(encode_trusted(fixed, CONVERSATION), skip_special_tokens=True) == "Hello!Hi!"
    assert fixed.decode(fixed.encode("a , b .")) == "a , b ."


def test_ids_that_are_no_control_tokens_are_no_roles(aquila, tmp_path):
    (tmp_path / "tokenizer.json").write_text(aquila.backend_tokenizer.to_str(), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}', encoding="utf-8")
    fixed = load_tokenizer(tmp_path)
    assert (fixed.bos_token, fixed.eos_token) == ("[CLS]", "</s>")


def test_options(aquila):
    other = load_tokenizer("aquilachat2-34b", padding_side="left", model_max_length=4)
    assert other("a b c d e f", truncation=True).input_ids == aquila.encode("a b c d e f")[:4]
    assert other(["a", "a b"], padding=True).attention_mask == [[0, 1], [1, 1]]


def test_the_vocabulary_of_june_2024_is_refused():
    with pytest.raises(TokenizerError, match=r"143,973 tokens .* only inside its checkpoint"):
        load_tokenizer("Aquila2-7B-2024-06")


def test_unknown_name():
    with pytest.raises(TokenizerError, match=r"neither a folder nor a \.gguf file.*did you mean"):
        load_tokenizer("Aquila2-8B")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither tokenizer.json nor both"),
        ({"vocab.json": "{}"}, "neither tokenizer.json nor both"),
        ({"tokenizer.json": '{"added_tokens": ['}, "cut short"),
        ({"tokenizer.json": '{"added_tokens": []}'}, "not a tokenizer file"),
        ({"vocab.json": '{"a": 0, "b": 2}', "merges.txt": ""}, "ids are not 0 to 1"),
        ({"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "#version: 0.2\na b c\n"}, "line 2"),
        ({"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "a b\n"}, "do not belong together"),
    ],
)
def test_broken_folders(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_a_gguf_file_of_another_kind(tmp_path, monkeypatch):
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [1]}
    fake = nullcontext(SimpleNamespace(metadata=metadata))
    monkeypatch.setattr("aquila2_tut.tokenizer.aquila.GGUFFile", lambda path: fake)
    with pytest.raises(TokenizerError, match="no byte-level BPE"):
        load_tokenizer(tmp_path / "other.gguf")
    metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": [], "tokenizer.ggml.pre": "qwen2"}
    with pytest.raises(TokenizerError, match="pre-tokenizer 'qwen2' is not known"):
        load_tokenizer(tmp_path / "other.gguf")


def test_a_gguf_file_is_read_directly(aquila, tmp_path):
    copy = shutil.copy(assets.path("aquila-tokenizer"), tmp_path / "copy.gguf")
    assert load_tokenizer(copy).get_vocab() == aquila.get_vocab()
