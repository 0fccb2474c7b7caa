"""The two languages say the same, and the gate that says so fails when it should."""

import copy
import json

import pytest


def prose(text):
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def code(text, *outputs, count=1):
    return {"cell_type": "code", "metadata": {}, "source": text, "execution_count": count, "outputs": list(outputs)}


def stream(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


def picture(svg):
    return {"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": svg, "text/plain": "[figure]"}}


FIGURE = "<svg><metadata><dc:description>{}</dc:description></metadata></svg>"
EXERCISE = "````{{exercise}} {}\n:label: ex-one\n{}\n````\n\n````{{solution}} ex-one\n:class: dropdown\n{}\n````"
SOFTMAX = "$$\n\\mathrm{softmax}(z)_i = \\frac{e^{z_i}}{\\sum_j e^{z_j}} \\quad \\text{WORD}\n$$ (eq-softmax)"

EN = [
    prose("# Title\n\n(here)=\n## First\n\nA head has size $d$, length $T$; {eq}`eq-softmax`, {ref}`here <here>`."),
    code("x = 1\nprint(x)", stream("1\n")),
    prose("## Second\n\n" + SOFTMAX.replace("WORD", "for all")),
    code("plot()", picture(FIGURE.format("a line"))),
    prose("```bash\nmake book  # builds\n```\n\n" + EXERCISE.format("Count", "How many $n$?", "Five.")),
]
ZH = [
    prose(
        "# 标题\n\n(here)=\n## 第一节\n\n见 {ref}`这里 <here>` 与 {eq}`eq-softmax`；长度为 $T$，每个头的大小是 $d$。"
    ),
    code("x = 1\nprint(x)", stream("1\n")),
    prose("## 第二节\n\n" + SOFTMAX.replace("WORD", "对所有")),
    code("plot()", picture(FIGURE.format("一条线"))),
    prose("```bash\nmake book  # 生成\n```\n\n" + EXERCISE.format("数一数", "$n$ 是多少？", "五。")),
]


def write(folder, english, chinese, name="chapter.ipynb"):
    for language, cells in (("en", english), ("zh", chinese)):
        (folder / language).mkdir(exist_ok=True)
        if cells is not None:
            (folder / language / name).write_text(json.dumps({"cells": cells, "nbformat": 4}), encoding="utf-8")


def test_the_book_says_the_same_in_both_languages(parity):
    assert not parity.problems(), "\n" + "\n".join(parity.problems())


def test_a_free_translation_is_no_difference(parity, tmp_path):
    write(tmp_path, EN, ZH)
    assert parity.problems(tmp_path) == []


def changed(cell, **fields):
    """The Chinese chapter with one cell changed."""
    cells = copy.deepcopy(ZH)
    cells[cell].update(fields)
    return cells


def said(cell, old, new):
    """The Chinese chapter with some words of one cell changed."""
    assert old in ZH[cell]["source"]
    return changed(cell, source=ZH[cell]["source"].replace(old, new))


@pytest.mark.parametrize(
    ("chinese", "message"),
    [
        (said(1, "x = 1", "x = 2"), "the code of cell 2 (en) and cell 2 (zh) differs in line 1"),
        (said(1, "print(x)", "print(x)  "), "differs in line 2"),
        (changed(1, metadata={"tags": ["hide"]}), "the metadata of cell 2 (en) and 2 (zh) differs"),
        (ZH[:3], "code cell 4 stands only in en"),
        ([*ZH, prose("再说一句。"), code("y = 2")], "code cell 7 stands only in zh"),
        (said(0, "## 第一节", "### 第一节"), "heading of level"),
        (said(0, "## 第一节", "第一节"), "heading of level"),
        (said(2, "e^{z_i}", "e^{z_j}"), "a formula differs"),
        (said(2, " (eq-softmax)", ""), "a formula differs"),
        (said(0, "$d$", "d"), "formula d stands in one language only"),
        (said(0, "`这里 <here>`", "`那里 <there>`"), "stands in one language only"),
        (said(0, "{eq}`eq-softmax`", "上式"), "{eq} to eq-softmax stands in one language only"),
        (said(0, "(here)=", "(there)="), "a label differs"),
        (said(4, "ex-one", "ex-two"), "differs"),
        (said(4, "{solution} ex-one\n:class: dropdown", "{note}"), "{solution} differs"),
        (said(4, "make book", "make lab"), "a code block (bash) differs"),
        (changed(4, source=ZH[4]["source"] + "\n\n![](picture.svg)"), "image without alt text"),
        (changed(4, source=ZH[4]["source"] + "\n\n```{figure} a.svg\n图\n```"), "figure without :alt:"),
        (changed(1, execution_count=None), "zh: code cell 2 has not been run"),
        (changed(1, outputs=[stream("x.py:3: UserWarning: old\n")]), "shows a warning or an error"),
        (changed(1, outputs=[stream("loading\n", "stderr")]), "shows a warning or an error"),
        (changed(1, outputs=[stream("Traceback (most recent call last):\n")]), "shows a warning or an error"),
        (changed(1, outputs=[{"output_type": "error", "ename": "KeyError", "evalue": "'a'"}]), "KeyError: 'a'"),
        (changed(3, outputs=[picture("<svg></svg>")]), "does not say what it shows"),
        ([ZH[0], ZH[1], code("y = 2"), *ZH[2:]], "does not follow a cell of prose"),
        (None, "stands only in en"),
    ],
)
def test_the_gate_fails(parity, tmp_path, chinese, message):
    write(tmp_path, EN, chinese)
    found = parity.problems(tmp_path)
    assert len(found) == 1
    assert found[0].startswith("chapter.ipynb: ")
    assert message in found[0]


def test_the_first_difference_is_shown_in_both_languages(parity, tmp_path):
    write(tmp_path, EN, said(2, "e^{z_i}", "e^{z_j}"))
    report = parity.problems(tmp_path)[0]
    assert "en cell 3" in report
    assert "zh cell 3" in report
    assert "e^{z_i}" in report


def test_markdown_pages_are_compared(parity, tmp_path):
    for language, text in (("en", "# A\n\n## B\n"), ("zh", "# 甲\n")):
        (tmp_path / language).mkdir()
        (tmp_path / language / "page.md").write_text(text, encoding="utf-8")
    assert "page.md: a heading of level differs" in parity.problems(tmp_path)[0]


def test_dollars_that_are_money_and_code_are_not_formulas(parity, tmp_path):
    english = [prose("It costs $5 or $6. Set `$HOME`.\n\n```bash\n# not a heading\necho $A $B\n```")]
    chinese = [prose("要五六块钱。设好 `$HOME`。\n\n```bash\n# 不是标题\necho $A $B\n```")]
    write(tmp_path, english, chinese)
    assert parity.problems(tmp_path) == []
