"use strict";
/* Parts of a neuron's page that other pages show too. */

(() => {
  const { h } = cratelm;
  const { visible, points, percent, digits, state, byWhom, count } = cratelm.text;
  const { link, named } = cratelm.routes;

  /** The best score of a neuron that any explanation got, or null. */
  function best(neuron) {
    const found = neuron.explanations.flatMap((one) => one.scores.map((score) => score.correlation)).filter((one) => one !== null);
    return found.length ? Math.max(...found) : null;
  }

  /** Every explanation with its scores and by whom and how it was made. */
  function explanations(neuron) {
    const said = neuron.explanations.filter((one) => one.text !== null);
    if (!said.length) {
      const reasons = neuron.explanations.flatMap((one) => one.scores.map((score) => score.reason)).filter(Boolean);
      return h("p", { class: "missing" }, reasons.length ? state(reasons[0])
        : neuron.status === "not scored" ? ["Not explained yet. Run: ", h("code", {}, `cratelm interpret ${neuron.place.model.name}`)] : state(neuron.status));
    }
    return h("ul", { class: "explanations" }, said.map((one) => h("li", {},
      h("p", { class: "said-of" }, visible(one.text)),
      h("p", { class: "by" }, byWhom(one), one.scores.length ? "" : `, from ${one.protocols.join(", ")}; not scored`),
      one.scores.length > 0 && h("ul", { class: "scores" }, one.scores.map((score) => scoreChip(score))),
      judgements(neuron.judged.filter((found) => found.explainer === one.explainer && found.sample === one.sample && one.protocols.includes(found.protocol))))));
  }

  /** What judges found, against what guessing gives. */
  function judgements(found) {
    return found.length > 0 && h("ul", { class: "scores judged", "aria-label": "Judged" }, found.map((one) => h("li", {
      title: `${one.number} over ${count(one.items)} items by ${one.judge}; guessing gives ${percent(one.chance)} %${one.failed ? `; ${count(one.failed)} answers could not be read` : ""}`,
    }, one.value === null ? h("span", { class: "none" }, one.reason || "undefined") : [meter(one.value), h("span", { class: "points" }, `${percent(one.value)} %`)],
    h("span", { class: "proto" }, `${one.scorer}, ${one.judge}`))));
  }

  /** Consistency and distinctiveness of every simulation, beside what a neuron that fires anywhere would have. */
  function firing(neuron) {
    const rows = neuron.explanations.flatMap((one) => one.scores.flatMap((score) => score.firing.map((own) => [
      `${score.protocol}${score.simulator ? `, ${score.simulator}` : ""}`, own.excerpts, own.consistency, own.firing, own.distinctiveness, own.relevant,
    ])));
    const heads = ["Protocol", "Excerpts", "Consistent", "by chance", "Distinctive", "by chance"];
    return rows.length > 0 && h("details", { class: "firing" }, h("summary", {}, "Does it fire on what the explanation predicts?"),
      h("p", { class: "soft" }, "In per cent. Consistent: share of the tokens that the explanation calls relevant on which it fires. Distinctive: share of the tokens on which it fires that are relevant."),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Consistency and distinctiveness" }, h("table", {},
        h("thead", {}, h("tr", {}, heads.map((text, i) => h("th", { scope: "col", class: i > 1 ? "n" : null }, text)))),
        h("tbody", {}, rows.map((row) => h("tr", {}, row.map((value, i) => (i > 1 ? h("td", { class: "n" }, percent(value)) : i ? h("td", {}, value) : h("th", { scope: "row" }, value)))))))));
  }

  function scoreChip(score) {
    const protocol = `${score.protocol}${score.simulator ? `, ${score.simulator}` : ""}`;
    if (score.correlation === null) return h("li", {}, h("span", { class: "proto" }, protocol), h("span", { class: "none" }, score.reason));
    const more = `R² ${digits(score.r_squared)}, absolute deviation ${digits(score.absolute_deviation)}, Spearman ${digits(score.spearman)}, AUROC ${digits(score.auroc)}; ${count(score.tokens)} tokens of ${count(score.excerpts)} excerpts`;
    return h("li", { title: more }, meter(score.correlation), h("span", { class: "points" }, points(score.correlation)),
      h("span", { class: "proto" }, protocol), h("span", { class: "unseen" }, more));
  }

  /** A small bar of a correlation. */
  function meter(correlation) {
    const inner = h("i", {});
    inner.style.width = `${Math.max(0, 100 * correlation)}%`;
    return h("span", { class: "meter", "aria-hidden": "true" }, inner);
  }

  /** Excerpts of some kinds and halves, the first so many of each. */
  function excerptsOf(neuron, kind, part, most = Infinity, tell = undefined) {
    const scale = cratelm.excerpts.scaleOf(neuron.statistics);
    return neuron.excerpts.filter((group) => group.kind === kind && (part === null || group.part === part))
      .flatMap((group) => group.items.slice(0, most)).map((item) => cratelm.excerpts.excerptBox(item, scale, tell));
  }

  /** One neuron in a column beside others. */
  function column(neuron, attributes = {}, head = null) {
    const { statistics } = neuron, score = best(neuron);
    return h("article", { class: "card neuron", ...attributes },
      head ?? h("h2", {}, h("a", { href: link(neuron.place, neuron.index) }, named(neuron.place, neuron.index))),
      h("p", { class: "big" }, score === null ? h("small", {}, state(neuron.status)) : [points(score), h("small", {}, " points at best")]),
      explanations(neuron),
      h("p", { class: "soft" }, `Active on ${percent(statistics.density)} % of tokens, at most ${digits(statistics.maximum)}.`),
      cratelm.excerpts.legend(statistics), excerptsOf(neuron, "top", null, 3));
  }

  cratelm.cards = { explanations, judgements, firing, excerptsOf, column, best, meter };
})();
