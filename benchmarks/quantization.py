"""What does quantization do to a model? Every format on the same texts, with intervals, and a file for the book.

Each format is made from the same float32 model in this process: bits per byte of held-out English, of held-out Chinese
and of Python's own library, and a task with four choices: which of four continuations is the real one. Differences to
float32 are taken text by text, so their intervals say what the format does and not how hard a text is. Then the error
of the outputs of every linear map, one by one, and one linear map at all numbers of bits.

SmolLM2 comes from a file with four bits a weight (Q4_1, blocks of 32): its "float32" is rounded already, and every
other grid rounds it a second time. Aquila2-Nano was never rounded below bfloat16.

    python benchmarks/quantization.py [--models NAME ...] [--quick] [--save]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "aquila2_tut" / "quant" / "effect.json"
MODELS = ("Aquila2-Nano", "SmolLM2-135M")
SOURCES = {"english": ("austen", "libreoffice-en"), "chinese": ("songci", "libreoffice-zh")}
PYTHON = ("ast", "bisect", "calendar", "configparser", "csv", "dataclasses", "difflib", "fractions", "functools")
PYTHON += ("graphlib", "heapq", "json/decoder", "pathlib", "queue", "random", "shlex", "statistics", "textwrap")
PYTHON += ("timeit", "tomllib/_parser", "typing", "uuid", "zipapp")
CALIBRATION = ("austen", "libreoffice-en", "songci", "libreoffice-zh", "python-docs")
TENSOR_INT8, PLAIN = "int8-tensor", {"fp32": "float32", "bf16": "bfloat16"}
SCHEMES = {
    "int8": ("int8", 8, True),
    "nf4": ("nf4", 4, False),
    "nf4-dq": ("nf4", 4, True),
    **{f"{method}-{bits}": (method, bits, True) for bits in (4, 3, 2) for method in ("rtn", "awq", "gptq")},
}


TWO_BITS = ("rtn-2", "awq-2", "gptq-2")


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        texts: of each kind.
        characters: of a text; of Chinese a third, for each has three bytes.
        python: characters of a piece of Python.
        questions: of each language.
        rows: of 512 tokens to calibrate with.
        layer_rows: of these, for the errors of single linear maps; 0 leaves them out.
        leave_out: formats.
    """

    texts: int = 40
    characters: int = 1500
    python: int = 3000
    questions: int = 150
    rows: int = 64
    layer_rows: int = 64
    leave_out: tuple[str, ...] = ()


QUICK = Sizes(texts=4, characters=400, python=400, questions=8, rows=2, layer_rows=2)
# Sixteen times as large as Nano, and slow on a CPU: less of everything, and not what is known to be broken.
SIZES = {
    "SmolLM2-135M": Sizes(20, 600, python=600, questions=50, rows=24, layer_rows=0, leave_out=("awq-3", *TWO_BITS))
}


