// The explorer of a run: what became of each fact, and what the model would say after every block,
// before the edit, right after it and at any checkpoint of the tuning.
//
// One module for a notebook, where anywidget calls `render`, and for a saved page, where `boot`
// finds the data that stands beside it. Words of the data are only ever set as text.

const FATES = {
  kept: ["K", "#009e73"],
  "lost to related": ["R", "#e69f00"],
  "back to true": ["T", "#56b4e9"],
  "lost to other": ["O", "#cc79a7"],
  lost: ["?", "#f0e442"], // to what, first tokens do not tell, or it begins as the answer does
  "never held": ["N", "#999999"],
};
const LINES = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999"];
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "1 2", "10 4", "4 2"];
const MODES = {
  likeliest: "colour: the likeliest token",
  edited: "colour: the edited answer",
  true: "colour: the true answer",
  change: "colour: change of the answer, from the lens on the left",
};
const [EDITED, TRUE] = ["\u0000edited", "\u0000true"]; // pinned tokens that are no text
const PLAY = 700; // milliseconds a checkpoint

// --- Small helpers

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  assign(node, attributes);
  node.append(...children);
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  assign(node, attributes);
  node.append(...children);
  return node;
}

function assign(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
}

// What cannot be seen is shown by a sign, or by its number.
function shown(text) {
  if (!text.trim()) return text.includes("\n") ? "\u23ce" : "\u2423";
  return text.trim().replace(/\p{C}/gu, (sign) => `\\u{${sign.codePointAt(0).toString(16)}}`);
}

// A probability as it is packed; one that is not known, or not told apart, is undefined.
function share(code) {
  return code === 65535 ? undefined : code / 65534;
}

function percent(p) {
  return p >= 0.9995 ? "1.00" : p.toFixed(3).replace(/^0/, "");
}

function named(step) {
  return { "-1": "before", 0: "edited" }[step] ?? `step ${step}`;
}

// Two scales of 101 colours, told apart without red and green, with the ink that reads on each.
function scale(stops) {
  const colours = [];
  for (let index = 0; index <= 100; index++) {
    const at = (index / 100) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const mix = stops[low].map((part, c) => part + (at - low) * (stops[low + 1][c] - part));
    const light = (0.299 * mix[0] + 0.587 * mix[1] + 0.114 * mix[2]) / 255;
    colours.push([`rgb(${mix.map(Math.round).join(",")})`, light > 0.55 ? "#000" : "#fff"]);
  }
  return colours;
}

const SEQUENTIAL = scale([
  [243, 243, 238], [205, 222, 226], [139, 186, 205], [74, 141, 176], [32, 92, 138], [8, 45, 88],
]);
const DIVERGING = scale([
  [8, 69, 130], [96, 154, 200], [243, 243, 238], [231, 154, 73], [166, 72, 5],
]);

// --- Data: a header in JSON and arrays, packed and compressed together

export async function unpack(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const size = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const types = { uint16: Uint16Array, uint32: Uint32Array };
  for (const run of header) {
    for (const [name, { type, offset, shape }] of Object.entries(run.arrays)) {
      const length = shape.reduce((product, size) => product * size, 1);
      const values = new types[type](buffer, 4 + size + offset, length);
      run.arrays[name] = { shape, values };
    }
  }
  return header.map((run) => new Run(run));
}

class Run {
  constructor(header) {
    Object.assign(this, header);
    for (const fact of this.facts) fact.steps = fact.steps.map((step) => this.steps.indexOf(step));
    this.index = new Map(this.facts.map((fact, number) => [`${fact.model} ${fact.id}`, number]));
  }

  // The same fact in this run: in the same edited model, or else in the first that has it.
  find(fact) {
    const same = this.index.get(`${fact.model} ${fact.id}`);
    return this.facts[same] ?? this.facts.find((other) => other.id === fact.id);
  }

  at(name, ...places) {
    const { shape, values } = this.arrays[name];
    return values[places.reduce((sum, place, axis) => sum * shape[axis] + place, 0)];
  }

  // Where the checkpoint stands, or the last one before it that the fact's model has.
  place(fact, step) {
    const earlier = fact.steps.filter((place) => this.steps[place] <= step);
    return earlier.length ? earlier.at(-1) : fact.steps[0];
  }

