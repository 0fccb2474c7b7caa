"""The quantization planner: the browser counts as Python does, and a page without a kernel is worth clicking."""

import itertools
import json
import re
from dataclasses import asdict

import pytest
import traitlets
from html_words import Words
from widget_pages import KERNEL, run

from aquila2_tut.config import PRESETS, Aquila2Config, ConfigError
from aquila2_tut.memory import GPUS
from aquila2_tut.quant import FORMATS, predicted_bytes
from aquila2_tut.quant.sizes import KEPT, group_size, matrix_bytes
from aquila2_tut.show.widgets import quant_planner
from aquila2_tut.show.widgets.base import module_and_style
from aquila2_tut.show.widgets.planner import PLANNED, QuantPlanner, amount, model_facts

MODULE, STYLE = module_and_style("quant_planner")
CHOICES = ("model", "format", "keep", "tokens", "reserve")
SUBSETS = [(), ("embed_tokens",), ("lm_head",), KEPT]
LABELS = {  # language -> what the inputs are called
    "en": ("Model", "Format", "embedding", "head", "Tokens in the cache", "Reserve in GB"),
    "zh": ("模型", "格式", "嵌入", "输出层", "KV 缓存的词元数", "预留 GB 数"),
}


@pytest.fixture(scope="module")
def module_page(chromium):
    """A page in which the module's functions are global."""
    page = chromium.new_page()
    names = "matrixBytes, groupSize, modelBytes, allBytes, amount, cardText, widget"
    page.add_script_tag(content=f"{MODULE}\nObject.assign(globalThis, {{ {names} }});", type="module")
    page.wait_for_function("!!globalThis.amount")
    yield page
    page.close()


# ---------- the same numbers ----------


def test_the_browser_counts_every_model_in_every_format(module_page):
    facts, forms = {name: model_facts(name) for name in PRESETS}, {name: asdict(f) for name, f in FORMATS.items()}
    grid = list(itertools.product(PRESETS, FORMATS, SUBSETS))
    found = run(module_page, "([m, f, keep]) => modelBytes(m, f, keep)", [(facts[m], forms[f], k) for m, f, k in grid])
    for (name, kind, keep), terms in zip(grid, found, strict=True):
        assert terms == predicted_bytes(Aquila2Config.preset(name), kind, keep).terms, (name, kind, keep)


def test_the_browser_counts_matrices_of_any_shape(module_page):
    shapes = [(1, 1), (5, 7), (3, 100), (100008, 4096), (143973, 6144)]
    grid = list(itertools.product(FORMATS, shapes, (32, 64, 128)))
    found = run(module_page, "([f, s, g]) => matrixBytes(f, ...s, g)", [(asdict(FORMATS[f]), s, g) for f, s, g in grid])
    for (kind, shape, group), terms in zip(grid, found, strict=True):
        assert terms == matrix_bytes(FORMATS[kind], *shape, group)._asdict(), (kind, shape, group)


def test_the_browser_finds_the_same_groups(module_page):
    configs = [Aquila2Config.preset("Aquila2-Nano", intermediate_size=ffn) for ffn in (768, 736, 720, 700, 701)]
    grid = list(itertools.product(FORMATS, configs))
    shapes = [[[config.intermediate_size, 256], [256, config.intermediate_size]] for config in configs]
    data = list(itertools.product(map(asdict, FORMATS.values()), shapes))
    found = run(module_page, "([f, shapes]) => groupSize(f, { shapes })", data)
    assert found == [group_size(FORMATS[kind], config) for kind, config in grid]


def test_the_texts_are_the_same(module_page):
    counts = [0, 1, 999, 1000, 1024, 1e6 - 1, 1048576, 123456789, 999_999_999, 1e9, 2**30, 67387109376, 1.5e12, 2e15]
    for base in (1000, 1024):
        assert run(module_page, f"n => amount(n, {base})", counts) == [amount(count, base) for count in counts]


def test_the_cards_cope_alike(module_page):
    planners = [quant_planner(name, kind, tokens=tokens) for name, kind, tokens in CASES]
    data = [[p.terms(), p.models[list(PRESETS).index(p.model)], usable] for p in planners for _, usable in p.gpus]
    words = json.dumps(planners[0].words)
    found = run(module_page, f"([terms, model, usable]) => cardText(terms, usable, model, {words})", data)
    assert found == [p.fits(usable) for p in planners for _, usable in p.gpus]
    assert {text[0] for text in found} == {"✓", "✗"}


