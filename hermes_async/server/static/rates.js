// Rates from counts: differences over the last seconds in which the engine had requests.

const WINDOW_S = 3;
const MIN_SWEEPS = 2;
const HISTORY_S = 60;

export class Rates {
  // All mutable state: samples of the counts since the engine became busy, and one rate of tokens for each second.
  #samples = [];
  #history = [];
  #last = null;

  /** Takes a state; returns the rates now. A rate is null while too little is known. */
  add({ at, sweep, tokens, prompt_tokens: promptTokens, bytes_read: bytesRead, experts, num_requests, num_forwards }) {
    const busy = num_requests + num_forwards > 0;
    if (!busy) {
      this.#samples = [];
      this.#remember(at, 0);
      return { busy, ...this.#last, tokensPerS: 0, bytesPerS: 0 };
    }
    if (sweep < (this.#samples.at(-1)?.sweep ?? 0)) this.#samples = []; // the server was started again
    this.#samples.push({ at, sweep, tokens, promptTokens, bytesRead, experts });
    const last = this.#samples.at(-1);
    while (this.#samples.length > 2) {
      const next = this.#samples[1];
      if (last.at - next.at < WINDOW_S || last.sweep - next.sweep < MIN_SWEEPS) break;
      this.#samples.shift();
    }
    const [first] = this.#samples;
    const seconds = last.at - first.at;
    const sweeps = last.sweep - first.sweep;
    const hits = last.experts.hits - first.experts.hits;
    const asked = hits + last.experts.misses - first.experts.misses;
    const rates = {
      tokensPerS: seconds > 0 ? (last.tokens - first.tokens) / seconds : null,
      bytesPerS: seconds > 0 ? (last.bytesRead - first.bytesRead) / seconds : null,
      sweepS: sweeps > 0 ? seconds / sweeps : (this.#last?.sweepS ?? null),
      tokensPerSweep: sweeps > 0 ? (last.tokens - first.tokens) / sweeps : null,
      hitRate: asked > 0 ? hits / asked : (this.#last?.hitRate ?? null),
    };
    const { sweepS, tokensPerSweep, hitRate } = rates;
    if (sweeps > 0) this.#last = { sweepS, tokensPerSweep, hitRate };
    this.#remember(at, rates.tokensPerS ?? 0);
    return { busy, ...rates };
  }

  #remember(at, tokensPerS) {
    const second = Math.floor(at);
    if (second < (this.#history.at(-1)?.second ?? second)) this.#history = []; // on the clock of another server
    if (this.#history.at(-1)?.second === second) this.#history.at(-1).tokensPerS = tokensPerS;
    else this.#history.push({ second, tokensPerS });
    while (this.#history[0].second <= second - HISTORY_S) this.#history.shift();
  }

  /** Points of the last minute: [0 to 1 from the left, tokens a second]. */
  get history() {
    const now = this.#history.at(-1)?.second ?? 0;
    return this.#history.map(({ second, tokensPerS }) => [1 + (second - now) / (HISTORY_S - 1), tokensPerS]);
  }
}
