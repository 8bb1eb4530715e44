// The Cluster view: a picture of GET /cluster, once a second while somebody looks at it.

import { getJson } from "./api.js";
import { Charts, Tiles } from "./charts.js";
import { byId, bytes, count, make, percent, setText } from "./dom.js";

const EVERY_MS = 1000;
const SLOWEST_MS = 8000;
// Workers report once a second: rates over less would jump.
const RATE_OVER_S = 3;

export class ClusterView {
  constructor({ onPicture, onRefused }) {
    this.onPicture = onPicture;
    this.onRefused = onRefused;
    this.watching = false;
    this.timer = null;
    this.wait = EVERY_MS;
    this.pictures = [];
    this.cards = new Map();
    this.tiles = new Tiles(byId("tiles"));
    this.charts = new Charts(byId("charts"));
    document.addEventListener("visibilitychange", () => this.watch(this.watching));
  }

  watch(on) {
    this.watching = on;
    clearTimeout(this.timer);
    if (on && !document.hidden) this.#poll();
  }

  async #poll() {
    clearTimeout(this.timer);
    const notice = byId("cluster-notice");
    try {
      const picture = await getJson("/cluster");
      this.wait = EVERY_MS;
      this.onPicture(picture);
      setText(notice, picture.problems.join("; "));
      notice.hidden = !picture.problems.length;
      this.#draw(picture);
    } catch (error) {
      this.wait = Math.min(SLOWEST_MS, this.wait * 2);
      setText(notice, `No picture of the cluster: ${error.message}. Trying again.`);
      notice.hidden = false;
      if (error.status === 401) this.onRefused("");
      if (error.status === 403) this.onRefused(error.message);
    }
    if (this.watching && !document.hidden) {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.#poll(), this.wait);
    }
  }

  #draw(picture) {
    const { pools, store, front } = picture;
    const rates = this.#rates(picture);
    this.tiles.draw(picture, rates);
    this.charts.draw(rates);
    this.#front(front);
    this.#pool(picture, "prefill", byId("prefill-body"), (w) => [
      ["computed", count(w.computed_tokens ?? 0)],
      ["cached", count(w.cached_tokens ?? 0)],
    ]);
    this.#pool(picture, "decode", byId("decode-body"), (w) => [
      ["generated", count(w.generated_tokens ?? 0)],
      ["fetched", count(w.fetched_tokens ?? 0)],
    ]);
    this.#store(store, rates);
    byId("pipe-front").classList.toggle("flowing", front.streams > 0);
    byId("pipe-in").classList.toggle("flowing", rates.bytesIn > 0);
    byId("pipe-out").classList.toggle("flowing", rates.bytesOut > 0);
    const tail = picture.workers_left_out ? `, ${picture.workers_left_out} workers not shown` : "";
    const served = picture.model
      ? `${picture.model.id}, context ${count(picture.model.max_model_len)} tokens, ` +
        `${picture.model.kv_bytes_per_token?.toFixed(1) ?? "-"} bytes of KV a token`
      : "no model is served yet";
    const failed = pools.prefill.failed_requests + pools.decode.failed_requests;
    setText(byId("cluster-foot"), `${served}; ${count(failed)} failed requests${tail}`);
  }

  // Per second, from counters of two pictures; a counter that went back belongs to a new process.
  #rates(picture) {
    const now = {
      at: picture.at,
      cached: picture.pools.prefill.cached_tokens,
      computed: picture.pools.prefill.computed_tokens,
      generated: picture.pools.decode.generated_tokens,
      bytesIn: picture.store?.bytes_in ?? 0,
      bytesOut: picture.store?.bytes_out ?? 0,
    };
    // The server takes two pictures a second at most: the same one twice is one.
    if (this.pictures.at(-1)?.at !== now.at) this.pictures.push(now);
    while (this.pictures.length > 2 && this.pictures[1].at <= now.at - RATE_OVER_S) {
      this.pictures.shift();
    }
    const [before] = this.pictures;
    const span = now.at - before.at;
    const rate = (name) => (span > 0 ? Math.max(0, now[name] - before[name]) / span : 0);
    const names = ["cached", "computed", "generated", "bytesIn", "bytesOut"];
    return Object.fromEntries(names.map((name) => [name, rate(name)]));
  }

  #front(front) {
    const card = this.#card("front", byId("front-body"), "Answers");
    card.set({
      state: front.streams ? "busy" : "idle",
      chips: [`${count(front.streams)} in progress`],
      meter: { label: "Places", used: front.streams, capacity: front.max_streams, show: count },
      facts: [],
    });
  }

  #pool(picture, role, body, facts) {
    const workers = picture.workers.filter((worker) => worker.role === role);
    const seen = new Set();
    for (const worker of workers) {
      seen.add(worker.id);
      const chips = [`${count(worker.running)} running`];
      if (worker.queued) chips.push(`${count(worker.queued)} queued`);
      if (worker.draining) chips.push("draining");
      if (worker.queued_tokens && role === "prefill") {
        chips.push(`${count(worker.queued_tokens)} tokens to read`);
      }
      this.#card(worker.id, body, worker.id).set({
        state: worker.draining ? "draining" : worker.running || worker.queued ? "busy" : "idle",
        chips,
        meter: {
          label: "KV memory",
          used: worker.used_bytes,
          capacity: worker.capacity_bytes,
          show: bytes,
        },
        facts: facts(worker),
      });
    }
    for (const element of [...body.children]) {
      const gone = element.dataset.id && !seen.has(element.dataset.id);
      if (gone) {
        this.cards.delete(element.dataset.id);
        element.remove();
      }
    }
    const empty = body.querySelector(".none");
    if (!workers.length && !empty) body.append(make("p", { class: "none" }, "No worker"));
    if (workers.length && empty) empty.remove();
  }

  #card(id, body, title) {
    let card = this.cards.get(id);
    if (!card) {
      card = new WorkerCard(id, title);
      this.cards.set(id, card);
      body.append(card.element);
    }
    return card;
  }

  #store(store, rates) {
    const body = byId("store-body");
    if (!store) {
      body.replaceChildren(make("p", { class: "none" }, "Cannot be reached"));
      this.tanks = null;
      return;
    }
    if (!this.tanks || this.tanks.length !== store.tiers.length) {
      this.tanks = store.tiers.map((tier) => new Tank(tier.name));
      this.storeFacts = make("dl", { class: "facts-list" });
      const row = make("div", { class: "tanks" }, ...this.tanks.map((tank) => tank.element));
      body.replaceChildren(row, this.storeFacts);
    }
    this.tanks.forEach((tank, at) => tank.draw(store.tiers[at]));
    setFacts(this.storeFacts, [
      ["objects", count(store.objects ?? 0)],
      ["in", `${bytes(rates.bytesIn)}/s`],
      ["out", `${bytes(rates.bytesOut)}/s`],
      ["evicted", count(store.evictions ?? 0)],
      ["leases", count(store.leases ?? 0)],
      ["index", store.index_healthy ? "healthy" : "rebuilding"],
    ]);
  }
}

