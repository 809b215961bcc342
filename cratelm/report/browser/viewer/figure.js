"use strict";
/* A drawing with its caption and the buttons that take it away, and the report's figures built from their trees. */

(() => {
  const { h, s } = cratelm;

  const TAGS = new Set(["svg", "g", "defs", "path", "use", "clipPath", "rect", "text", "tspan"]);
  const ATTRIBUTES = new Set([
    "d", "transform", "x", "y", "width", "height", "fill", "stroke", "id", "class", "viewBox", "role", "aria-label",
    "fill-opacity", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-dashoffset", "stroke-linecap",
    "stroke-linejoin", "opacity", "font-size", "font-weight", "text-anchor", "clip-path", "href",
  ]);

  /** An element of a figure's tree, `[tag, attributes, children...]`; what is no part of a drawing is left out. */
  function built([tag, attributes, ...children]) {
    if (!TAGS.has(tag)) return null;
    const kept = {};
    for (const [name, value] of Object.entries(attributes)) {
      const inside = name === "href" ? value.startsWith("#") : name !== "clip-path" || /^url\(#[\w-]+\)$/.test(value);
      if (ATTRIBUTES.has(name) && inside) kept[name] = value;
    }
    return s(tag, kept, ...children.map((child) => (Array.isArray(child) ? built(child) : String(child))));
  }

  const COPIED = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-linecap", "stroke-dasharray", "opacity",
    "font-family", "font-size", "font-weight", "text-anchor"];

  /** The drawing as a file of its own: what the style sheet says is written into it. */
  function asSvg(drawing) {
    const copy = drawing.cloneNode(true);
    const originals = [drawing, ...drawing.querySelectorAll("*")], copies = [copy, ...copy.querySelectorAll("*")];
    originals.forEach((original, i) => {
      const style = getComputedStyle(original), target = copies[i];
      target.removeAttribute("class");
      if (["title", "defs", "clipPath"].includes(original.localName)) return;
      for (const name of COPIED) {
        const value = style.getPropertyValue(name);
        if (value) target.setAttribute(name, value);
      }
    });
    const [, , width, height] = copy.getAttribute("viewBox").split(" ");
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    const card = getComputedStyle(document.documentElement).getPropertyValue("--card").trim();
    copy.prepend(s("rect", { width, height, fill: card }));
    return new XMLSerializer().serializeToString(copy);
  }

  /**
   * A figure with caption and downloads.
   * @param {string} name of its files @param {Element} drawing @param {string|Node} caption
   * @param {() => (string|string[][])} [numbers] the same as CSV
   */
  function figure(name, drawing, caption, numbers = null) {
    const { download, csv } = cratelm.downloads;
    const buttons = [h("button", { type: "button", class: "get", on: { click: () => download(`${name}.svg`, asSvg(drawing), "image/svg+xml") } }, "SVG")];
    if (numbers) {
      buttons.push(h("button", { type: "button", class: "get", on: {
        click: () => {
          const content = numbers();
          download(`${name}.csv`, typeof content === "string" ? content : csv(content), "text/csv");
        },
      } }, "CSV"));
    }
    return h("figure", {},
      h("figcaption", {}, h("span", {}, caption), h("span", { class: "gets", role: "group", "aria-label": `Download the figure ${name}` }, buttons)),
      h("div", { class: "drawing", tabindex: "0", role: "group", "aria-label": "Figure; scrolls sideways where it is wider than the screen" }, drawing));
  }

  cratelm.figure = { figure, built, asSvg };
})();