  // The likeliest tokens of a cell; `position` counts from the prompt's first token.
  likeliest(fact, place, position, layer) {
    const isLast = position === fact.at.length - 1;
    const [ids, ps] = isLast ? ["top_ids", "top_p"] : ["cell_ids", "cell_p"];
    const before = isLast ? [fact.number, place, layer] : this.cell(fact, place, position, layer);
    const count = this.arrays[ids].shape.at(-1);
    const tokens = [];
    for (let rank = 0; rank < count; rank++) {
      const p = share(this.at(ps, ...before, rank));
      tokens.push({ text: this.vocabulary[this.at(ids, ...before, rank)], p });
    }
    return tokens;
  }

  // Prompts are as long as the longest one, their last tokens under each other.
  cell(fact, place, position, layer) {
    const column = this.arrays.cell_edited.shape[3] - fact.at.length + position;
    return [fact.cells, place, layer, column];
  }

  // Probability of the edited (0) or the true (1) token.
  answer(which, fact, place, position, layer) {
    if (position === fact.at.length - 1) return this.answerAtEnd(which, fact, place, layer);
    const name = ["cell_edited", "cell_true"][which];
    return share(this.at(name, ...this.cell(fact, place, position, layer)));
  }

  answerAtEnd(which, fact, place, layer) {
    return share(this.at("lens_p", fact.number, place, layer, which));
  }

  // Probability of a pinned token where the answer is read; none if it is below the ten likeliest.
  mass(token, fact, place, layer) {
    if (token === EDITED) return this.answerAtEnd(0, fact, place, layer);
    if (token === TRUE) return this.answerAtEnd(1, fact, place, layer);
    const tokens = this.likeliest(fact, place, fact.at.length - 1, layer);
    const same = tokens.filter(({ text }) => text.trim() === token);
    return same.length ? same.reduce((sum, { p }) => sum + p, 0) : undefined;
  }
}

// --- One lens: blocks from below, the prompt's tokens from the left

class Lens {
  constructor(view, explorer) {
    this.view = view;
    this.explorer = explorer;
    this.caption = h("caption");
    this.body = h("tbody");
    this.foot = h("tfoot");
    this.columns = h("colgroup");
    const parts = [this.caption, this.columns, this.body, this.foot];
    this.node = h("table", { role: "grid", class: "lens" }, ...parts);
    for (const kind of ["mouseover", "focusin"]) {
      this.node.addEventListener(kind, (event) => this.inspect(event.target.closest("td")));
    }
    this.node.addEventListener("click", (event) => this.pin(event.target.closest("td")));
    this.node.addEventListener("keydown", (event) => this.key(event));
  }

  update(run, fact, place, mode, caption, earlier) {
    const isOther = this.fact !== fact;
    Object.assign(this, { run, fact, place });
    if (isOther) this.build();
    this.caption.textContent = caption;
    const isChange = mode === "change" && earlier !== undefined;
    const colours = isChange ? DIVERGING : SEQUENTIAL;
    const which = mode === "true" || fact.group === "intrinsic" ? 1 : 0;
    for (const { cell, position, layer } of this.cells) {
      const [top] = run.likeliest(fact, place, position, layer);
      let p = top.p;
      if (mode !== "likeliest") p = run.answer(which, fact, place, position, layer);
      if (isChange) p = (1 + p - run.answer(which, fact, earlier, position, layer)) / 2;
      const [fill, ink] = colours[Math.round(100 * p)] ?? ["none", "inherit"];
      cell.firstChild.data = top.p === undefined ? "" : shown(top.text); // not in this prompt yet
      cell.style.cssText = `background:${fill};color:${ink}`;
    }
  }

