"""Weights, gradients and optimizer states that are split over the processes of a run (FSDP2).

The splitting is torch's `fully_shard`, called by accelerate as on any machine. Two things are added. accelerate leaves
it out on a CPU, where it makes copies; here a CPU is like any other device, so that what is said of FSDP2 can be seen
without a GPU. And a checkpoint holds whole tensors under the usual names, so that any number of processes can go on
with it; transformers' own can be read by sharded runs only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils import _pytree as pytree

from .errors import TrainError


def shard_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Makes a run of several processes on CPUs one of FSDP, as accelerate makes one of several GPUs.

    Args:
        accelerator: of a run on CPUs, with nothing prepared yet; one of another kind is left alone.
        plugin: how to shard.

    Source: accelerate 1.15, `AcceleratorState.__init__`, in which the list of kinds lacks MULTI_CPU.
    """
    state = accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin


def own_bytes(tensors: Any) -> int:
    """The bytes of tensors, or of what this process holds of them if they are split.

    Args:
        tensors: any nest of lists and dicts with tensors in it, such as the state of an optimizer.
    """
    kept = [leaf for leaf in pytree.tree_leaves(tensors) if isinstance(leaf, Tensor)]
    return sum((leaf.to_local() if isinstance(leaf, DTensor) else leaf).nbytes for leaf in kept)


def whole(tensors: Any) -> Any:
    """Gathers what is split, one tensor after the other; all processes have to call it.

    Args:
        tensors: any nest of lists and dicts with tensors in it.

    Returns:
        The same with whole tensors, on the CPU.
    """
    return pytree.tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), tensors)


def stored_once(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out the second names of weights that have two: gathered, they have become two tensors.

    Args:
        model: whose embedding may be its head.
        state: whole tensors by name.
    """
    names = {name for name, _ in model.named_parameters()}
    second = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    return {name: tensor for name, tensor in state.items() if name not in second}


def split_like(model: nn.Module, tensors: Any) -> Any:
    """Splits whole tensors as the weights of a model are split: by rows. Every process cuts out its own part.

    Args:
        model: sharded or not.
        tensors: any nest of lists and dicts with tensors in it; a single number stays as it is.

    Returns:
        The same with split tensors, or `tensors` if the model is not sharded.
    """
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    if mesh is None:
        return tensors

    def split(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None) if tensor.dim() else tensor

    return pytree.tree_map_only(Tensor, split, tensors)


def load_whole(model: nn.Module, folder: Path) -> None:
    """Loads the weights, or the adapter, of a checkpoint into a model, whether it is sharded or not.

    Args:
        model: changed in place.
        folder: has whole tensors in safetensors files, under transformers' or peft's names.

    Raises:
        TrainError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise TrainError(f"{folder}: there are no weights in it")
    for file in files:
        tensors: Mapping[str, Tensor] = split_like(model, load_file(file))
        if hasattr(model, "peft_config"):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(model, dict(tensors))
        else:
            model.load_state_dict(tensors, strict=False)  # a head that is the embedding is stored once


def save_optimizer(optimizer: torch.optim.Optimizer, file: Path, main: bool) -> None:
    """Writes the state of an optimizer as a run of one process does; all processes have to call it.

    Args:
        optimizer: its state is sharded.
        file: to write.
        main: whether this process does the writing.
    """
    state = whole(optimizer.state_dict())
    if main:
        torch.save(state, file)


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, file: Path) -> None:
    """Reads what `save_optimizer` or a run of one process wrote, and splits it as the weights are.

    Args:
        optimizer: of the model; changed in place.
        model: sharded.
        file: to read.
    """
    state = torch.load(file, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(split_like(model, state))
