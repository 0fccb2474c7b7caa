"""Pretraining from texts to a checkpoint: vocabulary, rows, run, model. The command `aquila2-tut pretrain`.

Each stage leaves its result in the output folder, whole or not at all, and a later run takes up what is there. So the
command may be killed at any moment and is simply given again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from ..config import PRESETS, Aquila2Config
from ..data import Row, collate, corpus, pack_stream
from ..model import Aquila2ForCausalLM
from ..tokenizer.aquila import encode_batch, load_tokenizer
from ..tokenizer.train import train_aquila_like
from .checkpoints import written_whole
from .errors import TrainError
from .recipe import Run, arguments, claim
from .trainer import Aquila2Trainer

LOGGED = ("step", "num_input_tokens_seen", "loss", "learning_rate", "grad_norm", "eval_loss", "eval_right")


@dataclass(frozen=True)
class Recipe(Run):
    """How a model is pretrained.

    Args:
        model: a preset, or the fields of an `Aquila2Config`.
        vocab_size: tokens of the vocabulary to learn.
        sources: a corpus source -> how often its texts come in every round; or of paths of one's own texts.
    """

    model: str | dict[str, Any] = "Aquila2-Nano"
    vocab_size: int = 8192
    sources: dict[str, int] = field(default_factory=dict)


# --- from texts to rows ----------------------------------------------------------------------------------------------


def training_texts(recipe: Recipe, split: str = "train") -> Iterator[str]:
    """The texts of a recipe, each as often as it says; paths are read as they are given, one text a file or line."""
    for source, times in recipe.sources.items():
        texts = _own_texts(Path(source)) if Path(source).exists() else (d.text for d in corpus(split, [source]))
        for text in texts:
            yield from [text] * times


def _own_texts(file: Path) -> Iterator[str]:
    """The texts of a .txt file (one), of a .jsonl file (field "text"), or of a folder of them."""
    if file.is_dir():
        for inner in sorted(file.rglob("*.txt")) + sorted(file.rglob("*.jsonl")):
            yield from _own_texts(inner)
    elif file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield _text_field(line, f"{file}, line {number}")
    else:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TrainError(f"{file}: not UTF-8 at byte {error.start}: convert it first") from error


def _text_field(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise TrainError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise TrainError(f'{where}: an object with a string "text" is expected')
    return value["text"]


def make_tokenizer(recipe: Recipe, folder: Path) -> PreTrainedTokenizerFast:
    """Learns the vocabulary, or opens it where an earlier run has left it in `folder`."""
    if not (folder / "tokenizer.json").is_file():
        once = dataclasses.replace(recipe, sources=dict.fromkeys(recipe.sources, 1))
        backend = train_aquila_like(training_texts(once), recipe.vocab_size)
        with written_whole(folder) as place:
            backend.save(str(place / "tokenizer.json"))
    return load_tokenizer(folder)


def make_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[Row]:
    """Encodes and packs the texts, in an order of chance; or opens what an earlier run has left in `folder`."""
    if not (folder / "rows.npz").is_file():
        texts = list(training_texts(recipe))
        order = np.random.default_rng(recipe.seed).permutation(len(texts))
        rows = list(pack_stream(encode_texts(tokenizer, (texts[i] for i in order)), recipe.length))
        rows = [row for row in rows if len(row.input_ids) == recipe.length]
        if not rows:
            raise TrainError(f"the texts do not fill one row of {recipe.length} tokens: give more text, or shorten it")
        keep_rows(rows, folder)
    return open_rows(folder)


def keep_rows(rows: Sequence[Row], folder: Path) -> None:
    """Writes packed rows, filled up to one length with document 0, which is padding."""
    tables = {name: table.numpy().astype(np.int32) for name, table in collate(rows, pad_id=0).items()}
    with written_whole(folder) as place:
        np.savez(place / "rows.npz", **tables)


def open_rows(folder: Path) -> list[Row]:
    """What `keep_rows` wrote."""
    with np.load(folder / "rows.npz", allow_pickle=False) as kept:
        return [Row(*row) for row in zip(*(kept[name] for name in Row._fields), strict=True)]


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Iterator[list[int]]:
    """Documents as the model sees them in pretraining: [CLS], the text, </s>."""
    for ids in encode_batch(tokenizer, list(texts)):
        yield [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


# --- the run ---------------------------------------------------------------------------------------------------------


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Aquila2Config:
    """The shape of the model, with the vocabulary that was really learned."""
    shape = PRESETS[recipe.model] if isinstance(recipe.model, str) else recipe.model
    ids = {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return Aquila2Config(**{**shape, **ids, "vocab_size": len(tokenizer), "dtype": "float32"})


def pretrain(recipe: Recipe, folder: Path) -> Path:
    """Trains a model from nothing, or goes on where an earlier call with the same folder was stopped.

    Args:
        recipe: see `load_recipe`.
        folder: gets `tokenizer`, `rows`, `checkpoint-...`, `logs`, and at the end `model`.

    Returns:
        The folder of the model, which `AutoLoader` opens.

    Raises:
        TrainError: the folder belongs to another recipe, or the texts are unusable.
        AssetError: texts of the recipe have not been fetched.
    """
    claim(folder, recipe)
    if (folder / "model").is_dir():
        return folder / "model"
    tokenizer = make_tokenizer(recipe, folder / "tokenizer")
    rows = make_rows(recipe, tokenizer, folder / "rows")
    torch.manual_seed(recipe.seed)
    model = Aquila2ForCausalLM(model_config(recipe, tokenizer))
    trainer = Aquila2Trainer(model, arguments(recipe, folder), rows)
    trainer.resume_or_train()
    return save_model(model, folder / "tokenizer", folder / "model", log=trainer.state.log_history)


def save_model(model: Aquila2ForCausalLM, tokenizer: Path, target: Path, log: list[dict[str, float]]) -> Path:
    """Writes a model in bfloat16 with its tokenizer and the log of its training: what is shipped.

    Args:
        model: what was trained.
        tokenizer: a folder with tokenizer.json.
        target: the folder to make.
        log: the Trainer's own; how long things took stays behind.
    """
    model.config.use_cache = True  # the Trainer turned it off
    with written_whole(target) as place:
        model.to(torch.bfloat16).save_pretrained(place)
        (place / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
        write_log(place, log)
        for file in place.iterdir():
            file.chmod(0o644)
    return target


def write_log(folder: Path, log: list[dict[str, float]]) -> None:
    """Writes what of the Trainer's log is the same whenever and wherever a run is repeated, as log.json."""
    entries = [{name: _rounded(entry[name]) for name in LOGGED if name in entry} for entry in log]
    lines = ",\n".join(json.dumps(entry) for entry in entries if "loss" in entry or "eval_loss" in entry)
    (folder / "log.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _rounded(value: float) -> float:
    return float(f"{value:.5g}") if isinstance(value, float) else value
