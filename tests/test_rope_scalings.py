"""The picture of the frequencies: its numbers are the model's, in Python and in the browser, and it needs no kernel."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
import traitlets
from html_words import Words
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from widget_pages import KERNEL, run

from aquila2_tut.config import PRESETS, Aquila2Config, ConfigError
from aquila2_tut.model import attention_factor, inverse_frequencies
from aquila2_tut.show.widgets import rope_scalings
from aquila2_tut.show.widgets.base import FOLDER, module_and_style
from aquila2_tut.show.widgets.memory import figure
from aquila2_tut.show.widgets.rope import CONTROLS, METHODS, RopeScalings, rope_rules, rope_shape, stretch

MODULE, STYLE = module_and_style("rope_scalings")
WORDS = json.loads((FOLDER / "rope_scalings.json").read_text(encoding="utf-8"))
FACTORS = (1, 1.5, 2, 3.7, 4, 8, 11.25, 16)
GRID = list(itertools.product(PRESETS, METHODS, FACTORS))
SHAPES = ("Aquila2-Nano", "AquilaChat2-34B", "SmolLM2-135M", "Aquila2-7B-2024-06")


def scaled(model, method, factor):
    """The configuration of a setting, as a model is built from it."""
    return Aquila2Config.preset(model).stretched("default" if method == "none" else method, factor)


def float64_wavelengths(config, length):
    """From the model's own frequencies."""
    return 2 * math.pi / inverse_frequencies(config, length).double().numpy()


@pytest.fixture(scope="module")
def module_page(chromium):
    """A page in which the module's functions and the constants are global."""
    page = chromium.new_page()
    given = f"Object.assign(globalThis, {{ stretch, figure, widget, rules: {json.dumps(rope_rules())} }});"
    page.add_script_tag(content=f"{MODULE}\n{given}", type="module")
    page.wait_for_function("!!globalThis.rules")
    yield page
    page.close()


# ---------- the same numbers ----------


def test_wavelengths_are_those_of_the_model():
    for model, method, factor in GRID:
        found = stretch(model, method, factor)
        plain, config = scaled(model, "none", 1), scaled(model, method, factor)
        assert found.length == int(plain.max_position_embeddings * factor)
        np.testing.assert_allclose(found.before, float64_wavelengths(plain, 0), rtol=1e-6)
        np.testing.assert_allclose(found.after, float64_wavelengths(config, found.length), rtol=2e-6)


