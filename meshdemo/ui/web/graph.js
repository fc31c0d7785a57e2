// The topology: services as cards, callers left of what they call (on a narrow screen: above); in a card its
// versions, in a version its instances. Elements are kept by key and only written where their figures changed.

import { clock, faultEffect, ms, percent, plural, rate, setAttribute, setText, state, STATES, svg, withMs } from "./words.js";

const MARGIN = 14, GAP_Y = 22, PADDING = 12;
const CARD = 248, LABEL = 178, BEND = 50; // side by side: a card, the label of an edge before it, its curve
const GUTTER = 28, CALL = 22; // one above the other: where curves run down, and the line of a call
const NARROW = 600, LARGE = 1000;
const HEAD = 74, NOTE = 17, VERSION = 20, ROW = 20, CELL = 20, FOOT = 8, PORT = 22;
const ROWS_UP_TO = 3; // so many instances of a version get a row with figures; more get a cell each
const LOCKED = "M2 6h8v6h-8zM4 6v-2a2 2 0 0 1 4 0v2", UNLOCKED = "M2 6h8v6h-8zM8 6v-2a2 2 0 0 1 4 0v1";

// The column of a service: one right of its rightmost caller (longest path; edges that close a cycle, such as
// mutual calls, are passed over).
export function columns(names, edges) {
  const callees = new Map(names.map((name) => [name, []]));
  for (const edge of edges) if (callees.has(edge.caller) && callees.has(edge.service) && edge.caller !== edge.service) callees.get(edge.caller).push(edge.service);
  const order = [], mark = new Map();
  const visit = (name) => {
    mark.set(name, "open");
    callees.set(name, callees.get(name).filter((callee) => {
      if (mark.get(callee) === "open") return false;
      if (!mark.has(callee)) visit(callee);
      return true;
    }));
    mark.set(name, "done");
    order.unshift(name);
  };
  for (const name of names) if (!mark.has(name)) visit(name);
  const column = new Map(names.map((name) => [name, 0]));
  for (const name of order) for (const callee of callees.get(name)) column.set(callee, Math.max(column.get(callee), column.get(name) + 1));
  return column;
}

// Services by column, in each one those with the same callers near each other, so that fewer edges cross.
export function layers(names, edges) {
  const column = columns(names, edges), out = [], place = new Map();
  for (const name of names) (out[column.get(name)] ??= []).push(name);
  for (const layer of out) {
    const weight = new Map(layer.map((name, index) => {
      const callers = edges.filter((edge) => edge.service === name && place.has(edge.caller)).map((edge) => place.get(edge.caller));
      return [name, callers.length ? callers.reduce((sum, at) => sum + at, 0) / callers.length : index / layer.length];
    }));
    layer.sort((a, b) => weight.get(a) - weight.get(b));
    layer.forEach((name, index) => place.set(name, (index + 0.5) / layer.length));
  }
  return out;
}

// Who calls and is no service of the app: a gateway, or one that proved no identity. Who has just called stays a
// while, lest the graph is laid out anew with every request of somebody who seldom calls.
const UNKNOWN = "(unknown)", KEPT_S = 10;
function withOutsiders(snapshot, seen) {
  const known = new Set(snapshot.services.map((service) => service.name));
  const edges = snapshot.edges.filter((edge) => known.has(edge.service)).map((edge) => (edge.caller ? edge : { ...edge, caller: UNKNOWN }));
  for (const edge of edges) if (!known.has(edge.caller)) seen.set(`${edge.caller}/${edge.service}`, { at: snapshot.time, edge });
  const there = new Set(edges.map((edge) => `${edge.caller}/${edge.service}`));
  for (const [key, { at, edge }] of seen) {
    if (snapshot.time - at > KEPT_S || !known.has(edge.service)) seen.delete(key);
    else if (!there.has(key)) edges.push({ caller: edge.caller, service: edge.service, secured: edge.secured, requests: 0, rps: 0 });
  }
  const outsiders = [...new Set(edges.map((edge) => edge.caller))].filter((name) => !known.has(name));
  if (!outsiders.length) return snapshot;
  return { ...snapshot, edges, services: [...outsiders.map((name) => ({ name, outside: true, versions: [] })), ...snapshot.services] };
}

