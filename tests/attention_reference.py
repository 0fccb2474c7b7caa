"""What the attention tests compare with: the formula in float64, and a stand-in of the flash-attn package."""

import random
from dataclasses import dataclass
from types import ModuleType

import torch

from aquila2_tut.model import Documents


@dataclass(frozen=True)
class Case:
    """One call of attention. `layout` says what the rows hold; the queries are the last T of the S tokens."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    layout: str
    causal: bool
    seed: int

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}"
        kind = f"{self.layout}{'' if self.causal else '-full'}"
        return f"{self.seed}-{kind}-B{self.batch}-H{heads}-T{self.queries}-S{self.keys}-D{self.dim}"

    def ids(self) -> torch.Tensor | None:
        """(B, S) document numbers, 0 at padding; None where every row is one whole document."""
        pick = random.Random(self.seed)
        return None if self.layout == "plain" else torch.tensor([self._row(pick) for _ in range(self.batch)])

    def _row(self, pick: random.Random) -> list[int]:
        keys = self.keys
        cut = pick.randint(0, keys - 1)
        if self.layout == "left":
            return [0] * cut + [1] * (keys - cut)
        if self.layout == "right":
            return [1] * (keys - cut) + [0] * cut
        if self.layout == "gap":  # an answer behind a padded prompt
            return [1] * (cut - cut // 2) + [0] * (cut // 2) + [1] * (keys - cut)
        ends = sorted(pick.sample(range(keys + 1), min(pick.randint(1, 5), keys + 1)))
        row = [sum(end <= i for end in ends) + 1 for i in range(keys)]
        return [0 if self.layout == "packed-padded" and n == len(ends) + 1 else n for n in row]

    def tensors(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """q, k, v and the gradient of the output, zero where a query is padding."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, tokens: int) -> torch.Tensor:
            # Strided as in a model: (B, T, H, D) seen as (B, H, T, D).
            x = torch.randn(self.batch, tokens, heads, self.dim, generator=generator)
            return x.to(dtype).transpose(1, 2)

        q, k, v = draw(self.heads, self.queries), draw(self.kv_heads, self.keys), draw(self.kv_heads, self.keys)
        grad, ids = draw(self.heads, self.queries), self.ids()
        if ids is not None:
            grad = grad * (ids[:, None, -self.queries :, None] > 0)
        return q, k, v, grad

    def documents(self) -> Documents | None:
        return None if self.layout == "plain" else Documents.of_tokens(self.ids(), self.queries)


def cases(many: int) -> list[Case]:
    """Lengths from 1 to 257, many beside powers of two; prefill, cached chunks and single decoded tokens."""
    lengths = (1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257)
    pick, found = random.Random(3), []
    for seed in range(many):
        keys = lengths[seed % len(lengths)]
        queries = pick.choice([keys, keys, 1, pick.randint(1, keys)])
        kv_heads, group = pick.choice([(1, 1), (2, 1), (1, 2), (1, 3), (2, 2)] if keys < 100 else [(1, 1), (1, 2)])
        layout = ("plain", "left", "right", "packed", "packed-padded", "gap")[pick.randrange(6)]
        batch = pick.choice([1, 2]) if keys < 100 else 1
        dim = (32, 48, 64, 80, 96, 112, 128)[seed % 7]
        found.append(Case(batch, kv_heads * group, kv_heads, queries, keys, dim, layout, pick.random() < 0.8, seed))
    return found


def visible(case: Case) -> torch.Tensor:
    """(B, 1, T, S): the definition, token by token."""
    ids = [[1] * case.keys] * case.batch if case.layout == "plain" else case.ids().tolist()
    shift = case.keys - case.queries
    rows = [
        [[ids[b][i + shift] == ids[b][j] and (not case.causal or j <= i + shift) for j in range(case.keys)]]
        for b in range(case.batch)
        for i in range(case.queries)
    ]
    return torch.tensor(rows).view(case.batch, 1, case.queries, case.keys)


def exact(q, k, v, grad, mask) -> list[torch.Tensor]:
    """Output and gradients of q, k and v by the formula in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ wide_k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    out = scores.softmax(-1) @ wide_v
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())]


def stand_in() -> ModuleType:
    """A module with the two functions of flash-attn (2.1 and newer) that the package calls, in plain torch.

    Layouts, argument order and the alignment of the causal triangle with the last key are those of the package's
    documentation, and what it would reject is rejected. Products and the softmax are taken in float32, as there.
    """
    module = ModuleType("flash_attn")
    module.calls = []

    def dense(q, k, v, causal):
        q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            scores = scores.masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert q.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[2] % k.shape[2] == 0
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        module.calls.append("dense")
        return dense(q, k, v, causal).to(q.dtype)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert q.ndim == 3 and k.shape == v.shape and q.shape[1] % k.shape[1] == 0
        for starts, longest, x in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
            assert starts.dtype == torch.int32 and starts.is_contiguous() and type(longest) is int
            assert starts[0] == 0 and starts[-1] == len(x) and longest == starts.diff().max()
        assert len(cu_seqlens_q) == len(cu_seqlens_k)
        module.calls.append("varlen")
        spans = zip(
            *(x.tolist() for x in (cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:])), strict=False
        )
        parts = [dense(q[None, a:b], k[None, c:d], v[None, c:d], causal)[0] for a, b, c, d in spans]
        return torch.cat(parts).to(q.dtype)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module
