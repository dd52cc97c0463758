// Curves on uPlot, each with a legend that follows the pointer and its numbers as a table.

import { clock, count, element, moment, percent, usd } from "./format.js";

const HEIGHT = 210;
const COLOURS = document.createElement("span");
COLOURS.hidden = true;
document.body.append(COLOURS);

// A canvas knows nothing of the style sheet's variables.
function colour(name, alpha = 1) {
  COLOURS.style.color = `var(--${name})`;
  const [red, green, blue] = getComputedStyle(COLOURS).color.match(/[\d.]+/g);
  return `rgba(${red}, ${green}, ${blue}, ${alpha})`;
}

class Chart {
  constructor(figure, { title, lines, show, scale = show, rate = show, stacked = false, rising = false, fixed = null }) {
    Object.assign(this, { title, lines, show, scale, rate, stacked, rising, fixed, plot: null, data: null });
    this.caption = element("figcaption");
    this.caption.append(element("h3", title));
    this.legend = element("ul", "", { class: "legend" });
    this.caption.append(this.legend);
    this.area = element("div", "", { class: "plot", role: "img", "aria-label": `${title}: no data yet` });
    this.waiting = element("div", "No data yet", { class: "waiting" });
    this.area.append(this.waiting);
    this.numbers = element("details");
    this.numbers.append(element("summary", "As a table"));
    this.table = element("div", "", { class: "scroll", role: "region", tabindex: "0", "aria-label": `${title}, as a table` });
    this.numbers.append(this.table);
    this.numbers.addEventListener("toggle", () => this.tabulate());
    figure.append(this.caption, this.area, this.numbers);
    new ResizeObserver(() => this.plot?.setSize({ width: this.area.clientWidth, height: HEIGHT })).observe(this.area);
    this.tell(null);
  }

  // What the legend says: of the step under the pointer, or of the whole window.
  tell(at) {
    const items = this.lines.map((line, place) => {
      const item = element("li");
      const swatch = element("span", "", { class: "swatch" });
      swatch.style.setProperty("--swatch", `var(--${line.colour})`);
      const values = this.data?.values[place];
      let said = this.data ? "not counted" : "";
      if (values) said = at === null ? this.show(this.data.sums[place]) : this.rate(values[at]);
      item.append(swatch, `${line.label} `, element("b", said));
      return item;
    });
    if (at !== null && this.data) items.unshift(element("li", moment(this.data.at[at])));
    this.legend.replaceChildren(...items);
  }

  // `values` and `sums`, of the whole window, go by line; null where a line is not counted.
  set({ since, until, at, values, sums, alternative }) {
    this.data = { since, until, at, values, sums };
    const known = values.some((line) => line?.some((value) => value));
    this.waiting.hidden = known;
    this.area.setAttribute("aria-label", `${this.title}, ${clock(since, false)} to ${clock(until, false)}: ${known ? alternative : "no data yet"}`);
    if (!this.plot && known) this.draw();
    else this.plot?.setData(this.drawn());
    this.plot?.setScale("x", { min: since, max: Math.max(until, since + 1) });
    this.tell(null);
    this.tabulate();
  }

  // For uPlot: times, then lines. A step is drawn back to the one before, and of a stack each
  // line is the sum of those under it, the highest first.
  drawn() {
    const { since, at, values } = this.data;
    let lines = values.map((line) => line ?? at.map(() => null));
    if (this.stacked) {
      const sums = at.map(() => 0);
      lines = lines.map((line) => line.map((value, step) => (sums[step] += value ?? 0))).reverse();
    }
    if (this.rising) return [[since, ...at], ...lines.map((line) => [line[0] === null ? null : 0, ...line])];
    return this.stacked ? [[since, ...at], ...lines.map((line) => [line[0], ...line])] : [at, ...lines];
  }

  draw() {
    this.plot?.destroy();
    this.plot = null;
    if (!this.data || !this.waiting.hidden) return;
    const lines = this.stacked ? [...this.lines].reverse() : this.lines;
    const axis = {
      stroke: colour("muted"), font: "12px system-ui, sans-serif", ticks: { show: false },
      grid: { stroke: colour("line"), width: 1 },
    };
    this.plot = new uPlot({
      width: this.area.clientWidth, height: HEIGHT, legend: { show: false }, padding: [8, 28, 0, 0],
      cursor: { drag: { x: false, y: false }, y: false, points: { show: !this.stacked } },
      scales: {
        x: { time: true, auto: false, range: (_, low, high) => [low, high] },
        y: { range: (_, low, high) => this.fixed ?? [0, high > 0 ? high * 1.08 : 1] },
      },
      axes: [
        { ...axis, grid: { show: false }, space: 70, size: 30, values: (_, splits) => splits.map((split) => clock(split, splits[1] - splits[0] < 60)) },
        { ...axis, size: 62, values: (_, splits) => splits.map((split) => this.scale(split)) },
      ],
      series: [{}, ...lines.map((line) => ({
        stroke: colour(line.colour), width: this.stacked ? 0 : 2, spanGaps: false,
        fill: this.stacked ? colour(line.colour) : line.filled ? colour(line.colour, 0.12) : undefined,
        paths: this.stacked ? uPlot.paths.stepped({ align: -1 }) : undefined,
        points: {
          show: false, size: 5,
          filter: this.stacked ? null : ({ data }, series) => [...data[series].keys()].filter((at) => alone(data[series], at)),
        },
      }))],
      hooks: {
        setCursor: [(plot) => {
          const under = plot.cursor.idx;
          if (under === null || under === undefined || plot.cursor.left < 0) this.tell(null);
          else this.tell(Math.min(this.data.at.length - 1, Math.max(0, this.stacked || this.rising ? under - 1 : under)));
        }],
      },
    }, this.drawn(), this.area);
    this.plot.setScale("x", { min: this.data.since, max: Math.max(this.data.until, this.data.since + 1) });
  }

