"""Pretraining with transformers' Trainer: recipes, texts, and runs that are killed at any moment."""

import dataclasses
import json
import multiprocessing
import random
import shutil
import time
from itertools import islice

import numpy as np
import pytest
import torch
import yaml
from pretrain_runs import SHAPE, run, small_recipe, some_texts
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from aquila2_tut import Aquila2Config, Aquila2ForCausalLM, AutoLoader, cli
from aquila2_tut.data import collate, generate, pack_best_fit
from aquila2_tut.train import TrainError
from aquila2_tut.train.checkpoints import UNFINISHED, checkpoints
from aquila2_tut.train.commands import run_pretrain
from aquila2_tut.train.instruct import ChatRecipe, conversations, instruct
from aquila2_tut.train.pretrain import Recipe, make_rows, make_tokenizer, pretrain, training_texts
from aquila2_tut.train.recipe import FOLDER, load_recipe
from aquila2_tut.train.trainer import Aquila2Trainer

KINDS = {"nano": Recipe, "nano-chat": ChatRecipe}
IDS = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return some_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    pretrain(small_recipe(texts), folder)
    return folder


def final_weights(folder):
    return load_file(checkpoints(folder)[-1] / "model.safetensors")


# --- against transformers' own Trainer -------------------------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    return Aquila2ForCausalLM(Aquila2Config(**SHAPE, **IDS))


