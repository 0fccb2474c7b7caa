"""The journal: every answer is kept at once, whatever happens, and an evaluation that was killed goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from tuning_runs import some_base

from aquila2_tut import AutoLoader
from aquila2_tut.evaluate import EvaluateError
from aquila2_tut.evaluate.harness import HarnessModel
from aquila2_tut.evaluate.journal import Journal, fingerprint, request_key

CHILD = Path(__file__).with_name("harness_child.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return some_base(tmp_path_factory.mktemp("resume") / "tiny", max_position_embeddings=512)


def load(folder):
    loader = AutoLoader("aquila2", model_name=str(folder), device="cpu")
    return loader.get_model(), loader.get_tokenizer()


def some_requests(count=40):
    scored = [(f"The number {n % 7} is followed by", f" {n}") for n in range(count)]
    return [Instance("loglikelihood", {}, args, n, metadata=("some", n, 1)) for n, args in enumerate(scored)]


# --- the file


def test_what_was_added_is_there_again(tmp_path):
    journal = Journal(tmp_path / "deep" / "a.journal")
    journal.add([("one", [-1.5, True]), ("two", "几个\n字")])
    journal.add([("three", 3)])
    journal.close()
    again = Journal(tmp_path / "deep" / "a.journal")
    assert len(again) == 3 and again["one"] == [-1.5, True] and again["two"] == "几个\n字" and "four" not in again
    again.close()


def test_a_torn_end_is_taken_off_at_every_byte(tmp_path):
    journal = Journal(tmp_path / "a")
    journal.add([("one", 1)])
    whole = (tmp_path / "a").stat().st_size
    journal.add([("two", "zwei")])
    journal.close()
    data = (tmp_path / "a").read_bytes()
    for length in range(whole, len(data)):
        (tmp_path / "a").write_bytes(data[:length])
        torn = Journal(tmp_path / "a")
        assert "one" in torn and "two" not in torn and len(torn) == 1
        torn.add([("three", 3)])
        torn.close()
        again = Journal(tmp_path / "a")
        assert len(again) == 2 and again["three"] == 3
        again.close()


def test_a_line_that_does_not_fit_its_checksum_counts_as_not_written(tmp_path):
    journal = Journal(tmp_path / "a")
    journal.add([("one", 111), ("two", 222)])
    journal.close()
    file = tmp_path / "a"
    file.write_bytes(file.read_bytes().replace(b"111", b"112") + b"\n\xff\xfe garbage\n")
    again = Journal(file)
    assert "one" not in again and again["two"] == 222
    again.close()


@pytest.mark.parametrize("body", [b"[]", b"1", b'["a"]', b"[[1], 2]", b"{", b"[" * 100_000])
def test_a_line_that_is_no_answer_counts_as_not_written(tmp_path, body):
    (tmp_path / "a").write_bytes(b"%08x %s\n" % (zlib.crc32(body), body))
    journal = Journal(tmp_path / "a")
    assert len(journal) == 0
    journal.close()


def test_two_evaluations_cannot_write_to_one_file(tmp_path):
    journal = Journal(tmp_path / "a")
    with pytest.raises(EvaluateError, match="another evaluation is writing"):
        Journal(tmp_path / "a")
    journal.close()
    Journal(tmp_path / "a").close()


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluateError, match="give a file that can be written"):
        Journal(tmp_path / "file" / "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(EvaluateError, match="give a file that can be written"):
        Journal(tmp_path / "folder")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(tmp_path):
    journal = Journal(tmp_path / "a")
    os.close(journal._out)
    journal._out = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(EvaluateError, match="answers up to here are kept"):
        journal.add([("one", 1)])
    journal.close()


# --- what an answer belongs to


def test_another_model_is_asked_again(folder):
    model, _ = load(folder)
    same, _ = load(folder)
    assert fingerprint(model) == fingerprint(same)
    seen = {fingerprint(model)}
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1.001
    seen.add(fingerprint(model))
    seen.add(fingerprint(model.to(torch.bfloat16)))
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}
    seen.add(fingerprint(model))
    assert len(seen) == 4


def test_each_part_of_a_request_counts():
    asked = [("a", "x"), ("b", "x"), ("a", "y"), ("a", "x", 1), ("a", ["x"])]
    assert len({request_key(*one) for one in asked}) == len(asked)


def test_what_is_known_is_not_asked(folder, tmp_path, monkeypatch):
    model, tokenizer = load(folder)
    asked = some_requests()
    journal = Journal(tmp_path / "a")
    first = HarnessModel(model, tokenizer, journal=journal, progress=False).loglikelihood(asked)
    journal.close()
    monkeypatch.setattr(model.model, "forward", None)
    journal = Journal(tmp_path / "a")
    assert HarnessModel(model, tokenizer, journal=journal, progress=False).loglikelihood(asked) == first
    journal.close()


# --- kill -9


def start(folder, place):
    command = [sys.executable, str(CHILD), str(folder), str(place)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)


def lines(file):
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_gives_the_same_result(folder, tmp_path):
    """Killed twice in the middle, then run to its end; and once without being killed."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for place in (calm, killed):
        place.mkdir()
    assert start(folder, calm).wait() == 0
    total, before = lines(calm / "journal"), 0
    for least in (total // 4, total // 2):
        child = start(folder, killed)
        while lines(killed / "journal") < least:
            assert child.poll() is None, child.stderr.read().decode()
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert before < lines(killed / "journal") < total
        before = lines(killed / "journal")
    assert start(folder, killed).wait() == 0
    found, expected = (json.loads((place / "results.json").read_text()) for place in (killed, calm))
    assert found["asked"] < expected["asked"]
    assert found["generated"] == expected["generated"]
    assert [greedy for _, greedy in found["scored"]] == [greedy for _, greedy in expected["scored"]]
    # Other requests are read together after a kill, so the last digits may differ.
    values = [[value for value, _ in one["scored"]] for one in (found, expected)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
