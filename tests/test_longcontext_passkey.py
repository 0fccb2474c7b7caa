"""Numbers in long texts: the items are what they say, and scores are those of whole texts read without a cache."""

import math
from random import Random

import pytest
import torch
from tiny import shape, vocabulary

from aquila2_tut.config import Aquila2Config
from aquila2_tut.longcontext import LongContextError, Maker, accuracy, ask, make_items
from aquila2_tut.longcontext.passkey import ASK, KEYS, Answer, scatter
from aquila2_tut.model import Aquila2ForCausalLM

LINES = ["The cat sat on the mat.\n", "Nobody asked it why, and it did not say.\n", "小猫坐在垫子上。\n", "Tea?\n"]
SHAPE = shape(48)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return vocabulary(
        tmp_path_factory.mktemp("vocabulary"), [*LINES, "The number of the garden is", "花园的号码是"] * 3, 330
    )


def maker(tokenizer, language="en", digits=1):
    return Maker(tokenizer, language, tokenizer(LINES).input_ids, digits)


@pytest.mark.parametrize(("language", "digits"), [("en", 1), ("zh", 1), ("en", 5), ("zh", 3)])
def test_an_item_is_as_long_as_asked_and_holds_its_needle_once(tokenizer, language, digits):
    made = maker(tokenizer, language, digits)
    for item in make_items(made, (160, 300), (0.0, 0.4, 1.0), 2):
        (question,) = item.questions
        longest = max(map(len, question.candidates))
        assert len(item.context) + len(question.asked) + longest == item.length
        assert item.context[0] == tokenizer.bos_token_id
        asked = tokenizer.decode(question.asked)
        said = {tokenizer.decode([*question.asked, *ids]).removeprefix(asked).strip() for ids in question.candidates}
        assert len(said) == 10 and all(len(number) == digits and number.isdigit() for number in said)
        right = tokenizer.decode([*question.asked, *question.candidates[0]])
        assert tokenizer.decode(item.context).count(right) == tokenizer.decode(item.context).count(asked) == 1
        assert asked in {ASK[language].format(key=key) for key in KEYS[language]}


def test_a_needle_lies_at_its_depth(tokenizer):
    made, longest = maker(tokenizer), max(map(len, tokenizer(LINES).input_ids))
    for depth in (0.0, 0.25, 0.5, 1.0):
        for item in make_items(made, (400,), (depth,), 3):
            text = tokenizer.decode(item.context[1:])
            before, _, after = text.partition(text[text.index("The number of") :].split("\n")[0] + "\n")
            first, last = len(tokenizer(before).input_ids), len(tokenizer(after).input_ids)
            assert abs(first - depth * (first + last)) <= longest / 2 + 1


def test_scattering_keeps_every_line_in_order():
    lines = [[1, 1, 1], [2], [3, 3]]
    assert scatter(lines, []) == [1, 1, 1, 2, 3, 3]
    assert scatter(lines, [(0.0, [8]), (1.0, [9]), (0.6, [7])]) == [8, 1, 1, 1, 2, 7, 3, 3, 9]
    assert scatter([], [(0.5, [7])]) == [7]


def test_several_needles_have_keys_of_their_own_and_one_is_asked_about(tokenizer):
    for item in make_items(maker(tokenizer), (400,), (0.5,), 5, needles=4):
        text = tokenizer.decode(item.context)
        keys = [line.split("The number of the ")[1].split(" is")[0] for line in text.split("\n") if "number" in line]
        assert len(keys) == len(set(keys)) == 4
        assert tokenizer.decode(item.questions[0].asked).split("the ")[1].removesuffix(" is") in keys


