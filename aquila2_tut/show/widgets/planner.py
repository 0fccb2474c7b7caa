"""The quantization planner: what a model takes in a format, term by term, and which cards hold it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import traitlets

from aquila2_tut.config import PRESETS, Aquila2Config, resolve_preset_name
from aquila2_tut.memory import GPUS
from aquila2_tut.quant import FORMATS, cache_bytes, predicted_bytes
from aquila2_tut.quant.sizes import KEPT, linear_shapes
from aquila2_tut.show.plots import label

from .base import BookWidget, escape

GB = 10**9
PLANNED = tuple(name for name in FORMATS if name not in ("int4-cpu", "gguf"))  # these two are for CPUs, not for cards
RESERVE = 1.0  # GB: assumed for a CUDA context and the activations of a short prompt; the reader can change it


def model_facts(name: str) -> dict[str, Any]:
    """What the browser needs to know of a model.

    Args:
        name: a key of `PRESETS`.
    """
    config = Aquila2Config.preset(name)
    return {
        "name": name,
        "layers": config.num_hidden_layers,
        "shapes": linear_shapes(config),
        "vocab": config.vocab_size,
        "width": config.hidden_size,
        "tied": config.tie_word_embeddings,
        "heads": [config.num_attention_heads, config.num_key_value_heads],
        "cache": cache_bytes(config, 1),
    }


def amount(count: float, base: int = 1000) -> str:
    """Bytes in the largest unit that leaves a number of at least one: GB, MB and kB, or GiB, MiB and KiB.

    Args:
        count: bytes.
        base: 1000 or 1024.
    """
    names = ("GB", "MB", "kB") if base == 1000 else ("GiB", "MiB", "KiB")
    power = next((p for p in (3, 2) if abs(count) >= base**p), 1)
    hundredths = math.floor(100 * count / base**power + 0.5)  # ties go up, as in the browser
    return f"{hundredths / 100:,.2f} {names[3 - power]}"


class QuantPlanner(BookWidget):
    """See `quant_planner`."""

    widget = "quant_planner"
    state = ("models", "formats", "gpus", "words", "model", "format", "keep", "tokens", "reserve")

    models = traitlets.List().tag(sync=True)
    formats = traitlets.Dict().tag(sync=True)
    gpus = traitlets.List().tag(sync=True)
    words = traitlets.Dict().tag(sync=True)
    model = traitlets.Enum(tuple(PRESETS)).tag(sync=True)
    format = traitlets.Enum(PLANNED).tag(sync=True)
    keep = traitlets.List(traitlets.Enum(KEPT)).tag(sync=True)
    tokens = traitlets.Int(min=0).tag(sync=True)
    reserve = traitlets.Float(RESERVE, min=0).tag(sync=True)  # GB

    def __init__(self, **choices: Any) -> None:
        super().__init__(
            models=[model_facts(name) for name in PRESETS],
            formats={name: asdict(FORMATS[name]) for name in PLANNED},
            gpus=[[gpu.name, gpu.usable] for gpu in GPUS.values()],
            words=_words(),
            **choices,
        )

    def terms(self) -> dict[str, float]:
        """Everything that lies in memory, by name, in bytes."""
        config = Aquila2Config.preset(self.model)
        weights = predicted_bytes(config, self.format, self.keep).terms
        return weights | {"cache": cache_bytes(config, self.tokens), "reserve": round(self.reserve * GB)}

    def summary(self) -> str:
        """Weights and everything, in a sentence."""
        terms = self.terms()
        all_, weights = sum(terms.values()), sum(terms.values()) - terms["cache"] - terms["reserve"]
        values = {"weights": weights, "total": all_}
        texts = {key: f"{amount(count)} ({amount(count, 1024)})" for key, count in values.items()}
        return self.words["summary"].format(model=self.model, format=self.words["formats"][self.format], **texts)

    def fits(self, usable: int) -> str:
        """How a card copes: the tokens that it has room for, or what it lacks.

        Args:
            usable: bytes that a program sees of its memory.
        """
        terms = self.terms()
        total = sum(terms.values())
        if total > usable:
            return "✗ " + self.words["lacks"].format(amount=amount(total - usable))
        room = (usable - total + terms["cache"]) // cache_bytes(Aquila2Config.preset(self.model), 1)
        return "✓ " + self.words["holds"].format(tokens=f"{int(room):,}")

    def first_look(self) -> str:
        """The sentence, the bar, its terms and the cards."""
        terms = {name: count for name, count in self.terms().items() if count}
        bar = "".join(f'<span class="{name}" style="flex-grow: {count}"></span>' for name, count in terms.items())
        rows = "".join(self._term_row(name, count) for name, count in terms.items())
        cards = "".join(self._card_row(name, usable) for name, usable in self.gpus)
        heads = "".join(f'<th scope="col">{escape(word)}</th>' for word in self.words["columns"])
        return (
            f'<p class="summary">{escape(self.summary())}</p><div class="bar" aria-hidden="true">{bar}</div>'
            f'<table class="terms"><tbody>{rows}</tbody></table>'
            f'<table class="cards"><thead><tr>{heads}</tr></thead><tbody>{cards}</tbody></table>'
        )

    def _term_row(self, name: str, count: float) -> str:
        cells = "".join(f"<td>{amount(count, base)}</td>" for base in (1000, 1024))
        word = self.words["terms"][name].format(tokens=f"{self.tokens:,}")
        return f'<tr><th scope="row"><i class="key {name}"></i>{escape(word)}</th>{cells}</tr>'

    def _card_row(self, name: str, usable: int) -> str:
        share = min(100, 100 * sum(self.terms().values()) / usable)
        fits = escape(self.fits(usable))
        fill = f'<td class="fill"><div style="width: {share:.1f}%"></div></td>'
        kind = "fits" if fits.startswith("✓") else "lacks"
        return (
            f'<tr class="{kind}"><th scope="row">{name}</th><td>{amount(usable, 1024)}</td>{fill}<td>{fits}</td></tr>'
        )

    def title(self) -> str:
        """The sentence."""
        return self.summary()


def quant_planner(
    model: str = "AquilaChat2-34B", format: str = "nf4-dq", keep: Sequence[str] = KEPT, tokens: int = 4096
) -> QuantPlanner:
    """Show what a model takes in a format, and which cards hold it; the reader can choose others.

    Args:
        model: a key of `PRESETS`, in any letter case.
        format: one of `PLANNED`.
        keep: which of the embedding and the head stay as they are.
        tokens: of the conversation, whose keys and values lie in a cache of two bytes a number.

    Raises:
        ConfigError: no such model.
        traitlets.TraitError: no such format, or something else to keep.
    """
    return QuantPlanner(model=resolve_preset_name(model), format=format, keep=list(keep), tokens=tokens)


def _words() -> dict[str, Any]:
    """What the planner says, in the language of the page."""
    return {
        "model": label("Model", "模型"),
        "format": label("Format", "格式"),
        "keep": label("Left as they are", "保持原样"),
        "embed_tokens": label("embedding", "嵌入"),
        "lm_head": label("head", "输出层"),
        "tokens": label("Tokens in the cache", "KV 缓存的词元数"),
        "reserve": label("Reserve in GB (CUDA context, activations)", "预留 GB 数（CUDA 上下文与激活值）"),
        "summary": label(
            "{model}, {format}: {weights} of weights; {total} with cache and reserve.",
            "{model}，{format}：权重占 {weights}；加上缓存和预留，共 {total}。",
        ),
        "cache": label(
            "{queries} query heads, {keys} key-value heads: {each} of cache a token.",
            "{queries} 个查询头，{keys} 个键值头：每个词元的缓存占 {each}。",
        ),
        "tied": label(
            "Embedding and head are one matrix in this model. Once either is quantized they are two: "
            "a quantized head alone costs extra.",
            "这个模型的嵌入和输出层是同一个矩阵。只要量化其中之一，它就变成两个矩阵：单独量化输出层，反而多占显存。",
        ),
        "columns": [
            label("Card", "显卡"),
            label("Usable", "可用显存"),
            label("Filled", "占用"),
            label("Holds it?", "装得下吗？"),
        ],
        "holds": label("up to {tokens} tokens", "最多 {tokens} 个词元"),
        "lacks": label("lacks {amount}", "还差 {amount}"),
        "terms": _term_words(),
        "formats": _format_words(),
    }


def _term_words() -> dict[str, str]:
    return {
        "codes": label("codes of the layers' weights", "各层权重的编码"),
        "scales": label("scales", "缩放系数"),
        "zeros": label("zero points", "零点"),
        "tables": label("tables", "查找表与索引"),
        "embedding": label("embedding", "嵌入"),
        "head": label("head", "输出层"),
        "norms": label("norms", "归一化"),
        "cache": label("cache of {tokens} tokens", "{tokens} 个词元的 KV 缓存"),
        "reserve": label("reserve", "预留"),
    }


def _format_words() -> dict[str, str]:
    return {
        "fp32": label("32-bit numbers (fp32)", "32 位浮点数（fp32）"),
        "bf16": label("16-bit numbers (bf16)", "16 位浮点数（bf16）"),
        "int8": "int8 (bitsandbytes)",
        "nf4": "NF4 (bitsandbytes)",
        "nf4-dq": label("NF4, double quantization (bitsandbytes)", "NF4，双重量化（bitsandbytes）"),
        "gptq-8": label("GPTQ, 8 bits", "GPTQ，8 位"),
        "gptq-4": label("GPTQ, 4 bits", "GPTQ，4 位"),
        "gptq-3": label("GPTQ, 3 bits", "GPTQ，3 位"),
        "awq-4": label("AWQ, 4 bits", "AWQ，4 位"),
        "torchao-int8": "int8 (torchao)",
        "torchao-int4": "int4 (torchao)",
    }
