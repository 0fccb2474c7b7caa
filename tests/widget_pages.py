"""Widgets in a browser: in a page of the book, and with a kernel of ours."""

import importlib.util
import json
from pathlib import Path

HOOKS = Path(__file__).resolve().parents[1] / "book/_ext/aquila_book/widgets.py"

# What anywidget hands to a module: a state that Python may change at any time, and hears of when it is saved.
KERNEL = """([state, choices]) => {
  const listeners = {}, el = document.createElement("div"), model = {
    saved: [], get: (key) => state[key],
    set: (key, value) => { state[key] = value; for (const listener of listeners[`change:${key}`] ?? []) listener(); },
    on: (event, listener) => (listeners[event] ??= new Set()).add(listener),
    off: (event, listener) => listeners[event]?.delete(listener),
    save_changes() { model.saved.push(choices.map((key) => state[key])); },
  };
  document.body.replaceChildren(el);
  const count = () => listeners[`change:${choices[0]}`].size;
  Object.assign(globalThis, { model, end: widget.render({ model, el }), count });
}"""


def run(page, code, values):
    """Each value through a function of JavaScript."""
    return json.loads(page.evaluate(f"text => JSON.stringify(JSON.parse(text).map({code}))", json.dumps(values)))


def page_of(stored):
    """A page with a stored output, completed as the book's builder does it."""
    spec = importlib.util.spec_from_file_location("book_widgets", HOOKS)
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return f'<!doctype html><meta charset="utf-8"><body>{hooks.insert_widgets(stored, "_static/")}</body>'


def opened(browser, address, width):
    """A page that is there, with a list of its errors."""
    page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("[data-widget] select")
    return page
