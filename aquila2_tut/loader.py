"""`AutoLoader`: a model and its tokenizer from a name, a folder, an adapter or a quantization.

A name is looked for where it costs least: folders first, then what was fetched before, then the network. Nothing is
contacted as long as the files are on this machine, and when nothing is found, the error tells every place in order.

Source of the arguments: FlagAI, flagai/auto_model/auto_loader.py. What its version swallowed is refused by name here.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aquila2_tut.config import ATTN_BACKENDS, Aquila2Config
from aquila2_tut.locate import (
    LoaderError,
    canonical_name,
    check_complete,
    dtype_name,
    find,
    known_name,
    refreshed,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from aquila2_tut.model import Aquila2ForCausalLM

TASK = "aquila2"
SMALL_MODEL = 1_000_000_000  # parameters up to which a CPU gets float32, which is fastest there
FOREIGN_ARGUMENTS = {
    "fp16": 'say torch_dtype="float16"',
    "bf16": 'say torch_dtype="bfloat16"',
    "dtype": "say torch_dtype=...",
    "cache_dir": "say model_dir=..., or set HF_HOME for the hub's cache",
    "model_max_length": "set rope_parameters in the checkpoint's config.json",
    "inference_mode": "for training, take model.train() of what get_model() returns",
    "only_download_config": "load_tokenizer(name) gives the vocabulary alone, Aquila2Config.preset(name) the numbers",
    "all_devices": "one device at a time: device=...",
    "device_map": "one device at a time: device=...",
    "low_cpu_mem_usage": "loading always streams",
}


class AutoLoader:
    """Finds a model, loads it, and loads its tokenizer; each on the first call that needs it.

    Args:
        task_name: "aquila2"; there is no other.
        model_name: a name in `PRESETS` in any letter case, "BAAI/" before it or not, or a checkpoint folder or
            GGUF file.
        model_dir: a checkpoint folder, or the folder that holds checkpoint folders by name; downloads from the
            ModelHub go there (default: `models` in the cache folder of `assets.home()`).
        lora_dir: folder of a LoRA adapter, put on the model with peft.
        qlora_dir: folder of an adapter trained with Q-LoRA: the model is loaded in NF4 under it, or as it is stored
            if that is quantized already.
        quantization_config: a quantization configuration of transformers, or the name of one: "nf4", "nf4-single",
            "int8" (bitsandbytes), "torchao-int8", "torchao-int4"; "gguf" leaves the four-bit codes of a GGUF file as
            they are, on a CPU. A checkpoint that is quantized already needs none.
        device: "auto" (cuda, else mps, else cpu) or a torch device.
        torch_dtype: "auto", a torch dtype or its name. "auto" keeps the checkpoint's, with float16 where the device
            has no bfloat16, and float32 for small models on a CPU.
        attn_backend: see `aquila2_tut.model.attention`.
        local_files_only: never use the network.

    Raises:
        LoaderError: for an argument that is wrong, now; for a model that is not found, when it is asked for.
    """

    def __init__(
        self,
        task_name: str = TASK,
        model_name: str = "SmolLM2-135M",
        model_dir: str | os.PathLike | None = None,
        lora_dir: str | os.PathLike | None = None,
        qlora_dir: str | os.PathLike | None = None,
        quantization_config: Any = None,
        device: str | torch.device = "auto",
        torch_dtype: str | torch.dtype = "auto",
        attn_backend: str = "auto",
        local_files_only: bool = False,
        **unknown: Any,
    ) -> None:
        _refuse_unknown(unknown)
        _check_task(task_name)
        if lora_dir and qlora_dir:
            raise LoaderError("lora_dir and qlora_dir are both given: the model can carry one of the two adapters")
        if attn_backend not in ATTN_BACKENDS:
            raise LoaderError(f"attn_backend {attn_backend!r} is not one of {', '.join(ATTN_BACKENDS)}")
        self.adapter_dir = _check_adapter(lora_dir or qlora_dir)
        self.model_name, self.model_dir = str(model_name), Path(model_dir).expanduser() if model_dir else None
        self.device, self._dtype, self.attn_backend = pick_device(device), parse_dtype(torch_dtype), attn_backend
        self.quantization_config, self._qlora = quantization_config, qlora_dir is not None
        self.local_files_only = local_files_only
        if not self._given():
            canonical_name(self.model_name)

    def get_model(self) -> Aquila2ForCausalLM:
        """The model in evaluation mode, loaded on the first call.

        Raises:
            LoaderError: if it is not found, does not fit into memory, or a library is missing.
            TrainError: if the adapter was trained beside another model.
        """
        return self._model

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model, loaded on the first call."""
        return self._tokenizer

    @cached_property
    def path(self) -> Path:
        """The checkpoint folder or GGUF file of the model; finding it may download it."""
        given = self._given()
        if given and given.is_dir():
            check_complete(given)
        return given or find(canonical_name(self.model_name), self.model_dir, self.local_files_only)

    @cached_property
    def config(self) -> Aquila2Config:
        """The model's shape, as its files tell it, with the attention backend that was asked for."""
        from aquila2_tut.model.weights import open_checkpoint, read_config

        with ExitStack() as stack:
            folder = self.path.is_dir()
            config = read_config(self.path) if folder else open_checkpoint(self.path, None, stack).config
        config.attn_backend = self.attn_backend
        return config

    @cached_property
    def name(self) -> str | None:
        """The canonical name of the model, by which its template is chosen; None for a folder of another name."""
        given, asked = self._given(), known_name(self.model_name)
        asked = refreshed(asked, self.config.vocab_size) if asked else None
        # With model_dir="some/folder" the name may be only the default, so it must fit what is in the folder.
        if given and (not asked or Aquila2Config.preset(asked).parameter_count != self.config.parameter_count):
            asked = known_name(given.name)
        return asked

    @cached_property
    def _model(self) -> Aquila2ForCausalLM:
        if getattr(self.config, "quantization_config", None):
            model = self._load_stored()
        else:
            settings = "nf4" if self._qlora and self.quantization_config is None else self.quantization_config
            model = self._load() if settings is None else self._load_quantized(settings)
        model.aquila_name = self.name
        return (_with_adapter(model, self.adapter_dir) if self.adapter_dir else model).eval()

    def _load(self) -> Aquila2ForCausalLM:
        from aquila2_tut.model.weights import load_model

        dtype = self._dtype or default_dtype(self.config, self.device)
        check_memory(self.config, dtype, self.device)
        return load_model(self.path, self.config, dtype, self.device)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from aquila2_tut.tokenizer import load_tokenizer

        path, name = self.path, self.name
        own = path.is_file() or any((path / file).is_file() for file in ("tokenizer.json", "vocab.json"))
        return load_tokenizer(path if own or not name else name)

    def _load_quantized(self, settings: Any) -> Aquila2ForCausalLM:
        from aquila2_tut.quant.backends import load_with_library, named_bytes, named_config
        from aquila2_tut.quant.stored import half_type, load_gguf_codes

        dtype = self._dtype or half_type(self.config)
        if dtype == torch.bfloat16 and not self._dtype and not _has_bfloat16(self.device):
            dtype = torch.float16
        if settings == "gguf":
            return load_gguf_codes(self.path, self.config, self.device)
        if isinstance(settings, str):
            _check_room(named_bytes(settings, self.config), settings, self.device)
            settings = named_config(settings, self.config, dtype, self.device)
        return load_with_library(self.path, self.config, settings, dtype, self.device)

    def _load_stored(self) -> Aquila2ForCausalLM:
        """A checkpoint that is quantized already."""
        from aquila2_tut.quant.backends import library_of
        from aquila2_tut.quant.stored import GRIDS, half_type, load_grids

        method = library_of(self.config.quantization_config)
        if self.quantization_config is not None:
            raise LoaderError(f"{self.path} is quantized already ({method}): leave quantization_config out")
        if method not in GRIDS:
            return self._load_quantized(None)
        _check_room(sum(file.stat().st_size for file in self.path.glob("*.safetensors")), method, self.device)
        return load_grids(self.path, self.config, self._dtype or half_type(self.config), self.device)

    def _given(self) -> Path | None:
        """The checkpoint folder or GGUF file that the arguments name themselves, if any."""
        # As in the original, a folder of any name may lie in model_dir.
        inside = self.model_dir / self.model_name if self.model_dir else None
        for place in (Path(self.model_name).expanduser(), self.model_dir, inside):
            if place and ((place / "config.json").is_file() or (place.suffix == ".gguf" and place.is_file())):
                return Path(os.path.abspath(place))  # unlike resolve(), this keeps the name that a link gives
        return None


