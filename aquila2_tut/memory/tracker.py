"""Every byte of a run, from birth to death: which operator made it, in which line of code, and what it is.

A dispatch mode sees each operator below autograd, on real tensors as on fake ones, which have shapes and no numbers. A
storage lives from the operator that returns it until nothing refers to it any more; torch calls back at that moment. So
the account is that of the allocator: what an operator needs while it runs is its inputs, its outputs, and its own
workspace, where that is known.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

LABELS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "workspace", "buckets")
_ROUNDED_TO = 512  # bytes: kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp
_FREE = {"prim.device.default", "aten.detach.default"}  # a question and a view, no work for a device
_LIBRARIES = ("/torch/", "/memory/tracker.py", "<frozen", "/contextlib.py", "/bitsandbytes/")


def rounded(size: int) -> int:
    """What CUDA's caching allocator hands out for a request of so many bytes."""
    return -(-size // _ROUNDED_TO) * _ROUNDED_TO


@dataclass
class Allocation:
    """One storage.

    Args:
        bytes: that it takes.
        birth: number of the operator that made it; 0 for what was there before.
        death: number of the first operator that ran without it; None: it is still there.
        label: a member of `LABELS`.
        op: the operator; of what was there before, the name.
        stage: "before", "forward", "recompute", "backward" or "optimizer".
        line: file and line of the code that asked for it; in a backward pass, of its forward pass.
        shape: of the tensor that was returned.
    """

    bytes: int
    birth: int
    label: str
    op: str = ""
    stage: str = "before"
    line: str = ""
    shape: tuple[int, ...] = ()
    death: int | None = None

    def alive(self, at: int) -> bool:
        """Whether it is there while operator `at` runs."""
        return self.birth <= at and (self.death is None or at < self.death)


class Moment(NamedTuple):
    """An operator, and what is alive while it runs.

    Args:
        op: the operator.
        stage: see `Allocation`.
        bytes: alive, its results and its workspace included.
        line: see `Allocation`.
    """

    op: str
    stage: str
    bytes: int
    line: str


class Work(NamedTuple):
    """What an operator does: floating-point operations, and bytes of its inputs and results."""

    flops: int
    moved: int


Workspace = Callable[[Any, tuple, Any], int]
Kernels = Callable[[Any, tuple, Any, Work], Sequence[Work]]


class Tracker(TorchDispatchMode):
    """Follows every storage while it is entered.

    Args:
        vocab_size: a table with so many columns is one of logits.
        grain: bytes rounded as the allocator of the device does; the default is CUDA's.
        workspace: operator's name -> bytes that it takes inside and gives back, from (func, args, result).
        kernels: operator's name -> what its kernels do, one after the other, from (func, args, result, work as one).
        share: label -> by how much what carries it is divided among processes, for one of which the account is.
        flops: further formulas beside torch's own, as in `torch.utils.flop_counter`.

    Attributes:
        allocations: every storage there was.
        moments: one for each operator; number 0 is the state before.
        work: of each operator, or of each of its kernels.
    """

    def __init__(
        self,
        vocab_size: int = 0,
        grain: Callable[[int], int] = rounded,
        workspace: Mapping[str, Workspace] | None = None,
        share: Mapping[str, int] | None = None,
        flops: Mapping[Any, Callable[..., int]] | None = None,
        kernels: Mapping[str, Kernels] | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size, self.grain = vocab_size, grain
        self.workspace, self.share = dict(workspace or {}), dict(share or {})
        self.formulas, self.kernels = {**flop_registry, **(flops or {})}, dict(kernels or {})
        self.allocations: list[Allocation] = []
        self.moments: list[Moment] = [Moment("", "before", 0, "")]
        self.work: list[Work] = [Work(0, 0)]
        self.live, self.stage = 0, "forward"
        self._alive: dict[int, tuple[weakref.ref, Allocation]] = {}
        self._inside = 0  # layers whose forward pass is running
        self._lines: dict[int, str] = {}  # number in autograd's sequence -> line

    # --- what there is -----------------------------------------------------------------------------------------------

    def adopt(self, tensor: Tensor, label: str, name: str = "") -> None:
        """Counts a tensor that was there before, by its name, or corrects the label of one that is known."""
        known = self._alive.get(tensor.untyped_storage()._cdata)
        if known is None:
            self._born(tensor, Allocation(0, len(self.moments) - 1, label, name, shape=tuple(tensor.shape)))
            self.moments[-1] = self.moments[-1]._replace(bytes=max(self.moments[-1].bytes, self.live))
        else:
            self._relabel(known[1], label)

    def begin(self) -> None:
        """Begins the step that is told of: what came before only has to be there."""
        for allocation in self.allocations:
            allocation.birth = 0
        self.allocations = [allocation for allocation in self.allocations if allocation.death is None]
        self.moments, self.work = [Moment("", "before", self.live, "")], [Work(0, 0)]
        self.stage = "forward"

    def hold(self, size: int, label: str, op: str) -> Allocation:
        """Counts bytes that are no tensor's, such as a library's buffers, until `release`."""
        allocation = Allocation(self.grain(size), len(self.moments), label, op=op, stage=self.stage)
        self.allocations.append(allocation)
        self.live += allocation.bytes
        return allocation

    def release(self, allocation: Allocation) -> None:
        """Ends what `hold` began."""
        self._died(allocation)

    def _born(self, tensor: Tensor, allocation: Allocation) -> None:
        storage = tensor.untyped_storage()
        allocation.bytes = self._size(storage.nbytes(), allocation.label)
        key = storage._cdata
        self._alive[key] = weakref.ref(storage, lambda _: self._died(self._alive.pop(key)[1])), allocation
        self.allocations.append(allocation)
        self.live += allocation.bytes

    def _died(self, allocation: Allocation) -> None:
        allocation.death = len(self.moments)
        self.live -= allocation.bytes

    def _size(self, size: int, label: str) -> int:
        return self.grain(-(-size // self.share.get(label, 1)))

    def _relabel(self, allocation: Allocation, label: str) -> None:
        if allocation.label != label:
            before, allocation.label = allocation.bytes, label
            if label in self.share:
                allocation.bytes = self.grain(-(-before // self.share[label]))
                self.live += allocation.bytes - before

    # --- what happens ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if name in _FREE:
            return out
        at, stage, line = len(self.moments), self._now(), self._line()
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in results:
            if x.untyped_storage()._cdata not in self._alive:
                label = self._first_label(x, stage)
                self._born(x, Allocation(0, at, label, name, stage, line, tuple(x.shape)))
        inside = self.grain(self.workspace[name](func, args, out)) if name in self.workspace else 0
        if inside:
            self.allocations.append(Allocation(inside, at, "workspace", name, stage, line, (), at + 1))
        self.moments.append(Moment(name, stage, self.live + inside, line))
        work = self._work(func, args, kwargs or {}, out, results)
        self.work.extend(self.kernels[name](func, args, out, work) if name in self.kernels else (work,))
        return out

    def _now(self) -> str:
        if self.stage == "forward" and torch._C._current_graph_task_id() != -1:
            return "recompute" if self._forward_code else "backward"
        return self.stage

    @property
    def _forward_code(self) -> bool:
        """Whether, within a backward pass, a layer runs forward again. A function with a backward of its own has no
        gradients enabled in its forward pass; the module around it tells then."""
        return torch.is_grad_enabled() or self._inside > 0

    def _first_label(self, x: Tensor, stage: str) -> str:
        if self.vocab_size and x.ndim > 1 and x.shape[-1] == self.vocab_size:
            return "logits"
        return "optimizer" if stage == "optimizer" else "workspace"

    def _line(self) -> str:
        node = None if self._forward_code else torch._C._current_autograd_node()
        if node is not None:
            line = self._lines.get(node._sequence_nr(), "")
            return line or (_line_of(sys._getframe(2)))
        line = _line_of(sys._getframe(2))
        # The first operator of a node is the one that it stands for; those after it have its number.
        self._lines.setdefault(torch.autograd._get_sequence_nr() - 1, line)
        return line

    def _work(self, func: Any, args: tuple, kwargs: dict, out: Any, results: list[Tensor]) -> Work:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = {x.untyped_storage()._cdata for x in given}
        views = all(x.untyped_storage()._cdata in here for x in results) and not func._schema.is_mutable
        moved = 0 if views else sum(x.nbytes for x in (*given, *results))
        formula = self.formulas.get(func._overloadpacket)
        return Work(int(formula(*args, **kwargs, out_val=out)) if formula else 0, moved)

    # --- what is watched ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Tells weights, adapters and gradients of a model apart, and the second forward pass of a layer.

        Args:
            model: its trained parameters are adapters if it has frozen ones too.
        """
        frozen = any(not parameter.requires_grad for parameter in model.parameters())
        for name, parameter in model.named_parameters():
            self.adopt(parameter, "adapters" if frozen and parameter.requires_grad else "weights", name)
            for part in _stored_beside(parameter):
                self.adopt(part, "weights", name)
        for name, buffer in model.named_buffers():
            self.adopt(buffer, "weights", name)
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p: self.adopt(p.grad, "gradients"))
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        for part in _parts(model):
            hooks.append(part.register_forward_pre_hook(lambda *_: self._enter(1)))
            hooks.append(part.register_forward_hook(lambda *_: self._enter(-1), always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, by: int) -> None:
        self._inside += by

    # --- what came of it ---------------------------------------------------------------------------------------------

    @property
    def peak(self) -> int:
        """Number of the operator during which most was alive."""
        return max(range(len(self.moments)), key=lambda at: self.moments[at].bytes)

    def at(self, moment: int) -> list[Allocation]:
        """What is alive while an operator runs, the largest first, each with its final label."""
        kept = _kept(self.moments)
        for allocation in self.allocations:
            if allocation.label == "workspace" and allocation.stage in ("forward", "recompute"):
                end = allocation.death if allocation.death is not None else len(self.moments)
                if kept[min(allocation.birth, len(kept) - 1)] < end:
                    allocation.label = "activations"
        return sorted((a for a in self.allocations if a.alive(moment)), key=lambda a: -a.bytes)

    def at_peak(self) -> tuple[Moment, list[Allocation], dict[str, int]]:
        """The operator during which most is alive; what is, the largest first; and the bytes of each label."""
        alive, labels = self.at(self.peak), Counter()
        for allocation in alive:
            labels[allocation.label] += allocation.bytes
        return self.moments[self.peak], alive, dict(labels.most_common())


def _kept(moments: list[Moment]) -> list[int]:
    """For each operator, the next one of a backward pass: what is alive then was kept for it."""
    following, out = len(moments) + 1, []
    for at in range(len(moments) - 1, -1, -1):
        out.append(following)
        if moments[at].stage == "backward":
            following = at
    return out[::-1]


def _stored_beside(parameter: Tensor) -> list[Tensor]:
    """What bitsandbytes keeps beside the codes of a matrix: scales, their scales, levels and the mean."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    parts = [state.absmax, state.code, state.offset if state.nested else None]
    parts += [state.state2.absmax, state.state2.code] if state.nested else []
    return [part for part in parts if isinstance(part, Tensor)]


def _parts(model: nn.Module) -> list[nn.Module]:
    """What layers consist of; the layers themselves are not called a second time, only their `forward`."""
    layers = (
        module for module in model.modules() if hasattr(module, "gradient_checkpointing") and hasattr(module, "mlp")
    )
    return [part for layer in layers for part in layer.children()]


def _line_of(frame: FrameType | None) -> str:
    """The innermost line that is neither torch's nor ours."""
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if not any(part in file for part in _LIBRARIES):
            return f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
