// One answer: its text as it comes, what of the prompt was cached, computed and fetched, and the
// spans that it was read from.

import { bytes, count, make, percent, seconds, setText } from "./dom.js";

// Spans that got less attention than this explain nothing; they are not shown.
const FAINT = 0.02;
const MOST_LISTED = 6;

const VERDICTS = {
  supported: ["good", "Contained in its evidence"],
  withheld: ["warn", "Withheld: its evidence does not contain it. This is the model's refusal."],
  refused: ["plain", "The model's own refusal"],
};

export class Card {
  // `source` shows the document; `kvBytes` are stored bytes per token, or null.
  constructor({ question, text, source, kvBytes }) {
    this.text = text;
    this.source = source;
    this.kvBytes = kvBytes;
    this.spans = [];
    this.tokens = 0;
    this.begunMs = performance.now();
    this.firstMs = null;
    this.answer = make("p", { class: "answer-text" });
    this.badge = make("p", { class: "badge", hidden: true });
    this.track = new Track();
    this.facts = make("p", { class: "facts" }, "Waiting for the first token");
    this.list = make("ol", { class: "spans" });
    this.listTitle = make("h3", { hidden: true }, "Evidence");
    this.element = make(
      "article",
      { class: "card busy", "aria-busy": "true", "aria-label": `Answer to: ${question}` },
      make("h2", { class: "card-question" }, question),
      this.answer,
      this.badge,
      this.track.element,
      this.facts,
      this.listTitle,
      this.list,
    );
  }

  progress(progress) {
    this.track.progress(progress);
    if (this.firstMs === null) {
      setText(
        this.facts,
        `Reading: ${count(progress.done)} of ${count(progress.total)} tokens, ` +
          seconds((performance.now() - this.begunMs) / 1000),
      );
    }
  }

  delta(delta) {
    const text = (delta.reasoning_content ?? "") + (delta.content ?? "");
    if (text) {
      if (this.firstMs === null) this.firstMs = performance.now() - this.begunMs;
      this.answer.append(text);
    }
    if (delta.evidence) this.#live(delta.evidence);
    if (delta.answer_evidence) this.#settle(delta.answer_evidence);
    if (delta.grounding) this.#verdict(delta.grounding);
  }

  usage(usage) {
    this.track.usage(usage, this.kvBytes);
    this.tokens = usage.completion_tokens;
  }

  done() {
    this.element.classList.remove("busy");
    this.element.setAttribute("aria-busy", "false");
    const totalMs = performance.now() - this.begunMs;
    if (!this.answer.textContent) setText(this.answer, "(empty answer)");
    const first = this.firstMs === null ? "" : `first token ${seconds(this.firstMs / 1000)}, `;
    setText(this.facts, `${first}${count(this.tokens)} tokens in ${seconds(totalMs / 1000)}`);
  }

  fail(message) {
    this.done();
    this.element.classList.add("failed");
    if (this.answer.textContent === "(empty answer)") setText(this.answer, "");
    this.badge.className = "badge bad";
    this.badge.hidden = false;
    this.badge.setAttribute("role", "alert");
    setText(this.badge, message);
    setText(this.facts, "");
  }

