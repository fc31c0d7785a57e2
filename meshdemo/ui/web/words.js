// How numbers and states are said. A state is a symbol, a word and a colour class, always together.

export const STATES = {
  ok: { symbol: "✓", word: "healthy", class: "ok" },
  warn: { symbol: "!", word: "degraded", class: "warn" },
  bad: { symbol: "✕", word: "failing", class: "bad" },
  silent: { symbol: "?", word: "silent: its sidecar reports nothing", class: "off" },
  ejected: { symbol: "⏏", word: "ejected from load balancing", class: "off" },
  starting: { symbol: "…", word: "not ready", class: "off" },
  idle: { symbol: "–", word: "no requests", class: "off" },
};

// The bounds are those of the default objective: 99 % is healthy, below 95 % it fails plainly.
export function state(row) {
  if (row.ready === false) return STATES.starting;
  if (row.ejected) return STATES.ejected;
  if (row.silent) return STATES.silent;
  if (row.overdue > 0 && row.requests === 0) return STATES.bad;
  if (row.success_rate === null || row.success_rate === undefined) return STATES.idle;
  if (row.success_rate < 0.95) return STATES.bad;
  if (row.success_rate < 0.99) return STATES.warn;
  return STATES.ok;
}

export function rate(value) {
  if (value === null || value === undefined) return "–";
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export function percent(value) {
  if (value === null || value === undefined) return "–";
  // Never round a failure away: 100 % is said only where nothing failed.
  const text = (Math.floor(value * 10000) / 100).toFixed(2);
  return (value === 1 ? "100" : text) + " %";
}

export function ms(value) {
  if (value === null || value === undefined) return "–";
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Writing to the page costs layout; most figures of most rows are the same a second later.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}
