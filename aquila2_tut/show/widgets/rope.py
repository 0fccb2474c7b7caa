"""The rotation's frequencies: what each scaling does to the wavelength of every pair, and which angles stay unknown."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import traitlets

from aquila2_tut.config import PRESETS, Aquila2Config, resolve_preset_name
from aquila2_tut.model.rope import (
    BETA_FAST,
    BETA_SLOW,
    YARN_SLOPE,
    attention_factor,
    dynamic_factor,
    ntk_theta,
    yarn_kept,
)
from aquila2_tut.show.longcontext_plots import METHOD_NAMES, method_name
from aquila2_tut.show.plots import label

from .base import FOLDER, BookWidget, escape
from .memory import figure

METHODS = tuple(METHOD_NAMES)
LEAST, MOST = 1, 16  # factors that the slider has
CONTROLS = ("model", "method", "factor")


def rope_shape(name: str) -> dict[str, Any]:
    """What the browser needs to know of a model.

    Args:
        name: a key of `PRESETS`.

    Returns:
        theta, D, the trained length in tokens, and the method and factor that the model was released with, if any.
    """
    config = Aquila2Config.preset(name)
    rope = config.rope_parameters
    own = None if rope["rope_type"] == "default" else [rope["rope_type"], rope["factor"]]
    return {
        "name": name,
        "theta": rope["rope_theta"],
        "dim": config.head_dim,
        "trained": config.trained_length,
        "own": own,
    }


def rope_rules() -> dict[str, float]:
    """YaRN's constants and the ends of the slider."""
    return {"fast": BETA_FAST, "slow": BETA_SLOW, "slope": YARN_SLOPE, "least": LEAST, "most": MOST}


def wavelengths(config: Aquila2Config, length: int) -> np.ndarray:
    """The tokens in which each pair makes a whole turn: 2 pi over its inverse frequency.

    The formulas are those of `aquila2_tut.model.rope`, in float64 as in the browser: float32 would round other numbers.

    Args:
        config: gives D, theta and the scaling.
        length: tokens of the text. Only dynamic scaling looks at it.

    Returns:
        (D / 2,) float64, tokens.
    """
    rope, dim = config.rope_parameters, config.head_dim
    theta, factor = rope["rope_theta"], rope.get("factor", 1.0)

    def turns(base: float) -> np.ndarray:
        return 2 * math.pi * base ** (np.arange(0, dim, 2) / dim)

    match rope["rope_type"]:
        case "linear":
            return factor * turns(theta)
        case "ntk":
            return turns(ntk_theta(theta, factor, dim))
        case "dynamic":
            return turns(ntk_theta(theta, dynamic_factor(config, length), dim))
        case "yarn":
            kept = yarn_kept(config).double().numpy()
            return 1 / (kept / turns(theta) + (1 - kept) / (factor * turns(theta)))
        case _:
            return turns(theta)


@dataclass(frozen=True)
class Stretch:
    """A model stretched by a method.

    Args:
        config: of the model, scaled.
        before, after: wavelengths as trained, and in a text of the stretched length; (D / 2,) tokens.
        length: the stretched length, in tokens.
    """

    config: Aquila2Config
    before: np.ndarray
    after: np.ndarray
    length: int

    @property
    def slow(self) -> np.ndarray:
        """Whether each pair makes no whole turn within the trained length; (D / 2,)."""
        return self.before > self.config.trained_length

    @property
    def beyond(self) -> list[int]:
        """For each pair, how many positions turn it to an angle that it never had in training.

        A pair that made a whole turn had every angle. A slow one had those below that of the trained length, which a
        pair s times slower reaches s times later.
        """
        within = self.config.trained_length * self.after / self.before
        known = np.ceil(np.where(self.slow, np.minimum(within, self.length), self.length))
        return [self.length - int(count) for count in known]


