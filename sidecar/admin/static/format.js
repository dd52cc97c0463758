// Numbers, money and times as people read them; what is exact goes into a title.

const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2, minimumFractionDigits: 0 });
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const NONE = "–";

export const exact = (value) => WHOLE.format(value);

export function count(value) {
  if (value === null || value === undefined) return NONE;
  // A rate may be less than one, and is not nothing then.
  if (Math.abs(value) < 10 && !Number.isInteger(value)) return String(Number(value.toPrecision(2)));
  if (Math.abs(value) < 10_000) return WHOLE.format(value);
  return COMPACT.format(value).replace(/([A-Z])$/, "\u00a0$1").replace("K", "k");
}

export function usd(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "$0";
  const size = Math.abs(value);
  if (size < 0.000001) return "<$0.000001";
  if (size < 0.01) return `$${Number(value.toPrecision(2)).toFixed(Math.min(8, 1 - Math.floor(Math.log10(size))))}`;
  if (size < 10_000) return `$${value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
  return `$${count(value)}`;
}

export const usdExact = (value) => `$${value.toFixed(9).replace(/(\.\d{2}\d*?)0+$/, "$1")}`;

// Never rounded up to all, nor down to nothing.
export function percent(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0 || value === 1) return `${value * 100}%`;
  return `${Math.min(99.9, Math.max(0.1, value * 100)).toFixed(1)}%`;
}

export function clock(seconds, withSeconds = true) {
  return new Date(seconds * 1000).toLocaleTimeString([], {
    hour: "2-digit", minute: "2-digit", ...(withSeconds ? { second: "2-digit" } : {}), hourCycle: "h23",
  });
}

export function moment(seconds) {
  const then = new Date(seconds * 1000);
  const today = then.toDateString() === new Date().toDateString();
  const day = today ? "" : `${then.toLocaleDateString([], { day: "numeric", month: "short" })}, `;
  return day + clock(seconds, false);
}

export const utc = (seconds) => `${new Date(seconds * 1000).toISOString().slice(0, 19).replace("T", " ")} UTC`;

export function span(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172_800) return `${(seconds / 3600).toFixed(1).replace(".0", "")} h`;
  return `${Math.floor(seconds / 86_400)} days`;
}

// An element with text. Names come from whoever sends requests: nothing is ever read as HTML.
export function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  if (text !== "") made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// A number that says what it is exactly, to people and to programs.
export function figure(value, shown, said) {
  if (value === null || value === undefined) return element("span", NONE, { title: "no data" });
  const made = element("data", shown, { value: String(value) });
  if (said && said !== shown) made.title = said;
  return made;
}

export const tokens = (value, what = "tokens") => figure(value, count(value), value === null ? "" : `${exact(value)} ${what}`.trim());
export const money = (value) => figure(value, usd(value), value === null || value === undefined ? "" : usdExact(value));
export const ratio = (value) => figure(value, percent(value), value === null || value === undefined ? "" : `${(value * 100).toFixed(4)}%`);
export const time = (seconds, shown = moment(seconds)) => element("time", shown, { datetime: new Date(seconds * 1000).toISOString(), title: utc(seconds) });
