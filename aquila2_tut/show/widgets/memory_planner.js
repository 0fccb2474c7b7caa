// The memory planner: choose how a model is trained, see what a step takes of a card, term by term, and how long.
//
// Everything is worked out here, in Jupyter and in a page of the book alike, from the same shapes, cards and constants
// that Python has. Python hears of what was chosen. Fields of a setting have the names that they have in Python.

const { floor, min, max } = Math; // whole numbers are exact below 2^53, and no sensible setting comes near
const ceil = (a, b) => Math.ceil(a / b);
const total = (values) => Object.values(values).reduce((sum, value) => sum + value, 0);

// ---------- sizes, as in aquila2_tut/memory/formula.py and unseen.py ----------

// What both the bytes and the time of a setting follow from.
export function sizesOf(s, model, rules) {
  const full = s.method === "full";
  const between = rules.itemsize[s.weights];
  const product = s.autocast ? rules.itemsize[s.precision] : between;
  const isAdapted = ([name]) => s.targets.includes("all-linear") || s.targets.includes(name);
  const adapted = full ? [] : model.maps.filter(isAdapted);
  const wide = adapted.reduce((sum, [, out, inputs]) => sum + out + inputs, 0);
  const trainedType = full ? s.weights : s.adapters;
  const linear = model.maps.reduce((sum, [, out, inputs]) => sum + out * inputs, 0);
  return {
    ...{ full, between, product, adapted },
    tokens: s.batch_size * s.seq_len,
    casts: s.autocast && product < 4,
    masters: trainedType !== "float32",
    trained: full ? model.parameters : model.layers * s.r * wide,
    each: rules.itemsize[trainedType], // bytes of a number that is trained
    shared: s.strategy ? s.gpus : 1,
    table: model.vocab * model.width,
    layer: linear + 2 * model.width,
  };
}

function gathered(s, model, z, rules) {
  if (s.strategy === "zero3") return min(rules.zero3Live, model.parameters) * z.between;
  if (s.strategy !== "fsdp2") return 0;
  const tables = (model.tied ? 1 : 2) * z.table;
  return (tables + floor((2 * (model.parameters - tables)) / model.layers)) * z.between;
}

function buckets(s, z, rules) {
  if (s.gpus === 1 || s.strategy === "fsdp2") return 0;
  return (s.strategy ? rules.zeroBuckets : z.trained) * z.each;
}

function weights(s, model, z) {
  if (s.method === "qlora") return model.nf4 + floor((model.nf4Kept * (z.between - 2)) / 2);
  const split = ["zero3", "fsdp2"].includes(s.strategy) ? z.shared : 1;
  return floor((z.between * model.parameters) / split);
}

function standing(s, model, card, z, rules) {
  const state = s.optimizer === "adamw-8bit" ? 2 + 8 / 256 : 8 + 4 * z.masters;
  return {
    weights: weights(s, model, z),
    adapters: z.full ? 0 : z.each * z.trained,
    optimizer: floor(floor(state * z.trained) / z.shared),
    gathered: gathered(s, model, z, rules),
    cuBLAS: card.cublas,
  };
}

// Bytes a token of what one layer keeps beside its input.
function insideOf(s, model, z) {
  const inputs = z.adapted.map(([, , width]) => width);
  const different = z.casts ? inputs : [...new Set(inputs)];
  const kept = s.dropout ? (z.product + 1) * total(inputs) : z.product * total(different);
  const copies = z.casts && z.between === 4 ? 5 : 2;
  const linear = z.full ? z.product * (copies * model.width + model.ffn) : 0;
  const attention = z.product * (2 * model.queries + 2 * model.keys) + 4 * model.heads;
  return attention + z.between * model.width + 2 * z.product * model.ffn + kept + linear;
}

const castOf = (z) => (z.full && z.casts && z.between === 4 ? z.product : 0);

function kept(layers, s, model, z) {
  const each = z.between * model.width + (s.checkpointing ? 0 : insideOf(s, model, z));
  return layers * (z.tokens * each + (s.checkpointing ? 0 : castOf(z) * z.layer));
}

export function chunkSize(tokens, vocab, rules) {
  const atOnce = max(1, min(floor(rules.chunk / (4 * vocab)), max(rules.fewTokens, floor(tokens / 8))));
  return max(1, ceil(tokens, max(1, ceil(tokens, atOnce))));
}

