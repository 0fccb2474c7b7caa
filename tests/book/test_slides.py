"""The workshop's kit: slides made from marked cells, its page, and the handout that is one page of paper."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOOK, SITE = ROOT / "book", ROOT / "_build/html"
LANGUAGES = {"en": "en", "zh": "zh-CN"}
CHAPTER = "lora_vs_qlora"

nbformat = pytest.importorskip("nbformat")


def cells_of(language):
    return nbformat.read(BOOK / language / f"{CHAPTER}.ipynb", as_version=4).cells


def notebook(*cells):
    return nbformat.v4.new_notebook(cells=list(cells))


def prose(text, kind=None, **metadata):
    if kind:
        metadata["slideshow"] = {"slide_type": kind}
    return nbformat.v4.new_markdown_cell(text, metadata=metadata)


def code(source, kind, svg):
    output = nbformat.v4.new_output("display_data", data={"image/svg+xml": svg})
    return nbformat.v4.new_code_cell(source, outputs=[output], metadata={"slideshow": {"slide_type": kind}})


@pytest.fixture(scope="module")
def slides(hooks):
    pytest.importorskip("nbconvert")
    return hooks.slides


def test_only_marked_cells_become_slides(slides):
    page = slides.slides_of(
        notebook(
            prose("# First", "slide"), prose("left out"), prose("long prose", "slide", slide=["## Short", "", "few"])
        ),
        "en",
        "../_static",
    )
    assert "First" in page
    assert "few" in page
    assert "left out" not in page
    assert "long prose" not in page
    assert "<title>First</title>" in page


def test_code_shows_its_output_and_a_figure_says_what_it_is(slides):
    about = "<title>A</title><desc>line</desc>"
    svg = f'<svg width="9pt">{about}<defs><clipPath id="c"/></defs><g clip-path="url(#c)"/></svg>'
    cells = [code("secret()", "slide", svg), code("secret()", "-", svg)]
    page = slides.slides_of(notebook(prose("# T", "slide"), *cells), "en", "_static")
    assert "secret" not in page
    assert page.count('aria-label="A line"') == 2
    ids = re.findall(r'<clippath id="([^"]+)"', page, re.IGNORECASE)
    assert len(ids) == len(set(ids)) == 2
    assert all(f"url(#{name})" in page for name in ids)


def test_a_page_of_slides_names_no_other_host(slides):
    page = slides.slides_of(notebook(prose("# $x$", "slide")), "zh-CN", "../_static")
    assert not re.findall(r'(?:src|href)="?(?:https?:)?//', page)
    assert '<html lang="zh-CN">' in page


def test_reveal_is_copied_with_its_licence(slides, tmp_path):
    from aquila2_tut import assets

    try:
        slides.copy_reveal(tmp_path)
    except Exception as error:
        if assets.verify(slides.ASSET) == "absent":
            pytest.skip(str(error))
        raise
    assert "MIT" in (tmp_path / "reveal.js").read_text(encoding="utf-8")[:200]
    assert "Permission is hereby granted" in (tmp_path / "LICENSE").read_text(encoding="utf-8")


def test_a_build_without_reveal_says_how_to_get_it(slides, tmp_path, monkeypatch):
    monkeypatch.setenv("AQUILA2_TUT_HOME", str(tmp_path / "empty"))
    with pytest.raises(Exception, match="slides need reveal.js.*assets fetch revealjs"):
        slides.copy_reveal(tmp_path / "out")


def test_both_languages_have_the_same_slides(slides):
    ours, theirs = (
        [
            (cell.id, cell.metadata["slideshow"]["slide_type"])
            for cell in cells_of(language)
            if cell.metadata.get("slideshow")
        ]
        for language in LANGUAGES
    )
    assert ours == theirs
    assert len(ours) > 15


@pytest.mark.parametrize("language", LANGUAGES)
def test_marked_prose_has_words_for_a_slide(language):
    for cell in cells_of(language):
        if cell.cell_type == "markdown" and cell.metadata.get("slideshow"):
            lines = cell.metadata["slide"]
            assert lines[0].startswith("#"), cell.id
            assert any("\u4e00" <= c <= "\u9fff" for c in "".join(lines)) == (language == "zh"), cell.id


@pytest.mark.parametrize("language", LANGUAGES)
def test_exercises_and_the_workshops_page_name_every_question(language):
    from aquila2_tut.memory.questions import QUESTIONS

    chapter = "".join(cell.source for cell in cells_of(language))
    for page in (
        chapter,
        *((BOOK / language / f"{name}.md").read_text("utf-8") for name in ("workshop", "workshop_handout")),
    ):
        assert not [name for name in QUESTIONS if name not in page]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_handouts_figures_are_those_of_the_formula(language):
    from aquila2_tut import Aquila2Config
    from aquila2_tut.memory.compared import linear_weights, penalty_seconds, saved_bytes
    from aquila2_tut.memory.setting import setting

    page = (BOOK / language / "workshop_handout.md").read_text(encoding="utf-8")
    rows = [
        [part.strip() for part in line.split("|")[1:-1]] for line in page.splitlines() if re.search(r"\$\d+/T\$", line)
    ]
    assert len(rows) == 3
    for model, weights, saved, _, card, bandwidth, lost, share in rows:
        config = Aquila2Config.preset(re.match(r"[\w.-]+", model)[0].replace("，", ""))
        wanted = setting(model="AquilaChat2-7B", gpu=card)
        assert f"{linear_weights(config) / 1e9:.3f}" == weights
        assert f"{saved_bytes(config, 4 if 'b = 4' in model else 2) / 1e9:.3f}" == saved
        assert f"{wanted.card.bandwidth / 1e9:,.0f}" == bandwidth
        assert f"{penalty_seconds(wanted) * 1e3:.1f}" == lost
        assert f"${1.25 * wanted.card.flops / wanted.card.bandwidth:.0f}/T$" == share


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("size", [(1280, 720), (1024, 768)], ids=str)
def test_slides_open_from_a_folder_and_nothing_overflows(browser, language, size):
    context = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True)))
    page, outside, errors = context.new_page(), [], []
    page.on("request", lambda request: None if request.url.startswith(SITE.as_uri()) else outside.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((SITE / language / "slides" / f"{CHAPTER}.html").as_uri(), wait_until="load")
    page.wait_for_selector("mjx-container svg", state="attached")
    figures = 0
    for number in range(page.evaluate("Reveal.getTotalSlides()")):
        page.evaluate(f"Reveal.slide({number})")
        bottom, right, drawn = page.evaluate(
            """() => { const slide = Reveal.getCurrentSlide(), boxes = [...slide.querySelectorAll('*')]
               .map(e => e.getBoundingClientRect()).filter(b => b.width && b.height);
               const bottom = Math.max(...boxes.map(b => b.bottom)), right = Math.max(...boxes.map(b => b.right));
               return [bottom / innerHeight, right / innerWidth, slide.querySelectorAll('svg.book-figure').length]; }"""
        )
        assert 0.05 < bottom <= 1, f"slide {number + 1} ends at {bottom:.0%} of the height"
        assert right <= 1, f"slide {number + 1} ends at {right:.0%} of the width"
        figures += drawn
    assert figures >= 4
    assert page.locator("html").get_attribute("lang") == LANGUAGES[language]
    assert (outside, errors) == ([], [])
    context.close()


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_workshops_page_leads_to_the_slides(browser, language):
    page = browser.new_page()
    page.goto((SITE / language / "workshop.html").as_uri())
    page.locator("article a[href='slides/lora_vs_qlora.html']").click()
    page.wait_for_function("window.Reveal && Reveal.isReady()")
    page.close()


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_handout_is_one_page_of_a4(browser, language, tmp_path):
    page = browser.new_page()
    page.goto((SITE / language / "workshop_handout.html").as_uri(), wait_until="load")
    page.wait_for_selector("mjx-container svg")
    file = tmp_path / "handout.pdf"
    page.pdf(path=file, format="A4")
    page.close()
    assert len(re.findall(rb"/Type\s*/Page\b", file.read_bytes())) == 1
