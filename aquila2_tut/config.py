"""The numbers that make a model: `Aquila2Config` and a preset for every released Aquila2, and for the small models.

Sources: the config.json files of BAAI's repositories on Hugging Face (2023-10 to 2024-06), FlagScale's training
configurations for the 34B and 70B shapes, and the SmolLM2-135M-Instruct GGUF file's own metadata.
"""

from __future__ import annotations

import difflib
import json
import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PretrainedConfig

_ROPE_KEYS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "ntk": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"}),
}
ROPE_TYPES = tuple(_ROPE_KEYS)
ATTN_BACKENDS = ("auto", "eager", "sdpa", "flash", "triton")
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


class ConfigError(ValueError):
    """A configuration that no model can be built from, or a model name that is not known."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds one JSON object and refuses a key given twice: the last would win silently."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"the key {key!r} appears twice, as {found[key]!r} and as {value!r}: keep one of them")
        found[key] = value
    return found


@strict
class Aquila2Config(PretrainedConfig):
    """The shape of an Aquila2 model; a transformers configuration of model_type "aquila".

    The class defaults are those of a released Aquila2-7B. (Upstream's class defaults were those of no released model.)

    Args:
        vocab_size: V, rows of the embedding and of the head.
        hidden_size: C, width of the residual stream.
        intermediate_size: F, width of the feed-forward block.
        num_hidden_layers: decoder layers.
        num_attention_heads: H, query heads.
        num_key_value_heads: Hkv, key-value heads; H when not given (multi-head attention).
        head_dim: D; C / H when not given.
        max_position_embeddings: tokens the model was trained to see. The 16K models keep 2048 or 4096 here and
            reach 16384 through `rope_parameters`.
        rope_parameters: {"rope_type": one of `ROPE_TYPES`, "rope_theta": float, "factor": float}, and for "yarn" what
            `aquila2_tut.model.rope` says. BAAI's older keys `rope_scaling` and `rope_theta` are understood.
        attn_backend: "auto", "eager", "sdpa", "flash" or "triton", see `aquila2_tut.model.attention`.

    Raises:
        ConfigError: the numbers contradict each other; the message names the field.
    """

    model_type = "aquila"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 100008
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 100006
    eos_token_id: int | list[int] | None = 100007
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attn_backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self._check_heads_divide_width()
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_shapes()
        super().__post_init__(**self._checked_rope(kwargs))

    def _check_heads_divide_width(self) -> None:
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"num_attention_heads: {self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}"
            )

    def _check_shapes(self) -> None:
        for field in _POSITIVE:
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}: must be at least 1, not {getattr(self, field)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads: {self.num_key_value_heads} key-value heads cannot be shared evenly by "
                f"{self.num_attention_heads} query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: rotary embeddings turn pairs of dimensions, {self.head_dim} is odd")
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act: Aquila2's feed-forward block is SwiGLU ('silu'), not {self.hidden_act!r}")
        if self.attn_backend not in ATTN_BACKENDS:
            raise ConfigError(f"attn_backend: {self.attn_backend!r} is not one of {', '.join(ATTN_BACKENDS)}")

    def _checked_rope(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Merges BAAI's `rope_scaling` and `rope_theta` into `rope_parameters`, and checks the result."""
        rope = dict(kwargs.pop("rope_scaling", None) or self.rope_parameters or {})
        rope = {key: value for key, value in rope.items() if value is not None}
        kind = rope.pop("type", None) or rope.get("rope_type") or "default"
        rope["rope_type"] = rope.get("rope_type", kind)
        rope.setdefault("rope_theta", kwargs.pop("rope_theta", None) or 10000.0)
        kwargs.pop("rope_theta", None)
        if rope["rope_type"] not in ROPE_TYPES:
            raise ConfigError(
                f"rope_parameters.rope_type: {rope['rope_type']!r} is not known; known: {', '.join(ROPE_TYPES)}"
            )
        self._check_rope_numbers(rope)
        self._check_rope_keys(rope)
        self.rope_parameters = rope
        return kwargs

    @staticmethod
    def _check_rope_numbers(rope: dict[str, Any]) -> None:
        def bad(value: Any, least: float) -> bool:
            return isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf")

        if bad(rope["rope_theta"], 1.0):
            raise ConfigError(f"rope_parameters.rope_theta: must be a number of at least 1, not {rope['rope_theta']!r}")
        if rope["rope_type"] != "default" and bad(rope.get("factor"), 1.0):
            raise ConfigError(
                f"rope_parameters.factor: {rope['rope_type']} scaling needs a number of at least 1, "
                f"not {rope.get('factor')!r}"
            )
        for key in _ROPE_KEYS["yarn"] & rope.keys() - {"factor"}:
            if bad(rope[key], 1.0 if key == "original_max_position_embeddings" else 1e-9):
                raise ConfigError(f"rope_parameters.{key}: must be a number above 0, not {rope[key]!r}")

    def _check_rope_keys(self, rope: dict[str, Any]) -> None:
        """Refuses what would be ignored, and the two shapes for which a formula divides by zero."""
        kind = rope["rope_type"]
        unknown = sorted(rope.keys() - _ROPE_KEYS[kind] - {"rope_type", "rope_theta"})
        if unknown:
            taken = ", ".join(sorted(_ROPE_KEYS[kind])) or "no number but rope_theta"
            raise ConfigError(
                f"rope_parameters.{unknown[0]}: would change nothing, for {kind!r} takes {taken}: "
                "leave it out, or change rope_type"
            )
        if kind in ("ntk", "dynamic") and self.head_dim == 2:
            raise ConfigError(f"head_dim: {kind} scaling stretches the slower of several pairs, and 2 is one pair")
        if kind == "yarn" and rope["rope_theta"] == 1:
            raise ConfigError("rope_parameters.rope_theta: with 1 all pairs turn alike, and yarn tells fast from slow")

    def _validate_ntk_rope_parameters(
        self, rope_parameters: dict[str, Any], ignore_keys: set[str] | None = None
    ) -> None:
        """For transformers, which looks for a check of this name and has none; `_checked_rope` has made it."""

    @property
    def trained_length(self) -> int:
        """Tokens that the model saw before its rotation was scaled."""
        return int(self.rope_parameters.get("original_max_position_embeddings", self.max_position_embeddings))

    @property
    def context_length(self) -> int:
        """Tokens the model can be given: what it was trained on, times the rotary scaling factor."""
        return int(self.trained_length * self.rope_parameters.get("factor", 1.0))

    def stretched(self, rope_type: str, factor: float, **numbers: float) -> Aquila2Config:
        """The same configuration with another scaling of its rotation.

        Args:
            rope_type: one of `ROPE_TYPES`; "default" takes any scaling off.
            factor: by how much the context grows beyond what was trained.
            numbers: more of `rope_parameters`, see `aquila2_tut.model.rope`.

        Raises:
            ConfigError: no such scaling, or a number that it cannot take.
        """
        rope = {"rope_type": rope_type, "rope_theta": self.rope_parameters["rope_theta"], **numbers}
        if rope_type != "default":
            rope["factor"] = factor
        return type(self)(**{**self.to_dict(), "max_position_embeddings": self.trained_length, "rope_parameters": rope})

    @property
    def parameter_count(self) -> int:
        """Parameters of a model of this shape: the tables, then L times four projections, SwiGLU and two norms.

        Source: 2 V C + L (2 C D (H + Hkv) + 3 C F + 2 C) + C; V C once where embedding and head are tied.
        """
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return tables + self.num_hidden_layers * layer + self.hidden_size

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Aquila2Config:
        """The configuration of a known model.

        Args:
            name: a key of `PRESETS`, in any letter case.
            changes: fields to set otherwise.

        Raises:
            ConfigError: no such model; the message lists the nearest names.
        """
        return cls(**{**PRESETS[resolve_preset_name(name)], **changes})

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        # transformers reads every config.json through this method.
        with open(json_file, encoding="utf-8-sig") as file:
            try:
                return cls._decode_special_floats(json.loads(file.read(), object_pairs_hook=_no_duplicates))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{json_file}: not valid JSON: {error}") from error
            except ConfigError as error:
                raise ConfigError(f"{json_file}: {error}") from None


def _shape(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **rest: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **rest,
    }


_V1_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_7B = _shape(4096, 11008, 32, 32, 32, max_position_embeddings=2048, dtype="float16")
_33B_V1 = _shape(6656, 17920, 60, 52, 52, max_position_embeddings=2048, dtype="float16", rms_norm_eps=1e-6)
_34B = _shape(6144, 24576, 60, 48, 8, max_position_embeddings=4096, dtype="bfloat16")
_70B = _shape(8192, 28672, 80, 64, 8, max_position_embeddings=4096, dtype="bfloat16")
_JUNE_2024 = {
    "vocab_size": 143973,
    "max_position_embeddings": 8192,
    "rope_theta": 1e6,
    "dtype": "bfloat16",
    "bos_token_id": 143717,
    "eos_token_id": 143718,
}
_NANO = _shape(
    256,
    768,
    8,
    4,
    2,
    vocab_size=8192,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=8190,
    eos_token_id=8191,
    dtype="bfloat16",
)

PRESETS: dict[str, dict[str, Any]] = {
    "Aquila2-7B": _7B,
    "AquilaChat2-7B": _7B,
    "AquilaChat2-7B-16K": {**_7B, "rope_scaling": {"type": "linear", "factor": 8.0}},
    "Aquila2-34B": _34B,
    "AquilaChat2-34B": _34B,
    "AquilaChat2-34B-16K": {**_34B, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "Aquila2-70B-Expr": _70B,
    "AquilaChat2-70B-Expr": _70B,
    "Aquila2-7B-2024-06": {**_7B, **_JUNE_2024},
    "Aquila2-34B-2024-06": {**_34B, **_JUNE_2024},
    "Aquila-7B": {**_7B, **_V1_IDS, "rms_norm_eps": 1e-6},
    "AquilaChat-7B": {**_7B, **_V1_IDS},
    "Aquila-33B": {**_33B_V1, **_V1_IDS},
    "SmolLM2-135M": _shape(
        576,
        1536,
        30,
        9,
        3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="float32",
    ),
    "Aquila2-Nano": _NANO,
    "Aquila2-Nano-Chat": _NANO,
}


def resolve_preset_name(name: str) -> str:
    """The canonical spelling of a model name given in any letter case.

    Raises:
        ConfigError: no preset of that name; the message lists the nearest ones.
    """
    spelled = {key.lower(): key for key in PRESETS}
    if name.lower() in spelled:
        return spelled[name.lower()]
    near = difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(spelled[key] for key in near)}?" if near else f"known: {', '.join(PRESETS)}"
    raise ConfigError(f"no model named {name!r}; {hint}")


AutoConfig.register("aquila", Aquila2Config, exist_ok=True)