def test_the_same_seed_gives_the_same_items(tokenizer):
    made = maker(tokenizer)
    one, again, other = (make_items(made, (200,), (0.5,), 4, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def naive(model, item):
    """Every candidate behind the whole text, without a cache; greedy decoding one token at a time."""
    rows = []
    for question in item.questions:
        likelihoods = []
        for candidate in question.candidates:
            ids = torch.tensor([[*item.context, *question.asked, *candidate]])
            logits = model(input_ids=ids, use_cache=False, rotary_length=item.length).logits[0].double()
            scores = logits.log_softmax(-1)[-len(candidate) - 1 : -1]
            likelihoods.append(sum(float(row[id]) for row, id in zip(scores, candidate, strict=True)))
        said: list[int] = []
        while len(said) < len(question.candidates[0]):
            ids = torch.tensor([[*item.context, *question.asked, *said]])
            said.append(int(model(input_ids=ids, use_cache=False, rotary_length=item.length).logits[0, -1].argmax()))
        rank = sum(one > likelihoods[0] for one in likelihoods[1:])
        rows.append(Answer(item.language, item.length, question.depth, said == question.candidates[0], rank))
    return rows


@pytest.mark.parametrize("rope", [{}, {"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
@pytest.mark.parametrize("digits", [1, 3])
def test_answers_are_those_of_whole_texts_read_without_a_cache(tokenizer, rope, digits):
    torch.manual_seed(3)
    config = Aquila2Config(**SHAPE, vocab_size=len(tokenizer), pad_token_id=0, rope_parameters=rope or None)
    model = Aquila2ForCausalLM(config).eval()
    model.lm_head.weight.data *= 20
    made = maker(tokenizer, "zh", digits)
    items = [made.item(length, [0.2, 0.8], Random(length)) for length in (100, 150, 180)]
    with torch.no_grad():
        wanted = [row for item in items for row in naive(model, item)]
    assert ask(model, items) == wanted
    assert len({answer.rank for answer in wanted}) > 1


def test_what_the_model_would_say_counts_as_exact(tokenizer):
    """The right answer is put in the place of what a model says, and so must be exact and the likeliest."""
    torch.manual_seed(3)
    model = Aquila2ForCausalLM(Aquila2Config(**SHAPE, vocab_size=len(tokenizer), pad_token_id=0)).eval()
    item = maker(tokenizer).item(120, [0.5], Random(0))
    question = item.questions[0]
    with torch.no_grad():
        ids = torch.tensor([[*item.context, *question.asked]])
        said = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
    question.candidates[0] = [said]
    assert ask(model, [item])[0][3:] == (True, 0)


def test_shares_of_right_answers():
    answers = [Answer("en", 512, 0.5, exact, rank) for exact, rank in ((True, 0), (False, 0), (False, 3), (False, 1))]
    answers.append(Answer("zh", 256, 0.1, False, 0))
    assert accuracy(answers) == {(256, 0.1): 0.0, (512, 0.5): 0.25}
    assert accuracy(answers, "rank") == {(256, 0.1): 1.0, (512, 0.5): 0.5}


def test_guessing_is_right_once_in_ten(tokenizer):
    """A model that knows nothing gives all candidates the same, and the right one, on ties, is the last."""
    model = Aquila2ForCausalLM(Aquila2Config(**SHAPE, vocab_size=len(tokenizer), pad_token_id=0)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    items = make_items(maker(tokenizer), (120,), (0.5,), 3)
    assert {answer.rank for answer in ask(model, items)} == {9}
    numbers = [
        tokenizer.decode(item.questions[0].candidates[0]).strip()
        for item in make_items(maker(tokenizer), (120,), (0.5,), 2000)
    ]
    for digit in "0123456789":
        assert numbers.count(digit) / 2000 == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 2000))


def test_what_cannot_be_made_is_refused(tokenizer):
    with pytest.raises(LongContextError, match="'fr'; known: en, zh"):
        maker(tokenizer, "fr")
    with pytest.raises(LongContextError, match="at least one digit"):
        maker(tokenizer, digits=0)
    with pytest.raises(LongContextError, match="need lines"):
        Maker(tokenizer, "en", [[]])
    with pytest.raises(LongContextError, match="1 needles and 1 questions do not fit into 20"):
        make_items(maker(tokenizer), (20,), (0.5,), 1)
    with pytest.raises(LongContextError, match="not for 99"):
        make_items(maker(tokenizer), (4000,), (0.5,), 1, needles=99)


class Melting:
    """A tokenizer that joins a number with what stands before it."""

    def __call__(self, text, **options):
        ids = [ord(c) for c in text]
        return type("Encoded", (), {"input_ids": [*ids[:-2], 999] if text[-1:].isdigit() else ids})


def test_a_vocabulary_in_which_the_answer_melts_is_refused():
    with pytest.raises(LongContextError, match="melts into the question"):
        make_items(Maker(Melting(), "zh", [[1, 2]]), (200,), (0.5,), 1)