const perRow = (width) => Math.floor((width - 2 * PADDING) / CELL);
const inRows = (version) => version.instances.length <= ROWS_UP_TO;
const heightOfVersion = (version, width) => VERSION + (inRows(version) ? Math.max(1, version.instances.length) * ROW : Math.ceil(version.instances.length / perRow(width)) * CELL) + 4;
const shortId = (service, id) => (id.startsWith(`${service}-`) ? id.slice(service.length + 1) : id);
const clip = (text, width, size) => { const room = Math.floor(width / (size * 0.56)); return text.length <= room ? text : `${text.slice(0, room - 1)}…`; };

// What there is to say of a service besides its figures: why it may look as it does.
function notes(service, faults) {
  if (service.outside) return [service.name === UNKNOWN ? "proved no identity" : "no service of the app"];
  const out = faults.map((fault) => `⚡ ${faultEffect(fault)}${fault.instance ? ` on ${shortId(service.name, fault.instance)}` : fault.version ? ` on ${fault.version}` : ""}${fault.caller ? ` from ${fault.caller}` : ""}`);
  for (const version of service.versions) if (version.outliers) out.push(`⊘ Envoy ejected ${version.outliers} of ${version.version}`);
  if (service.refused) out.push(`⊘ ${rate(service.refused)}/s refused by a breaker`);
  if (service.denied) out.push(`⊘ ${rate(service.denied)}/s denied by access rules`);
  if (service.overdue) out.push(`⧗ ${plural(service.overdue, "request")} waiting for an answer`);
  if (service.lease) out.push(`⇄ ${service.lease} has the split`);
  if (service.effective_success_rate > service.success_rate + 0.01) out.push(`↻ ${percent(service.effective_success_rate)} after retries`);
  return out;
}

// What becomes of a caller's requests, over all that it calls: the slowest says the p99.
function outcome(edges) {
  const used = edges.filter((edge) => edge.rps + (edge.refused ?? 0) > 0), made = (edge) => edge.rps + (edge.refused ?? 0);
  const rps = used.reduce((sum, edge) => sum + made(edge), 0);
  return {
    rps,
    success_rate: rps ? used.reduce((sum, edge) => sum + (edge.effective_success_rate ?? edge.success_rate ?? 1) * made(edge), 0) / rps : null,
    p99_ms: rps ? Math.max(...used.map((edge) => edge.p99_ms ?? 0)) : null,
  };
}

function says(row) {
  return `${state(row).word}, ${rate(row.rps)} requests per second, ${percent(row.success_rate)} success, p99 ${withMs(row.p99_ms)}`;
}

function countsOf(service) {
  const counts = new Map();
  for (const version of service.versions) for (const instance of version.instances) counts.set(state(instance).word, (counts.get(state(instance).word) ?? 0) + 1);
  return [...counts].map(([word, count]) => `${count} ${word}`).join(", ") || "none";
}

const CELL_TEMPLATE = svg("g", {}, svg("rect", { width: 16, height: 16, rx: 3 }), svg("text", { x: 8, y: 12.5 }));

export class Graph {
  constructor(host, onChoose) {
    this.host = host;
    this.onChoose = onChoose;
    this.root = svg("svg", { role: "group", "aria-label": "Services and who calls them; arrow keys move, Enter selects" });
    this.edges = svg("g", { "aria-hidden": true });
    this.cards = svg("g");
    this.root.append(this.edges, this.cards);
    host.append(this.root);
    this.parts = new Map();
    this.shape = "";
    this.fit = false;
    this.outsiders = new Map();
    this.room = new Map(); // lines for the notes of a service
    this.root.addEventListener("keydown", (event) => this.move(event));
    this.root.addEventListener("pointerover", (event) => this.explain(event));
    // The width comes from the observer: asking for it in an update would make the browser lay out the page then.
    this.width = 800;
    new ResizeObserver(([entry]) => {
      if (Math.floor(entry.contentRect.width) === this.width) return;
      this.width = Math.floor(entry.contentRect.width);
      if (this.last) this.update(...this.last);
    }).observe(host);
  }

