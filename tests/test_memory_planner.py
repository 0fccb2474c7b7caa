"""The memory planner: the browser counts as Python does, says what makes no sense, and needs no kernel."""

import json
import random
import re

import pytest
import traitlets
from html_words import Words
from widget_pages import KERNEL, run

from aquila2_tut.config import PRESETS
from aquila2_tut.memory import GPUS, RehearsalError
from aquila2_tut.memory.formula import formula_of
from aquila2_tut.memory.pace import pace_of
from aquila2_tut.memory.setting import LOSSES, OPTIMIZERS, STRATEGIES, setting
from aquila2_tut.show.widgets import memory_planner
from aquila2_tut.show.widgets.base import FOLDER, module_and_style
from aquila2_tut.show.widgets.memory import CONTROLS, TARGETS, MemoryPlanner, cards, figure, model_shape, rules

MODULE, STYLE = module_and_style("memory_planner")
WORDS = json.loads((FOLDER / "memory_planner.json").read_text(encoding="utf-8"))
CHOICES = ("recipe", *CONTROLS, "price")
VALUES = {  # of the fields of a setting, those without a control too
    "method": ("full", "lora", "qlora"),
    "batch_size": (1, 3, 4, 32),
    "seq_len": (1, 127, 512, 2048),
    "r": (1, 8, 64),
    "targets": (*TARGETS, "o_proj down_proj", "k_proj"),
    "loss": LOSSES,
    "optimizer": OPTIMIZERS,
    "checkpointing": (True, False),
    "gpu": tuple(GPUS),
    "gpus": (1, 2, 3, 8),
    "strategy": STRATEGIES,
    "weights": ("bfloat16", "float32", "float16"),
    "precision": ("bfloat16", "float32"),
    "adapters": ("float32", "float16"),
    "autocast": (True, False),
    "fused_norms": (True, False),
    "dropout": (0.0, 0.05),
}


def settings(count, seed=20231013):
    """So many settings that make sense, of every model."""
    rng = random.Random(seed)
    while count:
        fields = {name: rng.choice(values) for name, values in VALUES.items()}
        fields["targets"] = tuple(fields["targets"].split())
        try:
            yield setting(model=rng.choice(tuple(PRESETS)), **fields)
        except RehearsalError:
            continue
        count -= 1


def sent(wanted):
    """A setting, its model and its card as the browser gets them."""
    fields = {name: getattr(wanted, name) for name in VALUES}
    card = next(card for card in cards() if card["name"] == wanted.gpu)
    return [fields, model_shape(wanted.model), card]


@pytest.fixture(scope="module")
def module_page(chromium):
    """A page in which the module's functions and the constants are global."""
    page = chromium.new_page()
    names = "memoryOf, paceOf, faultOf, amount, figure, chunkSize, widget"
    given = f"Object.assign(globalThis, {{ {names}, rules: {json.dumps(rules())}, words: {json.dumps(WORDS)} }});"
    page.add_script_tag(content=f"{MODULE}\n{given}", type="module")
    page.wait_for_function("!!globalThis.words")
    yield page
    page.close()


# ---------- the same numbers ----------


def test_the_browser_counts_bytes_and_seconds_as_python_does(module_page):
    grid = list(settings(1500))
    code = "([s, model, card]) => [memoryOf(s, model, card, rules), paceOf(s, model, card, rules)]"
    moments, losses = set(), set()
    for wanted, (memory, pace) in zip(grid, run(module_page, code, [sent(one) for one in grid]), strict=True):
        derived, timed = formula_of(wanted), pace_of(wanted)
        assert (memory["moment"], memory["terms"]) == (derived.moment, derived.terms), wanted
        assert memory["peak"] == derived.peak_bytes
        assert pace["seconds"] == pytest.approx(timed.seconds, rel=1e-12), wanted
        assert pace["flops"] == pytest.approx(timed.flops, rel=1e-12)
        assert pace["step"] == pytest.approx(timed.seconds_per_step, rel=1e-12)
        assert pace["speed"] == pytest.approx(timed.tokens_per_second, rel=1e-12)
        moments.add(derived.moment)
        losses.add((wanted.method, wanted.loss))
    assert moments == {"loss", "first block", "last block", "update"}
    assert len(losses) == 9


