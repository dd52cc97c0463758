// The live page: asks this sidecar for its figures every few seconds, and shows them.

import { makeCharts } from "./charts.js";
import { clock, count, element, exact, money, percent, ratio, span, time, tokens, utc } from "./format.js";
import { REASONS, makeTable } from "./table.js";

const EVERY_MS = 2000;
const PATIENCE_MS = 10_000;
const TOKEN = "sidecar-token";
const CLASSES = [
  ["read", "read", "read"],
  ["write_5m", "written for 5 minutes", "write-5m"],
  ["write_1h", "written for 1 hour", "write-1h"],
  ["write_unknown", "written", "write-unknown"],
  ["uncached", "uncached", "uncached"],
];
const OUTCOMES = [["hit", "hits", "read"], ["write", "writes", "write-5m"], ["not_cached", "not cached", "uncached"]];
const FAULTS = {
  upstream_failures: "LiteLLM gave no whole answer",
  refusals: "turned away by the sidecar",
  internal_errors: "fault of the sidecar, contained",
  label_overflows: "counted as other: too many values",
  log_failures: "line of a log lost",
  unpriced_responses: "answer without a price",
  client_disconnects: "client left",
  price_refreshes: "prices not read",
  team_file_reloads: "team file not read",
};
// What somebody has to look at; the others are told and not alarming.
const ALARMING = new Set(["upstream_failures", "internal_errors", "label_overflows", "log_failures"]);

const of = (id) => document.getElementById(id);
const put = (id, ...content) => of(id).replaceChildren(...content);
const charts = makeCharts();
const table = makeTable();
let instance = null;
let lastAt = null;
let asking = null;

class Refused extends Error {}
class Unreachable extends Error {}

const stored = {
  get token() { try { return sessionStorage.getItem(TOKEN); } catch { return null; } },
  set token(value) { try { value === null ? sessionStorage.removeItem(TOKEN) : sessionStorage.setItem(TOKEN, value); } catch { /* it then lasts for this view */ } },
};
let token = stored.token;

