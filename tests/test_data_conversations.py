"""The checker of conversation files: every way of being wrong, nothing lost in silence, memory that has a bound."""

import inspect
import json
import os
import random
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aquila2_tut import cli
from aquila2_tut.chat import get_template, template_names
from aquila2_tut.data import DataError, check_file, jsonfile, read_conversations
from aquila2_tut.data import findings as findings_module
from aquila2_tut.data.conversations import CONTROL, _Seen, checked_samples
from aquila2_tut.tokenizer.aquila import AQUILA_CONTROL

H, G = {"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hi!"}


def sample(identifier="1", turns=(H, G), **more):
    return {"id": identifier, "conversations": list(turns), **more}


def turn(role, value):
    return {"from": role, "value": value}


def js(value):
    return json.dumps(value, ensure_ascii=False).encode()


def with_turns(*turns):
    return js(sample(turns=turns))


GOOD, NEXT = js(sample("good")), js(sample("next"))
HUMAN = '{"from": "human", "value": "Hello!"}'

# The same sample, wrong in one way: name -> (its bytes, the kinds and fields that must be found, is it kept?)
SAMPLES = {
    "good": (GOOD, [], True),
    "an integer as id": (js(sample(7)), [], True),
    "many turns": (with_turns(H, G, H, G, H, G), [], True),
    "white space around": (b" \t" + GOOD + b" ", [], True),
    "no comma": (b'{"id": "1" "conversations": []}', [("syntax", "")], False),
    "a comma too many": (GOOD[:-1] + b",}", [("syntax", "")], False),
    "cut off in a string": (b'{"id": "1', [("syntax", "")], False),
    "no quotation marks": (b"{id: 1}", [("syntax", "")], False),
    "single quotation marks": (b"{'id': '1'}", [("syntax", "")], False),
    "a comment": (GOOD + b" // note", [("syntax", "")], False),
    "two samples side by side": (GOOD + b" " + GOOD, [("syntax", "")], False),
    "an escape that is none": (GOOD.replace(b"Hi!", b"\\x41"), [("syntax", "")], False),
    "a raw tab in a string": (GOOD.replace(b"Hi!", b"a\tb"), [("syntax", "")], False),
    "True as in Python": (b'{"id": True}', [("syntax", "")], False),
    "a byte order mark in the middle": (b"\xef\xbb\xbf" + GOOD, [("syntax", "")], False),
    "NaN": (js(sample(score=float("nan"))), [("not-a-number", ""), ("unused-field", "score")], False),
    "Infinity": (js(sample(float("inf"))), [("not-a-number", ""), ("wrong-type", "id")], False),
    "-Infinity as a text": (
        with_turns(H, turn("gpt", -float("inf"))),
        [("not-a-number", ""), ("wrong-type", "conversations[1].value")],
        False,
    ),
    "5,000 digits": (b'{"id": ' + b"1" * 5000 + b"}", [("number", "")], False),
    "Latin-1": ("café".join(['{"id": "', '"}']).encode("latin-1"), [("encoding", "")], False),
    "GB18030": ('{"id": "你好"}'.encode("gb18030"), [("encoding", "")], False),
    "a surrogate in bytes": (GOOD.replace(b"Hi!", b"\xed\xa0\x80"), [("encoding", "")], False),
    "a character cut in two": (GOOD.replace(b"Hi!", "好".encode()[:2]), [("encoding", "")], False),
    "a NUL byte": (GOOD.replace(b"Hi!", b"a\0b"), [("nul", "")], False),
    "nothing but NUL bytes": (b"\0\0\0\0", [("nul", "")], False),
    "U+0000 escaped": (with_turns(H, turn("gpt", "a\0b")), [("null-character", "conversations[1].value")], False),
    "half a character": (
        GOOD.replace(b"Hi!", b"a\\ud83d"),
        [("surrogate", "conversations[1].value")],
        False,
    ),
    "half a character in the id": (GOOD.replace(b"good", b"\\udc00"), [("surrogate", "id")], False),
    "both halves": (GOOD.replace(b"Hi!", b"a\\ud83d\\ude00"), [], True),
    "100,000 brackets": (b"[" * 100_000 + b"]" * 100_000, [("too-deep", "")], False),
    "100,000 objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, [("too-deep", "")], False),
    "a key twice": (b'{"id": "2", ' + GOOD[1:], [("duplicate-key", "")], False),
    "a key twice in a turn": (
        GOOD.replace(b'"value": "Hi!"', b'"value": "Hi!", "value": "Ho!"'),
        [("duplicate-key", "")],
        False,
    ),
    "a list": (js([H, G]), [("not-object", "")], False),
    "a string": (js("Hello!"), [("not-object", "")], False),
    "a number": (b"12", [("not-object", "")], False),
    "null": (b"null", [("not-object", "")], False),
    "an empty object": (b"{}", [("no-field", "id"), ("no-field", "conversations")], False),
    "no id": (js({"conversations": [H, G]}), [("no-field", "id")], False),
    "null as id": (js(sample(None)), [("wrong-type", "id")], False),
    "true as id": (js(sample(True)), [("wrong-type", "id")], False),
    "1.5 as id": (js(sample(1.5)), [("wrong-type", "id")], False),
    "a list as id": (js(sample(["1"])), [("wrong-type", "id")], False),
    "an empty id": (js(sample("")), [("empty-text", "id")], False),
    "no conversations": (js({"id": "1"}), [("no-field", "conversations")], False),
    "conversations misspelt": (
        js({"id": "1", "conversation": [H, G]}),
        [("no-field", "conversations"), ("unused-field", "conversation")],
        False,
    ),
    "a string as conversations": (js({"id": "1", "conversations": "Hi"}), [("wrong-type", "conversations")], False),
    "an object as conversations": (js({"id": "1", "conversations": H}), [("wrong-type", "conversations")], False),
    "null as conversations": (js({"id": "1", "conversations": None}), [("wrong-type", "conversations")], False),
    "no turns": (with_turns(), [("no-turns", "conversations")], False),
    "a string as turn": (with_turns(H, "Hi!"), [("not-object", "conversations[1]")], False),
    "a pair as turn": (with_turns(["human", "Hi!"], G), [("not-object", "conversations[0]")], False),
    "nested turns": (with_turns([H, G]), [("not-object", "conversations[0]")], False),
    "an empty turn": (
        with_turns(H, {}),
        [("no-field", "conversations[1].from"), ("no-field", "conversations[1].value")],
        False,
    ),
    "role and content": (
        with_turns(H, {"role": "assistant", "content": "Hi!"}),
        [
            ("no-field", "conversations[1].from"),
            ("no-field", "conversations[1].value"),
            ("unused-field", "conversations[].role"),
            ("unused-field", "conversations[].content"),
        ],
        False,
    ),
    "a system turn": (
        with_turns(turn("system", "Be brief."), H, G),
        [("unknown-role", "conversations[0].from")],
        False,
    ),
    "an assistant": (with_turns(H, turn("assistant", "Hi!")), [("unknown-role", "conversations[1].from")], False),
    "a Human": (with_turns(turn("Human", "Hi!"), G), [("unknown-role", "conversations[0].from")], False),
    "null as role": (with_turns(turn(None, "Hi!"), G), [("wrong-type", "conversations[0].from")], False),
    "an empty role": (with_turns(H, turn("", "Hi!")), [("unknown-role", "conversations[1].from")], False),
    "two questions": (with_turns(H, H, G), [("same-role", "conversations[1].from")], False),
    "two answers": (with_turns(H, G, G), [("same-role", "conversations[2].from")], False),
    "two answers at the beginning": (
        with_turns(G, G, H, G),
        [("leading-gpt", "conversations[0]"), ("same-role", "conversations[1].from")],
        False,
    ),
    "an empty answer": (with_turns(H, turn("gpt", "")), [("empty-text", "conversations[1].value")], False),
    "a blank question": (with_turns(turn("human", " \n\u3000"), G), [("empty-text", "conversations[0].value")], False),
    "null as text": (with_turns(H, turn("gpt", None)), [("wrong-type", "conversations[1].value")], False),
    "a number as text": (with_turns(turn("human", 7), G), [("wrong-type", "conversations[0].value")], False),
    "a list as text": (with_turns(H, turn("gpt", ["Hi!"])), [("wrong-type", "conversations[1].value")], False),
    "only a question": (with_turns(H), [("no-answer", "conversations")], False),
    "only an answer": (with_turns(G), [("leading-gpt", "conversations[0]"), ("no-answer", "conversations")], False),
    "an answer, then a question": (
        with_turns(G, H),
        [("leading-gpt", "conversations[0]"), ("no-answer", "conversations")],
        False,
    ),
    "an answer first": (with_turns(G, H, G), [("leading-gpt", "conversations[0]")], True),
    "a question last": (with_turns(H, G, H), [("trailing-human", "conversations[2]")], True),
    "a list as instruction": (js(sample(instruction=[1])), [("wrong-type", "instruction")], False),
    "null as instruction": (js(sample(instruction=None)), [], True),
    "an instruction": (js(sample(instruction="Be brief.")), [("instruction", "instruction")], True),
    "a field that is not used": (js(sample(system="Be brief.")), [("unused-field", "system")], True),
    "a field named by an attacker": (js(sample(**{"\x1b[2J": 1})), [("unused-field", "\x1b[2J")], True),
    "a control token": (with_turns(H, turn("gpt", "a</s>b")), [("control-token", "conversations[1].value")], True),
    "an unknown control token": (
        with_turns(turn("human", "<|new_one|>"), G),
        [("control-token", "conversations[0].value")],
        True,
    ),
    "everything at once": (
        js({"id": 1.5, "conversations": [3, turn("x", " ")], "instruction": 1, "y": 2}),
        [
            ("wrong-type", "id"),
            ("not-object", "conversations[0]"),
            ("unknown-role", "conversations[1].from"),
            ("empty-text", "conversations[1].value"),
            ("wrong-type", "instruction"),
            ("unused-field", "y"),
        ],
        False,
    ),
}


