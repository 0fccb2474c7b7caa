"""Where a model is: the folders, caches and services that are asked for it, in order, and the names it goes by.

Nothing is contacted as long as the files are on this machine. When nothing is found, the error tells every place and
why it gave nothing.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants

from aquila2_tut import assets
from aquila2_tut.config import PRESETS, Aquila2Config, ConfigError, resolve_preset_name
from aquila2_tut.modelhub import NO_ANSWER, NO_NAME, ModelHub, ModelHubError, choose_files, reason

ORGANISATION = "BAAI"
# Our suffix for the refreshed base models, which replaced the first ones in the same repositories.
JUNE_2024 = "-2024-06"
OWN_MODELS = ("Aquila2-Nano", "Aquila2-Nano-Chat")


class LoaderError(RuntimeError):
    """A model that cannot be found or loaded, or arguments that contradict each other."""


def find(name: str, model_dir: Path | None, local_files_only: bool) -> Path:
    """Look for a model in each place in turn.

    Args:
        name: canonical name.
        model_dir: folder that holds checkpoint folders.
        local_files_only: leave out the places that need the network.

    Returns:
        A checkpoint folder or a GGUF file.

    Raises:
        LoaderError: listing each place and why it gave nothing.
    """
    shelf = model_dir or assets.home() / "models"
    tried = []
    for where, found in _places(name, shelf, local_files_only):
        if isinstance(found, Path):
            return found
        tried.append(f"{len(tried) + 1}. {where}: {found}")
    raise LoaderError(f"{name} ({_size_text(name)}) was not found. Tried, in order:\n" + "\n".join(tried))


def _places(name: str, shelf: Path, offline: bool) -> Iterator[tuple[str, Path | str]]:
    """Yield (place, the path found there or why there is none), each place tried only when it is asked for."""
    yield f"the folder {shelf}", _in_folder(name, shelf)
    if name in OWN_MODELS:
        yield "the models that come with the book", assets.shipped(name) or "it is not there: get the whole repository"
        return
    if name.lower() in assets.MANIFEST:
        yield f"the asset {name.lower()}", _asset(name.lower(), offline)
        return
    repo = f"{ORGANISATION}/{name.removesuffix(JUNE_2024)}"
    yield f"the Hugging Face cache ({repo})", _in_hub_cache(repo)
    no_network = "not asked, because local_files_only is set" if offline else None
    no_hub = "not asked, because HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    yield f"the Hugging Face hub ({repo})", no_network or no_hub or _from_hub(repo)
    old = "it has only the first release of this model" if name.endswith(JUNE_2024) else None
    yield "BAAI's ModelHub", no_network or old or _from_modelhub(name, shelf)


def _in_folder(name: str, shelf: Path) -> Path | str:
    """Find `shelf`/`name` in any letter case: upstream's scripts use lower case, its pages do not."""
    if not shelf.is_dir():
        return "there is no such folder"
    for folder in sorted(shelf.iterdir()):
        if folder.name.lower() == name.lower() and (folder / "config.json").is_file():
            check_complete(folder)
            return folder
    return f"no folder {name} with a config.json in it"


def _asset(name: str, offline: bool) -> Path | str:
    try:
        return assets.path(name) if offline else assets.fetch(name)
    except assets.AssetError as error:
        return str(error)


def _in_hub_cache(repo: str) -> Path | str:
    config = huggingface_hub.try_to_load_from_cache(repo, "config.json")
    if not isinstance(config, str):
        return "nothing there"
    # Our own downloads leave files out, so the library itself would call this snapshot incomplete.
    missing = missing_weights(Path(config).parent)
    return f"incomplete, {missing} is missing" if missing else Path(config).parent


def _from_hub(repo: str) -> Path | str:
    """Download a snapshot, safetensors if there are any; the library resumes what was cut off."""
    try:
        siblings = huggingface_hub.HfApi().model_info(repo, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in siblings if "/" not in file.rfilename}
        wanted = choose_files(list(sizes))
        new = (name for name in wanted if not isinstance(huggingface_hub.try_to_load_from_cache(repo, name), str))
        _check_disk(sum(sizes[name] for name in new))
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
    except LoaderError:
        raise
    except Exception as error:  # whatever its HTTP library raises: the next place is still to be asked
        return _hub_reason(error)


def _hub_reason(error: BaseException) -> str:
    """Find the cause in a chain of exceptions; the library's own advice hides it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 10:
        chain.append(cause)
    return next(
        (found for link in reversed(chain) if (found := reason(link)).startswith((NO_NAME, NO_ANSWER))), reason(error)
    )


def _from_modelhub(name: str, shelf: Path) -> Path | str:
    try:
        return ModelHub().download(name, shelf / name)
    except ModelHubError as error:
        return str(error)


def missing_weights(folder: Path) -> str | None:
    """Name the first file that a checkpoint folder lacks.

    Returns:
        A file name, or None if the folder is complete.
    """
    if not (folder / "config.json").is_file():
        return "config.json"
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{kind}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()))
            return next((shard for shard in shards if not (folder / shard).is_file()), None)
        if any(folder.glob(f"*.{kind.rpartition('.')[2]}")):
            return None
    return "model.safetensors"


def check_complete(folder: Path) -> None:
    """Refuse a checkpoint folder that lacks a file.

    Raises:
        LoaderError: naming the first file that is missing.
    """
    missing = missing_weights(folder)
    if missing:
        raise LoaderError(f"{folder} has a config.json but no {missing}; copy it there, or remove the folder")


def _check_disk(needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise LoaderError(f"{needed / 1e9:.1f} GB must be downloaded, {cache} has {free / 1e9:.1f} GB free")


# --- names and sizes ---


def canonical_name(name: str) -> str:
    """Resolve a model name in any letter case, with or without "BAAI/".

    Raises:
        LoaderError: listing near matches and all known names.
    """
    plain = name.removeprefix(f"{ORGANISATION}/")
    try:
        return resolve_preset_name(plain)
    except ConfigError:
        spelled = {known.lower(): known for known in PRESETS}
        near = [spelled[key] for key in difflib.get_close_matches(plain.lower(), spelled, n=3, cutoff=0.5)]
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise LoaderError(
            f"{name!r} is neither a folder with a config.json nor a known model.{hint} Known: {', '.join(PRESETS)}"
        ) from None


def known_name(name: str) -> str | None:
    """Resolve a model name, or None if it is not known."""
    try:
        return canonical_name(name)
    except LoaderError:
        return None


def refreshed(name: str, vocab_size: int) -> str:
    """Tell the refreshed base model where its repository gave it under the name of the first one."""
    later = PRESETS.get(name + JUNE_2024)
    return name + JUNE_2024 if later and later["vocab_size"] == vocab_size else name


def _size_text(name: str) -> str:
    if name.lower() in assets.MANIFEST:
        return f"{assets.MANIFEST[name.lower()].size / 1e6:.1f} MB"
    config = Aquila2Config.preset(name)
    return f"{config.parameter_count * config.dtype.itemsize / 1e9:.1f} GB in {dtype_name(config.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    """Write a dtype without the "torch." before it."""
    return str(dtype).removeprefix("torch.")
