"""The Triton kernel beyond the grid of test_attention.py: blocks, number formats, imports, compiling for GPUs."""

import subprocess
import sys

import pytest
import torch
from attention_reference import Case, exact, visible

from aquila2_tut.model import Documents
from aquila2_tut.model.attention import triton_obstacle

obstacle = triton_obstacle(torch.ones(1, 1, 1, 1))
if obstacle:
    pytest.skip(f"the triton backend cannot run: {obstacle}", allow_module_level=True)

from aquila2_tut.model.flash import INTERPRETED, flash_attention  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


def errors(case: Case, dtype: torch.dtype = torch.float32, block: int | None = None) -> list[float]:
    """Relative errors of the output and the three gradients."""
    *inputs, grad = (x.to(DEVICE) for x in case.tensors(dtype))
    q, k, v = (x.requires_grad_() for x in inputs)
    documents = case.documents()
    documents = documents and documents.to(DEVICE)
    out = flash_attention(q, k, v, causal=case.causal, documents=documents, block=block)
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
    wanted = exact(*(x.cpu() for x in (q, k, v, grad)), visible(case))
    real = torch.ones(1) if documents is None else documents.queries.cpu()[:, None, :, None] > 0
    pairs = zip([found[0].cpu() * real, *(x.cpu() for x in found[1:])], [wanted[0] * real, *wanted[1:]], strict=True)
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


@pytest.mark.parametrize("layout", ["plain", "left", "packed-padded"])
@pytest.mark.parametrize("queries", [50, 33, 2])
@pytest.mark.parametrize("block", [16, 32])
def test_many_blocks(layout, queries, block):
    """The running maximum is rescaled, blocks are skipped, and the last block is not full."""
    case = Case(1, 2, 1, queries, 50, 48, layout, True, 11)
    assert max(errors(case, block=block)) <= 1e-5


def test_growing_scores():
    """The maximum of a row grows from block to block by more than float32 can hold the exponential of."""
    q, k = torch.ones(1, 1, 1, 32), torch.linspace(0, 60, 64)[None, None, :, None].expand(1, 1, 64, 32).contiguous()
    v = torch.randn(1, 1, 64, 32)
    exact_out = (q.double() @ k.double().transpose(2, 3) / 32**0.5).softmax(-1) @ v.double()
    out = flash_attention(*(x.to(DEVICE) for x in (q, k, v)), causal=False, block=16)
    torch.testing.assert_close(out.cpu().double(), exact_out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision(dtype, limit):
    assert max(errors(Case(1, 4, 2, 70, 70, 64, "packed", True, 5), dtype, block=32)) <= limit


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_heads_that_share_keys(heads):
    assert max(errors(Case(2, *heads, 20, 20, 32, "plain", True, 6))) <= 1e-5


def test_a_query_without_keys_gives_zeros():
    q, k = torch.randn(1, 1, 3, 16, device=DEVICE), torch.randn(1, 1, 4, 16, device=DEVICE)
    documents = Documents(torch.tensor([[1, 2, 1]], device=DEVICE), torch.tensor([[1, 1, 3, 3]], device=DEVICE))
    out = flash_attention(q, k, k, causal=False, documents=documents)
    assert not out[0, 0, 1].any() and out[0, 0, 0].any() and out[0, 0, 2].any()


def test_gradients_are_the_same_every_time():
    case = Case(1, 4, 1, 40, 40, 32, "packed", True, 9)
    *inputs, grad = (x.to(DEVICE) for x in case.tensors(torch.float32))

    def run() -> list[torch.Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        return torch.autograd.grad(flash_attention(q, k, v, causal=True, block=16), (q, k, v), grad)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_second_derivatives_are_refused():
    q = torch.randn(1, 1, 4, 16, device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad(flash_attention(q, q, q, causal=True).pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


LATE = """
import os
import triton, triton.language                      # as torch does on its own, before anything could be set
import torch
from aquila2_tut.model import attention
q = torch.randn(1, 2, 5, 16)
try:
    difference = attention(q, q, q, causal=True, backend="triton") - attention(q, q, q, causal=True)
    print(difference.abs().max().item() < 1e-6)
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(not INTERPRETED, reason="there is a GPU, so nothing is interpreted")
@pytest.mark.parametrize(("variable", "says"), [(None, "True"), ("1", "True"), ("0", "compiled for a GPU here")])
def test_the_order_of_imports_does_not_matter(variable, says, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if variable is not None:
        monkeypatch.setenv("TRITON_INTERPRET", variable)
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=True)
    assert says in done.stdout


COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from aquila2_tut.model import flash

POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
FIXED = {"lse": "*fp32", "delta": "*fp32", "ids_q": "*i32", "ids_k": "*i32", "blocks": "*i32", "scale": "fp32"}

def compiled(kernel, capability, dtype, dim, block):
    constants = {"CAUSAL": True, "DIM": dim, "WIDTH": triton.next_power_of_2(dim), "BQ": block, "BK": block}
    def kind(name):
        sizes = name in ("H", "Hkv", "T", "S") or name[-2:] in ("_b", "_h", "_t")
        return FIXED.get(name) or ("constexpr" if name in constants else "i32" if sizes else POINTERS[dtype])
    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constants)
    options = {"num_stages": 1 if dtype == "float32" else 2}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

capability, dtype, dim = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
block = flash.block_size(torch.empty(1, 1, 1, dim, dtype=getattr(torch, dtype)), 4096)
for kernel in (flash._forward, flash._backward_queries, flash._backward_keys):
    print(compiled(kernel, capability, dtype, dim, block).metadata.shared)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "shared_kib"),
    [(75, "float16", 64, 64), (80, "bfloat16", 128, 163), (86, "float32", 96, 99), (90, "bfloat16", 80, 227)],
)
def test_compiles_for_gpus(capability, dtype, dim, shared_kib, monkeypatch):
    """All three kernels become machine code, and need no more shared memory than a T4, A100, RTX 30 or H100 has.

    This needs no GPU: Triton brings the assembler. It says nothing about speed.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    command = [sys.executable, "-c", COMPILE, str(capability), dtype, str(dim)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No such file" in done.stderr and "ptxas" in done.stderr:
        pytest.skip("this build of triton brings no assembler for NVIDIA GPUs")
    assert done.returncode == 0, done.stderr[-2000:]
    needs = [int(line) for line in done.stdout.split()]
    assert len(needs) == 3 and max(needs) <= shared_kib * 1024, needs
