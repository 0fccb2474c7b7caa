"""Four ways to store the same weights, each translated to the names and shapes of `Aquila2ForCausalLM`.

"huggingface": one matrix a projection, half-rotation rows. "gguf": llama.cpp's names, interleaved rows. "native":
FlagAI's Aquila v1, interleaved rows. "megatron": FlagScale's fused matrices, one key-value group after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import Tensor

from ..config import Aquila2Config

Pieces = list[tuple[str, Tensor]]


def half_rotation(rows: Tensor, heads: int) -> Tensor:
    """Reorders the rows of a query or key projection: pairs (0, 1), (2, 3) … become (0, D/2), (1, D/2 + 1) ….

    Args:
        rows: (heads * D, C).
        heads: H for queries, Hkv for keys.

    Returns:
        (heads * D, C). With both q and k reordered the scores stay what they were.
    """
    return rows.view(heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def split_groups(fused: Tensor, config: Aquila2Config) -> tuple[Tensor, Tensor, Tensor]:
    """Takes Megatron's query_key_value apart: for every key-value head its H / Hkv query heads, its key, its value.

    Args:
        fused: ((H + 2 Hkv) * D, C).

    Returns:
        q (H * D, C), k and v (Hkv * D, C).
    """
    share = config.num_attention_heads // config.num_key_value_heads
    groups = fused.view(config.num_key_value_heads, share + 2, config.head_dim, -1)
    parts = groups[:, :share], groups[:, share : share + 1], groups[:, share + 1 :]
    return tuple(part.reshape(-1, fused.shape[-1]) for part in parts)


@dataclass(frozen=True)
class Layout:
    """How one family of checkpoints names and arranges its tensors.

    Args:
        name: as in the module's docstring.
        patterns: (regular expression for a stored name, name here); a group in the first is the layer number.
        interleaved: whether rotary pairs are neighbours in the stored rows.
        trims_vocabulary: whether extra rows of the embedding and the head are padding, to be cut.
        ignored: stored names that carry no weight.
    """

    name: str
    patterns: tuple[tuple[str, str], ...]
    interleaved: bool = False
    trims_vocabulary: bool = False
    ignored: str = r"rotary_emb\.inv_freq$|rope_freqs|_extra_state$"

    def owns(self, names: Iterable[str]) -> bool:
        """Whether a checkpoint with these tensor names is of this layout."""
        return any(re.fullmatch(self.patterns[0][0], name) for name in names)

    def target(self, name: str) -> str | None:
        """The name here of a stored tensor; None if it is to be ignored.

        Raises:
            KeyError: no pattern fits.
        """
        if re.search(self.ignored, name):
            return None
        for pattern, target in self.patterns:
            if found := re.fullmatch(pattern, name):
                return target.format(*found.groups())
        raise KeyError(name)

    def pieces(self, target: str, tensor: Tensor, config: Aquila2Config) -> Pieces:
        """One stored tensor as the parameters it holds.

        Args:
            target: what `target` said.
            tensor: as stored.

        Returns:
            (parameter name, tensor) pairs; a fused matrix gives several.
        """
        if target.endswith("self_attn.qkv"):
            stem = target.removesuffix("qkv")
            pieces = [(f"{stem}{n}_proj.weight", t) for n, t in zip("qkv", split_groups(tensor, config), strict=True)]
        elif target.endswith("mlp.gate_up"):
            stem = target.removesuffix("gate_up")
            pieces = [(f"{stem}{n}_proj.weight", t) for n, t in zip(("gate", "up"), tensor.chunk(2), strict=True)]
        else:
            pieces = [(target, tensor)]
        return [(name, self._arranged(name, piece, config)) for name, piece in pieces]

    def _arranged(self, name: str, tensor: Tensor, config: Aquila2Config) -> Tensor:
        if self.interleaved and name.endswith("q_proj.weight"):
            return half_rotation(tensor, config.num_attention_heads)
        if self.interleaved and name.endswith("k_proj.weight"):
            return half_rotation(tensor, config.num_key_value_heads)
        if self.trims_vocabulary and name in ("model.embed_tokens.weight", "lm_head.weight"):
            return tensor[: config.vocab_size]
        return tensor


def _layered(prefix: str, names: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((prefix + stored, "model.layers.{0}." + here) for stored, here in names.items())


HUGGINGFACE = Layout(
    "huggingface", (("(model\\.layers\\..+|model\\.(?:embed_tokens|norm)\\.weight|lm_head\\.weight)", "{0}"),)
)
GGUF = Layout(
    "gguf",
    (
        (r"token_embd\.weight", "model.embed_tokens.weight"),
        (r"output_norm\.weight", "model.norm.weight"),
        (r"output\.weight", "lm_head.weight"),
        *_layered(
            r"blk\.(\d+)\.",
            {
                r"attn_norm\.weight": "input_layernorm.weight",
                r"attn_q\.weight": "self_attn.q_proj.weight",
                r"attn_k\.weight": "self_attn.k_proj.weight",
                r"attn_v\.weight": "self_attn.v_proj.weight",
                r"attn_output\.weight": "self_attn.o_proj.weight",
                r"ffn_norm\.weight": "post_attention_layernorm.weight",
                r"ffn_gate\.weight": "mlp.gate_proj.weight",
                r"ffn_up\.weight": "mlp.up_proj.weight",
                r"ffn_down\.weight": "mlp.down_proj.weight",
            },
        ),
    ),
    interleaved=True,
)
NATIVE = Layout(
    "native",
    (
        (r"tok_embeddings\.weight", "model.embed_tokens.weight"),
        (r"norm\.weight", "model.norm.weight"),
        (r"output\.weight", "lm_head.weight"),
        *_layered(
            r"layers\.(\d+)\.",
            {
                r"attention_norm\.weight": "input_layernorm.weight",
                r"attention\.wq\.weight": "self_attn.q_proj.weight",
                r"attention\.wk\.weight": "self_attn.k_proj.weight",
                r"attention\.wv\.weight": "self_attn.v_proj.weight",
                r"attention\.wo\.weight": "self_attn.o_proj.weight",
                r"ffn_norm\.weight": "post_attention_layernorm.weight",
                r"feed_forward\.w1\.weight": "mlp.gate_proj.weight",
                r"feed_forward\.w2\.weight": "mlp.down_proj.weight",
                r"feed_forward\.w3\.weight": "mlp.up_proj.weight",
            },
        ),
    ),
    interleaved=True,
    ignored=r"rotary_emb\.inv_freq$|freqs_cis$|rope\.freqs$",
)
MEGATRON = Layout(
    "megatron",
    (
        (r"(?:.*\.)?word_embeddings\.weight", "model.embed_tokens.weight"),
        (r"(?:.*\.)?final_(?:layer)?norm\.weight", "model.norm.weight"),
        (r"(?:.*\.)?output_layer\.weight", "lm_head.weight"),
        *_layered(
            r"(?:.*\.)?layers\.(\d+)\.",
            {
                r"input_(?:layer)?norm\.weight": "input_layernorm.weight",
                r"self_attention\.query_key_value\.weight": "self_attn.qkv",
                r"self_attention\.dense\.weight": "self_attn.o_proj.weight",
                r"post_attention_(?:layer)?norm\.weight": "post_attention_layernorm.weight",
                r"mlp\.dense_h_to_4h\.weight": "mlp.gate_up",
                r"mlp\.dense_4h_to_h\.weight": "mlp.down_proj.weight",
            },
        ),
    ),
    trims_vocabulary=True,
)
LAYOUTS = (GGUF, NATIVE, MEGATRON, HUGGINGFACE)


def find_layout(names: Iterable[str]) -> Layout | None:
    """The layout of a checkpoint with these tensor names, or None."""
    names = list(names)
    return next((layout for layout in LAYOUTS if layout.owns(names)), None)


def ffn_width(hidden: int, multiple_of: int, factor: float = 1.0) -> int:
    """The feed-forward width that FlagAI and FlagScale derive from the model width.

    Source: m * ceil(int(c * int(8 h / 3)) / m); 7B: m 256, c 1; 34B and 70B: m 4096, c 1.3.
    """
    return multiple_of * ceil(int(factor * int(8 * hidden / 3)) / multiple_of)


def config_from_native(stored: dict[str, Any]) -> Aquila2Config:
    """An `Aquila2Config` from the config.json of a FlagAI-native v1 checkpoint (dim, n_heads, n_layers, …)."""
    return Aquila2Config(
        vocab_size=stored["vocab_size"],
        hidden_size=stored["dim"],
        intermediate_size=ffn_width(stored["dim"], stored["multiple_of"]),
        num_hidden_layers=stored["n_layers"],
        num_attention_heads=stored["n_heads"],
        rms_norm_eps=stored.get("norm_eps", 1e-5),
        max_position_embeddings=stored.get("max_seq_len", 2048),
        initializer_range=stored.get("initializer_range", 0.02),
        bos_token_id=1,
        eos_token_id=2,
    )


def config_from_gguf(metadata: dict[str, Any], tied: bool) -> Aquila2Config:
    """An `Aquila2Config` from a GGUF file's header.

    Args:
        metadata: the header; its architecture must be "llama", which is what llama.cpp calls Aquila and Aquila2 too.
        tied: whether the file lacks a head of its own.

    Raises:
        KeyError: the header lacks a number that a model needs.
    """
    read: Callable[[str], Any] = lambda key: metadata[f"llama.{key}"]  # noqa: E731
    heads = read("attention.head_count")
    return Aquila2Config(
        vocab_size=metadata.get("llama.vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=read("embedding_length"),
        intermediate_size=read("feed_forward_length"),
        num_hidden_layers=read("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=metadata.get("llama.attention.head_count_kv", heads),
        max_position_embeddings=read("context_length"),
        # Stored as float32, so that 1e-5 comes back as 9.99999975e-06.
        rms_norm_eps=float(f"{read('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": metadata.get("llama.rope.freq_base", 10000.0)},
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=tied,
        dtype="float32",
    )