  update(given, chosen) {
    this.last = [given, chosen];
    const snapshot = withOutsiders(given, this.outsiders);
    const faults = new Map();
    for (const fault of snapshot.faults) faults.set(fault.service, [...(faults.get(fault.service) ?? []), fault]);
    const noted = new Map(snapshot.services.map((service) => [service.name, notes(service, faults.get(service.name) ?? [])]));
    const narrow = this.width < NARROW;
    const shape = [narrow ? this.width : "wide"];
    for (const service of snapshot.services) {
      shape.push(service.name, this.linesFor(service.name, noted.get(service.name).length, snapshot.time));
      for (const version of service.versions) { shape.push(version.version); for (const instance of version.instances) shape.push(instance.id); }
    }
    for (const edge of snapshot.edges) shape.push(edge.caller, edge.service);
    const key = shape.join();
    if (key !== this.shape) {
      this.shape = key;
      this.layOut(snapshot, noted, narrow);
    }
    this.scale();
    const outside = snapshot.services.filter((service) => service.outside).map((service) => service.name);
    const made = new Map([...snapshot.load, ...outside].map((name) => [name, outcome(snapshot.edges.filter((edge) => edge.caller === name))]));
    for (const service of snapshot.services) this.fill(service, service.name === chosen, noted.get(service.name), made.get(service.name));
    for (const edge of snapshot.edges) this.fillEdge(edge, narrow);
  }

  // As many as there were lately: a note that comes and goes is not to move everything around it.
  linesFor(name, count, now) {
    const had = this.room.get(name);
    if (!had || count >= had.lines || now - had.at > KEPT_S) this.room.set(name, { lines: Math.max(1, count), at: now });
    return this.room.get(name).lines;
  }

  // Bring a service's card into view, where the graph is too large for its place.
  reveal(name) {
    const card = this.parts.get(`card/${name}`)?.card, box = card?.getBoundingClientRect(), host = this.host.getBoundingClientRect();
    if (box) this.host.scrollBy({ left: box.left + box.width / 2 - host.left - host.width / 2, top: box.top + box.height / 2 - host.top - host.height / 2 });
  }

  // A small graph fills its place; a large one may be looked at as a whole, or be scrolled.
  scale() {
    const narrow = this.width < NARROW, room = this.width;
    const least = this.fit ? 0.05 : 0.85;
    const scale = narrow ? 1 : Math.max(least, Math.min(1.5, room / this.natural.width));
    setAttribute(this.root, "width", Math.floor(this.natural.width * scale));
    setAttribute(this.root, "height", Math.ceil(this.natural.height * scale));
    this.overflows = !narrow && this.natural.width * 0.85 > room;
    this.large = this.natural.width > LARGE;
  }

  layOut(snapshot, noted, narrow) {
    const focused = this.root.contains(document.activeElement) ? document.activeElement.dataset.service : null;
    this.parts.clear();
    this.cards.replaceChildren();
    this.edges.replaceChildren();
    const services = new Map(snapshot.services.map((service) => [service.name, service]));
    const edges = snapshot.edges.filter((edge) => services.has(edge.caller) && services.has(edge.service));
    this.layers = layers([...services.keys()], edges);
    const callers = new Map([...services.keys()].map((name) => [name, edges.filter((edge) => edge.service === name)]));
    const width = narrow ? Math.max(220, this.width - MARGIN - GUTTER) : CARD;
    const heightOf = (service) => {
      const content = HEAD + this.room.get(service.name).lines * NOTE + service.versions.reduce((sum, version) => sum + heightOfVersion(version, width), 0) + FOOT;
      return narrow ? content : Math.max(content, PORT * (callers.get(service.name).length + 1));
    };
    const places = new Map();
    this.natural = (narrow ? this.placeNarrow : this.placeWide).call(this, services, callers, heightOf, places);
    this.root.setAttribute("viewBox", `0 0 ${this.natural.width} ${this.natural.height}`);
    const cards = document.createDocumentFragment();
    for (const layer of this.layers) for (const name of layer) cards.append(this.makeCard(services.get(name), places.get(name), width, this.room.get(name).lines));
    this.cards.append(cards);
    const lines = document.createDocumentFragment();
    for (const [name, group] of callers) group.forEach((edge, index) => lines.append(narrow ? this.makeCall(edge, places, index, group.length) : this.makeEdge(edge, places, index)));
    this.edges.append(lines);
    if (focused) this.parts.get(`card/${focused}`)?.card.focus();
  }

