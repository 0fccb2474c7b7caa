// The rotation's frequencies: choose a model, a scaling and a factor, see the wavelength of every pair.
//
// Everything is worked out here, in Jupyter and in a page of the book alike, from the same shapes and constants that
// Python has. Python hears of what was chosen.

const { ceil, cos, floor, log, log10, max, min, PI, pow, sin } = Math;

// ---------- wavelengths, as in aquila2_tut/model/rope.py ----------

const every = (dim, make) => Array.from({ length: dim / 2 }, (_, pair) => make(pair));
const turns = (theta, dim) => every(dim, (pair) => 2 * PI * pow(theta, (2 * pair) / dim));
const ntkTheta = (theta, factor, dim) => theta * pow(factor, dim / (dim - 2));
const dynamicFactor = (trained, factor, length) => (factor * max(length, trained)) / trained - (factor - 1);

// How much of its speed YaRN leaves each pair, in float32 as Python has it.
export function yarnKept({ theta, dim, trained }, rules) {
  const index = (turned) => (dim * log(trained / (turned * 2 * PI))) / (2 * log(theta));
  const low = max(floor(index(rules.fast)), 0);
  const high = min(ceil(index(rules.slow)), dim - 1);
  const ramp = (pair) => Math.fround((pair - low) / (high - low || 0.001));
  return every(dim, (pair) => Math.fround(1 - min(max(ramp(pair), 0), 1)));
}

// The tokens in which each pair makes a whole turn, in a text of so many.
export function wavelengths(model, method, factor, length, rules) {
  const { theta, dim, trained } = model;
  const plain = turns(theta, dim);
  if (method === "linear") return plain.map((turn) => factor * turn);
  if (method === "ntk") return turns(ntkTheta(theta, factor, dim), dim);
  if (method === "dynamic") return turns(ntkTheta(theta, dynamicFactor(trained, factor, length), dim), dim);
  if (method !== "yarn") return plain;
  const kept = yarnKept(model, rules);
  return plain.map((turn, pair) => 1 / (kept[pair] / turn + (1 - kept[pair]) / (factor * turn)));
}

// ---------- what is known of them, as in rope.py ----------

export function stretch(model, method, factor, rules) {
  const length = floor(model.trained * factor);
  const before = wavelengths(model, "none", factor, length, rules);
  const after = wavelengths(model, method, factor, length, rules);
  const slow = before.map((turn) => turn > model.trained);
  const within = (pair) => min((model.trained * after[pair]) / before[pair], length);
  const beyond = slow.map((is, pair) => (is ? length - ceil(within(pair)) : 0));
  const sharper = method === "yarn" ? (rules.slope * log(factor) + 1) ** 2 : 1;
  return { length, before, after, slow: slow.filter(Boolean).length, beyond, sharper };
}

// ---------- texts, as in rope.py ----------

const grouped = (number) => String(number).replace(/\B(?<!\.\d*)(?=(\d{3})+(?!\d))/g, ",");
const filled = (text, values) => text.replace(/\{(\w+)\}/g, (_, key) => values[key]);

// Three digits that count, or a whole number.
export function figure(value) {
  const digits = [100, 10, 1, 0.1, 0.01].findIndex((bound) => value >= bound);
  const places = digits < 0 ? 5 : digits;
  const scale = 10 ** places;
  return grouped((floor(value * scale + 0.5) / scale).toFixed(places));
}

function valuesOf(s, found, words) {
  return {
    model: s.model.name,
    method: words.methods[s.method],
    factor: String(floor(100 * s.factor + 0.5) / 100),
    pairs: found.before.length,
    slow: found.slow,
    trained: grouped(s.model.trained),
    length: grouped(found.length),
    beyond: grouped(max(...found.beyond)),
    temperature: figure(1 / found.sharper),
    sharper: figure(found.sharper),
  };
}

function summaryOf(s, values, words) {
  const said = ["slow", values.beyond === "0" ? "within" : "beyond"];
  if (s.method === "yarn") said.push("temperature");
  return said.map((name) => filled(words[name], values)).join(words.gap);
}

// ---------- the picture ----------

const HEIGHT = 330;
const MARGIN = { left: 56, right: 62, top: 30, bottom: 42 };

