"""Rotary position embeddings: a token's position turns each pair of its query and key dimensions by an angle.

Dimension i is paired with dimension i + D/2 ("half rotation", the layout of the Hugging Face checkpoints). The pair
turns by position * theta^(-2i/D): the first pairs fast, the last ones slowly. The scalar product of a turned query
and a turned key depends on their distance only.

Past the length that was trained, the slow pairs come to angles that the model never saw. Each scaling slows them, by
a factor f, so that they stay within what is known:

- "linear" (position interpolation) slows all pairs alike, and so blurs neighbours, whom the fast pairs tell apart.
- "ntk" raises theta: the fastest pair stays as it was, the slowest becomes f times slower, the others in between.
- "dynamic" does the same, but by as much as the text at hand is too long: a short one is not touched.
- "yarn" decides by how often a pair turned in training: more than 32 times (`beta_fast`), it stays; less than once
  (`beta_slow`), it becomes f times slower; a ramp in between. It also sharpens attention, which more keys flatten.

Sources: Su et al. 2021 (arXiv 2104.09864); linear: Chen et al. 2023 (arXiv 2306.15595); NTK-aware and dynamic: bloc97
and emozilla 2023, written down with YaRN in Peng et al. 2023 (arXiv 2309.00071).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import Aquila2Config

# Source: Peng et al. 2023 (arXiv 2309.00071), sections 3.2 and 3.4: the turns between which YaRN's ramp lies, and how
# sqrt(1 / t) grows with ln(f). Both were found for LLaMA.
BETA_FAST, BETA_SLOW = 32, 1
YARN_SLOPE = 0.1


def inverse_frequencies(config: Aquila2Config, length: int | Tensor = 0, device: torch.device | None = None) -> Tensor:
    """The angle by which one step forward turns each pair.

    Args:
        config: gives D, theta and the scaling.
        length: tokens seen, that is the largest position + 1. Only dynamic scaling looks at it.
        device: where the result lives.

    Returns:
        (D / 2,) float32, radians per position.
    """
    rope, dim = config.rope_parameters, config.head_dim
    theta, factor = rope["rope_theta"], rope.get("factor", 1.0)
    match rope["rope_type"]:
        case "linear":
            return _unscaled(theta, dim, device) / factor
        case "ntk":
            return _unscaled(ntk_theta(theta, factor, dim), dim, device)
        case "dynamic":
            return _unscaled(ntk_theta(theta, dynamic_factor(config, length), dim), dim, device)
        case "yarn":
            kept = yarn_kept(config, device)
            # In this order, so that the rounding is that of transformers.
            slowed = 1.0 / (factor * _powers(theta, dim, device))
            return slowed * (1 - kept) + _unscaled(theta, dim, device) * kept
        case _:
            return _unscaled(theta, dim, device)


def _powers(theta: float | Tensor, dim: int, device: torch.device | None) -> Tensor:
    """theta^(2i/D) for each pair, (D / 2,) float32."""
    return theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def _unscaled(theta: float | Tensor, dim: int, device: torch.device | None) -> Tensor:
    return 1.0 / _powers(theta, dim, device)


def ntk_theta(theta: float, factor: float | Tensor, dim: int) -> float | Tensor:
    """The theta with which the slowest pair turns `factor` times more slowly and the fastest as before.

    The slowest pair turns by theta^(-(D - 2)/D); a theta that is f^(D / (D - 2)) times as large makes that 1/f.

    Args:
        theta: as trained.
        factor: 1 or more.
        dim: D, above 2.
    """
    return theta * factor ** (dim / (dim - 2))


def dynamic_factor(config: Aquila2Config, length: int | Tensor) -> float | Tensor:
    """How much dynamic scaling stretches for a text: 1 up to the trained length, growing with the length past it.

    Source: f * L / L_trained - (f - 1).
    """
    trained, factor = config.max_position_embeddings, config.rope_parameters["factor"]
    length = length.clamp(min=trained) if isinstance(length, Tensor) else max(length, trained)
    return factor * length / trained - (factor - 1)


def yarn_kept(config: Aquila2Config, device: torch.device | None = None) -> Tensor:
    """How much of its speed YaRN leaves each pair: 1 for those that turned often in training, 0 for the slow ones.

    A pair makes r turns in L_trained positions if its index is D ln(L_trained / (2 pi r)) / (2 ln theta). The ramp runs
    from the index of `beta_fast` turns, rounded down, to that of `beta_slow`, rounded up.

    Args:
        config: with "rope_type" "yarn"; `beta_fast` is 32 and `beta_slow` 1 where `rope_parameters` has none.
        device: where the result lives.

    Returns:
        (D / 2,) float32, from 0 to 1.

    Source: Peng et al. 2023 (arXiv 2309.00071), section 3.2; the rounding is that of the authors' code.
    """
    rope, dim, trained = config.rope_parameters, config.head_dim, config.trained_length

    def index(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low = max(math.floor(index(rope.get("beta_fast", BETA_FAST))), 0)
    high = min(math.ceil(index(rope.get("beta_slow", BETA_SLOW))), dim - 1)
    width = high - low or 0.001  # a step instead of a ramp, where both fall together
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / width
    return 1 - ramp.clamp(0, 1)


def attention_factor(config: Aquila2Config) -> float:
    """By how much cosine and sine are multiplied, and so the scores of attention by its square.

    YaRN divides the scores by a temperature t with sqrt(1 / t) = 0.1 ln(f) + 1; every other scaling leaves them.

    Source: Peng et al. 2023 (arXiv 2309.00071), section 3.4.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "yarn":
        return 1.0
    return rope.get("attention_factor", YARN_SLOPE * math.log(rope["factor"]) + 1.0)


def rotary_tables(
    config: Aquila2Config, positions: Tensor, dtype: torch.dtype, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle.

    The tables are computed from the positions at hand and not kept: they never depend on what was run before.

    Args:
        config: gives D, theta and the scaling.
        positions: (B, T) integers.
        dtype: type of the result; the angles themselves are computed in float32.
        length: tokens that dynamic scaling makes room for; by default those up to the largest position.

    Returns:
        cos, sin: each (B, 1, T, D / 2), ready to be multiplied with (B, H, T, D / 2).
    """
    if length is None:
        length = positions.max() + 1 if config.rope_parameters["rope_type"] == "dynamic" else 0
    angles = positions[:, None, :, None].float() * inverse_frequencies(config, length, positions.device)
    factor = attention_factor(config)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


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