function lossMoment(s, model, z, rules) {
  const every = model.vocab * z.tokens;
  const chunked = s.loss === "chunked";
  let hidden = z.tokens * model.width * z.between;
  let logits = chunkSize(z.tokens, model.vocab, rules) * model.vocab * (2 * z.product + 4);
  if (chunked) {
    logits += z.full ? (4 + z.product) * z.table : 0;
    hidden *= 3;
  } else {
    logits = 12 * (every - (s.loss === "shifted" ? s.batch_size * model.vocab : 0));
    hidden = s.fused_norms ? hidden : 4 * z.tokens * model.width;
    hidden += z.full ? z.tokens * model.width * z.product : 0;
  }
  let casts = castOf(z) * ((s.checkpointing ? model.layers * z.layer : 0) + (chunked ? 0 : z.table));
  const before = (8 + z.product) * every; // in the forward pass there are fewer logits, and all cast weights
  const head = castOf(z) * z.table;
  if (s.loss === "plain" && casts) [logits, casts] = before + casts >= logits + head ? [before, casts] : [logits, head];
  const activations = kept(model.layers, s, model, z) + hidden;
  return { activations, "cast weights": casts, logits, buckets: chunked ? 0 : buckets(s, z, rules) };
}

const gradients = (parameters, z) => floor((parameters * z.each) / z.shared);

function blockGradients(first, model, z) {
  if (!z.full) return first ? 0 : gradients(z.trained, z);
  const done = first ? z.table : model.parameters - (model.tied ? 0 : z.table) - z.layer;
  return gradients(done + model.width * model.ffn, z);
}

function blockMoment(first, s, model, z, rules) {
  const wide = z.product * z.tokens * model.ffn;
  const map = model.width * model.ffn;
  const numbers = s.method === "qlora" ? map * z.product + floor(map / 64) * 4 : 0;
  const widened = z.casts && z.adapted.some(([name]) => name === "down_proj");
  const adapter = widened ? (2 * z.product + 8) * model.ffn * z.tokens : 0;
  const moving = max((z.full ? 2 : 3) * wide, wide + numbers, adapter);
  const again = s.checkpointing ? z.tokens * insideOf(s, model, z) + castOf(z) * z.layer : 0;
  return {
    activations: kept(first ? model.layers : 1, s, model, z),
    block: again + z.tokens * z.between * model.width + moving,
    gradients: blockGradients(first, model, z),
    buckets: buckets(s, z, rules),
  };
}

function updateMoment(s, z, rules) {
  const update = z.masters ? floor((8 * z.trained) / z.shared) : 0;
  return { gradients: gradients(z.trained, z), update, buckets: buckets(s, z, rules) };
}

// The moment at which most is needed, and what is needed then.
export function memoryOf(s, model, card, rules) {
  const z = sizesOf(s, model, rules);
  const moments = {
    loss: lossMoment(s, model, z, rules),
    "first block": blockMoment(true, s, model, z, rules),
    "last block": blockMoment(false, s, model, z, rules),
    update: updateMoment(s, z, rules),
  };
  const most = (best, name) => (total(moments[name]) > total(moments[best]) ? name : best);
  const moment = Object.keys(moments).reduce(most);
  const context = rules.context + (s.gpus > 1 ? rules.nccl : 0);
  const terms = { ...standing(s, model, card, z, rules), ...moments[moment], context };
  return { moment, terms, peak: total(terms) };
}

// ---------- time, as in aquila2_tut/memory/pace.py ----------

const FLOAT = 4;

// Kernels are [how often, operations, bytes].
function makeStep(s, model, rules) {
  const z = sizesOf(s, model, rules);
  const first = min(...z.adapted.map(([name]) => rules.places[name]), z.adapted.length ? Infinity : 0);
  const named = new Set(z.adapted.map(([name]) => name));
  const again = Number(s.checkpointing);
  return {
    ...{ ...z, full: Number(z.full), s, model, rules, again },
    cast: z.between !== z.product ? z.between + z.product : 0,
    widen: z.product !== FLOAT ? FLOAT + z.product : 0,
    idle: (place) => Number(!z.full && !s.checkpointing && place <= first),
    forwardAgain: (name) => again * (name !== "down_proj" || named.has(name)),
    map: (n, a, b) => [2 * n * a * b, z.product * (n * (a + b) + a * b)],
  };
}