async function ask(name, window, signal) {
  const headers = { accept: "application/json" };
  // A header takes bytes: what is no ASCII would be refused by the browser, as if nobody answered.
  if (token !== null) headers.authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(token))}`;
  try {
    const answer = await fetch(`api/v1/${name}?window=${window}`, { headers, cache: "no-store", signal });
    if (answer.ok) return await answer.json();
    if (answer.status === 401) throw new Refused();
    throw new Unreachable(answer.status < 500 ? `It says: ${(await answer.text()).trim()}` : `It answers ${answer.status}.`);
  } catch (error) {
    if (error instanceof Refused || error instanceof Unreachable) throw error;
    throw new Unreachable(error.name === "AbortError" ? "It does not answer." : "");
  }
}

// What is said over everything else.

function notify(text, { lost = false, dismissable = false } = {}) {
  const notice = of("notice");
  notice.hidden = !text;
  notice.classList.toggle("lost", lost);
  if (notice.firstElementChild.textContent !== text) notice.firstElementChild.textContent = text;
  notice.lastElementChild.hidden = !dismissable;
  document.body.classList.toggle("stale", lost);
}
of("notice").lastElementChild.addEventListener("click", () => notify(""));

// The parts.

function bar(id, parts, whole) {
  const all = parts.reduce((sum, [, value]) => sum + value, 0);
  of(id).setAttribute("aria-label", all ? parts.map(([label, value]) => `${exact(value)} ${label}`).join(", ") : "No data yet");
  const pieces = [...of(id).children];
  parts.forEach(([label, value, colour], at) => {
    const piece = pieces[at] ?? of(id).appendChild(element("i"));
    piece.style.flexBasis = all ? `${(value / all) * 100}%` : "0";
    piece.style.background = `var(--${colour})`;
    piece.title = `${label}: ${exact(value)} of ${exact(all)} ${whole}`;
    piece.hidden = !value;
  });
}

function showTiles({ figures, faults }) {
  const { tokens: kinds, outcomes, hit_ratio: hits, money: sums } = figures;
  const input = CLASSES.reduce((sum, [name]) => sum + kinds[name], 0);
  put("by-tokens", ratio(hits.by_tokens));
  put("by-tokens-note", tokens(kinds.read), " read of ", tokens(input), " input tokens");
  bar("by-tokens-bar", CLASSES.map(([name, label, colour]) => [label, kinds[name], colour]), "input tokens");
  const asked = outcomes.hit + outcomes.write + outcomes.not_cached;
  put("by-requests", ratio(hits.by_requests));
  put("by-requests-note", tokens(outcomes.hit, "hits"), " hits of ", tokens(asked, "answers"), " that asked");
  bar("by-requests-bar", OUTCOMES.map(([name, label, colour]) => [label, outcomes[name], colour]), "answers");
  const unpriced = faults.filter(({ kind }) => kind === "unpriced_responses").reduce((sum, { count: more }) => sum + more, 0);
  if (sums === null) {
    for (const id of ["spent", "saved", "lost"]) put(id, "–");
    put("spent-note", "No source of prices is in use.");
    put("saved-note", "");
  } else {
    const answered = figures.answers > 0;
    put("spent", money(answered ? sums.spent : null));
    put("spent-note", tokens(figures.answers, "answers"), " answers", unpriced ? `, ${exact(unpriced)} without a price` : "");
    put("saved", money(answered ? sums.saved : null));
    put("saved-note", "writes cost ", money(sums.write_premium));
    put("lost", money(answered ? sums.never_read : null));
  }
  of("lost").classList.toggle("some", sums?.never_read > 0);
  if (figures.never_read_tokens === null) put("lost-note", "SIDECAR_MISS_REASONS is off");
  else put("lost-note", tokens(figures.never_read_tokens), " tokens ran out");
}

function showHealth({ upstream, requests, faults, conflict, figures }) {
  const words = { ready: "reachable", starting: "starting", draining: "draining: this pod is about to stop", unreachable: "not reachable" };
  put("upstream", element("span", "", { class: `dot ${upstream.state}`, "aria-hidden": "true" }), words[upstream.state] ?? upstream.state);
  if (upstream.state === "unreachable") of("upstream").append(" ", element("small", upstream.reason));
  of("upstream").classList.toggle("bad-text", upstream.state === "unreachable");
  put("in-flight", tokens(requests.in_flight, "requests"));
  put("finished", tokens(requests.finished, "requests"));
  const codes = Object.entries(requests.codes).map(([code, number]) => {
    const item = element("span", "", { class: "code" });
    item.append(element("b", `${code} × `), tokens(number, "requests"));
    return item;
  });
  put("codes", ...(codes.length ? codes : ["–"]));
  const bad = faults.filter(({ kind }) => ALARMING.has(kind)).reduce((sum, fault) => sum + fault.count, 0);
  put("fault-count", tokens(bad, "faults"));
  of("fault-count").classList.toggle("bad-text", bad > 0);

  const rows = faults.map((fault) => {
    const row = element("tr");
    row.append(
      element("th", FAULTS[fault.kind] ?? fault.kind, { scope: "row", title: `litellm_sidecar_${fault.kind}_total` }),
      element("td", fault.reason ?? ""),
      ...[fault.count, fault.since_start].map((number) => {
        const cell = element("td", "", { class: "number" });
        cell.append(tokens(number, ""));
        return cell;
      }),
    );
    return row;
  });
  of("faults").hidden = !rows.length;
  of("faults").tBodies[0].replaceChildren(...rows);
  const partial = Object.entries(requests.observations).filter(([status]) => status !== "complete").map(([status, number]) => `${exact(number)} ${status}`);
  put("faults-note", [
    rows.length ? "" : "None so far.",
    upstream.reason ? `Not ready: ${upstream.reason}.` : "",
    partial.length ? `Answers not read to a good end: ${partial.join(", ")}.` : "",
    conflict ? "LiteLLM exports the names of v1.100 itself: take v1.100 out of SIDECAR_COMPAT." : "",
  ].filter(Boolean).join(" "));
  showMisses(figures);
}

function showMisses({ misses }) {
  const entries = Object.entries(misses ?? {}).sort((one, other) => other[1] - one[1]);
  const all = entries.reduce((sum, [, number]) => sum + number, 0);
  if (misses === null) put("misses-note", "Not looked for: SIDECAR_MISS_REASONS is off.");
  else put("misses-note", all ? "Answers that asked for caching and read nothing, by what the sidecar found out." : "None in this window.");
  put("misses", ...entries.map(([reason, number]) => {
    const item = element("li");
    const whole = element("div", "", { class: "bar", "aria-hidden": "true" });
    const part = element("i");
    part.style.flexBasis = `${(number / all) * 100}%`;
    part.style.background = "var(--write-5m)";
    whole.append(part);
    const name = element("span", REASONS[reason] ?? reason);
    name.title = reason;
    const said = element("span");
    said.append(tokens(number, "answers"), " ", element("small", percent(number / all)));
    item.append(name, said, whole);
    return item;
  }));
}

function showEmpty({ instance: who, requests, upstream, faults }, nothing) {
  of("empty").hidden = !nothing;
  document.querySelector(".pair").hidden = nothing && !faults.length;
  document.body.classList.toggle("unused", nothing);
  if (!nothing) return;
  const here = dataUrl(who);
  document.querySelector("#empty .data-url").textContent = here;
  of("example").textContent = `curl ${here}/v1/messages -H 'x-api-key: YOUR-LITELLM-KEY' \\
  -H 'anthropic-version: 2023-06-01' -H 'content-type: application/json' \\
  -d '{"model": "claude-sonnet-4-5", "max_tokens": 64,
       "messages": [{"role": "user", "content": "Hello"}]}'`;
  of("empty-title").textContent = requests.finished ? "Requests have come, and no answer to count yet" : "No answer has been counted yet";
  // To have clients come is no advice then.
  const lost = upstream.state === "unreachable";
  of("empty-how").hidden = lost;
  of("empty-lost").hidden = !lost;
  if (!lost) return;
  of("empty-title").textContent = "LiteLLM cannot be reached, so nothing can be counted";
  of("empty-lost").textContent = `${upstream.reason}. Start it, or set SIDECAR_UPSTREAM to where it listens and restart the sidecar; this page goes on by itself as soon as LiteLLM answers.`;
}