  // Spans of single tokens, until the whole answer's come: neighbours are joined as they appear.
  #live(spans) {
    this.seen = (this.seen ?? 0) + 1;
    for (const span of spans) {
      if (span.char_start === null) continue;
      const touching = this.spans.filter(
        (each) => each.char_start <= span.char_end && span.char_start <= each.char_end,
      );
      const joined = [...touching, { ...span, total: span.mass }];
      this.spans = this.spans.filter((each) => !touching.includes(each));
      this.spans.push({
        char_start: Math.min(...joined.map((each) => each.char_start)),
        char_end: Math.max(...joined.map((each) => each.char_end)),
        total: joined.reduce((sum, each) => sum + each.total, 0),
      });
    }
    for (const span of this.spans) span.weight = span.total / this.seen;
    this.show();
  }

  #settle(spans) {
    this.spans = spans.filter((span) => span.weight >= FAINT);
    this.show({ reveal: true });
    this.listTitle.hidden = false;
    if (!this.spans.length) {
      this.list.replaceWith(
        make("p", { class: "facts" }, "No span of the prompt got more than 2 % of the attention."),
      );
      return;
    }
    this.list.replaceChildren(...this.spans.slice(0, MOST_LISTED).map((span) => this.#item(span)));
  }

  #item(span) {
    const { before, inside, behind } = this.source.reader.around(span);
    const fill = make("span", { class: "weight-fill" });
    fill.style.setProperty("--share", Math.min(1, span.weight).toFixed(3));
    const inDocument = span.char_start !== null && span.char_start < this.#points();
    const button = make(
      "button",
      { type: "button", class: "span", disabled: !inDocument },
      make("span", { class: "weight" }, fill, make("span", { class: "weight-text" }, percent(span.weight))),
      make("span", { class: "quote" }, before, make("strong", {}, inside), behind),
    );
    button.addEventListener("click", () => {
      this.show();
      this.source.reader.reveal(span);
    });
    return make("li", {}, button);
  }

  #points() {
    this.points ??= /[\ud800-\udfff]/.test(this.text) ? [...this.text].length : this.text.length;
    return this.points;
  }

  #verdict(grounding) {
    const [kind, text] = VERDICTS[grounding.verdict] ?? ["plain", grounding.verdict];
    this.badge.className = `badge ${kind}`;
    setText(this.badge, text);
    this.badge.hidden = false;
  }

  // Puts this answer's document and marks on the left.
  show({ reveal = false } = {}) {
    if (!this.text) return;
    this.source.read(this.text);
    const heaviest = Math.max(...this.spans.map((span) => span.weight), FAINT);
    this.source.reader.mark(this.spans, (span) => Math.sqrt(span.weight / heaviest));
    if (reveal && this.spans.length) this.source.reader.reveal(this.spans[0]);
  }
}

// The bar: which part of the prompt came out of the cache, which was computed; and what the decode
// worker fetched.
class Track {
  constructor() {
    this.parts = {};
    const bar = make("div", { class: "bar", "aria-hidden": "true" });
    for (const name of ["cached", "computed"]) {
      this.parts[name] = make("span", { class: `bar-${name}` });
      bar.append(this.parts[name]);
    }
    this.legend = {};
    const legend = make("p", { class: "legend" });
    for (const name of ["cached", "computed", "fetched"]) {
      this.legend[name] = make("span", { class: `key key-${name}` }, name);
      legend.append(this.legend[name]);
    }
    this.fetchedBar = make("span", { class: "bar-fetched" });
    this.element = make(
      "div",
      { class: "track" },
      bar,
      make("div", { class: "bar thin", "aria-hidden": "true" }, this.fetchedBar),
      legend,
    );
  }

  progress({ done, total, cached }) {
    this.#set(cached, Math.max(0, done - cached), total);
  }

  usage(usage, kvBytes) {
    const { prompt_cache_hit_tokens: hit, prompt_cache_miss_tokens: miss, prompt_tokens: all } = usage;
    this.#set(hit, miss, all);
    this.fetchedBar.style.setProperty("--share", "1");
    const size = kvBytes ? `, about ${bytes(all * kvBytes)}` : "";
    setText(this.legend.fetched, `fetched ${count(all)}${size}`);
    this.legend.fetched.title = "What the decode worker took out of the store: the whole prompt's KV";
  }

  #set(cached, computed, total) {
    this.parts.cached.style.setProperty("--share", (cached / total).toFixed(4));
    this.parts.computed.style.setProperty("--share", (computed / total).toFixed(4));
    setText(this.legend.cached, `cached ${count(cached)}`);
    setText(this.legend.computed, `computed ${count(computed)}`);
  }
}
