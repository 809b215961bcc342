"use strict";
/* The one name that the page's scripts share, and how they make elements. Text from data only ever becomes text, and
   letters in it that cannot be seen or that reorder what stands beside them are written out, whichever text it is. */

const cratelm = Object.create(null);
cratelm.pages = Object.create(null);

(() => {
  /** Attributes that a person reads or is read. */
  const READ = new Set(["title", "aria-label", "placeholder"]);
  const SVG = "http://www.w3.org/2000/svg";
  const SVG_TAGS = new Set([
    "svg", "g", "defs", "path", "use", "clipPath", "rect", "circle", "line", "polyline", "text", "tspan", "title",
  ]);

  /**
   * Make an element. Attributes are ours, never names from data; `on` holds listeners, `data` goes to `dataset`.
   * @param {string} tag
   * @param {Object<string, any>} [attributes]
   * @param {...(Node|string|number|null|undefined|false|Array)} children
   * @returns {HTMLElement}
   */
  function h(tag, attributes = {}, ...children) {
    const element = SVG_TAGS.has(tag) && tag !== "title" ? document.createElementNS(SVG, tag) : document.createElement(tag);
    return fill(element, attributes, children);
  }

  /** An element of a drawing; the same as `h`, and for `title` too. */
  function s(tag, attributes = {}, ...children) {
    return fill(document.createElementNS(SVG, tag), attributes, children);
  }

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "on") {
        for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
      } else if (name === "data") {
        Object.assign(element.dataset, value);
      } else if (name.startsWith("on") || (name === "href" && !/^#/.test(value))) {
        throw new Error(`the attribute ${name} is not made here`);
      } else {
        element.setAttribute(name, value === true ? "" : READ.has(name) ? cratelm.text.visible(String(value)) : String(value));
      }
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false)
      .map((child) => (child instanceof Node ? child : cratelm.text.visible(String(child)))));
    return element;
  }

  /** Put some children in place of all that an element holds. */
  function refill(element, ...children) {
    element.replaceChildren();
    return fill(element, {}, children);
  }

  /** Tell who listens to the page instead of looking at it. */
  function say(text) {
    document.getElementById("said").textContent = cratelm.text.visible(text);
  }

  /** What went wrong and what to do, for a page or a part of it. */
  class Trouble extends Error {
    /** @param {string} what @param {string} [remedy] */
    constructor(what, remedy = "") {
      super(what);
      this.remedy = remedy;
    }
  }

  function troubleBox(error) {
    const told = error instanceof Trouble;
    if (!told) console.error(error);
    return h("div", { class: "trouble", role: "alert" },
      h("p", {}, told ? error.message : `The page made a mistake: ${error.message}`),
      told ? error.remedy && h("p", {}, error.remedy) : h("p", {}, "Please report it with the address of this page."));
  }

  let counter = 0;
  /** A fresh id for labels. */
  const fresh = (what) => `${what}-${++counter}`;

  /** Run at most once in some milliseconds, after the last call. */
  function later(milliseconds, work) {
    let timer = 0;
    return (...values) => {
      clearTimeout(timer);
      timer = setTimeout(() => work(...values), milliseconds);
    };
  }

  /** Something to remember in this browser; forgotten at once where it refuses to keep anything. */
  const memory = {
    kept: new Map(),
    works: true,
    /** @returns {string|null} */
    read(name) {
      try {
        return localStorage.getItem(`cratelm.${name}`);
      } catch {
        this.works = false;
        return this.kept.has(name) ? this.kept.get(name) : null;
      }
    },
    write(name, text) {
      this.kept.set(name, text);
      try {
        localStorage.setItem(`cratelm.${name}`, text);
      } catch {
        this.works = false;
      }
    },
  };

  Object.assign(cratelm, { h, s, refill, say, Trouble, troubleBox, fresh, later, memory });
})();
