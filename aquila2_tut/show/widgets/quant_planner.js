// The quantization planner: choose a model and a format, see its bytes, and which cards hold it.
//
// Everything is worked out here, in Jupyter and in a page of the book alike, from the same facts about models, formats
// and cards that Python has. Python hears of what was chosen.

// ---------- bytes, as in aquila2_tut/quant/sizes.py ----------

const ceil = (a, b) => Math.ceil(a / b); // exact below 2^53, and no model comes near

// One matrix (out, inputs); `group` weights share a scale, or a whole row where it is 0.
export function matrixBytes(form, out, inputs, group) {
  const scales = form.flat ? ceil(out * inputs, group) : out * ceil(inputs, group || inputs);
  const nested = form.nested ? 4 * ceil(scales, form.nested) + 4 : 0;
  return {
    codes: ceil(out * inputs * form.bits, 8),
    scales: scales * form.scale + nested,
    zeros: ceil(scales * form.zero, 8),
    tables: form.index * inputs + form.levels,
  };
}

export function groupSize(form, model) {
  let group = form.share;
  while (group > 1 && !form.flat && model.shapes.some(([, inputs]) => inputs % group)) group /= 2;
  return group;
}

const sum = (values) => Object.values(values).reduce((total, value) => total + value, 0);

// Norms always stay; embedding and head if `keep` names them. Where they are one matrix, only while both stay.
export function modelBytes(model, form, keep) {
  const terms = { codes: 0, scales: 0, zeros: 0, tables: 0 };
  const group = groupSize(form, model);
  for (const [out, inputs] of model.shapes) {
    const matrix = matrixBytes(form, out, inputs, group);
    for (const term in terms) terms[term] += model.layers * matrix[term];
  }
  const kept = model.vocab * model.width * form.kept;
  const quantized = sum(matrixBytes(form, model.vocab, model.width, group));
  const stays = (name) => !form.scale || keep.includes(name);
  const one = model.tied && stays("embed_tokens") && stays("lm_head");
  terms.embedding = stays("embed_tokens") ? kept : quantized;
  terms.head = one ? 0 : stays("lm_head") ? kept : quantized;
  terms.norms = (2 * model.layers + 1) * model.width * form.kept;
  return terms;
}

// Everything that lies in memory; the reserve is in GB.
export function allBytes(model, form, { keep, tokens, reserve }) {
  return { ...modelBytes(model, form, keep), cache: model.cache * tokens, reserve: Math.round(reserve * 1e9) };
}

// ---------- texts, as in planner.py ----------

export function amount(count, base = 1000) {
  const power = [3, 2].find((p) => Math.abs(count) >= base ** p) ?? 1;
  const name = (base === 1000 ? ["GB", "MB", "kB"] : ["GiB", "MiB", "KiB"])[3 - power];
  const hundredths = Math.floor((100 * count) / base ** power + 0.5); // toFixed() rounds ties unlike Python
  return `${grouped((hundredths / 100).toFixed(2))} ${name}`;
}

const grouped = (number) => String(number).replace(/\B(?<!\.\d*)(?=(\d{3})+(?!\d))/g, ",");
const filled = (text, values) => text.replace(/\{(\w+)\}/g, (_, key) => values[key]);
const bothUnits = (count) => `${amount(count)} (${amount(count, 1024)})`;

export function cardText(terms, usable, model, words) {
  const total = sum(terms);
  if (total > usable) return `✗ ${filled(words.lacks, { amount: amount(total - usable) })}`;
  return `✓ ${filled(words.holds, { tokens: grouped(Math.floor((usable - total + terms.cache) / model.cache)) })}`;
}

// ---------- what is shown ----------

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const cell = (...children) => element("td", {}, ...children);
const rowHead = (...children) => element("th", { scope: "row" }, ...children);

let inputsMade = 0;
function labelled(textContent, input) {
  input.id = `quant-planner-${inputsMade++}`; // by its id, or a list's options would be part of its name
  return element("div", {}, element("label", { htmlFor: input.id, textContent }), input);
}

function select(options) {
  return element("select", {}, ...options.map(([value, textContent]) => element("option", { value, textContent })));
}

function termRow([name, count], words, tokens) {
  const text = filled(words.terms[name], { tokens: grouped(tokens) });
  const head = rowHead(element("i", { className: `key ${name}` }), text);
  return element("tr", {}, head, cell(amount(count)), cell(amount(count, 1024)));
}

function cardRow([name, usable], terms, model, words) {
  const text = cardText(terms, usable, model, words);
  const fill = element("div");
  fill.style.width = `${Math.min(100, (100 * sum(terms)) / usable).toFixed(1)}%`;
  const className = text.startsWith("✓") ? "fits" : "lacks";
  const bar = element("td", { className: "fill" }, fill);
  return element("tr", { className }, rowHead(name), cell(amount(usable, 1024)), bar, cell(text));
}