def test_figures_are_the_same(module_page):
    values = [0, 3.2e-5, 0.00123, 0.0123, 0.1, 0.125, 0.99951, 1, 1.005, 9.995, 12.345, 99.95, 100, 1234.5, 7.5e12]
    assert run(module_page, "x => figure(x)", values) == [figure(value) for value in values]
    assert [figure(value) for value in (0.0123, 0.125, 2.75, 27.5, 2982.3)] == [
        "0.0123",
        "0.125",
        "2.75",
        "27.5",
        "2,982",
    ]


# ---------- what makes no sense ----------

FAULTS = [
    {"batch_size": 0},
    {"batch_size": 2.5},
    {"seq_len": -3},
    {"seq_len": 2049},
    {"gpus": 0},
    {"r": 0},
    {"r": 4097, "method": "lora"},
    {"r": 1025, "model": "AquilaChat2-34B"},
    {"strategy": "zero3", "gpus": 8},
    {"strategy": "fsdp2", "gpus": 2},
    {"strategy": "zero2", "gpus": 1},
]


@pytest.mark.parametrize("fields", FAULTS)
def test_the_browser_refuses_what_python_refuses(module_page, fields):
    with pytest.raises(RehearsalError) as caught:
        setting(**fields)
    wanted = setting()
    state = {**{name: getattr(wanted, name) for name in VALUES}, **fields}
    data = [state, model_shape(fields.get("model", wanted.model))]
    (told,) = run(module_page, "([s, model]) => faultOf(s, model, words.en)", [data])
    (in_chinese,) = run(module_page, "([s, model]) => faultOf(s, model, words.zh)", [data])
    field, _, fault = str(caught.value).partition(": ")
    assert told == [field, f"{WORDS['en']['fields'][field]}: {fault}"]
    assert in_chinese[0] == field
    assert in_chinese[1].startswith(f"{WORDS['zh']['fields'][field]}：")
    assert re.search("[一-龥]", in_chinese[1].partition("：")[2])


def test_the_browser_refuses_nothing_else(module_page):
    grid = [sent(wanted)[:2] for wanted in settings(300, seed=1)]
    assert run(module_page, "([s, model]) => faultOf(s, model, words.en) ?? null", grid) == [None] * 300


def test_python_refuses_them_too():
    with pytest.raises(RehearsalError, match="batch_size"):
        memory_planner(batch_size=0)
    with pytest.raises(RehearsalError, match="no such control"):
        memory_planner(dropout=0.1)
    with pytest.raises(traitlets.TraitError):
        memory_planner(targets="o_proj")
    with pytest.raises(traitlets.TraitError):
        memory_planner(price=-1)


# ---------- what it says ----------


def test_both_languages_say_the_same_things():
    def keys(words):
        return {name: keys(word) for name, word in words.items()} if isinstance(words, dict) else None

    assert keys(WORDS["en"]) == keys(WORDS["zh"])
    for texts in WORDS.values():
        assert set(texts["fields"]) == set(CHOICES)
        assert set(texts["options"]["targets"]) == set(TARGETS)
        assert set(texts["options"]["loss"]) == set(LOSSES)
        assert set(texts["options"]["strategy"]) == set(STRATEGIES)
        assert set(texts["kinds"]) == set(pace_of(setting()).seconds)


def test_every_term_has_a_word_and_a_colour():
    seen = {name for wanted in settings(300, seed=2) for name, count in formula_of(wanted).terms.items() if count}
    assert seen == set(WORDS["en"]["terms"])
    assert all(f".{name.replace(' ', '-')} {{" in STYLE for name in seen)


@pytest.mark.parametrize(("language", "word"), [("en", "It fits"), ("zh", "装得下")])
def test_the_stored_output_stands_without_scripts(monkeypatch, language, word):
    monkeypatch.setenv("AQUILA2_TUT_LANG", language)
    planner = memory_planner("aquilachat2-34b", gpu="H100", price=2.5)
    stored = planner.stored_html()
    assert stored == memory_planner("aquilachat2-34b", gpu="H100", price=2.5).stored_html()
    text = " ".join(Words(stored).words)
    assert word in planner.summary() in text
    assert planner.pace_rows()[-1][1] in text
    assert figure(formula_of(planner.wanted).peak_bytes / 1e9)[:4] in text


