"""Rotary position embeddings: a token's position turns each pair of its query and key dimensions by an angle.

Dimension i is paired with dimension i + D/2 ("half rotation", the layout of the Hugging Face checkpoints). The pair
turns by position * theta^(-2i/D): the first pairs fast, the last ones slowly. The scalar product of a turned query
and a turned key depends on their distance only.

Source: Su et al. 2021 (arXiv 2104.09864); linear scaling: Chen et al. 2023 (arXiv 2306.15595).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Aquila2Config


def inverse_frequencies(config: Aquila2Config, length: int | Tensor = 0, device: torch.device | None = None) -> Tensor:
    """The angle by which one step forward turns each pair.

    Args:
        config: gives D, theta and the scaling.
        length: tokens seen, that is the largest position + 1. Only dynamic scaling looks at it.
        device: where the result lives.

    Returns:
        (D / 2,) float32, radians per position.

    Source: linear: every position divided by the factor. dynamic: theta grows with the length once the length is
    past what was trained, as theta * (f * L / L_max - (f - 1))^(D / (D - 2)).
    """
    rope, dim = config.rope_parameters, config.head_dim
    base = rope["rope_theta"]
    if rope["rope_type"] == "dynamic":
        trained, factor = config.max_position_embeddings, rope["factor"]
        length = length.clamp(min=trained) if isinstance(length, Tensor) else max(length, trained)
        base = base * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequencies = 1.0 / (base**exponents)
    return frequencies / rope["factor"] if rope["rope_type"] == "linear" else frequencies


def rotary_tables(config: Aquila2Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle.

    The tables are computed from the positions at hand and not kept: they never depend on what was run before.

    Args:
        config: gives D, theta and the scaling.
        positions: (B, T) integers.
        dtype: type of the result; the angles themselves are computed in float32.

    Returns:
        cos, sin: each (B, 1, T, D / 2), ready to be multiplied with (B, H, T, D / 2).
    """
    length = positions.max() + 1 if config.rope_parameters["rope_type"] == "dynamic" else 0
    angles = positions[:, None, :, None].float() * inverse_frequencies(config, length, positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_(i + D/2)) by its angle.

    Args:
        x: (B, H, T, D) queries or keys.
        cos, sin: (B, 1, T, D / 2) from `rotary_tables`.

    Returns:
        (B, H, T, D).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
