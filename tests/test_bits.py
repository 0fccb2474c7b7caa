"""Bits per byte against transformers' own loss, against one token at a time, and against what can be said by hand."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
from tiny import shape, vocabulary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aquila2_tut import AutoLoader, assets
from aquila2_tut.config import Aquila2Config
from aquila2_tut.data import corpus
from aquila2_tut.evaluate import Bits, EvaluateError, NGram, bits_per_byte, difference, interval
from aquila2_tut.evaluate.bits import spans
from aquila2_tut.evaluate.intervals import bootstrap, wilson
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.tokenizer import encode_batch

LINES = ["The cat sat on the mat, and nobody asked it why.", "小猫坐在垫子上，没有人问它为什么。", "a", "Open file…"]
SHAPE = shape(64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return vocabulary(tmp_path_factory.mktemp("vocabulary"), LINES * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    made = Aquila2ForCausalLM(Aquila2Config(**SHAPE, vocab_size=len(tokenizer), pad_token_id=0)).eval()
    made.lm_head.weight.data *= 20  # far from uniform, so that what is read before matters
    return made


def test_short_texts_against_the_loss_of_transformers(model, tokenizer):
    for text, found in zip(LINES, bits_per_byte(model, tokenizer, LINES), strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
        loss = model(input_ids=ids, labels=ids).loss.item()
        assert found.bits == pytest.approx(loss * (ids.shape[1] - 1) / math.log(2), rel=1e-5)
        assert found.bytes == len(text.encode())


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 1), (9, 7), (16, 8)])
def test_long_texts_against_one_token_at_a_time(model, tokenizer, window, stride):
    text = "".join(LINES)
    ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
    expected, first = 0.0, window
    for place in range(1, len(ids)):
        if place >= window and (place - window) % stride == 0:
            first = place
        begin = max(0, min(first + stride, len(ids)) - window) if place >= window else 0
        assert begin == 0 or place - begin >= window - stride
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids[begin:place]])).logits[0, -1].double()
        expected -= scores.log_softmax(0)[ids[place]].item() / math.log(2)
    assert bits_per_byte(model, tokenizer, [text], window, stride)[0].bits == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12, 13, 100])
def test_every_token_is_counted_once_with_enough_before_it(length):
    for window, stride in ((8, 4), (8, 1), (8, 7)):
        counted = []
        for begin, first, end in spans(length, window, stride):
            assert 0 <= begin < end <= length and end - begin <= window
            assert begin == 0 or first - begin >= window - stride
            counted += range(first, end)
        assert counted == list(range(1, length))


def test_a_model_that_knows_nothing_needs_the_same_for_every_token(tokenizer):
    config = LlamaConfig(**SHAPE, vocab_size=len(tokenizer))
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = bits_per_byte(model, tokenizer, LINES, window=8)
    for text, bits in zip(LINES, found, strict=True):
        assert bits.bits == pytest.approx(len(tokenizer(text).input_ids) * math.log2(len(tokenizer)), rel=1e-5)


def test_a_batch_is_what_its_texts_are_alone(model, tokenizer):
    together = bits_per_byte(model, tokenizer, LINES, window=8)
    alone = [bits_per_byte(model, tokenizer, [line], window=8)[0] for line in LINES]
    assert [item.bits for item in together] == pytest.approx([item.bits for item in alone], rel=1e-5)


def test_the_token_that_begins_a_text_can_be_chosen(model, tokenizer):
    other = bits_per_byte(model, tokenizer, LINES[:1], begin=tokenizer.eos_token_id)
    assert other[0].bits != pytest.approx(bits_per_byte(model, tokenizer, LINES[:1])[0].bits, rel=1e-3)


def test_a_text_that_cannot_be_said_is_refused(model):
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<s>": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    small = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert bits_per_byte(model, small, ["abba"])[0].bytes == 4
    with pytest.raises(EvaluateError, match="text 1 loses something"):
        bits_per_byte(model, small, ["ab", "abc"])
    with pytest.raises(EvaluateError, match="no bos"):
        bits_per_byte(model, PreTrainedTokenizerFast(tokenizer_object=backend), ["ab"])


def test_wrong_settings_are_refused(model, tokenizer):
    for stride in (0, 8):
        with pytest.raises(EvaluateError, match="stride must be from 1 to 7"):
            bits_per_byte(model, tokenizer, LINES, window=8, stride=stride)
    with pytest.raises(EvaluateError, match="different texts"):
        difference([Bits(8, 4)], [Bits(8, 5)])
    with pytest.raises(EvaluateError, match="empty"):
        interval([Bits(8, 4), Bits(0, 0)])
    with pytest.raises(EvaluateError, match="at least one"):
        interval([])


# --- intervals ---


def test_wilson_against_the_equation_that_defines_it():
    """Its ends are the shares that lie just 1.96 of their own standard deviations away from what was seen."""
    for right, total in ((0, 20), (3, 20), (100, 200), (199, 200), (200, 200)):
        share, low, high = wilson(right, total)
        assert share == right / total
        assert 0 <= low <= share <= high <= 1
        for end in {low, high} - {0.0, 1.0}:
            assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / total), rel=1e-3)
    with pytest.raises(EvaluateError, match="3 of 2"):
        wilson(3, 2)
    with pytest.raises(EvaluateError, match="0 of 0"):
        wilson(0, 0)


def test_the_bootstrap_agrees_with_the_standard_error_of_a_mean():
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = bootstrap(lambda drawn: values[drawn].mean(), 400, rounds=4000)
    reach = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - reach, abs=0.02)
    assert found.high == pytest.approx(values.mean() + reach, abs=0.02)
    assert found == bootstrap(lambda drawn: values[drawn].mean(), 400, rounds=4000)


def test_bits_of_all_texts_together():
    found = [Bits(10, 10), Bits(90, 30)]
    value, low, high = interval(found)
    assert value == 100 / 40
    assert (low, high) == (1, 3)  # each text drawn twice is common enough


def test_a_difference_is_of_the_same_texts():
    """One text is hard for both: the figures spread widely, their difference does not."""
    one = [Bits(10.0 * hard, 10) for hard in range(1, 30)]
    other = [Bits(10.0 * hard + 5, 10) for hard in range(1, 30)]
    assert difference(one, other) == pytest.approx((-0.5, -0.5, -0.5))
    assert interval(one).high - interval(one).low > 1


# --- what the small model is said to be ---


@pytest.fixture(scope="module")
def nano():
    folder = assets.shipped("Aquila2-Nano")
    if folder is None:
        pytest.skip("data/Aquila2-Nano is not there yet")
    loader = AutoLoader(model_name=str(folder), device="cpu", local_files_only=True)
    return loader.get_model(), loader.get_tokenizer()


@pytest.fixture(scope="module")
def counted(nano):
    """A 5-gram model of the texts that Nano was trained on, with Nano's vocabulary."""
    _, tokenizer = nano
    try:
        training = [document.text for document in corpus("train")]
    except assets.AssetError as error:
        pytest.skip(f"asset not fetched: {error}")
    encoded = encode_batch(tokenizer, training)
    return NGram(([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in encoded), len(tokenizer))


@pytest.mark.slow
@pytest.mark.parametrize("sources", [("libreoffice-en", "dialogues-en"), ("libreoffice-zh", "dialogues-zh")])
def test_nano_needs_less_than_counting_does(nano, counted, sources):
    model, tokenizer = nano
    texts = [document.text for source in sources for document in islice(corpus("held-out", [source]), 24)]
    encoded = encode_batch(tokenizer, texts)
    needed = counted.bits([tokenizer.bos_token_id, *ids] for ids in encoded)
    by_counting = [Bits(bits, len(text.encode())) for bits, text in zip(needed, texts, strict=True)]
    assert difference(bits_per_byte(model, tokenizer, texts), by_counting).value < 0