def test_a_million_tokens_cost_what_the_hours_cost():
    planner = memory_planner(price=3.0, gpus=4)
    rows = dict(planner.pace_rows())
    speed = float(rows["tokens a second, all cards"].replace(",", ""))
    assert float(rows["cost of a million tokens"]) == pytest.approx(4 * 3.0 * 1e6 / 3600 / speed, rel=0.01)


def test_the_style_reaches_nothing_but_the_widget():
    plain = re.sub(r"@media[^{]+\{(.*?\})\s*\}", r"\1", STYLE, flags=re.S)
    rules = re.findall(r"(?:^|\}|\*/)\s*([^{}/]+)\{", plain)
    assert len(rules) > 20
    assert all(part.strip().startswith(".memory-planner") for rule in rules for part in rule.split(","))


def test_jupyter_gets_the_live_widget_and_a_page_the_html():
    data, _ = memory_planner()._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"}
    assert "Q-LoRA" in data["text/plain"]


# ---------- with a kernel ----------


@pytest.fixture
def kernel_page(module_page):
    """The planner with a kernel of ours."""
    planner = memory_planner()
    module_page.evaluate(KERNEL, [{name: getattr(planner, name) for name in MemoryPlanner.state}, list(CHOICES)])
    return module_page


def test_what_python_changes_is_shown(kernel_page):
    kernel_page.evaluate("""() => {
      model.set("model", "Aquila2-34B"); model.set("gpus", 8); model.set("strategy", "zero2"); model.set("price", 2);
    }""")
    assert seen(kernel_page) == first_look(memory_planner("Aquila2-34B", gpus=8, strategy="zero2", price=2))
    assert kernel_page.get_by_label("Number of cards").input_value() == "8"
    assert kernel_page.evaluate("model.saved") == []


def test_python_hears_of_what_makes_sense_and_of_nothing_else(kernel_page):
    kernel_page.get_by_label("Batch size, each card").fill("0")
    assert kernel_page.evaluate("model.saved") == []
    kernel_page.get_by_label("Batch size, each card").fill("2")
    kernel_page.get_by_label("Method").select_option("full")
    values = dict(zip(CHOICES, kernel_page.evaluate("model.saved.at(-1)"), strict=True))
    planner = memory_planner()
    for name, value in values.items():  # which takes them as they come
        setattr(planner, name, value)
    assert planner.wanted == setting(method="full", batch_size=2)


def test_a_widget_that_is_gone_no_longer_listens(kernel_page):
    assert kernel_page.evaluate("(end(), count())") == 0


# ---------- a page without a kernel ----------


@pytest.fixture
def static_page(open_stored, monkeypatch):
    """Opens the stored output as the book's pages have it, from a file."""

    def open_page(language, width=1280, **choices):
        monkeypatch.setenv("AQUILA2_TUT_LANG", language)
        return open_stored(memory_planner(**choices).stored_html(), width)

    return open_page


def flat(text):
    return "".join(text.split())


def seen(page):
    """The words of the sentence, the tables and the notes."""
    parts = page.locator(".memory-planner :is(output, tr, .notes p)")
    return [flat(text) for text in parts.evaluate_all("parts => parts.map(part => part.textContent)")]


def first_look(planner):
    """The same of the stored output, by Python."""
    parts = re.findall(r"<output.*?</output>|<tr.*?</tr>|<p>.*?</p>", planner.first_look())
    return [flat("".join(Words(part).words)) for part in parts]


CASES = [
    {},
    {"model": "AquilaChat2-70B-Expr", "method": "full", "gpus": 8, "strategy": "zero3", "price": 2.0},
    {"model": "Aquila2-7B", "recipe": "upstream", "method": "lora"},
    {"model": "AquilaChat2-34B", "gpu": "T4", "seq_len": 4096, "loss": "plain"},
    {"model": "Aquila2-Nano", "method": "full", "batch_size": 1, "seq_len": 64, "gpu": "RTX 4090"},
]


@pytest.mark.parametrize("language", WORDS)
def test_the_page_shows_what_python_wrote(static_page, language):
    for case in CASES:
        page = static_page(language, **case)
        assert seen(page) == first_look(memory_planner(**case))
        assert not page.errors