  tabulate() {
    if (!this.numbers.open || !this.data) return;
    const table = element("table");
    table.append(element("caption", this.title, { class: "hidden" }));
    const head = element("tr");
    head.append(element("th", "until", { scope: "col" }), ...this.lines.map((line) => element("th", line.label, { scope: "col", class: "number" })));
    const rows = this.data.at.map((at, step) => {
      const row = element("tr");
      row.append(element("th", clock(at), { scope: "row" }), ...this.data.values.map((line) => element("td", this.rate(line ? line[step] : null), { class: "number" })));
      return row;
    });
    const [top, body] = [element("thead"), element("tbody")];
    top.append(head);
    body.append(...rows.reverse());
    table.append(top, body);
    this.table.replaceChildren(table);
  }
}

const TOKENS = [
  { label: "read", colour: "read", of: "read" },
  { label: "written 5 min", colour: "write-5m", of: "write_5m" },
  { label: "written 1 h", colour: "write-1h", of: "write_1h" },
  { label: "written, unknown", colour: "write-unknown", of: "write_unknown" },
  { label: "uncached", colour: "uncached", of: "uncached" },
  { label: "output", colour: "output", of: "output" },
];
const sum = (values) => values.reduce((all, value) => all + (value ?? 0), 0);
// Where there is little traffic, most steps have no ratio: a line has nothing to go to there, and
// what stands alone is seen only as a point.
const alone = (values, at) => values[at] !== null && (values[at - 1] ?? null) === null && (values[at + 1] ?? null) === null;
const addedUp = (values) => {
  let soFar = 0;
  return values && values.map((value) => (soFar += value));
};

export function makeCharts() {
  const of = (id) => document.getElementById(id);
  const tokens = new Chart(of("chart-tokens"), {
    title: "Tokens a minute, by class", lines: TOKENS, stacked: true, show: count, rate: (value) => `${count(value)}/min`,
  });
  const ratios = new Chart(of("chart-ratio"), {
    title: "Hit ratio", lines: [{ label: "by tokens", colour: "read", filled: true }, { label: "by requests", colour: "spent" }],
    show: percent, scale: (part) => `${Math.round(part * 100)}%`, fixed: [0, 1.02],
  });
  const money = new Chart(of("chart-money"), {
    title: "Money, adding up",
    lines: [{ label: "spent", colour: "spent" }, { label: "saved by reads", colour: "good", filled: true }, { label: "lost to unread writes", colour: "bad" }],
    show: usd, rising: true,
  });
  return {
    set(series, figures) {
      const frame = { since: series.window.since, until: series.at.at(-1), at: series.at };
      const minutes = series.at.map((at, step) => Math.max(1, at - (step ? series.at[step - 1] : series.window.since)) / 60);
      tokens.set({
        ...frame,
        values: TOKENS.map((line) => series.tokens[line.of].map((value, step) => value / minutes[step])),
        sums: TOKENS.map((line) => sum(series.tokens[line.of])),
        alternative: TOKENS.map((line) => `${count(sum(series.tokens[line.of]))} ${line.label}`).join(", "),
      });
      const { by_tokens: byTokens, by_requests: byRequests } = figures.hit_ratio;
      ratios.set({
        ...frame, values: [series.by_tokens, series.by_requests], sums: [byTokens, byRequests],
        alternative: `${percent(byTokens)} by tokens, ${percent(byRequests)} by requests in the whole window`,
      });
      const lines = [series.spent, series.saved, series.never_read].map(addedUp);
      money.set({
        ...frame, values: lines, sums: lines.map((line) => line && line.at(-1)),
        alternative: lines.map((line, at) => `${usd(line && line.at(-1))} ${money.lines[at].label}`).join(", "),
      });
    },
    redraw() {
      for (const chart of [tokens, ratios, money]) chart.draw();
    },
  };
}