function dataUrl(who) {
  const host = location.hostname.includes(":") && !location.hostname.startsWith("[") ? `[${location.hostname}]` : location.hostname;
  return `http://${host}:${who.port}`;
}

function showInstance(who, { since, seconds, name }, at) {
  put("pod", who.pod);
  put("started", time(who.started_at), ` (${span(at - who.started_at)})`);
  document.title = `Prompt cache – ${who.pod}`;
  put("updated", "Updated ", time(at, clock(at)), ". Window: ", name === "start" ? "since the start, " : "from ", time(since), ` (${span(seconds)}).`);
  put("versions", ...[
    ["sidecar", who.version], ["Python", who.python], ["LiteLLM", who.upstream_version ?? "not said yet (no x-litellm-version so far)"],
    ["LiteLLM’s address", who.upstream], ["started", utc(who.started_at)], ["instance", who.id],
  ].flatMap(([term, value]) => [element("dt", term), element("dd", value)]));
}

async function showSettings() {
  try {
    const { settings } = await ask("settings", "start");
    put("settings", ...settings.map(({ name, value, changed, purpose }) => {
      const setting = element("div", "", changed ? { class: "changed" } : {});
      setting.append(element("dt", name), element("dd", value || "not set"), element("dd", purpose));
      return setting;
    }));
  } catch {
    // It is asked for again when it is opened again.
  }
}
of("about").addEventListener("toggle", () => { if (of("about").open) showSettings(); });

