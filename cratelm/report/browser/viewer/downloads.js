"use strict";
/* What a reader may take away: CSV, SVG, JSON, and a neuron in Neuronpedia's form. */

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

  /**
   * A neuron as the rows of Neuronpedia's tables, the fields that `cratelm export --format neuronpedia` writes.
   * They have no user, date and ids, which belong to an import; excerpts are those that this page holds.
   */
  function neuronpedia(neuron) {
    const { place, statistics } = neuron;
    const clean = (text) => text.toLowerCase().replace(/[^a-z0-9_]+/g, "-").replace(/^-|-$/g, "") || "model";
    const set = clean(`cratelm-${place.tap.name}`);
    const own = { modelId: clean(place.model.name), layer: `${place.layer}-${set}`, index: String(neuron.index) };
    const bars = frequencyBars(neuron.histogram, statistics.maximum);
    const groups = neuron.excerpts.filter((group) => group.kind !== "random");
    return {
      feature: {
        ...own, sourceSetName: set, maxActApprox: statistics.maximum ?? 0, frac_nonzero: statistics.density ?? 0, hasVector: false,
        topkCosSimIndices: neuron.neighbours.similar.map(([index]) => index),
        topkCosSimValues: neuron.neighbours.similar.map(([, value]) => value),
        freq_hist_data_bar_heights: bars.heights, freq_hist_data_bar_values: bars.values,
      },
      activations: groups.flatMap(({ kind, items }) => items.map((item) => activationRow(own, kind, item))),
      explanations: neuron.explanations.filter((one) => one.text !== null).map((one) => ({
        modelId: own.modelId, layer: own.layer, index: own.index, description: one.text,
        typeName: `cratelm-${clean(one.explainer)}`, explanationModelName: `cratelm-${clean(one.explainer)}`,
        notes: JSON.stringify({ correlation: Object.fromEntries(one.scores.map((score) => [score.protocol, score.correlation])) }),
      })),
    };
  }

  function activationRow(own, kind, item) {
    const values = numbers(item.values), peak = values.indexOf(Math.max(...values));
    return {
      ...own, tokens: item.tokens, values, maxValue: values[peak], maxValueTokenIndex: peak, minValue: Math.min(...values),
      qualifyingTokenIndex: peak, dataIndex: String(item.document), ...(kind === "top" ? { binMin: -1, binMax: values[peak], binContains: -1 }
        : { binMin: Math.min(...values), binMax: values[peak], binContains: null }),
    };
  }

  /** Counts in 40 bars of equal width from 0 to the maximum; within a bin of the record the count is spread evenly. */
  function frequencyBars(histogram, maximum) {
    const { binEdge } = cratelm.charts;
    if (!histogram || !(maximum > binEdge(1))) return { heights: [], values: [] };
    const count = 40, heights = new Array(count).fill(0), width = maximum / count;
    histogram.counts.forEach((inside, i) => {
      const bin = histogram.first + i;
      if (bin === 0 || !inside) return;
      const low = Math.min(binEdge(bin), maximum), high = Math.max(Math.min(binEdge(bin + 1), maximum), low + 1e-12);
      for (let bar = Math.floor(low / width); bar < count && bar * width < high; bar += 1) {
        const shared = Math.min(high, (bar + 1) * width) - Math.max(low, bar * width);
        if (shared > 0) heights[bar] += (inside * shared) / (high - low);
      }
    });
    return { heights: heights.map((height) => Number(height.toFixed(2))), values: heights.map((_, bar) => Number(((bar + 0.5) * width).toFixed(6))) };
  }

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

  cratelm.downloads = { download, csv, json, neuronJson, neuronpedia, getButton, linkButton };
})();