  placeWide(services, callers, heightOf, places) {
    const heights = this.layers.map((layer) => layer.reduce((sum, name) => sum + heightOf(services.get(name)) + GAP_Y, -GAP_Y));
    const tallest = Math.max(...heights, 60);
    this.layers.forEach((layer, column) => {
      let y = MARGIN + (services.size <= 12 ? (tallest - heights[column]) / 2 : 0);
      for (const name of layer) {
        const height = heightOf(services.get(name));
        places.set(name, { x: MARGIN + column * (CARD + LABEL + BEND), y, width: CARD, height, column });
        y += height + GAP_Y;
      }
    });
    return { width: 2 * MARGIN + this.layers.length * CARD + (this.layers.length - 1) * (LABEL + BEND), height: tallest + 2 * MARGIN };
  }

  placeNarrow(services, callers, heightOf, places) {
    let y = MARGIN;
    for (const layer of this.layers) for (const name of layer) {
      y += callers.get(name).length * CALL;
      const height = heightOf(services.get(name)), width = Math.max(220, this.width - MARGIN - GUTTER);
      places.set(name, { x: GUTTER, y, width, height, column: 0, index: places.size });
      y += height + GAP_Y;
    }
    return { width: Math.max(220 + GUTTER + MARGIN, this.width), height: y };
  }

  makeCard(service, place, width, noteLines) {
    const name = svg("text", { class: "name", x: PADDING, y: 24 }), word = svg("text", { class: "word", x: width - PADDING, y: 24 });
    const at = [0, 0.33, 0.73].map((share) => PADDING + share * (width - 2 * PADDING));
    const values = at.map((x) => svg("text", { class: "value", x, y: 50 }));
    const units = ["", "success", "p99 ms"].map((text, n) => svg("text", { class: "unit", x: at[n], y: 66 }, text));
    const lines = Array.from({ length: noteLines }, (_, n) => svg("text", { class: "note", x: PADDING, y: HEAD + 10 + n * NOTE }));
    const card = svg("g", { class: "card", transform: `translate(${place.x} ${place.y})`, tabindex: -1, role: "button", "data-service": service.name },
      svg("rect", { class: "back", width, height: place.height, rx: 10 }), svg("rect", { class: "stripe", x: 0, y: 10, width: 5, height: place.height - 20, rx: 2.5 }), name, word, ...values, ...units, ...lines);
    if (!service.outside) card.addEventListener("click", () => { this.onChoose(service.name); });
    let y = HEAD + noteLines * NOTE;
    for (const version of service.versions) {
      const label = svg("text", { class: "version", x: PADDING, y: y + 14 });
      card.append(label);
      this.parts.set(`version/${service.name}/${version.version}`, label);
      const top = y + VERSION;
      version.instances.forEach((instance, index) => {
        if (inRows(version)) this.makeRow(card, service, instance, top + index * ROW, width);
        else this.makeCell(card, service, instance, PADDING + (index % perRow(width)) * CELL, top + Math.floor(index / perRow(width)) * CELL);
      });
      if (!version.instances.length) card.append(svg("text", { class: "unit", x: PADDING, y: top + 13 }, "no instances"));
      y += heightOfVersion(version, width);
    }
    this.parts.set(`card/${service.name}`, { card, name, word, values, unit: units[0], lines, width });
    return card;
  }

