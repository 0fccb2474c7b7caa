"""A run before it begins: what would be trained, from what, in how many steps and how much memory. Writes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from ..chat.templates import TemplateError, template_for_model
from ..config import Aquila2Config, ConfigError, resolve_preset_name
from ..data.packing import collate
from ..model import Aquila2ForCausalLM
from ..tokenizer import load_tokenizer
from .errors import TrainError
from .finetuning import WORDS, Opener, as_recipe, check_model, choose_template, open_base, tunable
from .tuning import Tuning, world_size
from .tuning_data import TuningData, show_batch, tuning_data


@dataclass(frozen=True)
class TuningMemory:
    """What a process needs, in bytes, from a closed form.

    Attributes:
        weights: of the base model.
        trained: what is trained beside them, its gradients and the state of the optimizer.
        activations: what else there is when most is needed.
    """

    weights: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.weights + self.trained + self.activations


Need = Callable[[Tuning, Aquila2Config, int], TuningMemory]  # from a recipe, a base model and the parameters trained


def dry_run(
    recipe: Tuning | str, opener: Opener, need: Need, language: str = "en", available: int | None = None
) -> list[str]:
    """Checks data, model and memory, and tells what a run would do.

    Args:
        recipe: see `finetune`.
        opener: see `finetune`.
        need: `aquila2_tut.memory.formula.tuning_memory`, which a room above cannot import.
        language: "en" or "zh".
        available: bytes of memory that are there, if that is known.

    Returns:
        Lines to print.

    Raises:
        TrainError, DataError, LoaderError: what `finetune` would raise before its first step.
    """
    recipe, words = as_recipe(recipe), WORDS[language]
    config, tokenizer, name, here = _base(recipe, opener)
    template = choose_template(recipe, name)
    check_model(recipe, config)
    data = tuning_data(recipe, tokenizer, template)
    trainable = trainable_parameters(recipe, config, name)
    share, total = trainable / config.parameter_count, config.parameter_count
    return [
        words["model"].format(name=name, parameters=total, method=recipe.method, trainable=trainable, share=share),
        *([] if here else [words["absent"].format(name=name)]),
        _template_line(template.name, name, words),
        *_data_lines(recipe, data, words),
        *_memory_lines(need(recipe, config, trainable), words, available),
        words["sample"],
        *show_batch(collate(data.train[:1], 0), tokenizer, colour=False),
        words["nothing"],
    ]


def _base(recipe: Tuning, opener: Opener) -> tuple[Aquila2Config, PreTrainedTokenizerBase, str, bool]:
    """The base model's shape, tokenizer and name, and whether it is on this machine: a dry run downloads no weights."""
    loader = open_base(recipe, partial(opener, local_files_only=True))
    try:
        return loader.config, loader.get_tokenizer(), loader.name or str(loader.path), True
    except RuntimeError:  # the loader's, of a model that it did not find
        name = recipe.base.rpartition("/")[2]
        try:
            name = resolve_preset_name(name)
        except ConfigError:
            raise TrainError(f"base: there is no model {recipe.base} on this machine") from None
        return Aquila2Config.preset(name), load_tokenizer(name), name, False


def trainable_parameters(recipe: Tuning, config: Aquila2Config, name: str) -> int:
    """How many parameters a method trains, counted in a model without values."""
    with torch.device("meta"), no_init_weights():
        bare = Aquila2ForCausalLM(config)
        bare.tie_weights()
        model = tunable(recipe, bare, name)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _template_line(template: str, name: str, words: Mapping[str, str]) -> str:
    """A model that is trained in one format and asked in another answers badly."""
    try:
        own = template_for_model(name).name
    except TemplateError:
        own = template
    return words["template" if own == template else "other_template"].format(template=template, own=own, name=name)


def _data_lines(recipe: Tuning, data: TuningData, words: Mapping[str, str]) -> list[str]:
    rows, processes, at_once = len(data.train), world_size(), recipe.rows_a_step
    steps = recipe.steps or math.ceil(recipe.epochs * math.ceil(rows / at_once))
    lines = [
        words["data"].format(
            train=data.samples[0],
            held_out=data.samples[1],
            rows=rows,
            tokens=data.tokens,
            learned=data.learned,
            share=data.learned / data.tokens,
        )
    ]
    if data.cut or data.lost:
        lines.append(words["cut"].format(cut=data.cut, lost=data.lost, length=recipe.length))
    batch = {"batch": recipe.batch_size, "accumulation": recipe.accumulation, "processes": processes}
    return [*lines, words["steps"].format(steps=steps, rows=at_once, **batch)]


def _memory_lines(need: TuningMemory, words: Mapping[str, str], available: int | None) -> list[str]:
    terms = {name: f"{size / 1e9:.2f} GB" for name, size in {**vars(need), "total": need.total}.items()}
    lines = [words["memory"].format(**terms)]
    if available is not None:
        enough = "available" if need.total <= available else "short"
        lines.append(words[enough].format(available=f"{available / 1e9:.1f} GB"))
    return lines
