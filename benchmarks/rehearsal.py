"""Rehearsals against the closed form, against the original README's table, and how long they take.

    python benchmarks/rehearsal.py [readme | grid | small | speed] ...

Each table is printed row by row. `grid` takes a quarter of an hour, the others a minute or two.
"""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Iterator

from aquila2_tut.memory.formula import formula_of
from aquila2_tut.memory.hardware import GPUS
from aquila2_tut.memory.rehearse import Rehearsal, rehearse_setting
from aquila2_tut.memory.setting import Setting, setting

SIZES = {"7B": "AquilaChat2-7B", "34B": "AquilaChat2-34B", "70B": "AquilaChat2-70B-Expr"}
# Gigabytes and seconds a step, as printed in the README of 2023; on A100 of 80 GB.
README = [
    ("7B", "full", 2048, 43.9, 2.67),
    ("7B", "lora", 2048, 29.4, 2.04),
    ("7B", "qlora", 2048, 19.9, 2.14),
    ("34B", "qlora", 4096, 37.7, 8.22),
]


def row(found: Rehearsal, *more: str) -> None:
    w = found.setting
    f = formula_of(w)
    print(
        f"{w.name:22}{w.method:6}{w.batch_size:2} x {w.seq_len:<5}{w.gpu:9}"
        f"{found.peak_bytes / 1e9:7.2f} GB, reserved {found.reserved_bytes / 1e9:6.2f}, "
        f"formula {f.peak_bytes / 1e9:6.2f} "
        f"({f.peak_bytes / found.peak_bytes - 1:+.2%} {f.moment}), {found.flops:.3e} FLOP, "
        f"{found.seconds_per_step:6.2f} s/step, {'fits' if found.fits else 'too large'}",
        *more,
        flush=True,
    )


def terms(found: Rehearsal) -> str:
    return ", ".join(f"{label} {size / 1e9:.2f}" for label, size in found.breakdown.items())


def readme() -> None:
    for size, method, length, figure, seconds in README:
        for cards in (5, 6, 8, 16) if method == "full" else (8,):
            for batch in (4,) if size == "7B" else (4, 3, 2, 1):
                fields = {"model": SIZES[size], "method": method, "batch_size": batch, "seq_len": length, "gpus": cards}
                found = rehearse_setting(setting("upstream", **fields))
                possible = f"at the card's peak {found.flops / GPUS['A100-80G'].flops:.2f} s"
                possible += "" if found.possible_in(seconds) else f": {seconds} s are impossible"
                row(found, f"\n    README {figure} GB: {found.peak_bytes / 1e9 / figure - 1:+.1%};", possible)
                print("   ", terms(found), f"; {cards} cards")
    for method, figure in (("lora", 29.4), ("qlora", 19.9)):
        found = rehearse_setting(setting(method=method, batch_size=4, seq_len=2048))
        row(found, f"\n    default recipe: {found.peak_bytes / 1e9 / figure:.3f} of the README's")
        print("   ", terms(found))
    for loaded in ("float32", "float16"):  # one card, no DeepSpeed: autocast
        changes = {"weights": loaded, "adapters": "float32", "autocast": True, "gpus": 1, "strategy": ""}
        row(rehearse_setting(setting("upstream", method="lora", **changes)), f"\n    autocast, weights in {loaded}")


def grid_settings() -> Iterator[Setting]:
    for model, method in itertools.product(SIZES.values(), ("full", "lora", "qlora")):
        for batch, length in ((4, 2048), (1, 512)):
            yield setting(model=model, method=method, batch_size=batch, seq_len=length)
        yield setting(model=model, method=method, seq_len=1024, checkpointing=False)
        yield setting(model=model, method=method, loss="plain")
        yield setting("upstream", model=model, method=method)
        yield setting(model=model, method=method, batch_size=16, seq_len=1024)
        if method != "full":
            yield setting(model=model, method=method, targets=("all-linear",), r=64)
            yield setting(model=model, method=method, dropout=0.0, seq_len=1536)


def grid() -> None:
    apart = []
    for wanted in grid_settings():
        found = rehearse_setting(wanted)
        apart.append(formula_of(wanted).peak_bytes / found.peak_bytes - 1)
        row(found, f"\n    checkpointing {wanted.checkpointing}, loss {wanted.loss}, r {wanted.r}, {wanted.targets}")
    print(f"{len(apart)} settings, largest deviation {max(apart, key=abs):+.2%}")


def small() -> None:
    for size, gpu, shapes in (
        ("7B", "T4", [(4, 2048), (8, 2048), (16, 1024)]),
        ("34B", "RTX 3090", [(1, 512), (1, 1024), (1, 2048)]),
    ):
        precision = {"precision": "float16", "weights": "float16"} if gpu == "T4" else {}
        for batch, length in shapes:
            fields = {"model": SIZES[size], "method": "qlora", "batch_size": batch, "seq_len": length, "gpu": gpu}
            row(rehearse_setting(setting(**fields, **precision)))


def speed() -> None:
    for (size, model), method in itertools.product(SIZES.items(), ("lora", "qlora", "full")):
        begun = time.perf_counter()
        found = rehearse_setting(setting(model=model, method=method))
        took, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            f"{size} {method}: {took:.1f} s, process {peak / 1e9:.2f} GB, {len(found.timeline):,} operators", flush=True
        )


if __name__ == "__main__":
    for name in sys.argv[1:] or ["readme", "small", "speed"]:
        {"readme": readme, "grid": grid, "small": small, "speed": speed}[name]()
