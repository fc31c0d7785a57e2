// The topology: services as cards in columns, callers left of what they call; in a card its versions, in a
// version its instances. Elements are kept by key and only changed where their figures changed.

import { ms, percent, rate, setAttribute, setText, state, svg } from "./words.js";

const CARD = 216, GAP_X = 150, GAP_Y = 24, HEAD = 58, VERSION = 18, CELL = 18, PER_ROW = 10, MARGIN = 16;

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

function rowsOf(version) { return Math.max(1, Math.ceil(version.instances.length / PER_ROW)); }

function heightOf(service) {
  return HEAD + service.versions.reduce((sum, version) => sum + VERSION + rowsOf(version) * CELL + 6, 0) + 6;
}

export class Graph {
  constructor(host, onChoose) {
    this.host = host;
    this.onChoose = onChoose;
    this.root = svg("svg", { role: "group", "aria-label": "Services and who calls them" });
    this.edges = svg("g");
    this.cards = svg("g");
    this.root.append(this.edges, this.cards);
    host.append(this.root);
    this.parts = new Map();
    this.shape = "";
  }

  update(snapshot, chosen) {
    const shape = JSON.stringify([snapshot.services.map((s) => [s.name, s.versions.map((v) => [v.version, v.instances.map((i) => i.id)])]), snapshot.edges.map((e) => [e.caller, e.service])]);
    if (shape !== this.shape) {
      this.shape = shape;
      this.layOut(snapshot);
    }
    for (const service of snapshot.services) this.fill(service, service.name === chosen);
    for (const edge of snapshot.edges) this.fillEdge(edge);
  }

  part(key, make) {
    if (!this.parts.has(key)) this.parts.set(key, make());
    return this.parts.get(key);
  }

  layOut(snapshot) {
    this.parts.clear();
    this.cards.replaceChildren();
    this.edges.replaceChildren();
    const column = columns(snapshot.services.map((s) => s.name), snapshot.edges);
    const bottoms = [], places = new Map();
    for (const service of snapshot.services) {
      const c = column.get(service.name), y = bottoms[c] ?? MARGIN;
      places.set(service.name, { x: MARGIN + c * (CARD + GAP_X), y, height: heightOf(service) });
      bottoms[c] = y + heightOf(service) + GAP_Y;
    }
    const width = MARGIN * 2 + bottoms.length * CARD + (bottoms.length - 1) * GAP_X;
    const height = Math.max(...bottoms.filter((b) => b !== undefined), 60);
    for (const [key, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) this.root.setAttribute(key, value);
    for (const service of snapshot.services) this.makeCard(service, places.get(service.name));
    for (const edge of snapshot.edges) if (places.has(edge.caller) && places.has(edge.service)) this.makeEdge(edge, places);
  }

  makeCard(service, place) {
    const name = svg("text", { class: "name", x: 12, y: 22 }), figures = svg("text", { x: 12, y: 44, class: "soft" });
    const card = svg("g", { class: "card", transform: `translate(${place.x} ${place.y})`, tabindex: 0, role: "button" },
      svg("rect", { width: CARD, height: place.height, rx: 10 }), name, figures);
    card.addEventListener("click", () => this.onChoose(service.name));
    card.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); this.onChoose(service.name); }
    });
    let y = HEAD;
    for (const version of service.versions) {
      const label = svg("text", { x: 12, y: y + 12 });
      card.append(label);
      this.parts.set(`version/${service.name}/${version.version}`, label);
      y += VERSION;
      version.instances.forEach((instance, index) => {
        const x = 12 + (index % PER_ROW) * (CELL + 1.3), at = y + Math.floor(index / PER_ROW) * CELL;
        const title = svg("title"), symbol = svg("text", { x: x + 7.5, y: at + 12 });
        const cell = svg("g", { class: "cell" }, svg("rect", { x, y: at, width: 15, height: 15, rx: 3 }), symbol, title);
        card.append(cell);
        this.parts.set(`instance/${service.name}/${instance.id}`, { cell, symbol, title });
      });
      y += rowsOf(version) * CELL + 6;
    }
    this.cards.append(card);
    this.parts.set(`card/${service.name}`, { card, name, figures });
  }

  makeEdge(edge, places) {
    const from = places.get(edge.caller), to = places.get(edge.service);
    const forward = to.x > from.x;
    const x1 = forward ? from.x + CARD : from.x, x2 = forward ? to.x : to.x + CARD;
    const y1 = from.y + 30, y2 = to.y + 30, bend = forward ? GAP_X / 2 : -GAP_X / 2;
    // Two thirds along the curve: near the callee, where edges that leave one caller lie apart.
    const t = 0.66, u = 1 - t, c = [u * u * u, 3 * u * u * t, 3 * u * t * t, t * t * t];
    const x = c[0] * x1 + c[1] * (x1 + bend) + c[2] * (x2 - bend) + c[3] * x2, y = (c[0] + c[1]) * y1 + (c[2] + c[3]) * y2;
    const label = svg("text", { x, y: y - 18, "text-anchor": "middle" });
    const second = svg("text", { x, y: y - 5, "text-anchor": "middle" });
    const title = svg("title");
    const group = svg("g", { class: "edge" }, svg("path", { d: `M${x1} ${y1} C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}` }), label, second, title);
    this.edges.append(group);
    this.parts.set(`edge/${edge.caller}/${edge.service}`, { group, label, second, title });
  }

  fill(service, chosen) {
    const { card, name, figures } = this.parts.get(`card/${service.name}`);
    const now = state(service);
    setText(name, `${now.symbol} ${service.name}`);
    setAttribute(name, "class", `name ${now.class}`);
    setText(figures, `${rate(service.rps)}/s  ${percent(service.success_rate)}  p99 ${ms(service.p99_ms)} ms`);
    setAttribute(card, "class", chosen ? "card chosen" : "card");
    setAttribute(card, "aria-pressed", chosen);
    setAttribute(card, "aria-label", `${service.name}: ${now.word}, ${rate(service.rps)} requests per second, ${percent(service.success_rate)} success, p99 ${ms(service.p99_ms)} ms`);
    for (const version of service.versions) {
      const share = version.weight === null || version.weight === undefined ? "" : `  ${version.weight} %`;
      setText(this.parts.get(`version/${service.name}/${version.version}`), `${version.version}${share}`);
      for (const instance of version.instances) {
        const { cell, symbol, title } = this.parts.get(`instance/${service.name}/${instance.id}`), is = state(instance);
        setAttribute(cell, "class", `cell ${is.class}`);
        setText(symbol, is.symbol);
        setText(title, `${instance.id}: ${is.word}; ${rate(instance.rps)}/s, ${percent(instance.success_rate)}, p99 ${ms(instance.p99_ms)} ms`);
      }
    }
  }

  fillEdge(edge) {
    const part = this.parts.get(`edge/${edge.caller}/${edge.service}`);
    if (!part) return;
    const now = state(edge), lock = edge.secured ? "🔒" : "🔓 plain";
    setAttribute(part.group, "class", `edge ${now.class}`);
    setText(part.label, `${lock} ${rate(edge.rps)}/s ${now.symbol}`);
    setText(part.second, `p99 ${ms(edge.p99_ms)} ms`);
    setText(part.title, `${edge.caller} calls ${edge.service}: ${now.word}, ${percent(edge.success_rate)} success, ${edge.secured ? "mutual TLS" : "not secured"}`);
  }
}
