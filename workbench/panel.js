// What the panel needs of the browser: the strip of the model's blocks, where a problem is shown, and
// keys that reach the focused control. Python holds the truth: what is chosen on the strip is sent to
// it as {field, text, number}, and what it makes of that comes back as `state`.

const ROWS = [
  { field: "layers", letter: "E", title: "E edited", blocks: "edited", one: "edited block" },
  { field: "plan", letter: "M", title: "M may move", blocks: "moving", one: "block that may move" },
];

// What begins a line of its own in the panel, for panel.css.
const LINES = { "--choices": ".workbench-field-task", "--running": ".mod-primary" };

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// 0, 1, 2, 5 as "0-2, 5".
function spans(blocks) {
  const starts = blocks.filter((block) => !blocks.includes(block - 1));
  const ends = blocks.filter((block) => !blocks.includes(block + 1));
  return starts.map((one, i) => (one === ends[i] ? one : `${one}-${ends[i]}`)).join(", ") || "none";
}

// How a range is written in its field: as blocks, or as the plan that moves these.
function written(field, first, last, count) {
  if (field === "layers") return first === last ? `${first}` : `${first}-${last}`;
  if (last < count - 1) return `window:${first}-${last}`;
  return first ? `after:${first - 1}` : "all";
}

const limited = (value, last) => Math.max(0, Math.min(last, value));

// One row of boxes with a thumb at either end of its range. `send` is told a range that was chosen.
class Row {
  constructor(about, grid, place, count, send) {
    Object.assign(this, { ...about, place, count, send });
    const title = element("span", "title", this.title);
    title.style.gridArea = `${place} / 1`;
    this.boxes = Array.from({ length: count }, (_, block) => {
      const box = element("span", `box ${this.field}`);
      box.style.gridArea = `${place} / ${block + 2}`;
      return box;
    });
    this.thumbs = ["First", "Last"].map((end, which) => {
      const thumb = element("span", `thumb ${end.toLowerCase()}`);
      const names = { role: "slider", "aria-label": `${end} ${this.one}`, "aria-valuemin": 0 };
      names["aria-valuemax"] = count - 1;
      for (const [name, value] of Object.entries(names)) thumb.setAttribute(name, value);
      thumb.addEventListener("keydown", (event) => this.key(event, which));
      return thumb;
    });
    grid.append(title, ...this.boxes, ...this.thumbs);
    for (const part of [...this.boxes, ...this.thumbs])
      part.addEventListener("pointerdown", (event) => this.drag(event, part));
  }

  // The range that is shown, as [first, last].
  ends() {
    const first = this.marked.indexOf(true);
    return first < 0 ? [0, 0] : [first, this.marked.lastIndexOf(true)];
  }

  // Mark a range at once, before Python has answered.
  preview(first, last) {
    this.show(this.boxes.map((_, block) => first <= block && block <= last));
  }

  // From one block to another, but no wider than the editor takes: then the range follows `to`.
  stretch(from, to) {
    const reach = (this.most || this.count) - 1;
    const start = to > from ? Math.max(from, to - reach) : Math.min(from, to + reach);
    return [Math.min(start, to), Math.max(start, to)];
  }

  show(marked) {
    this.marked = marked;
    this.boxes.forEach((box, block) => {
      box.classList.toggle("on", marked[block]);
      box.textContent = marked[block] ? this.letter : "";
    });
    this.ends().forEach((block, which) => {
      const thumb = this.thumbs[which];
      thumb.style.gridArea = `${this.place} / ${block + 2}`;
      thumb.setAttribute("aria-valuenow", block);
      thumb.setAttribute("aria-valuetext", `block ${block}`);
    });
  }

  update(state) {
    this.most = this.field === "layers" && state.most;
    this.off = this.field === state.off;
    for (const thumb of this.thumbs) {
      thumb.tabIndex = this.off ? -1 : 0;
      thumb.setAttribute("aria-disabled", this.off);
      thumb.hidden = this.off;
    }
    for (const box of this.boxes) box.classList.toggle("off", this.off);
    this.show(this.boxes.map((_, block) => state[this.blocks].includes(block)));
  }

