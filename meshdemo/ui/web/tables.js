// Tables whose rows are kept by key, so that a second's update writes only the cells that changed.

import { setAttribute, setText } from "./words.js";

export class Table {
  // columns: functions from a row to {text, class} or a text; a class "n" is a number, "wide" may wrap.
  constructor(body, keyOf, columns) {
    this.body = body;
    this.keyOf = keyOf;
    this.columns = columns;
    this.rows = new Map();
  }

  update(rows) {
    const order = [];
    const seen = new Set();
    for (const row of rows) {
      const key = this.keyOf(row);
      seen.add(key);
      let element = this.rows.get(key);
      if (!element) {
        element = document.createElement("tr");
        for (let i = 0; i < this.columns.length; i += 1) element.append(document.createElement("td"));
        this.rows.set(key, element);
      }
      this.columns.forEach((column, index) => {
        const value = column(row), cell = element.children[index];
        setText(cell, typeof value === "string" ? value : value.text);
        setAttribute(cell, "class", typeof value === "string" ? "" : value.class);
      });
      order.push(element);
    }
    for (const key of [...this.rows.keys()]) if (!seen.has(key)) this.rows.delete(key);
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