def test_the_browser_counts_as_the_model_does(module_page):
    assert len(GRID) > 200
    data = [[rope_shape(model), method, factor] for model, method, factor in GRID]
    theirs = run(module_page, "([model, method, factor]) => stretch(model, method, factor, rules)", data)
    for (model, method, factor), told in zip(GRID, theirs, strict=True):
        config, found = scaled(model, method, factor), stretch(model, method, factor)
        frequencies = float64_wavelengths(config, found.length)
        np.testing.assert_allclose(told["after"], frequencies, rtol=2e-6, err_msg=f"{model} {method} {factor}")
        np.testing.assert_allclose(told["after"], found.after, rtol=1e-12, err_msg=f"{model} {method} {factor}")
        np.testing.assert_allclose(told["before"], found.before, rtol=1e-12)
        assert (told["length"], told["beyond"]) == (found.length, found.beyond), (model, method, factor)
        assert told["slow"] == (float64_wavelengths(scaled(model, "none", 1), 0) > config.trained_length).sum()
        assert told["sharper"] == pytest.approx(attention_factor(config) ** 2, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_unknown_angles_are_those_that_no_trained_position_has(method):
    for model, factor in itertools.product(SHAPES, (1, 1.5, 3.7, 4)):
        found = stretch(model, method, factor)
        plain, trained = inverse_frequencies(scaled(model, "none", 1)).double(), found.config.trained_length
        angles = torch.arange(found.length)[:, None] * inverse_frequencies(found.config, found.length).double()
        limits = torch.where(plain * trained < 2 * math.pi, plain * trained, math.inf)
        # float32 frequencies know an angle to one part in 10^7
        most, least = ((angles >= limits * (1 + slack)).sum(0).tolist() for slack in (-1e-6, 1e-6))
        assert all(low <= count <= high for low, count, high in zip(least, found.beyond, most, strict=True))


def test_a_pair_that_turned_once_has_seen_every_angle():
    found = stretch("Aquila2-7B", "none", 8)
    assert found.slow.sum() == 64 - 41  # the model's chapter counts 41 that came full circle
    assert max(found.beyond) == 7 * 2048
    assert [bool(count) for count in found.beyond] == found.slow.tolist()


@pytest.mark.parametrize("factor", FACTORS)
def test_linear_and_yarn_leave_no_angle_unknown(factor):
    for model in PRESETS:
        assert not any(stretch(model, "linear", factor).beyond)
        assert not any(stretch(model, "yarn", factor).beyond)


def test_the_temperature_is_that_of_transformers():
    config = scaled("Aquila2-7B", "yarn", 8.0)
    _, reference = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    values = rope_scalings(method="yarn", factor=8).values()
    assert values["sharper"] == figure(reference**2) == "1.46"
    assert values["temperature"] == figure(1 / reference**2) == "0.685"


def test_figures_are_the_same(module_page):
    values = [0.00123, 0.685, 0.99951, 1, 6.2832, 9.995, 12.345, 99.95, 100, 1234.5, 54410.2, 7.5e12]
    assert run(module_page, "x => figure(x)", values) == [figure(value) for value in values]


# ---------- what it says ----------


def test_a_released_scaling_comes_with_its_model():
    assert rope_shape("AquilaChat2-7B-16K")["own"] == ["linear", 8.0]
    widget = rope_scalings("aquilachat2-34b-16k")
    assert (widget.method, widget.factor) == ("linear", 4)
    assert rope_scalings("AquilaChat2-34B-16K", "yarn").method == "yarn"
    assert rope_shape("Aquila2-7B")["own"] is None


def test_what_is_not_known():
    with pytest.raises(ConfigError, match="Aquila2-34B"):
        rope_scalings("Aquila2-43B")
    with pytest.raises(traitlets.TraitError, match="longrope"):
        rope_scalings(method="longrope")
    for factor in (0, 0.9, 16.5):
        with pytest.raises(traitlets.TraitError):
            rope_scalings(factor=factor)


def test_both_languages_say_the_same_things():
    def gaps(words):
        if isinstance(words, dict):
            return {name: gaps(word) for name, word in words.items()}
        return len(words) if isinstance(words, list) else sorted(re.findall(r"\{\w+\}", words))

    assert gaps(WORDS["en"]) == gaps(WORDS["zh"])


@pytest.mark.parametrize(("language", "word"), [("en", "1,024"), ("zh", "词元")])
def test_the_stored_output_stands_without_scripts(monkeypatch, language, word):
    monkeypatch.setenv("AQUILA2_TUT_LANG", language)
    stored = rope_scalings("Aquila2-Nano", "yarn", 2).stored_html()
    assert stored == rope_scalings("Aquila2-Nano", "yarn", 2).stored_html(), "the output differs from run to run"
    page = Words(stored)
    assert set(page.data) == set(RopeScalings.state)
    text = " ".join(page.words)
    assert word in rope_scalings("Aquila2-Nano", "yarn", 2).summary() in text
    assert stored.count("<tr>") == 1 + 32


def test_the_style_reaches_nothing_but_the_widget():
    plain = re.sub(r"@media[^{]+\{(.*?\})\s*\}", r"\1", STYLE, flags=re.S)
    rules = re.findall(r"(?:^|\}|\*/)\s*([^{}/]+)\{", plain)
    assert len(rules) > 20
    assert all(part.strip().startswith(".rope-scalings") for rule in rules for part in rule.split(","))


def test_jupyter_gets_the_live_widget_and_a_page_the_html():
    data, _ = rope_scalings()._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"}
    assert "23 of 64 pairs" in data["text/plain"]


# ---------- with a kernel ----------


@pytest.fixture
def kernel_page(module_page):
    """The widget with a kernel of ours."""
    widget = rope_scalings()
    module_page.evaluate(KERNEL, [{name: getattr(widget, name) for name in RopeScalings.state}, list(CONTROLS)])
    return module_page


def test_what_python_changes_is_shown(kernel_page):
    kernel_page.evaluate("""() => {
      model.set("model", "SmolLM2-135M"); model.set("method", "ntk"); model.set("factor", 3);
    }""")
    assert seen(kernel_page) == first_look(rope_scalings("SmolLM2-135M", "ntk", 3))
    assert kernel_page.get_by_role("slider").input_value() == "3"
    assert kernel_page.evaluate("model.saved") == []


def test_python_hears_of_what_makes_sense_and_of_nothing_else(kernel_page):
    kernel_page.get_by_label("Factor", exact=True).fill("17")
    assert kernel_page.evaluate("model.saved") == []
    kernel_page.get_by_label("Factor", exact=True).fill("2.5")
    kernel_page.get_by_label("Method").select_option("yarn")
    values = dict(zip(CONTROLS, kernel_page.evaluate("model.saved.at(-1)"), strict=True))
    assert values == {"model": "Aquila2-7B", "method": "yarn", "factor": 2.5}
    widget = rope_scalings()
    for name, value in values.items():  # which takes them as they come
        setattr(widget, name, value)
    assert widget.summary() == rope_scalings(**values).summary()


def test_a_widget_that_is_gone_no_longer_listens(kernel_page):
    kernel_page.evaluate("document.querySelector('.picture svg').id = 'last'")
    assert kernel_page.evaluate("(end(), count())") == 0
    kernel_page.evaluate("""() => {
      document.querySelector('.rope-scalings').style.width = '300px';
      return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
    }""")
    assert kernel_page.locator("#last").count() == 1


# ---------- a page without a kernel ----------


@pytest.fixture
def static_page(open_stored, monkeypatch):
    """Opens the stored output as the book's pages have it, from a file."""

    def open_page(language, width=1280, **choices):
        monkeypatch.setenv("AQUILA2_TUT_LANG", language)
        return open_stored(rope_scalings(**choices).stored_html(), width)

    return open_page


def flat(text):
    return "".join(text.split())


def seen(page):
    """The words of the sentence, the table and the note."""
    parts = page.locator(".rope-scalings :is(output, tr, .note)")
    return sorted(flat(text) for text in parts.evaluate_all("parts => parts.map(part => part.textContent)"))


def first_look(widget):
    """The same of the stored output, by Python."""
    parts = re.findall(r"<output.*?</output>|<tr.*?</tr>|<p .*?</p>", widget.first_look())
    return sorted(flat("".join(Words(part).words)) for part in parts)


@pytest.mark.parametrize("language", WORDS)
def test_the_page_shows_what_python_wrote(static_page, language):
    for model, method, factor in (*zip(SHAPES, METHODS, (2, 5.5, 16, 3), strict=False), ("Aquila-33B", "yarn", 1)):
        case = {"model": model, "method": method, "factor": factor}
        page = static_page(language, **case)
        assert seen(page) == first_look(rope_scalings(**case))
        assert not page.errors


@pytest.mark.parametrize("language", WORDS)
def test_every_control_counts(static_page, language):
    page, fields = static_page(language), WORDS[language]["fields"]
    page.get_by_label(fields["model"], exact=True).select_option("SmolLM2-135M")
    assert seen(page) == first_look(rope_scalings("SmolLM2-135M", "linear", 8))
    page.get_by_label(fields["method"], exact=True).select_option("dynamic")
    assert seen(page) == first_look(rope_scalings("SmolLM2-135M", "dynamic", 8))
    page.get_by_label(fields["factor"], exact=True).fill("3.25")
    assert seen(page) == first_look(rope_scalings("SmolLM2-135M", "dynamic", 3.25))
    page.get_by_label(fields["slider"], exact=True).fill("12.5")
    assert page.get_by_label(fields["factor"], exact=True).input_value() == "12.5"
    assert seen(page) == first_look(rope_scalings("SmolLM2-135M", "dynamic", 12.5))
    page.get_by_label(fields["model"], exact=True).select_option("AquilaChat2-34B-16K")
    assert seen(page) == first_look(rope_scalings("AquilaChat2-34B-16K"))
    assert page.get_by_label(fields["slider"], exact=True).input_value() == "4"
    assert not page.errors


@pytest.mark.parametrize("language", WORDS)
def test_what_makes_no_sense_is_one_line(static_page, language):
    page, words = static_page(language), WORDS[language]
    factor = page.get_by_label(words["fields"]["factor"], exact=True)
    for typed in ("0", "17", "", "-3", "1e30"):
        factor.fill(typed)
        assert page.get_by_role("status").inner_text().startswith(words["fields"]["factor"])
        assert factor.get_attribute("aria-invalid") == "true"
        assert not page.locator(".picture").is_visible()
    factor.fill("2")
    assert seen(page) == first_look(rope_scalings(factor=2))
    assert page.locator(".picture").is_visible()
    assert not page.errors


@pytest.mark.parametrize("language", WORDS)
def test_the_keyboard_reaches_everything(static_page, language):
    page = static_page(language)
    page.get_by_label(WORDS[language]["fields"]["model"], exact=True).focus()
    kinds = []
    for _ in range(4):
        kinds.append(page.evaluate("document.activeElement.type"))
        page.keyboard.press("Tab")
    assert kinds == ["select-one", "select-one", "range", "number"]
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.get_by_role("slider").focus()
    page.keyboard.press("ArrowRight")
    assert seen(page) == first_look(rope_scalings(factor=8.5))


# ---------- the picture ----------


def place(page, selector, *names):
    """Where the parts of the picture stand, as numbers."""
    code = "(parts, names) => parts.map(part => names.map(name => Number(part.getAttribute(name))))"
    return np.array(page.locator(f".picture {selector}").evaluate_all(code, list(names)))


@pytest.mark.parametrize("method", METHODS)
def test_every_pair_and_both_lengths_stand_where_their_wavelength_is(static_page, method):
    page, found = static_page("en", method=method, factor=4), stretch("Aquila2-7B", method, 4)
    before, ways = place(page, ".before", "cx", "cy"), place(page, ".way", "x1", "y2")
    assert len(before) == len(ways) == 64
    assert np.all(np.diff(before[:, 0]) > 0)
    slope, start = np.polyfit(np.log(found.before), before[:, 1], 1)
    assert slope < 0
    np.testing.assert_allclose(before[:, 1], start + slope * np.log(found.before), atol=1e-6)
    np.testing.assert_allclose(ways[:, 1], start + slope * np.log(found.after), atol=1e-6)
    for name, length in (("trained", 2048), ("stretched", found.length)):
        ((height,),) = place(page, f".{name}", "y1")
        assert height == pytest.approx(start + slope * math.log(length))
    assert page.locator(".picture .beyond").count() == sum(map(bool, found.beyond))
    assert page.locator(".picture .after").count() == sum(not count for count in found.beyond)


@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window(static_page, language, width):
    for method, factor in (("none", 1.5), ("dynamic", 16)):
        page = static_page(language, width=width, model="Aquila2-7B-2024-06", method=method, factor=factor)
        page.locator("details summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        frame = page.locator(".picture svg").bounding_box()
        boxes = page.locator(".picture :is(text, circle, polygon)").evaluate_all(
            """parts => parts.map(part => part.getBoundingClientRect())
                .map(box => [box.left, box.right, box.top, box.bottom])"""
        )
        left, right, top, bottom = np.array(boxes).T
        assert left.min() >= frame["x"] - 1
        assert right.max() <= frame["x"] + frame["width"] + 1
        assert top.min() >= frame["y"] - 1
        assert bottom.max() <= frame["y"] + frame["height"] + 1


def test_the_numbers_of_close_lengths_do_not_touch(static_page):
    page = static_page("en", factor=1.5)
    upper, lower = (page.locator(f".picture text:text-is('{number}')").bounding_box() for number in ("3,072", "2,048"))
    assert upper["y"] + 12 <= lower["y"]  # of 12 pixels each
    page = static_page("en", factor=1)
    assert page.locator(".picture text:text-is('2,048')").count() == 1


def test_the_picture_follows_the_window(static_page):
    page = static_page("en")
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function("document.querySelector('.picture svg').clientWidth < 390")
    assert page.locator(".picture .before").count() == 64
