"""A context extended: a small run from end to end, killed and taken up, and what the rows of its lessons are."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from extend_runs import SMALL, some_base, some_texts

from aquila2_tut.config import Aquila2Config
from aquila2_tut.longcontext import LongContextError, Maker, encode, extend, lessons
from aquila2_tut.longcontext.extend import (
    METHODS,
    RECIPE,
    Cell,
    Extender,
    Extension,
    bits_per_byte,
    cells,
    found_cells,
    found_share,
    read_results,
    scaled,
)
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.tokenizer import load_tokenizer
from aquila2_tut.train import TrainError, causal_loss
from aquila2_tut.train.recipe import load_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return some_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extend, "long_texts", some_texts)
        extend.extend(Extension(base=str(base), **SMALL), folder)
    return folder


def makers(tokenizer):
    texts = {language: list(some_texts("train", language)) for language in ("en", "zh")}
    return [Maker(tokenizer, language, lessons.lines(tokenizer, found)) for language, found in texts.items()]


# --- lessons ---


def test_rows_to_find_in_hold_the_answers_that_they_ask_for(tokenizer):
    for row in lessons.finding_rows(makers(tokenizer), 512, 4, Random(1)):
        assert len(row.input_ids) <= 512
        for number in range(1, row.document_ids.max() + 1):
            mine = row.document_ids == number
            ids, labels = row.input_ids[mine], row.labels[mine]
            places = (labels != -100).nonzero()[0]
            answers = [place for place in places if place + 1 not in places]  # their last tokens
            assert 1 <= len(answers) <= 6 and (ids[places] == labels[places]).all()
            for place in answers:
                said = tokenizer.decode(ids[: place + 1].tolist()).replace("[CLS]", "").split("\n")
                assert said[-1] in [line.rstrip(".。") for line in said[:-1]], "the number stands in the text before"


def test_rows_to_read_are_full_and_in_the_words_of_the_texts(tokenizer):
    texts = [text for language in ("en", "zh") for text in some_texts("train", language)]
    rows = lessons.reading_rows(tokenizer, texts, 128, 5, Random(1))
    assert [len(row.input_ids) for row in rows] == [128] * 5
    for row in rows:
        first = row.input_ids[row.document_ids == 1].tolist()
        assert tokenizer.decode([id for id in first if id not in (tokenizer.bos_token_id, tokenizer.eos_token_id)])[
            :20
        ] in "".join(texts)
    with pytest.raises(LongContextError, match="do not fill 5 rows"):
        lessons.reading_rows(tokenizer, ["a b c"], 128, 5, Random(1))


def test_poems_come_in_sequence(monkeypatch):
    class Poem:
        def __init__(self, number):
            self.text = str(number)

    monkeypatch.setattr(lessons, "corpus", lambda split, sources: map(Poem, range(130)) if "songci" in sources else [])
    found = list(lessons.long_texts("train", "zh"))
    assert [text.split("\n\n") for text in found] == [
        [str(number) for number in part] for part in (range(60), range(60, 120), range(120, 130))
    ]


# --- the parts of a run ---


def test_an_answer_counts_as_much_as_a_page(base, tokenizer, tmp_path):
    model = Aquila2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, :-1] = -100
    batch = {"input_ids": ids, "labels": labels}
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        costs = -logits.gather(2, ids[:, 1:, None])[..., 0]
        found = Extender.compute_loss(None, model, batch)
        assert found.item() == pytest.approx((costs[0].mean() + costs[1, -1]).item() / 2, rel=1e-5)
        assert abs(found - causal_loss(model, batch)) > 1e-4, "the mean over all tokens is another"


@pytest.mark.parametrize("method", METHODS)
def test_a_scaled_model_reaches_as_far_as_the_factor_says(method):
    config = scaled(Aquila2Config.preset("Aquila2-Nano"), method, 4)
    assert config.context_length == 2048
    assert config.rope_parameters["rope_type"] == ("default" if method == "none" else method)


def test_the_books_recipe_makes_sense_and_wrong_ones_are_refused():
    recipe = load_recipe(Extension, RECIPE)
    assert set(recipe.methods) == set(METHODS) and recipe.factors == (4, 8) and recipe.seeds == (1, 2, 3)
    assert len(list(cells(recipe))) == 2 + 2 * 3 * 5 * 2
    with pytest.raises(TrainError, match="methods: 'magic' is none of none, linear"):
        load_recipe(Extension, RECIPE, methods=["magic"])
    with pytest.raises(TrainError, match="factors: whole numbers from 1 on are needed, not 0"):
        load_recipe(Extension, RECIPE, factors=[0])
    with pytest.raises(TrainError, match="finding: a share from 0 to below 1 is needed, not 2"):
        load_recipe(Extension, RECIPE, finding=2)


def test_there_has_to_be_a_model(tmp_path):
    with pytest.raises(LongContextError, match="base: nowhere is neither"):
        extend.extend(Extension(base="nowhere"), tmp_path / "run")


# --- a run ---


def test_every_cell_is_measured_once(whole):
    results = read_results(whole / "extended.json")
    found = [Cell(*(row[field] for field in Cell._fields)) for row in results["cells"]]
    assert found == list(cells(Extension(**SMALL)))
    assert results["conditions"]["length"] == 128
    for row in results["cells"]:
        assert [band[:2] for band in row["bits"]] == [[1, 128], [128, 256]]
        assert {(language, length) for language, length, *_ in row["passkey"]} == {
            (language, length) for language in ("en", "zh") for length in (128, 256)
        }
        assert all(0 <= exact <= total and 0 <= likeliest <= total for *_, total, exact, likeliest in row["passkey"])
    assert not list(whole.glob("*-run")), "checkpoints are gone"


def test_what_is_kept_is_what_the_model_says(whole, tokenizer):
    """Bits of the tuned model, measured once more from its folder, with other code around."""
    rows = read_results(whole / "extended.json")["cells"]
    row = next(row for row in rows if row["method"] == "linear" and row["stage"] == "tuned")
    config = Aquila2Config.from_pretrained(whole / "linear-2-seed-1")
    assert config.rope_parameters["rope_type"] == "linear" and config.context_length == 256
    model = Aquila2ForCausalLM.from_pretrained(whole / "linear-2-seed-1", dtype=torch.float32).eval()
    documents = []
    for language in ("en", "zh"):
        every = encode(tokenizer, list(some_texts("held-out", language)))
        documents += [every[0], every[6]]
    ids = torch.tensor([document.ids[:256] for document in documents])
    with torch.no_grad():
        costs = -model(input_ids=ids).logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    size = sum(int(document.sizes[:256].sum()) for document in documents)
    assert bits_per_byte(row) == pytest.approx(costs.sum().item() / math.log(2) / size, rel=1e-4)


def test_training_does_something(whole):
    rows = read_results(whole / "extended.json")["cells"]
    bits = {(row["method"], row["stage"]): bits_per_byte(row) for row in rows}
    assert bits["none", "taught"] < bits["none", "raw"]
    assert bits["linear", "tuned"] < bits["linear", "taught"]


def test_a_run_that_is_killed_goes_on_to_the_same_results(whole, base, tmp_path):
    """Killed with SIGKILL in the lesson, and again in the tuning of the first method."""
    folder = tmp_path / "run"
    for killed_at in (2, 3, 0):
        code = "import sys; from pathlib import Path; import extend_runs; base, folder, at = sys.argv[1:]; "
        code += "extend_runs.run(Path(base), Path(folder), int(at))"
        command = [sys.executable, "-c", code, str(base), str(folder), str(killed_at)]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        assert done.returncode == (-signal.SIGKILL if killed_at else 0), done.stderr
        if killed_at == 2:
            assert (folder / "taught-seed-1-run").is_dir()
        if killed_at == 3:
            assert (folder / "taught-seed-1").is_dir() and (folder / "linear-2-seed-1-run").is_dir()
    assert json.loads((folder / "extended.json").read_text()) == json.loads((whole / "extended.json").read_text())


def test_a_run_that_is_there_is_not_run_again_and_may_grow(whole, base, monkeypatch):
    monkeypatch.setattr(Extender, "resume_or_train", lambda self: pytest.fail("trained again"))
    told = []
    extend.extend(Extension(base=str(base), **SMALL), whole, lambda *what: told.append(what[:2]))
    assert told == [(number, 5) for number in range(1, 6)]
    with pytest.raises(TrainError, match="lesson_steps"):
        extend.extend(Extension(base=str(base), **{**SMALL, "lesson_steps": 9}), whole)


def test_the_command_tells_each_cell(whole, base, tmp_path, capsys):
    from aquila2_tut.cli import main

    recipe = tmp_path / "tiny.yaml"
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in SMALL.items()}
    recipe.write_text(json.dumps({"base": str(base), **plain}))
    assert main(["extend", "--recipe", str(recipe), "--methods", "none", "--out", str(whole), "--lang", "en"]) == 0
    said = capsys.readouterr()
    assert said.out.strip().endswith("extended.json")
    assert [line.split(":")[0] for line in said.err.splitlines() if "/3" in line] == [
        "1/3  x2 none base model, seed 0",
        "2/3  x2 none stretched, seed 1",
        "3/3  x2 none tuned, seed 1",
    ]
    assert main(["extend", "--methods", "magic", "--out", str(tmp_path / "x"), "--lang", "zh"]) == 2


def test_shares_and_results_that_are_not_there(tmp_path):
    row = {"passkey": [["en", 512, 0.1, 4, 1, 3], ["zh", 512, 0.1, 4, 1, 1], ["en", 1024, 0.1, 4, 0, 0]]}
    assert found_share(row, 512) == 0.5 and found_share(row, 512, likeliest=False) == 0.25
    assert found_cells(row) == {(512, 0.1): 0.5, (1024, 0.1): 0.0}
    with pytest.raises(LongContextError, match="texts of 99 tokens"):
        found_share(row, 99)
    with pytest.raises(LongContextError, match="no results"):
        read_results(tmp_path / "none.json")


def test_what_the_book_shows_is_what_was_hoped_for():
    """At four times its length interpolation and tuning bring the model back; without, it finds little and reads badly.

    Bits per byte are within 3 % of those of the base model in windows of its own length, on the same tokens.
    """
    rows = {Cell(*(row[field] for field in Cell._fields)): row for row in read_results()["cells"]}
    raw = rows[Cell(4, 0, "none", "raw")]
    short = raw["short"][2] / raw["short"][3]
    for seed in {cell.seed for cell in rows if cell[0] == 4 and cell[2:] == ("linear", "tuned")}:
        stretched, tuned = (rows[Cell(4, seed, "linear", stage)] for stage in ("taught", "tuned"))
        assert bits_per_byte(tuned) <= 1.03 * short < bits_per_byte(stretched)
        assert found_share(tuned, 2048, likeliest=False) >= 0.9
        assert found_share(rows[Cell(4, seed, "none", "taught")], 2048) < 0.5
    assert found_share(raw, 2048) < 0.2


def test_less_memory_gives_the_same_model(whole, base, tmp_path, monkeypatch):
    monkeypatch.setattr(extend, "long_texts", some_texts)
    recipe = Extension(base=str(base), **{**SMALL, "methods": ("linear",), "gradient_checkpointing": True})
    one, other = (
        next(row for row in read_results(file)["cells"] if row["method"] == "linear" and row["stage"] == "tuned")
        for file in (whole / "extended.json", extend.extend(recipe, tmp_path / "run"))
    )
    assert one == other
