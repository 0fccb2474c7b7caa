"""How much memory a training step takes, in closed form: named terms, each with the reason for it.

Nothing here is measured or fitted. A step has a few moments at which memory can be highest, and each is a sum:

- *loss*: the layers are through, and the logits are there, with what their gradient needs;
- *first block*: the backward pass is in the last layer (the first that it meets), all inputs of layers are still kept;
- *last block*: it is in the first layer, and all gradients are there;
- *update*: the optimizer has all gradients, and no activations are left.

The peak is the largest. n tokens on a card, C, F, V, D, H, K: widths as everywhere in this package, Q = H D and K the
width of keys; a bytes of a number that goes from layer to layer, e of one that a product gives; P parameters, of them
S trained; N cards.

Source: the operators of this package's layers, of peft 0.21 and of torch 2.13, read one by one; `rehearse` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..config import Aquila2Config
from ..quant.sizes import linear_shapes, predicted_bytes
from ..train.loss import chunk_size
from ..train.plan import TuningMemory
from ..train.tuning import PRECISIONS, Tuning, world_size
from .setting import Setting, setting, setting_of
from .unseen import bucket_bytes, cublas_bytes, gathered_bytes, outside_bytes

MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SMALL_STATE = 4096  # parameters below which bitsandbytes keeps a state in 32 bits: min_8bit_size
Terms = dict[str, int]


@dataclass(frozen=True)
class Formula:
    """What a step takes, in bytes.

    Args:
        setting: of the step.
        moments: name -> the terms of that moment.
    """

    setting: Setting
    moments: dict[str, Terms]

    @property
    def moment(self) -> str:
        """The moment at which most is needed."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def terms(self) -> Terms:
        """What is needed then, and outside of torch."""
        return {**self.moments[self.moment], "context": outside_bytes(self.setting)}

    @property
    def allocated_bytes(self) -> int:
        """What tensors and buffers take then."""
        return sum(self.moments[self.moment].values())

    @property
    def peak_bytes(self) -> int:
        """All of it."""
        return sum(self.terms.values())

    @property
    def fits(self) -> bool:
        """Whether it is there on the card."""
        return self.peak_bytes <= self.setting.card.usable


def formula(
    model: str | Aquila2Config = "AquilaChat2-7B",
    method: str = "qlora",
    batch_size: int = 4,
    seq_len: int = 2048,
    gpu: str = "A100-80G",
    recipe: str = "default",
    **changes: Any,
) -> Formula:
    """The closed form for a step of training.

    Args:
        model, method, batch_size, seq_len, gpu, recipe, changes: as in `rehearse`.

    Raises:
        RehearsalError: a setting that makes no sense.
    """
    fields = {"model": model, "method": method, "batch_size": batch_size, "seq_len": seq_len, "gpu": gpu}
    return formula_of(setting(recipe, **fields, **changes))


def formula_of(wanted: Setting) -> Formula:
    """The closed form for a setting, see `formula`."""
    sizes = Sizes(wanted)
    standing = {
        "weights": sizes.weights,
        "adapters": sizes.adapters,
        "optimizer": sizes.optimizer,
        "gathered": gathered_bytes(wanted),
        "cuBLAS": cublas_bytes(wanted),
    }
    moments = {"loss": sizes.loss(), "first block": sizes.block(first=True), "last block": sizes.block(first=False)}
    moments["update"] = sizes.update()
    return Formula(wanted, {name: {**standing, **terms} for name, terms in moments.items()})


def tuning_memory(recipe: Tuning, config: Aquila2Config, trainable: int) -> TuningMemory:
    """What a run of `finetune` needs in each process, on a GPU.

    Args:
        recipe: how it goes.
        config: of the base model.
        trainable: parameters that are trained.
    """
    wanted = setting_of(recipe, config, world_size())
    found, shared = formula_of(wanted), wanted.gpus if wanted.strategy else 1
    weights = found.terms["weights"] + found.terms["gathered"]
    states = 2 if "8bit" in recipe.optimizer else 8
    trained = (0 if recipe.method == "full" else 4 * trainable) + (4 + states) * trainable // shared
    return TuningMemory(weights, trained, max(0, found.allocated_bytes - weights - trained))


