"""The command ``aquila2-tut evaluate``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aquila2_tut.chat.templates import Template, get_template, template_for_model
from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.journal import Journal
from aquila2_tut.evaluate.suites import COLUMNS, GROUPS, Setting, suites
from aquila2_tut.evaluate.tasks import ALL_SETS
from aquila2_tut.terminal import add_common, printable


def run_evaluate(argv: Sequence[str], text: dict[str, str], loader_class: Any) -> int:
    """The command ``aquila2-tut evaluate``.

    Args:
        argv: what follows ``evaluate`` on the command line.
        text: the messages in the reader's language.
        loader_class: `aquila2_tut.AutoLoader`, which this room does not know.

    Returns:
        The exit status.

    Raises:
        EvaluateError: see `suites`; or lm-eval is not installed.
    """
    options = _parser(text).parse_args(argv)
    if options.list:
        print(_listing(text))
        return 0
    if not options.model or not options.tasks:
        raise EvaluateError(text["evaluate_needs"])
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluateError(text["evaluate_no_harness"])
    _check_output(options.output)
    loader = _load(options, loader_class)
    template = _template(options.chat_template, loader)
    setting = _setting(options, loader, template)
    asked = suites(options.tasks.split(","), setting)  # before the weights are read, as here most mistakes are found
    with _journal(options.output) as journal:
        _measure(options, text, loader, template, asked, journal)
    return 0


def _parser(text: dict[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aquila2-tut evaluate", description=text["evaluate"], add_help=False)
    parser.add_argument("model", nargs="?", metavar="MODEL", help=text["evaluate_model"])
    parser.add_argument("--tasks", metavar="NAME,NAME", help=text["evaluate_tasks"])
    parser.add_argument("--list", action="store_true", help=text["evaluate_list"])
    parser.add_argument("--num-fewshot", type=int, metavar="N", help=text["evaluate_shots"])
    parser.add_argument("--limit", type=int, metavar="N", help=text["evaluate_limit"])
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help=text["evaluate_batch"])
    parser.add_argument("--data-folder", type=Path, metavar="DIR", help=text["evaluate_data"])
    parser.add_argument("--output", type=Path, metavar="FILE", help=text["evaluate_output"])
    parser.add_argument("--chat-template", nargs="?", const="", metavar="NAME", help=text["evaluate_template"])
    parser.add_argument("--adapter", metavar="DIR", help=text["evaluate_adapter"])
    parser.add_argument("--quantization", metavar="NAME", help=text["evaluate_quantization"])
    parser.add_argument("--allow-code-execution", action="store_true", help=text["evaluate_execute"])
    parser.add_argument("--model-dir", metavar="DIR", help=text["model_dir"])
    parser.add_argument("--device", default="auto", help=text["device"])
    parser.add_argument("--dtype", default="auto", help=text["dtype"])
    add_common(parser, text)
    return parser


def _listing(text: dict[str, str]) -> str:
    lines = [f"{name:16}{', '.join(members)}" for name, members in GROUPS.items() if name != "small"]
    lines += [
        "",
        *(f"{name:16}{column.title}, {column.shots}-shot: {column.source}" for name, column in COLUMNS.items()),
    ]
    return "\n".join([*lines, "", f"{'small':16}{text['evaluate_small']} {', '.join(ALL_SETS)}"])


def _load(options: argparse.Namespace, loader_class: Any) -> Any:
    return loader_class(
        "aquila2",
        model_name=options.model,
        model_dir=options.model_dir,
        lora_dir=options.adapter,
        quantization_config=options.quantization,
        device=options.device,
        torch_dtype=options.dtype,
    )


def _template(name: str | None, loader: Any) -> Template | None:
    """The template that was asked for; the model's own if it was not named."""
    if name is None:
        return None
    return get_template(name) if name else template_for_model(loader.name or loader.model_name)


def _setting(options: argparse.Namespace, loader: Any, template: Template | None) -> Setting:
    return Setting(
        loader.get_tokenizer(),
        loader.config.context_length,
        options.data_folder,
        options.num_fewshot,
        options.allow_code_execution,
        template,
    )


def _check_output(file: Path | None) -> None:
    if file is not None and file.is_dir():
        raise EvaluateError(f"{file} is a folder: give a file for the results, such as {file / 'results.json'}")


@contextlib.contextmanager
def _journal(output: Path | None) -> Iterator[Journal | None]:
    """The journal beside the results; none without a place for them."""
    if output is None:
        yield None
        return
    journal = Journal(output.with_name(output.name + ".journal"))
    try:
        yield journal
    finally:
        journal.close()


def _measure(
    options: argparse.Namespace,
    text: dict[str, str],
    loader: Any,
    template: Template | None,
    asked: list[Any],
    journal: Journal | None,
) -> None:
    from aquila2_tut.evaluate.harness import HarnessModel
    from aquila2_tut.evaluate.runs import evaluate

    if journal is not None and len(journal):
        print(text["evaluate_resumed"].format(count=len(journal), file=journal.file), file=sys.stderr)
    model = HarnessModel(loader.get_model(), loader.get_tokenizer(), options.batch_size, template, journal)
    scores, samples = evaluate(model, asked, options.limit)
    print(f"{text['evaluate_head']}")
    for score in scores:
        interval = f"{score.value:7.2f}  [{score.low:.2f}, {score.high:.2f}]"
        print(f"{printable(score.name):22}{score.metric:13}{score.shots:5}{score.items:8}  {interval}")
    if options.output:
        told = {name: value for name, value in vars(options).items() if name not in ("output", "lang", "list")}
        kept = {"settings": told, "scores": [score._asdict() for score in scores], "samples": samples}
        _write(options.output, json.dumps(kept, ensure_ascii=False, indent=1, default=str))


def _write(file: Path, content: str) -> None:
    """All of it or nothing."""
    fresh = file.with_name(file.name + ".part")
    fresh.write_text(content + "\n", encoding="utf-8")
    os.replace(fresh, file)
