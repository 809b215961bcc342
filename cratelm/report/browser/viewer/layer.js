"use strict";
/* A layer: the distribution of its scores, density against score, and the list of its neurons. */

(() => {
  const { h, section, select, newId, debounce } = cratelm;
  const { points, percent, madeBy, count, state } = cratelm.text;
  const { link, titleOf, setQuery, fileName, placeSelect } = cratelm.routes;
  const { csvButton, linkButton } = cratelm.downloads;

  cratelm.pages.layer = async (site, place, query) => {
    const path = location.hash.split("?", 1)[0], layer = await cratelm.data.layer(place);
    const filters = readFilters(layer, query);
    let chosen = Math.max(0, layer.sets.findIndex((set) => setName(set) === query.get("by")));
    const charts = h("div", { class: "charts" }), lists = h("div", {}), summary = h("p", { class: "soft" });
    let list;

    /** Remember the list that is shown: its address, and its order for the keys of a neuron's page. */
    function changed(order) {
      if (location.hash.split("?", 1)[0] !== path) return;
      setQuery(writeFilters(layer, filters, chosen));
      cratelm.lastList = { folder: place.folder, order, address: location.hash, entry: history.state?.entry };
    }

    function show() {
      const set = layer.sets[chosen] ?? null;
      charts.replaceChildren(...(set ? [distribution(layer, set), densityAndScore(layer, set)] : [unscored(place)]));
      summary.textContent = summaryOf(layer, set);
      list = cratelm.layerList.list(layer, set, filters, changed);
      lists.replaceChildren(list.element);
      return list.refresh();
    }

    const page = h("div", {},
      crumbs(site, place), h("h1", {}, titleOf(place)), summary,
      layer.sets.length > 1 && h("p", { class: "choose" }, h("label", {}, "Scores by ",
        select(layer.sets.map((set) => `${set.protocol}, ${madeBy(set)}`), chosen, (i) => { chosen = i; show(); }))),
      charts,
      section("list", "Neurons", filterFields(layer, filters, debounce(150, () => list.refresh())), lists,
        h("p", { class: "gets" }, csvButton(fileName(place), () => rowsOf(layer, list.order()), "CSV of this list"), linkButton())));
    await show();
    return { title: titleOf(place), page, placed: (position) => list.restore(position), position: () => list.position() };
  };

  /** Links to the overview and to the list of the layer, and a choice of another layer. */
  function crumbs(site, place, isNeuron = false) {
    const separator = () => h("span", { "aria-hidden": "true" }, "›");
    return h("nav", { class: "crumbs", "aria-label": "Where you are" }, h("a", { href: "#/" }, "Overview"), separator(),
      placeSelect(site, place, (other) => { location.hash = link(other); }, { "aria-label": "Model and layer" }),
      isNeuron && [separator(), h("a", { href: listLink(place) }, "all its neurons")]);
  }

  /** The list of a layer, with the filters it had when it was last shown. */
  const listLink = (place) => (cratelm.lastList?.folder === place.folder ? cratelm.lastList.address : link(place));
  Object.assign(cratelm, { crumbs, listLink });

  const number = (text) => (text === null || text.trim() === "" || Number.isNaN(Number(text)) ? null : Number(text));
  const setName = (set) => [set.explainer, set.simulator, set.protocol, set.sample || ""].filter(Boolean).join("~");
  const defaultSort = (layer) => (layer.sets.length ? "score" : "neuron");

  function readFilters(layer, query) {
    const sort = query.get("sort") ?? defaultSort(layer);
    return {
      sort, descending: query.get("order") !== "up" && (query.has("sort") || sort === "score"), words: query.get("words") ?? "",
      state: query.get("state") ?? "", least: number(query.get("least")), most: number(query.get("most")),
    };
  }

  /** Only what differs from the defaults is part of the address. */
  function writeFilters(layer, filters, chosen) {
    const query = new URLSearchParams();
    if (chosen > 0) query.set("by", setName(layer.sets[chosen]));
    if (filters.sort !== defaultSort(layer) || !filters.descending) query.set("sort", filters.sort);
    if (!filters.descending && filters.sort !== "neuron") query.set("order", "up");
    for (const name of ["words", "state", "least", "most"]) if (filters[name] !== "" && filters[name] !== null) query.set(name, filters[name]);
    return query;
  }

  function summaryOf(layer, set) {
    const counts = new Map();
    for (const reason of set ? set.reason : layer.status) counts.set(reason, (counts.get(reason) ?? 0) + 1);
    const others = [...counts].filter(([reason]) => reason && reason !== "scored").sort((a, b) => b[1] - a[1]).map(([reason, n]) => `${count(n)} ${reason}`);
    return `${count(layer.neurons)} neurons${set ? `, ${count(counts.get("") ?? 0)} with a score` : ""}${others.length ? `; without a score: ${others.join(", ")}` : ""}.`;
  }

  function unscored(place) {
    return h("p", { class: "missing" }, "No neuron of this layer is scored yet. Run: ",
      h("code", {}, `cratelm interpret ${place.model.name}${place.tap.name === "neurons" ? "" : ` --tap ${place.tap.name}`}`), cratelm.data.thenRefresh);
  }

  /** The scores in bars of 5 points. */
  function distribution(layer, set) {
    const scores = Array.from(set.correlation).filter((score) => !Number.isNaN(score)).map((score) => 100 * score);
    const lowest = Math.min(0, Math.floor(cratelm.charts.extent(scores)[0] / 5) * 5);
    const bars = [];
    for (let from = lowest; from < 100; from += 5) bars.push({ from, to: from + 5, count: 0 });
    for (const score of scores) bars[Math.min(Math.floor((score - lowest) / 5), bars.length - 1)].count += 1;
    for (const bar of bars) bar.text = `${bar.from} to ${bar.to} points: ${count(bar.count)} neurons`;
    const mean = points(scores.reduce((a, b) => a + b, 0) / scores.length / 100);
    const drawing = cratelm.charts.bars(bars, { label: `Distribution of the scores; ${count(scores.length)} neurons, mean ${mean} points`, x: "score (points)", y: "neurons" });
    return cratelm.figure.figure(`${fileName(layer.place)}-scores`, drawing, `Scores, mean ${mean} points`,
      () => [["from", "to", "neurons"], ...bars.map((bar) => [bar.from, bar.to, bar.count])]);
  }

  /** Density against score of the neurons that have a score. */
  function densityAndScore(layer, set) {
    const shown = Array.from(set.correlation, (score, index) => ({ x: 100 * layer.statistics.density?.[index], y: 100 * score, index }))
      .filter(({ x, y }) => x > 0 && !Number.isNaN(y));
    const drawing = cratelm.charts.scatter(shown, {
      label: `Density against score of ${count(shown.length)} neurons; the list below has the same numbers`, x: "density (% of tokens)", y: "score (points)",
      describe: ({ index, x, y }) => `neuron ${index}: ${percent(x / 100)} % of tokens, ${points(y / 100)} points`,
      open: ({ index }) => { location.hash = link(layer.place, index); },
    });
    return cratelm.figure.figure(`${fileName(layer.place)}-density`, drawing, "Density against score; click a point to open its neuron",
      () => [["neuron", "density (%)", "score (points)"], ...shown.map(({ index, x, y }) => [index, x, y])]);
  }

  function filterFields(layer, filters, changed) {
    const field = (label, name, attributes) => {
      const id = newId(name);
      return h("span", { class: "field" }, h("label", { for: id }, label),
        h("input", { id, value: filters[name] ?? "", autocomplete: "off", ...attributes, on: {
          input: (event) => {
            filters[name] = attributes.type === "number" ? number(event.target.value) : event.target.value;
            changed();
          },
        } }));
    };
    const score = { type: "number", size: 5, step: "any" }, states = ["", ...new Set(layer.status)].sort();
    return h("div", { class: "filters", role: "group", "aria-label": "Filters" },
      field("Token or word", "words", { type: "search", size: 18, spellcheck: "false" }),
      states.length > 2 && h("label", { class: "field", title: states.filter(Boolean).map(state).join(" ") }, "State ",
        select(states.map((name) => name || "any"), states.indexOf(filters.state), (i) => { filters.state = states[i]; changed(); })),
      layer.sets.length > 0 && [field("Score from", "least", score), field("to", "most", score)]);
  }

  /** The rows of the list's CSV. */
  async function rowsOf(layer, order) {
    const texts = await cratelm.layerList.textsOf(layer), names = Object.keys(layer.statistics);
    const head = ["neuron", "status", ...names, ...layer.sets.map((set) => `correlation: ${set.protocol}, ${madeBy(set)}`), "strongest tokens", "explanations"];
    return [head, ...order.map((i) => [i, layer.status[i], ...names.map((name) => layer.statistics[name][i]), ...layer.sets.map((set) => set.correlation[i]),
      JSON.stringify(texts[i].tokens), texts[i].texts.map(({ text }) => text).join(" | ")])];
  }
})();
