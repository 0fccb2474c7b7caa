"""Recipes: how a run goes, in a file that says so, and the same in the terms of transformers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from transformers import TrainingArguments

from .checkpoints import refuse_other_settings
from .errors import TrainError

FOLDER = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Run:
    """What every recipe says; as in `aquila2_tut.train.loop.Settings`.

    Args:
        length: tokens a row.
        steps: how often the weights move; 0 for once through the data.
        batch_size: rows a step.
        learning_rate: the highest; `warmup` steps lead to it, and it falls to `final_share` of it.
        schedule: "cosine" or "linear"; the latter falls to nothing.
        weight_decay, betas: of AdamW.
        clip: the largest norm of the gradients.
        precision: "float32" or "bfloat16".
        seed: of the data's order and of the first weights.
        save_every: steps between two checkpoints.
    """

    length: int = 512
    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 2e-3
    final_share: float = 0.05
    schedule: str = "cosine"
    warmup: int = 10
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: str = "bfloat16"
    seed: int = 42
    save_every: int = 100

    def faults(self) -> Iterator[tuple[str, str]]:
        """What makes no sense here, or not together: the field, and what is wrong with it."""
        yield from ()


AnyRun = TypeVar("AnyRun", bound=Run)


def read_recipe(name_or_file: str | Path) -> tuple[Path, dict[str, Any]]:
    """Finds and reads the file of a recipe.

    Args:
        name_or_file: the name of a file in `recipes`, or a path.

    Returns:
        The file, and what it says, not yet checked.

    Raises:
        TrainError: no such recipe, or no YAML.
    """
    known = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    file = known.get(str(name_or_file), Path(name_or_file))
    if not file.is_file():
        raise TrainError(f"no recipe {name_or_file}: neither a file nor one of {', '.join(known)}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise TrainError(f"{file}: no text in UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise TrainError(f"{file}: no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise TrainError(f"{file}: a recipe is a list of `field: value` lines")
    return file, content


def load_recipe(kind: type[AnyRun], name_or_file: str | Path, **changes: Any) -> AnyRun:
    """Reads and checks a recipe.

    Args:
        kind: what it is a recipe for.
        name_or_file: see `read_recipe`.
        changes: fields to set otherwise.

    Raises:
        TrainError: see `read_recipe`; or a field that is unknown, of the wrong type or makes no sense, with its line.
    """
    file, content = read_recipe(name_or_file)
    places = _lines(file) | {name: f"{name}={value}" for name, value in changes.items()}
    recipe = kind(**_checked(kind, {**content, **changes}, places))
    refuse_faults(recipe, places, f"{file}")
    return recipe


def refuse_faults(recipe: Run, places: Mapping[str, str] | None = None, elsewhere: str = "recipe") -> None:
    """Refuses what makes no sense.

    Args:
        recipe: what to look at.
        places: where each field was set, for the message; and where those are that were not.
        elsewhere: what to say of the others.

    Raises:
        TrainError: the first thing that makes no sense.
    """
    for field, fault in recipe.faults():
        raise TrainError(f"{(places or {}).get(field, elsewhere)}: {field}: {fault}")


def _lines(file: Path) -> dict[str, str]:
    """Where each field of a recipe stands."""
    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    places: dict[str, str] = {}
    for key, _ in root.value:
        place = f"{file}, line {key.start_mark.line + 1}"
        if str(key.value) in places:
            raise TrainError(f"{place}: {key.value} is set a second time; keep one of the two")
        places[str(key.value)] = place
    return places


def _checked(kind: type[Run], content: dict[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """Every field known and of the type of its default."""
    known, good = dataclasses.asdict(kind()), {}
    for name, value in content.items():
        if name not in known:
            raise TrainError(f"{places[str(name)]}: there is no field {name!r}; known: {', '.join(known)}")
        expected = type(known[name])
        good[name] = tuple(value) if isinstance(value, list) else _number(value) if expected is float else value
        also = {"model": dict}.get(name, int if expected is float else expected)
        if isinstance(value, bool) != (expected is bool) or not isinstance(good[name], expected | also):
            raise TrainError(f"{places[name]}: {name} must be of type {expected.__name__}, not {value!r}")
    return good


def _number(value: Any) -> Any:
    """YAML takes 1e-4 for text; only 1.0e-4 is a number there."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def arguments(run: Run, folder: Path, **changes: Any) -> TrainingArguments:
    """A recipe in the terms of transformers.

    Args:
        run: the recipe.
        folder: gets the checkpoints, and TensorBoard's files in `logs`.
        changes: arguments to set otherwise.

    Raises:
        TrainError: no such schedule.
    """
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "logs")
    plain = {
        "output_dir": str(folder),
        "max_steps": run.steps or -1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": run.batch_size,
        "learning_rate": run.learning_rate,
        "warmup_steps": run.warmup,
        "weight_decay": run.weight_decay,
        "adam_beta1": run.betas[0],
        "adam_beta2": run.betas[1],
        "max_grad_norm": run.clip,
        "bf16": run.precision == "bfloat16",
        "seed": run.seed,
        "save_steps": run.save_every,
        "save_total_limit": 2,
        "logging_steps": 10,
        "logging_first_step": True,
        "report_to": "tensorboard" if find_spec("tensorboard") else "none",
        "include_num_input_tokens_seen": "all",
        "use_cpu": not torch.cuda.is_available(),
        "optim": "adamw_torch_fused",
        "remove_unused_columns": False,
        **_schedule(run),
    }
    return TrainingArguments(**{**plain, **changes})


def _schedule(run: Run) -> dict[str, Any]:
    if run.schedule == "cosine":
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": run.final_share}}
    if run.schedule == "linear":
        return {"lr_scheduler_type": "linear"}
    raise TrainError(f"schedule: {run.schedule!r} is neither cosine nor linear")


def _settings(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainError(f"{file}: no JSON: {error}; give another folder, or remove this one") from None


def claim(folder: Path, recipe: Run, free: Collection[str] = (), **more: Any) -> None:
    """Makes a folder that of one recipe.

    Args:
        folder: of the run.
        recipe: its recipe.
        free: the fields that may be others when a run goes on.
        more: what else must be the same when a run goes on.

    Raises:
        TrainError: it holds a run of another one.
    """
    content, file = dataclasses.asdict(recipe) | more, folder / "recipe.json"
    if file.is_file():
        fixed = {name: value for name, value in content.items() if name not in free}
        return refuse_other_settings(folder, _settings(file), fixed)
    fresh = folder / "recipe.json.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        os.replace(fresh, file)
    except OSError as error:
        raise TrainError(f"{folder} cannot be written to: {error.strerror}; name another folder") from None
    return None