function linearKernels(t) {
  return t.model.maps.map(([name, out, inputs]) => {
    const times = t.model.layers * (2 + t.forwardAgain(name) + t.full) - t.idle(t.rules.places[name]);
    return [times, ...t.map(t.tokens, inputs, out)];
  });
}

function adapterKernels(t) {
  const wide = t.casts ? FLOAT : t.product;
  const around = t.tokens * ((t.casts ? 2 * t.widen : 0) + (t.s.dropout ? 2 * wide + 1 : 0));
  const { layers } = t.model;
  return t.adapted.flatMap(([name, out, inputs]) => {
    const again = t.again * (name !== "down_proj");
    return [
      [layers * (3 + t.again) - t.idle(t.rules.places[name]), ...t.map(t.tokens, inputs, t.s.r)],
      [layers * (3 + again), ...t.map(t.tokens, t.s.r, out)],
      [layers * (1 + t.again), 0, around * inputs],
      [layers * (1 + again), 0, t.tokens * 5 * t.product * out],
      [layers, 0, around * inputs + t.tokens * t.product * (3 * inputs + 2 * out)],
    ];
  });
}

function attentionKernels(t) {
  const { layers, queries, keys, heads } = t.model;
  const triangle = t.s.batch_size * t.s.seq_len ** 2 * queries;
  const moved = (k) => t.tokens * (t.product * (k * queries + k * keys) + FLOAT * heads);
  return [
    [layers * (1 + t.again), 2 * triangle, moved(2)],
    [layers - t.idle(1), 5 * triangle, moved(4)],
  ];
}

function fourBitKernels(t) {
  if (t.s.method !== "qlora") return [];
  return t.model.maps.map(([name, out, inputs]) => {
    const times = t.model.layers * (2 + t.forwardAgain(name)) - t.idle(t.rules.places[name]);
    return [times, 0, (t.rules.nf4 + t.product) * out * inputs];
  });
}

function chunksOf(t) {
  return t.s.loss === "chunked" ? ceil(t.tokens, chunkSize(t.tokens, t.model.vocab, t.rules)) : 1;
}

function headKernels(t) {
  const chunks = chunksOf(t);
  const [rows, left] = [floor(t.tokens / chunks), t.tokens % chunks];
  const some = (times, size) => [times * (2 + t.full), ...t.map(size, t.model.width, t.model.vocab)];
  return [some(left, rows + 1), some(chunks - left, rows)];
}

function lossBytes(t) {
  const chunked = t.s.loss === "chunked";
  let each = 2 * t.widen + FLOAT * (chunked ? 8 : 6);
  each += t.s.loss === "shifted" ? FLOAT * 4 : 0;
  const hidden = chunked ? 9 * t.between : t.cast;
  const head = t.full * (chunked ? FLOAT * 3 + chunksOf(t) * 2 * FLOAT + t.cast : 2 * t.cast);
  return t.tokens * (each * t.model.vocab + hidden * t.model.width) + head * t.table;
}

function normBytes(t) {
  const ends = 2 * (t.between + FLOAT);
  if (t.s.fused_norms) return [2 * t.between * t.model.width, 3 * t.between * t.model.width];
  return [(ends + FLOAT * 7) * t.model.width, (ends + FLOAT * (19 + t.full * 4)) * t.model.width];
}

function elementwiseBytes(t) {
  const { width, ffn, queries, keys, layers } = t.model;
  const [norm, normBack] = normBytes(t);
  const turned = 2 * (t.product + t.between) + 5 * t.between + t.cast;
  const turnedBack = 5 * t.between + 7 * t.product + 3 * t.cast;
  const sums = (2 * (2 * t.between + t.product) + 5 * t.cast) * width;
  const sumsBack = (15 * t.between + 7 * t.cast) * width;
  const forward = norm * 2 + sums + turned * (queries + keys) + 2 * t.product * queries + 5 * t.product * ffn;
  const backward = normBack * 2 + sumsBack + turnedBack * (queries + keys) + 11 * t.product * ffn;
  const again = t.again * (forward - (2 * t.between + t.product) * width);
  const once = norm + normBack + 2 * t.between * width * (1 + t.full);
  const casts = t.full * t.cast * layers * t.layer * (3 + t.again);
  return t.tokens * (layers * (forward + again + backward) + once) + casts + t.full * t.between * t.table;
}

