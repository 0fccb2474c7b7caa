"""What to change so that a run fits, each step rehearsed; and the other way round, what fits a card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .formula import formula_of
from .rehearse import Rehearsal, rehearse_setting
from .setting import Setting, checked, setting

PLANNED = ("AquilaChat2-70B-Expr", "AquilaChat2-34B", "AquilaChat2-7B")  # the largest first
_METHODS = ("full", "lora", "qlora")
_SHORTEST = 128  # tokens, below which a conversation hardly fits into a row


@dataclass(frozen=True)
class Change:
    """A step towards a run that fits.

    Args:
        fields: what is set otherwise.
        saved: bytes that this step saves, after those before it.
        found: the rehearsal with it.
    """

    fields: dict[str, object]
    saved: int
    found: Rehearsal


def changes(wanted: Setting) -> Iterator[dict[str, object]]:
    """What can be changed in a setting, what costs nothing first: then time, then what is learned, then the data."""
    if wanted.loss != "chunked":
        yield {"loss": "chunked"}
    if not wanted.checkpointing:
        yield {"checkpointing": True}
    if wanted.method == "full":
        yield {"optimizer": "adamw-8bit"} if wanted.optimizer == "adamw" and wanted.weights == "float32" else {}
        half = "bfloat16" if wanted.card.capability >= (8, 0) else "float16"
        yield {"method": "lora", "optimizer": "adamw", "weights": half, "precision": half}
    if wanted.method != "qlora" and wanted.strategy in ("", "zero2"):
        yield {"method": "qlora"}
    batch, length = wanted.batch_size, wanted.seq_len
    while batch > 1:
        batch //= 2
        yield {"batch_size": batch}
    while length > _SHORTEST:
        length //= 2
        yield {"seq_len": length}


def advice(found: Rehearsal) -> list[Change]:
    """Changes in the order in which to make them, each on top of those before, until the run fits.

    Args:
        found: a rehearsal. Of one that fits there is nothing to say.
    """
    made: list[Change] = []
    for fields in filter(None, changes(found.setting)):
        if found.fits:
            break
        after = rehearse_setting(checked(replace(found.setting, **fields)))
        if after.peak_bytes < found.peak_bytes:
            made.append(Change(fields, found.peak_bytes - after.peak_bytes, after))
            found = after
    return made


def largest_fit(model: str, method: str, gpu: str) -> Setting | None:
    """The most tokens of a step that fit, by the closed form: rows of the model's whole context, or shorter ones.

    Args:
        model: a preset.
        method: "full", "lora" or "qlora".
        gpu: a key of `GPUS`.

    Returns:
        None where not even the shortest row fits.
    """
    wanted = setting(model=model, method=method, gpu=gpu, batch_size=1, seq_len=1)
    if wanted.card.capability < (8, 0):  # bfloat16 is slow there
        weights = wanted.weights if method == "full" else "float16"
        wanted = replace(wanted, precision="float16", weights=weights)
    length = wanted.config.context_length
    while length >= _SHORTEST:
        if formula_of(one := replace(wanted, seq_len=length)).fits:
            return _more_rows(one)
        length //= 2
    return None


def _more_rows(wanted: Setting) -> Setting:
    """Doubles the rows for as long as they fit."""
    while formula_of(more := replace(wanted, batch_size=2 * wanted.batch_size)).fits:
        wanted = more
    return wanted


def plan(gpu: str) -> list[Setting]:
    """What fits a card: each model with each method, the largest model first, and of its methods the one that learns
    most.

    Args:
        gpu: a key of `GPUS`.

    Raises:
        RehearsalError: there is no such card.
    """
    found = (largest_fit(model, method, gpu) for model in PLANNED for method in _METHODS)
    return [fitting for fitting in found if fitting is not None]
