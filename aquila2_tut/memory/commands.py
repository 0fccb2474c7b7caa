"""The commands ``rehearse`` and ``plan`` of ``aquila2-tut``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import Aquila2Config, ConfigError
from ..terminal import add_common
from ..train.tuning import METHODS, SHARDINGS
from .advice import Change, advice, plan
from .errors import RehearsalError
from .formula import formula_of
from .hardware import GPUS
from .inference import Answering, contexts_that_fit
from .rehearse import Rehearsal, rehearse_setting
from .setting import LOSSES, OPTIMIZERS, RECIPES, Setting, setting

_LEVELS = " ▁▂▃▄▅▆▇█"
_COLUMNS = 72


def run_rehearse(argv: Sequence[str], text: dict[str, str]) -> int:
    """The command ``aquila2-tut rehearse``.

    Args:
        argv: what follows ``rehearse`` on the command line.
        text: the messages in the reader's language.

    Returns:
        The exit status: 0 if the run fits, 1 if it does not.

    Raises:
        RehearsalError: a setting that makes no sense.
    """
    options = vars(_rehearse_parser(text).parse_args(argv))
    as_json, recipe = options.pop("json"), options.pop("recipe")
    options.pop("lang", None)
    fields = {name: value for name, value in options.items() if value is not None}
    if "targets" in fields:
        fields["targets"] = tuple(fields["targets"])
    fields["model"] = _shape_of(fields["model"])
    found = rehearse_setting(setting(recipe, **fields))
    made = advice(found)
    if as_json:
        print(json.dumps({**json.loads(found.to_json()), "changes": [_told(c) for c in made]}, ensure_ascii=False))
    else:
        print(*_lines(found, made, text), sep="\n")
    return 0 if found.fits else 1


def _shape_of(model: str) -> str | Aquila2Config:
    """A preset's name as it is; of a checkpoint's folder or a config.json, the shape that is written there.

    Raises:
        RehearsalError: no such file, or no configuration in it.
    """
    path = Path(model)
    if not (model and path.is_dir()) and path.suffix != ".json":
        return model
    file = path / "config.json" if path.is_dir() else path
    try:
        return Aquila2Config.from_json_file(file)
    except OSError as error:
        raise RehearsalError(f"model: {file}: {error.strerror}") from None
    except (ConfigError, TypeError, UnicodeDecodeError) as error:
        raise RehearsalError(f"model: {error if str(file) in str(error) else f'{file}: {error}'}") from None


def _rehearse_parser(text: dict[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aquila2-tut rehearse", description=text["rehearse"], add_help=False)
    parser.add_argument("--model", default=Setting.model, metavar="NAME", help=text["rehearse_model"])
    parser.add_argument("--method", default=Setting.method, metavar="NAME", help=" | ".join(METHODS))
    parser.add_argument("--batch-size", type=int, default=Setting.batch_size, metavar="N", help=text["batch_size"])
    parser.add_argument("--seq-len", type=int, default=Setting.seq_len, metavar="N", help=text["seq_len"])
    parser.add_argument("--gpu", default=Setting.gpu, metavar="NAME", help=", ".join(GPUS))
    parser.add_argument("--recipe", default="default", metavar="NAME", help=" | ".join(RECIPES))
    parser.add_argument("--gpus", type=int, metavar="N", help=text["gpus"])
    parser.add_argument("--strategy", metavar="NAME", help=" | ".join(SHARDINGS))
    parser.add_argument("--loss", metavar="NAME", help=" | ".join(LOSSES))
    parser.add_argument("--optimizer", metavar="NAME", help=" | ".join(OPTIMIZERS))
    parser.add_argument("--rank", dest="r", type=int, metavar="N", help=text["rank"])
    parser.add_argument("--targets", nargs="+", metavar="NAME", help=text["targets"])
    no = argparse.BooleanOptionalAction
    parser.add_argument("--checkpointing", action=no, default=None, help=text["checkpointing"])
    parser.add_argument("--json", action="store_true", help=text["json"])
    add_common(parser, text)
    return parser


def run_plan(argv: Sequence[str], text: dict[str, str]) -> int:
    """The command ``aquila2-tut plan``.

    Args:
        argv: what follows ``plan`` on the command line.
        text: the messages in the reader's language.

    Returns:
        The exit status: 0 if anything fits, 1 if not.

    Raises:
        RehearsalError: there is no such card.
    """
    parser = argparse.ArgumentParser(prog="aquila2-tut plan", description=text["plan"], add_help=False)
    parser.add_argument("--gpu", required=True, metavar="NAME", help=", ".join(GPUS))
    parser.add_argument("--context", action="store_true", help=text["plan_context"])
    parser.add_argument("--json", action="store_true", help=text["json"])
    add_common(parser, text)
    options = parser.parse_args(argv)
    if options.context:
        return _print_contexts(options, text)
    fitting = plan(options.gpu)
    if options.json:
        print(json.dumps([dataclasses.asdict(s) | {"bytes": formula_of(s).peak_bytes} for s in fitting]))
    else:
        print(*_plan_lines(fitting, options.gpu, text), sep="\n")
    return 0 if fitting else 1


def _print_contexts(options: argparse.Namespace, text: dict[str, str]) -> int:
    found = contexts_that_fit(options.gpu)
    if options.json:
        print(json.dumps([one._asdict() for one in found]))
    elif found:
        print(text["plan_context_head"].format(gpu=options.gpu, chunk=Answering.chunk))
        for one in found:
            mark = "*" if one.tokens > one.own else ""
            print(f"{one.model:22}{one.weights:8}{one.cache_dtype:10}{one.tokens:>10}{mark}")
    else:
        print(text["plan_nothing"].format(gpu=options.gpu))
    return 0 if found else 1


def _plan_lines(fitting: list[Setting], gpu: str, text: dict[str, str]) -> Iterator[str]:
    if not fitting:
        yield text["plan_nothing"].format(gpu=gpu)
        return
    for one in fitting:
        size = formula_of(one).peak_bytes
        yield f"{one.name:22}{one.method:7}{one.batch_size:4} x {one.seq_len:<6}{_gb(size)}"
    best = rehearse_setting(fitting[0])
    yield text["plan_best"].format(
        model=fitting[0].name,
        method=fitting[0].method,
        rows=fitting[0].batch_size,
        length=fitting[0].seq_len,
        peak=_gb(best.peak_bytes),
        reserved=_gb(best.reserved_bytes),
        usable=_gb(best.setting.card.usable),
    )


# --- lines -----------------------------------------------------------------------------------------------------------


def _gb(size: float) -> str:
    return f"{size / 1e9:7.2f} GB" if size >= 1e8 else f"{size / 1e6:7.2f} MB"


def _lines(found: Rehearsal, made: list[Change], text: dict[str, str]) -> Iterator[str]:
    wanted, card = found.setting, found.setting.card
    derived = formula_of(wanted).peak_bytes
    yield f"{wanted.name}  {wanted.method}  {wanted.batch_size} x {wanted.seq_len}  {wanted.gpu}"
    for label, size in found.breakdown.items():
        yield f"  {text[f'memory_{label}']:<24}{_gb(size)}  {'█' * round(40 * size / found.peak_bytes)}"
    yield text["rehearsed"].format(
        peak=_gb(found.peak_bytes), derived=_gb(derived), reserved=_gb(found.reserved_bytes), usable=_gb(card.usable)
    )
    yield text["work"].format(flops=found.flops, seconds=found.seconds_per_step, tokens=found.tokens_per_second)
    yield from ("", text["timeline"], _timeline(found), _peak_mark(found))
    yield from ("", text["top"], *_top(found))
    yield ""
    yield text["fits" if found.fits else "too_large"].format(gpu=wanted.gpu)
    yield from (_change_line(change, text) for change in made)
    if not found.fits and not (made and made[-1].found.fits):
        yield text["never"].format(gpu=wanted.gpu)


def _timeline(found: Rehearsal) -> str:
    """The most that is alive in each part of the step, from the least to the most of all, as a row of bars."""
    sizes = [moment.bytes for moment in found.timeline]
    least, most = min(sizes), found.allocated_bytes
    step = len(sizes) / _COLUMNS
    parts = (sizes[int(i * step) : max(int(i * step) + 1, int((i + 1) * step))] for i in range(_COLUMNS))
    return "".join(_LEVELS[round((max(part) - least) / max(1, most - least) * (len(_LEVELS) - 1))] for part in parts)


def _peak_mark(found: Rehearsal) -> str:
    at = int(found.peak_at / len(found.timeline) * _COLUMNS)
    return f"{' ' * at}^ {found.peak_op.stage}, {found.peak_op.op}, {found.peak_op.line}"


def _top(found: Rehearsal) -> Iterator[str]:
    for one in found.top:
        shape = " x ".join(map(str, one.shape))
        yield f"  {_gb(one.bytes)}  {one.label:12}{shape:22}{one.op}  {one.line}"


def _change_line(change: Change, text: dict[str, str]) -> str:
    fields = ", ".join(f"{name} = {value}" for name, value in change.fields.items())
    return text["change"].format(fields=fields, saved=_gb(change.saved), left=_gb(change.found.peak_bytes))


def _told(change: Change) -> dict[str, Any]:
    return {**change.fields, "saved": change.saved, "peak_bytes": change.found.peak_bytes, "fits": change.found.fits}