CASES = [
    ("AquilaChat2-34B", "nf4-dq", 4096),
    ("Aquila2-70B-Expr", "bf16", 0),
    ("AquilaChat2-7B", "int8", 2048),
    ("SmolLM2-135M", "gptq-3", 100_000),
    ("Aquila2-Nano", "fp32", 1),
]


# ---------- what it says ----------


def test_the_34b_needs_more_than_a_t4():
    planner = quant_planner("aquilachat2-34b", "nf4-dq", tokens=4096)
    terms = planner.terms()
    assert sum(terms.values()) == 19_206_872_976 + 4096 * 245_760 + 10**9
    assert planner.fits(GPUS["T4"].usable) == f"✗ lacks {amount(sum(terms.values()) - 15 * 2**30)}"
    room = int(re.sub(r"\D", "", planner.fits(GPUS["RTX 3090"].usable)))
    filled = quant_planner("aquilachat2-34b", "nf4-dq", tokens=room)
    assert 0 <= GPUS["RTX 3090"].usable - sum(filled.terms().values()) < 245_760


@pytest.mark.parametrize(
    ("count", "base", "text"),
    [(19.7e9, 1000, "19.70 GB"), (2**34, 1024, "16.00 GiB"), (245760, 1000, "245.76 kB"), (0, 1024, "0.00 KiB")],
)
def test_amounts(count, base, text):
    assert amount(count, base) == text


def test_what_is_not_known():
    with pytest.raises(ConfigError, match="Aquila2-34B"):
        quant_planner("Aquila2-43B")
    with pytest.raises(traitlets.TraitError, match="nf5"):
        quant_planner(format="nf5")
    with pytest.raises(traitlets.TraitError, match="norm"):
        quant_planner(keep=["norm"])
    with pytest.raises(traitlets.TraitError):
        quant_planner(tokens=-1)


@pytest.mark.parametrize("language", LABELS)
def test_the_stored_output_stands_without_scripts(monkeypatch, language):
    monkeypatch.setenv("AQUILA2_TUT_LANG", language)
    planner = quant_planner()
    assert planner.stored_html() == quant_planner().stored_html(), "the output differs from run to run"
    page = Words(planner.stored_html())
    assert set(page.data) == set(QuantPlanner.state)
    text = " ".join(page.words)
    assert planner.summary() in text and all(name in text for name in GPUS)
    assert ("缓存" in text) == (language == "zh")


def test_the_words_name_everything():
    words = quant_planner().words
    assert tuple(words["formats"]) == PLANNED
    assert set(words["terms"]) == set(quant_planner().terms())


def test_the_style_reaches_nothing_but_the_widget():
    plain = re.sub(r"@media[^{]+\{(.*?\})\s*\}", r"\1", STYLE, flags=re.S)
    rules = re.findall(r"(?:^|\}|\*/)\s*([^{}/]+)\{", plain)
    assert len(rules) > 20
    assert all(part.strip().startswith(".quant-planner") for rule in rules for part in rule.split(","))


# ---------- with a kernel ----------


@pytest.fixture
def kernel_page(module_page):
    """The planner with a kernel of ours."""
    planner = quant_planner()
    module_page.evaluate(KERNEL, [{name: getattr(planner, name) for name in QuantPlanner.state}, list(CHOICES)])
    return module_page


def test_what_python_changes_is_shown(kernel_page):
    kernel_page.evaluate("""() => {
      model.set("model", "Aquila2-7B"); model.set("keep", []); model.set("tokens", 10); model.set("format", "int8");
    }""")
    assert seen(kernel_page) == first_look(quant_planner("Aquila2-7B", "int8", keep=[], tokens=10))
    assert kernel_page.locator("select").first.input_value() == "Aquila2-7B"
    assert kernel_page.evaluate("model.saved") == []


def test_python_hears_of_what_is_chosen(kernel_page):
    kernel_page.get_by_label("head", exact=True).uncheck()
    kernel_page.get_by_label("Reserve in GB").fill("2.5")
    assert kernel_page.evaluate("model.saved.at(-1)") == ["AquilaChat2-34B", "nf4-dq", ["embed_tokens"], 4096, 2.5]
    planner = quant_planner()  # which takes them as they come
    for name, value in zip(CHOICES, ("Aquila2-7B", "nf4", [], 1, 2), strict=True):
        setattr(planner, name, value)
    assert sum(planner.terms().values()) > 2e9


