"""Vocabularies trained in three ways: exact, deterministic, of the size asked for, and the same as another build."""

import io
import pydoc_data.topics

import pytest
import sentencepiece

from aquila2_tut import assets
from aquila2_tut.data import dialogues, parallel_sentences
from aquila2_tut.tokenizer import BytePairEncoding, TokenizerError
from aquila2_tut.tokenizer.train import TRAINERS, train_tokenizer

KINDS = list(TRAINERS)


@pytest.fixture(scope="module")
def texts():
    """A bilingual corpus: English and Chinese of about the same size."""
    try:
        pairs = parallel_sentences()
        chinese = [turn for turns in dialogues("zh") for turn in turns]
    except assets.AssetError as error:
        pytest.skip(f"asset not fetched: {error}")
    return [*(text for pair in pairs for text in pair), *chinese]


@pytest.fixture(scope="module")
def trained(texts):
    return {kind: train_tokenizer(kind, texts, 3000) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_text_comes_back_exactly(trained, texts, kind):
    tokenizer = trained[kind]
    assert tokenizer.vocab_size == 3000
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["", " ", "  two  blanks ", "a\nb\n\n c\t", "👩‍👩‍👧 ﷺ \u3000全角", "\x00\x1f", "</s><unk><s>", "Ωμέγα ዓለም"]
)
def test_text_that_was_never_seen_comes_back_exactly(trained, kind, text):
    tokenizer = trained[kind]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_typed_control_tokens_are_several_tokens(trained, kind):
    assert len(trained[kind].encode("</s>")) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_broken_surrogates(trained, texts, kind):
    tokenizer = trained[kind]
    assert tokenizer.encode("\ud83d\ude00 x\ud83d") == tokenizer.encode("😀 x\ufffd")
    assert train_tokenizer(kind, [*texts[:800], "x\ud83d"], 2000).vocab_size <= 2000


@pytest.mark.parametrize("kind", KINDS)
def test_training_twice_gives_the_same_tokenizer(trained, texts, kind):
    again = train_tokenizer(kind, texts, 3000)
    assert [again.encode(text) for text in texts] == [trained[kind].encode(text) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens_make_shorter_texts(texts, kind):
    lengths = [
        sum(len(made.encode(text)) for text in texts)
        for made in (train_tokenizer(kind, texts, n) for n in (2000, 4000, 8000))
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] * 1.15


def test_byte_level_is_our_own_byte_pair_encoding(trained, texts):
    ours = BytePairEncoding.train(texts, 3000)
    assert [ours.encode(text) for text in texts] == [trained["byte-level"].encode(text) for text in texts]


@pytest.mark.parametrize(("kind", "model_type"), [("sentencepiece-bpe", "bpe"), ("sentencepiece-unigram", "unigram")])
def test_sentencepiece_is_told_what_keeps_a_text_as_it_is(trained, texts, kind, model_type):
    """Against SentencePiece as it comes: that one folds blanks and full-width letters, ours does not."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type=model_type, vocab_size=3000, minloglevel=2
    )
    plain = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert plain.decode(plain.encode("Ａ  b")) != "Ａ  b"
    assert trained[kind].decode(trained[kind].encode("Ａ  b")) == "Ａ  b"


@pytest.mark.parametrize("kind", ["sentencepiece-bpe", "sentencepiece-unigram"])
def test_long_lines_are_not_left_out(kind):
    line = " ".join(topic for topic in pydoc_data.topics.topics.values())[:300_000]
    tokenizer = train_tokenizer(kind, [line, "short"], 600)
    assert len(line) / len(tokenizer.encode(line)) > 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_do_not_have_as_many_tokens(kind):
    assert 256 < train_tokenizer(kind, ["hello world, hello"], 3000).vocab_size < 300


def test_sizes_that_are_too_small(texts):
    with pytest.raises(TokenizerError, match="cannot hold the 256 bytes"):
        train_tokenizer("byte-level", texts, 255)
    with pytest.raises(TokenizerError, match=r"cannot learn 300 tokens .* characters and the bytes alone are 1\d\d\d"):
        train_tokenizer("sentencepiece-bpe", texts, 300)


def test_an_unknown_kind():
    with pytest.raises(TokenizerError, match="no kind of tokenizer 'wordpiece'; known: byte-level"):
        train_tokenizer("wordpiece", [], 300)