function setFacts(list, facts) {
  if (list.childElementCount !== facts.length) {
    list.replaceChildren(
      ...facts.map(([name]) => make("div", {}, make("dt", {}, name), make("dd", {}, ""))),
    );
  }
  facts.forEach(([, value], at) => setText(list.children[at].lastElementChild, value));
}

class WorkerCard {
  constructor(id, title) {
    this.chips = make("p", { class: "chips" });
    this.meterFill = make("span", { class: "meter-fill" });
    this.meterText = make("span", { class: "meter-text" });
    this.meter = make("div", { class: "meter", role: "meter", "aria-valuemin": 0 }, this.meterFill);
    this.facts = make("dl", { class: "facts-list" });
    this.light = make("span", { class: "light", "aria-hidden": "true" });
    this.element = make(
      "div",
      { class: "worker", "data-id": id === "front" ? null : id },
      make("h3", {}, this.light, title),
      this.chips,
      this.meter,
      this.meterText,
      this.facts,
    );
  }

  set({ state, chips, meter, facts }) {
    this.element.dataset.state = state;
    setText(this.chips, chips.join(", "));
    const share = meter.capacity ? Math.min(1, meter.used / meter.capacity) : 0;
    this.meterFill.style.setProperty("--share", share.toFixed(4));
    this.meter.setAttribute("aria-label", meter.label);
    this.meter.setAttribute("aria-valuemax", meter.capacity);
    this.meter.setAttribute("aria-valuenow", meter.used);
    const text = `${meter.label}: ${meter.show(meter.used)} of ${meter.show(meter.capacity)}`;
    this.meter.setAttribute("aria-valuetext", text);
    setText(this.meterText, text);
    setFacts(this.facts, facts);
  }
}

class Tank {
  constructor(name) {
    this.fill = make("span", { class: "tank-fill" });
    this.text = make("span", { class: "tank-text" });
    this.element = make(
      "div",
      { class: "tank", role: "meter", "aria-label": `Store tier ${name}`, "aria-valuemin": 0 },
      make("div", { class: "tank-body", "aria-hidden": "true" }, this.fill),
      make("span", { class: "tank-name" }, name),
      this.text,
    );
  }

  draw(tier) {
    const share = tier.capacity_bytes ? Math.min(1, tier.used_bytes / tier.capacity_bytes) : 0;
    this.fill.style.setProperty("--share", share.toFixed(4));
    const text = `${bytes(tier.used_bytes)} of ${bytes(tier.capacity_bytes)}`;
    this.element.setAttribute("aria-valuemax", tier.capacity_bytes);
    this.element.setAttribute("aria-valuenow", tier.used_bytes);
    this.element.setAttribute("aria-valuetext", `${text}, ${percent(share)}`);
    setText(this.text, text);
  }
}
