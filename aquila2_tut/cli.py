"""The command `aquila2-tut`: what the book does in cells, for a terminal.

Each sub-command has a parser of its own and imports its room only when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from aquila2_tut.terminal import add_common, first_to_say, printable

PROGRAM = "aquila2-tut"
FAILED, INTERRUPTED = 2, 130

TEXTS: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("cli_texts.json").read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the program's name; None takes them from `sys.argv`.

    Returns:
        The exit status: 0, 2 after an error that was told, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    text = TEXTS[choose_language(argv)]
    _tolerate_any_text()
    arguments = _parser(text).parse_args(argv)
    try:
        return COMMANDS[arguments.command](arguments.rest, text)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left; pointing stdout elsewhere keeps the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def choose_language(argv: Sequence[str]) -> str:
    """The language of the messages: `--lang` wherever it stands, or else the system's."""
    for here, following in pairwise([*argv, ""]):
        asked = following if here == "--lang" else here.removeprefix("--lang=")
        if here.startswith("--lang") and asked in TEXTS:
            return asked
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "zh" if next(filter(None, names), "").lower().startswith(("zh", "chinese")) else "en"


def _tolerate_any_text() -> None:
    """A character that a terminal cannot show, or an odd byte in a pipe, must not end a conversation."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _parser(text: dict[str, str]) -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:10}{text[name]}" for name in COMMANDS)
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=f"{text['program']}\n\n{text['command']}\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help=text["version"])
    add_common(parser, text)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=" | ".join(COMMANDS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from aquila2_tut import __version__

        print(f"{PROGRAM} {__version__}")
        parser.exit()


def _assets(rest: list[str], text: dict[str, str]) -> int:
    from aquila2_tut import assets

    return assets.run_cli(rest)


# --- data ---


def _data(rest: list[str], text: dict[str, str]) -> int:
    listing = "\n".join(f"  {name:8}{text[name]}" for name in DATA_COMMANDS)
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} data",
        description=f"{text['data']}\n\n{text['action']}\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    add_common(parser, text)
    parser.add_argument("action", choices=DATA_COMMANDS, metavar="ACTION", help=" | ".join(DATA_COMMANDS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    arguments = parser.parse_args(rest)
    with _told_errors() as outcome:
        outcome[0] = DATA_COMMANDS[arguments.action](arguments.rest, text)
    return outcome[0]


def _data_check(rest: list[str], text: dict[str, str]) -> int:
    from aquila2_tut.data import commands

    return commands.run_check(rest, text)


def _data_show(rest: list[str], text: dict[str, str]) -> int:
    from aquila2_tut.data import commands

    return commands.run_show(rest, text)


def _data_stats(rest: list[str], text: dict[str, str]) -> int:
    from aquila2_tut.data import stats

    return stats.run_cli(rest, text)


def _data_fetch(rest: list[str], text: dict[str, str]) -> int:
    from aquila2_tut.data import stats

    return stats.run_fetch(rest, text)


def _data_tasks(rest: list[str], text: dict[str, str]) -> int:
    from aquila2_tut.data import tasks_cli

    return tasks_cli.run_tasks(rest, text)


DATA_COMMANDS: dict[str, Callable[[list[str], dict[str, str]], int]] = {
    "check": _data_check,
    "show": _data_show,
    "stats": _data_stats,
    "fetch": _data_fetch,
    "tasks": _data_tasks,
}


# --- training ---


def _pretrain(rest: list[str], text: dict[str, str]) -> int:
    from aquila2_tut.train import commands

    with _told_errors() as outcome:
        outcome[0] = commands.run_pretrain(rest, text)
    return outcome[0]


def _finetune(rest: list[str], text: dict[str, str]) -> int:
    from aquila2_tut.train import commands

    with _told_errors() as outcome:
        from aquila2_tut import AutoLoader
        from aquila2_tut.loader import available_memory, pick_device
        from aquila2_tut.memory.formula import tuning_memory

        def there() -> int | None:
            return available_memory(pick_device("auto"))

        outcome[0] = commands.run_finetune(rest, text, AutoLoader, there, tuning_memory)
    return outcome[0]


def _merge(rest: list[str], text: dict[str, str]) -> int:
    from aquila2_tut.train import commands, merge_checkpoint

    options = commands.parse_merge(rest, text)
    with _told_errors() as outcome:
        from aquila2_tut import AutoLoader

        loader = AutoLoader("aquila2", model_name=options.base, model_dir=options.model_dir)
        print(merge_checkpoint(loader.path, options.adapter, options.out))
    return outcome[0]


# --- memory ---


def _rehearse(rest: list[str], text: dict[str, str]) -> int:
    with _told_errors() as outcome:
        from aquila2_tut.memory import commands

        outcome[0] = commands.run_rehearse(rest, text)
    return outcome[0]


def _plan(rest: list[str], text: dict[str, str]) -> int:
    with _told_errors() as outcome:
        from aquila2_tut.memory import commands

        outcome[0] = commands.run_plan(rest, text)
    return outcome[0]


# --- evaluation ---


def _evaluate(rest: list[str], text: dict[str, str]) -> int:
    with _told_errors() as outcome:
        from aquila2_tut import AutoLoader
        from aquila2_tut.evaluate import commands

        outcome[0] = commands.run_evaluate(rest, text, AutoLoader)
    return outcome[0]


# --- long context ---


def _extend(rest: list[str], text: dict[str, str]) -> int:
    with _told_errors() as outcome:
        from aquila2_tut.longcontext import commands

        outcome[0] = commands.run_extend(rest, text)
    return outcome[0]


# --- quantization ---


def _quantize(rest: list[str], text: dict[str, str]) -> int:
    from aquila2_tut.quant import commands

    options = commands.parse(rest, text)
    with _told_errors() as outcome:
        from aquila2_tut import AutoLoader

        loader = AutoLoader("aquila2", model_name=options.model, model_dir=options.model_dir, device=options.device)
        print(commands.run(options, loader.path, loader.get_tokenizer(), str(loader.device)))
    return outcome[0]


# --- chat ---


def _chat(rest: list[str], text: dict[str, str]) -> int:
    arguments = _chat_parser(text).parse_args(rest)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print(text["loading"].format(name=arguments.model), file=sys.stderr)
    with _told_errors() as outcome:
        session = Session(*load_chat(arguments), text, vars(arguments))
        run = _talk if interactive else _answer_lines
        run(session)
    return outcome[0]


def _chat_parser(text: dict[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} chat", description=text["chat"], add_help=False)
    parser.add_argument("--model", default=text["default_model"], help=text["model"])
    parser.add_argument("--model-dir", metavar="DIR", help=text["model_dir"])
    parser.add_argument("--device", default="auto", help=text["device"])
    parser.add_argument("--dtype", default="auto", help=text["dtype"])
    parser.add_argument("--base", action="store_true", help=text["base"])
    parser.add_argument("--system", metavar="TEXT", help=text["system"])
    parser.add_argument("--template", metavar="NAME", help=text["template"])
    parser.add_argument("--temperature", type=float, default=1.0, help=text["temperature"])
    parser.add_argument("--top-p", type=float, default=0.9, help=text["top_p"])
    parser.add_argument("--topk", type=int, default=15, help=text["topk"])
    parser.add_argument("--seed", type=int, default=123, help=text["seed"])
    parser.add_argument("--max-gen-len", type=int, default=200, help=text["max_gen_len"])
    parser.add_argument("--prefill-chunk", type=int, default=0, metavar="N", help=text["prefill_chunk"])
    parser.add_argument("--cache-dtype", metavar="NAME", help=text["cache_dtype"])
    add_common(parser, text)
    return parser


def load_chat(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Load what a conversation needs.

    Returns:
        (model, tokenizer)
    """
    from aquila2_tut import AutoLoader

    loader = AutoLoader(
        "aquila2",
        model_name=arguments.model,
        model_dir=arguments.model_dir,
        device=arguments.device,
        torch_dtype=arguments.dtype,
    )
    return loader.get_model(), loader.get_tokenizer()