  makeRow(card, service, instance, y, width) {
    const symbol = svg("text", { x: 8, y: 12.5 }), label = svg("text", { class: "id", x: 22, y: 12.5 }, clip(shortId(service.name, instance.id), 64, 12));
    const figures = svg("text", { class: "figures", x: width - 2 * PADDING - 6, y: 12.5 });
    const cell = svg("g", { transform: `translate(${PADDING} ${y})` }, svg("rect", { width: width - 2 * PADDING, height: 17, rx: 3 }), symbol, label, figures);
    card.append(cell);
    this.parts.set(`instance/${service.name}/${instance.id}`, { cell, symbol, figures });
  }

  makeCell(card, service, instance, x, y) {
    const cell = CELL_TEMPLATE.cloneNode(true);
    cell.setAttribute("transform", `translate(${x} ${y})`);
    card.append(cell);
    this.parts.set(`instance/${service.name}/${instance.id}`, { cell, symbol: cell.lastChild, figures: null });
  }

  // Each call arrives at a port of its own, after a straight piece that carries its label.
  makeEdge(edge, places, index) {
    const from = places.get(edge.caller), to = places.get(edge.service);
    const y1 = from.y + 40, y2 = to.y + 40 + index * PORT;
    if (to.column > from.column) {
      const x1 = from.x + CARD, x2 = to.x, x = x2 - LABEL;
      return this.edgeParts(edge, `M${x1} ${y1}C${x1 + BEND} ${y1} ${x - BEND} ${y2} ${x} ${y2}H${x2}`, `M${x2 - 7} ${y2 - 4.5}L${x2 - 1} ${y2}L${x2 - 7} ${y2 + 4.5}`, x + 2, y2);
    }
    const x1 = from.x, x2 = to.x + CARD, bottom = Math.max(from.y + from.height, to.y + to.height) + 14;
    return this.edgeParts(edge, `M${x1} ${y1}C${x1 - 40} ${bottom} ${x2 + 40} ${bottom} ${x2} ${y2}`, `M${x2 + 7} ${y2 - 4.5}L${x2 + 1} ${y2}L${x2 + 7} ${y2 + 4.5}`, Math.min(x1, x2) + 8, bottom - 8);
  }

  makeCall(edge, places, index, count) {
    const from = places.get(edge.caller), to = places.get(edge.service);
    const y = to.y - (count - index) * CALL + 14, lane = 5 + (from.index % 3) * 6, y1 = from.y + 40;
    const down = y > y1 ? 1 : -1;
    return this.edgeParts(edge, `M${GUTTER} ${y1}Q${lane} ${y1} ${lane} ${y1 + 12 * down}V${y - 10 * down}Q${lane} ${y} ${lane + 10} ${y}H${GUTTER - 4}`, `M${GUTTER - 10} ${y - 4}L${GUTTER - 4} ${y}L${GUTTER - 10} ${y + 4}`, GUTTER, y + 9);
  }

  edgeParts(edge, path, arrow, x, y) {
    const lock = svg("path", { class: "lock", transform: `translate(${x} ${y - 17})` });
    const label = svg("text", { x: x + 16, y: y - 6 });
    const group = svg("g", {}, svg("path", { class: "way", d: path }), svg("path", { class: "arrow", d: arrow }), lock, label);
    group.edge = edge;
    this.parts.set(`edge/${edge.caller}/${edge.service}`, { group, lock, label });
    return group;
  }

