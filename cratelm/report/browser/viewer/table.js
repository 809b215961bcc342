"use strict";
/* Short tables: sortable by their heads, with a button for CSV. Long lists are in layer_list.js. */

(() => {
  const { h, say, fresh } = cratelm;
  const { download } = cratelm.downloads;

  /** A row about a control is set in a fainter colour. */
  const CONTROL = /(^|, )(random-init|shuffled)$/;

  /** What a written cell sorts by: its first number, or its text. */
  function sortKey(text, isNumber) {
    if (!isNumber) return text.toLowerCase();
    const plain = text.replaceAll("\u2212", "-").replaceAll(",", "");
    const match = /-?\d+(?:\.\d+)?(?:e[+-]?\d+)?/.exec(plain);
    if (!match) return Number.NEGATIVE_INFINITY;
    const unit = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15, E: 1e18 }[plain[match.index + match[0].length]] ?? 1;
    return Number(match[0]) * unit;
  }

  /**
   * A table of the report.
   * @param {{name: string, caption: string, columns: {title: string, unit: string, number: boolean}[], rows: string[][], notes: string[], csv: string}} table
   */
  function table(table) {
    const body = h("tbody", {});
    const heads = table.columns.map((column, i) => head(column, () => sort(i)));
    let order = { column: -1, down: false };

    function draw(rows) {
      body.replaceChildren(...rows.map((row) => h("tr", { class: row.some((text) => CONTROL.test(text)) ? "quiet" : null }, row.map((text, i) => {
        const attributes = { class: table.columns[i].number ? "n" : null };
        return i === 0 ? h("th", { ...attributes, scope: "row" }, text) : h("td", attributes, ...interval(text));
      }))));
    }

    function sort(column) {
      const first = order.column === column ? !order.down : table.columns[column].number;
      order = { column, down: first };
      const keyed = table.rows.map((row) => [sortKey(row[column], table.columns[column].number), row]);
      keyed.sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0) * (order.down ? -1 : 1));
      draw(keyed.map(([, row]) => row));
      heads.forEach((one, i) => {
        if (i === column) one.setAttribute("aria-sort", order.down ? "descending" : "ascending");
        else one.removeAttribute("aria-sort");
      });
      say(`Sorted by ${table.columns[column].title}, ${order.down ? "largest" : "smallest"} first.`);
    }

    draw(table.rows);
    // The caption stands outside of what scrolls: inside, the button would lie beyond the right edge of a wide table.
    const caption = fresh("caption");
    return h("section", { class: "table" },
      h("div", { class: "caption" }, h("b", { id: caption }, table.caption),
        h("button", { type: "button", class: "get", "aria-describedby": caption, on: { click: () => download(`${table.name}.csv`, table.csv, "text/csv") } }, "CSV")),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": table.caption },
        h("table", { "aria-labelledby": caption }, h("thead", {}, h("tr", {}, heads)), body)),
      table.notes.map((note) => h("p", { class: "note" }, note)));
  }

  /** The head of a column that sorts. */
  function head(column, sort) {
    return h("th", { scope: "col", class: column.number ? "n" : null },
      h("button", { type: "button", class: "sort", on: { click: sort } }, column.title, column.unit && h("small", {}, column.unit)));
  }

  /** `61.9 [60.5, 63.2]`: the interval in small. */
  function interval(text) {
    const match = /^(\S+) (\[.*\])$/.exec(text);
    return match ? [match[1], h("small", { class: "interval" }, match[2])] : [text];
  }

  cratelm.table = { table, head };
})();
