// The conversations side by side, and what they share: the model, the settings and the announcements.

import { modelName } from "./completions.js";
import { Conversation } from "./conversation.js";
import { byId, element, setText } from "./dom.js";
import { requestOf } from "./requests.js";

// A browser opens six connections to a server, of which the page's events take one.
const MAX_CONVERSATIONS = 4;

export class Chat {
  // All mutable state: the conversations, the one that a narrow window shows, and the model's name.
  #conversations = [];
  #active = null;
  #model = null;
  #generates = true;
  #numbers = 0;
  #new = byId("new-conversation");
  #temperature = byId("temperature");
  #maxTokens = byId("max-tokens");

  constructor() {
    this.#new.addEventListener("click", () => this.#open().focus());
    this.#open();
  }

  /** The server answers, now or again. */
  connected() {
    void this.#askForModel();
  }

  async #askForModel() {
    try {
      this.#model = await modelName();
      setText(byId("model"), this.#model);
    } catch (error) {
      setText(byId("model"), error.message);
    }
  }

  /** The name of the conversation whose answer this request is, or null. */
  nameOf(requestId) {
    return this.#conversations.find((conversation) => conversation.owns(requestId))?.name ?? null;
  }

  model({ generates }) {
    if (generates === this.#generates) return;
    this.#generates = generates;
    byId("chat").hidden = !generates;
  }

  state({ requests }) {
    const all = requests.map(requestOf);
    for (const request of all) this.#conversations.find((each) => each.owns(request.id))?.tell(request);
  }

  /** Without a value, the server chooses. */
  #settings() {
    const settings = {};
    if (this.#model !== null) settings.model = this.#model;
    if (this.#temperature.value) settings.temperature = this.#temperature.valueAsNumber;
    if (this.#maxTokens.value) settings.max_completion_tokens = this.#maxTokens.valueAsNumber;
    return settings;
  }

  #open() {
    this.#numbers += 1;
    const conversation = new Conversation({
      number: this.#numbers,
      settings: () => this.#settings(),
      areSettingsValid: () => this.#temperature.reportValidity() && this.#maxTokens.reportValidity(),
      announce: (text) => setText(byId("announcement"), text),
      onActive: () => this.#show(conversation),
      onClose: () => this.#close(conversation),
      sendToAll: (text) => this.#conversations.forEach((each) => each.send(text)),
    });
    this.#conversations.push(conversation);
    byId("conversations").append(conversation.node);
    this.#show(conversation);
    return conversation;
  }

  #close(conversation) {
    conversation.node.remove();
    this.#conversations = this.#conversations.filter((each) => each !== conversation);
    this.#show(this.#conversations.at(-1));
    this.#active.focus();
  }

  #show(conversation) {
    this.#active = conversation;
    const isAlone = this.#conversations.length === 1;
    for (const each of this.#conversations) {
      each.node.toggleAttribute("data-active", each === conversation);
      each.setAlone(isAlone);
    }
    this.#new.disabled = this.#conversations.length >= MAX_CONVERSATIONS;
    this.#drawSwitcher(isAlone);
  }

  #drawSwitcher(isAlone) {
    const buttons = this.#conversations.map((each) =>
      element(
        "button",
        {
          type: "button",
          "aria-pressed": String(each === this.#active),
          "aria-label": each.name,
          onclick: () => {
            this.#show(each);
            each.focus();
          },
        },
        each.name.replace("Conversation ", ""),
      ),
    );
    byId("switcher").replaceChildren(...(isAlone ? [] : buttons));
  }
}
