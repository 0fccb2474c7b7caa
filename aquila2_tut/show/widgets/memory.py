"""The memory planner: what a step of training takes of a card, term by term, and how long it lasts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import traitlets

from aquila2_tut.config import PRESETS, Aquila2Config
from aquila2_tut.memory import GPUS, RehearsalError
from aquila2_tut.memory.formula import MAPS, Formula, Sizes, formula_of
from aquila2_tut.memory.pace import NF4, PLACES, UPDATE, Pace, pace_of
from aquila2_tut.memory.rehearse import EFFICIENCY
from aquila2_tut.memory.setting import LOSSES, OPTIMIZERS, RECIPES, STRATEGIES, Setting, setting
from aquila2_tut.memory.unseen import CUDA_CONTEXT, NCCL, ZERO3_LIVE, ZERO_BUCKET, ZERO_BUCKETS, cublas_bytes
from aquila2_tut.quant import predicted_bytes
from aquila2_tut.quant.sizes import linear_shapes
from aquila2_tut.show.plots import label
from aquila2_tut.train.loss import FEW_TOKENS, GPU_CHUNK
from aquila2_tut.train.tuning import METHODS, PRECISIONS

from .base import FOLDER, BookWidget, escape
from .planner import amount

TARGETS = ("q_proj v_proj", "q_proj k_proj v_proj o_proj", "all-linear")
CONTROLS = ("model", "method", "batch_size", "seq_len", "r", "targets", "loss", "optimizer", "checkpointing")
CONTROLS += ("gpu", "gpus", "strategy")
_BFLOAT16_FROM = (8, 0)  # compute capability


def model_shape(name: str) -> dict[str, Any]:
    """What the browser needs to know of a model.

    Args:
        name: a key of `PRESETS`.
    """
    config, stored = Aquila2Config.preset(name), predicted_bytes(Aquila2Config.preset(name), "nf4-dq")
    sizes = Sizes(Setting(model=name))
    return {
        "name": name,
        "layers": sizes.layers,
        "width": sizes.width,
        "ffn": sizes.ffn,
        "queries": sizes.queries,
        "keys": sizes.keys,
        "heads": config.num_attention_heads,
        "vocab": config.vocab_size,
        "tied": config.tie_word_embeddings,
        "context": config.context_length,
        "parameters": config.parameter_count,
        "maps": [[name, *shape] for name, shape in zip(MAPS, linear_shapes(config), strict=True)],
        "nf4": stored.total,
        "nf4Kept": stored.embedding + stored.head + stored.norms,
    }


def cards() -> list[dict[str, Any]]:
    """What the browser needs to know of cards."""
    return [
        {
            "name": name,
            "usable": card.usable,
            "flops": card.flops,
            "bandwidth": card.bandwidth,
            "cublas": cublas_bytes(Setting(gpu=name)),
            "half": card.capability < _BFLOAT16_FROM,
        }
        for name, card in GPUS.items()
    ]


def rules() -> dict[str, Any]:
    """The constants of bytes and time, each from the module that has its source."""
    return {
        "itemsize": {name: dtype.itemsize for name, dtype in PRECISIONS.items()},
        "context": CUDA_CONTEXT,
        "nccl": NCCL,
        "zeroBuckets": ZERO_BUCKETS * ZERO_BUCKET,
        "zero3Live": ZERO3_LIVE,
        "chunk": GPU_CHUNK,
        "fewTokens": FEW_TOKENS,
        "efficiency": EFFICIENCY,
        "nf4": NF4,
        "update": UPDATE,
        "places": PLACES,
    }


def recipes() -> dict[str, dict[str, dict[str, Any]]]:
    """Recipe -> method -> the fields of a setting that no control chooses, and those that a recipe decides first."""
    chosen = ("model", "method", "batch_size", "seq_len", "gpu", "r", "targets")
    found = {recipe: {method: asdict(setting(recipe, method=method)) for method in METHODS} for recipe in RECIPES}
    for of_recipe in found.values():
        for fields in of_recipe.values():
            for name in chosen:
                del fields[name]
    return found


def figure(value: float) -> str:
    """Three digits that count, or a whole number."""
    places = next((at for at, bound in enumerate((100, 10, 1, 0.1, 0.01)) if value >= bound), 5)
    return f"{math.floor(value * 10**places + 0.5) / 10**places:,.{places}f}"  # ties go up, as in the browser


class MemoryPlanner(BookWidget):
    """See `memory_planner`."""

    widget = "memory_planner"
    state = ("models", "cards", "rules", "recipes", "words", "recipe", *CONTROLS, "price")

    models = traitlets.List().tag(sync=True)
    cards = traitlets.List().tag(sync=True)
    rules = traitlets.Dict().tag(sync=True)
    recipes = traitlets.Dict().tag(sync=True)
    words = traitlets.Dict().tag(sync=True)
    recipe = traitlets.Enum(tuple(RECIPES)).tag(sync=True)
    model = traitlets.Enum(tuple(PRESETS)).tag(sync=True)
    method = traitlets.Enum(METHODS).tag(sync=True)
    batch_size = traitlets.Int(min=1).tag(sync=True)
    seq_len = traitlets.Int(min=1).tag(sync=True)
    r = traitlets.Int(min=1).tag(sync=True)
    targets = traitlets.Enum(TARGETS).tag(sync=True)
    loss = traitlets.Enum(LOSSES).tag(sync=True)
    optimizer = traitlets.Enum(OPTIMIZERS).tag(sync=True)
    checkpointing = traitlets.Bool().tag(sync=True)
    gpu = traitlets.Enum(tuple(GPUS)).tag(sync=True)
    gpus = traitlets.Int(min=1).tag(sync=True)
    strategy = traitlets.Enum(STRATEGIES).tag(sync=True)
    price = traitlets.Float(min=0).tag(sync=True)  # of a card and hour; 0: not said

    def __init__(self, **choices: Any) -> None:
        super().__init__(
            models=[model_shape(name) for name in PRESETS],
            cards=cards(),
            rules=rules(),
            recipes=recipes(),
            words=_words(),
            **choices,
        )

    @property
    def wanted(self) -> Setting:
        """What is chosen.

        Raises:
            RehearsalError: it makes no sense.
        """
        fields = {name: getattr(self, name) for name in CONTROLS}
        return setting(self.recipe, **{**fields, "targets": tuple(self.targets.split())})

    def summary(self) -> str:
        """Bytes, when they are needed, and whether the card has them."""
        wanted, words = self.wanted, self.words
        found = formula_of(wanted)
        left = wanted.card.usable - found.peak_bytes
        values = {
            "model": self.model,
            "method": words["options"]["method"][self.method],
            "rows": f"{self.batch_size:,}",
            "length": f"{self.seq_len:,}",
            "gpu": self.gpu,
            "total": _both_units(found.peak_bytes),
            "usable": _both_units(wanted.card.usable),
            "moment": words["moments"][found.moment],
            "verdict": words["fits" if left >= 0 else "lacks"].format(amount=amount(abs(left))),
        }
        return words["summary"].format(**values)

    def pace_rows(self) -> list[tuple[str, str]]:
        """What is told of time: in words, and how much."""
        found = pace_of(self.wanted)
        cost = figure(found.cost_per_million(self.price)) if self.price else self.words["unpriced"]
        rows = {
            "step": f"{figure(found.seconds_per_step)} s",
            "speed": figure(found.tokens_per_second),
            "together": figure(found.tokens_per_second * self.gpus),
            "flops": f"{figure(found.flops / 1e12)} TFLOP",
            "cost": cost,
        }
        return [(self.words["pace"][name], text) for name, text in rows.items() if name != "together" or self.gpus > 1]

    def notes(self, fits: bool) -> list[str]:
        """What must be said beside the figures."""
        words, wanted = self.words["notes"], self.wanted
        half = wanted.card.capability < _BFLOAT16_FROM and wanted.precision == "bfloat16"
        said = {"time": True, "several": self.gpus > 1, "half": half, "lacks": not fits}
        values = {"efficiency": f"{100 * EFFICIENCY:.0f}%", "gpu": self.gpu}
        return [words[name].format(**values) for name, is_so in said.items() if is_so]

    def first_look(self) -> str:
        """The sentence, the bar, its terms, and the time."""
        memory, pace = formula_of(self.wanted), pace_of(self.wanted)
        rows = "".join(f'<tr><th scope="row">{word}</th><td>{text}</td></tr>' for word, text in self.pace_rows())
        notes = "".join(f"<p>{escape(text)}</p>" for text in self.notes(memory.fits))
        return (
            f'<output class="summary">{escape(self.summary())}</output>{self._bar(memory)}'
            f"{_table('terms', self.words['memory'], self._term_rows(memory))}"
            f'{_table("pace", self.words["time"], rows)}<div class="notes">{notes}</div>'
            f"<details><summary>{self.words['shares']}</summary>"
            f"{_table('kinds', self.words['shares'], self._kind_rows(pace))}</details>"
        )

    def _bar(self, found: Formula) -> str:
        usable, peak = found.setting.card.usable, found.peak_bytes
        parts = {**found.terms, "free": usable - peak}
        spans = "".join(
            f'<span class="{name.replace(" ", "-")}" style="flex-grow: {count}"></span>'
            for name, count in parts.items()
            if count > 0
        )
        end = f'<b style="left: {100 * usable / peak:.2f}%"></b>' if usable < peak else ""
        return f'<div class="bar" aria-hidden="true">{spans}{end}</div>'

    def _term_rows(self, found: Formula) -> str:
        return "".join(self._term_row(name, count) for name, count in found.terms.items() if count)

    def _term_row(self, name: str, count: int) -> str:
        word, why = self.words["terms"][name]
        cells = "".join(f"<td>{amount(count, base)}</td>" for base in (1000, 1024))
        key = f'<i class="key {name.replace(" ", "-")}"></i>'
        return f'<tr><th scope="row">{key}{escape(word)}<span class="why">{escape(why)}</span></th>{cells}</tr>'

    def _kind_rows(self, found: Pace) -> str:
        shares = {kind: _percent(part / found.least_seconds) for kind, part in found.seconds.items() if part}
        kinds = self.words["kinds"]
        return "".join(
            f'<tr><th scope="row">{kinds[kind]}</th><td>{share}%</td></tr>' for kind, share in shares.items()
        )

    def title(self) -> str:
        """The sentence."""
        return self.summary()


def memory_planner(
    model: str = "AquilaChat2-7B",
    method: str = "qlora",
    batch_size: int = 4,
    seq_len: int = 2048,
    gpu: str = "A100-80G",
    recipe: str = "default",
    price: float = 0.0,
    **changes: Any,
) -> MemoryPlanner:
    """Show what a step of training takes of a card, and how long it lasts; the reader can choose otherwise.

    Args:
        model: a key of `PRESETS`, in any letter case.
        method, batch_size, seq_len, gpu, recipe: as in `rehearse`.
        price: of an hour of one card, in any currency; 0 for the reader to say.
        changes: any other of `CONTROLS`, as in `Setting`; targets are one of `TARGETS`.

    Raises:
        RehearsalError: a setting that makes no sense, or one that the planner has no control for.
        traitlets.TraitError: a price below 0, or targets that are not among `TARGETS`.
    """
    if strange := [name for name in changes if name not in CONTROLS]:
        raise RehearsalError(f"{strange[0]}: the planner has no such control; it has {', '.join(CONTROLS)}")
    if "targets" in changes:
        changes["targets"] = tuple(changes["targets"].split())
    fields = {"model": model, "method": method, "batch_size": batch_size, "seq_len": seq_len, "gpu": gpu}
    wanted = setting(recipe, **fields, **changes)
    chosen = {name: getattr(wanted, name) for name in CONTROLS}
    return MemoryPlanner(recipe=recipe, price=price, **{**chosen, "targets": " ".join(wanted.targets)})


def _both_units(count: int) -> str:
    return f"{amount(count)} ({amount(count, 1024)})"


def _percent(share: float) -> str:
    return f"{math.floor(1000 * share + 0.5) / 10:.1f}"


def _table(kind: str, caption: str, rows: str) -> str:
    return f'<table class="{kind}"><caption>{escape(caption)}</caption><tbody>{rows}</tbody></table>'


def _words() -> dict[str, Any]:
    """What the planner says, in the language of the page."""
    return json.loads((FOLDER / "memory_planner.json").read_text(encoding="utf-8"))[label("en", "zh")]
