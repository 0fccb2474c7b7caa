// The live token viewer: type a text, see its tokens.
//
// In Jupyter, anywidget calls render(), and the tokens come from Python. A page of the book has no Python behind it: the
// page calls render() with a model of its own, whose `folder` holds the vocabulary, and the tokens are worked out here,
// by the same merges. Nothing is fetched before the reader types.

// ---------- byte-level byte-pair encoding ----------

// GPT-2's pattern, as in aquila2_tut/tokenizer/bpe.py. JavaScript's \s is not quite Unicode's white space.
const WORDS =
  /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const ROOM = 2 ** 18; // three base64 digits hold one id
const BYTE_IDS = 1; // id of the first byte
const MERGE_IDS = 257; // id of the first merge: ids follow the order in which merges were learned

const utf8 = new TextEncoder();
const lenient = new TextDecoder("utf-8", { ignoreBOM: true });
const strict = new TextDecoder("utf-8", { ignoreBOM: true, fatal: true });

// The bytes in the order of their ids: first those that can be seen as Latin-1 characters, then the others.
function bytesInOrder() {
  const all = [...Array(256).keys()];
  const seen = all.filter((b) => (b > 32 && b < 127) || (b > 160 && b !== 173));
  return [...seen, ...all.filter((b) => !seen.includes(b))];
}

export class Vocabulary {
  // merges: six base64 digits a merge, three for the left id and three for the right; control: token -> id
  constructor({ merges, control }) {
    const digit = new Uint8Array(128);
    [...BASE64].forEach((letter, value) => (digit[letter.charCodeAt(0)] = value));
    const id = (at) => [0, 1, 2].reduce((sum, n) => sum * 64 + digit[merges.charCodeAt(at + n)], 0);
    this.bytesOf = []; // id -> its bytes
    this.idOfByte = [];
    bytesInOrder().forEach((byte, n) => {
      this.bytesOf[BYTE_IDS + n] = [byte];
      this.idOfByte[byte] = BYTE_IDS + n;
    });
    this.merged = new Map(); // left * ROOM + right -> id
    for (let at = 0, next = MERGE_IDS; at < merges.length; at += 6, next++) {
      const [left, right] = [id(at), id(at + 3)];
      this.merged.set(left * ROOM + right, next);
      this.bytesOf[next] = this.bytesOf[left].concat(this.bytesOf[right]);
    }
    this.control = new Map(Object.entries(control));
    for (const [token, at] of this.control) this.bytesOf[at] = [...utf8.encode(token)];
    const escaped = [...this.control.keys()].map((token) => token.replace(/[[\]|/]/g, "\\$&"));
    this.controlPattern = new RegExp(`(${escaped.join("|")})`, "u");
    this.known = new Map(); // word -> ids
  }

  // Of all neighbours that are a merge, the one with the lowest id goes first, wherever it stands in the word.
  encodeWord(word) {
    let ids = Array.from(utf8.encode(word), (byte) => this.idOfByte[byte]);
    const merge = (at) => this.merged.get(ids[at] * ROOM + ids[at + 1]) ?? Infinity;
    for (;;) {
      let best = Infinity;
      for (let at = 0; at + 1 < ids.length; at++) best = Math.min(best, merge(at));
      if (best === Infinity) return ids;
      const next = [];
      for (let at = 0; at < ids.length; at++) next.push(merge(at) === best ? (at++, best) : ids[at]);
      ids = next;
    }
  }

  // Typed text is text: control tokens are looked for only in text that is trusted.
  encode(text, trusted = false) {
    const whole = lenient.decode(utf8.encode(text)); // lone halves of UTF-16 pairs become U+FFFD
    const ids = [];
    for (const [n, part] of (trusted ? whole.split(this.controlPattern) : [whole]).entries()) {
      if (n % 2) ids.push(this.control.get(part));
      else
        for (const [word] of part.matchAll(WORDS)) {
          if (!this.known.has(word)) this.known.set(word, this.encodeWord(word));
          ids.push(...this.known.get(word));
        }
    }
    return ids;
  }

