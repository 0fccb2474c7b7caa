"""A small model and made-up texts to extend it with, also in a process of its own, for a test that kills it."""

import os
import random
import signal
from pathlib import Path

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
SMALL = {
    "length": 128,
    "methods": ("linear", "none"),
    "factors": (2,),
    "lesson_steps": 3,
    "lesson_batch": 2,
    "steps": 4,
    "batch_size": 2,
    "save_every": 1,
    "warmup": 1,
    "precision": "float32",
    "documents": 2,
    "document_tokens": 256,
    "items": 1,
}


def some_texts(split, language):
    """Long documents of words that a seed has thrown together."""
    dice = random.Random(f"{split} {language}")
    letters = "aeioubdgklmnrst" if language == "en" else "山水风花雪月人家"
    words = ["".join(dice.choices(letters, k=3)) for _ in range(60)]
    for _ in range(12):
        yield "\n".join(" ".join(dice.choices(words, k=12)) for _ in range(20))


def some_base(folder: Path) -> Path:
    """A model that knows nothing, with a vocabulary of these texts."""
    import torch

    from aquila2_tut.config import Aquila2Config
    from aquila2_tut.longcontext.passkey import ASK, KEYS
    from aquila2_tut.model import Aquila2ForCausalLM
    from aquila2_tut.tokenizer import load_tokenizer
    from aquila2_tut.tokenizer.train import train_aquila_like

    asked = [ASK[language].format(key=key) for language in ASK for key in KEYS[language]]
    texts = [text for language in ASK for text in some_texts("train", language)]
    folder.mkdir(parents=True)
    train_aquila_like(texts + asked * 20, 700).save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    tokenizer = load_tokenizer(folder)
    ids = {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Aquila2Config(**SHAPE, **ids, vocab_size=len(tokenizer), dtype="float32")
    Aquila2ForCausalLM(config).save_pretrained(folder)
    return folder


def run(base: Path, folder: Path, killed_at: int = 0) -> None:
    """What a child process does; it is killed right after it has written its n-th checkpoint."""
    import torch

    from aquila2_tut.longcontext import extend

    torch.set_num_threads(1)
    extend.long_texts = some_texts
    save, saved = extend.Extender._save_checkpoint, []

    def save_and_die(*arguments):
        save(*arguments)
        saved.append(1)
        if len(saved) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    extend.Extender._save_checkpoint = save_and_die
    extend.extend(extend.Extension(base=str(base), **SMALL), folder)