function optimizerBytes(t) {
  const copies = t.masters && t.s.optimizer === "adamw";
  const update = t.rules.update[copies ? "masters" : t.s.optimizer] + (copies ? 2 * t.each : 0);
  return floor((t.trained * (3 * t.each + update)) / t.shared);
}

// Operations, the least seconds of each kind of kernel, and what follows for a step.
export function paceOf(s, model, card, rules) {
  const t = makeStep(s, model, rules);
  const kernels = {
    linear: linearKernels(t),
    adapters: adapterKernels(t),
    attention: attentionKernels(t),
    "four bits": fourBitKernels(t),
    head: headKernels(t),
    loss: [[1, 0, lossBytes(t)]],
    elementwise: [[1, 0, elementwiseBytes(t)]],
    optimizer: [[1, 0, optimizerBytes(t)]],
  };
  const flops = total(Object.values(kernels).flat().map(([times, operations]) => times * operations));
  const least = ([times, operations, moved]) => times * max(operations / card.flops, moved / card.bandwidth);
  const kinds = Object.entries(kernels).map(([kind, some]) => [kind, total(some.map(least))]);
  const seconds = Object.fromEntries(kinds);
  const step = total(seconds) / rules.efficiency;
  return { flops, seconds, step, speed: (s.batch_size * s.seq_len) / step };
}

// ---------- what makes no sense, as in aquila2_tut/memory/setting.py ----------

const filled = (text, values) => text.replace(/\{(\w+)\}/g, (_, key) => values[key]);

// Its field and what to say of it, or nothing. Numbers come as they were typed.
export function faultOf(s, model, words) {
  const say = (field, kind, values) => [field, filled(words.faults[kind], { field: words.fields[field], ...values })];
  for (const field of ["batch_size", "seq_len", "gpus", "r"])
    if (!Number.isSafeInteger(s[field]) || s[field] < 1)
      return say(field, "whole", { value: s[field] === "" ? "''" : s[field] });
  const narrowest = min(model.width, model.keys);
  if (s.seq_len > model.context)
    return say("seq_len", "context", { value: s.seq_len, model: model.name, context: model.context });
  if (s.method !== "full" && s.r > narrowest) return say("r", "rank", { value: s.r, model: model.name, narrowest });
  if (s.method === "qlora" && !["", "zero2"].includes(s.strategy))
    return say("strategy", "split", { value: s.strategy });
  if (s.strategy && s.gpus === 1) return say("strategy", "alone", { value: s.strategy });
  return undefined;
}

// ---------- texts, as in memory.py ----------

const grouped = (number) => String(number).replace(/\B(?<!\.\d*)(?=(\d{3})+(?!\d))/g, ",");

export function amount(count, base = 1000) {
  const power = [3, 2].find((p) => count >= base ** p) ?? 1;
  const name = (base === 1000 ? ["GB", "MB", "kB"] : ["GiB", "MiB", "KiB"])[3 - power];
  return `${grouped((floor((100 * count) / base ** power + 0.5) / 100).toFixed(2))} ${name}`;
}

const bothUnits = (count) => `${amount(count)} (${amount(count, 1024)})`;

// Three digits that count, or a whole number.
export function figure(value) {
  const digits = [100, 10, 1, 0.1, 0.01].findIndex((bound) => value >= bound);
  const places = digits < 0 ? 5 : digits;
  const scale = 10 ** places;
  return grouped((floor(value * scale + 0.5) / scale).toFixed(places));
}

const percent = (share) => (floor(1000 * share + 0.5) / 10).toFixed(1);

function summaryOf(s, found, card, words) {
  const left = card.usable - found.peak;
  const verdict = filled(words[left >= 0 ? "fits" : "lacks"], { amount: amount(Math.abs(left)) });
  const values = { model: s.model, method: words.options.method[s.method], rows: grouped(s.batch_size) };
  const peak = { total: bothUnits(found.peak), moment: words.moments[found.moment], usable: bothUnits(card.usable) };
  return filled(words.summary, { ...values, ...peak, length: grouped(s.seq_len), gpu: s.gpu, verdict });
}