@contextlib.contextmanager
def _told_errors() -> Iterator[list[int]]:
    """Print an error of this package as one line and note the exit status; let every other error through."""
    outcome = [0]
    try:
        yield outcome
    except Exception as error:
        if not is_ours(error):
            raise
        if first_to_say(line := error_line(error)):
            print(line, file=sys.stderr, flush=True)
        outcome[0] = FAILED


def is_ours(error: Exception) -> bool:
    """Whether an error is of one of this package's classes, whose messages are written for the reader."""
    return type(error).__module__.startswith("aquila2_tut.")


def error_line(error: Exception) -> str:
    """An error in one line, safe to print."""
    return f"{PROGRAM}: " + " ".join(printable(str(error)).split())


_PASSED_ON = ("max_gen_len", "top_p", "topk", "temperature", "prefill_chunk", "cache_dtype")


@dataclass
class Session:
    """One conversation.

    Args:
        model: anything with `stream`, see `aquila2_tut.chat.generate`.
        tokenizer: the model's.
        text: the messages in the reader's language.
        options: the options of the command line, by name.
    """

    model: Any
    tokenizer: Any
    text: dict[str, str]
    options: dict[str, Any]
    history: list[tuple[str, str]] = field(default_factory=list)
    turns: int = 0

    def answer(self, said: str) -> None:
        """Print the model's answer while it comes; Ctrl-C keeps what there is of it in the history."""
        pieces: list[str] = []
        stopped = False
        try:
            for piece in self._stream(said):
                pieces.append(piece)
                print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            stopped = True
        self.turns += 1
        print(f" {self.text['stopped']}" if stopped else "", flush=True)
        if not self.options["base"] and (pieces or not stopped):
            self.history += [("human", said), ("gpt", "".join(pieces))]

    def _stream(self, said: str) -> Iterator[str]:
        options, seed = self.options, self.options["seed"]
        return self.model.stream(
            said,
            tokenizer=self.tokenizer,
            history=list(self.history),
            sft=not options["base"],
            # Another seed each turn, or a question asked twice would be answered with the same dice.
            seed=seed + self.turns if seed > 0 else seed,
            convo_template=options["template"],
            system=options["system"],
            **{name: options[name] for name in _PASSED_ON},
        )

    def reset(self) -> None:
        """Forget the conversation; the next one draws the same dice as the first."""
        self.history.clear()
        self.turns = 0