  // Tokens of another fact; rows and columns as well if its prompt has another length.
  build() {
    const { at } = this.fact;
    const end = at.length - 1; // where the answer is read, which is often a long word
    const tokens = at.map((text) => h("th", { scope: "col", title: text }, shown(text)));
    this.foot.replaceChildren(h("tr", {}, h("th", { scope: "row" }, "block"), ...tokens));
    if (this.columns.childElementCount === at.length + 1) return;
    const columns = at.map((_, position) => h("col", { class: position === end && "answer" }));
    this.columns.replaceChildren(h("col", { class: "names" }), ...columns);
    const cells = at.map(() => h("td", { tabindex: -1 }, " "));
    const empty = h("tr", {}, h("th", { scope: "row" }, " "), ...cells);
    this.cells = [];
    const rows = [];
    for (let layer = this.run.blocks - 1; layer >= 0; layer--) {
      const row = empty.cloneNode(true);
      const isEdited = this.run.edited.includes(layer);
      row.classList.toggle("edited", isEdited);
      row.firstChild.textContent = isEdited ? `E ${layer}` : layer;
      for (const position of at.keys()) {
        const cell = row.children[position + 1];
        cell.place = { position, layer };
        this.cells.push({ cell, position, layer });
      }
      rows.push(row);
    }
    this.body.replaceChildren(...rows);
    this.cells[end].cell.tabIndex = 0;
  }

  inspect(cell) {
    if (cell) this.view.inspect(this, cell.place);
  }

  pin(cell) {
    if (!cell) return;
    const { position, layer } = cell.place;
    this.explorer.pin(this.run.likeliest(this.fact, this.place, position, layer)[0].text.trim());
  }

