"""Bits per byte by position and by context, against one token at a time and against the room of evaluation."""

import math

import numpy as np
import pytest
import torch
from tiny import shape, vocabulary

from aquila2_tut.config import Aquila2Config
from aquila2_tut.evaluate import bits_per_byte
from aquila2_tut.longcontext import Encoded, LongContextError, by_context, by_position, encode
from aquila2_tut.model import Aquila2ForCausalLM

TEXTS = [
    "The cat sat on the mat, and nobody asked it why. 小猫坐在垫子上，没有人问它为什么。" * 3,
    "Open file… Save as… 打开文件，另存为。" * 4,
    "short",
]
SHAPE = shape(16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return vocabulary(tmp_path_factory.mktemp("vocabulary"), TEXTS * 3, 290)


@pytest.fixture(scope="module", params=["default", "dynamic"])
def model(request, tokenizer):
    torch.manual_seed(0)
    config = Aquila2Config(**SHAPE, vocab_size=len(tokenizer), pad_token_id=0)
    made = Aquila2ForCausalLM(config.stretched(request.param, 4)).eval()
    made.lm_head.weight.data *= 20
    return made


def cost(model, ids, place, begin, length):
    """Bits of one token after those from `begin` on, in a text that is to become `length` tokens."""
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids[begin:place]]), rotary_length=length).logits[0, -1].double()
    return -scores.log_softmax(0)[ids[place]].item() / math.log(2)


def test_the_sizes_of_tokens_are_those_of_the_text(tokenizer):
    for text, document in zip(TEXTS, encode(tokenizer, TEXTS), strict=True):
        assert document.sizes.sum() == len(text.encode("utf-8"))
        assert document.sizes[0] == 0 and document.ids[0] == tokenizer.bos_token_id
        assert len(document.sizes) == len(document.ids)
    three = encode(tokenizer, ["a", "é", "桥"])
    assert [int(document.sizes.sum()) for document in three] == [1, 2, 3]


def test_positions_against_one_token_at_a_time(model, tokenizer):
    documents, length = encode(tokenizer, TEXTS), 40
    bands = by_position(model, documents, length, [8, 20])
    assert [band[:2] for band in bands] == [(1, 8), (8, 20), (20, 40)]
    for begin, end, bits, size in bands:
        places = [(document, place) for document in documents[:2] for place in range(begin, end)]
        expected = sum(cost(model, document.ids, place, 0, length) for document, place in places)
        assert bits == pytest.approx(expected, rel=1e-5)
        assert size == sum(int(document.sizes[place]) for document, place in places)
    assert bands[0].bits_per_byte == bands[0].bits / bands[0].bytes


@pytest.mark.parametrize(("context", "stride"), [(8, 4), (16, 3)])
def test_contexts_against_one_token_at_a_time(model, tokenizer, context, stride):
    (document,) = encode(tokenizer, TEXTS[:1])
    expected, first = 0.0, context
    for place in range(1, len(document.ids)):
        if place >= context and (place - context) % stride == 0:
            first = place
        end = min(first + stride, len(document.ids)) if place >= context else context
        expected += cost(model, document.ids, place, end - context, context)
    found = by_context(model, [document], context, stride)
    assert found.bits == pytest.approx(expected, rel=1e-5)
    assert found.bytes == len(TEXTS[0].encode())


def test_contexts_against_the_room_of_evaluation(tokenizer):
    torch.manual_seed(1)
    model = Aquila2ForCausalLM(Aquila2Config(**SHAPE, vocab_size=len(tokenizer), pad_token_id=0)).eval()
    for context, stride in ((8, None), (12, 5)):
        wanted = bits_per_byte(model, tokenizer, TEXTS, context, stride)
        found = by_context(model, encode(tokenizer, TEXTS), context, stride)
        assert found.bits == pytest.approx(sum(text.bits for text in wanted), rel=1e-5)
        assert found.bytes == sum(text.bytes for text in wanted)


def test_what_is_counted_can_be_cut_anywhere(model, tokenizer):
    documents = encode(tokenizer, TEXTS[:2])
    whole = by_context(model, documents, 8, last=40)
    # A window ends at 12, so that the first part is read in the same windows.
    parts = [by_context(model, documents, 8, first=first, last=last) for first, last in ((1, 12), (12, 40))]
    assert sum(part.bits for part in parts) == pytest.approx(whole.bits)
    assert sum(part.bytes for part in parts) == whole.bytes
    assert by_context(model, documents, 8, first=39, last=40).bytes == sum(int(d.sizes[39]) for d in documents)


def test_a_model_that_knows_nothing_needs_the_same_everywhere(tokenizer):
    model = Aquila2ForCausalLM(Aquila2Config(**SHAPE, vocab_size=len(tokenizer), pad_token_id=0)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    for begin, end, bits, _ in by_position(model, encode(tokenizer, TEXTS), 40, [10]):
        assert bits == pytest.approx(2 * (end - begin) * math.log2(len(tokenizer)), rel=1e-6)


def test_what_cannot_be_measured_is_refused(tokenizer):
    model = Aquila2ForCausalLM(Aquila2Config(**SHAPE, vocab_size=len(tokenizer), pad_token_id=0)).eval()
    documents = encode(tokenizer, TEXTS)
    with pytest.raises(LongContextError, match="no document has 9999 tokens"):
        by_position(model, documents, 9999, [])
    with pytest.raises(LongContextError, match="edges must lie between 1 and 20"):
        by_position(model, documents, 20, [20])
    with pytest.raises(LongContextError, match="stride must be from 1 to 7"):
        by_context(model, documents, 8, 8)
    with pytest.raises(LongContextError, match="position 500"):
        by_context(model, [Encoded([1, 2, 3], np.array([0, 1, 1]))], 8, first=500)