function barPart([name, count]) {
  const part = element("span", { className: name });
  part.style.flexGrow = count;
  return part;
}

// ---------- the widget ----------

const KEPT = ["embed_tokens", "lm_head"];
const CHOICES = ["model", "format", "keep", "tokens", "reserve"];

function makeInputs(model, words) {
  const number = (max, step) => element("input", { type: "number", min: 0, max, step });
  const box = () => element("input", { type: "checkbox" });
  return {
    model: select(model.get("models").map(({ name }) => [name, name])),
    format: select(Object.keys(model.get("formats")).map((name) => [name, words.formats[name]])),
    tokens: number(10_000_000, 1),
    reserve: number(1000, 0.1),
    keep: KEPT.map(box),
  };
}

function controls(inputs, words) {
  const boxes = inputs.keep.map((box, at) => element("label", {}, box, words[KEPT[at]]));
  const kept = element("fieldset", {}, element("legend", { textContent: words.keep }), ...boxes);
  const plain = ["model", "format"].map((name) => labelled(words[name], inputs[name]));
  const numbers = ["tokens", "reserve"].map((name) => labelled(words[name], inputs[name]));
  return element("div", { className: "controls" }, ...plain, kept, ...numbers);
}

// What was typed, as a number that makes sense; an empty field is 0.
const between = (input) => Math.min(Math.max(Number(input.value) || 0, 0), Number(input.max));

function chosen(inputs) {
  return {
    model: inputs.model.value,
    format: inputs.format.value,
    keep: KEPT.filter((_, at) => inputs.keep[at].checked),
    tokens: Math.floor(between(inputs.tokens)),
    reserve: between(inputs.reserve),
  };
}

function render({ model, el }) {
  const words = model.get("words");
  const inputs = makeInputs(model, words);
  const summary = element("output", { className: "summary" });
  const bar = element("div", { className: "bar", ariaHidden: "true" }); // the table says it in words
  const notes = element("div", { className: "notes" });
  const terms = element("tbody");
  const cards = element("tbody");
  const columns = words.columns.map((textContent) => element("th", { scope: "col", textContent }));

  function draw() {
    const state = Object.fromEntries(CHOICES.map((name) => [name, model.get(name)]));
    const facts = model.get("models").find(({ name }) => name === state.model);
    const form = model.get("formats")[state.format];
    const bytes = allBytes(facts, form, state);
    const shown = Object.entries(bytes).filter(([, count]) => count);
    const total = sum(bytes);
    const texts = { weights: bothUnits(total - bytes.cache - bytes.reserve), total: bothUnits(total) };
    summary.textContent = filled(words.summary, { ...texts, model: state.model, format: words.formats[state.format] });
    bar.replaceChildren(...shown.map(barPart));
    terms.replaceChildren(...shown.map((term) => termRow(term, words, state.tokens)));
    cards.replaceChildren(...model.get("gpus").map((card) => cardRow(card, bytes, facts, words)));
    const [queries, keys] = facts.heads;
    const split = facts.tied && form.scale && state.keep.length < KEPT.length;
    const lines = [filled(words.cache, { queries, keys, each: amount(facts.cache) }), ...(split ? [words.tied] : [])];
    notes.replaceChildren(...lines.map((textContent) => element("p", { textContent })));
    inputs.keep.forEach((box) => (box.disabled = !form.scale));
  }

  // From the state to the inputs: at the start, and when Python changes it.
  function show() {
    for (const name of ["model", "format"]) inputs[name].value = model.get(name);
    for (const name of ["tokens", "reserve"])
      if (inputs[name] !== document.activeElement) inputs[name].value = model.get(name);
    inputs.keep.forEach((box, at) => (box.checked = model.get("keep").includes(KEPT[at])));
    draw();
  }

  let changing = false; // several parts of the state change together: draw once, when all have
  function change() {
    changing = true;
    for (const [name, value] of Object.entries(chosen(inputs))) model.set(name, value);
    changing = false;
    model.save_changes();
    draw();
  }

  const listen = () => changing || show();
  for (const name of CHOICES) model.on(`change:${name}`, listen);
  for (const input of [inputs.model, inputs.format, inputs.tokens, inputs.reserve, ...inputs.keep])
    input.oninput = change;
  el.classList.add("quant-planner");
  el.replaceChildren(
    controls(inputs, words),
    summary,
    bar,
    element("table", { className: "terms" }, terms),
    notes,
    element("table", { className: "cards" }, element("thead", {}, element("tr", {}, ...columns)), cards),
  );
  show();
  return () => CHOICES.forEach((name) => model.off(`change:${name}`, listen));
}

const widget = { render };
export default widget;