def found(file):
    return [(f.kind, f.line, f.index, f.field) for f in check_file(file)]


def counts(file):
    """(samples, good ones) as the checker counts them."""
    checked = list(checked_samples(file))
    return sum(c.is_sample for c in checked), sum(c.sample is not None for c in checked)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_broken_line_is_told_and_costs_no_other(name, tmp_path):
    data, wanted, kept = SAMPLES[name]
    file = tmp_path / "a.jsonl"
    file.write_bytes(NEXT.replace(b"next", b"before") + b"\n" + data + b"\n" + NEXT + b"\n")
    assert found(file) == [(kind, 2, None, field) for kind, field in wanted]
    assert counts(file) == (3, 2 + kept)
    with pytest.warns(UserWarning, match="1 skipped .* file: 3. Skipped are lines 2;") if not kept else no_warning():
        good = list(read_conversations(file, skip_errors=True))
    assert [s["id"] for s in good if s["id"] in ("before", "next")] == ["before", "next"]
    assert len(good) == 2 + kept


@contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# In a list, these cannot be told from the list's own brackets, commas and quotation marks.
BREAK_A_LIST = {"a string", "cut off in a string", "100,000 brackets", "100,000 objects"}


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in BREAK_A_LIST])
def test_a_broken_element_is_told_and_costs_no_other(name, tmp_path):
    data, wanted, kept = SAMPLES[name]
    file = tmp_path / "a.json"
    file.write_bytes(b"[\n" + NEXT.replace(b"next", b"before") + b",\n\n" + data + b"\n,\n" + NEXT + b"\n]\n")
    assert found(file) == [(kind, 4, 1, field) for kind, field in wanted]
    assert counts(file) == (3, 2 + kept)


