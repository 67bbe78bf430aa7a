// The strip of stages. Each cell has a pattern, a height and a sign for its state, and a colour besides.

import { byId, bytes, element, integer, setText } from "./dom.js";

const STATES = {
  e: "empty",
  l: "loading",
  r: "ready",
  c: "computing",
  d: "computed",
  f: "failed: it could not be read",
};

const LEGEND = [
  ["resident", "r", true],
  ["ready", "r", false],
  ["loading", "l", false],
  ["computing", "c", false],
  ["empty", "e", false],
  ["failed", "f", false],
];

export class Strip {
  // All mutable state: the stages, their cells, their letters, and the stage that is pointed at.
  #stages = [];
  #cells = [];
  #letters = "";
  #pointed = null;
  #root = byId("strip");
  #detail = byId("stage-detail");
  #hint = this.#detail.textContent;
  #sweep = byId("sweep");
  #counts = new Map();

  constructor() {
    for (const [name, state, resident] of LEGEND) {
      const count = element("b", {}, "0");
      const cell = element("span", { class: "cell", "data-state": state, "data-resident": resident });
      const item = element("li", { hidden: name === "failed" }, cell, name, count);
      byId("stage-legend").append(item);
      this.#counts.set(name, { count, item });
    }
    new ResizeObserver(() => this.#arrange()).observe(this.#root);
    this.#root.addEventListener("pointermove", (event) => this.#point(this.#cells.indexOf(event.target)));
    this.#root.addEventListener("pointerleave", () => this.#point(-1));
    this.#root.addEventListener("blur", () => this.#point(-1));
    this.#root.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** Takes the stages of a model: [label, bytes, whether it is resident]. */
  model(stages) {
    this.#stages = stages;
    this.#letters = "";
    this.#cells = stages.map(([, , resident]) =>
      element("span", { class: "cell", "data-state": "e", "data-resident": Boolean(resident) }),
    );
    this.#root.dataset.size = stages.length <= 64 ? "few" : stages.length <= 128 ? "many" : "most";
    this.#root.replaceChildren(...this.#cells);
    this.#arrange();
    this.#point(-1);
  }

  /** Makes rows of the same length, as few as the width allows. */
  #arrange() {
    const style = getComputedStyle(this.#root);
    const [cell, gap] = ["--cell-width", "--gap"].map((name) => parseFloat(style.getPropertyValue(name)));
    const mostInRow = Math.max(1, Math.floor((this.#root.clientWidth + gap) / (cell + gap)));
    const numRows = Math.ceil(this.#cells.length / mostInRow);
    const numColumns = Math.max(1, Math.ceil(this.#cells.length / Math.max(1, numRows)));
    this.#root.style.gridTemplateColumns = `repeat(${numColumns}, minmax(0, 1fr))`;
  }

  state({ stages: letters, sweep, sweeping, stage }) {
    if (letters.length !== this.#cells.length) return; // of a model that is not told yet
    for (let idx = 0; idx < letters.length; idx += 1) {
      if (letters[idx] !== this.#letters[idx]) this.#cells[idx].dataset.state = letters[idx];
    }
    this.#letters = letters;
    this.#count();
    this.#tellSweep(sweep, sweeping, stage);
    if (this.#pointed !== null) this.#tellPointed();
  }

  #count() {
    const counts = { resident: 0, ready: 0, loading: 0, computing: 0, empty: 0, failed: 0 };
    this.#stages.forEach(([, , resident], idx) => {
      const state = this.#letters[idx];
      if (resident && (state === "r" || state === "c")) counts.resident += 1;
      if (state === "r" && !resident) counts.ready += 1;
      if (state === "l") counts.loading += 1;
      if (state === "c") counts.computing += 1;
      if (state === "e" || state === "d") counts.empty += 1;
      if (state === "f") counts.failed += 1;
    });
    const parts = Object.entries(counts).map(([name, number]) => {
      const { count, item } = this.#counts.get(name);
      setText(count, String(number));
      if (name === "failed") item.hidden = number === 0;
      return `${number} ${name}`;
    });
    this.#root.setAttribute("aria-label", `${this.#stages.length} stages: ${parts.join(", ")}`);
  }

  #tellSweep(sweep, sweeping, stage) {
    const number = element("b", {}, `Sweep ${integer(sweep + 1)}`);
    if (!sweeping) {
      this.#sweep.replaceChildren(sweep === 0 ? "waits for a request" : `${integer(sweep)} sweeps so far; waits for a request`);
    } else if (stage === null) {
      this.#sweep.replaceChildren(number, " begins");
    } else {
      this.#sweep.replaceChildren(number, ` · stage ${stage + 1} of ${this.#stages.length} · ${this.#stages[stage][0]}`);
    }
  }

  #onKey(event) {
    const last = this.#cells.length - 1;
    const from = this.#pointed ?? -1;
    const to = {
      ArrowRight: Math.min(last, from + 1),
      ArrowLeft: Math.max(0, from - 1),
      Home: 0,
      End: last,
      Escape: -1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.#point(to);
    if (to >= 0) setText(byId("announcement"), this.#detail.textContent);
  }

  #point(idx) {
    if (this.#pointed !== null) this.#cells[this.#pointed]?.classList.remove("pointed");
    this.#pointed = idx < 0 ? null : idx;
    if (this.#pointed === null) {
      setText(this.#detail, this.#hint);
      return;
    }
    this.#cells[idx].classList.add("pointed");
    this.#tellPointed();
  }

  #tellPointed() {
    const [label, size, resident] = this.#stages[this.#pointed];
    const state = STATES[this.#letters[this.#pointed]] ?? "empty";
    setText(this.#detail, `${label} · ${bytes(size)} · ${resident ? "resident, " : ""}${state}`);
  }
}
