// The model's weights as a thin bar; below it the budget, enlarged, as a stacked bar; and the same in numbers.

import { byId, bytes, element, percent, setText } from "./dom.js";

const PARTS = [
  ["weights", "Weights that stay"],
  ["ring", "Ring of buffers"],
  ["experts", "Experts"],
  ["workspace", "Workspace"],
  ["kv", "KV cache"],
  ["other", "Draft model"],
  ["kv-free", "Free, set aside for KV"],
  ["free", "Free"],
];

export class Memory {
  #root = byId("memory");
  #note = byId("memory-note");
  #rows = new Map();
  #share = element("span");
  #model = element("div", { class: "scale-model" }, this.#share);
  #wedge = element("div", { class: "scale-wedge" });
  #bar = element("div", { class: "scale-budget", role: "img" });
  #total = element("td");
  #weights = 0;

  constructor() {
    const body = element("tbody");
    for (const [part, name] of PARTS) {
      const segment = element("div", { class: "part", "data-part": part });
      const swatch = element("span", { class: "swatch", "data-part": part });
      const size = element("td");
      const share = element("td");
      const row = element("tr", {}, element("th", { scope: "row" }, swatch, name), size, share);
      this.#rows.set(part, { segment, size, share, row });
      this.#bar.append(segment);
      body.append(row);
    }
    body.lastChild.classList.add("before-total");
    body.append(element("tr", { class: "total" }, element("th", { scope: "row" }, "Budget"), this.#total, element("td")));
    this.#root.append(
      element("div", { class: "scale" }, this.#model, this.#wedge, this.#bar),
      element("table", { class: "parts" }, element("caption", { class: "hidden-text" }, "Memory by kind"), body),
    );
  }

  model({ plan }) {
    this.#weights = plan.weight_bytes;
  }

  state({ memory }) {
    const unusedKV = Math.min(memory.free, memory.kv_budget - memory.kv);
    const sizes = { ...memory, "kv-free": unusedKV, free: memory.free - unusedKV };
    const share = percentOf(Math.min(memory.budget, this.#weights), this.#weights);
    this.#share.style.width = share;
    this.#wedge.style.clipPath = `polygon(0 0, ${share} 0, 100% 100%, 0 100%)`;
    for (const [part, { segment, size, share, row }] of this.#rows) {
      segment.style.width = percentOf(sizes[part], memory.budget);
      segment.hidden = sizes[part] === 0;
      row.hidden = sizes[part] === 0 && part !== "kv" && part !== "free";
      setText(size, bytes(sizes[part]));
      setText(share, percent(sizes[part] / memory.budget));
    }
    setText(this.#total, bytes(memory.budget));
    setText(this.#note, `${bytes(this.#weights)} of weights in ${bytes(memory.budget)}`);
    const used = memory.budget - memory.free;
    this.#bar.setAttribute("aria-label", `${bytes(used)} of the budget of ${bytes(memory.budget)} in use`);
  }
}

const percentOf = (part, whole) => `${whole ? (100 * part) / whole : 0}%`;