  // What the viewer shows: [id, bytes in hex, whether it is a control token]
  pieces(text, trusted = false) {
    const controls = new Set(this.control.values());
    return this.encode(text, trusted).map((id) => [id, hexOf(this.bytesOf[id]), controls.has(id)]);
  }
}

const hexOf = (bytes) => bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("");

// A classic script, because a page opened from a file may load neither modules nor data.
let loading = null;
function loadVocabulary(folder, file) {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = folder + file;
    script.onload = () => resolve(new Vocabulary(globalThis.AQUILA_VOCABULARY));
    script.onerror = () => reject((loading = null));
    document.head.append(script);
  });
  return loading;
}

// ---------- what is shown ----------

const SIGNS = { " ": "␣", "\n": "↵", "\t": "⇥" };

// A token as it can be seen: signs for white space, code points for what is invisible, hex for parts of characters.
export function visible(hex) {
  const bytes = Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
  let text;
  try {
    text = strict.decode(bytes);
  } catch {
    return { label: hex.toUpperCase().replace(/..(?=.)/g, "$& "), part: true };
  }
  const label = [...text].map((c, at) => SIGNS[c] ?? (hidden(c, at) ? codePoint(c) : c)).join("");
  return { label, part: false, ends: text.includes("\n") };
}

const hidden = (c, at) => /[\p{C}\p{Z}]/u.test(c) || (at === 0 && /\p{M}/u.test(c));
const codePoint = (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function tokenElement([id, hex, control], at) {
  const { label, part, ends } = visible(hex);
  const kinds = `${part ? " part" : ""}${control ? " control" : ""}`;
  const node = element("span", { className: `token c${at % 5}${kinds}` }, label, element("sub", { textContent: id }));
  node.setAttribute("role", "listitem");
  return [node, ends ? element("br") : " "];
}

function countsText(text, pieces, words) {
  const characters = [...text].length;
  const bytes = pieces.reduce((sum, [, hex]) => sum + hex.length / 2, 0);
  const each = pieces.length ? (characters / pieces.length).toFixed(2) : "–";
  const values = { tokens: pieces.length, characters, bytes, each };
  return words.counts.replace(/\{(\w+)\}/g, (_, key) => values[key].toLocaleString("en"));
}

// ---------- the widget ----------

function render({ model, el }) {
  const words = model.get("words");
  const area = element("textarea", { rows: 3, maxLength: 5000, value: model.get("text"), spellcheck: false });
  const box = element("input", { type: "checkbox", checked: model.get("trusted") });
  const tokens = element("div", { className: "tokens" });
  const counts = element("output", { className: "counts" });
  const examples = element("div", { className: "examples" });
  tokens.setAttribute("role", "list");
  tokens.setAttribute("aria-label", words.tokens);
  examples.setAttribute("role", "group");
  examples.setAttribute("aria-label", words.examples);
  for (const [name, text] of model.get("examples")) {
    const button = element("button", { type: "button", textContent: name });
    button.onclick = () => change((area.value = text));
    examples.append(button);
  }

  function draw() {
    const pieces = model.get("pieces");
    tokens.replaceChildren(...pieces.flatMap(tokenElement));
    counts.textContent = countsText(model.get("text"), pieces, words);
    tokens.removeAttribute("aria-busy");
  }

  async function change() {
    model.set("text", area.value);
    model.set("trusted", box.checked);
    model.save_changes(); // in Jupyter, Python answers with new pieces
    if (model.folder === undefined) return;
    tokens.setAttribute("aria-busy", "true");
    if (!globalThis.AQUILA_VOCABULARY) counts.textContent = words.loading;
    try {
      const vocabulary = await loadVocabulary(model.folder, model.get("vocabulary"));
      model.set("pieces", vocabulary.pieces(area.value, box.checked));
    } catch {
      counts.textContent = words.failed;
    }
  }

  area.oninput = box.onchange = change;
  model.on("change:pieces", draw);
  el.classList.add("token-viewer");
  el.replaceChildren(
    element("label", { className: "typed" }, element("span", { textContent: words.type }), area),
    element("div", { className: "choices" }, examples, element("label", {}, box, words.trusted)),
    tokens,
    counts,
  );
  draw();
  return () => model.off("change:pieces", draw);
}

const widget = { render };
export default widget;
