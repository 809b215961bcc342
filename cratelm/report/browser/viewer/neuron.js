"use strict";
/* A neuron: what it is said to stand for and how well that predicts it, where it fires, and what is near it. */

(() => {
  const { h } = cratelm;
  const { digits, percent, points, count, state, chip, exact, byWhom } = cratelm.text;
  const { link, named, pathOf } = cratelm.routes;

  cratelm.pages.neuron = async (site, place, index) => {
    const neuron = await cratelm.data.neuron(place, index);
    const layer = await cratelm.data.layer(place);
    const way = around(layer, place, index);
    const file = pathOf(place, index).replaceAll("/", "-");
    const { getButton, json, neuronJson, linkButton } = cratelm.downloads;
    const page = h("div", {},
      cratelm.crumbs(site, place, index),
      h("div", { class: "head" },
        h("h1", {}, `Neuron ${index}`, h("small", {}, named(place))),
        h("nav", { class: "way", "aria-label": "Neurons before and after" },
          step(place, way.before, "previous", "‹"), h("span", { class: "soft" }, way.text), step(place, way.after, "next", "›"))),
      neuron.status !== "scored" && h("p", { class: "state" }, state(neuron.status)),
      h("div", { class: "columns" },
        h("div", { class: "main" },
          h("section", { "aria-labelledby": "explained" }, h("h2", { id: "explained" }, "Explanations"), cratelm.cards.explanations(neuron),
            cratelm.cards.judgements(neuron.judged.filter((found) => !found.explainer)), cratelm.cards.firing(neuron)),
          excerpts(neuron, layer)),
        h("aside", { "aria-label": "Numbers of this neuron" },
          facts(neuron), histogram(neuron, file), directions(neuron), neighbours(neuron, place),
          h("section", { "aria-labelledby": "take" }, h("h2", { id: "take" }, "Take away"), h("p", { class: "gets" },
            linkButton(), getButton("JSON", `${file}.json`, () => json(neuronJson(neuron)), "application/json"),
            h("a", { class: "get", href: `#/compare?a=${encodeURIComponent(pathOf(place, index))}` }, "Compare"))),
          live(site, neuron))));
    return { title: `Neuron ${index}, ${named(place)}`, page, keys: { next: way.after, previous: way.before, place } };
  };

  /** What a server adds to the page of a neuron; a folder can do none of it. */
  function live(site, neuron) {
    return Object.entries(cratelm.live ?? {}).filter(([name]) => site.capabilities[name]).map(([, panel]) => panel(site, neuron));
  }

  /** The neurons before and after this one: in the list from which it was opened, or else by number. */
  function around(layer, place, index) {
    const trail = cratelm.trail;
    const at = trail?.folder === place.folder ? trail.order.indexOf(index) : -1;
    if (at >= 0) {
      return { before: trail.order[at - 1] ?? null, after: trail.order[at + 1] ?? null, text: `${count(at + 1)} of ${count(trail.order.length)} in the list` };
    }
    return { before: index > 0 ? index - 1 : null, after: index + 1 < layer.neurons ? index + 1 : null, text: `of ${count(layer.neurons)}` };
  }

  function step(place, index, what, arrow) {
    return index === null ? h("span", { class: "get off", "aria-hidden": "true" }, arrow)
      : h("a", { class: "get", href: link(place, index), rel: what === "next" ? "next" : "prev", "aria-label": `${what} neuron, ${index}` }, arrow);
  }

  const PARTS = new Map([["explain", "from documents for explaining"], ["score", "from documents for scoring"], ["all", "from the whole text"]]);

  function excerpts(neuron, layer) {
    if (!neuron.excerpts.some((group) => group.items.length)) {
      return h("section", {}, h("h2", {}, "Excerpts"), h("p", { class: "missing" }, "No excerpt was recorded: there is no text on which this neuron fired."));
    }
    const scale = cratelm.excerpts.scaleOf(neuron.statistics);
    const box = (item) => cratelm.excerpts.excerptBox(item, scale);
    const sets = (kind) => neuron.excerpts.filter((group) => group.kind === kind && group.items.length);
    return h("section", { "aria-labelledby": "excerpts" }, h("h2", { id: "excerpts" }, "Excerpts"), cratelm.excerpts.legend(neuron.statistics),
      neuron.excerpts.some((group) => group.items.some((item) => item.predicted)) && cratelm.excerpts.predictions(`${layer.predicted.protocol}, ${byWhom(layer.predicted)}`),
      sets("top").map((group) => [h("h3", {}, "Strongest", h("small", {}, PARTS.get(group.part))), group.items.map(box)]),
      sets("random").map((group) => [h("h3", {}, "Random", h("small", {}, PARTS.get(group.part))), group.items.map(box)]),
      quantiles(sets("quantile"), box));
  }

  /** From every height of activation, strongest interval first. */
  function quantiles(groups, box) {
    const items = groups.flatMap((group) => group.items);
    if (!items.length) return null;
    const most = Math.max(...items.map((item) => item.interval));
    return [h("h3", {}, "From every height", h("small", {}, "documents sorted by their largest activation, cut into intervals of equal size")),
      Array.from({ length: most + 1 }, (_, i) => most - i).map((interval) => {
        const inside = items.filter((item) => item.interval === interval);
        if (!inside.length) return null;
        return [h("h4", {}, `Interval ${interval + 1} of ${most + 1}`, interval === most ? ", the strongest" : interval === 0 ? ", the weakest" : ""), inside.map(box)];
      })];
  }

  function facts(neuron) {
    const { statistics } = neuron;
    const best = cratelm.cards.best(neuron);
    const rows = [
      ["Best score", best === null ? "\u2013" : `${points(best)} points`], ["Density", `${percent(statistics.density)} % of tokens`],
      ["Largest", digits(statistics.maximum, 4)], ["Smallest", digits(statistics.minimum, 4)], ["Mean", digits(statistics.mean, 4)],
      ["Variance", digits(statistics.variance, 4)], ["Skewness", digits(statistics.skewness)], ["Kurtosis", digits(statistics.kurtosis)],
    ];
    return h("section", { "aria-labelledby": "facts" }, h("h2", { id: "facts" }, "In numbers"),
      h("dl", { class: "facts" }, rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
  }

  /** The record's histogram: two bars to an octave. */
  function histogram(neuron, file) {
    const { histogram } = neuron;
    if (!histogram?.counts.length) {
      return h("section", {}, h("h2", {}, "Activations"), h("p", { class: "missing" }, "No histogram was recorded."));
    }
    const { binEdge, bars } = cratelm.charts;
    const silent = histogram.first === 0 ? histogram.counts[0] : 0;
    const counts = histogram.first === 0 ? histogram.counts.slice(1) : histogram.counts, first = Math.max(histogram.first, 1);
    const skipped = counts.findIndex((one) => one > 0);
    if (skipped < 0) return h("section", {}, h("h2", {}, "Activations"), h("p", { class: "missing" }, "No counted token has an activation above 0."));
    // Bars far below the largest activation hold next to nothing and would only squeeze the others.
    const from = Math.max(skipped, counts.length - 28), shown = counts.slice(from).map((one, i) => {
      const low = binEdge(first + from + i), high = binEdge(first + from + i + 1);
      return { from: i, to: i + 1, count: one, low, high, text: `${digits(low)} to ${digits(high)}: ${count(one)} tokens` };
    });
    const less = silent + counts.slice(0, from).reduce((a, b) => a + b, 0);
    const marks = shown.map((bar, i) => ({ at: i, text: digits(bar.low, 2) })).filter((_, i) => (shown.length - i) % 7 === 0);
    const drawing = bars(shown, { label: `Histogram of activations from ${digits(shown[0].low)} to ${digits(shown.at(-1).high)}`, x: "activation (logarithmic)", y: "tokens", marks, root: true, small: true });
    return h("section", { "aria-labelledby": "activations" }, h("h2", { id: "activations" }, "Activations"),
      cratelm.figure.figure(`${file}-activations`, drawing, `Of every fourth token; ${count(less)} more are below ${digits(shown[0].low, 2)} or silent`,
        () => [["from", "to", "tokens"], ...shown.map((bar) => [bar.low, bar.high, bar.count])]));
  }

  const LISTS = new Map([
    ["tokens_in", ["Tokens in", "what drives it: its direction against each token's embedding"]],
    ["tokens_alone", ["Tokens alone", "its activation when the model reads only this token"]],
    ["tokens_out", ["Tokens out", "its effect on the logits, per unit of activation"]],
    ["predecessors", ["Driven by", "neurons of the layer before"]],
    ["successors", ["Drives", "neurons of the layer after"]],
  ]);

  /** What the weights say: tokens in and out, effects on the logits, neurons before and after. */
  function directions(neuron) {
    const { place } = neuron, found = neuron.directions;
    const title = h("h2", { id: "weights" }, "By its weights");
    if (!found) {
      return h("section", { "aria-labelledby": "weights" }, title,
        h("p", { class: "missing" }, "Tokens in and out are not computed. Run: ", h("code", {}, `cratelm directions ${place.model.run}`), cratelm.data.served ? ", then reload this page." : " and make the site anew."));
    }
    return h("section", { "aria-labelledby": "weights" }, title, Array.from(LISTS, ([name, [heading, what]]) => {
      const list = found.lists[name];
      if (!list) return null;
      const beside = { predecessors: -1, successors: 1 }[name];
      const layer = beside && place.tap.layers.find((one) => one.layer === place.layer + beside);
      const entry = ([one, value]) => h("li", {}, beside ? (layer ? h("a", { href: link({ ...place, ...layer }, one) }, String(one)) : String(one)) : chip(one),
        h("span", { title: exact(value) }, digits(value, 2)));
      const ends = [list.largest, list.smallest].filter((end) => end.length);
      return ends.length > 0 && [h("h3", {}, heading, h("small", {}, what)), h("div", { class: "ends" }, ends.map((end, i) =>
        h("ol", { "aria-label": `${heading}, ${i ? "smallest" : "largest"}` }, end.map(entry))))];
    }), heads(found.heads));
  }

  const HEADS = new Map([["heads_in", "Read from heads"], ["heads_out.shared", "Read by heads"], ["heads_out.query", "Read by queries"], ["heads_out.key", "Read by keys"], ["heads_out.value", "Read by values"]]);

  /** The share of each attention head. */
  function heads(found) {
    const known = Array.from(HEADS).filter(([name]) => found[name]);
    return known.length > 0 && [h("h3", {}, "Heads", h("small", {}, "share of each, in per cent")), h("dl", { class: "facts" }, known.map(([name, what]) => [h("dt", {}, what),
      h("dd", {}, found[name].map((share) => (100 * share).toFixed(0)).join(" \u00b7 "))]))];
  }

  function neighbours(neuron, place) {
    const lists = [["similar", "Nearest by direction", "cosine of the directions they write in"], ["cofiring", "Fire together", "tokens on which both fire / tokens on which either does"]];
    return h("section", { "aria-labelledby": "near" }, h("h2", { id: "near" }, "Neighbours"),
      lists.map(([name, title, unit]) => [h("h3", {}, title, h("small", {}, unit)),
        neuron.neighbours[name].length
          ? h("ol", { class: "near" }, neuron.neighbours[name].map(([index, value]) => h("li", {},
            h("a", { href: link(place, index), "aria-label": `Neuron ${index}, ${digits(value)}` }, String(index)), h("span", { title: exact(value) }, digits(value, 2)))))
          : h("p", { class: "missing" }, "Not recorded.")]));
  }
})();