def told(what: str) -> None:
    """Progress, apart from the results."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


# --- texts ---


def texts(sizes: Sizes) -> dict[str, list[str]]:
    """Kind -> pieces of held-out documents. Chinese has a third of the characters: each has three bytes."""
    from aquila2_tut.data import corpus

    found = {}
    for kind, sources in SOURCES.items():
        each = sizes.texts // len(sources)
        length = sizes.characters // (3 if kind == "chinese" else 1)
        by_source = [list(corpus("held-out", [source])) for source in sources]
        chosen = [d for all_ in by_source for d in Random(0).sample(all_, min(each, len(all_)))]
        found[kind] = [document.text[:length] for document in chosen]
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = [(library / f"{name}.py").read_text(encoding="utf-8") for name in PYTHON]
    middles = [text[len(text) // 2 :][: sizes.python] for text in modules]
    return found | {"python": middles[: sizes.texts]}


def calibration(tokenizer: Any, rows: int) -> Any:
    """Rows of training texts of every kind."""
    from aquila2_tut.data import corpus
    from aquila2_tut.quant import calibration_ids

    pieces = [d.text[:4000] for source in CALIBRATION for d in islice(corpus("train", [source]), 25)]
    Random(0).shuffle(pieces)
    return calibration_ids(tokenizer("\n\n".join(pieces), verbose=False)["input_ids"], rows, 512)


def questions(count: int) -> dict[str, list[tuple[str, list[str], int]]]:
    """Language -> (beginning of a held-out text, four continuations, the right one). The others are of other texts."""
    from aquila2_tut.data import corpus

    found = {}
    for language, sources in SOURCES.items():
        before, after = (60, 24) if language == "chinese" else (200, 80)
        pieces = [d.text for s in sources for d in corpus("held-out", [s]) if len(d.text) > before + after + 40]
        dice = Random(1)
        pieces = dice.sample(pieces, min(count, len(pieces)))
        cuts = [_cut(text, before, language) for text in pieces]
        ends = [text[cut : cut + after] for text, cut in zip(pieces, cuts, strict=True)]
        found[language] = []
        for number, (text, cut) in enumerate(zip(pieces, cuts, strict=True)):
            others = dice.sample([e for i, e in enumerate(ends) if i != number], 3)
            right = dice.randrange(4)
            found[language].append((text[:cut], [*others[:right], ends[number], *others[right:]], right))
    return found


def _cut(text: str, at: int, language: str) -> int:
    """Where a text is cut: before a word."""
    return at if language == "chinese" else text.find(" ", at) if " " in text[at : at + 40] else at


# --- measuring ---


def choice(model: Any, tokenizer: Any, items: list[tuple[str, list[str], int]]) -> dict[str, float]:
    """How often the real continuation needs the fewest bits a byte."""
    import torch
    import torch.nn.functional as F

    from aquila2_tut.evaluate import wilson

    right = 0
    for beginning, ends, answer in items:
        head = tokenizer(beginning, add_special_tokens=False)["input_ids"]
        tails = [tokenizer(end, add_special_tokens=False)["input_ids"] for end in ends]
        width = len(head) + max(map(len, tails))
        ids, labels = torch.zeros(4, width, dtype=torch.long), torch.full((4, width), -100)
        for row, tail in enumerate(tails):
            ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
            labels[row, len(head) : len(head) + len(tail)] = torch.tensor(tail)
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
        costs = losses / torch.tensor([len(end.encode()) for end in ends])
        right += int(costs.argmin()) == answer
    return rounded(wilson(right, len(items)))


def rounded(estimate: Any, digits: int = 4) -> dict[str, float]:
    """An estimate for the file."""
    return {name: round(value, digits) for name, value in estimate._asdict().items()}


def made(name: str, model: Any, rows: Any) -> Any:
    """The model in one format."""
    import torch

    from aquila2_tut.quant import Scheme, quantize_model

    if name in PLAIN:
        return copy.deepcopy(model).to(getattr(torch, PLAIN[name]))
    if name == TENSOR_INT8:
        return per_tensor(copy.deepcopy(model))
    method, bits, double = SCHEMES[name]
    return quantize_model(copy.deepcopy(model), Scheme(method, bits, double_quant=double), rows)


def per_tensor(model: Any) -> Any:
    """Eight bits with one scale for all of a weight and one for all of an input: what outliers break."""
    import torch
    from torch import nn

    from aquila2_tut.quant import dequantize_int8, quantize_int8
    from aquila2_tut.quant.methods import LINEARS

    class OneScale(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight = dequantize_int8(quantize_int8(linear.weight, "tensor"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return dequantize_int8(quantize_int8(x, "tensor")) @ self.weight.t()

    for layer in model.model.layers:
        for name in LINEARS:
            layer.set_submodule(name, OneScale(layer.get_submodule(name)))
    return model


def effects(name: str, sizes: Sizes) -> dict[str, Any]:
    """Everything about one model."""
    from aquila2_tut import AutoLoader
    from aquila2_tut.evaluate import bits_per_byte, difference, interval

    loader = AutoLoader("aquila2", name, device="cpu", torch_dtype="float32", local_files_only=True)
    model, tokenizer = loader.get_model(), loader.get_tokenizer()
    pieces, asked, rows = texts(sizes), questions(sizes.questions), calibration(tokenizer, sizes.rows)
    base, formats = {}, []
    for form in [f for f in (*PLAIN, "int8", TENSOR_INT8, *list(SCHEMES)[1:]) if f not in sizes.leave_out]:
        start, row = time.perf_counter(), {"name": form}
        changed = made(form, model, rows)
        row["seconds"] = round(time.perf_counter() - start)
        for kind, these in pieces.items():
            found = bits_per_byte(changed, tokenizer, these)
            base.setdefault(kind, found)
            row[kind] = rounded(interval(found))
            row[f"{kind}_change"] = rounded(difference(found, base[kind]))
        row["choice"] = {kind: choice(changed, tokenizer, items) for kind, items in asked.items()}
        formats.append(row)
        told(f"{name} {form}: " + ", ".join(f"{kind} {row[kind]['value']:.3f}" for kind in pieces))
    counts = {kind: {"texts": len(t), "bytes": sum(len(x.encode()) for x in t)} for kind, t in pieces.items()}
    counts["choice"] = {kind: len(items) for kind, items in asked.items()}
    found = {"counts": counts, "formats": formats}
    if sizes.layer_rows:
        told(f"{name}: layer by layer")
        found |= {"layers": layer_errors(model, rows[: sizes.layer_rows]), "bits": one_map(model, rows)}
    return found


def layer_errors(model: Any, rows: Any) -> dict[str, Any]:
    """The relative error of each linear map's outputs, each by itself, with the inputs of the float32 model."""
    from aquila2_tut.quant.methods import LINEARS

    found: dict[str, list[list[float]]] = {}
    for layer, seen in with_inputs(model, rows):
        errors = {name: map_errors(layer.get_submodule(name).weight, seen[name], (4, 3)) for name in LINEARS}
        for way in errors[LINEARS[0]]:
            found.setdefault(way, []).append([errors[name][way] for name in LINEARS])
    return {"maps": list(LINEARS), "errors": found}