function paceRows(s, found, words) {
  const million = (s.price / 3600) * (1e6 / found.speed);
  const rows = [
    ["step", `${figure(found.step)} s`],
    ["speed", figure(found.speed)],
    ["together", figure(found.speed * s.gpus)],
    ["flops", `${figure(found.flops / 1e12)} TFLOP`],
    ["cost", s.price > 0 ? figure(million) : words.unpriced],
  ];
  return rows.filter(([name]) => name !== "together" || s.gpus > 1).map(([name, text]) => [words.pace[name], text]);
}

function notesOf(s, found, card, rules, words) {
  const notes = [filled(words.notes.time, { efficiency: `${rules.efficiency * 100}%` })];
  if (s.gpus > 1) notes.push(words.notes.several);
  if (card.half && s.precision === "bfloat16") notes.push(filled(words.notes.half, { gpu: s.gpu }));
  if (found.peak > card.usable) notes.push(words.notes.lacks);
  return notes;
}

// ---------- what is shown ----------

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const cell = (...children) => element("td", {}, ...children);
const rowHead = (...children) => element("th", { scope: "row" }, ...children);
const classOf = (name) => name.replace(" ", "-");

function termRow([name, count], words) {
  const [word, why] = words.terms[name];
  const head = rowHead(element("i", { className: `key ${classOf(name)}` }), word);
  head.append(element("span", { className: "why", textContent: why }));
  return element("tr", {}, head, cell(amount(count)), cell(amount(count, 1024)));
}

function barPart(name, count) {
  const part = element("span", { className: classOf(name) });
  part.style.flexGrow = count;
  return part;
}

// The terms, the rest of the card, and where the card ends.
function barParts(bar, terms, found, card) {
  const parts = terms.map(([name, count]) => barPart(name, count));
  if (card.usable > found.peak) parts.push(barPart("free", card.usable - found.peak));
  const end = element("b");
  end.style.left = `${min(100, (100 * card.usable) / found.peak).toFixed(2)}%`;
  bar.replaceChildren(...parts, ...(card.usable < found.peak ? [end] : []));
}

function kindRow([kind, seconds], all, words) {
  return element("tr", {}, rowHead(words.kinds[kind]), cell(`${percent(seconds / all)}%`));
}

function tableOf(className, caption) {
  const body = element("tbody");
  return [element("table", { className }, element("caption", { textContent: caption }), body), body];
}

// ---------- the controls ----------

const NUMBERS = ["batch_size", "seq_len", "r", "gpus", "price"];
const CHOICES = ["recipe", "model", "method", "batch_size", "seq_len", "r", "targets", "loss", "optimizer", "checkpointing"];
CHOICES.push("gpu", "gpus", "strategy", "price");
const OF_A_RECIPE = ["loss", "optimizer", "checkpointing", "gpus", "strategy"];

function select(options) {
  return element("select", {}, ...options.map(([value, textContent]) => element("option", { value, textContent })));
}

function makeInput(name, model, words) {
  if (name === "checkpointing") return element("input", { type: "checkbox" });
  if (NUMBERS.includes(name))
    return element("input", { type: "number", min: name === "price" ? 0 : 1, step: name === "price" ? "any" : 1 });
  if (name === "model") return select(model.get("models").map((one) => [one.name, one.name]));
  if (name === "gpu") return select(model.get("cards").map((one) => [one.name, one.name]));
  return select(Object.entries(words.options[name]));
}

let planners = 0;
function makeControls(model, words) {
  const id = planners++;
  const inputs = Object.fromEntries(CHOICES.map((name) => [name, makeInput(name, model, words)]));
  const labelled = CHOICES.map((name) => {
    inputs[name].id = `memory-planner-${id}-${name}`; // by its id, or a list's options would be part of its name
    const label = element("label", { htmlFor: inputs[name].id, textContent: words.fields[name] });
    return element("div", { className: name }, label, inputs[name]);
  });
  return [inputs, element("div", { className: "controls" }, ...labelled)];
}

function valueOf(name, input) {
  if (name === "checkpointing") return input.checked;
  if (name === "price") return max(0, Number(input.value) || 0);
  if (NUMBERS.includes(name)) return input.value === "" ? "" : Number(input.value);
  return input.value;
}

