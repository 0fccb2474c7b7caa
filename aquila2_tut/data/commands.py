"""`aquila2-tut data check` and `aquila2-tut data show`: what is wrong with a file, and what is learned from it."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping

from aquila2_tut.data.conversations import checked_samples
from aquila2_tut.data.corpora import DataError
from aquila2_tut.terminal import add_common, printable


def run_check(argv: list[str], text: Mapping[str, str]) -> int:
    """Print all that is wrong with files of conversations, and a line that sums each file up.

    Args:
        argv: the arguments of the command.
        text: the messages in the reader's language, see `aquila2_tut.cli.TEXTS`.

    Returns:
        0, or 1 if there is an error in any file.
    """
    parser = _parser("check", text)
    parser.add_argument("files", nargs="+", metavar="FILE", help=text["check_files"])
    counts = [(file, _check(file, text["tag"])) for file in parser.parse_args(argv).files]
    for file, count in counts:
        sums = {key: count[key] for key in ("samples", "good", "error", "note")}
        print(printable(text["check_summary"].format(file=file, **sums)))
    return int(any(count["error"] for _, count in counts))


def _check(file: str, language: str) -> Counter[str]:
    count: Counter[str] = Counter()
    for checked in checked_samples(file):
        count.update(samples=checked.is_sample, good=checked.sample is not None)
        for found in checked.findings:
            count[found.severity] += 1
            print(found.line_of_text(language))
    return count


def run_show(argv: list[str], text: Mapping[str, str]) -> int:
    """Print the first conversations of a file with what is learned of them, and the figures of the whole file.

    Args:
        argv: the arguments of the command.
        text: the messages in the reader's language, see `aquila2_tut.cli.TEXTS`.

    Returns:
        0, or 1 if there is a sample from which nothing can be learned.
    """
    from aquila2_tut.data.masking import mask_report

    arguments = _show_arguments(argv, text)
    lost: list[str] = []
    report = mask_report(_shown(arguments, text, lost))
    share = report.trained_tokens / max(report.tokens, 1)
    print(text["show_report"].format(share=f"{share:.1%}", **vars(report)))
    if lost:
        print(text["show_lost"].format(count=len(lost)), *lost, sep="\n")
    return int(bool(lost))


def _show_arguments(argv: list[str], text: Mapping[str, str]) -> argparse.Namespace:
    parser = _parser("show", text)
    parser.add_argument("file", metavar="FILE", help=text["show_file"])
    parser.add_argument("--model", default="SmolLM2-135M", help=text["show_model"])
    parser.add_argument("--template", metavar="NAME", help=text["template"])
    parser.add_argument("--max-length", type=int, metavar="N", help=text["show_max_length"])
    parser.add_argument("-n", type=int, default=3, dest="count", help=text["show_count"])
    return parser.parse_args(argv)


def _shown(arguments: argparse.Namespace, text: Mapping[str, str], lost: list[str]) -> Iterator[dict[str, list[int]]]:
    """Encode the samples of the file, print the first ones, and note why others could not be encoded."""
    from aquila2_tut.chat.templates import get_template, template_for_model
    from aquila2_tut.data.masking import encode_conversation, show_in_terminal
    from aquila2_tut.tokenizer import load_tokenizer

    template = get_template(arguments.template) if arguments.template else template_for_model(arguments.model)
    tokenizer = load_tokenizer(arguments.model)
    colour, shown = _has_colours(), 0
    for checked in checked_samples(arguments.file):
        errors = [found.line_of_text(text["tag"]) for found in checked.findings if found.severity == "error"]
        lost += errors[:1]
        if checked.sample is None:
            continue
        try:
            encoded = encode_conversation(checked.sample, tokenizer, template, arguments.max_length)
        except DataError as error:
            lost.append(printable(f"{arguments.file}:{checked.line}: {error}"))
            continue
        if shown < arguments.count:
            shown += 1
            print(text["show_sample"].format(id=printable(str(checked.sample["id"]))))
            print(show_in_terminal(encoded, tokenizer, colour), end="\n\n")
        yield encoded


def _has_colours() -> bool:
    """Whether to write colours; see no-color.org."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _parser(name: str, text: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"aquila2-tut data {name}", description=text[name], add_help=False)
    add_common(parser, text)
    return parser
