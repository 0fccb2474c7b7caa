"""What a rehearsal cannot see, as no tensor of ours holds it: each figure with its source."""

from __future__ import annotations

from .hardware import GPU
from .setting import Setting

# What a process holds before its first tensor, since kernels are loaded when they are first called: "around 400 MB".
# Source: pytorch/pytorch#109888 (2023-09, CUDA 11.7 and later). It differs by card and driver, by 100 MB or so.
CUDA_CONTEXT = 400_000_000
# What a group of more than two processes takes to talk: 688 MB. Source: NVIDIA/nccl#964 (2023-08, four A100, NVLink).
NCCL = 688_000_000
# cuBLAS works in two pieces of 4 MiB and eight of 16 KiB, from Hopper on in 32 MiB.
# Source: aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize.
_CUBLAS, _CUBLAS_HOPPER = 2 * 4096 * 1024 + 8 * 16 * 1024, 32 * 1024 * 1024
# Elements of a bucket, of which there are two where sending overlaps with computing.
# Source: A2:finetune/ds_zero2.config (3e8); DeepSpeed 0.10.2, stage_1_and_2.py, `backward`: ipg_buffer.
ZERO_BUCKET, ZERO_BUCKETS = 300_000_000, 2
# Parameters that ZeRO-3 leaves gathered. Source: DeepSpeed, zero/config.py, stage3_max_live_parameters.
ZERO3_LIVE = 1_000_000_000


def cublas_bytes(wanted: Setting) -> int:
    """What cuBLAS works in."""
    return cublas_workspace(wanted.card)


def cublas_workspace(card: GPU) -> int:
    """What cuBLAS works in on a card."""
    return _CUBLAS_HOPPER if card.capability >= (9, 0) else _CUBLAS


def gathered_bytes(wanted: Setting) -> int:
    """Weights that are whole on a card for a while, though each card keeps only its share."""
    config, each = wanted.config, wanted.dtype.itemsize
    if wanted.strategy == "zero3":
        return min(ZERO3_LIVE, config.parameter_count) * each
    if wanted.strategy == "fsdp2":  # a layer and the next one; the tables stay from the forward pass to the backward
        tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
        return (tables + 2 * (config.parameter_count - tables) // config.num_hidden_layers) * each
    return 0


def bucket_bytes(wanted: Setting, trained: int) -> int:
    """Buffers in which gradients travel: two of DeepSpeed's, or copies of all of them.

    Args:
        wanted: the setting.
        trained: parameters that are trained.
    """
    if wanted.gpus == 1 or wanted.strategy == "fsdp2":
        return 0
    each = wanted.trained_dtype.itemsize
    return (ZERO_BUCKETS * ZERO_BUCKET if wanted.strategy else trained) * each


def outside_bytes(wanted: Setting) -> int:
    """What a process takes outside of torch's allocator."""
    return CUDA_CONTEXT + (NCCL if wanted.gpus > 1 else 0)