  // A thumb pushes the other along where it would pass it, or where the range would be too wide.
  key(event, which) {
    const ends = this.ends();
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: 4, PageDown: -4 };
    const places = { Home: 0, End: this.count - 1 };
    const to = places[event.key] ?? ends[which] + steps[event.key];
    if (Number.isNaN(to) || this.off || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    const moved = limited(to, this.count - 1);
    const other = which ? Math.min(ends[0], moved) : Math.max(ends[1], moved);
    const range = this.stretch(other, moved);
    this.preview(...range);
    this.send(this.field, ...range);
  }

  // From the block that was pressed, or from the other end if it was a thumb, to where it ends.
  drag(event, part) {
    if (this.off || event.button) return;
    event.preventDefault();
    const which = this.thumbs.indexOf(part);
    const from = which < 0 ? this.boxes.indexOf(part) : this.ends()[1 - which];
    let range = which < 0 ? [from, from] : this.ends();
    this.preview(...range);
    this.thumbs[Math.max(which, 0)].focus();
    part.setPointerCapture(event.pointerId);
    const move = ({ clientX }) => {
      const left = this.boxes[0].getBoundingClientRect().left;
      const right = this.boxes.at(-1).getBoundingClientRect().right;
      const block = Math.floor(((clientX - left) / (right - left)) * this.count);
      range = this.stretch(from, limited(block, this.count - 1));
      this.preview(...range);
    };
    const end = ({ type }) => {
      part.removeEventListener("pointermove", move);
      part.removeEventListener("pointerup", end);
      part.removeEventListener("pointercancel", end);
      if (type === "pointerup") this.send(this.field, ...range);
      else this.redraw();
    };
    part.addEventListener("pointermove", move);
    part.addEventListener("pointerup", end);
    part.addEventListener("pointercancel", end);
  }
}