class Sizes:
    """The terms of a setting."""

    def __init__(self, wanted: Setting) -> None:
        self.wanted, self.config = wanted, wanted.config
        c = self.config
        self.tokens = wanted.batch_size * wanted.seq_len
        self.layers, self.width, self.ffn = c.num_hidden_layers, c.hidden_size, c.intermediate_size
        self.queries, self.keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.between = wanted.dtype.itemsize
        self.product = PRECISIONS[wanted.precision].itemsize if wanted.autocast else self.between
        self.casts = wanted.autocast and self.product < 4
        self.full = wanted.method == "full"
        self.shared = wanted.gpus if wanted.strategy else 1
        self.table = c.vocab_size * c.hidden_size
        self.layer = sum(out * inputs for out, inputs in linear_shapes(c)) + 2 * c.hidden_size

    # --- what stands throughout --------------------------------------------------------------------------------------

    @property
    def weights(self) -> int:
        """P numbers; in four bits the linear maps of the layers are NF4 with doubly quantized scales, 4.13 bits each,
        and the two tables and the norms stay numbers. ZeRO-3 and FSDP leave an N-th of them on a card."""
        if self.wanted.method != "qlora":
            split = self.shared if self.wanted.strategy in ("zero3", "fsdp2") else 1
            return self.between * self.config.parameter_count // split
        stored = predicted_bytes(self.config, "nf4-dq")
        kept = stored.embedding + stored.head + stored.norms
        return stored.total + kept * (self.between - 2) // 2

    @cached_property
    def maps(self) -> dict[str, tuple[int, int]]:
        """The maps of a layer: name -> (out, in)."""
        return dict(zip(MAPS, linear_shapes(self.config), strict=True))

    @cached_property
    def adapted(self) -> dict[str, tuple[int, int]]:
        """Those that have an adapter."""
        names = () if self.full else MAPS if "all-linear" in self.wanted.targets else self.wanted.targets
        return {name: shape for name, shape in self.maps.items() if name in names}

    @property
    def trained(self) -> int:
        """S: all parameters, or r (in + out) for each adapted map."""
        if self.full:
            return self.config.parameter_count
        return self.layers * self.wanted.r * sum(map(sum, self.adapted.values()))

    @property
    def adapters(self) -> int:
        """S numbers, beside frozen weights."""
        return 0 if self.full else self.wanted.trained_dtype.itemsize * self.trained

    @property
    def optimizer(self) -> int:
        """Two moments of S numbers in float32, or in 8 bits with two scales in float32 for each 256; and a copy in
        float32 of what is trained in half precision. DeepSpeed and FSDP leave an N-th on a card."""
        each = 8.0 + 4 * self.wanted.keeps_masters
        if self.wanted.optimizer == "adamw-8bit":
            each = 2 + 8 / 256
        return int(each * self.trained) // self.shared

    def gradients(self, parameters: int) -> int:
        """A number for each trained parameter whose layer is through; an N-th of them, when they are shared."""
        return parameters * self.wanted.trained_dtype.itemsize // self.shared

    # --- activations -------------------------------------------------------------------------------------------------

    @property
    def adapter_inputs(self) -> int:
        """Bytes a token: of each adapted map the input, as the product takes it, and a byte a number for dropout. Where
        nothing is cast or dropped, maps with the same input keep it together."""
        inputs = [inputs for _, inputs in self.adapted.values()]
        if self.wanted.dropout:
            return sum((self.product + 1) * width for width in inputs)
        return self.product * (sum(inputs) if self.casts else sum(set(inputs)))

    @property
    def linear_inputs(self) -> int:
        """Bytes a token: where all weights learn, each map keeps its input. Autocast makes a copy for each."""
        if not self.full:
            return 0
        copies = 5 if self.casts and self.between == 4 else 2
        return self.product * (copies * self.width + self.ffn)

    @property
    def inside(self) -> int:
        """Bytes a token of what one layer keeps beside its input: turned queries and keys, values, the attention's
        result with a float32 a head, the sum after it, gate and up."""
        attention = self.product * (2 * self.queries + 2 * self.keys) + 4 * self.config.num_attention_heads
        return (
            attention
            + self.between * self.width
            + 2 * self.product * self.ffn
            + self.adapter_inputs
            + self.linear_inputs
        )

    @property
    def cast_weights(self) -> int:
        """Autocast keeps a copy of each weight that is float32 and learns."""
        return self.product if self.full and self.casts and self.between == 4 else 0

    def kept(self, layers: int) -> int:
        """What lies between layers, and, unless it is computed a second time, what is in them."""
        each = self.between * self.width + (0 if self.wanted.checkpointing else self.inside)
        cast = 0 if self.wanted.checkpointing else self.cast_weights * self.layer
        return layers * (self.tokens * each + cast)

    # --- the moments -------------------------------------------------------------------------------------------------

    def loss(self) -> Terms:
        """The logits, and the last hidden states before and after the norm."""
        every, rows = self.config.vocab_size * self.tokens, self.config.vocab_size
        hidden = self.tokens * self.width * self.between
        if self.wanted.loss == "chunked":
            # A chunk of them: as the product gives them, in float32, and the gradient in the product's type.
            logits = chunk_size(self.tokens, rows) * rows * (2 * self.product + 4)
            head = (4 + self.product) * self.table if self.full else 0  # its gradient, summed in float32; its cast copy
            hidden *= 3  # with their gradient
        else:
            # In float32: their logarithmic softmax, its gradient, and the gradient before it.
            left_out = self.wanted.batch_size * rows if self.wanted.loss == "shifted" else 0
            logits, head = 12 * (every - left_out), 0
            hidden = hidden if self.wanted.fused_norms else 4 * self.tokens * self.width
            hidden += self.tokens * self.width * self.product if self.full else 0
        casts = self.cast_weights * (self.layers * self.layer if self.wanted.checkpointing else 0)
        if self.wanted.loss != "chunked":
            casts += self.cast_weights * self.table
        if self.wanted.loss == "plain" and casts:  # they are gone in the backward pass; before it, the logits are fewer
            before = (8 + self.product) * every  # the head's is kept
            logits, casts = max((before, casts), (logits, self.cast_weights * self.table), key=sum)
        buckets = 0 if self.wanted.loss == "chunked" else bucket_bytes(self.wanted, self.trained)
        kept = {"activations": self.kept(self.layers) + hidden, "cast weights": casts}
        return {**kept, "logits": logits + head, "buckets": buckets}

    def block(self, first: bool) -> Terms:
        """One layer is computed again, and goes back: what it keeps, the gradient that comes in, and the largest of
        what is on the way in its feed-forward part."""
        n, wide = self.tokens, self.product * self.tokens * self.ffn
        kept = self.kept(self.layers if first else 1)
        again = n * self.inside if self.wanted.checkpointing else 0
        cast = self.cast_weights * self.layer if self.wanted.checkpointing else 0
        if self.full:
            untied = 0 if self.config.tie_word_embeddings else self.table  # the embedding's comes last of all
            done = self.table if first else self.config.parameter_count - untied - self.layer
            grads = self.gradients(done + self.width * self.ffn)
        else:
            grads = 0 if first else self.gradients(self.trained)
        # The gradient of gate times up, times up, and times the derivative of silu; or the weights of a map as numbers.
        # Where all weights learn, the input of the last map was kept too, and is gone by then.
        moving = max((2 if self.full else 3) * wide, wide + self._dequantized(), self._wide_adapter() * n)
        return {
            "activations": kept,
            "block": again + cast + n * self.between * self.width + moving,
            "gradients": grads,
            "buckets": bucket_bytes(self.wanted, self.trained),
        }

    def _dequantized(self) -> int:
        """C F numbers of a map in four bits, when it is multiplied with, and its scales."""
        weights = self.width * self.ffn
        return weights * self.product + weights // 64 * 4 if self.wanted.method == "qlora" else 0

    def _wide_adapter(self) -> int:
        """Bytes a token where the widest map is adapted: peft takes its input to float32 and back around dropout."""
        if not self.casts or "down_proj" not in self.adapted:
            return 0
        return (2 * self.product + 8) * self.ffn

    def update(self) -> Terms:
        """All gradients. With a copy in float32 they are there in float32 too, and a root of the second moments."""
        wide = 8 * self.trained // self.shared if self.wanted.keeps_masters else 0
        grads = {"gradients": self.gradients(self.trained), "update": wide}
        return {**grads, "buckets": bucket_bytes(self.wanted, self.trained)}
