"""predict, stream and predict_batch against transformers, and with a stand-in model that says what it is told."""

import inspect
import random
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aquila2_tut import assets
from aquila2_tut.chat import ChatError, PredictMixin, TemplateError, get_template
from aquila2_tut.chat.generate import AnswerText, Sampling, candidates
from aquila2_tut.config import Aquila2Config
from aquila2_tut.model.modeling import Aquila2ForCausalLM
from aquila2_tut.tokenizer import encode_trusted, load_tokenizer

EOS = 100_007


@cache
def load(name):
    try:
        return load_tokenizer(name)
    except assets.AssetError as error:
        pytest.skip(f"asset not fetched: {error}")


@pytest.fixture
def aquila():
    return load("Aquila2-7B")


class Said(int):
    """How many tokens a stand-in has said, in place of a cache."""

    def get_seq_length(self):
        return int(self)


class Scripted(PredictMixin):
    """A stand-in for a model, which says the given token ids one after another and remembers what it was asked."""

    def __init__(self, *ids, rows=None, vocab_size=100_008, context_length=2048, eos=EOS):
        self.rows, self.asked, self.training = rows or [ids], [], False
        self.config = SimpleNamespace(
            vocab_size=vocab_size, context_length=context_length, max_position_embeddings=context_length
        )
        self.generation_config = SimpleNamespace(eos_token_id=eos)
        self.device = torch.device("cpu")
        self.aquila_name = "AquilaChat2-7B"

    def __call__(self, input_ids, past_key_values=None, **kwargs):
        step = past_key_values or 0
        self.asked.append(input_ids[0].tolist())
        logits = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        for row, script in enumerate(self.rows):
            logits[row, 0, script[min(step, len(script) - 1)]] = 50.0
        return SimpleNamespace(logits=logits, past_key_values=Said(step + 1))

    @classmethod
    def saying(cls, text, **options):
        return cls(*load("Aquila2-7B").encode(text), EOS, **options)


class TinyLlama(PredictMixin, LlamaForCausalLM):
    """transformers' own model with predict mixed in."""


@cache
def tiny(kind="aquila", rows=100_008):
    torch.manual_seed(0)
    shape = {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.5,
    }
    if kind == "llama":
        model = TinyLlama(LlamaConfig(**shape, bos_token_id=100_006, eos_token_id=EOS, pad_token_id=0))
    else:
        model = Aquila2ForCausalLM(Aquila2Config(**shape))
    model.aquila_name = "AquilaChat2-7B"
    return model.eval()


# Sampling


@pytest.mark.parametrize(
    ("top_p", "topk", "temperature"), [(0.9, 15, 1.0), (0.5, 3, 0.7), (0.95, 0, 1.3), (1.0, 40, 2.0), (0.01, 5, 1.0)]
)
def test_candidates_are_those_of_transformers_warpers_in_the_original_order(top_p, topk, temperature):
    warpers = LogitsProcessorList(
        [TopPLogitsWarper(top_p), TopKLogitsWarper(topk or 500), TemperatureLogitsWarper(temperature)]
    )
    torch.manual_seed(1)
    for scale in (0.1, 1.0, 5.0, 20.0):
        logits = torch.randn(500) * scale
        probs, ids = candidates(logits, top_p, topk, temperature)
        expected = warpers(None, logits.unsqueeze(0).clone())[0].softmax(0)
        ours = torch.zeros(500).scatter(0, ids, probs)
        assert (ours > 0).equal(expected > 0)
        assert torch.allclose(ours, expected, atol=1e-6)


def test_top_p_looks_at_probabilities_before_the_temperature():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert candidates(logits, 0.49, 3, 100.0)[1].tolist() == [0]
    assert candidates(logits, 0.51, 3, 0.01)[1].tolist() == [0, 1]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampling, generator = Sampling(top_p=1.0, topk=3, temperature=0.8), torch.Generator().manual_seed(0)
    drawn = torch.tensor([sampling.pick(logits, [generator])[0] for _ in range(4000)])
    expected = (torch.tensor([2.0, 1.0, 0.0]) / 0.8).softmax(0)
    assert torch.allclose(drawn.bincount(minlength=4)[:3] / 4000, expected, atol=0.03)
    assert drawn.max() < 3


