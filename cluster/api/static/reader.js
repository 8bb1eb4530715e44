// The document as it is read: plain text in chunks, and marks over the spans of an answer.
//
// A document may have millions of characters. Chunks that are not on the screen cost no layout
// (content-visibility), and a new set of marks touches only the chunks that had or get some.

import { make } from "./dom.js";

const CHUNK = 8000;
const SURROGATE = /[\ud800-\udfff]/;

export class Reader {
  constructor(root) {
    this.root = root;
    this.text = "";
    this.chunks = [];
    this.marked = new Set();
    this.marks = [];
  }

  show(text) {
    if (text === this.text && this.chunks.length) return;
    this.text = text;
    this.marked.clear();
    this.marks = [];
    this.chunks = [];
    for (let at = 0; at < text.length || !this.chunks.length; ) {
      const end = this.#chunkEnd(at);
      this.chunks.push({ at, end, element: make("div", { class: "chunk" }, text.slice(at, end)) });
      at = end;
    }
    this.root.replaceChildren(...this.chunks.map((chunk) => chunk.element));
  }

  // Behind a line's end if there is one near, never inside a surrogate pair.
  #chunkEnd(at) {
    let end = Math.min(at + CHUNK, this.text.length);
    if (end === this.text.length) return end;
    const line = this.text.lastIndexOf("\n", end) + 1;
    if (line > at + CHUNK / 2) end = line;
    else if (this.text.charCodeAt(end) >= 0xdc00 && this.text.charCodeAt(end) <= 0xdfff) end += 1;
    return end;
  }

  // Spans with char_start and char_end in code points become UTF-16 offsets of this text.
  places(spans) {
    const found = spans
      .filter((span) => span.char_start !== null && span.char_start < span.char_end)
      .map((span) => ({ span, start: span.char_start, end: span.char_end }));
    if (SURROGATE.test(this.text)) {
      const wanted = [...new Set(found.flatMap((p) => [p.start, p.end]))].sort((a, b) => a - b);
      const units = new Map();
      let unit = 0;
      let point = 0;
      for (const each of wanted) {
        while (point < each && unit < this.text.length) {
          unit += this.text.codePointAt(unit) > 0xffff ? 2 : 1;
          point += 1;
        }
        units.set(each, unit);
      }
      for (const place of found) {
        place.start = units.get(place.start);
        place.end = units.get(place.end);
      }
    }
    // What lies behind the document (its question) is not shown here.
    return found
      .map((place) => ({ ...place, end: Math.min(place.end, this.text.length) }))
      .filter((place) => place.start < place.end);
  }

  // Marks `spans` (disjoint); `strength(span)` is 0 to 1. Returns how many are in the document.
  mark(spans, strength) {
    const places = this.places(spans).sort((a, b) => a.start - b.start);
    const touched = new Set(this.marked);
    this.marked.clear();
    this.marks = [];
    const byChunk = new Map();
    let number = 0;
    for (const place of places) {
      while (this.chunks[number].end <= place.start) number += 1;
      for (let at = number; at < this.chunks.length && this.chunks[at].at < place.end; at += 1) {
        touched.add(at);
        this.marked.add(at);
        if (!byChunk.has(at)) byChunk.set(at, []);
        byChunk.get(at).push(place);
      }
    }
    for (const at of touched) this.#draw(this.chunks[at], byChunk.get(at) ?? [], strength);
    return places.length;
  }

  #draw(chunk, places, strength) {
    const parts = [];
    let at = chunk.at;
    for (const place of places) {
      const start = Math.max(place.start, chunk.at);
      const end = Math.min(place.end, chunk.end);
      parts.push(this.text.slice(at, start));
      const mark = make("mark", {}, this.text.slice(start, end));
      mark.style.setProperty("--strength", strength(place.span).toFixed(3));
      mark.title = "Selected by the model's attention";
      this.marks.push({ span: place.span, mark });
      parts.push(mark);
      at = end;
    }
    parts.push(this.text.slice(at, chunk.end));
    chunk.element.replaceChildren(...parts);
  }

  // Brings a span into view and points it out.
  reveal(span, { smooth = true } = {}) {
    const found = this.marks.find((each) => each.span === span);
    if (!found) return false;
    for (const each of this.marks) each.mark.classList.toggle("current", each.span === span);
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const chunk = found.mark.parentElement.getBoundingClientRect();
    const pane = this.root.getBoundingClientRect();
    const near = chunk.bottom > pane.top - 2 * pane.height && chunk.top < pane.bottom + 2 * pane.height;
    if (near && smooth && !calm) {
      found.mark.scrollIntoView({ block: "center", behavior: "smooth" });
      return true;
    }
    // Chunks on the way were never laid out: the place is exact once those around it have been.
    const go = () => found.mark.scrollIntoView({ block: "center", behavior: "auto" });
    go();
    requestAnimationFrame(() => {
      go();
      requestAnimationFrame(go);
    });
    return true;
  }

  // The text around a span, for lists: what stands before it, in it and behind it.
  around(span, most = 40) {
    const [place] = this.places([span]);
    if (!place) return { before: "", inside: span.text, behind: "" };
    const { start, end } = place;
    return {
      before: this.text.slice(Math.max(0, start - most), start),
      inside: this.text.slice(start, end),
      behind: this.text.slice(end, end + most / 2),
    };
  }
}
