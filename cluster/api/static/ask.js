// The Ask view: question in, answer out.

import { ApiError, streamChat } from "./api.js";
import { Card } from "./card.js";
import { byId, make } from "./dom.js";
import { Source } from "./source.js";

const MOST_CARDS = 50;

// The form that a question takes behind its document. A model reads "what" and not "What" the same
// way only if it is large, and a small one ships with the server.
export function prompt(text, question) {
  const plain = question.trim();
  const lower = /^[A-Z][a-z]/.test(plain) ? plain[0].toLowerCase() + plain.slice(1) : plain;
  const asked = plain.startsWith("Question:") ? plain : `Question: ${lower}`;
  return text ? `${text}\n\n${asked}` : asked;
}

export class Ask {
  // `model()` gives {id, kvBytes} or null while it is not known; `onRefused()` follows a 401.
  constructor({ model, onRefused }) {
    this.model = model;
    this.onRefused = onRefused;
    this.running = null;
    this.source = new Source({ onSample: (questions) => this.#suggest(questions) });
    this.field = byId("question");
    byId("question-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask(this.field.value);
    });
    byId("stop").addEventListener("click", () => this.running?.abort());
  }

  async ask(question) {
    if (this.running || !question.trim()) {
      this.field.focus();
      return;
    }
    const model = this.model();
    const text = this.source.text;
    const card = new Card({ question, text, source: this.source, kvBytes: model?.kvBytes ?? null });
    this.#add(card);
    if (text) this.source.read(text);
    if (text) this.source.reader.mark([], () => 0);
    const controller = new AbortController();
    this.#busy(controller);
    try {
      await streamChat(this.#body(text, question, model), {
        signal: controller.signal,
        onProgress: (progress) => card.progress(progress),
        onDelta: (delta) => card.delta(delta),
        onUsage: (usage) => card.usage(usage),
      });
      card.done();
    } catch (error) {
      if (controller.signal.aborted) card.fail("Stopped");
      else if (error instanceof ApiError) card.fail(error.message);
      else card.fail("The server cannot be reached; check that it runs and ask again.");
      if (error instanceof ApiError && error.status === 401) this.onRefused();
    } finally {
      this.#busy(null);
      this.field.select();
    }
  }

  #body(text, question, model) {
    const body = {
      model: model?.id ?? "",
      messages: [{ role: "user", content: prompt(text, question) }],
      temperature: 0,
      max_tokens: Math.max(1, Math.floor(Number(byId("max-tokens").value) || 64)),
      evidence: true,
    };
    if (byId("strict").checked) body.grounding = "strict";
    return body;
  }

  #add(card) {
    byId("answers-empty")?.remove();
    const answers = byId("answers");
    answers.prepend(card.element);
    while (answers.childElementCount > MOST_CARDS) answers.lastElementChild.remove();
    answers.scrollTop = 0;
  }

  #busy(controller) {
    this.running = controller;
    byId("ask").hidden = Boolean(controller);
    byId("stop").hidden = !controller;
  }

  #suggest(questions) {
    const group = byId("suggestions");
    group.replaceChildren(
      ...questions.map((question) => {
        const button = make("button", { type: "button", class: "chip" }, question);
        button.addEventListener("click", () => {
          this.field.value = question;
          this.ask(question);
        });
        return button;
      }),
    );
    group.hidden = false;
  }
}
