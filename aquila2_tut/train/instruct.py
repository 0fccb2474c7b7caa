"""Instruction tuning of the small model: generated tasks, translations and small talk, in the form of conversations.

The command `aquila2-tut pretrain --preset nano-chat`. As in pretraining, every stage is taken up where it was left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ..assets import shipped
from ..data.conversations import read_conversations
from ..data.corpora import LANGUAGES, dialogues
from ..data.masking import encode_conversation
from ..data.packing import Row, pack_best_fit
from ..data.splits import aligned_pairs, corpus
from ..data.tasks import TASKS, generate
from ..model import Aquila2ForCausalLM
from ..tokenizer.aquila import load_tokenizer
from .errors import TrainError
from .pretrain import keep_rows, open_rows, save_model
from .recipe import Run, arguments, claim
from .trainer import Aquila2Trainer


@dataclass(frozen=True)
class ChatRecipe(Run):
    """How a model is taught to answer.

    Args:
        base: the model to begin with: one of the book's own, or a folder.
        template: the prompt format.
        tasks: a generated task -> instances in each language.
        dialogues: how often each conversation of the corpus comes.
        files: a file of conversations, of the book's samples or a path -> how often each comes.
    """

    base: str = "Aquila2-Nano"
    template: str = "aquila-v1"
    tasks: dict[str, int] = field(default_factory=dict)
    dialogues: int = 0
    files: dict[str, int] = field(default_factory=dict)


def conversations(recipe: ChatRecipe) -> Iterator[dict[str, Any]]:
    """What a recipe teaches, sample by sample: training instances only.

    Raises:
        TrainError: there is no such task.
        AssetError: the texts of a task have not been fetched.
    """
    for name, count in recipe.tasks.items():
        if name not in TASKS:
            raise TrainError(f"tasks: there is no task {name!r}; known: {', '.join(TASKS)}")
        for language in _languages(name):
            options = {"split": "train", "seed": recipe.seed} | _material(name)
            for number, instance in enumerate(islice(generate(name, language, **options), count)):
                yield instance.conversation(cot=number % 2 == 1)
    for language in LANGUAGES:
        told = dialogues(language)
        for document in corpus("train", [f"dialogues-{language}"]):
            turns = [turn.strip() for turn in told[int(document.id)]]
            said = [{"from": role, "value": turn} for role, turn in zip(cycle(("human", "gpt")), turns, strict=False)]
            if len(said) >= 2 and all(turns):
                yield from [{"id": document.id, "conversations": said}] * recipe.dialogues
    for name, times in recipe.files.items():
        own = (shipped("samples") or Path()) / name
        for sample in read_conversations(own if own.is_file() else Path(name)):
            yield from [sample] * times


def _languages(task: str) -> tuple[str, ...]:
    """The languages that a task is asked in: that of what is translated, and poems in their own."""
    only = {"translate-en-zh": ("en",), "translate-zh-en": ("zh",), "next-line": ("zh",)}
    return only.get(task, tuple(LANGUAGES))


def _material(task: str) -> dict[str, Any]:
    """What a task is made of, where it is made of something: training texts, which are not split again."""
    if task.startswith("translate"):
        return {"material": aligned_pairs("train"), "split": "all"}
    if task == "next-line":
        poems = corpus("train", ["songci", "yuanqu"])
        return {"material": [document.text.split("\n")[1:] for document in poems], "split": "all"}
    return {}


def chat_rows(recipe: ChatRecipe, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[Row]:
    """Encodes and packs the conversations; or opens what an earlier run has left in `folder`."""
    if not (folder / "rows.npz").is_file():
        samples = list(conversations(recipe))
        Random(recipe.seed).shuffle(samples)
        joined = joined_at_random(samples, Random(recipe.seed))
        encoded = (encode_conversation(sample, tokenizer, recipe.template) for sample in joined)
        rows = pack_best_fit([sample for sample in encoded if len(sample["input_ids"]) <= recipe.length], recipe.length)
        Random(recipe.seed).shuffle(rows)
        keep_rows(rows, folder)
    return open_rows(folder)


def joined_at_random(samples: Sequence[dict[str, Any]], dice: Random) -> Iterator[dict[str, Any]]:
    """Makes one conversation of one, two or three samples, so that a model learns to keep to the last question.

    Args:
        samples: conversations, in the order in which they are taken; a question at the end of one is left out.
        dice: how many at a time.
    """
    rest = iter(samples)
    while group := list(islice(rest, dice.choice((1, 1, 2, 3)))):
        answered = (s["conversations"][: len(s["conversations"]) // 2 * 2] for s in group)
        turns = [turn for conversation in answered for turn in conversation]
        yield {"id": "+".join(str(sample["id"]) for sample in group), "conversations": turns}


def instruct(recipe: ChatRecipe, folder: Path) -> Path:
    """Teaches a model to answer, or goes on where an earlier call with the same folder was stopped.

    Args:
        recipe: see `aquila2_tut.train.recipe.load_recipe`.
        folder: gets `rows`, `checkpoint-...`, `logs`, and at the end `model`.

    Returns:
        The folder of the model.

    Raises:
        TrainError: the folder belongs to another recipe, there is no base model, or no such task.
    """
    base = shipped(recipe.base) or Path(recipe.base)
    if not (base / "model.safetensors").is_file():
        raise TrainError(f"base: there is no model {recipe.base}")
    claim(folder, recipe)
    if (folder / "model").is_dir():
        return folder / "model"
    rows = chat_rows(recipe, load_tokenizer(base), folder / "rows")
    torch.manual_seed(recipe.seed)
    model = Aquila2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = Aquila2Trainer(model, arguments(recipe, folder), rows)
    trainer.resume_or_train()
    return save_model(model, base, folder / "model", log=trainer.state.log_history)
