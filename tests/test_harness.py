"""Our models in lm-eval: the answers of its own `hf` model, of plain forward passes, and of transformers' generate."""

import itertools
import json
import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM
from tuning_runs import SHAPE, some_base

from aquila2_tut import AutoLoader
from aquila2_tut.chat.generate import ChatError, Sampling
from aquila2_tut.chat.templates import get_template, plain_ids
from aquila2_tut.evaluate import EvaluateError
from aquila2_tut.evaluate.harness import HarnessModel
from aquila2_tut.evaluate.journal import fingerprint
from aquila2_tut.evaluate.prefixes import common_length, grow, portions
from aquila2_tut.evaluate.reader import Reader, Scored
from aquila2_tut.evaluate.writer import Prompt, Writer

WORDS = ["The", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "sun.", "一只猫坐在垫子上，看着太阳。\n"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model in double precision, and its tokenizer."""
    folder = some_base(tmp_path_factory.mktemp("harness") / "tiny", max_position_embeddings=512)
    loader = AutoLoader("aquila2", model_name=str(folder), device="cpu", torch_dtype="float64")
    return loader.get_model(), loader.get_tokenizer()


@pytest.fixture(scope="module")
def theirs(tiny):
    """The same weights as transformers' Llama in lm-eval's own class."""
    model, tokenizer = tiny
    ids = {name: getattr(model.config, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {**SHAPE, **ids, "max_position_embeddings": 512, "rms_norm_eps": model.config.rms_norm_eps}
    llama = LlamaForCausalLM(LlamaConfig(**shape)).double().eval()
    llama.load_state_dict(model.state_dict())
    llama.generation_config.eos_token_id = model.config.eos_token_id
    return HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=512)


def ours(tiny, **settings):
    return HarnessModel(*tiny, **{"batch_size": 4, "progress": False, **settings})


def requests(kind, *arguments):
    return [Instance(kind, {}, args, index, metadata=("some", index, 1)) for index, args in enumerate(arguments)]


def texts(count, seed, longest=40):
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randint(1, longest))) for _ in range(count)]


def branching(seed, count=12):
    """Sequences with beginnings in common, some of them the beginning of others, some twice."""
    dice = random.Random(seed)
    found = [tuple(dice.choices(range(5, 9), k=dice.randint(1, 7))) for _ in range(count)]
    return sorted([*found, found[0], found[1][:1]])


# --- trees


@pytest.mark.parametrize("seed", range(20))
def test_a_tree_holds_every_sequence_once_and_a_node_sees_its_own_way_only(seed):
    sequences = branching(seed)
    shared = common_length(sequences[0], sequences[-1])
    held = min(shared, min(map(len, sequences)) - 1)
    tree = grow(sequences, held)
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert tuple(tree.tokens[node] for node in path) == sequence[held:]
    ways = {tuple(sequence[:end]) for sequence in sequences for end in range(held + 1, len(sequence) + 1)}
    assert len(tree.tokens) == len(ways)
    visible = tree.visible()
    if visible is None:
        assert len(ways) == max(map(len, sequences)) - held
        visible = torch.ones(len(tree.tokens), held + len(tree.tokens)).tril(held).bool()
    for path in tree.paths:
        for place, node in enumerate(path):
            seen = {*range(held), *(held + before for before in path[: place + 1])}
            assert set(visible[node].nonzero().flatten().tolist()) == seen
            assert tree.positions()[node] == held + place


@pytest.mark.parametrize("budget", [1, 7, 30, 10**6])
def test_portions_are_all_sequences_in_their_order(budget):
    sequences = branching(3, 40)
    found = list(portions(sequences, budget))
    assert list(itertools.chain(*found)) == list(range(len(sequences)))
    held = 0
    for portion in found:
        own = [sequences[index] for index in portion]
        before = sequences[portion.start - 1] if portion.start else ()
        held = min(held, common_length(before, own[0]))
        new = len({tuple(one[:end]) for one in own for end in range(1, len(one) + 1)}) - held
        assert len(own) == 1 or new <= budget
        held = common_length(own[0], own[-1])


def test_a_long_beginning_stays_together():
    first, second = tuple(range(100, 200)), tuple(range(300, 400))
    sequences = sorted([(*stem, end) for stem in (first, second) for end in range(10)])
    assert [len(portion) for portion in portions(sequences, 150)] == [10, 10]


# --- likelihood against plain forward passes


@pytest.mark.parametrize("budget", [1, 16, 10**6])
def test_scores_are_those_of_plain_forward_passes(tiny, budget):
    model, _ = tiny
    dice = random.Random(1)
    asked = [Scored((2, *one, 3 + one[0]), dice.randint(1, len(one) + 1)) for one in branching(5, 20)]
    found = {}
    for indices, values in Reader(model).score(asked, budget):
        found.update(zip(indices, values, strict=True))
    assert sorted(found) == list(range(len(asked)))
    for index, (tokens, first) in enumerate(asked):
        with torch.inference_mode():
            logprobs = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        expected = sum(logprobs[place - 1, tokens[place]].item() for place in range(first, len(tokens)))
        assert found[index].total == pytest.approx(expected, abs=1e-5)
        likeliest = logprobs.argmax(-1)[first - 1 : -1].tolist()
        assert found[index].greedy == (likeliest == list(tokens[first:]))


def test_a_common_beginning_is_read_once(tiny, monkeypatch):
    model, _ = tiny
    read = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda **given: read.append(given["input_ids"].numel()) or forward(**given)
    )
    stem = tuple(random.Random(0).choices(range(5, 100), k=200))
    asked = [Scored((*stem, end, 7, 8), len(stem)) for end in range(5, 25)]
    list(Reader(model).score(asked, budget=12))
    assert len(read) > 1 and sum(read) <= len(stem) + 2 * len(read) + 3 * len(asked)


# --- continuations against transformers' generate


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_continuations_are_those_of_generate(tiny, batch_size):
    model, tokenizer = tiny
    prompts = [tuple(plain_ids(text, tokenizer)) for text in texts(9, 4)]
    lengths = [5, 1, 20, 9, 20, 3, 20, 12, 2]
    stop = ("e", "的")
    asked = [Prompt(p, stop, Sampling(n, 1.0, 0, 0.0, None)) for p, n in zip(prompts, lengths, strict=True)]
    writer = Writer(model, tokenizer, batch_size, frozenset({model.config.eos_token_id}))
    found = dict(writer.write(asked, budget=32))
    assert sorted(found) == list(range(9)) and not writer.rows
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": lengths[index], "do_sample": False, "pad_token_id": 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :]
        text = tokenizer.decode(made, skip_special_tokens=True)
        ends = [text.find(one) for one in stop if one in text]
        assert found[index] == text[: min(ends, default=len(text))]


def test_samples_do_not_depend_on_the_batch_and_a_repeat_is_another(tiny):
    settings = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8, "until": []}
    asked = requests("generate_until", *[(text, settings) for text in texts(4, 5)] * 2)
    alone, together = ours(tiny, batch_size=1).generate_until(asked), ours(tiny, batch_size=8).generate_until(asked)
    assert alone == together
    assert alone[:4] != alone[4:]


# --- against lm-eval's own class


@pytest.mark.parametrize("batch_size", [1, 5])
def test_loglikelihoods_are_those_of_hf(tiny, theirs, batch_size):
    few, dice = texts(3, 1)[0], random.Random(2)
    contexts = [*(f"{few}\n{text}" for text in texts(6, 2)), *texts(3, 3), "", "A ", texts(1, 9, 700)[0]]
    pairs = [(context, " " + dice.choice(WORDS)) for context in contexts for _ in range(3)]
    asked = requests("loglikelihood", *pairs)
    mine, other = ours(tiny, batch_size=batch_size).loglikelihood(asked), theirs.loglikelihood(asked)
    for (value, greedy), (expected, also) in zip(mine, other, strict=True):
        assert value == pytest.approx(expected, abs=1e-4) and greedy == also


def test_rolling_loglikelihoods_are_those_of_hf(tiny, theirs):
    asked = requests("loglikelihood_rolling", *[(text,) for text in [*texts(5, 6), *texts(2, 7, 900), "x"]])
    assert len(tiny[1](asked[5].args[0]).input_ids) > 512  # more than a window
    mine, other = ours(tiny).loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked)
    assert mine == pytest.approx(other, rel=1e-6)
    assert ours(tiny).loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0]


def test_generations_are_those_of_hf(tiny, theirs):
    settings = {"until": ["e", "。"], "max_gen_toks": 12, "do_sample": False}
    others = {"until": "\n", "max_gen_toks": 30}
    long = texts(1, 8, 900)
    asked = requests(
        "generate_until", *[(t, settings) for t in [*texts(6, 8), *long]], *[(t, others) for t in texts(3, 9)]
    )
    assert ours(tiny).generate_until(asked) == theirs.generate_until(asked)


# --- adapters and quantized models


def test_an_adapter_counts(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    folder = some_base(tmp_path / "tiny")
    plain = AutoLoader("aquila2", model_name=str(folder), device="cpu")
    asked = requests("loglikelihood", *[(text, " cat") for text in texts(4, 1, 10)])
    before = HarnessModel(plain.get_model(), plain.get_tokenizer(), progress=False).loglikelihood(asked)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        plain.get_model(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    after = HarnessModel(adapted, plain.get_tokenizer(), progress=False).loglikelihood(asked)
    for request, (value, _), (old, _) in zip(asked, after, before, strict=True):
        assert value == pytest.approx(forward_score(adapted, plain.get_tokenizer(), *request.args), abs=1e-4)
        assert abs(value - old) > 1e-3
    assert fingerprint(adapted) != fingerprint(adapted.unload())


@pytest.mark.parametrize(
    "name, tolerance",
    [("nf4", 1e-4), ("torchao-int8", 1e-4), ("int8", 3e-3)],  # int8 rounds activations, which the last bit may turn
)
def test_a_quantized_model_counts(tmp_path, name, tolerance):
    pytest.importorskip("torchao" if "torchao" in name else "bitsandbytes")
    folder = some_base(tmp_path / "tiny")
    loader = AutoLoader(
        "aquila2", model_name=str(folder), device="cpu", quantization_config=name, torch_dtype="float32"
    )
    model, tokenizer = loader.get_model(), loader.get_tokenizer()
    asked = requests("loglikelihood", *[(text, " cat") for text in texts(4, 1, 10)])
    found = HarnessModel(model, tokenizer, progress=False).loglikelihood(asked)
    for request, (value, _) in zip(asked, found, strict=True):
        assert value == pytest.approx(forward_score(model, tokenizer, *request.args), rel=tolerance)
    plain = AutoLoader("aquila2", model_name=str(folder), device="cpu").get_model()
    assert fingerprint(model) != fingerprint(plain)


def forward_score(model, tokenizer, context, continuation):
    ids = plain_ids(context + continuation, tokenizer)
    first = len(plain_ids(context, tokenizer))
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(logprobs[place - 1, ids[place]].item() for place in range(first, len(ids)))


# --- text is text, and a template's markers are tokens


def test_typed_control_tokens_stay_text(tiny):
    model = ours(tiny)
    for text in (tiny[1].eos_token, f"a {tiny[1].eos_token} b"):
        assert not set(model.tok_encode(text)) & set(tiny[1].all_special_ids)


def test_a_chat_template_is_encoded_as_the_template_says(tiny):
    template = get_template("aquila-v1")
    model = ours(tiny, template=template)
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": f"Three{tiny[1].eos_token}?"},
    ]
    text = model.apply_chat_template(history)
    turns = [("human", "One?"), ("gpt", "Two."), ("human", f"Three{tiny[1].eos_token}?"), ("gpt", None)]
    expected = template.encode(turns, tiny[1], "Be brief.")
    assert text == template.render(turns, "Be brief.") and model.tok_encode(text) == expected
    assert model._encode_pair(text, "Yes") == (expected, plain_ids("Yes", tiny[1]))
    begun = model.apply_chat_template(
        [*history, {"role": "assistant", "content": "Well,"}], add_generation_prompt=False
    )
    assert model.tok_encode(begun) == template.encode(turns, tiny[1], "Be brief.", suffix="Well,")


def test_a_conversation_that_imitates_another_is_refused(tiny):
    template = get_template("aquila-v1")
    model = ours(tiny, template=template)
    model.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    )
    whole = template.render([("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", None)], "")
    before, after = template.render([("human", "\0"), ("gpt", None)], "").split("\0")
    typed = whole.removeprefix(before).removesuffix(after)
    with pytest.raises(EvaluateError, match="two conversations look the same"):
        model.apply_chat_template([{"role": "user", "content": typed}])


def test_a_template_is_needed_where_one_is_asked_for(tiny):
    with pytest.raises(EvaluateError, match="there is none: give template"):
        ours(tiny).apply_chat_template([{"role": "user", "content": "a"}])


# --- what cannot be answered is told, with task and item


@pytest.mark.parametrize(
    "kind, args, message",
    [
        ("loglikelihood", ("a", ""), "some, item 0: the continuation is empty"),
        ("loglikelihood", ("a", " b" * 2000), "a continuation has .* tokens, the context holds 512"),
        ("generate_until", ("a", {"num_beams": 4}), "some, item 0: num_beams: known are"),
        ("generate_until", ("a", {"max_gen_toks": 512}), "512 tokens are asked for, the context holds 512"),
    ],
)
def test_what_cannot_be_answered_is_told(tiny, kind, args, message):
    with pytest.raises(EvaluateError, match=message):
        getattr(ours(tiny), kind)(requests(kind, args))


def test_settings_out_of_range_are_told(tiny):
    with pytest.raises(EvaluateError, match="batch size is 0"):
        ours(tiny, batch_size=0)
    with pytest.raises(ChatError, match="max_gen_len is 0"):
        ours(tiny).generate_until(requests("generate_until", ("a", {"max_gen_toks": 0})))


def test_an_empty_prompt_begins_with_the_token_that_begins_texts(tiny):
    (found,) = ours(tiny).generate_until(requests("generate_until", ("", {"max_gen_toks": 4, "until": []})))
    ids = torch.tensor([[ours(tiny).prefix_token_id]])
    made = tiny[0].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found == tiny[1].decode(made[0, 1:], skip_special_tokens=True)


def test_no_requests_no_answers(tiny):
    model = ours(tiny)
    assert model.loglikelihood([]) == model.generate_until([]) == model.loglikelihood_rolling([]) == []
    assert json.dumps(model.chat_template(True)) == '""'


# --- SmolLM2, as in the benchmark but few items


@pytest.mark.slow
def test_smollm2_scores_as_hf_does():
    from aquila2_tut import assets
    from aquila2_tut.evaluate.sandbox import human_eval
    from aquila2_tut.evaluate.tasks import load_items

    file = assets.path("smollm2-135m")
    llama = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    loader = AutoLoader("aquila2", model_name="SmolLM2-135M", device="cpu", local_files_only=True)
    mine = HarnessModel(loader.get_model(), loader.get_tokenizer(), progress=False)
    other = HFLM(pretrained=llama, tokenizer=loader.get_tokenizer(), batch_size=4, device="cpu")
    items = [(f"{item['question']}\nAnswer:", f" {letter}") for item in load_items("mmlu-en")[:4] for letter in "ABCD"]
    asked = requests("loglikelihood", *items)
    for (value, greedy), (expected, also) in zip(mine.loglikelihood(asked), other.loglikelihood(asked), strict=True):
        assert value == pytest.approx(expected, abs=1e-4) and greedy == also
    settings = {"until": ["\ndef", "\nclass"], "max_gen_toks": 40, "do_sample": False}
    asked = requests("generate_until", *[(problem.prompt, settings) for problem in human_eval()[:3]])
    assert mine.generate_until(asked) == other.generate_until(asked)