def stretch(model: str, method: str, factor: float) -> Stretch:
    """Stretch a model.

    Args:
        model: a key of `PRESETS`, in any letter case; a scaling that it was released with is taken off.
        method: one of `METHODS`.
        factor: the stretched length over the trained one.

    Raises:
        ConfigError: no such model or method, or a factor below 1.
    """
    plain = Aquila2Config.preset(model).stretched("default", factor)
    scaled = plain.stretched("default" if method == "none" else method, factor)
    length = int(plain.trained_length * factor)
    return Stretch(scaled, wavelengths(plain, length), wavelengths(scaled, length), length)


class RopeScalings(BookWidget):
    """See `rope_scalings`."""

    widget = "rope_scalings"
    state = ("models", "rules", "words", *CONTROLS)

    models = traitlets.List().tag(sync=True)
    rules = traitlets.Dict().tag(sync=True)
    words = traitlets.Dict().tag(sync=True)
    model = traitlets.Enum(tuple(PRESETS)).tag(sync=True)
    method = traitlets.Enum(METHODS).tag(sync=True)
    factor = traitlets.Float(min=LEAST, max=MOST).tag(sync=True)

    def __init__(self, **choices: Any) -> None:
        shapes = [rope_shape(name) for name in PRESETS]
        super().__init__(models=shapes, rules=rope_rules(), words=_words(), **choices)

    def values(self) -> dict[str, str]:
        """What the texts have gaps for."""
        found = stretch(self.model, self.method, self.factor)
        sharper = attention_factor(found.config) ** 2
        return {
            "model": self.model,
            "method": self.words["methods"][self.method],
            "factor": f"{math.floor(100 * self.factor + 0.5) / 100:g}",
            "pairs": str(len(found.before)),
            "slow": str(found.slow.sum()),
            "trained": f"{found.config.trained_length:,}",
            "length": f"{found.length:,}",
            "beyond": f"{max(found.beyond):,}",
            "temperature": figure(1 / sharper),
            "sharper": figure(sharper),
        }

    def summary(self) -> str:
        """How many pairs are slow, at how many positions their angles are unknown, and YaRN's temperature."""
        values = self.values()
        said = ["slow", "within" if values["beyond"] == "0" else "beyond"]
        said += ["temperature"] if self.method == "yarn" else []
        return self.words["gap"].join(self.words[name].format(**values) for name in said)

    def first_look(self) -> str:
        """The sentence, and the figures of each pair; the picture is drawn by the browser."""
        found = stretch(self.model, self.method, self.factor)
        heads = "".join(f'<th scope="col">{escape(word)}</th>' for word in self.words["columns"])
        pairs = enumerate(zip(found.before, found.after, found.beyond, strict=True))
        rows = "".join(
            f'<tr><th scope="row">{pair}</th><td>{figure(before)}</td><td>{figure(after)}</td><td>{beyond:,}</td></tr>'
            for pair, (before, after, beyond) in pairs
        )
        note = escape(self.words["dynamic"].format(**self.values())) if self.method == "dynamic" else ""
        return (
            f'<output class="summary">{escape(self.summary())}</output><p class="note">{note}</p>'
            f"<details><summary>{escape(self.words['table'])}</summary>"
            f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></details>"
        )

    def title(self) -> str:
        """The sentence."""
        return self.summary()


def rope_scalings(model: str = "Aquila2-7B", method: str | None = None, factor: float | None = None) -> RopeScalings:
    """Show what a scaling of the rotation does to the wavelength of each pair; the reader can choose otherwise.

    Args:
        model: a key of `PRESETS`, in any letter case.
        method: one of `METHODS`; by default that which the model was released with, or else "linear".
        factor: by how much the length grows, from 1 to 16; by default that which the model was released with, or 8.

    Raises:
        ConfigError: no such model.
        traitlets.TraitError: no such method, or a factor outside the slider.
    """
    name = resolve_preset_name(model)
    own = rope_shape(name)["own"] or ("linear", 8.0)
    return RopeScalings(model=name, method=method or own[0], factor=own[1] if factor is None else factor)


def _words() -> dict[str, Any]:
    """What the widget says, in the language of the page."""
    words = json.loads((FOLDER / "rope_scalings.json").read_text(encoding="utf-8"))[label("en", "zh")]
    return words | {"gap": label(" ", ""), "methods": {name: method_name(name) for name in METHODS}}
