"""The defects of the original's fine-tuning: each shown to be there in the original, and not to be here.

The original is run where it is at hand: `AQUILA2_UPSTREAM` names a folder that holds the wheel of flagai 1.8.4 and, as
`finetune/finetune.py`, the script of the Aquila2 repository. Nothing of it is in this repository. Without it the tests
compare with `relabelled`, its rule written anew, which is itself compared with the original where that is at hand.

What concerns whole runs is in test_finetune.py, under "what upstream's script got wrong".
"""

import contextlib
import importlib.util
import itertools
import json
import os
import random
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import transformers

from aquila2_tut import assets
from aquila2_tut.chat import get_template
from aquila2_tut.data import encode_conversation
from aquila2_tut.data.masking import conversation_turns
from aquila2_tut.data.tasks import generate
from aquila2_tut.tokenizer import encode_trusted, load_tokenizer

FOLDER = os.environ.get("AQUILA2_UPSTREAM", "")
TWO = ("aquila-v1", "aquila-v2", "aquila", "aquila-legacy")  # it refuses aquila-chat, and has no chatml
COLOURS = ("What are the three primary colors?", "The three primary colors are red, blue, and yellow.")
SIGHTS = ("北京的十大景点是什么?", "天安门广场、故宫、颐和园。")
LENGTH = 2048  # of its scripts
PIECES = [
    *(
        "Hello",
        " world",
        "don't",
        "3.14",
        "A",
        "北京的十大景点",
        "天安门",
        "。",
        "《红楼梦》",
        "🦅",
        " ",
        "\n",
        "\n\n",
        ".",
    ),
    *("###", "###Assistant:", "### Assistant: ", "\n### Assistant: ", "#", ":", "</s>", "<|endofpiece|>"),
]


@cache
def vocabulary():
    try:
        return load_tokenizer("Aquila2-7B")
    except assets.AssetError as error:
        pytest.skip(f"asset not fetched: {error}")


def sample(*texts):
    turns = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]
    return {"id": "1", "conversations": turns}


def labelled(labels):
    return sum(label != -100 for label in labels)


def relabelled(texts, name, length=LENGTH):
    """Ids and labels by the original's rule: cut the string at "</s>", each part at the answer's marker, and count.

    Where the counts do not add up to those of the whole string, no label is left.
    """
    tokenizer, template = vocabulary(), get_template(name)
    text = template.render(conversation_turns(sample(*texts)))
    ids = encode_trusted(tokenizer, text)[:length]
    marker = template.human[1] + (template.gpt[0].rstrip() if name == "aquila" else template.gpt[0])
    labels, at = list(ids), 0
    for part in text.split("</s>"):
        asked, found, answer = part.partition(marker)
        if not found or marker in answer:
            break
        begun = at + len(encode_trusted(tokenizer, asked + marker))
        labels[at:begun] = [-100] * len(labels[at:begun])
        at = begun + len(encode_trusted(tokenizer, answer)) + 1
    labels[at:] = [-100] * len(labels[at:])
    if at < length and at != sum(index != 0 for index in ids):
        labels = [-100] * len(ids)
    return ids, labels


def ours(texts, name):
    return encode_conversation(sample(*texts), vocabulary(), name)


def keeps(texts, name):
    """Whether (the original, this package) learns anything from a conversation."""
    return any(label != -100 for label in relabelled(texts, name)[1]), labelled(ours(texts, name)["labels"]) > 0


# --- what it loses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWO)
def test_a_conversation_that_ends_with_a_question_keeps_its_labels(name):
    assert keeps(SIGHTS, name) == (True, True)
    assert keeps((*SIGHTS, "谢谢"), name) == (False, True)
    whole, longer = (ours(texts, name)["labels"] for texts in (SIGHTS, (*SIGHTS, "谢谢")))
    assert longer[: len(whole)] == whole and labelled(longer) == labelled(whole)


def test_english_in_aquila_legacy_keeps_its_labels():
    assert keeps(COLOURS, "aquila-legacy") == (False, True)
    assert all(keeps(COLOURS, name) == (True, True) for name in TWO[:3])
    merged = relabelled(COLOURS, "aquila-legacy")[0]
    assert (len(merged), len(ours(COLOURS, "aquila-legacy")["input_ids"])) == (57, 58)  # a space, and one of its own


def test_an_answer_that_contains_the_separator_keeps_its_labels():
    assert keeps(("Write the marker.", "It is ###Assistant: and a colon."), "aquila") == (False, True)


@pytest.mark.parametrize("name", TWO)
def test_where_the_original_keeps_labels_they_are_these(name):
    """But for the space before an answer in "aquila", where it learns one token more."""
    tokenizer, compared = vocabulary(), 0
    for texts in (COLOURS, SIGHTS, COLOURS + SIGHTS, SIGHTS + COLOURS, SIGHTS * 3):
        ids, theirs = relabelled(texts, name)
        if not labelled(theirs):
            continue
        mine = ours(texts, name)
        assert mine["input_ids"] == ids
        differing = [at for at, pair in enumerate(zip(theirs, mine["labels"], strict=True)) if pair[0] != pair[1]]
        assert all(name == "aquila" and tokenizer.decode(ids[at]) == " " for at in differing)
        compared += 1
    assert compared == (2 if name == "aquila-legacy" else 5)  # there those whose answers are all Chinese