function drawn(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const written = (text, x, y, anchor) => drawn("text", { x, y, "text-anchor": anchor }, text);
const line = (className, x1, y1, x2, y2) => drawn("line", { class: className, x1, y1, x2, y2 });

// Where a pair stands and where a wavelength does; the axis stays as it is while the factor changes, if it can.
function scalesOf({ before, after }, width, most) {
  const inner = [width - MARGIN.left - MARGIN.right, HEIGHT - MARGIN.top - MARGIN.bottom];
  const lowest = log10(before[0] / 2);
  const highest = log10(1.5 * max(most * before.at(-1), after.at(-1)));
  const step = inner[0] / before.length;
  return {
    step,
    right: width - MARGIN.right,
    bottom: HEIGHT - MARGIN.bottom,
    highest,
    x: (pair) => MARGIN.left + (pair + 0.5) * step,
    y: (turn) => MARGIN.top + (inner[1] * (highest - log10(turn))) / (highest - lowest),
  };
}

function axesOf(scales, pairs, words) {
  const short = new Intl.NumberFormat(words.locale, { notation: "compact" });
  const powers = Array.from({ length: floor(scales.highest) }, (_, at) => 10 ** (at + 1));
  const numbers = Array.from({ length: ceil(pairs / 8) }, (_, at) => 8 * at);
  const { x, y, right, bottom } = scales;
  return [
    ...powers.map((turn) => line("grid", MARGIN.left, y(turn), right, y(turn))),
    ...powers.map((turn) => written(short.format(turn), MARGIN.left - 8, y(turn) + 4, "end")),
    ...numbers.map((pair) => written(pair, x(pair), bottom + 18, "middle")),
    written(words.axes.turn, 0, 14, "start"),
    written(words.axes.pair, (MARGIN.left + right) / 2, HEIGHT - 6, "middle"),
  ];
}

// The two lengths, with their numbers beside them; where the lines are close, the numbers give way to each other.
function lengthsOf(scales, trained, length) {
  const { y, right } = scales;
  const apart = max(0, 14 - (y(trained) - y(length))) / 2;
  const texts = length === trained ? [[length, 0]] : [[length, -apart], [trained, apart]];
  return [
    line("stretched", MARGIN.left, y(length), right, y(length)),
    line("trained", MARGIN.left, y(trained), right, y(trained)),
    ...texts.map(([count, shift]) => written(grouped(count), right + 6, y(count) + 4 + shift, "start")),
  ];
}

// A pair as trained, as it is now, and the way between.
function marksOf(pair, found, scales, words) {
  const size = min(3.5, 0.42 * scales.step);
  const x = scales.x(pair);
  const [from, to] = [scales.y(found.before[pair]), scales.y(found.after[pair])];
  const corner = (angle) => `${x + 1.6 * size * cos(angle)},${to + 1.6 * size * sin(angle)}`;
  const points = [-PI / 2, PI / 6, (5 * PI) / 6].map(corner).join(" ");
  const now = found.beyond[pair]
    ? drawn("polygon", { class: "beyond", points })
    : drawn("circle", { class: "after", cx: x, cy: to, r: size });
  const figures = [found.before, found.after].map((turnsOf) => figure(turnsOf[pair]));
  const hint = drawn("title", {}, `${words.columns[0]} ${pair}: ${figures.join(" → ")}`);
  const then = drawn("circle", { class: "before", cx: x, cy: from, r: size + 0.8 });
  return drawn("g", {}, hint, line("way", x, from, x, to), then, now);
}

function pictureOf(s, found, values, width, rules, words) {
  const scales = scalesOf(found, width, rules.most);
  const ends = [found.before, found.after].flatMap((turnsOf) => [figure(turnsOf[0]), figure(turnsOf.at(-1))]);
  const [first, last, firstNow, lastNow] = ends;
  const said = filled(words.picture, { ...values, first, last, firstNow, lastNow });
  return drawn(
    "svg",
    { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": said },
    ...axesOf(scales, found.before.length, words),
    ...lengthsOf(scales, s.model.trained, found.length),
    ...found.before.map((_, pair) => marksOf(pair, found, scales, words)),
  );
}

// ---------- what is shown beside it ----------

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const cell = (textContent) => element("td", { textContent });

function sample(name) {
  const shapes = {
    before: () => drawn("circle", { class: "before", cx: 12, cy: 7, r: 4.3 }),
    after: () => drawn("circle", { class: "after", cx: 12, cy: 7, r: 3.8 }),
    beyond: () => drawn("polygon", { class: "beyond", points: "12,1 17.5,11 6.5,11" }),
    trained: () => line("trained", 0, 7, 24, 7),
    stretched: () => line("stretched", 0, 7, 24, 7),
  };
  return drawn("svg", { width: 24, height: 14, "aria-hidden": "true" }, shapes[name]());
}

function keyOf(values, words) {
  const shown = Object.keys(words.key).filter((name) => name !== "beyond" || values.beyond !== "0");
  return shown.map((name) => element("span", {}, sample(name), filled(words.key[name], values)));
}

function rowsOf({ before, after, beyond }) {
  return before.map((turn, pair) => {
    const head = element("th", { scope: "row", textContent: pair });
    return element("tr", {}, head, cell(figure(turn)), cell(figure(after[pair])), cell(grouped(beyond[pair])));
  });
}

// ---------- the controls ----------

const CHOICES = ["model", "method", "factor"];

function select(options) {
  return element("select", {}, ...options.map(([value, textContent]) => element("option", { value, textContent })));
}

function makeInputs(model, words, { least, most }) {
  const ends = { min: least, max: most, step: 0.5 };
  const models = model.get("models").map((one) => {
    const values = { ...one, theta: grouped(one.theta), trained: grouped(one.trained) };
    return [one.name, filled(words.option, values)];
  });
  return {
    model: select(models),
    method: select(Object.entries(words.methods)),
    factor: element("input", { type: "number", ...ends }),
    slider: element("input", { type: "range", ...ends, ariaLabel: words.fields.slider }),
  };
}

let made = 0;
function controlsOf(inputs, words) {
  const id = made++;
  const fields = CHOICES.map((name) => {
    inputs[name].id = `rope-scalings-${id}-${name}`; // by its id, or a list's options would be part of its name
    const name_ = element("label", { htmlFor: inputs[name].id, textContent: words.fields[name] });
    const row = name === "factor" ? [element("div", { className: "both" }, inputs.slider, inputs.factor)] : [inputs[name]];
    return element("div", { className: name }, name_, ...row);
  });
  return element("div", { className: "controls" }, ...fields);
}

function tableOf(words) {
  const body = element("tbody");
  const heads = words.columns.map((textContent) => element("th", { scope: "col", textContent }));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body);
  return [element("details", {}, element("summary", { textContent: words.table }), table), body];
}

// ---------- the widget ----------

function render({ model, el }) {
  const [words, rules] = [model.get("words"), model.get("rules")];
  const inputs = makeInputs(model, words, rules);
  const summary = element("output", { className: "summary" });
  const picture = element("div", { className: "picture" });
  const key = element("div", { className: "key" });
  const note = element("p", { className: "note" });
  const [table, rows] = tableOf(words);
  const results = element("div", {}, key, picture, note, table);
  const factOf = (name) => model.get("models").find((one) => one.name === name);
  const makesSense = (factor) => factor >= rules.least && factor <= rules.most;

  // Draws a state, or says what is wrong with it; tells which.
  let redraw = () => {};
  function draw(state) {
    const fine = makesSense(state.factor);
    inputs.factor.ariaInvalid = fine ? null : "true";
    summary.classList.toggle("fault", !fine);
    results.hidden = !fine;
    if (!fine) summary.textContent = filled(words.fault, { field: words.fields.factor, ...rules });
    else drawResults({ ...state, model: factOf(state.model) });
    return fine;
  }

  function drawResults(s) {
    const found = stretch(s.model, s.method, s.factor, rules);
    const values = valuesOf(s, found, words);
    summary.textContent = summaryOf(s, values, words);
    note.textContent = s.method === "dynamic" ? filled(words.dynamic, values) : "";
    key.replaceChildren(...keyOf(values, words));
    rows.replaceChildren(...rowsOf(found));
    redraw = () => {
      const width = min(max(picture.clientWidth, 280), 760);
      picture.replaceChildren(pictureOf(s, found, values, width, rules, words));
    };
    redraw();
  }

  // From the state to the inputs: at the start, and when Python changes it.
  function show() {
    const state = Object.fromEntries(CHOICES.map((name) => [name, model.get(name)]));
    for (const name of CHOICES) if (inputs[name] !== document.activeElement) inputs[name].value = state[name];
    inputs.slider.value = state.factor;
    draw(state);
  }

  let changing = false; // several parts of the state change together: draw once, when all have
  function change() {
    const state = { model: inputs.model.value, method: inputs.method.value, factor: inputs.factor.valueAsNumber };
    if (!draw(state)) return; // what makes no sense stays here
    changing = true;
    for (const [name, value] of Object.entries(state)) model.set(name, value);
    changing = false;
    model.save_changes();
  }

  inputs.factor.oninput = () => {
    if (makesSense(inputs.factor.valueAsNumber)) inputs.slider.value = inputs.factor.value;
    change();
  };
  inputs.slider.oninput = () => {
    inputs.factor.value = inputs.slider.value;
    change();
  };
  inputs.method.oninput = change;
  inputs.model.oninput = () => {
    const { own } = factOf(inputs.model.value); // a model that was released with a scaling comes with it
    if (own) [inputs.method.value, inputs.factor.value, inputs.slider.value] = [own[0], own[1], own[1]];
    change();
  };
  const listen = () => changing || show();
  for (const name of CHOICES) model.on(`change:${name}`, listen);
  el.classList.add("rope-scalings");
  el.replaceChildren(controlsOf(inputs, words), summary, results);
  show();

  let width = picture.clientWidth;
  const observer = new ResizeObserver(() => {
    if (width !== picture.clientWidth) redraw();
    width = picture.clientWidth;
  });
  observer.observe(picture);
  return () => {
    observer.disconnect();
    CHOICES.forEach((name) => model.off(`change:${name}`, listen));
  };
}

const widget = { render };
export default widget;