def test_a_tiny_temperature_does_not_overflow():
    probs, _ = candidates(torch.tensor([80.0, 79.0]), 1.0, 2, 1e-30)
    assert probs.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"topk": 1}, {"temperature": 0.0, "seed": None}])
def test_greedy(aquila, options):
    model = tiny()
    assert model.predict("Hello!", aquila, 20, **options) == model.predict("Hello!", aquila, 20, top_p=1e-9)


def test_seeds(aquila):
    model = tiny()

    def say(seed):
        return model.predict("Hello!", aquila, 12, seed=seed, topk=0, top_p=1.0)

    state = torch.get_rng_state()
    assert say(7) == say(7)
    assert say(7) != say(8)
    assert torch.equal(torch.get_rng_state(), state)
    for unseeded in (0, -1, None):
        torch.manual_seed(3)
        first, second = say(unseeded), say(unseeded)
        torch.manual_seed(3)
        assert first != second and say(unseeded) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"topk": -1}, "topk is -1"),
        ({"topk": 1.5}, "topk is 1.5"),
        ({"max_gen_len": 0}, "max_gen_len is 0"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"device": "cuda"}, "device is 'cuda', but the model is on 'cpu'"),
        ({"tokenizer": None}, "no tokenizer"),
        ({"sft": False, "history": [("human", "a"), ("gpt", "b")]}, "history and system need a chat template"),
        ({"sft": False, "system": "Be brief."}, "history and system need a chat template"),
    ],
)
def test_wrong_settings_are_refused(aquila, options, message):
    for method in (Scripted(EOS).predict, Scripted(EOS).stream):
        with pytest.raises(ChatError, match=message):
            method("Hello!", **{"tokenizer": aquila, **options})


def test_unknown_arguments_are_refused(aquila):
    with pytest.raises(TypeError, match="top_k"):
        Scripted(EOS).predict("Hello!", tokenizer=aquila, top_k=5)


def test_arguments_order_and_defaults_are_the_original_ones():
    original = {
        "text": inspect.Parameter.empty,
        "tokenizer": None,
        "max_gen_len": 200,
        "top_p": 0.9,
        "seed": 123,
        "topk": 15,
        "temperature": 1.0,
        "sft": True,
    }
    found = list(inspect.signature(PredictMixin.predict).parameters.values())[1:]
    assert {item.name: item.default for item in found[: len(original)]} == original
    assert [item.name for item in found[len(original) :][:4]] == ["convo_template", "device", "model_name", "history"]
    assert found == list(inspect.signature(PredictMixin.stream).parameters.values())[1:]


def test_logits_that_are_no_numbers(aquila):
    class Broken(Scripted):
        def __call__(self, *args, **kwargs):
            output = super().__call__(*args, **kwargs)
            output.logits[:] = torch.nan
            return output

    for temperature in (0, 1.0):
        with pytest.raises(ChatError, match="NaN"):
            Broken(5).predict("Hello!", aquila, temperature=temperature)


# The prompt


def test_the_prompt_is_the_templates_and_compat_adds_a_space(aquila):
    for name, extra in {"aquila-v1": 221, "aquila-legacy": 257}.items():
        model = Scripted(EOS)
        model.predict("Hello!", aquila, 1, convo_template=name)
        model.predict("Hello!", aquila, 1, convo_template=name, compat=True)
        plain, compat = model.asked
        rendered = get_template(name).render([("human", "Hello!"), ("gpt", None)])
        assert plain == encode_trusted(aquila, rendered)
        assert compat == encode_trusted(aquila, rendered + " ") and compat[-1] == extra