@cache
def made():
    """1,024 conversations of each kind: English, Chinese, ending with a question, with the separator in the answer."""
    pairs = {}
    for language in ("en", "zh"):
        told = itertools.islice(generate("babi16", language, split="train", seed=3), 1024)
        pairs[language] = [[turn["value"] for turn in one.conversation(cot=True)["conversations"]] for one in told]
    asked = [[*one, "Thanks!"] for one in pairs["en"]]
    separated = [[question, f"###Assistant: {answer}"] for question, answer in pairs["zh"]]
    return {**pairs, "asked": asked, "separated": separated}


LOST = {
    "aquila-v1": {"en": 0, "zh": 0, "asked": 1024, "separated": 0},
    "aquila-v2": {"en": 0, "zh": 0, "asked": 1024, "separated": 0},
    "aquila": {"en": 0, "zh": 0, "asked": 1024, "separated": 1024},
    "aquila-legacy": {"en": 1024, "zh": 0, "asked": 1024, "separated": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_how_many_of_1024_conversations_lose_all_labels(name):
    """Upstream's own sample of Alpaca in aquila-legacy: 1,020 of 1,024 are lost."""
    lost = {kind: sum(not labelled(relabelled(texts, name)[1]) for texts in made()[kind]) for kind in made()}
    assert lost == LOST[name]
    assert all(labelled(ours(texts, name)["labels"]) for kind in made() for texts in made()[kind])


def test_aquila_chat_is_trained():
    """The original stops with an AssertionError, see below."""
    learned = vocabulary().decode([label for label in ours(COLOURS, "aquila-chat")["labels"] if label != -100])
    assert learned == f" {COLOURS[1]}###"


# --- the original itself ---------------------------------------------------------------------------------------------

original = pytest.mark.skipif(not FOLDER, reason="AQUILA2_UPSTREAM names no folder with upstream's own files")


@pytest.fixture
def wheel(monkeypatch):
    """The modules of flagai, from the wheel as it is."""
    found = sorted(Path(FOLDER).glob("flagai-*.whl"))
    if not found:
        pytest.skip(f"no flagai-*.whl in {FOLDER}")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(found[0]))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "flagai":
            del sys.modules[name]


@pytest.fixture
def script(wheel, monkeypatch):
    """Its finetune.py. What it imports of DeepSpeed and the GPU kernels is not used here."""
    file = Path(FOLDER) / "finetune" / "finetune.py"
    if not file.is_file():
        pytest.skip(f"no {file}")
    from peft import get_peft_model  # noqa: F401  (looks for DeepSpeed when it is imported, and must not find a stub)
    from transformers import Trainer  # noqa: F401

    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero"):
        monkeypatch.setitem(sys.modules, name, stub(name, zero=None))
    parameters = "deepspeed.runtime.zero.partition_parameters"
    monkeypatch.setitem(sys.modules, parameters, stub(parameters, ZeroParamStatus=None))
    kernels = "flagai.model.aquila2.aquila2_flash_attn_monkey_patch"
    monkeypatch.setitem(sys.modules, kernels, stub(kernels, replace_aquila_attn_with_flash_attn=None))
    monkeypatch.setitem(sys.modules, "jsonlines", stub("jsonlines", open=lines_of))
    monkeypatch.setattr(sys.modules["transformers"], "deepspeed", stub("deepspeed"), raising=False)
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "true")  # it sets this itself
    spec = importlib.util.spec_from_file_location("upstream_finetune", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def stub(name, **members):
    module = ModuleType(name)
    vars(module).update(members)
    return module


@contextlib.contextmanager
def lines_of(path):
    yield iter([json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()])


@cache
def its_tokenizer():
    """As it loads one: markers in a text are markers, padding with what is unknown, which is id 0."""
    plain = vocabulary().backend_tokenizer.to_str()
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(plain)
    backend.encode_special_tokens = False
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=LENGTH)
    tokenizer.unk_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.padding_side = "right"
    assert tokenizer("</s>").input_ids == [100007] and tokenizer.pad_token_id == 0
    return tokenizer


def its_labels(script, texts, name):
    row = script.preprocess([sample(*texts)["conversations"]], its_tokenizer(), name)
    kept = len(row["input_ids"][0]) - next((n for n, i in enumerate(reversed(row["input_ids"][0].tolist())) if i), 0)
    assert all(label == -100 for label in row["labels"][0][kept:].tolist())
    return row["input_ids"][0][:kept].tolist(), row["labels"][0][:kept].tolist()


