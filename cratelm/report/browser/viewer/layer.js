"use strict";
/* A layer: how its scores are distributed, density against score, and the list of its neurons. */

(() => {
  const { h, fresh, later } = cratelm;
  const { points, percent, byWhom, count, state } = cratelm.text;
  const { link, named, keep, pathOf } = cratelm.routes;

  cratelm.pages.layer = async (site, place, query) => {
    const layer = await cratelm.data.layer(place);
    const wish = {
      sort: query.get("sort") ?? (layer.sets.length ? "score" : "neuron"), down: query.get("order") !== "up" && (query.has("sort") || layer.sets.length > 0),
      words: query.get("words") ?? "", state: query.get("state") ?? "", least: number(query.get("least")), most: number(query.get("most")),
    };
    let chosen = Math.max(0, layer.sets.findIndex((set) => setName(set) === query.get("by")));
    const charts = h("div", { class: "charts" }), lists = h("div", {});
    const summary = h("p", { class: "soft" });

    const own = location.hash.split("?", 1)[0];

    function changed() {
      if (location.hash.split("?", 1)[0] !== own) return;
      const kept = new URLSearchParams();
      if (chosen > 0) kept.set("by", setName(layer.sets[chosen]));
      if (wish.sort !== (layer.sets.length ? "score" : "neuron") || !wish.down) kept.set("sort", wish.sort);
      if (!wish.down && wish.sort !== "neuron") kept.set("order", "up");
      for (const name of ["words", "state", "least", "most"]) if (wish[name] !== "" && wish[name] !== null) kept.set(name, wish[name]);
      keep(kept);
      cratelm.trail.address = location.hash;
    }

    let list;
    function show() {
      const set = layer.sets[chosen] ?? null;
      charts.replaceChildren(...(set ? [distribution(layer, set), against(layer, set)] : [unscored(place)]));
      summary.textContent = census(layer, set);
      list = cratelm.layerList.list(layer, set, wish, {
        changed,
        order: (order) => { cratelm.trail = { folder: place.folder, order, address: own }; },
      });
      lists.replaceChildren(list.element);
      return list.refresh();
    }

    const page = h("div", {},
      cratelm.crumbs(site, place),
      h("h1", {}, named(place)),
      summary,
      layer.sets.length > 1 && choose(layer, chosen, (to) => { chosen = to; show(); }),
      charts,
      h("section", { "aria-labelledby": "list" }, h("h2", { id: "list" }, "Neurons"), filters(layer, wish, later(150, () => list.refresh())), lists,
        h("p", { class: "gets" }, h("button", { type: "button", class: "get", on: { click: () => save(layer, list.order(), place) } }, "CSV of this list"), cratelm.downloads.linkButton())));
    await show();
    return { title: named(place), page, placed: () => list.draw() };
  };

  const number = (text) => (text === null || text.trim() === "" || Number.isNaN(Number(text)) ? null : Number(text));
  const setName = (set) => [set.explainer, set.simulator, set.protocol, set.sample || ""].filter(Boolean).join("~");

  /** Which explainer and protocol the scores are from. */
  function choose(layer, chosen, told) {
    const id = fresh("by");
    return h("p", { class: "choose" }, h("label", { for: id }, "Scores by "),
      h("select", { id, on: { change: (event) => told(Number(event.target.value)) } },
        layer.sets.map((set, i) => h("option", { value: i, selected: i === chosen }, `${set.protocol}, ${byWhom(set)}`))));
  }

  function census(layer, set) {
    const counts = new Map();
    for (const reason of set ? set.reason : layer.status) counts.set(reason, (counts.get(reason) ?? 0) + 1);
    const scored = set ? counts.get("") ?? 0 : 0;
    const others = [...counts].filter(([reason]) => reason && reason !== "scored").sort((a, b) => b[1] - a[1]).map(([reason, n]) => `${count(n)} ${reason}`);
    return `${count(layer.neurons)} neurons${set ? `, ${count(scored)} with a score` : ""}${others.length ? `; without: ${others.join(", ")}` : ""}.`;
  }

  function unscored(place) {
    return h("p", { class: "missing" }, "No neuron of this layer is scored yet. Run: ",
      h("code", {}, `cratelm interpret ${place.model.name}${place.tap.name === "neurons" ? "" : ` --tap ${place.tap.name}`}`), cratelm.data.served ? ", then reload this page." : " and make the site anew.");
  }

  /** The scores in bars of 5 points. */
  function distribution(layer, set) {
    const scores = Array.from(set.correlation).filter((one) => !Number.isNaN(one)).map((one) => 100 * one);
    const lowest = Math.min(0, Math.floor(Math.min(...cratelm.charts.range(scores, 0)) / 5) * 5);
    const bars = [];
    for (let from = lowest; from < 100; from += 5) bars.push({ from, to: from + 5, count: 0 });
    for (const score of scores) bars[Math.min(Math.floor((score - lowest) / 5), bars.length - 1)].count += 1;
    for (const bar of bars) bar.text = `${bar.from} to ${bar.to} points: ${count(bar.count)} neurons`;
    const mean = scores.length ? scores.reduce((a, b) => a + b, 0) / scores.length : NaN;
    const drawing = cratelm.charts.bars(bars, { label: `Distribution of the scores; ${count(scores.length)} neurons, mean ${points(mean / 100)} points`, x: "score (points)", y: "neurons" });
    return cratelm.figure.figure(`${fileName(layer.place)}-scores`, drawing, `Scores, mean ${points(mean / 100)} points`,
      () => [["from", "to", "neurons"], ...bars.map((bar) => [bar.from, bar.to, bar.count])]);
  }

  /** Density against score; neurons without a score stand in the list only. */
  function against(layer, set) {
    const found = [];
    for (let index = 0; index < layer.neurons; index += 1) {
      const x = layer.statistics.density?.[index], y = 100 * set.correlation[index];
      if (x > 0 && !Number.isNaN(y)) found.push({ x: 100 * x, y, index });
    }
    const drawing = cratelm.charts.scatter(found, {
      label: `Density against score of ${count(found.length)} neurons; the list below holds the same numbers`, x: "density (% of tokens)", y: "score (points)",
      describe: (one) => `neuron ${one.index}: ${percent(one.x / 100)} % of tokens, ${points(one.y / 100)} points`,
      open: (one) => { location.hash = link(layer.place, one.index); },
    });
    return cratelm.figure.figure(`${fileName(layer.place)}-density`, drawing, "Density against score; a click opens the neuron",
      () => [["neuron", "density (%)", "score (points)"], ...found.map((one) => [one.index, one.x, one.y])]);
  }

  const fileName = (place) => pathOf(place).replaceAll("/", "-");

  function filters(layer, wish, changed) {
    const field = (label, name, attributes) => {
      const id = fresh(name);
      return h("span", { class: "field" }, h("label", { for: id }, label),
        h("input", { id, value: wish[name] ?? "", autocomplete: "off", ...attributes, on: {
          input: (event) => {
            wish[name] = attributes.type === "number" ? number(event.target.value) : event.target.value;
            changed();
          },
        } }));
    };
    const states = [...new Set(layer.status)].sort(), id = fresh("state");
    return h("div", { class: "filters", role: "group", "aria-label": "Filters" },
      field("Token or word", "words", { type: "search", size: 18, spellcheck: "false" }),
      states.length > 1 && h("span", { class: "field" }, h("label", { for: id }, "State"),
        h("select", { id, on: { change: (event) => { wish.state = event.target.value; changed(); } } },
          h("option", { value: "" }, "any"), states.map((one) => h("option", { value: one, selected: one === wish.state, title: state(one) }, one)))),
      layer.sets.length > 0 && [field("Score from", "least", { type: "number", size: 5, step: "any" }), field("to", "most", { type: "number", size: 5, step: "any" })]);
  }

  async function save(layer, order, place) {
    const texts = await cratelm.layerList.textsOf(layer);
    const names = Object.keys(layer.statistics);
    const rows = order.map((i) => [i, layer.status[i], ...names.map((name) => layer.statistics[name][i]), ...layer.sets.map((set) => set.correlation[i]),
      JSON.stringify(texts[i].tokens), texts[i].texts.map(({ text }) => text).join(" | ")]);
    const head = ["neuron", "status", ...names, ...layer.sets.map((set) => `correlation: ${set.protocol}, ${byWhom(set)}`), "strongest tokens", "explanations"];
    cratelm.downloads.download(`${fileName(place)}.csv`, cratelm.downloads.csv([head, ...rows]), "text/csv");
  }
})();
