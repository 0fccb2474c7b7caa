"""How long a training step takes, in closed form: its kernels one by one, each with its work, from the shapes alone.

A kernel can take no less than its operations at the card's peak, nor less than its bytes at the memory's bandwidth. So
the least time of a step is a sum over the kernels of its layers, which are counted here by reading the code: products
of matrices, attention, numbers made of four bits, and operators that are nothing but traffic. Each reads its inputs and
writes its result, as no two of them are fused. Nothing is measured or fitted.

FLOPs are those of `rehearse`, to the last one. The least time is within 9 % of the rehearsed one over the settings of
`tests/test_memory_pace.py`, models of two layers and 0.5 to 16 thousand tokens; where all of 7B's or 34B's layers are
there, 1 %. What is left: the rehearsal counts all that an operator is handed, also where it picks a few numbers of a
table of logits or of the embedding, and does not count what an optimizer writes in place. A sharded optimizer is
divided among the cards here, and there it is not: in the original README's full fine-tuning of 7B that is 11 %.

What cards say to each other is not counted: with several of them it is the time of one that never waits.

Source: the operators of this package's layers, of peft 0.21, bitsandbytes 0.50 and torch 2.13, in the order in which
the dispatcher sees them. n tokens; C, F, V, Q and K as in `formula`; b bytes of a number between layers, p of one in a
product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..train.loss import chunk_size
from .formula import Sizes
from .rehearse import Timed
from .setting import Setting
from .tracker import Work

PLACES = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
FLOAT = 4  # bytes
NF4 = 0.5 + FLOAT / 64  # bytes of a weight in four bits: its code, and its share of a scale
UPDATE = {"adamw": 28, "adamw-8bit": 16, "masters": 88}  # bytes a parameter, see `Step.optimizer_bytes`
Kernels = Iterator[tuple[int, Work]]  # how often, and what each does


@dataclass(frozen=True)
class Pace(Timed):
    """A step's time on one card.

    Args:
        setting: of the step.
        flops: operations of its products, those of recomputing included.
        seconds: kind of kernel -> the least that all of them take.
    """

    setting: Setting
    flops: int
    seconds: dict[str, float]

    @property
    def least_seconds(self) -> float:
        """If every kernel reaches the card's peak."""
        return sum(self.seconds.values())

    def cost_per_million(self, price: float) -> float:
        """What a million tokens cost; as many cards are as many times as fast, and as dear.

        Args:
            price: of an hour of one card, in any currency.
        """
        return price / 3600 * 1e6 / self.tokens_per_second


def pace_of(wanted: Setting) -> Pace:
    """The time of a step of a setting."""
    step, card = Step(wanted), wanted.card
    kernels = {
        "linear": list(step.linear()),
        "adapters": list(step.adapter_kernels()),
        "attention": list(step.attention()),
        "four bits": list(step.four_bits()),
        "head": list(step.head()),
        "loss": [(1, Work(0, step.loss_bytes()))],
        "elementwise": [(1, Work(0, step.elementwise_bytes()))],
        "optimizer": [(1, Work(0, step.optimizer_bytes()))],
    }
    flops = sum(times * work.flops for some in kernels.values() for times, work in some)
    least = {kind: sum(times * card.least_seconds(*work) for times, work in some) for kind, some in kernels.items()}
    return Pace(wanted, flops, least)