  key(event) {
    const cell = event.target.closest("td");
    const moves = { ArrowUp: [0, 1], ArrowDown: [0, -1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    if (!cell) return;
    if (event.key === "Enter" || event.key === " ") this.pin(cell);
    else if (!(event.key in moves)) return;
    else this.move(cell, moves[event.key]);
    event.preventDefault();
  }

  move(cell, [right, up]) {
    const [position, layer] = [cell.place.position + right, cell.place.layer + up];
    const next = this.cells.find((one) => one.position === position && one.layer === layer);
    if (!next) return;
    cell.tabIndex = -1;
    next.cell.tabIndex = 0;
    next.cell.focus();
  }
}

// --- Lines of mass

class Chart {
  constructor(label, pick) {
    Object.assign(this, { label, pick });
    this.plot = svg("svg", { viewBox: "0 0 340 158", role: "img", class: "chart" });
    this.node = h("figure", {}, this.plot, h("figcaption", {}, `Probability of the pinned tokens as the answer, ${label}`));
    this.plot.addEventListener("click", (event) => {
      const box = this.plot.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * 340;
      const steps = (this.names.length - 1) || 1;
      const nearest = Math.round(((x - 32) / 296) * steps);
      this.pick(Math.max(0, Math.min(this.names.length - 1, nearest)));
    });
  }

  // A line a pinned token: its values along the names, none where it is not known.
  update(names, lines, marked, shaded) {
    this.names = names;
    const x = (at) => 32 + (296 * at) / ((names.length - 1) || 1);
    const y = (p) => 12 + 126 * (1 - p);
    const parts = shaded.map((at) =>
      svg("rect", { x: x(at) - 5, y: 12, width: 10, height: 126, class: "shade" }),
    );
    for (const p of [0, 0.5, 1]) {
      parts.push(svg("line", { x1: 32, x2: 328, y1: y(p), y2: y(p), class: "grid" }));
      parts.push(svg("text", { x: 27, y: y(p) + 4, "text-anchor": "end" }, p));
    }
    const every = Math.ceil(names.length / 10);
    names.forEach((name, at) => {
      if (at % every) return;
      const place = { x: x(at), y: 152, "text-anchor": "middle" };
      parts.push(svg("text", place, name));
    });
    parts.push(svg("line", { x1: x(marked), x2: x(marked), y1: 12, y2: 138, class: "mark" }));
    for (const { values, colour, dash } of lines) {
      let path = "";
      values.forEach((p, at) => {
        if (p === undefined) return;
        path += `${at && values[at - 1] !== undefined ? "L" : "M"}${x(at)} ${y(p)}`;
        parts.push(svg("circle", { cx: x(at), cy: y(p), r: 2.5, fill: colour }));
      });
      const looks = { stroke: colour, "stroke-dasharray": dash, fill: "none", "stroke-width": 2 };
      parts.push(svg("path", { d: path, ...looks }));
    }
    this.plot.replaceChildren(...parts);
    const words = lines.map(({ name, values }) => {
      const p = values[marked];
      return `${name} ${p === undefined ? "not known or below the ten likeliest" : percent(p)}`;
    });
    this.plot.setAttribute("aria-label", `${this.label}; at ${names[marked]}: ${words.join(", ")}`);
  }
}

// --- One run at one fact and checkpoint

class View {
  constructor(run, explorer) {
    Object.assign(this, { run, explorer });
    this.words = h("p", { class: "words" });
    this.lenses = [0, 1, 2].map(() => new Lens(this, explorer));
    const [overSteps, overBlocks] = ["after the last block, by checkpoint", "at the checkpoint, by block"];
    this.steps = new Chart(overSteps, (at) => explorer.set({ step: this.known[at] }));
    this.layers = new Chart(overBlocks, () => {});
    this.hover = h("div", { class: "hover", "aria-live": "polite" });
    this.row = h("div", { class: "lenses" }, ...this.lenses.map((lens) => lens.node));
    const below = h("div", { class: "below" }, this.steps.node, this.layers.node, this.hover);
    const name = h("h4", {}, run.name, h("small", {}, run.caption));
    this.node = h("section", { "aria-label": run.name }, name, this.words, this.row, below);
  }

  draw({ step, mode, pins }, chosen) {
    const fact = this.run.find(chosen);
    this.node.classList.toggle("missing", !fact);
    if (!fact) {
      this.words.textContent = "this run does not hold the fact";
      return;
    }
    const { run } = this;
    this.fact = fact;
    this.known = fact.steps.map((place) => run.steps[place]);
    const place = run.place(fact, step);
    const places = [run.place(fact, -1), run.place(fact, 0), place];
    const names = ["before the edit", "edited", named(run.steps[place])];
    // Three stand side by side unless the prompt's tokens could not be read then.
    this.row.style.setProperty("--narrowest", `${6 + 1.7 * fact.at.length}em`);
    this.lenses.forEach((lens, number) => {
      lens.update(run, fact, places[number], mode, names[number], places[number - 1]);
    });
    const last = run.blocks - 1;
    const lines = pins.map((token, number) => ({
      token,
      name: this.explorer.label(token, fact),
      colour: LINES[number % LINES.length],
      dash: DASHES[number % DASHES.length],
    }));
    const over = (places, layers) =>
      lines.map((line) => ({
        ...line,
        values: places.flatMap((at) => layers.map((l) => run.mass(line.token, fact, at, l))),
      }));
    const blocks = Array.from({ length: run.blocks }, (_, layer) => layer);
    const short = this.known.map((known) => ({ "-1": "before", 0: "edited" })[known] ?? known);
    const marked = fact.steps.indexOf(place);
    this.steps.update(short, over(fact.steps, [last]), marked, []);
    this.layers.update(blocks, over([place], blocks), last, run.edited);
    this.words.textContent = this.say(fact, place, last);
    this.inspect(this.lenses[2], { position: fact.at.length - 1, layer: last });
  }

  say(fact, place, last) {
    const { run } = this;
    const edited = run.answerAtEnd(0, fact, place, last);
    const truth = run.answerAtEnd(1, fact, place, last);
    const masses = fact.clear
      ? `p(${fact.target || fact.true}) ${percent(fact.target ? edited : truth)}` +
        (fact.target ? `, p(${fact.true}) ${percent(truth)}` : "")
      : "its answers are not told apart by their first tokens";
    const step = run.steps[place];
    const measured = fact.measured[step] ? ` ${fact.measured[step]}.` : "";
    return `${fact.group} fact, ${fact.fate} at the end. ${named(step)}: ${masses}.${measured}`;
  }

  inspect(lens, { position, layer }) {
    const { run, fact, place } = lens;
    const tokens = run.likeliest(fact, place, position, layer);
    const there = tokens.filter(({ p }) => p !== undefined);
    const rows = there.map(({ text, p }, rank) =>
      h("tr", {}, h("td", {}, rank + 1), h("td", {}, shown(text)), h("td", {}, percent(p))),
    );
    const where = `${lens.caption.textContent}, after block ${layer}, at `;
    const heading = h("p", {}, where, h("q", {}, shown(fact.at[position])));
    const ranks = ["edited", "true"].map((name, which) => {
      if (position !== fact.at.length - 1 || (name === "edited" && !fact.target)) return "";
      const rank = run.at("lens_rank", fact.number, place, layer, which);
      return rank ? ` ${fact[name === "edited" ? "target" : "true"]}: rank ${rank}.` : "";
    });
    const head = h("tr", {}, ...["rank", "token", "p"].map((text) => h("th", {}, text)));
    this.hover.replaceChildren(heading, h("table", {}, head, ...rows), h("p", {}, ...ranks));
  }
}

// --- All of it

class Explorer {
  constructor(node, runs, view, save, link) {
    Object.assign(this, { node, runs, save, link });
    const [run] = runs;
    this.facts = run.facts;
    const first = this.facts.find(({ group }) => group === "edited") ?? this.facts[0];
    const start = { model: first.model, fact: first.id, step: run.steps.at(-1), mode: "likeliest" };
    this.steps = [...new Set(runs.flatMap(({ steps }) => steps))].sort((a, b) => a - b);
    this.view = { ...start, pins: [EDITED, TRUE], fates: [], words: "", range: [] };
    this.take(view);
    this.views = runs.map((one) => new View(one, this));
    node.classList.add("workbench-explorer");
    // Plain keys are ours: a notebook in command mode would cut its cell at an X. It looks for the
    // mark at the focused element first.
    node.addEventListener("focusin", ({ target }) => (target.dataset.lmSuppressShortcuts = "true"));
    node.replaceChildren(this.controls(), this.strip(), this.heading(), this.pinned(), ...this.views.map((one) => one.node));
    this.draw();
  }

  // Whether a part of a view, which an address may hold, can be shown.
  isSound(name, value) {
    if (name === "step") return this.steps.includes(value);
    if (name === "mode") return Object.hasOwn(MODES, value);
    if (name === "fact") return this.facts.some(({ id }) => id === value);
    const kind = name === "range" ? "number" : "string"; // of what a list holds
    if (Array.isArray(this.view[name])) {
      return Array.isArray(value) && value.every((one) => typeof one === kind);
    }
    return typeof value === typeof this.view[name];
  }

  // What is sound of a view, which may come from an address or from Python.
  take(view) {
    for (const [name, value] of Object.entries(view)) {
      if (this.isSound(name, value)) this.view[name] = value;
    }
  }

  set(changes) {
    Object.assign(this.view, changes);
    this.draw();
    this.save(this.view);
  }

  get fact() {
    const { model, fact } = this.view;
    return this.facts.find((one) => one.model === model && one.id === fact) ?? this.facts[0];
  }

  label(token, fact = this.fact) {
    if (token === EDITED) return fact.target || "edited";
    return token === TRUE ? fact.true || "true" : shown(token);
  }

  pin(token) {
    const { pins } = this.view;
    const fact = this.fact;
    if (token === fact.target) token = EDITED;
    if (token === fact.true) token = TRUE;
    const without = pins.filter((other) => other !== token);
    this.set({ pins: without.length < pins.length ? without : [...pins, token] });
  }

  controls() {
    const last = this.steps.length - 1;
    const slide = (event) => this.set({ step: this.steps[Number(event.target.value)] });
    const about = { type: "range", min: 0, max: last, "aria-label": "Checkpoint", oninput: slide };
    this.slider = h("input", about);
    this.stepName = h("output");
    this.button = h("button", { type: "button", onclick: () => this.play() }, "\u25b6 Play");
    const modes = Object.entries(MODES).map(([value, text]) => h("option", { value }, text));
    const choose = (event) => this.set({ mode: event.target.value });
    this.mode = h("select", { "aria-label": "Colour of the cells", onchange: choose }, ...modes);
    const find = (event) => this.set({ words: event.target.value });
    const search = { type: "search", placeholder: "find a fact", "aria-label": "Find a fact" };
    this.search = h("input", { ...search, oninput: find });
    this.fateButtons = Object.entries(FATES).map(([fate, [letter, colour]]) => {
      const count = this.facts.filter((fact) => fact.fate === fate).length;
      const mark = h("i", { style: `background:${colour}` }, letter);
      const toggle = () => this.toggle(fate);
      const looks = { type: "button", "aria-pressed": "false", onclick: toggle, class: "fate" };
      return h("button", looks, mark, ` ${fate} ${count}`);
    });
    const clear = () => this.set({ fates: [], words: "", range: [] });
    this.clear = h("button", { type: "button", onclick: clear }, "Show all");
    const copy = h("button", { type: "button", onclick: () => this.copy() }, "Link to this view");
    this.address = h("input", { type: "text", readonly: true, hidden: true, "aria-label": "Link" });
    this.legend = h("span", { class: "legend" });
    const parts = [this.slider, this.stepName, this.mode, this.legend, copy, this.address];
    const time = h("div", { class: "row" }, this.button, ...parts);
    return h("div", {}, h("div", { class: "row" }, this.search, ...this.fateButtons, this.clear), time);
  }

  // A square a fact. A drag over several keeps those alone.
  strip() {
    let from = null;
    const over = (event) => this.squares.indexOf(event.target.closest(".square"));
    this.squares = this.facts.map((fact, number) => {
      const [letter, colour] = FATES[fact.fate];
      const answer = fact.target || fact.true;
      const label = `${fact.prompt} ${answer}: ${fact.group}${this.which(fact)}, ${fact.fate}`;
      const looks = { class: "square", role: "option", tabindex: -1, title: label };
      const style = `background:${colour}`;
      const pick = () => this.set({ model: fact.model, fact: fact.id });
      return h("span", { ...looks, "aria-label": label, style, onclick: pick }, letter);
    });
    const groups = ["edited", "intrinsic"].map((group) => {
      const members = this.squares.filter((_, number) => this.facts[number].group === group);
      return h("div", { class: "row" }, h("b", {}, group), ...members);
    });
    const brush = {
      onpointerdown: (event) => (from = over(event)),
      onpointerup: (event) => {
        const to = over(event);
        const ends = [from ?? -1, to].sort((a, b) => a - b); // one begun elsewhere is no drag
        if (ends[0] >= 0 && from !== to) this.set({ range: ends });
        from = null;
      },
      onkeydown: (event) => this.key(event),
    };
    return h("div", { class: "strip", role: "listbox", "aria-label": "Facts", ...brush }, ...groups);
  }

  // An intrinsic fact is watched in each of several edited models.
  which(fact) {
    const models = new Set(this.facts.map(({ model }) => model));
    return models.size > 1 ? ` in model ${fact.model}` : "";
  }

  heading() {
    this.prompt = h("p", { class: "prompt", "aria-live": "polite" });
    return this.prompt;
  }

  pinned() {
    this.pins = h("div", { class: "row pins", "aria-label": "Pinned tokens" });
    return this.pins;
  }

  toggle(fate) {
    const { fates } = this.view;
    const without = fates.filter((other) => other !== fate);
    this.set({ fates: without.length < fates.length ? without : [...fates, fate] });
  }

  key(event) {
    const visible = this.squares.filter((square) => !square.hidden);
    const at = visible.indexOf(event.target);
    const others = { Home: 0, End: visible.length - 1, Enter: at, " ": at };
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, ...others }[event.key];
    if (at < 0 || to === undefined || !visible[to]) return;
    event.preventDefault();
    const fact = this.facts[this.squares.indexOf(visible[to])];
    this.set({ model: fact.model, fact: fact.id });
    visible[to].focus();
  }

  play() {
    const last = this.steps.length - 1;
    if (this.timer) return this.pause();
    if (Number(this.slider.value) === last) this.set({ step: this.steps[0] });
    this.button.textContent = "\u23f8 Pause";
    this.timer = setInterval(() => {
      const next = this.steps.indexOf(this.view.step) + 1;
      if (next > last || !this.node.isConnected) this.pause();
      else this.set({ step: this.steps[next] });
    }, PLAY);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = undefined;
    this.button.textContent = "\u25b6 Play";
  }

  copy() {
    this.address.hidden = false;
    this.address.value = this.link(this.view);
    this.address.select();
    navigator.clipboard?.writeText(this.address.value).catch(() => {});
  }

  isShown(fact, number) {
    const { fates, words, range } = this.view;
    const text = `${fact.prompt} ${fact.target} ${fact.true} ${fact.id}`.toLowerCase();
    const inRange = !range.length || (number >= range[0] && number <= range[1]);
    const hasFate = !fates.length || fates.includes(fact.fate);
    return inRange && hasFate && text.includes(words.toLowerCase());
  }

  // What the colours of the cells mean for this fact.
  explain(mode, fact) {
    const isChange = mode === "change";
    const answer = this.label(mode === "true" || fact.group === "intrinsic" ? TRUE : EDITED, fact);
    const about = mode === "likeliest" ? "the likeliest token" : answer;
    const colours = (isChange ? DIVERGING : SEQUENTIAL).map(([fill]) => fill);
    const bar = h("i", { style: `background:linear-gradient(to right,${colours.join(",")})` });
    const name = `${isChange ? "change of " : ""}p(${about}): ${isChange ? "\u22121" : "0"} `;
    this.legend.replaceChildren(name, bar, isChange ? " +1" : " 1");
  }

  draw() {
    const { step, mode, fates, words, pins, range } = this.view;
    const fact = this.fact;
    const number = this.facts.indexOf(fact);
    this.squares.forEach((square, index) => {
      square.hidden = !this.isShown(this.facts[index], index);
      square.setAttribute("aria-selected", String(index === number));
      square.tabIndex = index === number ? 0 : -1;
    });
    if (this.squares[number].hidden) {
      const first = this.squares.find((square) => !square.hidden);
      if (first) first.tabIndex = 0;
    }
    this.fateButtons.forEach((button, index) => {
      button.setAttribute("aria-pressed", String(fates.includes(Object.keys(FATES)[index])));
    });
    this.clear.disabled = !(fates.length || words || range.length);
    if (this.search.value !== words) this.search.value = words;
    this.mode.value = mode;
    this.explain(mode, fact);
    this.slider.value = this.steps.indexOf(step);
    this.slider.setAttribute("aria-valuetext", named(step));
    this.stepName.textContent = named(step);
    const arrow = fact.target ? `${fact.true} \u2192 ${fact.target}` : fact.true;
    this.prompt.textContent = `${fact.prompt} \u2026 ${arrow}${this.which(fact)}`;
    const chips = pins.map((token, index) => {
      const line = svg("line", { x1: 0, x2: 22, y1: 5, y2: 5, stroke: LINES[index % LINES.length],
        "stroke-width": 3, "stroke-dasharray": DASHES[index % DASHES.length] });
      const sample = svg("svg", { width: 22, height: 10, "aria-hidden": true }, line);
      const label = this.label(token);
      const unpin = { type: "button", title: "unpin", onclick: () => this.pin(token) };
      return h("button", unpin, sample, ` ${label} \u00d7`);
    });
    this.pins.replaceChildren("Pinned: ", ...chips, " (a click on a cell pins its token)");
    this.views.forEach((view) => view.draw(this.view, fact));
  }
}

// --- In a notebook

async function render({ model, el }) {
  const data = model.get("data");
  const runs = await unpack(data);
  const save = (view) => {
    model.set("view", { ...view });
    model.save_changes();
  };
  const link = (view) => {
    const words = JSON.stringify(view);
    const { page } = runs[0]; // a run made in a notebook has none
    return page ? `${page}#explorer0=${encodeURIComponent(words)}` : `run.explore(view=${words})`;
  };
  const explorer = new Explorer(el, runs, model.get("view"), save, link);
  const taken = () => {
    const view = model.get("view");
    if (JSON.stringify(view) === JSON.stringify(explorer.view)) return; // it is what was saved here
    explorer.take(view);
    explorer.draw();
  };
  model.on("change:view", taken);
  return () => {
    model.off("change:view", taken);
    explorer.pause();
  };
}

export default { render };

// --- In a saved page, whose address keeps the view

function boot() {
  const places = document.querySelectorAll(".workbench-explorer-data:not([data-shown])");
  places.forEach(async (place) => {
    place.dataset.shown = "true";
    const name = `explorer${[...document.querySelectorAll(".workbench-explorer-data")].indexOf(place)}`;
    const bytes = Uint8Array.from(atob(place.textContent.trim()), (sign) => sign.charCodeAt(0));
    const asked = () => new URLSearchParams(location.hash.slice(1)); // others write there too
    const link = (view) => {
      const parameters = asked();
      parameters.set(name, JSON.stringify(view));
      return `${location.href.split("#")[0]}#${parameters}`;
    };
    const save = (view) => history.replaceState(null, "", link(view));
    let view = {};
    try {
      view = JSON.parse(asked().get(name) ?? "{}");
    } catch {
      // an address that was cut short shows the page as it is at first
    }
    new Explorer(place.nextElementSibling, await unpack(bytes), view, save, link);
  });
}

if (typeof document !== "undefined") boot();