function render({ model, el }) {
  let rows = [];
  let sent = 0; // ranges sent so far: what is drawn on the way to the last answer is out of date
  let answered = 0;
  let last = ""; // the field that was changed last

  function build(count) {
    const send = (field, first, end) =>
      model.send({ field, text: written(field, first, end, count), number: ++sent });
    el.replaceChildren();
    const grid = element("div", "workbench-blocks");
    grid.setAttribute("role", "group");
    grid.setAttribute("aria-label", "Blocks of the model");
    grid.classList.toggle("many", count > 24);
    grid.style.setProperty("--count", count);
    const every = Math.ceil(count / 30); // numbers beside each other must not touch
    for (let block = 0; block < count; block++) {
      const number = element("span", "number", block % every ? "" : block);
      number.style.gridArea = `1 / ${block + 2}`;
      grid.append(number);
    }
    rows = ROWS.map((about, place) => new Row(about, grid, place + 2, count, send));
    for (const row of rows) row.redraw = draw;
    if (count) el.append(grid);
    el.append(element("div", "workbench-words"));
  }

  function draw() {
    const state = model.get("state");
    if (!rows.length || rows[0].boxes.length !== state.count) build(state.count);
    if (state.count) for (const row of rows) row.update(state);
    el.querySelector(".workbench-words").textContent = words(state);
    place(state.problem);
  }

  function words({ count, edited, moving }) {
    if (!count) return "The model is not here yet: its blocks are shown once it is loaded.";
    const panel = el.closest(".workbench-panel");
    const varied = panel?.querySelector(".workbench-field-values") ? "In one run or another: " : "";
    const blocks = [...Array(count).keys()];
    const rest = moving.includes("embeddings") ? " and embeddings, final norm and head" : "";
    const moves = spans(blocks.filter((block) => moving.includes(block)));
    const still = spans(blocks.filter((block) => !moving.includes(block)));
    const changed = spans(blocks.filter((block) => edited.includes(block)));
    return `${varied}E edited: ${changed}. M may move in tuning: ${moves}${rest}. Still: ${still}.`;
  }

  // The field that a problem is about: one that stands there as name=value, else the first that is
  // named, else the last that was changed. One that the notebook varies cannot be changed: its values
  // can.
  function about(panel, problem) {
    const field = (name) => name && panel.querySelector(`.workbench-field-${name}`);
    const names = [...(problem.match(/\w+(?==)/g) ?? []), ...(problem.match(/[a-z_]+/g) ?? [])];
    const name = names.find(field) ?? last;
    return (name === model.get("state").off && field("values")) || field(name);
  }

  // Show a problem beneath the line of its field, and mark the field. Everything keeps its place in
  // the document, so that nothing that has the focus is made anew.
  function place(problem) {
    const panel = el.closest(".workbench-panel");
    if (!panel) return;
    const parts = [...panel.children];
    const wrong = problem && about(panel, problem);
    for (const field of panel.querySelectorAll("[class*=workbench-field-]")) {
      const input = field.querySelector("input, select");
      field.classList.toggle("workbench-wrong", field === wrong);
      if (field === wrong) input?.setAttribute("aria-invalid", "true");
      else input?.removeAttribute("aria-invalid");
    }
    parts.forEach((part, index) => (part.style.order = 2 * index));
    for (const [start, first] of Object.entries(LINES)) {
      const order = parts.indexOf(panel.querySelector(first)) * 2 - 1;
      panel.style.setProperty(start, order);
    }
    if (!wrong) return;
    const line = parts.filter((part) => part.offsetTop === wrong.offsetTop);
    const message = parts.find((part) => part.querySelector(":scope [role=alert]"));
    if (message) message.style.order = Math.max(...line.map((part) => Number(part.style.order))) + 1;
  }

  function changed({ target }) {
    const field = target.closest(".workbench-panel [class*=workbench-field-]");
    last = field?.className.match(/workbench-field-(\w+)/)[1] ?? last;
  }

  // A button beside the fact that unfolds the fields of a fact of one's own; they are there from the
  // start if one of them is filled.
  function foldable() {
    const panel = el.closest(".workbench-panel");
    const fact = panel?.querySelector(".workbench-field-fact");
    if (!fact || fact.querySelector("button")) return;
    const button = element("button", "jupyter-button", "A fact of your own");
    const unfold = (is) => {
      panel.classList.toggle("workbench-unfolded", is);
      button.setAttribute("aria-expanded", is);
    };
    const typed = ["subject", "prompt", "object", "target"];
    unfold(typed.some((name) => panel.querySelector(`.workbench-field-${name} input`)?.value));
    button.addEventListener("click", () => unfold(button.ariaExpanded !== "true"));
    fact.append(button);
  }

  // A notebook in command mode takes plain keys for itself: an arrow leaves the panel, X cuts its
  // cell. Widgets cannot carry the attribute that forbids it, so it is set as such a key is pressed;
  // those with Ctrl, Alt or Meta stay the notebook's.
  function keep({ target, ctrlKey, altKey, metaKey }) {
    if (target.matches?.(".workbench-panel *"))
      target.toggleAttribute("data-lm-suppress-shortcuts", !(ctrlKey || altKey || metaKey));
  }

  const follow = () => answered === sent && draw();
  const settle = ({ settled }) => {
    answered = settled;
    follow();
  };
  window.addEventListener("keydown", keep, true);
  window.addEventListener("change", changed, true);
  model.on("change:state", follow);
  model.on("msg:custom", settle);
  draw();
  setTimeout(() => { // once all of it stands in the panel
    draw();
    foldable();
  }, 300);
  return () => {
    window.removeEventListener("keydown", keep, true);
    window.removeEventListener("change", changed, true);
    model.off("change:state", follow);
    model.off("msg:custom", settle);
  };
}

export default { render };
