// The page: events of the engine flow one way, into the parts that show them.

import { Chat } from "./chat.js";
import { byId, element, setText } from "./dom.js";
import { watch } from "./events.js";
import { Memory } from "./memory.js";
import { Requests } from "./requests.js";
import { Speed } from "./speed.js";
import { Strip } from "./stages.js";

const CONNECTIONS = { waiting: "connecting", live: "live", lost: "reconnecting" };
const ENGINES = { closed: "the engine is closed", failed: "the engine has stopped" };

const chat = new Chat();
const strip = new Strip();
const memory = new Memory();
const speed = new Speed();
const requests = new Requests((id) => chat.nameOf(id));

function showConnection(state, text = CONNECTIONS[state]) {
  const node = byId("connection");
  if (node.dataset.state !== state) node.dataset.state = state;
  setText(node, text);
}

function showPlan({ plan }) {
  byId("plan").replaceChildren(...plan.reasons.map((reason) => element("li", {}, reason)));
}

watch({
  onConnection(state) {
    showConnection(state);
    if (state === "live") chat.connected();
  },
  onModel(model) {
    strip.model(model.stages);
    memory.model(model);
    speed.model(model);
    chat.model(model);
    showPlan(model);
  },
  onState(state) {
    strip.state(state);
    memory.state(state);
    speed.state(state);
    requests.state(state);
    chat.state(state);
    if (state.engine !== "open") showConnection("lost", ENGINES[state.engine]);
  },
});
