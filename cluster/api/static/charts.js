// Figures over time, as plain SVG: a tile with its line, and charts of the last minute and a half.

import { count, make, makeSvg, percent, setText } from "./dom.js";

const HISTORY = 90;
const LEAST_TOP = 10;

// x of the newest of `length` values is 100.
const across = (at, length) => (100 - ((length - 1 - at) * 100) / (HISTORY - 1)).toFixed(2);

export class Tiles {
  constructor(root) {
    this.tiles = {};
    const kinds = [
      ["hits", "Prefix hit rate", "of all prompt tokens since the workers started"],
      ["computed", "Prefill", "prompt tokens computed a second"],
      ["generated", "Decode", "tokens generated a second"],
      ["running", "Running", "requests in both pools"],
      ["queued", "Queued", "requests that wait for a worker"],
    ];
    for (const [key, title, meaning] of kinds) {
      const value = make("p", { class: "tile-value" }, "-");
      const line = makeSvg("polyline", { class: "spark-line", points: "" });
      const area = makeSvg("polygon", { class: "spark-area", points: "" });
      const spark = makeSvg(
        "svg",
        { class: "spark", viewBox: "0 0 100 28", preserveAspectRatio: "none", "aria-hidden": "true" },
        area,
        line,
      );
      const tile = make(
        "section",
        { class: "tile", "aria-label": title },
        make("h2", {}, title),
        value,
        make("p", { class: "tile-meaning" }, meaning),
      );
      tile.append(spark);
      root.append(tile);
      this.tiles[key] = { value, line, area, history: [] };
    }
  }

  draw({ pools, prefix_cache: cache }, rates) {
    const both = (name) => pools.prefill[name] + pools.decode[name];
    this.#set("hits", cache.hit_rate ?? 0, percent(cache.hit_rate), 1);
    this.#set("computed", rates.computed, count(rates.computed));
    this.#set("generated", rates.generated, count(rates.generated));
    this.#set("running", both("running"), count(both("running")));
    this.#set("queued", both("queued"), count(both("queued")));
  }

  #set(key, value, text, most = null) {
    const tile = this.tiles[key];
    setText(tile.value, text);
    tile.history.push(value);
    if (tile.history.length > HISTORY) tile.history.shift();
    const top = most ?? Math.max(1, ...tile.history);
    const points = tile.history.map((each, at) => {
      const x = across(at, tile.history.length);
      return `${x},${(27 - (each / top) * 25).toFixed(2)}`;
    });
    const first = points[0].split(",")[0];
    tile.line.setAttribute("points", points.join(" "));
    tile.area.setAttribute("points", `${first},28 ${points.join(" ")} 100,28`);
  }
}

// A number a little above `most` that is pleasant to read: 1, 2 or 5 times a power of ten.
function roundTop(most) {
  const power = 10 ** Math.floor(Math.log10(Math.max(most, LEAST_TOP)));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= most);
}

// Series stacked on one another, one value of each a second.
class Chart {
  constructor(title, series) {
    this.series = series.map(({ key, name }) => {
      const value = make("span", { class: "series-value" }, "0");
      const area = makeSvg("polygon", { class: `area area-${key}`, points: "" });
      return { key, value, area, name, history: [] };
    });
    this.top = make("span", { class: "axis-top" });
    const svg = makeSvg(
      "svg",
      { class: "chart-plot", viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
      makeSvg("line", { class: "grid-line", x1: 0, x2: 100, y1: 0.5, y2: 0.5 }),
      makeSvg("line", { class: "grid-line", x1: 0, x2: 100, y1: 50, y2: 50 }),
      ...this.series.map((each) => each.area),
    );
    this.element = make(
      "section",
      { class: "chart", "aria-label": title },
      make("h2", {}, title),
      make(
        "p",
        { class: "legend" },
        ...this.series.map((each) =>
          make("span", { class: `key key-${each.key}` }, `${each.name} `, each.value),
        ),
      ),
      make("div", { class: "chart-body" }, this.top, svg),
      make(
        "p",
        { class: "axis", "aria-hidden": "true" },
        make("span", {}, `${HISTORY} s ago`),
        make("span", {}, "now"),
      ),
    );
  }

  draw(rates) {
    for (const each of this.series) {
      each.history.push(rates[each.key]);
      if (each.history.length > HISTORY) each.history.shift();
      setText(each.value, count(rates[each.key]));
    }
    const length = this.series[0].history.length;
    let below = new Array(length).fill(0);
    const sums = this.series.map((each) => (below = below.map((sum, at) => sum + each.history[at])));
    const top = roundTop(Math.max(...below));
    setText(this.top, count(top));
    const y = (value) => (100 - (value / top) * 99).toFixed(2);
    below = new Array(length).fill(0);
    this.series.forEach((each, number) => {
      const upper = sums[number].map((sum, at) => `${across(at, length)},${y(sum)}`);
      const lower = below.map((sum, at) => `${across(at, length)},${y(sum)}`).reverse();
      each.area.setAttribute("points", [...upper, ...lower].join(" "));
      below = sums[number];
    });
  }
}

export class Charts {
  constructor(root) {
    this.charts = [
      new Chart("Prompt tokens a second", [
        { key: "computed", name: "computed" },
        { key: "cached", name: "cached" },
      ]),
      new Chart("Answer tokens a second", [{ key: "generated", name: "generated" }]),
    ];
    root.append(...this.charts.map((chart) => chart.element));
  }

  draw(rates) {
    for (const chart of this.charts) chart.draw(rates);
  }
}
