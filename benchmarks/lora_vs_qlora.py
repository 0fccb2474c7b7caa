"""LoRA against Q-LoRA of a 7B, rehearsed from 128 to 8192 tokens, and the runs of the original README's table.

    python benchmarks/lora_vs_qlora.py [--save]

Some forty rehearsals, five minutes on one thread. With --save the rows go where the book's chapter reads them; what
others have published is kept as it is in that file.
"""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from aquila2_tut.memory.formula import formula_of
from aquila2_tut.memory.rehearse import rehearse_setting
from aquila2_tut.memory.setting import Setting, setting

TARGET = Path(__file__).parent.parent / "aquila2_tut" / "memory" / "lora_vs_qlora.json"
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
GPU = "A100-80G"
# model, method, tokens a row, rows, cards: of the README, or what was tried to find the run that its figure fits.
README = [
    ("AquilaChat2-7B", "lora", 2048, 4, 8),
    ("AquilaChat2-7B", "qlora", 2048, 4, 8),
    *(("AquilaChat2-7B", "full", 2048, 4, cards) for cards in (4, 5, 6, 7, 8)),
    *(("AquilaChat2-34B", "qlora", 4096, rows, 8) for rows in (4, 3, 2, 1)),
]


def rehearsed(wanted: Setting) -> dict[str, float]:
    """What is kept of a rehearsal."""
    found = rehearse_setting(wanted)
    return {
        "peak": found.peak_bytes,
        "derived": formula_of(wanted).peak_bytes,
        "reserved": found.reserved_bytes,
        "flops": found.flops,
        "seconds": round(found.least_seconds, 5),
    }


def length_row(tokens: int) -> dict[str, object]:
    """Both methods at one length."""
    both = {}
    for method in ("lora", "qlora"):
        fields = {"model": "AquilaChat2-7B-16K", "method": method, "batch_size": 1, "seq_len": tokens}
        both[method] = rehearsed(setting(gpu=GPU, **fields))
    return {"tokens": tokens, **both}


def readme_row(model: str, method: str, tokens: int, rows: int, cards: int) -> dict[str, object]:
    """One run of the README, or of what was tried."""
    fields = {"model": model, "method": method, "batch_size": rows, "seq_len": tokens}
    found = rehearsed(setting("upstream", **fields, gpus=cards, gpu=GPU))
    return {"model": model, "method": method, "tokens": tokens, "rows": rows, "cards": cards, **found}


def main(save: bool) -> None:
    before = json.loads(TARGET.read_text("utf-8")) if TARGET.exists() else {}
    tables = {"lengths": [], "readme": []}
    for name, make, inputs in (("lengths", length_row, [(n,) for n in LENGTHS]), ("readme", readme_row, README)):
        for each in inputs:
            tables[name].append(make(*each))
            print(json.dumps(tables[name][-1]), flush=True)
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    conditions = {"gpu": GPU, "lengths": "AquilaChat2-7B-16K, recipe default, one row", "readme": "recipe upstream"}
    conditions |= {"machine": f"{platform.machine()}, no GPU: rehearsed, not run", "versions": versions}
    conditions |= {"date": str(date.today()), "command": "python benchmarks/lora_vs_qlora.py --save"}
    if save:
        text = json.dumps({"conditions": conditions, **tables, "published": before.get("published", [])}, indent=1)
        TARGET.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main("--save" in sys.argv[1:])