def test_a_widget_that_is_gone_no_longer_listens(kernel_page):
    assert kernel_page.evaluate("(end(), count())") == 0


def test_jupyter_gets_the_live_widget_and_a_page_the_html():
    data, _ = quant_planner()._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"}
    assert "19.21 GB" in data["text/plain"]


# ---------- a page without a kernel ----------


@pytest.fixture
def static_page(open_stored, monkeypatch):
    """Opens the stored output as the book's pages have it, from a file."""

    def open_page(language, width=1280, **choices):
        monkeypatch.setenv("AQUILA2_TUT_LANG", language)
        return open_stored(quant_planner(**choices).stored_html(), width)

    return open_page


def seen(page):
    """The words of the sentence, the terms and the cards."""
    rows = page.locator(".quant-planner tr").evaluate_all(
        "rows => rows.map(row => row.innerText.split(/\\s+/).join(' '))"
    )
    return [page.locator(".summary").inner_text(), *(row.strip() for row in rows)]


def first_look(planner):
    """The same of the stored output, by Python."""
    html = planner.first_look()
    rows = re.findall(r"<tr.*?</tr>", html)
    words = [" ".join(" ".join(Words(row).words).split()) for row in rows]
    return [planner.summary(), *words]


@pytest.mark.parametrize("language", LABELS)
def test_the_page_shows_what_python_wrote(static_page, language):
    for name, kind, tokens in CASES:
        page = static_page(language, model=name, format=kind, tokens=tokens)
        assert seen(page) == first_look(quant_planner(name, kind, tokens=tokens))
        assert not page.errors


@pytest.mark.parametrize("language", LABELS)
def test_every_input_counts(static_page, language):
    page = static_page(language)
    model, form, embedding, head, tokens, reserve = LABELS[language]
    page.get_by_label(model, exact=True).select_option("SmolLM2-135M")
    page.get_by_label(form, exact=True).select_option("int8")
    page.get_by_label(tokens).fill("1000")
    page.get_by_label(reserve).fill("0.5")
    page.get_by_label(head, exact=True).uncheck()
    planner = quant_planner("SmolLM2-135M", "int8", keep=["embed_tokens"], tokens=1000)
    planner.reserve = 0.5
    assert seen(page) == first_look(planner)
    assert planner.words["tied"] in page.locator(".notes").inner_text()
    page.get_by_label(embedding, exact=True).uncheck()
    planner.keep = []
    assert seen(page) == first_look(planner)
    page.get_by_label(form, exact=True).select_option("bf16")
    assert page.get_by_label(head, exact=True).is_disabled()
    planner.format = "bf16"
    assert seen(page) == first_look(planner)
    assert not page.errors


@pytest.mark.parametrize(("typed", "meant"), [("", 0), ("-5", 0), ("1e3", 1000), ("12.7", 12), ("1e30", 10_000_000)])
def test_odd_numbers_do_no_harm(static_page, typed, meant):
    page = static_page("en")
    page.get_by_label("Tokens in the cache").fill(typed)
    assert seen(page) == first_look(quant_planner(tokens=meant))
    assert not page.errors


def test_heads_that_are_shared_make_a_small_cache(static_page):
    page = static_page("en", model="AquilaChat2-34B")
    assert "48 query heads, 8 key-value heads: 245.76 kB" in page.locator(".notes").inner_text()


@pytest.mark.parametrize("language", LABELS)
def test_the_keyboard_reaches_everything(static_page, language):
    page = static_page(language)
    page.locator("select").first.focus()
    kinds = []
    for _ in range(6):
        kinds.append(page.evaluate("document.activeElement.type"))
        page.keyboard.press("Tab")
    assert kinds == ["select-one", "select-one", "checkbox", "checkbox", "number", "number"]
    page.locator("select").nth(1).focus()
    before = page.locator(".summary").inner_text()
    page.keyboard.press("ArrowDown")
    assert page.locator(".summary").inner_text() != before


@pytest.mark.parametrize("language", LABELS)
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window(static_page, language, width):
    page = static_page(language, width=width, format="gptq-4")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shares = page.locator(".bar span").evaluate_all("parts => parts.map(part => part.getBoundingClientRect().width)")
    terms = [count for count in quant_planner(format="gptq-4").terms().values() if count]
    assert shares[0] / sum(shares) == pytest.approx(terms[0] / sum(terms), abs=0.03)
    assert min(shares) >= 1
