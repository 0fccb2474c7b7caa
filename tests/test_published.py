"""The published figures: nothing is missing, the sums come out, and the final image is shifted by one column."""

import pytest

from aquila2_tut.evaluate import EvaluateError
from aquila2_tut.evaluate.published import (
    CHINESE,
    ENGLISH,
    MEANS,
    aligned,
    claims,
    figures,
    mean,
    most_favourable,
    owners_of_means,
    shifts,
    tables,
)
from aquila2_tut.memory import GPUS

TABLES = tables()


def test_every_table_of_the_readme_is_there_with_as_many_figures_as_it_prints():
    """Counted by hand: rows times columns, less the empty cells."""
    printed = {
        "base-first": 12 * 9 - 9,
        "base-image-first": 22 * 10 - 2,
        "base-image-final": 24 * 10 - 2,
        "chat": 19 * 9 - 3,
        "long-first": 8 * 8 - 7,
        "long-final": 13 * 7,
        "reasoning": 11 * 7,
        "finetuning": 4 * 2,
        "quantization": 6 * 8,
    }
    found = {name: sum(figure.value is not None for figure in table.figures()) for name, table in TABLES.items()}
    assert found == printed


def test_every_figure_says_where_it_is_from():
    every = figures()
    assert len({(f.table, f.model, f.method, f.task) for f in every}) == len(every)
    for figure in every:
        assert (
            figure.source.startswith("FlagAI-Open/Aquila2") and figure.conditions and figure.date.startswith("2023-1")
        )
        assert figure.value is None or figure.unit != "percent" or 0 <= figure.value <= 100


@pytest.mark.parametrize(
    "table, model, task, value",
    [
        ("base-first", "Aquila2-7B", "GSM8K", 41.9),
        ("base-first", "Aquila2-34B", "GaoKao", 64.6),
        ("base-image-first", "Aquila2-7B", "MMLU", 58.10),
        ("base-image-final", "Aquila2-7B", "MMLU", 56.90),
        ("chat", "Qwen-14B-Chat", "MMLU", 0.0),
        ("long-final", "AquilaChat2-7B-16K", "LSHT", 40.0),
        ("reasoning", "AquilaChat2-34B", "bAbI 15", 63.6),
    ],
)
def test_figures_are_as_the_readme_prints_them(table, model, task, value):
    assert TABLES[table].column(model)[task] == value


def test_the_gpu_of_the_fine_tuning_table_is_one_that_the_memory_room_knows():
    assert "A100-80G" in GPUS and "80G" in TABLES["finetuning"].conditions


# --- means


@pytest.mark.parametrize("name", ["reasoning", "long-final"])
def test_the_printed_means_of_text_tables_are_those_of_their_rows(name):
    parts = {
        "reasoning": {"Mean": ["bAbI 16", "CLUTRR", "bAbI 15", "EntailmentBank", "αNLI", "e-CARE"]},
        "long-final": {
            "Mean": ["Mean EN", "Mean ZH"],
            "Mean EN": ["HotpotQA", "2WikiMQA"],
            "Mean ZH": ["VCSUM", "LSHT"],
        },
    }[name]
    for column in TABLES[name].columns:
        for row, tasks in parts.items():
            assert column[row] == pytest.approx(mean(column, tasks), abs=0.11)


def test_the_means_of_the_aligned_table():
    """As they were worked out by hand from the two images, model by model."""
    table = aligned()
    wanted = {
        "Mean": [71.76, 68.56, 67.89, 67.14, 65.40, 61.64, 61.62, 58.26, 56.98, 52.30, 46.01],
        "Mean EN": [69.76, 68.29, 67.78, 72.34, 68.94, 65.31, 65.04, 63.69, 61.85, 57.52, 57.87],
        "Mean ZH": [77.04, 72.13, 71.55, 66.08, 65.84, 61.92, 62.66, 56.52, 55.97, 50.96, 37.48],
    }
    for row, values in wanted.items():
        assert [column[row] for column in table.columns] == pytest.approx(values, abs=0.0101)
    assert table.models[0] == "Aquila2-34B v1.2" and table.models[7] == "Aquila2-7B"
    assert len(ENGLISH) == len(CHINESE) == 10 and len(set(MEANS["Mean"])) == 21


def test_a_mean_of_nothing_and_a_name_that_is_not_there_are_refused():
    with pytest.raises(EvaluateError, match="no figure"):
        mean({"MMLU": None}, ["MMLU"])
    with pytest.raises(EvaluateError, match="0 columns are named 'Aquila2-70B'"):
        TABLES["chat"].column("Aquila2-70B")
    with pytest.raises(EvaluateError, match="2 columns"):
        TABLES["quantization"].column("AquilaChat2-34B")