// The round.

const locked = () => document.body.classList.contains("locked");

const chosen = () => document.querySelector('input[name="window"]:checked').value;

async function update() {
  asking?.abort();
  const mine = (asking = new AbortController());
  const late = setTimeout(() => mine.abort(), PATIENCE_MS);
  try {
    const window = chosen();
    const [summary, models, series] = await Promise.all([
      ask("summary", window, mine.signal),
      ask("models", window, mine.signal),
      ask("series", window, mine.signal),
    ]);
    const nothing = summary.figures.answers === 0 && models.rows.length === 0 && !(await everAnswered(summary, window, mine.signal));
    if (mine !== asking) return;
    if (instance !== null && instance !== summary.instance.id) {
      notify(`The sidecar was restarted at ${clock(summary.instance.started_at)}: its counts and curves began anew.`, { dismissable: true });
      if (of("about").open) showSettings();
    } else if (document.body.classList.contains("stale")) notify("");
    instance = summary.instance.id;
    lastAt = summary.at;
    document.body.classList.remove("stale", "locked");
    of("sign-in").hidden = true;
    of("sign-out").hidden = token === null;
    showInstance(summary.instance, summary.window, summary.at);
    showEmpty(summary, nothing);
    showTiles(summary);
    showHealth(summary);
    table.set(models);
    charts.set(series, summary.figures);
  } catch (error) {
    if (mine !== asking) return;
    if (error instanceof Refused) askForToken();
    else if (!(error instanceof Unreachable)) throw error;
    else {
      const since = lastAt === null ? "" : ` These figures are from ${clock(lastAt)}.`;
      notify(`The sidecar cannot be reached.${since} Trying again every ${EVERY_MS / 1000} s. ${error.message}`.trim(), { lost: true });
    }
  } finally {
    clearTimeout(late);
  }
}

// A quiet quarter of an hour is not the same as a sidecar that nobody has ever used.
let answeredBy = null;
async function everAnswered(summary, window, signal) {
  if (answeredBy === summary.instance.id) return true;
  const all = window === "start" ? summary : await ask("summary", "start", signal);
  if (all.figures.answers) answeredBy = summary.instance.id;
  return all.figures.answers > 0;
}

function askForToken() {
  const wrong = token !== null;
  stored.token = token = null;
  document.body.classList.add("locked");
  of("sign-in").hidden = false;
  notify("");
  of("refused").textContent = wrong ? "That is not the token." : "";
  of("token").focus();
}

of("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  token = of("token").value.trim();
  if (!token) return;
  stored.token = token;
  of("token").value = "";
  update();
});
of("sign-out").addEventListener("click", () => {
  stored.token = token = null;
  location.reload();
});

for (const choice of document.querySelectorAll('input[name="window"]')) choice.addEventListener("change", () => update());

const THEMES = ["", "light", "dark"];
function showTheme() {
  const now = document.documentElement.dataset.theme ?? "";
  const said = `Theme: ${now || "as the system"}`;
  of("theme").setAttribute("aria-label", said);
  of("theme").title = said;
}
of("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "") + 1) % THEMES.length];
  if (next) root.dataset.theme = next;
  else delete root.dataset.theme;
  try { localStorage.setItem("sidecar-theme", next); } catch { /* it then lasts for this view */ }
  showTheme();
  charts.redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.redraw());
showTheme();

async function live() {
  // Nobody looks at a hidden tab.
  try {
    if (!document.hidden && !locked()) await update();
  } finally {
    setTimeout(live, EVERY_MS);
  }
}
document.addEventListener("visibilitychange", () => { if (!document.hidden && !locked()) update(); });
live();
