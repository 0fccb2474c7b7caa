"""Small pretraining runs in processes of their own, for tests that kill them."""

import json
import random
from pathlib import Path

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def some_texts(file: Path, lines: int = 300) -> Path:
    """A .jsonl of texts in words that a seed has thrown together."""
    dice = random.Random(7)
    words = ["".join(dice.choices("aeioubdgklmnrst", k=dice.randint(2, 6))) for _ in range(200)]
    texts = [" ".join(dice.choices(words, k=dice.randint(5, 30))) for _ in range(lines)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def small_recipe(texts: Path, **changes):
    from aquila2_tut.train.pretrain import Recipe

    plain = {"vocab_size": 300, "length": 32, "steps": 24, "batch_size": 4, "warmup": 4, "save_every": 2}
    return Recipe(model=SHAPE, sources={str(texts): 1}, **{**plain, **changes})


def run(texts: Path, folder: Path) -> None:
    """What a child process does."""
    import torch

    from aquila2_tut.train.pretrain import pretrain

    torch.set_num_threads(1)
    pretrain(small_recipe(texts), folder)
