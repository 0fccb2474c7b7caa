"""Fine-tuning on conversations: all weights, LoRA or Q-LoRA, from one recipe. The command `aquila2-tut finetune`.

The loop is transformers', the adapters are peft's, the four bits are bitsandbytes'. A run may be killed at any moment
and is simply given again: it goes on with the same bits, or, with another number of processes, with the same rows.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..chat.templates import Template, get_template, template_for_model
from ..config import Aquila2Config
from ..model import Aquila2ForCausalLM
from .checkpoints import written_whole
from .errors import TrainError
from .lora import linears
from .pretrain import write_log
from .recipe import claim, load_recipe, refuse_faults
from .tuner import Tuner
from .tuning import SHARED_OUT, Tuning, world_size
from .tuning_data import data_files, tuning_data

WORDS: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))


class Loader(Protocol):
    """What an `aquila2_tut.AutoLoader` has to give."""

    path: Path
    config: Aquila2Config
    name: str | None

    def get_model(self) -> Aquila2ForCausalLM:
        """The model."""

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""


Opener = Callable[..., Loader]


def finetune(recipe: Tuning | str | Path, folder: str | Path, opener: Opener, language: str = "en") -> Path:
    """Fine-tunes a model, or goes on where an earlier call with the same folder was stopped.

    Args:
        recipe: how it goes; or the name or file of a recipe.
        folder: gets `checkpoint-...`, `logs` if asked for, and at the end `adapter`, or `model` where all weights are
            trained.
        opener: `aquila2_tut.AutoLoader`, which finds the base model.
        language: of what is printed, "en" or "zh".

    Returns:
        The folder of the adapter, for peft or `AutoLoader(lora_dir=...)`; or that of the model, for `AutoLoader`.

    Raises:
        TrainError: a recipe that makes no sense, a folder of another recipe, a loss that is no number, a full disk.
        DataError: a sample that is wrong, with its file and line.
        LoaderError: there is no such base model.
    """
    recipe, folder = as_recipe(recipe), Path(folder)
    data_files(recipe)  # before a base model of many gigabytes is fetched
    loader = open_base(recipe, opener)
    template, tokenizer = choose_template(recipe, loader.name), loader.get_tokenizer()
    check_model(recipe, loader.config)
    data = tuning_data(recipe, tokenizer, template)
    if os.environ.get("RANK", "0") == "0":
        claim(folder, recipe, SHARED_OUT, data=data.fingerprint, rows_a_step=recipe.rows_a_step)
    target = folder / ("model" if recipe.method == "full" else "adapter")
    if target.is_dir():
        return target
    model = tunable(recipe, loader.get_model(), loader.name or str(loader.path))
    tuner = Tuner(model, recipe, data, tokenizer, template, folder, WORDS[language])
    tuner.resume_or_train()
    return _keep(tuner, recipe, target)


def as_recipe(recipe: Tuning | str | Path) -> Tuning:
    """A recipe that makes sense, read if it is not there yet."""
    if not isinstance(recipe, Tuning):
        return load_recipe(Tuning, recipe)
    refuse_faults(recipe)
    return recipe


def open_base(recipe: Tuning, opener: Opener) -> Loader:
    """The base model as a method needs it: float32 where all weights learn, else the type of the products, or NF4."""
    return opener(
        "aquila2",
        model_name=recipe.base,
        model_dir=recipe.model_dir or None,
        quantization_config="nf4" if recipe.method == "qlora" else None,
        device=_device(recipe),
        torch_dtype=torch.float32 if recipe.method == "full" else recipe.dtype,
    )


def _device(recipe: Tuning) -> str:
    """Where this process loads the weights; where they are sharded, that is done from the CPU."""
    if not torch.cuda.is_available() or recipe.sharding in ("zero3", "fsdp2"):
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def choose_template(recipe: Tuning, name: str | None) -> Template:
    """The template of a recipe, or of the model.

    Raises:
        TemplateError: no such template, or a model that has none.
    """
    return get_template(recipe.template) if recipe.template else template_for_model(name or recipe.base)


def check_model(recipe: Tuning, config: Aquila2Config) -> None:
    """Refuses rows longer than what the positions were made for, and parts that cannot be split as the recipe wants.

    Raises:
        TrainError: they are.
    """
    if recipe.length > config.context_length:
        raise TrainError(
            f"length: {recipe.length} tokens, and the context of {recipe.base} holds {config.context_length}: "
            "a shorter row, or rope_parameters in its config.json that stretch them"
        )
    if recipe.also_train and recipe.sharding == "fsdp2" and config.tie_word_embeddings:
        raise TrainError(
            f"also_train: {recipe.base} shares its embedding with its head, which fsdp2 cannot split: zero2"
        )


def tunable(recipe: Tuning, model: Aquila2ForCausalLM, name: str) -> nn.Module:
    """A model of which that is trainable, and in float32, which a method trains.

    Args:
        recipe: names the method.
        model: changed in place.
        name: of the model, for the adapter to remember.

    Raises:
        TrainError: there are no such maps, or peft is missing.
    """
    if recipe.gradient_checkpointing:
        recompute_layers(model)
    if recipe.method == "full":
        return model.train()
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise TrainError("adapters need peft: pip install 'aquila2-tut[train]'") from None
    _check_targets(recipe, linears(model))
    keep_four_bits(model)
    if recipe.gradient_checkpointing:
        model.enable_input_require_grads()  # without a gradient to pass on, the first layer would not be run again
    torch.manual_seed(recipe.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls something in transformers by its old name
        wrapped = get_peft_model(model, LoraConfig(**_lora_options(recipe)))
    wrapped.peft_config["default"].base_model_name_or_path = name
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped.train()


def recompute_layers(model: Aquila2ForCausalLM) -> None:
    """Lets a model compute what lies between its layers a second time, for the gradients, rather than keep it."""
    # The old name is that of transformers 5.0.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def keep_four_bits(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew for a CPU whenever a model is evaluated.

    That rounds their scales to bfloat16 for good, so an evaluation would change the model that is being trained beside.

    Source: bitsandbytes 0.50, `_convert_weight_packed_for_cpu` in functional.py.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _lora_options(recipe: Tuning) -> dict[str, Any]:
    return {
        "task_type": "CAUSAL_LM",
        "r": recipe.r,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "target_modules": "all-linear" if recipe.targets == ("all-linear",) else list(recipe.targets),
        "modules_to_save": list(recipe.also_train) or None,
        "use_rslora": recipe.rslora,
        "use_dora": recipe.dora,
    }


def _check_targets(recipe: Tuning, names: Iterable[str]) -> None:
    names = list(names)
    for target in recipe.targets:
        if target != "all-linear" and not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise TrainError(
                f"targets: {recipe.base} has no linear map {target!r}; it has {', '.join(known)}, all-linear"
            )


def _keep(tuner: Tuner, recipe: Tuning, target: Path) -> Path:
    """Writes what was learned, whole or not at all, with the tokenizer and the log; sharded weights are gathered."""
    main = tuner.args.should_save
    tuner.model.config.use_cache = True  # the Trainer turned it off
    if recipe.method == "full" and not recipe.sharding:
        tuner.model.to(recipe.dtype)
    with written_whole(target) if main else nullcontext(target) as place:
        tuner.save_model(str(place), _internal_call=True)
        if main:
            for name in ("training_args.bin", "README.md"):  # a pickle, and a form that nobody has filled in
                (place / name).unlink(missing_ok=True)
            tuner.tokenizer.save_pretrained(place)
            write_log(place, tuner.state.log_history)
    if world_size() > 1:
        tuner.accelerator.wait_for_everyone()
    return target
