// One conversation: its messages, its column, and the answer that is under way.

import { chunks } from "./completions.js";
import { counted, duration, element, setText } from "./dom.js";
import { describe } from "./requests.js";

export class Conversation {
  // All mutable state: the messages, each with its nodes; the answer under way with its request's id; and the column.
  #messages = [];
  #controller = null;
  #requestId = null;
  #context;
  #log = element("div", { class: "log", tabindex: "0", role: "log", "aria-live": "off" });
  #status = element("p", { class: "note" });
  #input;
  #send;
  #sendToAll;
  #stop;
  #close;

  /** context: number, settings(), areSettingsValid(), announce(text), onActive(), onClose(), sendToAll(text). */
  constructor(context) {
    this.#context = context;
    this.name = `Conversation ${context.number}`;
    this.#input = element("textarea", {
      rows: "1",
      placeholder: "Write a message",
      "aria-label": `Message for conversation ${context.number}`,
      onkeydown: (event) => this.#onKey(event),
    });
    this.#send = element("button", { class: "main", type: "button", onclick: () => this.#sendInput() }, "Send");
    this.#sendToAll = element(
      "button",
      { type: "button", hidden: true, onclick: () => this.#sendInputToAll() },
      "Send to all",
    );
    this.#stop = element("button", { type: "button", hidden: true, onclick: () => this.stop() }, "Stop");
    this.#close = element(
      "button",
      { class: "small", type: "button", "aria-label": `Close conversation ${context.number}`, onclick: () => this.#leave() },
      "Close",
    );
    this.#log.setAttribute("aria-label", `Messages of conversation ${context.number}`);
    this.#log.append(element("p", { class: "hint" }, "Write a message. All conversations share each pass over the weights."));
    const actions = element("div", { class: "actions" }, this.#sendToAll, this.#stop, this.#send);
    this.node = element(
      "article",
      { class: "conversation", "aria-label": this.name, onfocusin: () => context.onActive() },
      element("header", {}, element("h3", {}, this.name), this.#status, this.#close),
      this.#log,
      element("div", { class: "composer" }, this.#input, actions),
    );
  }

  get isRunning() {
    return this.#controller !== null;
  }

  owns(requestId) {
    return this.#requestId !== null && requestId === this.#requestId;
  }

  focus() {
    this.#input.focus();
  }

  setAlone(isAlone) {
    this.#close.hidden = isAlone;
    this.#sendToAll.hidden = isAlone;
  }

  /** Tells what the engine does with the answer under way. */
  tell(request) {
    if (this.isRunning) setText(this.#status, describe(request));
  }

  send(text) {
    if (this.isRunning || !text.trim()) return;
    this.#log.querySelector(".hint")?.remove();
    this.#addMessage("user", text);
    void this.#answer();
  }

  stop() {
    this.#controller?.abort();
  }

  #onKey(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.#sendInput();
    } else if (event.key === "Escape" && this.isRunning) {
      event.preventDefault();
      this.stop();
    }
  }

  #takeInput() {
    const text = this.#input.value;
    this.#input.value = "";
    return text;
  }

  #sendInput() {
    if (!this.isRunning && this.#context.areSettingsValid()) this.send(this.#takeInput());
  }

  #sendInputToAll() {
    if (this.#context.areSettingsValid()) this.#context.sendToAll(this.#takeInput());
  }

  #leave() {
    this.stop();
    this.#context.onClose();
  }

  #addMessage(role, content = "") {
    const text = document.createTextNode(content);
    const meta = element("div", { class: "meta" });
    const node = element("div", { class: "message", "data-role": role });
    node.append(element("div", { class: "text" }, text));
    if (role === "assistant") node.append(meta);
    const message = { role, content, text, meta, node };
    this.#messages.push(message);
    this.#log.append(node);
    this.#log.scrollTop = this.#log.scrollHeight;
    return message;
  }

  #regenerate() {
    if (this.isRunning || !this.#context.areSettingsValid()) return;
    this.#messages.pop().node.remove();
    void this.#answer();
    this.#stop.focus();
  }

  async #answer() {
    const history = this.#messages.map(({ role, content }) => ({ role, content }));
    const message = this.#addMessage("assistant");
    const started = performance.now();
    this.#begin(message);
    let reason = null;
    let usage = null;
    let error = null;
    try {
      for await (const chunk of chunks({ ...this.#context.settings(), messages: history }, this.#controller.signal)) {
        this.#requestId = chunk.id;
        usage = chunk.usage ?? usage;
        const choice = chunk.choices?.[0];
        if (choice) {
          this.#append(message, choice.delta ?? {});
          reason = choice.finish_reason ?? reason;
        }
      }
    } catch (caught) {
      if (this.#controller.signal.aborted) reason = "stopped";
      else error = caught;
    }
    this.#end(message, { reason, usage, error, seconds: (performance.now() - started) / 1000 });
  }

  #append(message, delta) {
    const atEnd = this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < 48;
    if (delta.reasoning_content) {
      if (!message.reasoning) {
        message.reasoning = document.createTextNode("");
        const text = element("div", { class: "text" }, message.reasoning);
        message.node.prepend(element("details", {}, element("summary", {}, "Reasoning"), text));
      }
      message.reasoning.appendData(delta.reasoning_content);
    }
    if (delta.content) {
      message.content += delta.content;
      message.text.appendData(delta.content);
    }
    if (atEnd) this.#log.scrollTop = this.#log.scrollHeight;
  }

  #begin(message) {
    this.#controller = new AbortController();
    this.#requestId = null;
    message.node.dataset.state = "running";
    this.#log.querySelectorAll(".meta button").forEach((button) => button.remove());
    this.#send.hidden = true;
    this.#stop.hidden = false;
    setText(this.#status, "waits for the server");
  }

  #end(message, { reason, usage, error, seconds }) {
    const hadFocus = document.activeElement === this.#stop;
    this.#controller = null;
    this.#requestId = null;
    message.node.dataset.state = "ended";
    this.#send.hidden = false;
    this.#stop.hidden = true;
    setText(this.#status, "");
    const facts = [];
    if (usage) facts.push(counted(usage.completion_tokens, "token"), duration(seconds).join(" "));
    if (reason === "length") facts.push("at its limit");
    if (reason === "stopped") facts.push("stopped");
    message.meta.append(
      element("button", { class: "small", type: "button", onclick: () => this.#regenerate() }, "Regenerate"),
    );
    if (error) message.meta.append(element("span", { class: "error" }, error.message));
    message.meta.append(element("span", {}, facts.join(" · ")));
    this.#log.scrollTop = this.#log.scrollHeight;
    if (hadFocus) this.focus();
    const what = error ? `failed: ${error.message}` : reason === "stopped" ? "was stopped" : "is complete";
    this.#context.announce(`The answer in conversation ${this.#context.number} ${what}.`);
  }
}
