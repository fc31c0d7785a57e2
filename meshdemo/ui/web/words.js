// How numbers and states are said. A state is a symbol, a word and a colour class, always together; the symbols
// are those of the terminal's screens.

export const STATES = {
  ok: { symbol: "✓", word: "healthy", class: "ok" },
  degraded: { symbol: "!", word: "degraded", class: "warn" },
  failing: { symbol: "✗", word: "failing", class: "bad" },
  slow: { symbol: "!", word: "slow", class: "warn" },
  too_slow: { symbol: "✗", word: "far too slow", class: "bad" },
  outside: { symbol: "–", word: "outside", class: "off" },
  hung: { symbol: "✗", word: "hung", class: "bad" },
  silent: { symbol: "?", word: "silent", class: "off" },
  ejected: { symbol: "⊘", word: "ejected", class: "off" },
  starting: { symbol: "◌", word: "not ready", class: "off" },
  denied: { symbol: "⊘", word: "denied", class: "off" },
  refused: { symbol: "⊘", word: "refused", class: "warn" },
  idle: { symbol: "–", word: "idle", class: "off" },
};

// What misses an objective of its service comes with what is `wrong` with it; the control plane judges that. What an
// objective puts up with is not healthy for that.
const WELL = 0.99;

export function state(row) {
  if (row.outside) return STATES.outside;
  if (row.ready === false) return STATES.starting;
  if (row.ejected) return STATES.ejected;
  if (row.silent) return STATES.silent;
  if (row.overdue > 0 && !row.requests) return STATES.hung;
  if (row.denied > 0 && !row.requests) return STATES.denied;
  if (row.refused > 0 && !row.requests) return STATES.refused;
  if (row.success_rate === null || row.success_rate === undefined) return STATES.idle;
  return STATES[row.wrong] ?? (row.success_rate < WELL ? STATES.degraded : STATES.ok);
}

// Why Envoy answered a request by itself, or what it did to it; the letters are those of its access log.
const FLAGS = {
  UO: "refused by a breaker", UH: "no healthy instance", UF: "no connection", UC: "connection broke", UT: "timed out", UR: "reset by the service",
  URX: "retries used up", DC: "caller gave up", DR: "caller gave up", FI: "fault: error", DI: "fault: delay", NR: "no route", NC: "no such version", UAEX: "denied", UMSDR: "timed out", DT: "timed out",
};
export const flagWords = (flags) => (flags ? flags.split(",").map((flag) => FLAGS[flag] ?? flag).join(", ") : "");

export const isSlow = (row) => row.wrong === "slow" || row.wrong === "too_slow";

export const isUnwell = (row) => ["bad", "warn"].includes(state(row).class);

const missing = (value) => value === null || value === undefined;

export function rate(value) {
  if (missing(value)) return "–";
  return value >= 100 ? value.toFixed(0) : value >= 10 || value === 0 ? value.toFixed(value === 0 ? 0 : 1) : value.toFixed(2);
}

// Never round a failure away: 100 % is said only where nothing failed.
export function percent(value) {
  if (missing(value)) return "–";
  return value === 1 ? "100 %" : `${(Math.floor(value * 10000 + 1e-6) / 100).toFixed(2)} %`;
}

export function ms(value) {
  if (missing(value)) return "–";
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export const withMs = (value) => (missing(value) ? "–" : `${ms(value)} ms`);

// By hand: the first toLocaleTimeString of a page takes tens of milliseconds.
export function clock(seconds) {
  const at = new Date(seconds * 1000);
  return [at.getHours(), at.getMinutes(), at.getSeconds()].map((part) => String(part).padStart(2, "0")).join(":");
}

export function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

// What was asked for, not measured: no more digits than were given.
export const given = (share) => `${Number((share * 100).toFixed(4))} %`;

export function faultEffect(fault) {
  if (fault.kind === "crash" || fault.kind === "hang") return fault.kind;
  const parts = [fault.lat_ms && `${Number(fault.lat_ms.toFixed(1))} ms${fault.share !== undefined && fault.share < 1 ? ` for ${given(fault.share)}` : ""}`, fault.err_rate && `${given(fault.err_rate)} errors`];
  return parts.filter(Boolean).join(", ");
}

export function faultPlace(fault) {
  return [fault.instance ?? [fault.service, fault.version].filter(Boolean).join(" "), fault.route, fault.caller && `from ${fault.caller}`].filter(Boolean).join(", ");
}

// What an event of the journal says, in a line: watch brings its own words, the control plane's are put together.
export function eventText(event) {
  if (event.text) return event.text;
  switch (event.event) {
    case "fault": return `${faultEffect(event)}${event.at === "mesh" ? "" : `, in the ${event.at}`}`;
    case "fault_cleared": return "cleared";
    case "fault_expired": return "its time was over";
    case "traffic": return Object.values(event.changes ?? {}).every((value) => value === null) ? "back to the defaults" : Object.entries(event.changes).map(([name, value]) => `${name} ${value === null ? "by default" : typeof value === "object" ? Object.entries(value).map((pair) => pair.join("=")).join(",") : value}`).join(", ");
    case "access": return `${event.caller} ${event.allowed ? "may" : "may not"} call it`;
    case "load": return `${rate(event.rps)} requests/s`;
    default: return [event.reason, event.error, event.remedy].filter(Boolean).join(", ");
  }
}

const EVENTS = {
  fault: ["⚡", "warn"], fault_cleared: ["✓", "ok"], fault_expired: ["✓", "ok"], violated: ["✗", "bad"], acted: ["◆", ""], healed: ["✓", "ok"],
  gave_up: ["✗", "bad"], error: ["✗", "bad"], rejected: ["✗", "bad"], refused: ["⊘", "warn"], blocked: ["!", "warn"], escalated: ["!", "warn"], ejected: ["⊘", ""],
};
export function eventName(event) {
  const [symbol, kind] = EVENTS[event.event] ?? ["·", ""];
  return { text: `${symbol} ${event.event.replaceAll("_", " ")}`, class: kind };
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (children.length) element.append(...children);
  return element;
}

export function html(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

// Writing to the page costs layout, and reading from it costs time too; most figures of most rows are the same a
// second later. So what was written last is kept on the element.
export function setText(element, text) {
  if (element.said === text) return;
  element.said = text;
  element.textContent = text;
}

export function setAttribute(element, name, value) {
  const key = `_${name}`;
  if (element[key] === value) return;
  element[key] = value;
  element.setAttribute(name, value);
}
