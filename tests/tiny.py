"""A model and a vocabulary so small that a test makes them by itself."""

from aquila2_tut.tokenizer import load_tokenizer
from aquila2_tut.tokenizer.train import train_aquila_like


def shape(context):
    """Of a configuration, without its vocabulary."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": context,
    }


def vocabulary(folder, lines, size):
    """A tokenizer that was trained on some lines and read from the folder."""
    train_aquila_like(lines, size).save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)