def _talk(session: Session) -> None:
    """The conversation at a terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() arrow keys and a history that ends with the process)
    name = getattr(session.model, "aquila_name", None) or session.options["model"]
    print(session.text["welcome"].format(name=name, device=getattr(session.model, "device", "cpu")))
    while (said := _ask(session.text)) is not None:
        if said.startswith("/"):
            if not _obey(said, session):
                break
        elif said:
            with _told_errors():
                session.answer(said)
    print(session.text["bye"])


def _ask(text: dict[str, str]) -> str | None:
    """Read one line; None at Ctrl-D and Ctrl-C."""
    try:
        return input(f"{text['you']}> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _obey(said: str, session: Session) -> bool:
    """Carry out a command such as /reset.

    Returns:
        False when the conversation is over.
    """
    word = said.split()[0]
    if word == "/reset":
        session.reset()
    answer = {
        "/quit": "",
        "/reset": session.text["reset"],
        "/help": session.text["help"],
        "/history": _told_history(session),
    }.get(word, session.text["unknown"].format(word=printable(word)))
    print(answer, end="\n" if answer else "")
    return word != "/quit"


def _told_history(session: Session) -> str:
    speakers = {"human": session.text["you"], "gpt": getattr(session.model, "aquila_name", None) or "model"}
    lines = [f"{speakers[role]}> {printable(said)}" for role, said in session.history]
    return "\n".join(lines) or session.text["nothing"]


def _answer_lines(session: Session) -> None:
    """The conversation in a pipe: every line of stdin is one turn."""
    for line in sys.stdin:
        if line.strip():
            session.answer(line.strip())


COMMANDS: dict[str, Callable[[list[str], dict[str, str]], int]] = {
    "assets": _assets,
    "chat": _chat,
    "data": _data,
    "evaluate": _evaluate,
    "extend": _extend,
    "finetune": _finetune,
    "merge": _merge,
    "plan": _plan,
    "pretrain": _pretrain,
    "quantize": _quantize,
    "rehearse": _rehearse,
}


if __name__ == "__main__":
    sys.exit(main())