# --- device, dtype, memory ---


def pick_device(device: str | torch.device) -> torch.device:
    """Turn "auto" or a device's name into a device that is there.

    Raises:
        LoaderError: if there is no such device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise LoaderError(f"device {device!r} is none that torch knows; try auto, cpu, cuda, cuda:0 or mps") from error
    count = torch.cuda.device_count() if cuda else 0
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise LoaderError(f"device {device}: torch sees {count} CUDA devices here; device='cpu' always works")
    if wanted.type == "mps" and not mps:
        raise LoaderError("device mps: torch sees no Apple GPU here; device='cpu' always works")
    return wanted


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Turn a dtype or its name into a dtype; "auto" gives None.

    Raises:
        LoaderError: if it is no floating point type.
    """
    if dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise LoaderError(f"torch_dtype {dtype!r} is not one of auto, float32, float16, bfloat16, float64")
    return found


def default_dtype(config: Aquila2Config, device: torch.device) -> torch.dtype:
    """The dtype behind "auto", see `AutoLoader`."""
    if device.type == "cpu" and config.parameter_count <= SMALL_MODEL:
        return torch.float32
    stored = config.dtype or torch.float32
    return torch.float16 if stored == torch.bfloat16 and not _has_bfloat16(device) else stored


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def check_memory(config: Aquila2Config, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a load that would be killed half-way.

    Raises:
        LoaderError: with the bytes needed and the bytes available.
    """
    _check_room(config.parameter_count * dtype.itemsize, dtype_name(dtype), device)


def _check_room(needed: int, stored: str, device: torch.device) -> None:
    available = available_memory(device)
    if available is not None and needed > available:
        raise LoaderError(
            f"the weights need {needed / 1e9:.1f} GB in {stored}, but {device} has "
            f"{available / 1e9:.1f} GB; take a smaller model, torch_dtype='bfloat16', or a quantization_config"
        )


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device now; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if importlib.util.find_spec("psutil"):
        import psutil

        return psutil.virtual_memory().available
    try:
        # All of it rather than what is free: pages of the file cache count as used there and would be given up.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


# --- adapters and quantization ---


def _with_adapter(model: Aquila2ForCausalLM, folder: Path) -> Any:
    """Put an adapter on a model; predict and stream stay reachable through peft's wrapper."""
    _need("peft", "pip install 'aquila2-tut[train]'")
    from peft import PeftModel

    from aquila2_tut.quant.linear import QuantizedLinear
    from aquila2_tut.train.adapters import check_fit

    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise LoaderError(
            f"peft cannot put {folder} on the grids of a GPTQ or AWQ checkpoint or a GGUF file: take the model as it "
            "was, or in NF4 with qlora_dir"
        )
    check_fit(model, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls something in transformers by its old name
        return PeftModel.from_pretrained(model, folder)


def _need(library: str, command: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise LoaderError(f"this needs {library}, which is not installed: {command}")


def _check_adapter(folder: str | os.PathLike | None) -> Path | None:
    if folder is None:
        return None
    if not (Path(folder).expanduser() / "adapter_config.json").is_file():
        raise LoaderError(f"{folder} is no adapter: there is no adapter_config.json in it")
    return Path(folder).expanduser()


def _check_task(task: str) -> None:
    if task == "lm":
        raise LoaderError('the task "lm" was upstream\'s loader of the v1 models; here "aquila2" loads those as well')
    if task != TASK:
        raise LoaderError(f'task_name {task!r} is not known; the one task is "{TASK}"')


def _refuse_unknown(unknown: dict[str, Any]) -> None:
    if unknown:
        told = (f"{key} ({FOREIGN_ARGUMENTS[key]})" if key in FOREIGN_ARGUMENTS else key for key in unknown)
        raise LoaderError(f"AutoLoader takes no argument {', '.join(told)}")