def with_inputs(model: Any, rows: Any) -> Iterator[tuple[Any, Any]]:
    """Each decoder layer with what its linear maps are given."""
    from aquila2_tut.quant import Scheme
    from aquila2_tut.quant.methods import embedded, look_at_inputs

    hidden, rotary = embedded(model.model.embed_tokens, model.config, Scheme("gptq"), rows)
    for layer in model.model.layers:
        yield layer, look_at_inputs(layer, hidden, rotary)
        hidden = [layer(x, rotary)[0].detach() for x in hidden]


def map_errors(weight: Any, seen: Any, widths: tuple[int, ...]) -> dict[str, float]:
    """Way -> relative error of the outputs (the root of what is lost of their power)."""
    from aquila2_tut.quant import awq, dequantize_nf4, gptq, output_error, quantize_nf4, round_to_nearest
    from aquila2_tut.quant.grid import fitting_group

    group = fitting_group({weight.shape[1]})
    ways = {"nf4": dequantize_nf4(quantize_nf4(weight))}
    for bits in widths:
        ways[f"rtn-{bits}"] = round_to_nearest(weight, bits, group).values()
        ways[f"gptq-{bits}"] = gptq(weight, seen.hessian, bits, group).values()
        ways[f"awq-{bits}"] = awq(weight, seen, bits, group)
    return {way: round(math.sqrt(output_error(weight, q, seen.hessian)), 4) for way, q in ways.items()}


def one_map(model: Any, rows: Any) -> dict[str, Any]:
    """One linear map of a middle layer with every number of bits."""
    at = len(model.model.layers) // 2
    layer, seen = next(islice(with_inputs(model, rows), at, None))
    return {
        "layer": at,
        "map": "mlp.up_proj",
        **map_errors(layer.mlp.up_proj.weight, seen["mlp.up_proj"], (2, 3, 4, 8)),
    }


# --- the report ---


def conditions(sizes: Sizes) -> dict[str, Any]:
    """What the figures depend on."""
    import torch
    import transformers

    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "calibration": f"{sizes.rows} rows of 512 tokens of training texts: {', '.join(CALIBRATION)}",
        "single_maps": f"{sizes.layer_rows} of these rows; groups of 128, or what divides the map's inputs",
        "groups": "of whole models: 128, or the largest power of two below it that divides the inputs of every map",
        "chance": 0.25,
        "intervals": "95 %, by drawing the texts anew; of choices, Wilson's",
    }


def report(name: str, found: dict[str, Any]) -> None:
    """Prints one model's table."""
    kinds = [*SOURCES, "python"]
    print(f"\n{name}: bits per byte and what the format adds to them [95 %]; right choices of four")
    base = found["formats"][0]
    for row in found["formats"]:
        cells = []
        for kind in kinds:
            change, whole = row[f"{kind}_change"], base[kind]["value"]
            part = " ".join(f"{change[end] / whole:+.1%}" for end in ("value", "low", "high"))
            cells.append(f"{row[kind]['value']:.3f} {part}")
        choices = " ".join(f"{row['choice'][kind]['value']:.0%}" for kind in SOURCES)
        print(f"{row['name']:12} " + " | ".join(f"{cell:32}" for cell in cells) + f" | {choices}")


def main() -> None:
    """Measures model after model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    args = parser.parse_args()
    about = " ".join(" ".join(__doc__.split("\n\n")[1:3]).split())
    models = json.loads(RESULT.read_text(encoding="utf-8"))["models"] if args.save and RESULT.is_file() else {}
    for name in args.models:
        sizes = QUICK if args.quick else SIZES.get(name, Sizes())
        models[name] = effects(name, sizes) | {"conditions": conditions(sizes)}
        report(name, models[name])
        if args.save:
            text = json.dumps({"about": about, "models": models}, ensure_ascii=False, indent=1)
            RESULT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
