// Tables whose rows are kept by key, so that a second's update writes only the cells that changed.

import { setAttribute, setText } from "./words.js";

export class Table {
  // columns: functions from a row to {text, class} or a text; a class "n" is a number, "wide" may wrap.
  constructor(body, keyOf, columns, nothing) {
    this.body = body;
    this.keyOf = keyOf;
    this.columns = columns;
    this.rows = new Map();
    const cell = document.createElement("td");
    cell.colSpan = columns.length;
    cell.className = "off";
    cell.textContent = nothing;
    this.nothing = document.createElement("tr");
    this.nothing.append(cell);
    this.update([]);
  }

  update(rows) {
    const order = [], kept = new Map();
    for (const row of rows) {
      const key = this.keyOf(row);
      let cells = this.rows.get(key);
      if (!cells) {
        const element = document.createElement("tr");
        cells = this.columns.map(() => element.appendChild(document.createElement("td")));
      }
      kept.set(key, cells);
      this.columns.forEach((column, index) => {
        const value = column(row), plain = typeof value === "string";
        setText(cells[index], plain ? value : value.text);
        setAttribute(cells[index], "class", plain ? "" : value.class);
      });
      order.push(cells[0].parentNode);
    }
    this.rows = kept;
    if (!order.length) order.push(this.nothing);
    const now = this.body.children;
    if (now.length !== order.length || order.some((element, index) => now[index] !== element)) this.body.replaceChildren(...order);
  }
}

// Tabs with the keys of the WAI-ARIA pattern: arrows move, Home and End jump.
export function tabs(list, onShow) {
  const buttons = [...list.querySelectorAll("[role=tab]")];
  const show = (chosen) => {
    for (const button of buttons) {
      const on = button === chosen;
      button.setAttribute("aria-selected", on);
      button.tabIndex = on ? 0 : -1;
      document.getElementById(button.getAttribute("aria-controls")).hidden = !on;
    }
    onShow(chosen.id);
  };
  buttons.forEach((button, index) => {
    button.addEventListener("click", () => show(button));
    button.addEventListener("keydown", (event) => {
      const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = buttons[(to + buttons.length) % buttons.length];
      next.focus();
      show(next);
    });
  });
}
