"""The command line: a fake model answers, real pipes and a real pseudo-terminal carry the conversation."""

import argparse
import codecs
import io
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from aquila2_tut import cli
from aquila2_tut.locate import LoaderError

# Runs the command with a model that needs no weights. It answers "<turns so far>:<seed>:<what was said>".
FAKE = """
import sys, time
from aquila2_tut import cli

class ChatError(ValueError):
    __module__ = "aquila2_tut.chat.generate"

class Model:
    aquila_name, device = "Fake-1B", "cpu"
    def stream(self, text, *, history, seed, **options):
        if text == "fail":
            raise ChatError("the prompt has 99 tokens,\\n the context 10")
        if text == "slow":
            yield "one "
            yield "two"
            time.sleep(30)
        elif text == "silent":
            print("(thinking)", file=sys.stderr, flush=True)
            time.sleep(30)
        elif text == "evil":
            yield "a\\x1b[2Jb\\x07\\x9b31m\\u202ec\\td\\ne"
        else:
            yield f"{len(history)}:"
            yield f"{seed}:{text}"

cli.load_chat = lambda arguments: (Model(), None)
sys.exit(cli.main(sys.argv[1:]))
"""


def run(*argv, said="", env=None):
    command = [sys.executable, "-c", FAKE, *argv]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}
    done = subprocess.run(command, input=said.encode(), capture_output=True, timeout=30, env=environment, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class Terminal:
    """A command on a pseudo-terminal of its own."""

    def __init__(self, *argv):
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # A test run that was put into the background hands down "ignore Ctrl-C" to all its children.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.update(LC_ALL="C.UTF-8", TERM="dumb")
            os.execv(sys.executable, [sys.executable, "-c", FAKE, *argv])
        self.seen, self.decoder = "", codecs.getincrementaldecoder("utf-8")()

    def wait_for(self, text, seconds=60):
        """Read until `text` has come; what came up to its end is forgotten and returned."""
        assert self.comes(text, seconds), f"no {text!r} in {self.seen!r}"
        found, self.seen = self.seen.split(text, 1)
        return found + text

    def comes(self, text, seconds):
        """Read for as long as that, or until `text` has come; whether it has."""
        end = time.monotonic() + seconds
        while text not in self.seen and time.monotonic() < end:
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += self.decoder.decode(os.read(self.fd, 4096))
                except OSError:
                    assert text in self.seen, f"ended before {text!r}: {self.seen!r}"
        return text in self.seen

    def say(self, line):
        os.write(self.fd, line.encode() + b"\n")

    def press(self, key):
        os.write(self.fd, key)

    def status(self):
        end = time.monotonic() + 10
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("the command did not end")

    def close(self):
        os.close(self.fd)


CTRL_C, CTRL_D = b"\x03", b"\x04"


@pytest.fixture
def terminal():
    pytest.importorskip("pty", reason="pseudo-terminals need a Unix system")
    opened = Terminal("chat")
    opened.wait_for("you> ")
    yield opened
    opened.close()


def test_help_imports_no_torch():
    code = (
        "import sys; from aquila2_tut import cli\ntry: cli.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in cli.COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--version"])
    assert leaving.value.code == 0
    assert re.fullmatch(r"aquila2-tut \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_the_assets_command_gets_its_arguments(monkeypatch):
    from aquila2_tut import assets

    got = []
    monkeypatch.setattr(assets, "run_cli", lambda argv: got.extend(argv) or 7)
    assert cli.main(["assets", "fetch", "--help"]) == 7
    assert got == ["fetch", "--help"]


def test_the_languages_have_the_same_messages():
    english, chinese = cli.TEXTS["en"], cli.TEXTS["zh"]
    assert english.keys() == chinese.keys()
    for key in english:
        assert re.findall(r"\{\w+\}", english[key]) == re.findall(r"\{\w+\}", chinese[key]), key
        assert re.findall(r"/\w+", english[key]) == re.findall(r"/\w+", chinese[key]), key
        if key not in ("tag", "default_model"):
            assert english[key] == chinese[key] or re.search(r"[\u4e00-\u9fff、]", chinese[key]), key


@pytest.mark.parametrize(
    ("argv", "variables", "language"),
    [
        ([], {}, "en"),
        ([], {"LANG": "zh_CN.UTF-8"}, "zh"),
        ([], {"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        (["chat", "--lang", "zh"], {}, "zh"),
        (["--lang=zh", "chat"], {}, "zh"),
        (["chat", "--lang", "en"], {"LANG": "zh_CN"}, "en"),
        (["chat", "--system", "zh"], {}, "en"),
    ],
)
def test_language(monkeypatch, argv, variables, language):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.choose_language(argv) == language


def test_chat_options_reach_the_loader(monkeypatch):
    got = {}

    class Loader:
        def __init__(self, *args, **kwargs):
            got.update(kwargs)

        get_model = get_tokenizer = lambda self: None

    monkeypatch.setitem(sys.modules["aquila2_tut"].__dict__, "AutoLoader", Loader)
    cli.load_chat(argparse.Namespace(model="M", model_dir="D", device="cpu", dtype="float32"))
    assert got == {"model_name": "M", "model_dir": "D", "device": "cpu", "torch_dtype": "float32"}


def test_chat_options_reach_the_model():
    class Model:
        def stream(self, text, **options):
            self.got = options
            return iter(["ok"])

    argv = ["--base", "--system=S", "--template=aquila-v1", "--temperature=0", "--top-p=0.5", "--topk=3", "--seed=0"]
    argv += ["--max-gen-len=9", "--prefill-chunk=64", "--cache-dtype=int8"]
    options = vars(cli._chat_parser(cli.TEXTS["en"]).parse_args(argv))
    session = cli.Session(Model(), "tokenizer", cli.TEXTS["en"], options)
    session.answer("x")
    assert session.model.got == {
        "tokenizer": "tokenizer",
        "history": [],
        "sft": False,
        "seed": 0,
        "convo_template": "aquila-v1",
        "system": "S",
        "max_gen_len": 9,
        "top_p": 0.5,
        "topk": 3,
        "temperature": 0.0,
        "prefill_chunk": 64,
        "cache_dtype": "int8",
    }
    assert session.history == [], "a base model continues texts; it has no conversation"


def test_a_pipe_is_a_conversation():
    assert run("chat", said="hi\n\n你好\n") == (0, "0:123:hi\n2:124:你好\n", "")


def test_a_seed_that_is_not_applied_stays_so():
    assert run("chat", "--seed", "0", said="a\nb")[1] == "0:0:a\n2:0:b\n"


def test_a_pipe_may_hold_broken_bytes_and_close_early():
    code, shown, _ = run("chat", said="\udcff".encode("utf-8", "surrogatepass").decode("latin-1"))
    assert code == 0 and shown.startswith("0:123:")
    # `yes hello | aquila2-tut chat | head -1`
    command = [sys.executable, "-c", FAKE, "chat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"a\n" * 5000)
        process.stdout.readline()
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=10) == 0


def test_a_model_cannot_steer_the_terminal():
    assert run("chat", said="evil")[1] == "a[2Jb31mc\td\ne\n"


def test_an_error_in_a_pipe_is_one_line_and_ends_it():
    assert run("chat", said="fail\nnever") == (2, "", "aquila2-tut: the prompt has 99 tokens, the context 10\n")


def test_a_loader_error_is_one_line(monkeypatch, capsys):
    def refuse(arguments):
        raise LoaderError("no model\n1. here:\x1b[31m no")

    monkeypatch.setattr(cli, "load_chat", refuse)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["chat"]) == 2
    assert capsys.readouterr().err == "aquila2-tut: no model 1. here:[31m no\n"


def test_a_programming_error_is_not_dressed_up(monkeypatch):
    monkeypatch.setattr(cli, "load_chat", lambda arguments: 1 / 0)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(ZeroDivisionError):
        cli.main(["chat"])


def test_wrong_options_leave_with_status_2(capsys):
    for argv in (["chat", "--topk", "many"], ["dance"], []):
        with pytest.raises(SystemExit) as leaving:
            cli.main(argv)
        assert leaving.value.code == 2


def test_ctrl_c_stops_the_answer_and_keeps_the_session(terminal):
    terminal.say("slow")
    terminal.wait_for("one two")
    terminal.press(CTRL_C)
    terminal.wait_for("[stopped]")
    terminal.wait_for("you> ")
    terminal.say("next")
    terminal.wait_for("2:124:next")
    terminal.say("/history")
    shown = terminal.wait_for("2:124:next\r\nyou> ")
    assert "you> slow\r\nFake-1B> one two\r\nyou> next" in shown
    terminal.say("/quit")
    assert terminal.status() == 0


def test_ctrl_c_before_the_first_word_leaves_no_turn(terminal):
    terminal.say("silent")
    terminal.wait_for("(thinking)")
    terminal.press(CTRL_C)
    terminal.wait_for("[stopped]")
    terminal.wait_for("you> ")
    terminal.say("next")
    terminal.wait_for("0:124:next")
    terminal.wait_for("you> ")
    terminal.press(CTRL_D)
    assert terminal.status() == 0


@pytest.mark.parametrize("key", [CTRL_C, CTRL_D])
def test_keys_that_leave_at_the_prompt(terminal, key):
    terminal.press(key)
    if not terminal.comes("Goodbye.", seconds=10):
        # Between showing the prompt and listening, Python's readline hears no signal; a person presses again.
        terminal.press(key)
    terminal.wait_for("Goodbye.")
    assert terminal.status() == 0


def test_commands(terminal):
    terminal.say("/history")
    terminal.wait_for("Nothing has been said yet.")
    terminal.say("hello")
    terminal.wait_for("0:123:hello")
    terminal.say("/reset")
    terminal.wait_for("A new conversation.")
    terminal.say("hello")
    terminal.wait_for("0:123:hello")
    terminal.say("/help")
    terminal.wait_for("Ctrl-C    stop an answer")
    terminal.wait_for("you> ")
    terminal.say("/dance now")
    terminal.wait_for("There is no command /dance;")
    terminal.say("fail")
    terminal.wait_for("aquila2-tut: the prompt has 99 tokens, the context 10")
    terminal.wait_for("you> ")
    terminal.say("again")
    terminal.wait_for("2:124:again")
    terminal.press(b"\x1b[A")  # the arrow up brings the last line back
    terminal.press(b"\n")
    terminal.wait_for("4:125:again")


def test_a_terminal_in_chinese():
    pytest.importorskip("pty", reason="pseudo-terminals need a Unix system")
    terminal = Terminal("chat", "--lang", "zh")
    terminal.wait_for("输入 /help 查看命令")
    terminal.wait_for("你> ")
    terminal.say("slow")
    terminal.wait_for("one two")
    terminal.press(CTRL_C)
    terminal.wait_for("［已中断］")
    terminal.wait_for("你> ")
    terminal.press(CTRL_D)
    terminal.wait_for("再见。")
    assert terminal.status() == 0
    terminal.close()
