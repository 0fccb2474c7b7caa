"""Questions of the workshop on LoRA and Q-LoRA: a number each, worked out from the formula whenever it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import Aquila2Config
from .compared import linear_weights, penalty_seconds, saved_bytes
from .errors import RehearsalError
from .formula import formula
from .setting import setting

# vocabulary, width, feed-forward width, layers, heads, key-value heads, whether head and embedding are one.
# Source: config.json of each model.
_SHAPES = {
    "TinyLlama-1.1B": (32000, 2048, 5632, 22, 32, 4, False),
    "Llama-3.2-1B": (128256, 2048, 8192, 16, 32, 8, True),
    "Llama-3.1-8B": (128256, 4096, 14336, 32, 32, 8, False),
    "Ministral-8B": (131072, 4096, 12288, 36, 32, 8, False),
}
_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_QWEN_ADDS, _QWEN_TABLES = 13.6e9, 2 * 151936 * 4096  # Source: QwenLM/Qwen issue 608, and its config.json


@dataclass(frozen=True)
class Question:
    """What is asked for.

    Args:
        unit: of the number.
        within: how far off a prediction may be, as a share of the answer.
        answer: works it out.
    """

    unit: str
    within: float
    answer: Callable[[], float]


def other_models() -> dict[str, Aquila2Config]:
    """Models of others that the exercises speak of, as shapes of the same architecture, by name."""
    ends = {"max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2}
    fields = (*_FIELDS, "num_key_value_heads", "tie_word_embeddings")
    return {name: Aquila2Config(**dict(zip(fields, shape, strict=True)), **ends) for name, shape in _SHAPES.items()}


def question(name: str) -> Question:
    """A question by its label.

    Raises:
        RehearsalError: there is none of that label.
    """
    if name not in QUESTIONS:
        raise RehearsalError(f"there is no question {name!r}; the labels are {', '.join(QUESTIONS)}")
    return QUESTIONS[name]


def _saved(model: str, each: int = 2) -> float:
    config = other_models().get(model) or Aquila2Config.preset(model)
    return saved_bytes(config, each) / 1e9


def _lost(gpu: str) -> float:
    return 1e3 * penalty_seconds(setting(model="AquilaChat2-7B", gpu=gpu))


def _share(gpu: str, tokens: int) -> float:
    """Of a step with checkpointing, whose least time is that of six operations a weight and token."""
    wanted = setting(model="AquilaChat2-7B", gpu=gpu)
    return 100 * penalty_seconds(wanted) * wanted.card.flops / (6 * linear_weights(wanted.config) * tokens)


def _half_quantized(model: str = "Llama-3.1-8B") -> float:
    """GiB of the weights when only queries and values are in four bits."""
    c = other_models()[model]
    queries, values = (heads * c.head_dim * c.hidden_size for heads in (c.num_attention_heads, c.num_key_value_heads))
    share = c.num_hidden_layers * (queries + values) / linear_weights(c)
    return (2 * c.parameter_count - share * saved_bytes(c)) / 2**30


def _kept_inputs(rows: int, tokens: int, model: str = "TinyLlama-1.1B") -> float:
    """GB of the inputs of all maps in 16 bits, each kept once: those of attention, its output and feed-forward."""
    c = other_models()[model]
    return 2 * (3 * c.hidden_size + c.intermediate_size) * c.num_hidden_layers * rows * tokens / 1e9


def _cast(rows: int = 32, tokens: int = 384, vocabulary: int = 32000, width: int = 4096, keys: int = 1024) -> float:
    """GB that two tables, the logits, and the keys and values of 32 layers take more in float32 than in 16 bits."""
    return 2 * (2 * vocabulary * width + rows * tokens * (vocabulary + 32 * 2 * keys)) / 1e9


def _peak(model: str, method: str, **fields: Any) -> float:
    return formula(other_models()[model], method, batch_size=1, checkpointing=False, loss="plain", **fields).peak_bytes


def _activations(targets: tuple[str, ...], dropout: float) -> float:
    fields = {"batch_size": 1, "seq_len": 2048, "checkpointing": False}
    return formula(targets=targets, dropout=dropout, **fields).terms["activations"] / 1e9


QUESTIONS: dict[str, Question] = {
    "saved-7b": Question("GB", 0.05, lambda: _saved("AquilaChat2-7B")),
    "saved-smol": Question("GB", 0.05, lambda: _saved("SmolLM2-135M", 4)),
    "lost-a100": Question("ms", 0.05, lambda: _lost("A100-80G")),
    "share-512": Question("%", 0.1, lambda: _share("A100-80G", 512)),
    "ex-lvq-one": Question("GB", 0.05, lambda: _saved("Llama-3.2-1B")),
    "ex-lvq-half": Question("GiB", 0.05, _half_quantized),
    "ex-lvq-tiny": Question("GB", 0.1, lambda: _kept_inputs(8, 512)),
    "ex-lvq-cast": Question("GB", 0.05, lambda: _saved("Ministral-8B")),
    "ex-lvq-infer": Question("GB", 0.1, _cast),
    "ex-lvq-full": Question(
        "GB", 0.1, lambda: _peak("TinyLlama-1.1B", "lora", seq_len=8192, r=64, targets=("all-linear",)) / 1e9
    ),
    "ex-lvq-head": Question("GB", 0.05, lambda: 8192 * 128256 * (2 - 4.127 / 8) / 1e9),
    "ex-lvq-inputs": Question(
        "GB", 0.1, lambda: _activations(("all-linear",), 0.05) - _activations(("q_proj", "v_proj"), 0.0)
    ),
    "ex-lvq-tables": Question("bytes", 0.05, lambda: _QWEN_ADDS / _QWEN_TABLES),
}
