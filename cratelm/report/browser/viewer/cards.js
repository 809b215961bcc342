"use strict";
/* Parts of a neuron that several pages show. */

(() => {
  const { h, smallTable } = cratelm;
  const { explanation, similar, meter, points, percent, digits, state, madeBy, count } = cratelm.text;
  const { link, titleOf } = cratelm.routes;
  const { excerptBox, excerptList, legend, scaleOf } = cratelm.excerpts;

  const protocolOf = (score) => [score.protocol, score.simulator].filter(Boolean).join(", ");

  /** The highest score among all explanations of a neuron, or null. */
  function bestScore(neuron) {
    const scores = neuron.explanations.flatMap((entry) => entry.scores.map((score) => score.correlation)).filter((score) => score !== null);
    return scores.length ? Math.max(...scores) : null;
  }

  /** Explanations in groups: nearly equal ones by the same explainer are shown together. */
  function grouped(entries) {
    const groups = [];
    for (const entry of entries) {
      const group = groups.find(([first]) => first.explainer === entry.explainer && similar(first.text, entry.text));
      if (group) group.push(entry);
      else groups.push([entry]);
    }
    return groups;
  }

  /** Every explanation with its scores and its explainer. */
  function explanations(neuron) {
    const entries = neuron.explanations.filter(({ text }) => text !== null);
    if (!entries.length) {
      const reason = neuron.explanations.flatMap(({ scores }) => scores.map((score) => score.reason)).find(Boolean);
      return h("p", { class: "missing" }, reason ? state(reason)
        : neuron.status === "not scored" ? ["Not explained yet. Run: ", h("code", {}, `cratelm interpret ${neuron.place.model.name}`)] : state(neuron.status));
    }
    return h("ul", { class: "explanations" }, grouped(entries).map((group) => {
      const [first, ...variants] = group, scores = group.flatMap((entry) => entry.scores);
      return h("li", {},
        h("p", {}, explanation(first.text)),
        h("p", { class: "by" }, madeBy(first), scores.length === 0 && `, protocol ${first.protocols.join(", ")}; not scored`),
        scores.length > 0 && h("ul", { class: "scores" }, scores.map(scoreChip)),
        group.map((entry) => judgements(neuron.judged.filter((result) => result.explainer === entry.explainer && result.sample === entry.sample && entry.protocols.includes(result.protocol)))),
        variants.length > 0 && h("details", {}, h("summary", {}, `Nearly the same for ${variants.flatMap(({ protocols }) => protocols).join(", ")}`),
          variants.map(({ text }) => h("p", {}, explanation(text)))));
    }));
  }

  /** Results of the scorers that judge explanations, with their chance level. */
  function judgements(results) {
    return results.length > 0 && h("ul", { class: "scores judged", "aria-label": "Results of other scorers" }, results.map((result) => h("li", {
      title: `${result.number} over ${count(result.items)} items by ${result.judge}; chance level ${percent(result.chance)} %${result.failed ? `; ${count(result.failed)} answers were unusable` : ""}`,
    }, result.value === null ? h("span", { class: "soft" }, result.reason || "undefined") : [meter(result.value), h("span", { class: "points" }, `${percent(result.value)} %`)],
    h("span", { class: "soft" }, `${result.scorer}, ${result.judge}`))));
  }

  /** Consistency and distinctiveness of every simulation, with their chance levels. */
  function firing(neuron) {
    const rows = neuron.explanations.flatMap(({ scores }) => scores.flatMap((score) => score.firing.map((result) => [
      protocolOf(score), result.excerpts, ...[result.consistency, result.firing, result.distinctiveness, result.relevant].map(percent),
    ])));
    return rows.length > 0 && h("details", { class: "firing" }, h("summary", {}, "Does it fire on the tokens that the explanation predicts?"),
      h("p", { class: "soft" }, "In per cent. Consistency: share of the tokens relevant to the explanation on which the neuron fires. Distinctiveness: share of the tokens on which the neuron fires that are relevant."),
      smallTable("Consistency and distinctiveness", ["Protocol", "Excerpts", "Consistency", "by chance", "Distinctiveness", "by chance"], rows, 2));
  }

  function scoreChip(score) {
    if (score.correlation === null) return h("li", { class: "soft" }, `${protocolOf(score)}: ${score.reason}`);
    const details = `R² ${digits(score.r_squared)}, absolute deviation ${digits(score.absolute_deviation)}, Spearman ${digits(score.spearman)}, AUROC ${digits(score.auroc)}; ${count(score.tokens)} tokens of ${count(score.excerpts)} excerpts`;
    return h("li", { title: details }, meter(score.correlation), h("span", { class: "points" }, points(score.correlation)),
      h("span", { class: "soft" }, protocolOf(score)), h("span", { class: "unseen" }, details));
  }

  /** The first `most` excerpts of each group of a kind, of one part or of all. */
  function excerptsOf(neuron, kind, part, most, write = undefined) {
    const scale = scaleOf(neuron.statistics), groups = neuron.excerpts.filter((group) => group.kind === kind && (part === null || group.part === part));
    return excerptList(groups.flatMap((group) => group.items.slice(0, most).map((item) => excerptBox(item, scale, write))));
  }

  /** A neuron as a column of a comparison. */
  function column(neuron) {
    const { statistics } = neuron, score = bestScore(neuron);
    return h("article", { class: "card neuron" },
      h("h2", {}, h("a", { href: link(neuron.place, neuron.index) }, titleOf(neuron.place, neuron.index))),
      h("p", { class: "big" }, score === null ? h("small", {}, state(neuron.status)) : [points(score), h("small", {}, " points, best score")]),
      explanations(neuron),
      h("p", { class: "soft" }, `Active on ${percent(statistics.density)} % of tokens; largest activation ${digits(statistics.maximum)}.`),
      legend(statistics), excerptsOf(neuron, "top", null, 3));
  }

  cratelm.cards = { explanations, judgements, firing, excerptsOf, column, bestScore };
})();
