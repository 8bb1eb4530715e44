// The left half of the Ask view: where the document comes from and how it is shown.

import { byId, count, setText } from "./dom.js";
import { Reader } from "./reader.js";
import { sample } from "./sample.js";

const MOST_BYTES = 64 * 1024 * 1024;
// From here on a document is shown for reading at once: a text field of that size is slow.
const LARGE = 300_000;

export class Source {
  // `onSample(questions)` offers questions about the example.
  constructor({ onSample }) {
    this.field = byId("document-text");
    this.reader = new Reader(byId("document-read"));
    this.onSample = onSample;
    this.seed = 7;
    this.large = null;
    this.field.addEventListener("input", () => this.#changed());
    this.field.addEventListener("paste", (event) => this.#paste(event));
    for (const id of ["document-sample", "document-try"]) {
      byId(id).addEventListener("click", () => this.#sample());
    }
    byId("document-edit").addEventListener("click", () => this.edit());
    const picker = byId("document-file");
    byId("document-open").addEventListener("click", () => picker.click());
    picker.addEventListener("change", () => {
      if (picker.files.length) this.#load(picker.files[0]);
      picker.value = "";
    });
    this.#takeDrops(byId("document-pane"));
    this.#changed();
  }

  get text() {
    return this.large ?? wellFormed(this.field.value);
  }

  // Back to the field. A large document is let go: it is replaced, not edited.
  edit() {
    if (this.large !== null) {
      this.large = null;
      this.#changed();
    }
    byId("document-read").hidden = true;
    byId("document-edit").hidden = true;
    this.field.hidden = false;
    this.field.focus();
  }

  // Shows `text` for reading; the field keeps what it has.
  read(text) {
    this.reader.show(text);
    this.field.hidden = true;
    byId("document-read").hidden = false;
    const edit = byId("document-edit");
    edit.hidden = false;
    setText(edit, this.large === null ? "Edit" : "Clear");
  }

  #put(text) {
    const plain = wellFormed(text.replaceAll("\r\n", "\n").replaceAll("\r", "\n"));
    if (plain.length >= LARGE) {
      this.field.value = "";
      this.large = plain;
      this.read(plain);
    } else {
      this.large = null;
      this.field.value = plain;
      this.field.scrollTop = 0;
      this.edit();
    }
    this.#changed();
  }

  #paste(event) {
    const text = event.clipboardData?.getData("text/plain") ?? "";
    const field = this.field;
    const whole = field.selectionStart === 0 && field.selectionEnd === field.value.length;
    if (text.length < LARGE || !whole) return;
    event.preventDefault();
    this.#put(text);
  }

  #changed() {
    const length = this.large?.length ?? this.field.value.length;
    byId("document-empty").hidden = length > 0;
    byId("document-sample").hidden = !length;
    const fact = length ? `${count(length)} characters` : "";
    setText(byId("document-fact"), fact);
    this.#notice("");
  }

  #sample() {
    const made = sample(this.seed);
    this.seed += 1;
    this.#put(made.text);
    this.onSample(made.questions);
  }

  async #load(file) {
    if (file.size > MOST_BYTES) {
      this.#notice(`${file.name} is larger than ${count(MOST_BYTES / 1024 / 1024)} MiB.`);
      return;
    }
    let text;
    try {
      text = await file.text();
    } catch {
      this.#notice(`${file.name} could not be read.`);
      return;
    }
    if (text.includes("\0")) {
      this.#notice(`${file.name} is not a text file. Convert it to plain text first.`);
      return;
    }
    this.#put(text);
  }

  #takeDrops(pane) {
    const hint = byId("drop-hint");
    let depth = 0;
    const over = (on) => {
      depth = on ? depth : 0;
      hint.hidden = !on;
    };
    pane.addEventListener("dragenter", (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      depth += 1;
      over(true);
    });
    pane.addEventListener("dragover", (event) => {
      if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
    });
    pane.addEventListener("dragleave", () => {
      depth -= 1;
      if (depth <= 0) over(false);
    });
    pane.addEventListener("drop", (event) => {
      over(false);
      const [file] = event.dataTransfer?.files ?? [];
      if (!file) return;
      event.preventDefault();
      this.#load(file);
    });
    // A file that misses the pane must not replace the page.
    for (const kind of ["dragover", "drop"]) {
      window.addEventListener(kind, (event) => {
        if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
      });
    }
  }

  #notice(text) {
    const notice = byId("document-notice");
    setText(notice, text);
    notice.hidden = !text;
  }
}

// Halves of characters cannot be sent.
function wellFormed(text) {
  return text.toWellFormed?.() ?? text;
}
