"use strict";
/* The list of a layer's neurons: sorted, filtered, and only those rows made that are on the screen. */

(() => {
  const { h, say, later } = cratelm;
  const { digits, points, percent, chip, visible, count } = cratelm.text;
  const { link } = cratelm.routes;
  const ROW = { wide: 40, narrow: 112 };
  const SPARE = 8;

  /** @typedef {{name: string, title: string, unit: string, value: function(number): number, show: function(number): string}} Column */

  /** The columns of numbers. @returns {Column[]} */
  function columns(layer, set) {
    const statistic = (name, title, show, unit = "") => ({
      name, title, unit, value: (i) => layer.statistics[name]?.[i] ?? NaN, show: (i) => show(layer.statistics[name]?.[i]),
    });
    return [
      { name: "neuron", title: "Neuron", unit: "", value: (i) => i, show: (i) => String(i) },
      { name: "score", title: "Score", unit: "points", value: (i) => (set ? set.correlation[i] : NaN), show: (i) => points(set?.correlation[i]) },
      statistic("density", "Density", percent, "%"),
      statistic("maximum", "Max", (value) => digits(value)),
      statistic("kurtosis", "Kurtosis", (value) => digits(value)),
    ];
  }

  /**
   * What is asked of the list, kept in the address.
   * @typedef {{sort: string, down: boolean, words: string, state: string, least: number, most: number}} Wish
   */

  /** The texts of all neurons, loaded when they are first filtered or saved. */
  function textsOf(layer) {
    if (!layer.texts) {
      const starts = [];
      for (let start = 0; start < layer.neurons; start += layer.textsEach) starts.push(start);
      const read = (start) => Promise.all(Array.from({ length: Math.min(layer.textsEach, layer.neurons - start) },
        (_, i) => cratelm.data.texts(layer.place, start + i, layer.textsEach)));
      layer.texts = Promise.all(starts.map(read)).then((parts) => parts.flat());
      layer.texts.catch(() => { layer.texts = null; });
    }
    return layer.texts;
  }

  /** The neurons that a wish leaves, in its order. @returns {Promise<number[]>} */
  async function chosen(layer, set, wish) {
    const texts = wish.words ? await textsOf(layer) : null;
    const asked = wish.words.toLowerCase();
    const kept = [];
    for (let i = 0; i < layer.neurons; i += 1) {
      const score = set ? 100 * set.correlation[i] : NaN;
      if (wish.state && layer.status[i] !== wish.state) continue;
      if (wish.least !== null && !(score >= wish.least)) continue;
      if (wish.most !== null && !(score <= wish.most)) continue;
      if (texts && !texts[i].tokens.some((token) => token.toLowerCase().includes(asked))
        && !texts[i].texts.some(({ text }) => text.toLowerCase().includes(asked))) continue;
      kept.push(i);
    }
    const column = columns(layer, set).find((one) => one.name === wish.sort) ?? columns(layer, set)[0];
    const direction = wish.down ? -1 : 1;
    // A neuron without a value comes last either way.
    return kept.sort((a, b) => {
      const x = column.value(a), y = column.value(b);
      return Number.isNaN(x) - Number.isNaN(y) || direction * (x - y) || a - b;
    });
  }

  /**
   * The list.
   * @param {any} layer @param {any} set whose scores are shown @param {Wish} wish
   * @param {{changed: function(): void, order: function(number[]): void}} told
   */
  function list(layer, set, wish, told) {
    const shown = columns(layer, set);
    let order = [], active = 0;
    const body = h("tbody", {});
    const heads = shown.map((column) => {
      const one = cratelm.table.head({ title: column.title, unit: column.unit, number: true }, () => {
        wish.down = wish.sort === column.name ? !wish.down : column.name !== "neuron";
        wish.sort = column.name;
        refresh();
      });
      return one;
    });
    const table = h("table", { class: "neurons", "aria-label": "Neurons of this layer" },
      h("thead", {}, h("tr", {}, heads,
        h("th", { scope: "col", class: "tokens" }, "Strongest tokens"), h("th", { scope: "col", class: "text" }, "Explanation"))), body);
    const scroller = h("div", { class: "scroll list", tabindex: "0", role: "region", "aria-label": "List of neurons; up and down choose one, Enter opens it" }, table);
    const empty = h("p", { class: "empty", hidden: true }, "No neuron of this layer passes the filters.");
    const found = h("p", { class: "soft found", role: "status" });

    const height = () => (matchMedia("(max-width: 44rem)").matches ? ROW.narrow : ROW.wide);

    function row(index, place) {
      const line = h("tr", { "aria-rowindex": place + 2, class: place === active ? "active" : null, data: { place } },
        shown.map((column, i) => (i === 0
          ? h("th", { scope: "row", class: "n" }, h("a", { href: link(layer.place, index), tabindex: "-1" }, column.show(index)))
          : h("td", { class: "n", title: column.name === "score" && layer.status[index] !== "scored" ? layer.status[index] : null },
            column.name === "score" && Number.isNaN(column.value(index)) ? h("small", {}, layer.status[index]) : column.show(index)))),
        h("td", { class: "tokens" }), h("td", { class: "text" }));
      cratelm.data.texts(layer.place, index, layer.textsEach).then(({ tokens, texts }) => {
        line.querySelector(".tokens").append(...tokens.map((token) => chip(token)));
        const own = texts.find(({ sets }) => sets.includes(set?.explained)) ?? texts[0];
        if (own) line.querySelector(".text").append(visible(own.text));
      }, () => line.querySelector(".text").append("could not be read"));
      return line;
    }

    let drawn = [-1, -1];
    function draw(force = false) {
      const size = height(), first = Math.max(0, Math.floor(scroller.scrollTop / size) - SPARE);
      const last = Math.min(order.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / size) + SPARE);
      if (!force && first === drawn[0] && last === drawn[1]) return;
      drawn = [first, last];
      const room = (rows) => h("tr", { class: "room", "aria-hidden": "true" }, h("td", { colspan: shown.length + 2 }));
      const above = room(), below = room();
      above.firstChild.style.height = `${first * size}px`;
      below.firstChild.style.height = `${(order.length - last) * size}px`;
      body.replaceChildren(above, ...order.slice(first, last).map((index, i) => row(index, first + i)), below);
    }

    async function refresh() {
      try {
        order = await chosen(layer, set, wish);
      } catch (error) {
        found.replaceChildren(cratelm.troubleBox(error));
        return;
      }
      heads.forEach((one, i) => {
        if (shown[i].name === wish.sort) one.setAttribute("aria-sort", wish.down ? "descending" : "ascending");
        else one.removeAttribute("aria-sort");
      });
      table.setAttribute("aria-rowcount", order.length + 1);
      active = 0;
      scroller.scrollTop = 0;
      empty.hidden = order.length > 0;
      scroller.hidden = order.length === 0;
      found.textContent = order.length === layer.neurons ? `${count(layer.neurons)} neurons` : `${count(order.length)} of ${count(layer.neurons)} neurons`;
      draw(true);
      told.order(order);
      told.changed();
    }

    function go(to) {
      active = Math.min(Math.max(to, 0), order.length - 1);
      const size = height(), top = active * size, head = table.tHead.offsetHeight;
      if (top < scroller.scrollTop) scroller.scrollTop = top;
      if (top + size + head > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = top + size + head - scroller.clientHeight;
      draw(true);
      say(`Neuron ${order[active]}, score ${points(set?.correlation[order[active]])}.`);
    }

    scroller.addEventListener("scroll", () => draw(), { passive: true });
    addEventListener("resize", later(100, () => { if (scroller.isConnected) draw(true); }));
    scroller.addEventListener("keydown", (event) => {
      const page = Math.max(1, Math.floor(scroller.clientHeight / height()) - 2);
      const to = { ArrowDown: active + 1, j: active + 1, ArrowUp: active - 1, k: active - 1, PageDown: active + page, PageUp: active - page, Home: 0, End: order.length - 1 }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("button")) return;
      if (to !== undefined && order.length) {
        event.preventDefault();
        event.stopPropagation();
        go(to);
      } else if (event.key === "Enter" && order.length && !event.target.closest("a")) {
        location.hash = link(layer.place, order[active]);
      }
    });
    body.addEventListener("click", (event) => {
      const line = event.target.closest("tr[data-place]");
      if (line && !event.target.closest("a") && !getSelection().toString()) location.hash = link(layer.place, order[Number(line.dataset.place)]);
    });
    return { element: h("div", {}, found, empty, scroller), refresh, draw: () => draw(true), order: () => order };
  }

  cratelm.layerList = { list, textsOf, columns };
})();
