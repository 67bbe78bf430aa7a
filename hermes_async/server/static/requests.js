// The requests that share the sweeps, each with the tokens of its prompt and of its answer.

import { byId, counted, element, integer, setText } from "./dom.js";

const MAX_ROWS = 8;

/** One request, as the server tells it. */
export function requestOf([id, activity, promptTokens, computedTokens, outputTokens, maxOutputTokens, inSession]) {
  return { id, activity, promptTokens, computedTokens, outputTokens, maxOutputTokens, inSession: Boolean(inSession) };
}

/** What a request does now, for people. */
export function describe(request) {
  const { activity, promptTokens, computedTokens, outputTokens, maxOutputTokens } = request;
  if (activity === "preparing") return "reads its prompt";
  if (activity === "prefilling") return `prompt ${integer(computedTokens)} of ${counted(promptTokens, "token")}`;
  if (activity === "generating") return `${integer(outputTokens)} of ${counted(maxOutputTokens, "token")}`;
  if (activity === "waiting") return "waits for memory";
  if (activity === "restoring") return "reads its history";
  if (activity === "paused") return `paused at ${counted(outputTokens, "token")}`;
  return "ends";
}

function shareOf({ activity, promptTokens, computedTokens, outputTokens, maxOutputTokens }) {
  if (activity === "generating" || activity === "paused") return maxOutputTokens ? outputTokens / maxOutputTokens : 1;
  return promptTokens ? computedTokens / promptTokens : 0;
}

export class Requests {
  #root = byId("requests");
  #note = byId("requests-note");
  #rows = new Map();
  #nameOf;

  /** nameOf gives the name of a request that this page made, or null. */
  constructor(nameOf) {
    this.#nameOf = nameOf;
  }

  state({ requests, num_requests: numRequests, num_forwards: numForwards, num_sessions: numSessions }) {
    const shown = requests.slice(0, MAX_ROWS).map(requestOf);
    const ids = new Set(shown.map(({ id }) => id));
    for (const [id, row] of this.#rows) {
      if (!ids.has(id)) {
        row.node.remove();
        this.#rows.delete(id);
      }
    }
    for (const request of shown) this.#show(request);
    const notes = [];
    if (numRequests > shown.length) notes.push(`${numRequests - shown.length} more`);
    if (numForwards) notes.push(counted(numForwards, "forward pass", "forward passes"));
    if (numSessions) notes.push(counted(numSessions, "open session"));
    setText(this.#note, notes.join(" · "));
    this.#root.querySelector(".empty-list")?.remove();
    if (!numRequests) this.#root.append(element("li", { class: "empty-list" }, "No request is under way."));
  }

  #show(request) {
    let row = this.#rows.get(request.id);
    if (!row) {
      row = { who: element("span", { class: "who" }), what: element("span", { class: "what" }), bar: element("span") };
      row.node = element("li", { class: "request" }, row.who, row.what, element("div", { class: "track" }, row.bar));
      this.#rows.set(request.id, row);
      this.#root.append(row.node);
    }
    const name = this.#nameOf(request.id);
    if (row.name !== name) {
      row.who.replaceChildren(name ?? (request.inSession ? "A session " : "A request "));
      if (name === null) row.who.append(element("code", {}, request.id.slice(-8)));
      row.name = name;
    }
    row.node.dataset.activity = request.activity;
    setText(row.what, describe(request));
    row.bar.style.width = `${100 * Math.min(1, shareOf(request))}%`;
  }
}