def samples(count=24):
    dice = np.random.default_rng(0)
    ids = [dice.integers(3, 61, dice.integers(4, 30)).tolist() for _ in range(count)]
    return [{"input_ids": x, "labels": [-100] * (len(x) // 2) + x[len(x) // 2 :]} for x in ids]


class Plain(Trainer):
    """Logits, and transformers' own loss of them."""


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_losses_and_weights_are_those_of_transformers_trainer(tmp_path, accumulation):
    rows = pack_best_fit(samples(), 32)
    options = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-1,
        "optim": "sgd",  # AdamW would make a large step of a gradient that is zero but for rounding
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    ours, theirs = small_model(), small_model()
    mine = losses(Aquila2Trainer(ours, TrainingArguments(str(tmp_path / "a"), **options), rows))
    plain = Plain(
        theirs,
        TrainingArguments(str(tmp_path / "b"), **options),
        train_dataset=rows,
        data_collator=lambda items: collate(items, 0),
    )
    assert mine == pytest.approx(losses(plain), rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- runs that are killed --------------------------------------------------------------------------------------------


def kill_when(process, folder, moment, began):
    """Kills when a folder of that name begins to be written, or after so many seconds."""
    while process.is_alive():
        if isinstance(moment, str) and (folder / (UNFINISHED + moment)).exists():
            break
        if isinstance(moment, float) and time.monotonic() - began > moment:
            break
        time.sleep(0.0005)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


@pytest.mark.slow
def test_killed_ten_times_a_run_ends_with_the_same_bits(texts, whole, tmp_path):
    context = multiprocessing.get_context("forkserver")  # the children find everything imported
    context.set_forkserver_preload(["aquila2_tut.train.pretrain", "tensorboard.summary", "pretrain_runs"])
    dice = random.Random(0)
    moments = ["tokenizer", "rows", *(f"checkpoint-{step}" for step in (2, 6, 10))]
    moments += [dice.uniform(0.1, 1.5) for _ in range(5)]
    dice.shuffle(moments[2:])
    for moment in [*moments, None]:
        process = context.Process(target=run, args=(texts, tmp_path))
        process.start()
        if moment is None:
            process.join()
            assert process.exitcode == 0
        else:
            killed = kill_when(process, tmp_path, moment, time.monotonic())
            assert killed or isinstance(moment, float)
        for checkpoint in checkpoints(tmp_path):  # what bears the name is complete
            assert len(load_file(checkpoint / "model.safetensors")) == len(final_weights(whole))
            assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    mine, theirs = final_weights(tmp_path), final_weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    final = "model/model.safetensors"
    assert (tmp_path / final).read_bytes() == (whole / final).read_bytes()


def test_a_run_that_is_finished_is_not_run_again(texts, whole):
    before = (whole / "model/model.safetensors").read_bytes()
    shutil.rmtree(whole / "model")  # killed after the last step, before the model was written
    pretrain(small_recipe(texts), whole)
    assert (whole / "model/model.safetensors").read_bytes() == before
    written = (whole / "model").stat().st_mtime_ns
    pretrain(small_recipe(texts), whole)
    assert (whole / "model").stat().st_mtime_ns == written


def test_a_folder_belongs_to_one_recipe(texts, whole):
    with pytest.raises(TrainError, match="holds a run with learning_rate=0.002, not 0.5"):
        pretrain(small_recipe(texts, learning_rate=0.5), whole)


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_the_model_opens_with_its_tokenizer(whole):
    loader = AutoLoader("aquila2", model_name=str(whole / "model"))
    model, tokenizer = loader.get_model(), loader.get_tokenizer()
    assert {x.dtype for x in load_file(whole / "model/model.safetensors").values()} == {torch.bfloat16}
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token_id) == ("[CLS]", "</s>", 0)
    assert tokenizer.decode(tokenizer("Hello, 世界!").input_ids) == "Hello, 世界!"
    assert isinstance(model.predict("ab", tokenizer=tokenizer, sft=False, max_gen_len=4), str)


def test_what_the_log_says(whole):
    log = json.loads((whole / "model/log.json").read_text())
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert log[0]["loss"] == pytest.approx(np.log(300), abs=0.3)
    assert len(rates) == 3 and [entry["step"] for entry in log if "loss" in entry] == [1, 10, 20]
    assert list(whole.glob("logs/events.out.tfevents*"))


def test_rows_hold_every_text_with_its_marks(texts, whole):
    recipe = small_recipe(texts)
    tokenizer = make_tokenizer(recipe, whole / "tokenizer")
    rows = make_rows(recipe, tokenizer, whole / "rows")
    ids = np.concatenate([row.input_ids for row in rows])
    assert all(len(row.input_ids) == 32 for row in rows)
    found = tokenizer.decode(ids[ids != tokenizer.bos_token_id]).split("</s>")
    every = set(training_texts(recipe))
    assert len(found) >= 290 and set(found[:-1]) <= every


# --- teaching to answer ----------------------------------------------------------------------------------------------


def chat_recipe(base, **changes):
    plain = {"tasks": {"arithmetic": 30, "babi15": 10}, "files": {"about_nano.jsonl": 2}, "length": 256, "steps": 3}
    return ChatRecipe(base=str(base), **{**plain, "batch_size": 2, "warmup": 1, "save_every": 2, **changes})


def test_what_is_taught_is_training_instances_and_our_own_words(whole):
    recipe = chat_recipe(whole / "model")
    samples = list(conversations(recipe))
    about = [sample for sample in samples if sample["id"].startswith("about-")]
    assert len(samples) - len(about) == 2 * (30 + 10) and len(about) == 2 * 45
    for language in ("en", "zh"):
        test = {instance.question for instance in islice(generate("arithmetic", language, "test"), 2000)}
        assert not test & {sample["conversations"][0]["value"] for sample in samples}
    explained = [sample for sample in samples if "step by step" in sample["conversations"][0]["value"]]
    assert len(explained) == 20
    assert all("So the answer is" in sample["conversations"][1]["value"] for sample in explained)


def test_a_model_that_was_taught_opens_as_a_chat_model(whole, tmp_path):
    folder = instruct(chat_recipe(whole / "model"), tmp_path / "chat")
    assert folder == tmp_path / "chat" / "model"
    rows = np.load(tmp_path / "chat" / "rows" / "rows.npz")
    learned = rows["labels"] != -100
    assert 0.1 < learned.sum() / (rows["document_ids"] > 0).sum() < 0.6
    loader = AutoLoader("aquila2", model_name=str(folder))
    answer = loader.get_model().predict("1 + 1?", loader.get_tokenizer(), convo_template="aquila-v1", max_gen_len=3)
    assert isinstance(answer, str)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert instruct(chat_recipe(whole / "model"), tmp_path / "chat") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_bad_chat_recipes(whole, tmp_path):
    with pytest.raises(TrainError, match="base: there is no model nowhere"):
        instruct(chat_recipe("nowhere"), tmp_path)
    with pytest.raises(TrainError, match="there is no task 'chess'; known: babi15"):
        list(conversations(chat_recipe(whole / "model", tasks={"chess": 1})))
    file = tmp_path / "mine.yaml"
    file.write_text("base: nowhere")
    with pytest.raises(TrainError, match=r"--text: .*mine\.yaml teaches to answer"):
        run_pretrain(["--preset", str(file), "--text", "x"], cli.TEXTS["en"])


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_shipped_recipes_are_good(name):
    recipe = load_recipe(KINDS[name], name)
    assert recipe.batch_size * recipe.length == 8192
    assert dataclasses.asdict(recipe).keys() == yaml.safe_load((FOLDER / f"{name}.yaml").read_text()).keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: many", "steps must be of type int, not 'many'"),
        ("steps: true", "steps must be of type int, not True"),
        ("betas: 0.9", "betas must be of type tuple, not 0.9"),
        ("learning_rate: [1]", r"learning_rate must be of type float, not \[1\]"),
        ("leraning_rate: 1", "there is no field 'leraning_rate'; known: length"),
        ("- steps", "a recipe is a list of `field: value` lines"),
        ("steps: [", "no YAML"),
        ("model: [", "no YAML"),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(tmp_path, content, message):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(TrainError, match=rf"mine\.yaml(, line 1)?: {message}"):
        load_recipe(Recipe, file)


def test_a_recipe_that_is_not_there():
    with pytest.raises(TrainError, match="no recipe giga: neither a file nor one of .*nano"):
        load_recipe(Recipe, "giga")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r'a\.jsonl, line 2: an object with a string "text"'),
        ("a.jsonl", b'{"text": "x"\n', r"a\.jsonl, line 1: not valid JSON"),
        ("a.txt", b"ab\xff", r"a\.txt: not UTF-8 at byte 2"),
        ("a.txt", b"short", "do not fill one row of 32 tokens"),
    ],
)
def test_bad_texts_say_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainError, match=message):
        pretrain(small_recipe(tmp_path / name), tmp_path / "run")


def test_the_command(texts, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    content = dataclasses.asdict(small_recipe(texts, steps=2)) | {"betas": [0.9, 0.95]}
    file.write_text(yaml.safe_dump(content))
    out = tmp_path / "out"
    assert cli.main(["pretrain", "--preset", str(file), "--out", str(out), "--text", str(texts)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "model")
    assert cli.main(["pretrain", "--preset", str(file), "--out", str(out), "--text", "nowhere.txt"]) == cli.FAILED
    assert "nowhere.txt: there is no such file" in capsys.readouterr().err
