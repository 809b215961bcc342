"use strict";
/* A blind vote between two explanations: of two neurons whose models are hidden, or of one neuron by two explainers. */

(() => {
  const { h, storage, announce, button, smallTable } = cratelm;
  const { explanation, points, count } = cratelm.text;
  const { link, titleOf, places, pathOf, locate } = cratelm.routes;
  const SIDES = ["A", "B"];

  /** @typedef {{date: string, a: string, b: string, explanations: string[], explainers: string[], choice: "a"|"b"|"same"}} Vote */

  /** The votes in this browser. @returns {Vote[]} */
  function storedVotes() {
    try {
      return JSON.parse(storage.getItem("cratelm.votes") ?? "[]").filter((vote) => typeof vote?.a === "string" && typeof vote.b === "string");
    } catch {
      return [];
    }
  }

  /** Where votes are stored; the pages of a server replace it. */
  cratelm.votes = {
    shared: false,
    all: async () => storedVotes(),
    add: async (vote) => storage.setItem("cratelm.votes", JSON.stringify([...storedVotes(), vote])),
    clear: async () => storage.setItem("cratelm.votes", "[]"),
  };

  const pick = (list) => list[Math.floor(Math.random() * list.length)];
  const explained = (neuron) => neuron.explanations.filter(({ text }) => text !== null);

  /** A random scored neuron of a layer with one of its explanations, or null. */
  async function drawCandidate(place) {
    const { sets } = await cratelm.data.layer(place);
    const scored = sets.length ? Array.from(pick(sets).correlation, (score, i) => (Number.isNaN(score) ? -1 : i)).filter((i) => i >= 0) : [];
    const neuron = scored.length ? await cratelm.data.neuron(place, pick(scored)) : null;
    return neuron && explained(neuron).length ? { neuron, explanation: pick(explained(neuron)) } : null;
  }

  /** Two candidates: of different models if there are two, and of the same layer if both have it. Controls are left out. */
  async function drawPair(site) {
    const groups = Object.values(Object.groupBy(places(site).filter(({ model }) => !model.control), ({ model, tap }) => `${model.slug}/${tap.slug}`));
    for (let attempt = 0; groups.length && attempt < 20; attempt += 1) {
      const group = pick(groups), otherGroup = groups.length > 1 ? pick(groups.filter((other) => other !== group)) : group;
      const place = pick(group), otherPlace = otherGroup.find(({ layer }) => layer === place.layer) ?? pick(otherGroup);
      const [first, second] = await Promise.all([drawCandidate(place), drawCandidate(otherPlace)]);
      const others = first ? explained(first.neuron).filter(({ explainer, text }) => explainer !== first.explanation.explainer && text !== first.explanation.text) : [];
      if (others.length && Math.random() < 0.5) return [first, { neuron: first.neuron, explanation: pick(others) }].sort(() => Math.random() - 0.5);
      if (first && second && pathOf(place, first.neuron.index) !== pathOf(otherPlace, second.neuron.index)) return [first, second];
    }
    return null;
  }

  cratelm.pages.vote = async (site) => {
    const stage = h("div", {}), tally = h("section", { "aria-labelledby": "tally" });
    const page = h("div", {}, h("h1", {}, "Which explanation fits better?"),
      h("p", { class: "soft" }, "Two neurons, or one neuron explained by two explainers. Their names are shown after your vote. Compare each explanation with excerpts it was not made from; activations are in per cent of the neuron's largest. Keys: 1 for A, 2 for B, 0 for no difference."),
      stage, tally);
    /** The pair that is voted on; null after the vote. */
    let ballot = null;

    async function next() {
      ballot = null;
      const pair = await drawPair(site);
      if (!pair) {
        stage.replaceChildren(h("p", { class: "missing" }, "Nothing to vote on: no two scored neurons have an explanation. Run: ", h("code", {}, "cratelm interpret RUN")));
        return;
      }
      const cards = pair.map(blindCard);
      const buttons = [["a", "A is better", "1"], ["same", "No difference", "0"], ["b", "B is better", "2"]].map(([choice, text, key]) =>
        button([text, h("kbd", { "aria-hidden": "true" }, key)], () => choose(choice), { class: "choice" }));
      const answer = h("div", { class: "answer" }, buttons);
      stage.replaceChildren(h("div", { class: "side two" }, cards), answer);
      ballot = { pair, cards, answer };
    }

    async function choose(choice) {
      const { pair, cards, answer } = ballot;
      ballot = null;
      const [a, b] = pair.map(({ neuron }) => pathOf(neuron.place, neuron.index));
      await cratelm.votes.add({
        date: new Date().toISOString(), a, b, explanations: pair.map(({ explanation: { text } }) => text), explainers: pair.map(({ explanation: { explainer } }) => explainer), choice,
      });
      pair.forEach(({ neuron: { place, index }, explanation: entry }, i) => {
        cards[i].querySelector("h2").replaceChildren(h("a", { href: link(place, index) }, titleOf(place, index)), h("small", {}, ` ${entry.explainer}`));
        cards[i].append(h("p", { class: "big" }, points(cratelm.cards.bestScore({ explanations: [entry] })), h("small", {}, " points")));
        cards[i].classList.toggle("won", choice === "ab"[i]);
      });
      const again = button(["Next pair", h("kbd", { "aria-hidden": "true" }, "n")], next, { class: "choice" });
      answer.replaceChildren(again);
      again.focus();
      announce("Your vote is stored. The models are shown now.");
      await showTally();
    }

    const showTally = async () => tally.replaceChildren(...tallyOf(site, await cratelm.votes.all(), showTally));

    await Promise.all([next(), showTally()]);
    return {
      title: "Vote", page,
      key: (key) => {
        const choice = { 1: "a", 2: "b", 0: "same" }[key];
        if (choice && ballot) choose(choice);
        else if (key === "n" && !ballot) next();
        else return false;
        return true;
      },
    };
  };

  const ofLargest = (share) => `${Math.round(100 * share)} %`;

  /**
   * A neuron in hundredths of its largest activation, negative activations as 0: raw values would reveal the model.
   */
  function anonymous(neuron) {
    const largest = neuron.statistics.maximum > 0 ? neuron.statistics.maximum : Infinity;
    const share = (value) => Math.max(0, Math.round((100 * value) / largest) / 100);
    return {
      statistics: { maximum: 1, minimum: 0 },
      excerpts: neuron.excerpts.map((group) => ({
        ...group, items: group.items.map((item) => ({ ...item, values: Array.from(item.values, share), predicted: null })),
      })),
      // Strengths in explanations have two digits, so a rounded one may exceed the largest activation.
      write: (strength) => ofLargest(Math.min(1, strength / largest)),
    };
  }
  cratelm.blindly = { anonymous };

  /** A neuron without its name: its explanation, and excerpts of the documents for scoring. */
  function blindCard({ neuron, explanation: { text } }, i) {
    const part = neuron.excerpts.some((group) => group.part === "score") ? "score" : null, { write, ...shown } = anonymous(neuron);
    return h("article", { class: "card neuron", "aria-label": SIDES[i] }, h("h2", {}, SIDES[i]),
      h("p", {}, explanation(text, { write })),
      cratelm.excerpts.legend(shown.statistics, ofLargest, "of its largest activation; a token without colour is 0 or below"),
      cratelm.cards.excerptsOf(shown, "top", part, 3, ofLargest), h("h3", {}, "Random"), cratelm.cards.excerptsOf(shown, "random", part, 2, ofLargest));
  }

  /** What a vote for a side counts for: the model and tap, or the explainer if both sides are the same neuron. */
  function groupOf(site, vote, side) {
    if (vote.a === vote.b) return `explainer ${vote.explainers?.[side]}`;
    try {
      const { place } = locate(site, [vote.a, vote.b][side].split("/"));
      return `${place.model.title}${place.tap.name === "neurons" ? "" : `, ${place.tap.name}`}`;
    } catch {
      return "models of other sites";
    }
  }

  function* tallyOf(site, votes, changed) {
    const { shared, clear } = cratelm.votes;
    yield h("h2", { id: "tally" }, shared ? "Votes on this server" : "Votes in this browser");
    if (!shared && storage.isTemporary) yield h("p", { class: "missing" }, "This browser stores nothing for this page: votes are lost when you close it. Export them first.");
    if (!votes.length) {
      yield h("p", { class: "soft" }, "None yet.");
      return;
    }
    const counts = new Map();
    for (const vote of votes) {
      ["a", "b"].forEach((letter, side) => {
        const group = groupOf(site, vote, side), row = counts.get(group) ?? [0, 0, 0];
        row[vote.choice === "same" ? 2 : vote.choice === letter ? 0 : 1] += 1;
        counts.set(group, row);
      });
    }
    yield smallTable("Votes", ["Model", "Better", "Worse", "No difference"], Array.from(counts, ([group, row]) => [group, ...row.map(count)]));
    yield h("p", { class: "gets" },
      cratelm.downloads.jsonButton("votes", () => ({ format_version: 1, votes }), `Export ${count(votes.length)} as JSON`),
      !shared && button("Delete them", async () => {
        if (!confirm("Delete all votes in this browser?")) return;
        await clear();
        changed();
      }));
  }
})();