class Step(Sizes):
    """The kernels of a setting's step."""

    @property
    def again(self) -> int:
        """How often a layer goes forward a second time."""
        return int(self.wanted.checkpointing)

    @property
    def cast(self) -> int:
        """Bytes of turning a number between layers into one of a product, or back: it is read and written."""
        return self.between + self.product if self.between != self.product else 0

    @property
    def widen(self) -> int:
        """Bytes of turning a number of a product into a float32, or back."""
        return FLOAT + self.product if self.product != FLOAT else 0

    def idle(self, place: int) -> int:
        """Whether in the first layer no gradient is wanted of what maps of this place in `PLACES` read: nothing before
        them learns. With checkpointing peft asks for one of the embedding, or there would be no backward pass."""
        learning = min((PLACES[name] for name in self.adapted), default=0)
        return int(not self.full and not self.wanted.checkpointing and place <= learning)

    def map(self, rows: int, inputs: int, out: int) -> Work:
        """(rows, inputs) times (inputs, out). Both of its gradients read and write as much."""
        return Work(2 * rows * inputs * out, self.product * (rows * (inputs + out) + inputs * out))

    # --- products ----------------------------------------------------------------------------------------------------

    def linear(self) -> Kernels:
        """Each map forward, once more where its layer is computed again, and backward for its input; for its weights
        too, where they learn. Recomputing ends with the last number that is kept, which is the input of the last map's
        weights or adapter: the map itself is not needed."""
        for name, (out, inputs) in self.maps.items():
            again = self.again * (name != "down_proj" or name in self.adapted)
            idle = self.idle(PLACES[name])
            yield self.layers * (2 + again + self.full) - idle, self.map(self.tokens, inputs, out)

    def adapter_kernels(self) -> Kernels:
        """x A^T and its product with B^T, and backward two products with each of the two; and what goes on around."""
        r, layers = self.wanted.r, self.layers
        for name, (out, inputs) in self.adapted.items():
            again = self.again * (name != "down_proj")
            yield layers * (3 + self.again) - self.idle(PLACES[name]), self.map(self.tokens, inputs, r)
            yield layers * (3 + again), self.map(self.tokens, r, out)
            yield layers * (1 + self.again), Work(0, self._adapter_input() * inputs)
            yield layers * (1 + again), Work(0, self.tokens * 5 * self.product * out)  # scaled: 2; added: 3
            backward = self._adapter_input() * inputs + self.tokens * self.product * (3 * inputs + 2 * out)
            yield layers, Work(0, backward)

    def _adapter_input(self) -> int:
        """Bytes for each of an adapter's inputs: dropout, of float32 under autocast, with a byte for what it keeps; and
        the adapter's own numbers, cast for the product."""
        around = 2 * self.widen if self.casts else 0
        wide = FLOAT if self.casts else self.product
        dropout = 2 * wide + 1 if self.wanted.dropout else 0
        return self.tokens * (around + dropout)

    def attention(self) -> Kernels:
        """Two products forward and five backward, of which causality leaves half. Forward it reads q, k and v, and
        writes a result and a float32 for each head; backward it reads all of that with a gradient, and writes three."""
        c, wanted = self.config, self.wanted
        triangle = wanted.batch_size * wanted.seq_len**2 * self.queries
        heads = FLOAT * c.num_attention_heads
        moved = [self.tokens * (self.product * (k * self.queries + k * self.keys) + heads) for k in (2, 4)]
        yield self.layers * (1 + self.again), Work(2 * triangle, moved[0])
        yield self.layers - self.idle(1), Work(5 * triangle, moved[1])

    def four_bits(self) -> Kernels:
        """Codes and scales are read and numbers are written, for each product with a map."""
        if self.wanted.method == "qlora":
            for name, (out, inputs) in self.maps.items():
                again = self.again * (name != "down_proj" or name in self.adapted)
                times = self.layers * (2 + again) - self.idle(PLACES[name])
                yield times, Work(0, (NF4 + self.product) * out * inputs)

    @property
    def chunks(self) -> int:
        """Parts in which the logits are made."""
        if self.wanted.loss != "chunked":
            return 1
        return -(-self.tokens // chunk_size(self.tokens, self.config.vocab_size))

    def head(self) -> Kernels:
        """The logits, and back for the hidden states; for the head too, where it learns."""
        rows, left = divmod(self.tokens, self.chunks)
        for times, size in ((left, rows + 1), (self.chunks - left, rows)):
            yield times * (2 + self.full), self.map(size, self.width, self.config.vocab_size)

    # --- traffic -----------------------------------------------------------------------------------------------------

    def loss_bytes(self) -> int:
        """What the loss reads and writes beside its products."""
        if self.wanted.loss == "chunked":
            # Cast to float32; greatest, difference, exponent, sum, quotient; cast back.
            table = 2 * self.widen + FLOAT * (1 + 2 + 2 + 1 + 2)
            hidden = 9 * self.between  # tokens picked, a place made, put there, scaled
            # Summed in float32: a place, for each chunk a product and a sum, and a scale at the end; its cast copy.
            head = self.full * (FLOAT * 3 + self.chunks * 2 * FLOAT + self.cast)
        else:
            # Cast, logarithmic softmax; the gradient's place and its product with softmax; cast back.
            table = 2 * self.widen + FLOAT * (2 + 1 + 3)
            table += FLOAT * 4 if self.wanted.loss == "shifted" else 0  # copied, and its gradient padded
            hidden, head = self.cast, self.full * 2 * self.cast
        return self.tokens * (table * self.config.vocab_size + hidden * self.width) + head * self.table

    def elementwise_bytes(self) -> int:
        """Norms, turned queries and keys, SwiGLU, sums and casts, in all layers; the last norm and the embedding."""
        forward = self.norm_forward * 2 + self.sums_forward + self.heads_forward + 5 * self.product * self.ffn
        # A sum is needed of the second half of a layer only where something behind it is kept: it is not, see `linear`.
        again = self.again * (forward - (2 * self.between + self.product) * self.width)
        backward = self.norm_backward * 2 + self.sums_backward + self.heads_backward + 11 * self.product * self.ffn
        once = self.norm_forward + self.norm_backward + 2 * self.between * self.width * (1 + self.full)
        tokens = self.tokens * (self.layers * (forward + again + backward) + once)
        # Each weight is cast for each pass, and its gradient back.
        casts = self.full * self.cast * self.layers * self.layer * (3 + self.again)
        return tokens + casts + self.full * self.between * self.table  # the embedding's gradient, cleared

    @property
    def norm_forward(self) -> int:
        """Bytes a token. Fused, it reads and writes; made of parts, it is cast, squared, averaged, multiplied twice,
        and cast."""
        if self.wanted.fused_norms:
            return 2 * self.between * self.width
        return (2 * (self.between + FLOAT) + FLOAT * (2 + 1 + 2 + 2)) * self.width

    @property
    def norm_backward(self) -> int:
        """Bytes a token. Fused, it reads a gradient and its input and writes; made of parts, it is eleven operators."""
        if self.wanted.fused_norms:
            return 3 * self.between * self.width
        parts = 2 + 3 + 2 + 1 + 1 + 2 + 2 + 3 + 3 + self.full * (3 + 1)
        return (2 * (self.between + FLOAT) + FLOAT * parts) * self.width

    @property
    def sums_forward(self) -> int:
        """Bytes a token: two sums; where products are of another type, five of the maps' inputs are cast."""
        return (2 * (2 * self.between + self.product) + 5 * self.cast) * self.width

    @property
    def sums_backward(self) -> int:
        """Bytes a token: a gradient is summed over three maps, over two, and twice over both ways around a part."""
        return (5 * 3 * self.between + (2 + 5) * self.cast) * self.width

    @property
    def heads_forward(self) -> int:
        """Bytes a token: halves of queries and keys by cosine and sine, a difference, a sum, put together; and the
        attention's result, in the order of tokens."""
        turned = 2 * (self.product + self.between) + (3 + 2) * self.between + self.cast
        return turned * (self.queries + self.keys) + 2 * self.product * self.queries

    @property
    def heads_backward(self) -> int:
        """Bytes a token: four products, a sign, two sums, put together, in the order of tokens."""
        turned = 5 * self.between + (3 + 2 + 2) * self.product + 3 * self.cast
        return turned * (self.queries + self.keys)

    def optimizer_bytes(self) -> int:
        """The gradients' norm (read) and scale (read, written). AdamW reads four numbers and writes three, of which
        two may be bytes. With a copy in float32 it is ten operators of torch, with casts there and back."""
        each = self.wanted.trained_dtype.itemsize
        kind = "masters" if self.wanted.keeps_masters and self.wanted.optimizer == "adamw" else self.wanted.optimizer
        update = UPDATE[kind] + (2 * each if kind == "masters" else 0)
        return self.trained * (3 * each + update) // self.shared
