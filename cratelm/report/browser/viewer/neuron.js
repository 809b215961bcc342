"use strict";
/* A neuron: its explanations and their scores, the excerpts it fires on, its numbers, weights and neighbours. */

(() => {
  const { h, section } = cratelm;
  const { digits, percent, points, count, state, chip, exact, madeBy } = cratelm.text;
  const { link, titleOf, pathOf, fileName } = cratelm.routes;
  const { explanations, judgements, firing, bestScore } = cratelm.cards;

  cratelm.pages.neuron = async (site, place, index) => {
    const neuron = await cratelm.data.neuron(place, index), layer = await cratelm.data.layer(place);
    const { before, after, position } = neighboursInList(layer, place, index), file = fileName(place, index);
    const { jsonButton, neuronValues, linkButton } = cratelm.downloads;
    const page = h("div", {},
      cratelm.crumbs(site, place, true),
      h("div", { class: "head" },
        h("h1", {}, `Neuron ${index}`, h("small", {}, titleOf(place))),
        h("nav", { class: "steps", "aria-label": "Previous and next neuron" },
          step(place, before, "previous", "‹"), h("span", { class: "soft" }, position), step(place, after, "next", "›"))),
      neuron.status !== "scored" && h("p", { class: "state" }, state(neuron.status)),
      h("div", { class: "columns" },
        h("div", { class: "main" },
          section("explained", "Explanations", explanations(neuron), judgements(neuron.judged.filter(({ explainer }) => !explainer)), firing(neuron)),
          excerpts(neuron, layer)),
        h("aside", { "aria-label": "Numbers of this neuron" },
          statistics(neuron), histogram(neuron, file), weights(neuron), neighbours(neuron, place),
          section("export", "Export", h("p", { class: "gets" }, linkButton(), jsonButton(file, () => neuronValues(neuron)),
            h("a", { class: "get", href: `#/compare?a=${encodeURIComponent(pathOf(place, index))}` }, "Compare"))),
          Object.entries(cratelm.live).map(([name, panel]) => site.capabilities[name] && panel(site, neuron)))));
    return { title: `Neuron ${index}, ${titleOf(place)}`, page, keys: { next: after, previous: before, place } };
  };

  /** The neurons before and after this one: in the list that was last shown, or else by number. */
  function neighboursInList(layer, place, index) {
    const { folder, order } = cratelm.lastList ?? {}, at = folder === place.folder ? order.indexOf(index) : -1;
    if (at >= 0) return { before: order[at - 1] ?? null, after: order[at + 1] ?? null, position: `${count(at + 1)} of ${count(order.length)} in the list` };
    return { before: index > 0 ? index - 1 : null, after: index + 1 < layer.neurons ? index + 1 : null, position: `of ${count(layer.neurons)}` };
  }

  function step(place, index, what, arrow) {
    return index === null ? h("span", { class: "get off", "aria-hidden": "true" }, arrow)
      : h("a", { class: "get", href: link(place, index), rel: what === "next" ? "next" : "prev", "aria-label": `${what} neuron, ${index}` }, arrow);
  }

  const PARTS = { explain: "from documents for explaining", score: "from documents for scoring", all: "from the whole text" };

  function excerpts(neuron, layer) {
    const { excerptBox, excerptList, legend, predictionSwitch, scaleOf } = cratelm.excerpts;
    const groups = neuron.excerpts.filter(({ items }) => items.length), scale = scaleOf(neuron.statistics);
    if (!groups.length) return section("excerpts", "Excerpts", h("p", { class: "missing" }, "No excerpt was recorded: this neuron fired on none of the text."));
    const boxes = (items) => items.map((item) => excerptBox(item, scale));
    const ofKind = (kind, title) => groups.filter((group) => group.kind === kind)
      .map(({ part, items }) => [h("h3", {}, title, h("small", {}, PARTS[part])), excerptList(boxes(items))]);
    return section("excerpts", "Excerpts", legend(neuron.statistics),
      groups.some(({ items }) => items.some(({ predicted }) => predicted)) && predictionSwitch(`${layer.predicted.protocol}, ${madeBy(layer.predicted)}`),
      ofKind("top", "Strongest"), ofKind("random", "Random"), quantiles(groups.filter(({ kind }) => kind === "quantile").flatMap(({ items }) => items), boxes));
  }

  /** Excerpts of every interval of activation, the strongest interval first. */
  function quantiles(items, boxes) {
    if (!items.length) return null;
    const last = Math.max(...items.map(({ interval }) => interval));
    const intervals = Array.from({ length: last + 1 }, (_, i) => last - i).filter((interval) => items.some((item) => item.interval === interval));
    return [h("h3", {}, "By quantile", h("small", {}, "documents sorted by their largest activation, cut into intervals of equal size")),
      cratelm.excerpts.excerptList(intervals.map((interval) => [
        h("h4", {}, `Interval ${interval + 1} of ${last + 1}`, { [last]: ", the strongest", 0: ", the weakest" }[interval]),
        boxes(items.filter((item) => item.interval === interval))]))];
  }

  /** Names and values. */
  const valueList = (rows) => h("dl", { class: "values" }, rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));

  function statistics(neuron) {
    const { density, maximum, minimum, mean, variance, skewness, kurtosis } = neuron.statistics, score = bestScore(neuron);
    return section("statistics", "Statistics", valueList([
      ["Best score", score === null ? points(score) : `${points(score)} points`], ["Density", `${percent(density)} % of tokens`],
      ["Largest activation", digits(maximum, 4)], ["Smallest activation", digits(minimum, 4)], ["Mean", digits(mean, 4)],
      ["Variance", digits(variance, 4)], ["Skewness", digits(skewness)], ["Kurtosis", digits(kurtosis)],
    ]));
  }

  /** Lower edge of a bin of a record's histogram: 2^-16 times 1, 1.5, 2, 3, 4, ... The first bin counts smaller values. */
  const binEdge = (bin) => 2 ** (Math.floor(bin / 2) - 16) * (bin % 2 ? 1.5 : 1);
  /** Bars of the histogram. Lower bins count few tokens and would make the bars too narrow. */
  const MOST_BARS = 28;

  function histogram(neuron, file) {
    const { first, counts } = neuron.histogram ?? { first: 0, counts: [] };
    const bins = counts.map((tokens, i) => ({ tokens, low: binEdge(first + i), high: binEdge(first + i + 1), bin: first + i })).filter(({ bin }) => bin > 0);
    const shown = bins.slice(Math.max(bins.findIndex(({ tokens }) => tokens > 0), bins.length - MOST_BARS)).map((bin, i) => ({
      ...bin, from: i, to: i + 1, count: bin.tokens, text: `${digits(bin.low)} to ${digits(bin.high)}: ${count(bin.tokens)} tokens`,
    }));
    if (!shown.some(({ tokens }) => tokens)) {
      return section("activations", "Activations", h("p", { class: "missing" }, counts.length ? "No counted token has an activation above 0." : "No histogram was recorded."));
    }
    const sum = (list) => list.reduce((a, b) => a + b, 0), rest = sum(counts) - sum(shown.map(({ tokens }) => tokens)), lowest = shown[0].low;
    const marks = shown.map(({ low }, i) => ({ at: i, text: digits(low, 2) })).filter((_, i) => (shown.length - i) % 7 === 0);
    const drawing = cratelm.charts.bars(shown, { label: `Histogram of activations from ${digits(lowest)} to ${digits(shown.at(-1).high)}`, x: "activation (logarithmic)", y: "tokens", marks, root: true, small: true });
    return section("activations", "Activations", cratelm.figure.figure(`${file}-activations`, drawing, `Of every fourth token; ${count(rest)} more are below ${digits(lowest, 2)} or 0`,
      () => [["from", "to", "tokens"], ...shown.map(({ low, high, tokens }) => [low, high, tokens])]));
  }

  const LISTS = new Map([
    ["tokens_in", ["Tokens in", "agreement of its direction with each token's embedding"]],
    ["tokens_alone", ["Tokens alone", "its activation when the model reads only this token"]],
    ["tokens_out", ["Tokens out", "its effect on the logits, per unit of activation"]],
    ["predecessors", ["Neurons before", "in the previous layer, by weights"]],
    ["successors", ["Neurons after", "in the next layer, by weights"]],
  ]);
  const LAYER_STEP = { predecessors: -1, successors: 1 };
  const HEADS = new Map([["heads_in", "Read from heads"], ["heads_out.shared", "Read by heads"], ["heads_out.query", "Read by queries"], ["heads_out.key", "Read by keys"], ["heads_out.value", "Read by values"]]);

  /** Tokens in and out, effects on the logits, neurons of the layers before and after, attention heads. */
  function weights({ place, directions }) {
    if (!directions) {
      return section("weights", "Weights", h("p", { class: "missing" }, "Tokens in and out are not computed. Run: ", h("code", {}, `cratelm directions ${place.model.run}`), cratelm.data.thenRefresh));
    }
    const heads = Array.from(HEADS).filter(([name]) => directions.heads[name]);
    return section("weights", "Weights", Array.from(LISTS, ([name, [heading, what]]) => {
      const layer = LAYER_STEP[name] && place.tap.layers.find((entry) => entry.layer === place.layer + LAYER_STEP[name]);
      const label = (entry) => (!LAYER_STEP[name] ? chip(entry) : layer ? h("a", { href: link({ ...place, ...layer }, entry) }, entry) : String(entry));
      const ends = Object.entries(directions.lists[name] ?? {}).filter(([, entries]) => entries.length);
      return ends.length > 0 && [h("h3", {}, heading, h("small", {}, what)), h("div", { class: "ends" }, ends.map(([end, entries]) =>
        h("ol", { "aria-label": `${heading}, ${end}` }, entries.map(([entry, value]) => h("li", {}, label(entry), h("span", { title: exact(value) }, digits(value, 2)))))))];
    }), heads.length > 0 && [h("h3", {}, "Heads", h("small", {}, "share of each, in per cent")),
      valueList(heads.map(([name, title]) => [title, directions.heads[name].map((share) => (100 * share).toFixed(0)).join(" \u00b7 ")]))]);
  }

  function neighbours(neuron, place) {
    const lists = [["similar", "Nearest directions", "cosine of the directions they write"], ["cofiring", "Fire together", "tokens on which both fire / tokens on which either fires"]];
    return section("near", "Neighbours", lists.map(([name, title, unit]) => [h("h3", {}, title, h("small", {}, unit)),
      neuron.neighbours[name].length
        ? h("ol", { class: "near" }, neuron.neighbours[name].map(([index, value]) => h("li", {},
          h("a", { href: link(place, index), "aria-label": `Neuron ${index}, ${digits(value)}` }, index), h("span", { title: exact(value) }, digits(value, 2)))))
        : h("p", { class: "missing" }, "Not recorded.")]));
  }
})();