def test_the_template_is_chosen_by_name(aquila):
    def asked(**options):
        model = Scripted(EOS)
        model.predict("Hello!", aquila, 1, **options)
        return aquila.decode(model.asked[0])

    assert asked() == "<|startofpiece|>Hello!<|endofpiece|>"
    assert asked(model_name="aquilachat2-34b").endswith("\n\n### Human: Hello!\n### Assistant: ")
    assert asked(convo_template=get_template("aquila-v1")) == asked(convo_template="") == asked()
    assert asked(convo_template="aquila-v2", system="Be brief.").startswith("Be brief.\n\n<|startofpiece|>")


def test_models_without_a_template(aquila):
    model = Scripted(EOS)
    model.aquila_name = "Aquila2-7B"
    with pytest.raises(TemplateError, match="sft=False"):
        model.predict("Hello!", aquila)
    model.aquila_name = None
    with pytest.raises(TemplateError, match="does not know its own name"):
        model.predict("Hello!", aquila)
    with pytest.raises(TemplateError, match="no template 'aquila-v9'"):
        model.predict("Hello!", aquila, convo_template="aquila-v9")


@pytest.mark.parametrize("text", ["", "  \n", None, 7, ["Hello!"], "a\ud800"])
def test_a_prompt_that_is_none(aquila, text):
    with pytest.raises(ChatError, match="prompt"):
        Scripted(EOS).predict(text, aquila)


def test_a_base_model_may_continue_white_space_but_not_nothing(aquila):
    model = Scripted(aquila.encode("a")[0], EOS)
    assert model.predict("\n\n", aquila, sft=False) == "a"
    assert model.asked[0] == [982]
    with pytest.raises(ChatError, match="empty"):
        model.predict("", aquila, sft=False)


def test_control_tokens_in_the_question_are_text(aquila):
    model = Scripted(EOS)
    model.predict("</s><|endofpiece|>", aquila, 1)
    assert [index for index in model.asked[0] if index >= 100_000] == [100_000, 100_001]


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(aquila):
    model = Scripted.saying("fine", context_length=20)
    with pytest.raises(
        ChatError, match=r"prompt has 4 tokens and max_gen_len asks for 17 more, .* holds 20.*at most 16"
    ):
        model.predict("Hello!", aquila, max_gen_len=17)
    assert model.predict("Hello!", aquila, max_gen_len=16) == "fine"
    with pytest.raises(ChatError, match="/reset"):
        model.predict("Hello! " * 30, aquila, max_gen_len=1)


def test_the_context_counts_rotary_scaling(aquila):
    config = tiny().config.to_dict() | {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}
    model = Aquila2ForCausalLM(Aquila2Config(**{**config, "num_hidden_layers": 1})).eval()
    assert model.predict("a " * 600, aquila, 1, sft=False)
    with pytest.raises(ChatError, match="holds 1024"):
        model.predict("a " * 1200, aquila, 1, sft=False)


def test_the_tokenizer_of_another_model(aquila):
    with pytest.raises(ChatError, match="id 100001, but the model knows 49152"):
        Scripted(EOS, vocab_size=49_152).predict("Hello!", aquila)


# History


def test_a_conversation_goes_on(aquila):
    history = []
    first = Scripted.saying(" Hi!")
    assert first.predict("Hello!", aquila, history=history) == "Hi!"
    second = Scripted.saying("Fine.")
    assert second.predict("How are you?", aquila, history=history) == "Fine."
    assert history == [("human", "Hello!"), ("gpt", "Hi!"), ("human", "How are you?"), ("gpt", "Fine.")]
    assert aquila.decode(second.asked[0]) == get_template("aquila-v1").render([*history[:3], ("gpt", None)])


def test_the_original_role_names_are_understood_and_left_as_they_are(aquila):
    history = [("USER", "Hello!"), ("ASSISTANT", "Hi!")]
    model = Scripted.saying("Fine.")
    model.predict("How are you?", aquila, history=history)
    assert history == [("USER", "Hello!"), ("ASSISTANT", "Hi!"), ("human", "How are you?"), ("gpt", "Fine.")]
    assert aquila.decode(model.asked[0]).startswith("<|startofpiece|>Hello!<|endofpiece|>Hi!</s>")


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([("human", "a"), ("human", "b")], "turns 0 and 1 are both human"),
        ([("human", "a"), ("gpt", "b"), ("human", "c")], "turn 2, the last, is no answer"),
        ([("human", "a"), ("gpt", None)], "turn 1, the last, is no answer"),
        ([("gpt", "a"), ("human", "b")], "turn 0 is gpt"),
        ((("human", "a"), ("gpt", "b")), "history is a tuple"),
    ],
)
def test_a_broken_history_is_named_and_left_alone(aquila, history, message):
    before = list(history)
    with pytest.raises(ChatError, match=message):
        Scripted(EOS).predict("Hello!", aquila, history=history)
    assert list(history) == before