def choose(page, words, **values):
    """Sets controls by what they are called."""
    for name, value in values.items():
        control = page.get_by_label(words["fields"][name], exact=True)
        if isinstance(value, bool):
            control.set_checked(value)
        elif control.evaluate("node => node.tagName") == "SELECT":
            control.select_option(value)
        else:
            control.fill(str(value))


@pytest.mark.parametrize("language", WORDS)
def test_every_control_counts(static_page, language):
    page = static_page(language)
    fields = {"model": "Aquila2-34B", "method": "lora", "batch_size": 2, "seq_len": 1024, "r": 16, "gpu": "H200"}
    fields |= {"targets": "all-linear", "loss": "plain", "optimizer": "adamw-8bit", "checkpointing": False}
    so_far = {}
    for name, value in {**fields, "gpus": 4, "strategy": "fsdp2", "price": 3.5}.items():
        before = seen(page)
        choose(page, WORDS[language], **{name: value})
        so_far[name] = value
        assert seen(page) != before, name
        assert seen(page) == first_look(memory_planner(**so_far)), name
    assert not page.errors


def test_a_price_is_the_readers(static_page):
    page = static_page("en")
    price = page.get_by_label(WORDS["en"]["fields"]["price"], exact=True)
    assert price.input_value() == ""
    assert page.locator(".pace td").last.inner_text() == WORDS["en"]["unpriced"]
    for typed in ("-1", "0", ""):
        price.fill(typed)
        assert page.locator(".pace td").last.inner_text() == WORDS["en"]["unpriced"]
    assert not page.errors


def test_a_recipe_sets_the_other_controls(static_page):
    page = static_page("en")
    choose(page, WORDS["en"], recipe="upstream", method="full")
    assert seen(page) == first_look(memory_planner(recipe="upstream", method="full"))
    choose(page, WORDS["en"], recipe="default")
    assert seen(page) == first_look(memory_planner(method="full"))
    assert page.get_by_label("Rank", exact=True).is_disabled()


@pytest.mark.parametrize("language", WORDS)
def test_what_makes_no_sense_is_one_line(static_page, language):
    page, words = static_page(language), WORDS[language]
    for name, value in (("batch_size", "0"), ("batch_size", ""), ("seq_len", "2049"), ("r", "4097")):
        choose(page, words, **{name: value})
        said = page.locator("output").inner_text()
        assert said.startswith(words["fields"][name])
        assert len(said) < 120
        assert not page.locator(".bar").is_visible()
        assert page.locator("[aria-invalid=true]").count() == 1
        choose(page, words, **{name: {"batch_size": 4, "seq_len": 2048, "r": 8}[name]})
        assert page.locator(".bar").is_visible()
    choose(page, words, gpus=8, strategy="zero3")
    assert "zero3" in page.locator("output").inner_text()
    choose(page, words, method="lora")
    assert seen(page) == first_look(memory_planner(method="lora", gpus=8, strategy="zero3"))
    assert not page.errors


@pytest.mark.parametrize("language", WORDS)
def test_the_keyboard_reaches_everything(static_page, language):
    page = static_page(language)
    page.get_by_label(WORDS[language]["fields"]["recipe"], exact=True).focus()
    names = []
    for _ in CHOICES:
        names.append(page.evaluate("document.activeElement.labels?.[0]?.textContent"))
        page.keyboard.press("Tab")
    assert sorted(names) == sorted(WORDS[language]["fields"].values())
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.get_by_label(WORDS[language]["fields"]["batch_size"], exact=True).focus()
    before = page.get_by_role("status").inner_text()
    page.keyboard.press("ArrowUp")
    assert page.get_by_role("status").inner_text() != before


@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window(static_page, language, width):
    page = static_page(language, width=width, model="AquilaChat2-70B-Expr", method="full", gpus=8, strategy="zero3")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shares = page.locator(".bar span").evaluate_all("parts => parts.map(part => part.getBoundingClientRect().width)")
    terms = [count for count in formula_of(memory_planner(**CASES[1]).wanted).terms.values() if count]
    assert shares[0] / sum(shares) == pytest.approx(terms[0] / sum(terms), abs=0.03)
    assert min(shares) >= 1
    end = page.locator(".bar b").evaluate("end => end.offsetLeft / end.parentNode.clientWidth")
    assert end == pytest.approx(GPUS["A100-80G"].usable / sum(terms), abs=0.01)
