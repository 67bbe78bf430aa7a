// Tokens a second, seconds a sweep beside the disk's limit, bytes a second, and how often experts are in memory.

import { byId, bytes, counted, duration, element, integer, percent, setText, significant } from "./dom.js";
import { Rates } from "./rates.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 36;

function svg(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function figure(name, unit) {
  const value = element("span", {}, "–");
  const unitNode = element("small", {}, unit);
  const node = element("dl", { class: "figure" });
  node.append(element("dt", {}, name), element("dd", { class: "value" }, value, unitNode));
  return { node, value, unit: unitNode };
}

export class Speed {
  #rates = new Rates();
  #note = byId("speed-note");
  #tokens = figure("Tokens a second", "");
  #read = figure("Read from disk", "");
  #sweep = figure("A sweep takes", "");
  #experts = figure("Experts in memory when needed", "");
  #expertShare = element("span");
  #expertNote = element("p", { class: "note" });
  #share = element("span");
  #limit = element("p", { class: "note" });
  #line = svg("polyline", {});
  #area = svg("polygon", {});
  #chart = svg("svg", {
    class: "history",
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  #diskS = 0;
  #isMeasured = false;

  constructor() {
    const base = svg("line", { x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT });
    this.#chart.append(base, this.#area, this.#line);
    const chart = element("div", { class: "figure wide" });
    chart.append(this.#chart);
    this.#sweep.node.classList.add("wide");
    const meter = element("div", { class: "meter" }, this.#share);
    this.#sweep.node.append(element("dd", {}, meter, this.#limit));
    this.#experts.node.classList.add("wide");
    this.#experts.node.append(element("dd", {}, element("div", { class: "meter" }, this.#expertShare), this.#expertNote));
    byId("figures").append(this.#tokens.node, this.#read.node, chart, this.#sweep.node, this.#experts.node);
  }

  model({ disk_sweep_s: diskS, disk_measured: isMeasured }) {
    this.#diskS = diskS;
    this.#isMeasured = isMeasured;
  }

  state(state) {
    const { busy, tokensPerS, bytesPerS, sweepS, tokensPerSweep, hitRate } = this.#rates.add(state);
    setText(this.#tokens.value, tokensPerS === null ? "–" : significant(tokensPerS));
    const [readValue, readUnit] = bytesPerS === null ? ["–", "B"] : bytes(bytesPerS).split(" ");
    setText(this.#read.value, readValue);
    setText(this.#read.unit, `${readUnit}/s`);
    const [sweepValue, sweepUnit] = sweepS == null ? ["–", ""] : duration(sweepS);
    setText(this.#sweep.value, sweepValue);
    setText(this.#sweep.unit, sweepUnit);
    this.#tellLimit(sweepS, state.experts.total > 0);
    this.#tellExperts(state.experts, hitRate);
    const perSweep = tokensPerSweep == null ? "" : `${significant(tokensPerSweep)} tokens a sweep`;
    setText(this.#note, busy ? perSweep : "idle");
    this.#draw();
  }

  /** How much of a sweep the disk needs at the least: all of the meter, where the disk is the limit. */
  #tellLimit(sweepS, hasExperts) {
    const source = this.#isMeasured ? "as measured here" : "estimated";
    if (this.#diskS === 0) {
      this.#share.style.width = "0";
      const nothing = "Nothing is read from disk: all weights are in memory.";
      setText(this.#limit, hasExperts ? "Only experts that are not in memory are read from disk." : nothing);
      return;
    }
    const limit = `The disk's limit${hasExperts ? " without experts" : ""}: ${duration(this.#diskS).join(" ")}, ${source}`;
    if (sweepS == null) {
      setText(this.#limit, limit);
      return;
    }
    const share = this.#diskS / sweepS;
    this.#share.style.width = `${100 * Math.min(1, share)}%`;
    setText(this.#limit, `${limit} (${percent(share)})`);
  }

  /** How many of the experts that sweeps asked for were in memory; and of how many they are. */
  #tellExperts({ in_memory: inMemory, total }, hitRate) {
    this.#experts.node.hidden = total === 0;
    setText(this.#experts.value, hitRate == null ? "–" : percent(hitRate));
    this.#expertShare.style.width = `${100 * (hitRate ?? 0)}%`;
    setText(this.#expertNote, `${integer(inMemory)} of ${counted(total, "expert")} are in memory now.`);
  }

  #draw() {
    const points = this.#rates.history;
    const most = Math.max(1, ...points.map(([, value]) => value));
    const drawn = points.map(([x, value]) => `${(x * WIDTH).toFixed(1)},${(HEIGHT - 2 - (value / most) * (HEIGHT - 4)).toFixed(1)}`);
    const left = (points[0]?.[0] ?? 1) * WIDTH;
    this.#line.setAttribute("points", drawn.join(" "));
    this.#area.setAttribute("points", `${left.toFixed(1)},${HEIGHT} ${drawn.join(" ")} ${WIDTH},${HEIGHT}`);
  }
}
