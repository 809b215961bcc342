"use strict";
/* Downloads (CSV, SVG and JSON), and figures with their downloads. `cratelm export` writes the other formats. */

(() => {
  const { h, s, announce, button } = cratelm;

  /** Save a text as a file. @param {string} name made of slugs, numbers and words of this page */
  function download(name, content, type) {
    const address = URL.createObjectURL(new Blob([content], { type: `${type};charset=utf-8` }));
    const anchor = document.createElement("a");
    anchor.href = address;
    anchor.download = name;
    anchor.click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    announce(`Saved ${name}.`);
  }

  /** A cell of CSV. A leading `'` stops spreadsheets from running a text as a formula. */
  function cell(value) {
    if (typeof value === "number") return Number.isNaN(value) ? "" : String(value);
    const safe = /^[=+\-@\t\r]/.test(value ?? "") ? `'${value}` : value ?? "";
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  }

  const csv = (rows) => rows.map((row) => `${row.map(cell).join(",")}\n`).join("");

  /** Activations with nine digits, which give the same float32 again. */
  const numbers = (values) => Array.from(values, (value) => Number(value.toPrecision(9)));

  /** Everything that the page of a neuron shows, as plain values. */
  function neuronValues({ place, excerpts, ...facts }) {
    return {
      model: place.model.name, tap: place.tap.name, layer: place.layer, ...facts,
      excerpts: excerpts.flatMap(({ kind, part, items }) => items.map(({ values, predicted, ...item }) => ({
        kind, part, ...item, activations: numbers(values), predicted: predicted ? numbers(predicted) : null,
      }))),
    };
  }

  /** Button that saves CSV; `rows` gives its rows, or its text. */
  const csvButton = (name, rows, text = "CSV", attributes = {}) => button(text, async () => {
    const content = await rows();
    download(`${name}.csv`, typeof content === "string" ? content : csv(content), "text/csv");
  }, attributes);

  /** Button that saves the value of `make` as JSON. */
  const jsonButton = (name, make, text = "JSON") => button(text, () => download(`${name}.json`, `${JSON.stringify(make(), null, 2)}\n`, "application/json"));

  /** Button that copies the address of this page. */
  function linkButton() {
    const copy = button("Copy link", async () => {
      copy.textContent = await navigator.clipboard.writeText(location.href).then(() => "Copied", () => "Copy it from the address bar");
      announce(copy.textContent);
      setTimeout(() => { copy.textContent = "Copy link"; }, 2000);
    });
    return copy;
  }

  const TAGS = new Set(["svg", "g", "defs", "path", "use", "clipPath", "rect", "text", "tspan"]);
  const ATTRIBUTES = new Set([
    "d", "transform", "x", "y", "width", "height", "fill", "stroke", "id", "class", "viewBox", "role", "aria-label",
    "fill-opacity", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-dashoffset", "stroke-linecap",
    "stroke-linejoin", "opacity", "font-size", "font-weight", "text-anchor", "clip-path", "href",
  ]);

  /** The drawing of a tree `[tag, attributes, children...]`; other tags, attributes and addresses are left out. */
  function drawingOf([tag, attributes, ...children]) {
    if (!TAGS.has(tag)) return null;
    const isLocal = (name, value) => (name === "href" ? value.startsWith("#") : name !== "clip-path" || /^url\(#[\w-]+\)$/.test(value));
    const allowed = Object.entries(attributes).filter(([name, value]) => ATTRIBUTES.has(name) && isLocal(name, value));
    return s(tag, Object.fromEntries(allowed), ...children.map((child) => (Array.isArray(child) ? drawingOf(child) : String(child))));
  }

  const STYLES = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-linecap", "stroke-dasharray", "opacity",
    "font-family", "font-size", "font-weight", "text-anchor"];

  /** The drawing as a separate file: the styles of the page are written into its attributes. */
  function svgText(drawing) {
    const copy = drawing.cloneNode(true), copies = [copy, ...copy.querySelectorAll("*")];
    [drawing, ...drawing.querySelectorAll("*")].forEach((original, i) => {
      const style = getComputedStyle(original), target = copies[i];
      target.removeAttribute("class");
      if (["title", "defs", "clipPath"].includes(original.localName)) return;
      for (const name of STYLES) if (style.getPropertyValue(name)) target.setAttribute(name, style.getPropertyValue(name));
    });
    const [, , width, height] = copy.getAttribute("viewBox").split(" ");
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    copy.prepend(s("rect", { width, height, fill: getComputedStyle(document.querySelector(".drawing")).backgroundColor }));
    return new XMLSerializer().serializeToString(copy);
  }

  /**
   * A figure with caption and downloads.
   * @param {string} name of its files @param {Element} drawing @param {string|Node} caption
   * @param {() => any[][]} [rows] its numbers, for CSV
   */
  function figure(name, drawing, caption, rows = null) {
    return h("figure", {},
      h("figcaption", {}, h("span", {}, caption), h("span", { class: "gets", role: "group", "aria-label": `Download the figure ${name}` },
        button("SVG", () => download(`${name}.svg`, svgText(drawing), "image/svg+xml")), rows && csvButton(name, rows))),
      h("div", { class: "drawing", tabindex: "0", role: "group", "aria-label": "Figure; scrolls sideways if it is wider than the screen" }, drawing));
  }

  cratelm.downloads = { neuronValues, csvButton, jsonButton, linkButton };
  cratelm.figure = { figure, drawingOf };
})();