# --- the shift


def test_the_final_image_is_the_first_one_moved_by_one_column():
    found = {match.offset: match for match in shifts(TABLES["base-image-first"], TABLES["base-image-final"])}
    right = found.pop(1)
    assert right.compared == 9 * 21
    # All but a lost cell, and the cell after it, which took its place.
    assert {(task, name) for task, name, *_ in right.different} == {("SEM", "Baichuan2-7B"), ("SEM", "InternLM-7B")}
    assert all(match.equal < match.compared * 0.15 for match in found.values())


def test_a_table_that_was_not_moved_matches_itself_where_it_is():
    table = TABLES["base-image-first"]
    best = max(shifts(table, table), key=lambda match: match.equal / match.compared)
    assert best.offset == 0 and best.equal == best.compared == 10 * 22 and not best.different


@pytest.mark.parametrize("row", MEANS)
def test_each_printed_mean_is_that_of_the_column_to_the_right(row):
    """The second proof, which needs the final image only; for the last name, the column was cut off."""
    table = TABLES["base-image-final"]
    owners = owners_of_means(table, row)
    for name, neighbour in zip(table.models[:-1], table.models[1:], strict=True):
        assert owners[name] == (neighbour,)
    assert owners[table.models[-1]] == ()


def test_the_means_of_a_right_table_are_each_their_own():
    table = aligned()
    assert all(owners == (name,) for name, owners in owners_of_means(table).items())


def test_aligned_puts_the_figures_under_their_names():
    table = aligned()
    assert table.column("Aquila2-7B")["MMLU"] == 58.10
    assert table.column("Baichuan2-13B")["MMLU"] == 56.90
    assert table.column("Baichuan2-7B")["SEM"] == 55.83
    assert table.column("Aquila2-34B v1.2")["GSM8K"] is None


# --- claims and intervals


def test_the_claims_of_the_news():
    found = {claim.task: claim for claim in claims()}
    assert round(found["Mean"].found, 1) == 4.7 and found["Mean"].claimed == 6.9
    assert round(found["Mean"].after - found["Mean"].before, 2) == pytest.approx(3.20, abs=0.011)
    assert {task for task, claim in found.items() if claim.holds} == {"BUSTM", "OCNLI", "TNEWS"}
    assert round(found["MMLU"].found, 1) == 8.8
    assert round(found["TruthfulQA"].found) == 21
    assert round(found["CSL"].found, 1) == 7.8


def test_what_thirty_items_can_tell():
    """65.6 against 69.4 looks like progress; of thirty items a task, each figure is uncertain by some 16 points."""
    rows = {(f.model, f.task): f for f in TABLES["reasoning"].figures()}
    value, low, high = rows["AquilaChat2-34B", "e-CARE"].interval()
    assert value == pytest.approx(20 / 30)
    # by the formula, written out: n = 30, p = 2/3, z = 1.96
    assert (low, high) == (pytest.approx(0.4878, abs=1e-3), pytest.approx(0.8077, abs=1e-3))
    assert rows["AquilaChat2-34B", "Mean"].interval() is None


def test_all_but_one_figure_of_the_reasoning_table_is_a_multiple_of_a_thirtieth():
    odd = [
        (f.model, f.task, f.value)
        for f in TABLES["reasoning"].figures()
        if f.task != "Mean" and abs(f.value - round(f.value * 0.3) / 0.3) > 0.051
    ]
    assert odd == [("AquilaChat2-34B", "bAbI 15", 63.6)]


def test_an_empty_cell_and_a_figure_in_seconds_have_no_interval():
    rows = {(f.model, f.task): f for f in TABLES["base-first"].figures()}
    assert rows["ChatGLM2-12B", "CMMLU"].interval() is None
    assert all(f.interval() is None for f in TABLES["finetuning"].figures())


@pytest.mark.parametrize(
    "first, second, gains, losses, p",
    [
        ("AquilaChat2-34B", "AquilaChat2-34B+SFT", 14, 1, 2 * (1 + 15) / 2**15),
        ("AquilaChat2-34B+SFT", "AquilaChat2-34B+SFT+CoT", 9, 2, 2 * (1 + 11 + 55) / 2**11),
    ],
)
def test_what_a_difference_of_a_few_items_can_say_at_best(first, second, gains, losses, p):
    """Items counted by hand from the README: of 30 each, 43.3 to 73.3 are 9 more, and so on; p by Pascal's triangle."""
    found = most_favourable(TABLES["reasoning"], first, second)
    assert (found.gains, found.losses) == (gains, losses)
    assert found.p == pytest.approx(p)