// Where the recipe or the method is another, what they say of the rest is set too.
function follow(inputs, before, recipes) {
  const [old, now] = [before, { recipe: inputs.recipe.value, method: inputs.method.value }].map(
    ({ recipe, method }) => recipes[recipe][method],
  );
  for (const name of OF_A_RECIPE)
    if (old[name] !== now[name]) {
      if (name === "checkpointing") inputs[name].checked = now[name];
      else inputs[name].value = now[name];
    }
}

// ---------- the widget ----------

function makeResults(words) {
  const bar = element("div", { className: "bar", ariaHidden: "true" }); // the table says it in words
  const [terms, termRows] = tableOf("terms", words.memory);
  const [pace, paceBody] = tableOf("pace", words.time);
  const [kinds, kindRows] = tableOf("kinds", words.shares);
  const notes = element("div", { className: "notes" });
  const details = element("details", {}, element("summary", { textContent: words.shares }), kinds);
  return { bar, termRows, paceBody, kindRows, notes, node: element("div", {}, bar, terms, pace, notes, details) };
}

function drawResults(results, s, facts, card, rules, words) {
  const [memory, pace] = [memoryOf(s, facts, card, rules), paceOf(s, facts, card, rules)];
  const terms = Object.entries(memory.terms).filter(([, count]) => count);
  const kinds = Object.entries(pace.seconds).filter(([, seconds]) => seconds);
  const all = total(pace.seconds);
  barParts(results.bar, terms, memory, card);
  results.termRows.replaceChildren(...terms.map((term) => termRow(term, words)));
  const rows = paceRows(s, pace, words).map(([word, text]) => element("tr", {}, rowHead(word), cell(text)));
  results.paceBody.replaceChildren(...rows);
  results.kindRows.replaceChildren(...kinds.map((kind) => kindRow(kind, all, words)));
  const notes = notesOf(s, memory, card, rules, words);
  results.notes.replaceChildren(...notes.map((textContent) => element("p", { textContent })));
  return summaryOf(s, memory, card, words);
}

function render({ model, el }) {
  const words = model.get("words");
  const [inputs, controls] = makeControls(model, words);
  const summary = element("output", { className: "summary" });
  const results = makeResults(words);
  const stated = () => Object.fromEntries(CHOICES.map((name) => [name, model.get(name)]));

  // Draws a state, or says what is wrong with it; tells which.
  function draw(state) {
    const facts = model.get("models").find(({ name }) => name === state.model);
    const card = model.get("cards").find(({ name }) => name === state.gpu);
    const s = { ...model.get("recipes")[state.recipe][state.method], ...state, targets: state.targets.split(" ") };
    const [field, fault] = faultOf(s, facts, words) ?? [];
    for (const name of CHOICES) inputs[name].ariaInvalid = name === field ? "true" : null;
    for (const name of ["r", "targets"]) inputs[name].disabled = state.method === "full";
    summary.classList.toggle("fault", Boolean(fault));
    results.node.hidden = Boolean(fault);
    summary.textContent = fault ?? drawResults(results, s, facts, card, model.get("rules"), words);
    return !fault;
  }

  // From the state to the inputs: at the start, and when Python changes it.
  function show() {
    for (const [name, value] of Object.entries(stated())) {
      if (name === "checkpointing") inputs[name].checked = value;
      else if (inputs[name] !== document.activeElement || !NUMBERS.includes(name))
        inputs[name].value = name === "price" ? value || "" : value; // no price is none, and not nought
    }
    draw(stated());
  }

  let changing = false; // several parts of the state change together: draw once, when all have
  let before = { recipe: model.get("recipe"), method: model.get("method") };
  function change() {
    follow(inputs, before, model.get("recipes"));
    const state = Object.fromEntries(CHOICES.map((name) => [name, valueOf(name, inputs[name])]));
    before = { recipe: state.recipe, method: state.method };
    if (!draw(state)) return; // what makes no sense stays here
    changing = true;
    for (const [name, value] of Object.entries(state)) model.set(name, value);
    changing = false;
    model.save_changes();
  }

  const listen = () => {
    if (changing) return;
    before = { recipe: model.get("recipe"), method: model.get("method") };
    show();
  };
  for (const name of CHOICES) {
    model.on(`change:${name}`, listen);
    inputs[name].oninput = change;
  }
  el.classList.add("memory-planner");
  el.replaceChildren(controls, summary, results.node);
  show();
  return () => CHOICES.forEach((name) => model.off(`change:${name}`, listen));
}

const widget = { render };
export default widget;
