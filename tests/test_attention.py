"""Every backend of attention against float64, in every layout of rows; which backend is chosen, and why."""

import importlib
import subprocess
import sys

import pytest
import torch
from attention_reference import Case, cases, exact, stand_in, visible
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila2_tut.config import ATTN_BACKENDS
from aquila2_tut.model import Documents, attention, attention_weights
from aquila2_tut.model.attention import BACKENDS, AttentionError, choose_backend, triton_obstacle

module = importlib.import_module("aquila2_tut.model.attention")
GRID = cases(216)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
NO_TRITON = triton_obstacle(torch.ones(1, 1, 1, 1))
ON_CPU = ["eager", "sdpa", "flash", *([] if NO_TRITON else ["triton"])]


@pytest.fixture
def flash_on_cpu(monkeypatch):
    """The flash backend with the stand-in in place of the package."""
    package = stand_in()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(module, "flash_obstacle", lambda q, mask=None: None)
    return package


def outcome(q, k, v, grad, device="cpu", **settings) -> list[torch.Tensor]:
    """Output and gradients of q, k and v."""
    q, k, v = (x.detach().to(device).requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, **settings)
    return [
        x.cpu() for x in (out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(device), materialize_grads=True))
    ]


def errors(found: list[torch.Tensor], wanted: list[torch.Tensor], real: torch.Tensor) -> tuple[float, float]:
    """Relative errors of the output, at real queries, and of the gradient of q, k and v taken as one vector.

    (As one, because a query that can look at two keys only has hardly any gradient in q and k: what is left is the
    difference of two nearly equal numbers, which half precision has rounded.)
    """
    vectors = ((out * real, torch.cat([x.flatten() for x in gradients])) for out, *gradients in (found, wanted))
    return tuple(((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(*vectors, strict=True))


def compare(case: Case, dtype: torch.dtype, backends: list[str], device: str = "cpu") -> None:
    tensors, mask, documents = case.tensors(dtype), visible(case), case.documents()
    wanted = exact(*tensors, mask)
    real = torch.ones(1) if documents is None else documents.queries[:, None, :, None] > 0
    documents = documents if documents is None else documents.to(device)
    for backend in backends:
        found = outcome(*tensors, device, causal=case.causal, mask=documents, backend=backend)
        assert all(x.isfinite().all() and x.dtype == dtype for x in found), backend
        worst = errors(found, wanted, real)
        assert max(worst) <= LIMIT[dtype], (backend, dtype, worst)


@pytest.mark.parametrize("dtype", LIMIT, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_backends_equal_float64(case, dtype, flash_on_cpu):
    compare(case, dtype, ON_CPU)
    assert flash_on_cpu.calls == [] or flash_on_cpu.calls == ["dense" if case.layout == "plain" else "varlen"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_backends_equal_float64_on_a_gpu():
    """The same cases where the real package and the compiled kernel run."""
    q = torch.ones(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda")
    able = [b for b, obstacle in (("flash", module.flash_obstacle), ("triton", triton_obstacle)) if not obstacle(q)]
    for case in GRID:
        compare(case, torch.bfloat16, ["eager", "sdpa", *able], "cuda")
        compare(case, torch.float32, ["eager", "sdpa", *(b for b in able if b == "triton")], "cuda")


def test_the_grid_is_wide():
    lengths = {case.queries for case in GRID} | {case.keys for case in GRID}
    assert len(GRID) >= 200 and {1, 2, 16, 17, 128, 129, 256, 257} <= lengths
    assert {case.dim for case in GRID} == {32, 48, 64, 80, 96, 112, 128}
    assert {case.heads // case.kv_heads for case in GRID} == {1, 2, 3}
    for layout in ("plain", "left", "right", "packed", "packed-padded", "gap"):
        of_kind = [case for case in GRID if case.layout == layout and case.causal]
        assert {min(case.queries, 2) < case.keys for case in of_kind} == {True, False}
        assert any(case.queries == 1 < case.keys for case in of_kind), f"no decode step, {layout}"
        assert any(1 < case.queries < case.keys for case in of_kind), f"no cached chunk, {layout}"


@st.composite
def any_case(draw) -> Case:
    keys = draw(st.integers(1, 70))
    kv_heads = draw(st.integers(1, 2))
    layout = draw(st.sampled_from(["plain", "left", "right", "packed", "packed-padded", "gap"]))
    return Case(
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        queries=draw(st.integers(1, keys)),
        keys=keys,
        dim=draw(st.integers(2, 8)) * 16,
        layout=layout,
        causal=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=any_case())
def test_any_shape(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", stand_in())
        patch.setattr(module, "flash_obstacle", lambda q, mask=None: None)
        compare(case, torch.float32, ON_CPU)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [(5, 5), (1, 9), (3, 9)])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_dense_masks(heads, lengths, kind):
    torch.manual_seed(1)
    (h, hkv), (t, s) = heads, lengths
    q, k, v, grad = (
        torch.randn(2, h, t, 16),
        torch.randn(2, hkv, s, 16),
        torch.randn(2, hkv, s, 16),
        torch.randn(2, h, t, 16),
    )
    mask = torch.rand(2, 1, t, s) < 0.7
    mask[..., 0] = True
    seen = torch.ones(t, s).tril(s - t).bool() & (mask | (kind == "none"))
    given = {"none": None, "bool": mask, "float": torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))}[kind]
    wanted = exact(q, k, v, grad, seen.expand(2, 1, t, s))
    for backend in ("eager", "sdpa", "auto"):
        found = outcome(q, k, v, grad, causal=True, mask=given, backend=backend)
        assert max(errors(found, wanted, torch.ones(1))) <= 1e-5
    weights = attention_weights(q, k, causal=True, mask=given)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, h, t))
    assert not weights[~seen.expand_as(weights)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_nothing_but_padding(dtype, flash_on_cpu):
    """They come out finite and give no gradient of NaN."""
    case = Case(2, 2, 1, 9, 9, 32, "left", True, 0)
    q, k, v, _ = case.tensors(dtype)
    for rows in ([[0] * 9, [1] * 9], [[0] * 9, [0] * 9]):
        documents = Documents.of_tokens(torch.tensor(rows), 9)
        for backend in ON_CPU:
            found = outcome(q, k, v, torch.zeros_like(q), causal=True, mask=documents, backend=backend)
            assert all(x.isfinite().all() for x in found), backend
            assert not any(x.any() for x in found[1:]), backend


def test_auto_says_why():
    q = torch.randn(1, 2, 5, 16)
    out, choice = attention(q, q, q, causal=True, explain=True)
    assert torch.equal(out, attention(q, q, q, causal=True, backend="sdpa"))
    assert choice == ("sdpa", "flash cannot run: it runs on CUDA devices, and the tensors are on cpu")
    assert choose_backend(q, backend="eager") == ("eager", "asked for by name")
    assert BACKENDS == ATTN_BACKENDS


class OnCuda:
    """What `flash_obstacle` looks at in a tensor, as if it lay on a GPU."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, dtype=torch.bfloat16, dim=64):
        self.dtype, self.shape = dtype, (1, 2, 5, dim)


@pytest.mark.parametrize(
    ("q", "capability", "mask", "reason"),
    [
        (OnCuda(), (9, 0), None, None),
        (OnCuda(torch.float16, 256), (8, 0), "documents", None),
        (OnCuda(torch.float32), (9, 0), None, "it takes float16 and bfloat16, not float32"),
        (OnCuda(), (7, 5), None, r"compute capability 8\.0 \(Ampere\) or newer"),
        (OnCuda(dim=288), (9, 0), None, "a head dimension of at most 256, not 288"),
        (OnCuda(), (9, 0), "dense", "it takes no T x S mask; `Documents` describe"),
    ],
)
def test_auto_on_a_gpu(q, capability, mask, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in())
    module._import_obstacle.cache_clear()
    documents = Documents.of_tokens(torch.ones(1, 5, dtype=torch.int), 5)
    mask = {"dense": torch.ones(5, 5, dtype=torch.bool), "documents": documents}.get(mask)
    choice = choose_backend(q, mask)
    module._import_obstacle.cache_clear()
    if reason is None:
        assert choice == ("flash", f"flash can run: cuda:0, {str(q.dtype).removeprefix('torch.')}")
    else:
        assert choice.backend == "sdpa"
        with pytest.raises(AttentionError, match=f"'flash' cannot run: .*{reason}.*'sdpa' and 'auto' always can"):
            choose_backend(q, mask, "flash")


def test_auto_survives_a_broken_package(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # what Python makes of a module that must not be imported
    module._import_obstacle.cache_clear()
    choice = choose_backend(OnCuda())
    module._import_obstacle.cache_clear()
    assert choice.backend == "sdpa" and "flash_attn" in choice.reason and "pip install flash-attn" in choice.reason


@pytest.mark.parametrize(
    ("dtype", "dim", "mask", "message"),
    [
        (torch.float64, 16, None, "it takes float32, float16 and bfloat16, not float64"),
        (torch.float32, 160, None, "it takes a head dimension of at most 128, not 160"),
        (torch.float32, 16, torch.ones(5, 5).bool(), "it takes no T x S mask"),
    ],
)
def test_triton_says_why_not(dtype, dim, mask, message):
    q = torch.randn(1, 2, 5, dim, dtype=dtype)
    with pytest.raises(AttentionError, match=f"'triton' cannot run: {message}"):
        attention(q, q, q, causal=True, mask=mask, backend="triton")


WITHOUT_PACKAGES = """
import sys
sys.modules["triton"] = sys.modules["flash_attn"] = None
import torch
from aquila2_tut.model import attention
assert "aquila2_tut.model.flash" not in sys.modules
q = torch.randn(1, 2, 5, 16)
print(attention(q, q, q, causal=True, explain=True)[1].backend)
for backend in ("flash", "triton"):
    try:
        attention(q, q, q, causal=True, backend=backend)
    except ValueError as error:
        print(error)
"""


def test_works_without_the_packages():
    done = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGES], capture_output=True, text=True, check=True)
    auto, flash, triton = done.stdout.splitlines()
    assert auto == "sdpa"
    assert "'flash' cannot run: it runs on CUDA devices" in flash
    assert "'triton' cannot run: " in triton and "pip install triton" in triton


def test_refuses_what_does_not_fit():
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 3, 3, 8)
    with pytest.raises(AttentionError, match="does not fit"):
        attention(q, k, k, causal=True)
    with pytest.raises(AttentionError, match="'fast' is not one of auto, eager, sdpa, flash, triton"):
        attention(q, q, q, causal=True, backend="fast")
    with pytest.raises(AttentionError, match="expected, not"):
        attention(q[0], q[0], q[0], causal=True)
    with pytest.raises(AttentionError, match="3 queries for 2 keys"):
        attention(q, q[:, :, :2], q[:, :, :2], causal=True)
    with pytest.raises(AttentionError, match="bool .* or additive float expected, not int64"):
        attention(q, q, q, causal=True, mask=torch.ones(3, 3).long())
    with pytest.raises(AttentionError, match=r"\(1, 4\)\] do not fit \(B, T\) and \(B, S\) \[\(1, 3\), \(1, 3\)\]"):
        attention(q, q, q, causal=True, mask=Documents.of_tokens(torch.ones(1, 4).int(), 3))