  // `made`: what becomes of the requests that the service makes itself, where it is one that makes load.
  fill(service, chosen, noted, made) {
    const { card, name, word, values, unit, lines, width } = this.parts.get(`card/${service.name}`);
    const now = state(service);
    setText(name, clip(`${now.symbol} ${service.name}`, width - 90, 15));
    const maker = made !== undefined && !service.requests;
    setText(word, maker && !service.outside ? "makes load" : now.word);
    const shown = maker ? made : service;
    setText(values[0], rate(shown.rps));
    setText(unit, maker ? "calls/s" : "requests/s");
    setText(values[1], percent(shown.success_rate));
    setText(values[2], ms(shown.p99_ms));
    lines.forEach((line, index) => setText(line, clip(noted[index] ?? "", width - 2 * PADDING, 12)));
    setAttribute(card, "class", `card ${now.class}${chosen ? " chosen" : ""}${service.outside ? " outside" : ""}`);
    setAttribute(card, "aria-pressed", String(chosen));
    setAttribute(card, "tabindex", chosen ? "0" : "-1");
    setAttribute(card, "aria-label", `${service.name}: ${says(service)}. ${noted.length ? `${noted.join(". ")}. ` : ""}Instances: ${countsOf(service)}`);
    for (const version of service.versions) {
      setText(this.parts.get(`version/${service.name}/${version.version}`), version.weight === null || version.weight === undefined ? version.version : `${version.version} · ${version.weight} % of the traffic`);
      for (const instance of version.instances) {
        const { cell, symbol, figures } = this.parts.get(`instance/${service.name}/${instance.id}`), is = state(instance);
        setAttribute(cell, "class", `cell ${is.class}`);
        setText(symbol, is.symbol);
        if (figures) setText(figures, maker && is.word === "idle" ? "" : is.class === "off" ? is.word : `${rate(instance.rps)}/s  ${percent(instance.success_rate)}  ${withMs(instance.p99_ms)}`);
        cell.instance = instance;
      }
    }
  }

  fillEdge(edge, narrow) {
    const part = this.parts.get(`edge/${edge.caller}/${edge.service}`);
    if (!part) return;
    const called = edge.requests > 0 || edge.denied > 0 || edge.refused > 0;
    const now = edge.refused && state(edge).class === "ok" ? STATES.refused : state(edge);
    setAttribute(part.group, "class", `edge ${now.class}`);
    setAttribute(part.lock, "d", edge.secured ? LOCKED : UNLOCKED);
    setAttribute(part.lock, "class", !called ? "lock none" : edge.secured ? "lock" : "lock open");
    const text = edge.denied > 0 && !edge.requests ? `${now.symbol} denied` : !called ? "no requests" : edge.refused ? `${now.symbol} ${rate(edge.rps)}/s · ${rate(edge.refused)}/s refused` : `${now.symbol} ${rate(edge.rps)}/s · p99 ${withMs(edge.p99_ms)}`;
    setText(part.label, narrow ? `from ${edge.caller}: ${text}` : text);
    part.group.edge = edge;
  }

  // Arrow keys go from card to card: up and down within a column, left and right to the nearest of the next one.
  move(event) {
    const card = event.target.closest?.("[data-service]");
    if (!card) return;
    const name = card.dataset.service;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return this.last[0].services.some((service) => service.name === name) && this.onChoose(name);
    }
    const step = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const column = this.layers.findIndex((layer) => layer.includes(name)), row = this.layers[column].indexOf(name);
    const layer = this.layers[column + step[0]];
    if (!layer) return;
    const next = step[0] ? layer[Math.min(layer.length - 1, Math.floor(((row + 0.5) / this.layers[column].length) * layer.length))] : layer[row + step[1]];
    this.parts.get(`card/${next}`)?.card.focus();
  }

  // What a pointer rests on is explained then, not for everything in every second.
  explain(event) {
    const cell = event.target.closest?.(".cell"), group = event.target.closest?.(".edge");
    const element = cell ?? group;
    if (!element) return;
    let title = element.querySelector("title");
    if (!title) element.append(title = svg("title"));
    if (cell?.instance) setText(title, `${cell.instance.id}: ${says(cell.instance)}${cell.instance.revision ? `, revision ${cell.instance.revision}` : ""}`);
    if (group) setText(title, `${group.edge.caller} calls ${group.edge.service}: ${says(group.edge)}; ${group.edge.secured ? "mutual TLS" : "not secured"} (${clock(this.last[0].time)})`);
  }
}
