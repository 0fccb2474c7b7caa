"""The vocabularies of other models: against figures measured elsewhere, against SentencePiece, and what they lose."""

import gzip
import json
import unicodedata

import pytest
import sentencepiece

from aquila2_tut import assets
from aquila2_tut.data import parallel_sentences
from aquila2_tut.tokenizer import TokenizerError, load_tokenizer
from aquila2_tut.tokenizer import compare as module
from aquila2_tut.tokenizer.compare import (
    VOCABULARIES,
    Compression,
    Parallel,
    embedding_bytes,
    measure,
    measure_parallel,
    merges_of,
    open_vocabulary,
)
from aquila2_tut.tokenizer.train import TextTokenizer

# Characters a token on HumanEval (prompts with their solutions) and tokens of the vocabulary, measured independently
# with each owner's own splitting rules in `tokenizers` and `sentencepiece`.
HUMAN_EVAL = {
    "Aquila": (3.38, 100_008),
    "GPT-2": (2.36, 50_257),
    "SmolLM2": (3.21, 49_152),
    "Llama 2": (2.86, 32_000),
    "Mistral v1": (2.84, 32_000),
    "Baichuan": (2.18, 64_000),
    "Llama 3": (3.43, 128_256),
    "Tekken": (3.27, 130_072),
    "Command-R": (3.25, 256_000),
    "DeepSeek-LLM": (2.93, 102_400),
    "DeepSeek-V4": (3.37, 129_280),
    "Qwen2": (3.37, 151_936),
    "Qwen3.6": (3.17, 248_044),
}
OPENED = {}


def opened(name):
    if name not in OPENED:
        try:
            OPENED[name] = open_vocabulary(name)
        except assets.AssetError as error:
            pytest.skip(f"asset not fetched: {error}")
    return OPENED[name]


def fetched(name):
    try:
        return assets.path(name)
    except assets.AssetError as error:
        pytest.skip(f"asset not fetched: {error}")


@pytest.fixture(scope="module")
def problems():
    with gzip.open(fetched("human-eval"), "rt", encoding="utf-8") as stream:
        return [problem["prompt"] + problem["canonical_solution"] for problem in map(json.loads, stream)]


@pytest.fixture(scope="module")
def pairs():
    fetched("jupyterlab-zh")
    return parallel_sentences()


@pytest.mark.parametrize("name", VOCABULARIES)
def test_characters_a_token_on_human_eval(problems, name):
    expected, size = HUMAN_EVAL[name]
    found = measure(opened(name), problems, "HumanEval")
    assert found.characters_per_token == pytest.approx(expected, rel=0.01)
    assert found.vocab_size == size
    assert found.characters == 103_560


@pytest.mark.parametrize("name", VOCABULARIES)
def test_text_comes_back(problems, pairs, name):
    """Except what the owner's rules change on purpose: Unicode's composed form."""
    tokenizer = opened(name)
    for text in [*problems, *(text for pair in pairs for text in pair), "\u3000全角 👩‍👩‍👧", "</s> <|endoftext|>"]:
        kept = unicodedata.normalize("NFC", text) if VOCABULARIES[name].composed else text
        assert tokenizer.decode(tokenizer.encode(text)) == kept


@pytest.mark.parametrize(("name", "preset"), [("Aquila", "Aquila2-7B"), ("SmolLM2", "SmolLM2-135M")])
def test_our_own_models_have_the_ids_of_load_tokenizer(pairs, name, preset):
    expected = load_tokenizer(preset)
    for text in [text for pair in pairs[::5] for text in pair]:
        assert opened(name).encode(text) == expected.encode(text)


def test_rebuilding_from_scores_is_sentencepiece(problems, pairs):
    """Llama 2 and Baichuan are rebuilt from tokens and scores. Mistral's model can be rebuilt so and run as it is."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(fetched("mistral-tokenizer")))
    every = range(model.get_piece_size())
    vocab = {model.id_to_piece(index): index for index in every}
    special = [index for index in every if model.is_control(index) or model.is_byte(index) or model.is_unknown(index)]
    scores = {model.id_to_piece(index): model.get_score(index) for index in every if index not in special}
    rebuilt = module._sentencepiece_bpe(vocab, scores)
    for text in [*problems, *(text for pair in pairs for text in pair), "\u3000全角 👩‍👩‍👧", "  two  blanks "]:
        assert rebuilt.encode(text).ids == model.encode(text)


def test_merges_of_ranks_give_back_the_merges_of_a_byte_level_bpe(pairs):
    """GPT-2's merges are known; from the order of its tokens alone follow the same ids."""
    file = fetched("gpt2-tokenizer")
    with module.GGUFFile(file) as gguf:
        tokens = gguf.metadata["tokenizer.ggml.tokens"][:-1]  # the last is its control token
    rebuilt = module._from_ranks({token: rank for rank, token in enumerate(tokens)}, VOCABULARIES["GPT-2"])
    for text in [text for pair in pairs for text in pair]:
        assert rebuilt.encode(text).ids == opened("GPT-2").encode(text)


def test_every_way_to_make_a_token_is_a_merge():
    assert merges_of({"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}) == [("a", "b"), ("b", "a"), ("a", "ba"), ("ab", "a")]


def test_what_chinese_costs(pairs):
    """The order that any measurement of these vocabularies finds: Aquila cheapest of its time, GPT-2 dearest."""
    ratio = {
        name: measure_parallel(opened(name), pairs).ratio for name in ("Aquila", "GPT-2", "SmolLM2", "Llama 2", "Qwen2")
    }
    assert ratio["Aquila"] < ratio["Qwen2"] < ratio["Llama 2"] < ratio["SmolLM2"] < ratio["GPT-2"]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_licence_is_stated(name):
    asset = assets.lookup(VOCABULARIES[name].asset)
    assert asset.licence
    assert opened(name).licence == asset.licence


def test_arithmetic():
    letters = TextTokenizer("letters", 256, encode=lambda text: list(text.encode()), decode=lambda ids: "")
    found = measure(letters, ["ab", "中"], "mixed")
    assert found == Compression("letters", 256, "mixed", characters=3, bytes=5, tokens=5)
    assert (found.characters_per_token, found.bytes_per_token) == (0.6, 1.0)
    both = measure_parallel(letters, [("ab", "中"), ("c", "国家")])
    assert both == Parallel(Compression("letters", 256, "en", 3, 3, 3), Compression("letters", 256, "zh", 3, 9, 9))
    assert (both.tokenizer, both.ratio) == ("letters", 3.0)


def test_embedding_bytes():
    """Aquila2-7B: two layers of 100,008 rows of 4,096 bfloat16 weights; SmolLM2 has one of 49,152 by 576 for both."""
    assert embedding_bytes(100_008, 4096) == 2 * 100_008 * 4096 * 2
    assert embedding_bytes(49_152, 576, tied=True, bytes_per_weight=4) == 49_152 * 576 * 4


def test_nothing_to_measure():
    with pytest.raises(TokenizerError, match="nothing to measure"):
        measure(TextTokenizer("t", 1, encode=lambda text: [], decode=lambda ids: ""), [""])


def test_an_unknown_name():
    with pytest.raises(TokenizerError, match="no vocabulary 'GPT-5' to compare with; known: Aquila, GPT-2"):
        open_vocabulary("GPT-5")
