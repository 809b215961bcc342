"use strict";
/* Downloads: CSV, SVG and JSON. `cratelm export` writes the other formats. */

(() => {
  const { h, say } = cratelm;

  /** Save some text as a file. @param {string} name made of our own words, slugs and numbers */
  function download(name, content, type) {
    const address = URL.createObjectURL(new Blob([content], { type: `${type};charset=utf-8` }));
    const anchor = document.createElement("a");
    anchor.href = address;
    anchor.download = name;
    document.body.append(anchor);
    anchor.click();
    anchor.remove();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    say(`Saved ${name}.`);
  }

  /** A cell of CSV. A spreadsheet takes a text that begins so for a formula and runs it. */
  function cell(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "";
    if (typeof value === "number") return String(value);
    const safe = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  }

  const csv = (rows) => rows.map((row) => `${row.map(cell).join(",")}\n`).join("");
  const json = (value) => `${JSON.stringify(value, null, 2)}\n`;

  /** A neuron as plain JSON: all that its page shows. */
  function neuronJson(neuron) {
    const { place, excerpts, ...facts } = neuron;
    return {
      model: place.model.name, tap: place.tap.name, layer: place.layer, ...facts,
      excerpts: excerpts.flatMap(({ kind, part, items }) => items.map((item) => ({
        kind, part, ...(item.interval === null ? {} : { interval: item.interval }), document: item.document,
        position: item.position, tokens: item.tokens, activations: numbers(item.values),
        ...(item.predicted ? { predicted: Array.from(item.predicted, (value) => Number(value.toPrecision(3))) } : {}),
      }))),
    };
  }

  /** Float32 numbers with as few digits as bring them back. */
  const numbers = (values) => Array.from(values, (value) => {
    for (let count = 1; count <= 9; count += 1) {
      const short = Number(value.toPrecision(count));
      if (Math.fround(short) === value) return short;
    }
    return value;
  });

  /** A button that saves something. */
  function getButton(text, name, content, type) {
    return h("button", { type: "button", class: "get", on: { click: () => download(name, content(), type) } }, text);
  }

  /** A button that copies the address of this page. */
  function linkButton() {
    const button = h("button", { type: "button", class: "get" }, "Copy link");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(location.href);
        say("The link is copied.");
        button.textContent = "Copied";
      } catch {
        say("This browser does not let the page copy. The link is in the address bar.");
        button.textContent = "See address bar";
      }
      setTimeout(() => { button.textContent = "Copy link"; }, 2000);
    });
    return button;
  }

  cratelm.downloads = { download, csv, json, neuronJson, getButton, linkButton };
})();
