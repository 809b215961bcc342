"use strict";
/* Tables of the report: sorted by their heads, saved as CSV. The list of a layer's neurons is in layer_list.js. */

(() => {
  const { h, announce, newId } = cratelm;

  /** Rows about a control have a fainter colour. */
  const CONTROL = /(^|, )(random-init|shuffled)$/;
  const UNITS = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15, E: 1e18 };

  /** What a cell sorts by: its first number, or its text. */
  function sortKey(text, isNumber) {
    if (!isNumber) return text.toLowerCase();
    const plain = text.replaceAll("\u2212", "-").replaceAll(",", "");
    const match = /-?\d+(?:\.\d+)?(?:e[+-]?\d+)?/.exec(plain);
    return match ? Number(match[0]) * (UNITS[plain[match.index + match[0].length]] ?? 1) : Number.NEGATIVE_INFINITY;
  }

  /**
   * A table of the report.
   * @param {{name: string, caption: string, columns: {title: string, unit: string, number: boolean}[], rows: string[][], notes: string[], csv: string}} table
   */
  function table({ name, caption, columns, rows, notes, csv }) {
    const body = h("tbody", {}), heads = columns.map((column, i) => head(column, () => sort(i)));
    let sorted = -1, descending = false;

    function draw(shown) {
      const cell = (text, i) => (i === 0 ? h("th", { class: columns[i].number ? "n" : null, scope: "row" }, text)
        : h("td", { class: columns[i].number ? "n" : null }, withInterval(text)));
      body.replaceChildren(...shown.map((row) => h("tr", { class: row.some((text) => CONTROL.test(text)) ? "quiet" : null }, row.map(cell))));
    }

    function sort(column) {
      descending = sorted === column ? !descending : columns[column].number;
      sorted = column;
      const keyed = rows.map((row) => [sortKey(row[column], columns[column].number), row]);
      keyed.sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0) * (descending ? -1 : 1));
      draw(keyed.map(([, row]) => row));
      markSorted(heads, column, descending);
      announce(`Sorted by ${columns[column].title}, ${descending ? "largest" : "smallest"} first.`);
    }

    draw(rows);
    // The caption is outside of the scrolling part, so that the button of a wide table stays in sight.
    const id = newId("caption");
    return h("section", { class: "table" },
      h("div", { class: "caption" }, h("b", { id }, caption), cratelm.downloads.csvButton(name, () => csv, "CSV", { "aria-describedby": id })),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
        h("table", { "aria-labelledby": id }, h("thead", {}, h("tr", {}, heads)), body)),
      notes.map((note) => h("p", { class: "note" }, note)));
  }

  /** The head of a column that sorts. */
  function head(column, sort) {
    return h("th", { scope: "col", class: column.number ? "n" : null },
      h("button", { type: "button", class: "sort", on: { click: sort } }, column.title, column.unit && h("small", {}, column.unit)));
  }

  function markSorted(heads, column, descending) {
    heads.forEach((element, i) => {
      if (i === column) element.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else element.removeAttribute("aria-sort");
    });
  }

  /** `61.9 [60.5, 63.2]`, with a small interval. */
  function withInterval(text) {
    const match = /^(\S+) (\[.*\])$/.exec(text);
    return match ? [match[1], h("small", { class: "interval" }, match[2])] : text;
  }

  cratelm.table = { table, head, markSorted };
})();
