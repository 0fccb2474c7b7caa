"""Small fine-tuning runs, also in processes of their own, for tests that kill them."""

import json
import random
import shutil
from pathlib import Path

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
NANO = Path(__file__).resolve().parent.parent / "data" / "Aquila2-Nano"
PLAIN = {
    "template": "aquila-v1",
    "length": 64,
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup": 1,
    "dropout": 0.0,
    "precision": "float32",
    "save_every": 2,
    "keep": 10,
    "log_every": 1,
}


def some_base(folder: Path, **changes) -> Path:
    """A tiny model with the vocabulary of Nano."""
    import torch

    from aquila2_tut import Aquila2Config, Aquila2ForCausalLM

    torch.manual_seed(0)
    ids = json.loads((NANO / "config.json").read_text())
    ids = {name: ids[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    Aquila2ForCausalLM(Aquila2Config(**{**SHAPE, **ids, **changes})).save_pretrained(folder)
    shutil.copy(NANO / "tokenizer.json", folder)
    return folder


def some_conversations(file: Path, count: int = 24, seed: int = 0) -> Path:
    """Questions in words that a seed has thrown together, and answers that repeat the first word."""
    dice = random.Random(seed)
    words = ["one", "two", "three", "four", "five", "red", "green", "blue", "一", "二", "三", "红", "绿", "蓝"]
    samples = []
    for number in range(count):
        said = dice.choices(words, k=dice.randint(2, 6))
        turns = [{"from": "human", "value": " ".join(said)}, {"from": "gpt", "value": f"{said[0]} {said[0]}"}]
        samples.append({"id": str(number), "conversations": turns})
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return file


def small_tuning(base: Path, data: Path, **changes):
    from aquila2_tut.train import Tuning

    return Tuning(base=str(base), data=str(data), **{**PLAIN, **changes})


def run(base: Path, data: Path, folder: Path, changes: dict) -> None:
    """What a child process does."""
    import torch

    from aquila2_tut import AutoLoader
    from aquila2_tut.train import finetune

    torch.set_num_threads(1)
    finetune(small_tuning(base, data, **changes), folder, AutoLoader)
