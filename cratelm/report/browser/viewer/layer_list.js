"use strict";
/* The list of a layer's neurons: sorted and filtered; only the rows on the screen are elements. */

(() => {
  const { h, announce, debounce } = cratelm;
  const { digits, points, percent, chip, explanation, count } = cratelm.text;
  const { link } = cratelm.routes;
  /** Height of a row in pixels, on a wide and on a narrow screen: the same as in pages.css. */
  const ROW = { wide: 40, narrow: 112 };
  /** Rows above and below the screen. */
  const SPARE = 8;

  /** @typedef {{name: string, title: string, unit: string, value: function(number): number, show: function(number): string}} Column */

  /** The columns of numbers. @returns {Column[]} */
  function columns(layer, set) {
    const statistic = (name, title, show, unit = "") => ({ name, title, unit, value: (i) => layer.statistics[name]?.[i] ?? NaN, show: (i) => show(layer.statistics[name]?.[i]) });
    return [
      { name: "neuron", title: "Neuron", unit: "", value: (i) => i, show: String },
      { name: "score", title: "Score", unit: "points", value: (i) => set?.correlation[i] ?? NaN, show: (i) => points(set?.correlation[i]) },
      statistic("density", "Density", percent, "%"),
      statistic("maximum", "Max", digits),
      statistic("kurtosis", "Kurtosis", digits),
    ];
  }

  /**
   * Order and filters of the list; they are part of the address.
   * @typedef {{sort: string, descending: boolean, words: string, state: string, least: ?number, most: ?number}} Filters
   */

  /** Tokens and explanations of all neurons, loaded when they are first filtered or saved. */
  function textsOf(layer) {
    layer.texts ??= Promise.all(Array.from({ length: layer.neurons }, (_, i) => cratelm.data.texts(layer.place, i, layer.textsEach)));
    layer.texts.catch(() => { layer.texts = null; });
    return layer.texts;
  }

  /** The neurons that pass the filters, in order. @returns {Promise<number[]>} */
  async function selected(layer, set, filters) {
    const texts = filters.words ? await textsOf(layer) : null, words = filters.words.toLowerCase();
    const passes = (i) => {
      const score = 100 * (set?.correlation[i] ?? NaN);
      return (!filters.state || layer.status[i] === filters.state)
        && (filters.least === null || score >= filters.least) && (filters.most === null || score <= filters.most)
        && (!texts || [...texts[i].tokens, ...texts[i].texts.map(({ text }) => text)].some((text) => text.toLowerCase().includes(words)));
    };
    const all = columns(layer, set), column = all.find(({ name }) => name === filters.sort) ?? all[0], direction = filters.descending ? -1 : 1;
    // Neurons without a value are last in either direction.
    return Array.from({ length: layer.neurons }, (_, i) => i).filter(passes).sort((a, b) => {
      const x = column.value(a), y = column.value(b);
      return Number.isNaN(x) - Number.isNaN(y) || direction * (x - y) || a - b;
    });
  }

  /**
   * The list.
   * @param {any} layer @param {any} set whose scores are shown @param {Filters} filters
   * @param {function(number[]): void} changed called with the order after each refresh
   */
  function list(layer, set, filters, changed) {
    const numbers = columns(layer, set);
    let order = [], active = 0, drawn = "";
    const body = h("tbody", {});
    const heads = numbers.map((column) => cratelm.table.head({ title: column.title, unit: column.unit, number: true }, () => {
      filters.descending = filters.sort === column.name ? !filters.descending : column.name !== "neuron";
      filters.sort = column.name;
      refresh();
    }));
    const table = h("table", { class: "neurons", "aria-label": "Neurons of this layer" },
      h("thead", {}, h("tr", {}, heads, h("th", { scope: "col", class: "tokens" }, "Strongest tokens"), h("th", { scope: "col", class: "text" }, "Explanation"))), body);
    const scroller = h("div", { class: "scroll list", tabindex: "0", role: "region", "aria-label": "List of neurons; up and down choose one, Enter opens it" }, table);
    const empty = h("p", { class: "empty", hidden: true }, "No neuron of this layer passes the filters.");
    const total = h("p", { class: "soft total", role: "status" });

    const rowHeight = () => (matchMedia("(max-width: 44rem)").matches ? ROW.narrow : ROW.wide);

    function cell(column, index) {
      if (column.name === "neuron") return h("th", { scope: "row", class: "n" }, h("a", { href: link(layer.place, index), tabindex: "-1" }, column.show(index)));
      const isMissing = column.name === "score" && Number.isNaN(column.value(index));
      return h("td", { class: "n", title: isMissing ? layer.status[index] : null }, isMissing ? h("small", {}, layer.status[index]) : column.show(index));
    }

    function row(index, place) {
      const tokensCell = h("td", { class: "tokens" }), textCell = h("td", { class: "text" });
      cratelm.data.texts(layer.place, index, layer.textsEach).then(({ tokens, texts }) => {
        tokensCell.append(...tokens.map((token) => chip(token)));
        const shown = texts.find(({ sets }) => sets.includes(set?.explained)) ?? texts[0];
        if (shown) textCell.append(explanation(shown.text, { brief: true, most: 5 }));
      }, () => textCell.append("could not be read"));
      return h("tr", { "aria-rowindex": place + 2, class: place === active ? "active" : null, data: { place } }, numbers.map((column) => cell(column, index)), tokensCell, textCell);
    }

    function draw(force = false) {
      const size = rowHeight(), first = Math.max(0, Math.floor(scroller.scrollTop / size) - SPARE);
      const last = Math.min(order.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / size) + SPARE);
      if (!force && drawn === `${first}-${last}`) return;
      drawn = `${first}-${last}`;
      const spacer = (rows) => {
        const td = h("td", { colspan: numbers.length + 2 });
        td.style.height = `${rows * size}px`;
        return h("tr", { class: "room", "aria-hidden": "true" }, td);
      };
      body.replaceChildren(spacer(first), ...order.slice(first, last).map((index, i) => row(index, first + i)), spacer(order.length - last));
    }

    async function refresh() {
      try {
        order = await selected(layer, set, filters);
      } catch (error) {
        total.replaceChildren(cratelm.errorBox(error));
        return;
      }
      cratelm.table.markSorted(heads, numbers.findIndex(({ name }) => name === filters.sort), filters.descending);
      table.setAttribute("aria-rowcount", order.length + 1);
      empty.hidden = order.length > 0;
      scroller.hidden = order.length === 0;
      total.textContent = order.length === layer.neurons ? `${count(layer.neurons)} neurons` : `${count(order.length)} of ${count(layer.neurons)} neurons`;
      restore({ active: 0, top: 0 });
      changed(order);
    }

    /** Scroll position and chosen row, to return to the list. */
    const position = () => ({ active, top: scroller.scrollTop });
    function restore({ active: row = 0, top = 0 } = {}) {
      active = row;
      draw(true);
      scroller.scrollTop = top;
      draw(true);
    }

    function go(to) {
      active = Math.min(Math.max(to, 0), order.length - 1);
      const size = rowHeight(), top = active * size, head = table.tHead.offsetHeight;
      if (top < scroller.scrollTop) scroller.scrollTop = top;
      if (top + size + head > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = top + size + head - scroller.clientHeight;
      draw(true);
      announce(`Neuron ${order[active]}, score ${points(set?.correlation[order[active]])}.`);
    }

    const open = (place) => {
      active = place;
      location.hash = link(layer.place, order[place]);
    };
    scroller.addEventListener("scroll", () => draw(), { passive: true });
    addEventListener("resize", debounce(100, () => { if (scroller.isConnected) draw(true); }));
    scroller.addEventListener("keydown", (event) => {
      if (!order.length || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("button")) return;
      const page = Math.max(1, Math.floor(scroller.clientHeight / rowHeight()) - 2);
      const to = { ArrowDown: active + 1, j: active + 1, ArrowUp: active - 1, k: active - 1, PageDown: active + page, PageUp: active - page, Home: 0, End: order.length - 1 }[event.key];
      if (to !== undefined) {
        event.preventDefault();
        event.stopPropagation();
        go(to);
      } else if (event.key === "Enter" && !event.target.closest("a")) {
        open(active);
      }
    });
    body.addEventListener("click", (event) => {
      const line = event.target.closest("tr[data-place]");
      if (line && !getSelection().toString() && !event.target.closest("a")) open(Number(line.dataset.place));
      else if (line) active = Number(line.dataset.place);
    });
    return { element: h("div", {}, total, empty, scroller), refresh, restore, position, order: () => order };
  }

  cratelm.layerList = { list, textsOf };
})();
