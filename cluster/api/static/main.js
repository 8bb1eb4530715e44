// The page: tabs, the API key, what is served.

import { getJson, useKey } from "./api.js";
import { Ask } from "./ask.js";
import { ClusterView } from "./cluster.js";
import { byId, setText } from "./dom.js";

let model = null;

const ask = new Ask({ model: () => model, onRefused: () => askForKey("This key was refused.") });
const cluster = new ClusterView({ onPicture: learn, onRefused: (reason) => askForKey(reason) });

function learn(picture) {
  const served = picture.model;
  if (served) model = { id: served.id, kvBytes: served.kv_bytes_per_token };
  setText(byId("model-name"), served ? served.id : "");
  const [problem] = picture.problems;
  status(problem ? "warn" : "good", problem ? "Not ready" : "Ready");
  byId("status").title = problem ?? "";
}

function status(kind, text) {
  byId("status").dataset.kind = kind;
  setText(byId("status-text"), text);
}

function askForKey(problem) {
  const bar = byId("key-bar");
  status("warn", "API key needed");
  if (problem) setText(byId("key-hint"), problem);
  if (bar.hidden) {
    bar.hidden = false;
    byId("key").focus();
  }
}

byId("key-bar").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  connect();
});

// Until the cluster answers once; then the Cluster view keeps the picture fresh while it is open.
async function connect() {
  try {
    learn(await getJson("/cluster"));
    if (!byId("key-bar").hidden) {
      byId("key-bar").hidden = true;
      byId("question").focus();
    }
  } catch (error) {
    if (error.status === 401) askForKey(byId("key").value ? "This key was refused." : "");
    else if (error.status === 403) askForKey(error.message);
    else {
      status("bad", "Unreachable");
      setTimeout(connect, 2000);
    }
    return;
  }
  if (!model) setTimeout(connect, 1000);
}

const tabs = [
  { tab: byId("tab-ask"), view: byId("view-ask"), hash: "#ask" },
  { tab: byId("tab-cluster"), view: byId("view-cluster"), hash: "#cluster" },
];

function choose(chosen, { focus = false } = {}) {
  for (const each of tabs) {
    const on = each === chosen;
    each.tab.setAttribute("aria-selected", String(on));
    each.tab.tabIndex = on ? 0 : -1;
    each.view.hidden = !on;
    if (on && focus) each.tab.focus();
  }
  cluster.watch(chosen === tabs[1]);
}

tabs.forEach((each, at) => {
  each.tab.addEventListener("click", () => {
    history.replaceState(null, "", each.hash);
    choose(each);
  });
  each.tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = { Home: 0, End: tabs.length - 1 }[event.key];
    if (step === undefined && next === undefined) return;
    event.preventDefault();
    const chosen = tabs[next ?? (at + step + tabs.length) % tabs.length];
    history.replaceState(null, "", chosen.hash);
    choose(chosen, { focus: true });
  });
});

choose(tabs.find((each) => each.hash === location.hash) ?? tabs[0]);
connect();
export { ask };
