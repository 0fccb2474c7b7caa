"""What the Sphinx hooks do to a page, without building one."""

import pytest
from docutils import nodes

SVG = """<?xml version="1.0"?>
<svg width="10pt" viewBox="0 0 10 10" xmlns="http://www.w3.org/2000/svg">
<title>Title &amp; more</title>
<metadata><dc:title>Title &amp; more</dc:title><dc:description>A line.</dc:description></metadata>
<defs><style type="text/css">*{stroke-linejoin: round}</style><clipPath id="c1"><rect/></clipPath></defs>
<g id="axes_1"><path d="M 0 0" style="fill: #0072b2" clip-path="url(#c1)"/><text style="fill: #1F2A37">时间</text></g>
</svg>"""


def test_a_figure_gets_a_name_and_unique_ids(hooks):
    page = hooks.figures.inline(SVG, prefix="f3-")
    assert page.startswith("<svg")
    assert 'role="img" aria-label="Title &amp; more A line."' in page
    assert 'id="f3-c1"' in page
    assert "url(#f3-c1)" in page
    assert "axes_1" not in page
    assert "<metadata" not in page
    assert "<style" not in page, "a style element would rule the whole page"
    assert ">时间<" in page


def test_a_figures_colours_become_variables(hooks):
    page = hooks.figures.inline(SVG)
    assert "fill: var(--figure-blue, #0072b2)" in page
    assert "fill: var(--figure-ink, #1F2A37)" in page


def test_fill_and_stroke_of_one_shape_share_its_style(hooks):
    svg = hooks.figures.inline('<svg><rect fill="#0072b2" stroke="#d55e00"/><path fill="#0072b2" style="x: 1"/></svg>')
    assert svg.count('style="') == 2
    assert 'style="fill: var(--figure-blue, #0072b2); stroke: var(--figure-orange, #d55e00)"' in svg
    assert 'style="fill: var(--figure-blue, #0072b2); x: 1"' in svg


@pytest.mark.parametrize(
    ("opening", "width"), [('<svg width="30pt">', 40), ('<svg viewBox="0 0 420 9">', 420), ('<svg width="5">', 5)]
)
def test_a_figures_own_width_is_known(hooks, opening, width):
    assert hooks.figures.natural_width(opening) == width


def test_a_chapters_alt_text_comes_first(hooks):
    assert 'aria-label="What the chapter says"' in hooks.figures.inline(SVG, "What the chapter says")


def test_the_figure_style_and_the_site_name_the_same_colours(hooks):
    plots = pytest.importorskip("aquila2_tut.show.plots")
    drawn = {plots.INK, plots.MUTED, plots.GRID, plots.PAPER, *plots.PALETTE, plots.ON_BLUE, plots.ON_COLOUR}
    assert drawn == set(hooks.figures.COLOURS)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("显存占用", ["显", "存", "占", "用", "显存", "存占", "占用"]),
        ("用 LoRA 微调", ["用", "LoRA", "微", "调", "微调"]),
        ("AquilaChat2-7B 有 32 层", ["AquilaChat2", "7B", "有", "32", "层"]),
        ("", []),
    ],
)
def test_text_is_cut_for_the_index(hooks, text, terms):
    assert hooks.search.BilingualSearch({}).split(text) == terms


@pytest.mark.parametrize(
    ("paragraph", "joined"),
    [
        (["三种规模，\n分基座"], "三种规模，分基座"),
        (["为什么", "\n", "这样"], "为什么这样"),
        (["a", "\n", "b。", "\n", "这样", "\n", "c"], "a\nb。这样\nc"),
        (["用 LoRA\n微调"], "用 LoRA\n微调"),
        (["two\nlines"], "two\nlines"),
        (["中文", "\nlatin"], "中文\nlatin"),
    ],
)
def test_chinese_lines_are_joined(hooks, paragraph, joined):
    node = nodes.paragraph()
    node += [nodes.Text(text) for text in paragraph]
    assert "".join(hooks.typography.join_lines(text) for text in list(node.children)) == joined


def test_labels_of_the_chinese_chapters_get_a_prefix(hooks, tmp_path):
    text = (
        "(here)=\n# A\n\n$$ x $$ (eq-a)\n\nSee {ref}`here`, {ref}`it <here>`, {eq}`eq-a`, [it](#here), {doc}`here`.\n"
        "```{exercise}\n:label: ex-a\n```\n```{solution} ex-a\n```\n"
    )
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    renamed = hooks.labels.rename(text, tmp_path)
    assert renamed.count("zh-here") == 4
    assert "(zh-here)=" in renamed
    assert "(zh-eq-a)" in renamed
    assert "{eq}`zh-eq-a`" in renamed
    assert ":label: zh-ex-a" in renamed
    assert "{solution} zh-ex-a" in renamed
    assert "{doc}`here`" in renamed, "a page is not a label"