LINES, LIST = GOOD + b"\n" + NEXT + b"\n", b"[" + GOOD + b",\n" + NEXT + b"]"
PRETTY = json.dumps([sample("good"), sample("next")], indent=2).encode()
# name -> (file name, bytes, findings (kind, line, index), samples, good samples)
FILES = {
    "lines": ("a.jsonl", LINES, [], 2, 2),
    "no line end at the end": ("a.jsonl", LINES[:-1], [], 2, 2),
    "a list": ("a.json", LIST, [], 2, 2),
    "a list on many lines": ("a.json", b"\n" + PRETTY + b"\n\n", [], 2, 2),
    "no ending to the name": ("a", LINES, [], 2, 2),
    "a list, no ending to the name": ("a", LIST, [], 2, 2),
    "capital letters in the name": ("A.JSON", LIST, [], 2, 2),
    "empty lines file": ("a.jsonl", b"", [("empty", None, None)], 0, 0),
    "empty list file": ("a.json", b"", [("empty", None, None)], 0, 0),
    "only blank lines": ("a.jsonl", b"\n \n\n", [("blank-line", 1, None), ("empty", None, None)], 0, 0),
    "only a byte order mark": ("a.jsonl", b"\xef\xbb\xbf", [("bom", None, None), ("empty", None, None)], 0, 0),
    "an empty list": ("a.json", b"[ \n]", [("empty", None, None)], 0, 0),
    "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + LINES, [("bom", None, None)], 2, 2),
    "a byte order mark before a list": ("a.json", b"\xef\xbb\xbf" + LIST, [("bom", None, None)], 2, 2),
    "UTF-16": ("a.jsonl", LINES.decode().encode("utf-16"), [("utf-16", None, None)], 0, 0),
    "UTF-32": ("a.json", LIST.decode().encode("utf-32"), [("utf-16", None, None)], 0, 0),
    "Windows line ends": ("a.jsonl", LINES.replace(b"\n", b"\r\n"), [("crlf", 1, None)], 2, 2),
    "Windows line ends in a list": ("a.json", PRETTY.replace(b"\n", b"\r\n"), [], 2, 2),
    "old Macintosh line ends": ("a.jsonl", LINES.replace(b"\n", b"\r"), [("syntax", 1, None)], 1, 0),
    "blank lines": ("a.jsonl", b"\n" + GOOD + b"\n \t\n" + NEXT + b"\n\n", [("blank-line", 1, None)], 2, 2),
    "lines named .json": ("a.json", LINES, [("lines-in-json", None, None)], 2, 2),
    "one sample named .json": ("a.json", GOOD, [("lines-in-json", None, None)], 1, 1),
    "a list named .jsonl": ("a.jsonl", LIST, [("list-in-jsonl", None, None)], 2, 2),
    "a long list named .jsonl": ("a.jsonl", PRETTY, [("list-in-jsonl", None, None)], 2, 2),
    "lists of turns, line by line": (
        "a.jsonl",
        js([H, G]) + b"\n" + js([H, G]) + b"\n",
        [("not-object", 1, None), ("not-object", 2, None)],
        2,
        0,
    ),
    "one object over many lines": ("a.json", json.dumps(sample(), indent=1).encode(), [("not-list", None, None)], 0, 0),
    "a word": ("a.json", b"hello", [("not-list", None, None)], 0, 0),
    "a number": ("a.json", b"5", [("not-list", None, None)], 0, 0),
    "null": ("a.json", b"null", [("not-list", None, None)], 0, 0),
    "a web page": ("a.json", b"<!DOCTYPE html><html>", [("not-list", None, None)], 0, 0),
    "a picture named .jsonl": (
        "a.jsonl",
        b"\x89PNG\r\n\x1a\n",
        [("crlf", 1, None), ("encoding", 1, None), ("syntax", 2, None)],
        2,
        0,
    ),
    "a list that does not end": ("a.json", LIST[:-1], [("unclosed", 2, None)], 2, 2),
    "a list cut off in a sample": ("a.json", LIST[:-9], [("syntax", 2, 1), ("unclosed", 2, None)], 2, 1),
    "a list cut off after a comma": ("a.json", b"[" + GOOD + b",\n", [("unclosed", 2, None)], 1, 1),
    "a comma at the end": ("a.json", LIST[:-1] + b",]", [("comma", 2, 2)], 2, 2),
    "two commas": ("a.json", b"[" + GOOD + b",,\n" + NEXT + b"]", [("comma", 1, 1)], 2, 2),
    "only a comma": ("a.json", b"[,]", [("comma", 1, 0)], 0, 0),
    "no comma between samples": ("a.json", LIST.replace(b",\n", b"\n"), [("syntax", 2, 0)], 1, 0),
    "something after the list": ("a.json", LIST + b"\n\n" + GOOD, [("trailing-data", 4, None)], 2, 2),
    "two lists": ("a.json", LIST + b"\n" + LIST, [("trailing-data", 3, None)], 2, 2),
    "a bracket too many in a sample": ("a.json", b"[" + GOOD + b"},\n" + NEXT + b"]", [("syntax", 1, 0)], 2, 1),
    "a bracket missing in a sample": (
        "a.json",
        b"[" + GOOD[:-1] + b",\n" + NEXT + b"]",
        [("syntax", 2, 0), ("unclosed", 2, None)],
        1,
        0,
    ),
    "broken JSON on the third line of an element": (
        "a.json",
        b'[\n{"id": "1",\n\n "conversations" []}\n]',
        [("syntax", 4, 0)],
        1,
        0,
    ),
    "brackets and commas in strings": (
        "a.json",
        js([sample("]},[{"), sample('\\"],', [turn("human", '\\\\"}]'), G])]),
        [],
        2,
        2,
    ),
    "an id twice": ("a.jsonl", GOOD + b"\n" + NEXT + b"\n" + GOOD, [("duplicate-id", 3, None)], 3, 2),
    "an id twice in a list": ("a.json", b"[" + GOOD + b",\n" + GOOD + b"]", [("duplicate-id", 2, 1)], 2, 1),
    "the id 1 and the id '1'": ("a.jsonl", js(sample(1)) + b"\n" + js(sample("1")), [], 2, 2),
    "told once": (
        "a.jsonl",
        js(sample("1", x=1, instruction="a")) + b"\n" + js(sample("2", x=1, instruction="a")),
        [("instruction", 1, None), ("unused-field", 1, None)],
        2,
        2,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_what_it_is(name, tmp_path):
    file_name, data, wanted, samples, good = FILES[name]
    file = tmp_path / file_name
    file.write_bytes(data)
    assert [(kind, line, index) for kind, line, index, _ in found(file)] == wanted
    assert counts(file) == (samples, good)


def test_files_that_are_none(tmp_path):
    locked = tmp_path / "pipe\0.jsonl"
    assert found(tmp_path / "nothing.jsonl") == [("missing", None, None, "")]
    assert found(tmp_path) == [("directory", None, None, "")]
    assert found(locked) == [("unreadable", None, None, "")]
    for file in (tmp_path / "nothing.jsonl", tmp_path, locked):
        with pytest.raises(DataError):
            list(read_conversations(file, skip_errors=True))


def test_a_pipe_is_read(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(pipe)!r}, 'wb').write({LINES!r})"])
    assert counts(pipe) == (2, 2)
    assert writer.wait(10) == 0


# The messages


def test_every_kind_of_finding_has_a_test_and_its_words():
    seen = {kind for _, wanted, _ in SAMPLES.values() for kind, _ in wanted}
    seen |= {row[0] for _, _, wanted, _, _ in FILES.values() for row in wanted}
    seen |= {"missing", "directory", "unreadable", "too-long", "more-errors", "more-notes"}  # in tests of their own
    assert seen == set(findings_module._table()["findings"])


@pytest.mark.parametrize("name", [*SAMPLES, *FILES])
def test_a_message_says_what_where_and_what_to_do_in_both_languages(name, tmp_path):
    file_name, data = ("a.jsonl", SAMPLES[name][0]) if name in SAMPLES else FILES[name][:2]
    file = tmp_path / file_name
    file.write_bytes(data)
    for finding in check_file(file):
        assert finding.message and finding.advice
        for language in ("en", "zh"):
            line = finding.line_of_text(language)
            assert line.startswith(str(file)) and "\n" not in line and "{}" not in line and len(line) < 600
            assert line.isprintable(), "something in it steers the terminal"
            assert (language == "zh") == any("\u4e00" <= c <= "\u9fff" for c in line.replace(str(file), ""))
        assert finding.line is None or f":{finding.line}" in line


def test_pythons_own_messages_about_json_are_all_translated():
    raised = set(re.findall(r'JSONDecodeError\("([^"]+)"', inspect.getsource(json.decoder)))
    raised |= {"Invalid \\escape", "Invalid control character at", "Unexpected UTF-8 BOM (decode using utf-8-sig)"}
    assert raised <= set(findings_module._table()["reasons"]["zh"]) and len(raised) > 6


def test_control_tokens_of_all_templates_are_known():
    control = {token for name in template_names() for token in (*get_template(name).control, "[UNK]")}
    for token in control | set(AQUILA_CONTROL):
        assert CONTROL.fullmatch(token)


# The reader


def test_the_first_error_is_raised_with_its_place(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n" + with_turns(turn("user", "a"), G) + b"\n" + NEXT)
    reader = read_conversations(file)
    assert next(reader)["id"] == "good"
    with pytest.raises(DataError, match=r"a\.jsonl:2: error: conversations\[0\]\.from: there is no role 'user'; write"):
        next(reader)


def test_what_is_read_is_what_was_written(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(js(sample("1", [G, H, G], more={"a": [1]})) + b"\n" + with_turns(H, G, H).replace(b'"1"', b'"2"'))
    notes = []
    assert list(read_conversations(file, report=notes.append)) == [
        sample("1", [H, G], more={"a": [1]}),
        sample("2", [H, G, H]),
    ]
    assert [note.kind for note in notes] == ["leading-gpt", "unused-field", "trailing-human"]


def test_skipped_samples_are_counted_and_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"".join(js(sample(i)) + b"\n" + b"{}\n" for i in range(30)))
    errors = []
    with pytest.warns(UserWarning, match=r"30 skipped .* file: 60.* lines 2, 4, .*, 40 and 10 more; .*data check"):
        assert len(list(read_conversations(file, skip_errors=True, report=errors.append))) == 30
    assert sorted({error.line for error in errors}) == list(range(2, 61, 2))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["human", "gpt", "a"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["id", "conversations", "from", "value", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(JSON | st.just(sample()), min_size=1, max_size=6), st.integers(2, 40), st.booleans())
def test_junk_is_counted_whatever_it_is_and_however_the_file_is_cut(tmp_path, values, chunk, indent):
    """Lines and list agree with each other, and nothing escapes; chunks as short as this cut everything in two."""
    lines, listed = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("".join(json.dumps(value, ensure_ascii=indent) + "\n" for value in [{}, *values]), "utf-8")
    listed.write_text(json.dumps([{}, *values], indent=2 if indent else None, ensure_ascii=not indent), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonfile, "_CHUNK", chunk)
        by_list = [c for c in checked_samples(listed) if c.is_sample]
    by_line = [c for c in checked_samples(lines) if c.is_sample]
    assert len(by_line) == len(by_list) == 1 + len(values)
    assert [[f.kind for f in c.findings] for c in by_line] == [[f.kind for f in c.findings] for c in by_list]
    for checked in by_line + by_list:
        assert (checked.sample is None) == any(f.severity == "error" for f in checked.findings)


@pytest.mark.parametrize("chunk", [2, 3, 4, 5, 7, 11, 64])
def test_wherever_a_list_is_cut_its_samples_are_whole(chunk, tmp_path, monkeypatch):
    rows = [sample(f'\\"{n}],', [turn("human", "\\" * n + '"' * n), turn("gpt", "{\n好\\n}")]) for n in range(1, 9)]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    monkeypatch.setattr(jsonfile, "_CHUNK", chunk)
    assert list(read_conversations(file)) == rows


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.integers(0, 120), st.sampled_from(["a.json", "a.jsonl"]))
def test_bytes_of_any_kind_raise_nothing(tmp_path, junk, at, name):
    file = tmp_path / name
    whole = LIST if name == "a.json" else LINES
    file.write_bytes(whole[:at] + junk + whole[at:])
    for finding in check_file(file):
        assert finding.line_of_text("zh").isprintable()


# Size


def test_a_line_of_100_megabytes_is_told_and_skipped(tmp_path):
    file = tmp_path / "a.jsonl"
    long = js(sample("long", [H, turn("gpt", "x" * 100_000_000)]))
    file.write_bytes(GOOD + b"\n" + long + b"\n" + NEXT)
    assert found(file) == [("too-long", 2, None, "")]
    assert next(check_file(file)).values["size"] == len(long) + 1
    assert counts(file) == (3, 2)


def test_an_element_of_100_megabytes_is_told_and_skipped(tmp_path):
    file = tmp_path / "a.json"
    long = js(sample("long", [H, turn("gpt", "\\x,]}" * 20_000_000)]))
    file.write_bytes(b"[" + GOOD + b",\n" + long + b",\n" + NEXT + b"]")
    assert found(file) == [("too-long", 2, 1, "")]
    assert counts(file) == (3, 2)


def test_the_findings_of_one_sample_have_a_bound(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(with_turns(*[{}] * 50_000))
    findings = list(check_file(file))
    assert len(findings) == 101 and findings[-1].kind == "more-errors"
    assert findings[-1].values["count"] == 100_000 - 100
    noted = turn("human", "</s>"), turn("gpt", "</s>")
    file.write_bytes(with_turns(*noted * 60))
    assert [f.kind for f in check_file(file)][99:] == ["control-token", "more-notes"]
    assert counts(file) == (1, 1)


def test_of_many_keys_the_double_one_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"id": "1", "x": {"a": 1, "b": 2, "b": 1, "c": 1}}')
    assert next(check_file(file)).values["key"] == "'b'"


def test_ids_are_remembered_as_a_set_would():
    random.seed(0)
    ids = [random.choice([str, int])(random.randrange(30_000)) for _ in range(40_000)]
    seen, first = _Seen(), {}
    for line, identifier in enumerate(ids, 1):
        assert seen.add(identifier, line) == first.get(identifier)
        first.setdefault(identifier, line)


CHECK = """
import resource, sys
from aquila2_tut.data import check_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
findings = sum(1 for _ in check_file(sys.argv[1]))
print(findings, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "torch" in sys.modules)
"""


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def growth(file):
    """How many findings a file gives, and by how many MiB checking it raises a process's peak memory."""
    done = subprocess.run([sys.executable, "-c", CHECK, str(file)], capture_output=True, text=True, check=True)
    findings, grown, torch = done.stdout.split()
    assert torch == "False"
    return int(findings), float(grown)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")


@linux
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_memory_does_not_grow_with_the_file(name, tmp_path):
    file = tmp_path / name
    text = "a sentence of some length, 一句有点长的话 " * 60
    with file.open("wb") as out:
        for number in range(20_000):
            lead = (b"[" if not number else b",\n") if name == "a.json" else b""
            out.write(lead + js(sample(number, [turn("human", text), G])) + (b"\n" if name == "a.jsonl" else b""))
        out.write(b"]" if name == "a.json" else b"")
    assert file.stat().st_size > 60_000_000
    findings, grown = growth(file)
    assert findings == 0
    assert grown < 16


@linux
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_memory_does_not_grow_with_a_sample(name, tmp_path):
    file = tmp_path / name
    with file.open("wb") as out:
        out.write(b'["' if name == "a.json" else b'"')
        for _ in range(200):
            out.write(b"x" * 1_000_000)
        out.write(b'"]' if name == "a.json" else b'"')
    findings, grown = growth(file)
    assert findings == 1
    assert grown < 60  # a few times the 16 MiB that a sample may have


# The command


def test_the_command_tells_all_and_its_status_says_whether_it_was_good(tmp_path, capsys):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_bytes(LINES)
    bad.write_bytes(GOOD + b"\n{}\n" + with_turns(G, H, G))
    assert cli.main(["data", "check", str(good), "--lang", "en"]) == 0
    assert capsys.readouterr().out == f"{good}: samples 2, good 2; errors 0, notes 0\n"
    assert cli.main(["data", "check", str(good), str(bad), "--lang", "en"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines[:3]] == ["error", "error", "note"]
    assert lines[3:] == [
        f"{good}: samples 2, good 2; errors 0, notes 0",
        f"{bad}: samples 3, good 2; errors 2, notes 1",
    ]
    assert cli.main(["data", "--lang", "zh", "check", str(bad)]) == 1
    assert f"{bad}：共 3 个样本，可用 2 个；错误 2 处，提示 1 处\n" in capsys.readouterr().out


def test_the_command_prints_nothing_that_steers_a_terminal(tmp_path, capsys):
    file = tmp_path / "a\x1b[2J.jsonl"
    file.write_bytes(js({"id": "\x1b[2J\u202e", "conversations": [turn("\x07", "a")], "\x9b31m": 1}))
    assert cli.main(["data", "check", str(file), "--lang", "en"]) == 1
    assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)