@original
@pytest.mark.parametrize("name", (*TWO, "aquila-chat"))
def test_templates_render_as_in_the_wheel(wheel, name):
    """But for empty answers, of which it leaves the end out."""
    conversation = wheel("flagai.model.aquila2.conversation").get_conv_template(name)
    dice, template = random.Random(name), get_template(name)
    for _ in range(1000):
        said = ["".join(dice.choices(PIECES, k=dice.randint(1, 5))) for _ in range(dice.randint(1, 5))]
        texts = [*said, None] if len(said) % 2 else said
        conversation.messages = [[conversation.roles[at % 2], text] for at, text in enumerate(texts)]
        turns = [(("human", "gpt")[at % 2], text) for at, text in enumerate(texts)]
        assert template.render(turns) == conversation.get_prompt()


@original
@pytest.mark.parametrize("name", TWO)
def test_the_rule_written_anew_is_the_originals(script, name):
    """Also on conversations longer than a row, and of which nothing is left."""
    dice = random.Random(name)
    cases = [COLOURS, SIGHTS, (*SIGHTS, "谢谢"), COLOURS * 2, ("a " * 1200, "b " * 1200), ("一 " * 3000, "二")]
    cases += [
        ["".join(dice.choices(PIECES, k=dice.randint(1, 6))) for _ in range(dice.choice((2, 2, 3, 4)))]
        for _ in range(1000)
    ]
    some, none = 0, 0
    for texts in cases:
        its = its_labels(script, texts, name)
        ids, labels = relabelled(texts, name)
        while ids and ids[-1] == 0:
            ids, labels = ids[:-1], labels[:-1]
        assert its == (ids, labels), texts
        some, none = some + (labelled(labels) > 0), none + (labelled(labels) == 0)
    assert some > 30 and none > 100


@original
@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_it_loses_as_many_itself(script, name):
    lost = {kind: sum(not labelled(its_labels(script, texts, name)[1]) for texts in made()[kind]) for kind in made()}
    assert lost == LOST[name]


@original
def test_it_refuses_aquila_chat(script):
    with pytest.raises(AssertionError):
        its_labels(script, COLOURS, "aquila-chat")


@original
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_it_does_not_read_a_jsonl_file_to_evaluate_on(script, tmp_path, ending):
    train, held_out = tmp_path / f"train.{ending}", tmp_path / "eval.jsonl"
    rows = [sample("a", "b"), sample("c", "d")]
    train.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    held_out.write_text("\n".join(json.dumps(sample(f"x{n}", "y")) for n in range(5)))
    files = {"data_path": str(train), "eval_data_path": str(held_out), "convo_template": "aquila-v1"}
    options = SimpleNamespace(**files, lazy_preprocess=True)
    if ending == "json":
        with pytest.raises(NameError):
            script.make_supervised_data_module(its_tokenizer(), options)
    else:
        module = script.make_supervised_data_module(its_tokenizer(), options)
        assert module["eval_dataset"].raw_data == rows[-1:]  # the last sample to learn from, instead of five


@original
def test_no_process_of_it_says_a_word(script, monkeypatch, capsys):
    class Arguments:
        local_rank = 0

        @property
        def flash_attn(self):
            raise KeyboardInterrupt  # all that matters has happened

    parser = SimpleNamespace(parse_args_into_dataclasses=lambda: (None, None, Arguments(), None))
    monkeypatch.setattr(script.transformers, "HfArgumentParser", lambda kinds: parser)
    with pytest.raises(KeyboardInterrupt):
        script.train()
    script.rank0_print("tokenization mismatch")
    assert script.local_rank is None and capsys.readouterr().out == ""


@original
def test_its_loader_trains_without_the_scaling_it_worked_out_and_in_float32(wheel, monkeypatch, tmp_path):
    given = []
    model = SimpleNamespace(from_pretrained=lambda path, **options: given.append(options))
    monkeypatch.setitem(sys.modules, "flagai.model.file_utils", files := stub("flagai.model.file_utils"))
    for name in ("_get_model_id", "_get_checkpoint_path", "_get_vocab_path", "_get_model_files"):
        setattr(files, name, None)
    modeling = "flagai.model.aquila2.modeling_aquila"
    monkeypatch.setitem(sys.modules, modeling, stub(modeling, AquilaForCausalLM=model))
    loader = wheel("flagai.auto_model.auto_loader")
    config = SimpleNamespace(max_position_embeddings=2048)
    monkeypatch.setattr(loader.transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)
    monkeypatch.setattr(loader, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda path: None))
    options = {"inference_mode": False, "model_max_length": 16384, "cache_dir": None}
    (tmp_path / "tiny").mkdir()
    loader.AutoLoader("aquila2", model_dir=str(tmp_path), model_name="tiny", **options)
    assert config.rope_scaling == {"type": "linear", "factor": 8.0}
    assert given == [{"low_cpu_mem_usage": True, "cache_dir": None}]  # neither the config nor torch_dtype