def test_a_failed_or_interrupted_call_leaves_the_history_alone(aquila):
    class Failing(Scripted):
        def __call__(self, *args, past_key_values=None, **kwargs):
            if past_key_values:
                raise KeyboardInterrupt
            return super().__call__(*args, past_key_values=past_key_values, **kwargs)

    history = [("human", "a"), ("gpt", "b")]
    with pytest.raises(KeyboardInterrupt):
        Failing(*aquila.encode("Hello world")).predict("Hello!", aquila, history=history)
    stream = Scripted.saying("Hello world").stream("Hello!", aquila, history=history)
    next(stream)
    stream.close()
    assert history == [("human", "a"), ("gpt", "b")]


# The answer


@pytest.mark.parametrize(
    ("template", "said", "answer"),
    [
        ("aquila-chat", " Hi there.###Human: and", "Hi there."),
        ("aquila", " Hi.[UNK] more", "Hi."),
        ("aquila-legacy", "Hi.</s> more", "Hi."),
        ("aquila-v1", "## A\n### B\n[UNK] </ s> end", "## A\n### B\n[UNK] </ s> end"),
        ("aquila-v1", "Hi<|endoftext|>!", "Hi"),
        ("aquila-v2", "Hi<|startofpiece|>!", "Hi"),
        ("aquila-v1", "  two spaces", " two spaces"),
        ("aquila-chat", "ends with ##", "ends with ##"),
        ("aquila-chat", "###", ""),
        ("aquila-v1", "北京😀的e\u0301👩‍👩‍👧", "北京😀的e\u0301👩‍👩‍👧"),
    ],
)
def test_an_answer_ends_at_its_templates_stop_strings_and_nowhere_else(aquila, template, said, answer):
    pieces = list(Scripted.saying(said).stream("Hello!", aquila, convo_template=template))
    assert "".join(pieces) == answer
    assert all(pieces)
    model = Scripted.saying(said)
    assert model.predict("Hello!", aquila, convo_template=template) == answer


def test_generation_stops_as_soon_as_a_stop_string_is_there(aquila):
    model = Scripted.saying("Hi###Human: and so on for a long time")
    model.predict("Hello!", aquila, convo_template="aquila-chat")
    assert len(model.asked) == len(aquila.encode("Hi###"))
    model = Scripted(*aquila.encode("Hi"), 0, *aquila.encode("more"))
    assert model.predict("Hello!", aquila) == "Hi"  # id 0 is <|endoftext|>, a stop string of aquila-v1


def test_an_answer_has_at_least_one_token(aquila):
    class EagerToStop(Scripted):
        def __call__(self, *args, past_key_values=None, **kwargs):
            output = super().__call__(*args, past_key_values=past_key_values, **kwargs)
            output.logits[..., 22299] = 10.0
            return output

    assert EagerToStop(EOS).predict("Hello!", aquila) == "Hello"


def test_ids_that_are_no_control_tokens_end_nothing(aquila):
    """The configuration of the first generation says that id 2, a quotation mark, ends an answer."""
    said = 'He said "yes".'
    assert Scripted.saying(said, eos=2).predict("Hello!", aquila) == said
    assert Scripted(*aquila.encode("yes"), 100_003, eos=[2, 100_003]).predict("Hello!", aquila) == "yes"


def test_a_continued_text_keeps_its_space_unless_compat_is_asked(aquila):
    model = Scripted.saying(" there was ### [UNK]")
    assert model.predict("Once", aquila, sft=False) == " there was ### [UNK]"
    assert model.predict("Once", aquila, sft=False, compat=True) == "there was ### [UNK]"


