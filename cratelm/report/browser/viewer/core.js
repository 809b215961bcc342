"use strict";
/* The namespace that all scripts share, and functions that build elements. Data only ever becomes text nodes, and
   characters that are invisible or that reorder their neighbours are written out. */

const cratelm = Object.create(null);
cratelm.pages = Object.create(null);
/** Panels that a server adds to a neuron's page: capability -> function(site, neuron). */
cratelm.live = Object.create(null);

(() => {
  /** Attributes that are shown or read aloud. */
  const TEXT_ATTRIBUTES = new Set(["title", "aria-label", "placeholder"]);
  const SVG = "http://www.w3.org/2000/svg";
  const isShown = (child) => child !== null && child !== undefined && child !== false;

  /**
   * An HTML element. Attribute names never come from data; `on` holds listeners, `data` goes to `dataset`.
   * @param {string} tag
   * @param {Object<string, any>} [attributes]
   * @param {...(Node|string|number|null|undefined|false|Array)} children
   * @returns {HTMLElement}
   */
  const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

  /** An SVG element; arguments as for `h`. */
  const s = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (!isShown(value)) continue;
      if (name === "on") {
        for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
      } else if (name === "data") {
        Object.assign(element.dataset, value);
      } else if (name.startsWith("on") || (name === "href" && !/^#/.test(value))) {
        throw new Error(`the attribute ${name} is not allowed here`);
      } else {
        element.setAttribute(name, value === true ? "" : TEXT_ATTRIBUTES.has(name) ? cratelm.text.visible(String(value)) : String(value));
      }
    }
    element.append(...children.flat(Infinity).filter(isShown)
      .map((child) => (child instanceof Node ? child : cratelm.text.visible(String(child)))));
    return element;
  }

  /** A section that is labelled by its heading. */
  const section = (id, title, ...children) => h("section", { "aria-labelledby": id }, h("h2", { id }, title), children);

  const button = (text, act, attributes = {}) => h("button", { type: "button", class: "get", ...attributes, on: { click: act } }, text);

  /** A choice between texts; `choose` gets the index of the chosen text. */
  function select(texts, chosen, choose, attributes = {}) {
    return h("select", { ...attributes, on: { change: (event) => choose(event.target.selectedIndex) } },
      texts.map((text, i) => h("option", { selected: i === chosen }, text)));
  }

  /** A small table: the first column and the heads are text, columns from `firstNumber` on are aligned to the right. */
  function smallTable(label, heads, rows, firstNumber = 1) {
    const align = (i) => ({ class: i >= firstNumber ? "n" : null });
    return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, h("table", { "aria-label": label },
      h("thead", {}, h("tr", {}, heads.map((head, i) => h("th", { ...align(i), scope: "col" }, head)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((content, i) => (i ? h("td", align(i), content) : h("th", { scope: "row" }, content))))))));
  }

  /** Announce a change to screen readers. */
  function announce(text) {
    document.getElementById("status").textContent = cratelm.text.visible(text);
  }

  /** An error that a page shows: what failed, and what to do. */
  class PageError extends Error {
    /** @param {string} message @param {string} [hint] */
    constructor(message, hint = "") {
      super(message);
      this.hint = hint;
    }
  }

  function errorBox(error) {
    const expected = error instanceof PageError;
    if (!expected) console.error(error);
    return h("div", { class: "error", role: "alert" },
      h("p", {}, expected ? error.message : `The page failed: ${error.message}`),
      expected ? error.hint && h("p", {}, error.hint) : h("p", {}, "Please report it with the address of this page."));
  }

  let counter = 0;
  /** An unused id for a label. */
  const newId = (prefix) => `${prefix}-${++counter}`;

  /** Delay a call; a further call within `milliseconds` replaces it. */
  function debounce(milliseconds, work) {
    let timer = 0;
    return (...values) => {
      clearTimeout(timer);
      timer = setTimeout(() => work(...values), milliseconds);
    };
  }

  /** The browser's storage; if the browser refuses it, a replacement that lasts until the page is closed. */
  function openStorage() {
    try {
      localStorage.setItem("cratelm.test", "");
      return localStorage;
    } catch {
      const values = new Map();
      return { isTemporary: true, getItem: (name) => values.get(name) ?? null, setItem: (name, text) => values.set(name, text) };
    }
  }

  Object.assign(cratelm, { h, s, section, button, select, smallTable, announce, PageError, errorBox, newId, debounce, storage: openStorage() });
})();
