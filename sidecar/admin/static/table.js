// The table by model and team: sorted by any column, filtered by name.

import { count, element, money, ratio, tokens } from "./format.js";

const input = ({ tokens: of }) => of.uncached + of.read + of.write_5m + of.write_1h + of.write_unknown;
const topMisses = (misses) => Object.entries(misses ?? {}).sort((one, other) => other[1] - one[1]);

export const REASONS = {
  not_seen_here: "not seen here before",
  expired: "expired",
  changed_system: "system prompt changed",
  changed_tools: "tools changed",
  changed_messages: "messages changed",
  other_deployment: "another deployment",
  too_short: "too short",
  unknown: "unknown",
};

// Names that the sidecar itself gives, which nobody has chosen.
const GIVEN = {
  None: "a key without a team",
  unknown: "nobody could say which team",
  other: "past SIDECAR_MAX_LABEL_VALUES or SIDECAR_MAX_SERIES",
};
const OTHERS = "“All others” is the sum of what is not listed: windows tell the first 256 models and teams apart, “Since start” lists the 500 with the most input.";

function meter(value) {
  const cell = element("span");
  if (value !== null) {
    const whole = element("span", "", { class: "meter", "aria-hidden": "true" });
    const part = element("i");
    part.style.width = `${value * 100}%`;
    whole.append(part);
    cell.append(whole);
  }
  cell.append(ratio(value));
  return cell;
}

function why({ misses }) {
  if (misses === null) return element("span", "–", { title: "reasons are not looked for" });
  const made = element("span");
  for (const [reason, number] of topMisses(misses).slice(0, 2)) {
    made.append(element("span", `${reason.replaceAll("_", " ")} ${count(number)}`, { title: REASONS[reason] ?? reason }));
  }
  return made.childElementCount ? made : element("span", "none");
}

// A name, whether numbers, what is sorted by, what is shown.
const COLUMNS = [
  ["Model", false, (row) => row.model, (row) => row.model || "–"],
  ["Team", false, (row) => row.team_alias, (row) => row.team_alias || "–"],
  ["Answers", true, ({ figures }) => figures.answers, ({ figures }) => tokens(figures.answers, "answers")],
  ["Hit ratio by tokens", true, ({ figures }) => figures.hit_ratio.by_tokens, ({ figures }) => meter(figures.hit_ratio.by_tokens)],
  ["by requests", true, ({ figures }) => figures.hit_ratio.by_requests, ({ figures }) => ratio(figures.hit_ratio.by_requests)],
  ["Input tokens", true, ({ figures }) => input(figures), ({ figures }) => tokens(input(figures))],
  ["Read", true, ({ figures }) => figures.tokens.read, ({ figures }) => tokens(figures.tokens.read)],
  ["1 h of writes", true, ({ figures }) => figures.write_1h_share, ({ figures }) => ratio(figures.write_1h_share)],
  ["Spent", true, ({ figures }) => figures.money?.spent ?? null, ({ figures }) => money(figures.money?.spent)],
  ["Saved", true, ({ figures }) => figures.money?.saved ?? null, ({ figures }) => money(figures.money?.saved)],
  ["Never read", true, ({ figures }) => figures.money?.never_read ?? null, ({ figures }) => money(figures.money?.never_read)],
  ["Top reasons of misses", false, ({ figures }) => topMisses(figures.misses)[0]?.[1] ?? null, ({ figures }) => why(figures)],
];

export function makeTable() {
  const [table, filter, note] = ["models", "filter", "models-note"].map((id) => document.getElementById(id));
  const [head, body] = [table.tHead, table.tBodies[0]];
  let [rows, others, sortedBy, falling, last] = [[], null, 5, true, ""];

  const top = element("tr");
  COLUMNS.forEach(([name, numeric], at) => {
    const cell = element("th", "", { scope: "col", class: numeric ? "number" : "" });
    const button = element("button", name, { type: "button" });
    button.addEventListener("click", () => {
      // Numbers begin with the largest, names with the first.
      falling = sortedBy === at ? !falling : numeric;
      sortedBy = at;
      show();
    });
    cell.append(button);
    top.append(cell);
  });
  head.append(top);
  filter.addEventListener("input", () => show());

  function compare(one, other) {
    const key = COLUMNS[sortedBy][2];
    const [left, right] = [key(one), key(other)];
    // What has no value stands last either way.
    if (left === null || right === null) return (left === null) - (right === null);
    const order = typeof left === "string" ? left.localeCompare(right) : left - right;
    return falling ? -order : order;
  }

  function line(row, name = "") {
    const made = element("tr", "", name ? { class: name } : {});
    COLUMNS.forEach(([, numeric, , shown], at) => {
      const cell = element(at ? "td" : "th", "", at ? { class: numeric ? "number" : at === 1 ? "name" : "why" } : { scope: "row" });
      const content = shown(row);
      cell.append(content);
      if (typeof content === "string") cell.title = content;
      made.append(cell);
    });
    return made;
  }

  function show() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = rows.filter((row) => words.every((word) => `${row.model} ${row.team_alias}`.toLowerCase().includes(word)));
    [...top.cells].forEach((cell, at) => {
      if (at === sortedBy) cell.setAttribute("aria-sort", falling ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    const lines = kept.sort(compare).map((row) => line(row));
    if (others && !words.length) lines.push(line({ model: "all others", team_alias: "", figures: others }, "others"));
    body.replaceChildren(...lines);
    if (!rows.length) note.textContent = "Nobody has been answered in this window.";
    else if (words.length) note.textContent = `${kept.length} of ${rows.length} rows.`;
    else note.textContent = explained().join(" ");
  }

  function explained() {
    const names = new Set(rows.flatMap((row) => [row.model, row.team_alias]));
    const said = Object.entries(GIVEN).filter(([name]) => names.has(name)).map(([name, meaning]) => `“${name}”: ${meaning}.`);
    return others ? [...said, OTHERS] : said;
  }

  return {
    set(models) {
      const text = JSON.stringify([models.rows, models.others]);
      if (text === last) return;
      last = text;
      [rows, others] = [models.rows, models.others];
      show();
    },
  };
}