def test_pieces_are_the_whole_text_for_any_tokens(aquila):
    """Random tokens: broken UTF-8, control tokens, stop strings by chance."""
    pick = random.Random(5)
    short = [index for index in range(1, 3000) if len(aquila.decode([index])) < 3]
    for _ in range(150):
        ids = [pick.choice([pick.choice(short), pick.randrange(1, 257), pick.randrange(100_008)]) for _ in range(40)]
        whole = aquila.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        stop = [whole[at : at + size] for at, size in ((12, 3), (30, 2), (20, 1))] if pick.random() < 0.7 else []
        stop = [text for text in stop if text and "\ufffd" not in text]
        text = AnswerText(aquila, stop, strip_space=True)
        pieces = []
        for index in ids:
            pieces.append(text.push(index))
            if text.stopped:
                break
        pieces.append(text.finish())
        ends = [at for at in (whole.find(item) for item in stop) if at >= 0]
        expected = whole[: min(ends)] if ends else whole
        assert "".join(pieces) == expected.removeprefix(" ")


def test_nothing_is_shown_before_it_is_certain(aquila):
    text = AnswerText(aquila, ["###"])
    shown = [text.push(index) for index in aquila.encode("a") + aquila.encode("#") * 2 + aquila.encode("b")]
    assert shown == ["a", "", "", "##b"]
    llama = aquila.encode("🦙")
    text = AnswerText(aquila)
    assert len(llama) > 1
    assert [text.push(index) for index in llama] == [""] * (len(llama) - 1) + ["🦙"]


# Whole models


@pytest.mark.parametrize("kind", ["llama", "aquila"])
def test_greedy_answers_are_those_of_transformers_generate(aquila, kind):
    model = tiny(kind)
    for text in ("Hello, world!", "北京的十大景点是什么?"):
        ids = torch.tensor([aquila.encode(text)])
        expected = model.generate(ids, max_new_tokens=24, min_new_tokens=1, do_sample=False, eos_token_id=EOS)
        answer = model.predict(text, aquila, 24, temperature=0, sft=False)
        assert answer == aquila.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llama", "aquila"])
def test_a_batch_is_answered_as_its_rows_are(aquila, kind):
    model = tiny(kind)
    texts = ["Hello!", "北京的十大景点是什么?", "a " * 30, "Hi!"]
    for options in ({"temperature": 0}, {"seed": 5}, {"temperature": 0, "sft": False}):
        alone = [model.predict(text, aquila, 16, **options) for text in texts]
        assert model.predict_batch(texts, aquila, 16, **options) == alone
        assert list(map("".join, (model.stream(text, aquila, 16, **options) for text in texts))) == alone


def test_rows_of_a_batch_end_by_themselves(aquila):
    model = Scripted(rows=[[*aquila.encode("Hi!"), EOS], [*aquila.encode("One two three"), EOS]])
    assert model.predict_batch(["a", "b c d"], aquila) == ["Hi!", "One two three"]
    assert len(model.asked) == len(aquila.encode("One two three")) + 1


def test_wrong_batches(aquila):
    model = Scripted(EOS)
    assert model.predict_batch([], aquila) == []
    with pytest.raises(ChatError, match="takes a list"):
        model.predict_batch("Hello!", aquila)
    with pytest.raises(ChatError, match="prompt 1: the prompt is empty"):
        model.predict_batch(["a", ""], aquila)


def test_a_model_in_training_answers_without_dropout_and_goes_on_training(aquila):
    model = tiny("llama")
    expected = model.predict("Hello!", aquila, 8, temperature=0)
    model.config.attention_dropout = 0.5
    model.train()
    try:
        assert model.predict("Hello!", aquila, 8, temperature=0) == expected
        assert model.training and model.model.training
    finally:
        model.eval()


def test_gradients_can_be_taken_while_a_stream_is_open(aquila):
    stream = tiny().stream("Hello!", aquila, 5)
    next(stream)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
