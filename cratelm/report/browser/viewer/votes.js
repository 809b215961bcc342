"use strict";
/* A blind vote: two neurons with an explanation each, their models hidden, or one neuron that two explainers explained.
   Which explanation fits its neuron better? */

(() => {
  const { h, memory, say } = cratelm;
  const { visible, points, count } = cratelm.text;
  const { link, named, places, pathOf, locate } = cratelm.routes;

  /** @typedef {{date: string, a: string, b: string, explanations: string[], choice: "a"|"b"|"same"}} Vote */

  /** @returns {Vote[]} */
  function votes() {
    try {
      const found = JSON.parse(memory.read("votes") ?? "[]");
      return Array.isArray(found) ? found.filter((one) => one && typeof one.a === "string" && typeof one.b === "string") : [];
    } catch {
      return [];
    }
  }

  /** Where votes are kept; a server may put its own in place. */
  const keeper = {
    all: async () => votes(),
    add: async (vote) => memory.write("votes", JSON.stringify([...votes(), vote])),
    clear: async () => memory.write("votes", "[]"),
  };
  cratelm.votes = keeper;
  cratelm.blindly = { rescaled, anonymous };

  const any = (list) => list[Math.floor(Math.random() * list.length)];

  /** The models and taps that have a scored layer; controls are left out. */
  async function contestants(site) {
    const groups = new Map();
    for (const place of places(site).filter((one) => !one.model.control)) {
      const key = `${place.model.slug}/${place.tap.slug}`;
      groups.set(key, [...(groups.get(key) ?? []), place]);
    }
    return [...groups.values()];
  }

  /** A random neuron of a layer with an explanation that was scored. */
  async function drawn(place) {
    const layer = await cratelm.data.layer(place);
    const set = any(layer.sets.length ? layer.sets : [null]);
    const scored = set ? Array.from(set.correlation, (_, i) => i).filter((i) => !Number.isNaN(set.correlation[i])) : [];
    if (!scored.length) return null;
    const neuron = await cratelm.data.neuron(place, any(scored));
    const said = neuron.explanations.filter((one) => one.text !== null);
    return said.length ? { neuron, explanation: any(said) } : null;
  }

  /** Two neurons of different models where there are two, of the same layer where both have it. */
  async function pair(site) {
    const groups = await contestants(site);
    for (let attempt = 0; groups.length && attempt < 20; attempt += 1) {
      const first = any(groups), second = groups.length > 1 ? any(groups.filter((group) => group !== first)) : first;
      const place = any(first), facing = second.find((one) => one.layer === place.layer) ?? any(second);
      const both = await Promise.all([drawn(place), drawn(facing)]);
      const others = both[0]?.neuron.explanations.filter((one) => one.text !== null && one.explainer !== both[0].explanation.explainer && one.text !== both[0].explanation.text);
      if (others?.length && Math.random() < 0.5) return [both[0], { neuron: both[0].neuron, explanation: any(others) }].sort(() => Math.random() - 0.5);
      if (both.every(Boolean) && pathOf(place, both[0].neuron.index) !== pathOf(facing, both[1].neuron.index)) return both;
    }
    return null;
  }

  cratelm.pages.vote = async (site) => {
    const stage = h("div", {}), tally = h("section", { "aria-labelledby": "tally" });
    const page = h("div", {}, h("h1", {}, "Which explanation fits better?"),
      h("p", { class: "soft" }, "Two neurons, or one that two explainers explained; who is who is hidden until you have chosen. Read each explanation against excerpts it was not made from; activations and strengths are in per cent of the neuron's own largest. Keys: 1 left, 2 right, 0 no difference."),
      stage, tally);
    let open = null;

    async function next() {
      open = null;
      const both = await pair(site);
      if (!both) {
        stage.replaceChildren(h("p", { class: "missing" }, "There is nothing to vote on: no two scored neurons have an explanation. Run: ", h("code", {}, "cratelm interpret RUN")));
        return;
      }
      const cards = both.map((one, i) => blind(one, i));
      const buttons = [["a", "Left fits better", "1"], ["same", "No difference", "0"], ["b", "Right fits better", "2"]].map(([choice, text, key]) =>
        h("button", { type: "button", class: "choice", on: { click: () => choose(choice) } }, text, h("kbd", { "aria-hidden": "true" }, key)));
      const answer = h("div", { class: "answer" }, buttons);
      stage.replaceChildren(h("div", { class: "side two" }, cards), answer);
      open = { both, cards, answer };
    }

    async function choose(choice) {
      if (!open) return;
      const { both, cards, answer } = open;
      open = null;
      await cratelm.votes.add({
        date: new Date().toISOString(), a: pathOf(both[0].neuron.place, both[0].neuron.index), b: pathOf(both[1].neuron.place, both[1].neuron.index),
        explanations: both.map((one) => one.explanation.text), explainers: both.map((one) => one.explanation.explainer), choice,
      });
      cards.forEach((card, i) => {
        const { place, index } = both[i].neuron;
        card.querySelector("h2").replaceChildren(h("a", { href: link(place, index) }, named(place, index)), h("small", {}, ` ${both[i].explanation.explainer}`));
        card.append(h("p", { class: "big" }, points(cratelm.cards.best({ explanations: [both[i].explanation] })), h("small", {}, " points")));
        card.classList.toggle("won", choice === "ab"[i]);
      });
      const again = h("button", { type: "button", class: "choice", on: { click: next } }, "Next pair", h("kbd", { "aria-hidden": "true" }, "n"));
      answer.replaceChildren(again);
      again.focus();
      say("Your vote is kept. The models are shown now.");
      await count_();
    }

    async function count_() {
      tally.replaceChildren(...results(site, await cratelm.votes.all(), count_));
    }

    await Promise.all([next(), count_()]);
    return {
      title: "Vote", page,
      key: (key) => {
        const choice = { 1: "a", 2: "b", 0: "same" }[key];
        if (choice && open) choose(choice);
        else if (key === "n" && !open) next();
        else return false;
        return true;
      },
    };
  };

  const ofLargest = (share) => `${Math.round(100 * share)} %`;

  /**
   * A neuron in whole hundredths of its own largest activation: the size of its activations, and whether they go below 0,
   * would tell which model it is of.
   */
  function anonymous(neuron) {
    const most = neuron.statistics.maximum > 0 ? neuron.statistics.maximum : Infinity;
    const share = (value) => Math.max(0, Math.round((100 * value) / most) / 100);
    return {
      statistics: { maximum: 1, minimum: 0 },
      excerpts: neuron.excerpts.map((group) => ({
        ...group, items: group.items.map((item) => ({ ...item, values: Array.from(item.values, share), predicted: null })),
      })),
      // A strength is written with two digits, so it can be a little more than the largest.
      said: (text) => rescaled(text, (strength) => ofLargest(Math.min(1, strength / most))),
    };
  }

  /** Lookup's sentence, `fires on "a" (3.2); up to 0.5 on 9 more tokens; ...`, its strengths written otherwise. */
  function rescaled(text, written) {
    if (!/^fires on ".*; on nothing else$/su.test(text)) return text;
    const number = "([\\d.]+(?:e[+-]?\\d+)?)";
    return text.replace(new RegExp(`(?<=" \\()${number}(?=\\)[,;])|(?<=; up to )${number}(?= on \\d+ more token)`, "gu"), (strength) => written(Number(strength)));
  }

  /** A neuron without its name: explanation, and excerpts of the documents for scoring. */
  function blind({ neuron, explanation }, i) {
    const part = neuron.excerpts.some((group) => group.part === "score") ? "score" : null, shown = anonymous(neuron);
    const boxes = (kind, most) => cratelm.cards.excerptsOf(shown, kind, part, most, ofLargest);
    return h("article", { class: "card neuron", "aria-label": i ? "Right" : "Left" }, h("h2", {}, i ? "Right" : "Left"),
      h("p", { class: "said-of" }, visible(shown.said(explanation.text))),
      cratelm.excerpts.legend(shown.statistics, ofLargest, "of its own largest activation; a token without colour is 0 or below"),
      boxes("top", 3), h("h3", {}, "Random"), boxes("random", 2));
  }

  function* results(site, all, changed) {
    const { shared } = cratelm.votes;
    yield h("h2", { id: "tally" }, shared ? "Votes on this server" : "Votes in this browser");
    if (!shared && !memory.works) yield h("p", { class: "missing" }, "This browser keeps nothing for this page: votes are lost when it is closed. Export them before.");
    if (!all.length) {
      yield h("p", { class: "soft" }, "None yet.");
      return;
    }
    const wins = new Map();
    const groupOf = (path) => {
      try {
        const { place } = locate(site, path.split("/"));
        return `${place.model.title}${place.tap.name === "neurons" ? "" : `, ${place.tap.name}`}`;
      } catch {
        return "models that are not here";
      }
    };
    for (const vote of all) {
      for (const side of ["a", "b"]) {
        const name = vote.a === vote.b ? `explainer ${vote.explainers?.[side === "a" ? 0 : 1]}` : groupOf(vote[side]), row = wins.get(name) ?? { better: 0, worse: 0, same: 0 };
        row[vote.choice === "same" ? "same" : vote.choice === side ? "better" : "worse"] += 1;
        wins.set(name, row);
      }
    }
    yield h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["Model", "Better", "Worse", "No difference"].map((text, i) => h("th", { scope: "col", class: i ? "n" : null }, text)))),
      h("tbody", {}, [...wins].map(([name, row]) => h("tr", {}, h("th", { scope: "row" }, name), [row.better, row.worse, row.same].map((n) => h("td", { class: "n" }, count(n))))))));
    yield h("p", { class: "gets" },
      cratelm.downloads.getButton(`Export ${count(all.length)} as JSON`, "votes.json", () => cratelm.downloads.json({ format_version: 1, votes: all }), "application/json"),
      !shared && h("button", { type: "button", class: "get", on: { click: async () => { if (confirm("Forget all votes in this browser?")) { await cratelm.votes.clear(); changed(); } } } }, "Forget them"));
  }
})();
