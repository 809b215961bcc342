"use strict";
/* Search the tokens that neurons fire on and their explanations: an index of prefixes, and full text where a server answers. */

(() => {
  const { h, announce, button, errorBox, section } = cratelm;
  const { points, chip, explanation, count } = cratelm.text;
  const { link, titleOf, findPlace } = cratelm.routes;
  const NEURON_BITS = 20, PAGE = 25;
  /** Chunks of the index that are read for one word. */
  const MOST_CHUNKS = 7;

  /** The words of a question as the index stores them; words in quotes keep their spaces. */
  const wordsOf = (question) => Array.from(question.matchAll(/"([^"]+)"|(\S+)/g), ([, quoted, plain]) => term(quoted ?? plain)).filter(Boolean);

  function term(text) {
    const shown = text.replace(/^ +| +$/g, "") || "␣".repeat(text.length);
    return Array.from(shown.replaceAll("\r", "␍").replaceAll("\n", "↵").replaceAll("\t", "⇥").toLowerCase()).slice(0, 40).join("");
  }

  /**
   * Neurons of all terms that begin with a word. `ranks` maps an entry to its rank, `isPart` says that there may be more.
   * @returns {Promise<{ranks: Map<number, number>, isPart: boolean}>}
   */
  async function beginningWith(first, word) {
    const start = Math.max(0, first.findLastIndex((begin) => begin <= word));
    let stop = start + 1;
    while (stop < first.length && first[stop].startsWith(word)) stop += 1;
    const ranks = new Map(), numbers = Array.from({ length: Math.min(stop - start, MOST_CHUNKS) }, (_, i) => start + i);
    let isPart = stop - start > MOST_CHUNKS;
    for (const chunk of await Promise.all(numbers.map((number) => cratelm.data.chunk(`search/${number}`)))) {
      chunk.terms.forEach((text, i) => {
        if (!text.startsWith(word)) return;
        const neurons = cratelm.data.unpack(chunk.neurons[i]);
        isPart ||= neurons.length < chunk.totals[i];
        // Neurons of the word itself rank before those of longer terms.
        neurons.forEach((entry, rank) => ranks.set(entry, Math.min(ranks.get(entry) ?? Infinity, rank + (text === word ? 0 : 1e4))));
      });
    }
    return { ranks, isPart };
  }

  /** Neurons that match every word, best match first. */
  async function matches(site, words) {
    const { first, places } = await cratelm.data.chunk("search/directory");
    if (!words.length || !first.length) return { results: [], isPart: false };
    const each = await Promise.all(words.map((word) => beginningWith(first, word)));
    const rank = (entry) => each.reduce((sum, { ranks }) => sum + ranks.get(entry), 0);
    const results = [...each[0].ranks.keys()].filter((entry) => each.every(({ ranks }) => ranks.has(entry))).sort((a, b) => rank(a) - rank(b))
      .map((entry) => ({ place: findPlace(site, places[Math.floor(entry / 2 ** NEURON_BITS)]), index: entry % 2 ** NEURON_BITS }));
    return { results: results.filter(({ place }) => place), isPart: each.some((word) => word.isPart) };
  }

  cratelm.pages.search = async (site, query) => {
    const question = (query.get("q") ?? "").trim(), title = question ? `Search: ${question}` : "Search";
    document.getElementById("query").value = question;
    const parts = question ? [
      // An index that a server is still building does not hide the full text results.
      await indexResults(site, question, query.get("in") ?? "").catch(errorBox), cratelm.api && await fullText(site, question),
    ] : h("p", {}, "Type a token or a word of an explanation above. Every word must match the beginning of a token or word; quotes keep spaces.");
    return { title, page: h("div", {}, h("h1", {}, question ? ["Search: ", h("span", { class: "asked" }, question)] : title), parts) };
  };

  async function indexResults(site, question, only) {
    const words = wordsOf(question), { results, isPart } = await matches(site, words);
    const shown = results.filter(({ place }) => !only || place.model.slug === only);
    const total = `${isPart ? "at least " : ""}${count(shown.length)} neuron${shown.length === 1 ? "" : "s"}`;
    const list = h("ol", { class: "results" }), more = button("Show more", showMore);
    let next = 0;
    async function showMore() {
      const page = shown.slice(next, next + PAGE);
      next += page.length;
      more.hidden = next >= shown.length;
      list.append(...await Promise.all(page.map((result) => resultItem(result, words))));
      announce(`${next} of ${total} shown.`);
    }
    await showMore();
    return [h("p", { class: "soft", role: "status" }, shown.length ? total : "No neuron has a token or an explanation with these words."),
      modelTabs(site, results, only, question), list, more];
  }

  /** Links that limit the results to one model; none unless two models have results. */
  function modelTabs(site, results, only, question) {
    const models = site.models.filter((model) => results.some(({ place }) => place.model === model));
    if (models.length < 2) return null;
    const address = (slug) => `#/search?q=${encodeURIComponent(question)}${slug ? `&in=${slug}` : ""}`;
    return h("nav", { class: "tabs", "aria-label": "Models" }, [{ slug: "", title: "All models" }, ...models].map(({ slug, title }) =>
      h("a", { href: address(slug), "aria-current": slug === only ? "true" : null }, title)));
  }

  async function resultItem({ place, index }, words) {
    const layer = await cratelm.data.layer(place);
    const { tokens, texts } = await cratelm.data.texts(place, index, layer.textsEach);
    const isMatch = (token) => words.some((word) => term(token).startsWith(word));
    return h("li", {}, h("a", { href: link(place, index) }, titleOf(place, index)),
      h("span", { class: "points" }, layer.sets.length ? points(layer.sets[0].correlation[index]) : ""),
      h("p", { class: "soft" }, "Strongest tokens: ", tokens.map((token) => chip(token, isMatch(token) ? { class: "chip hit" } : {}))),
      texts.slice(0, 2).filter(({ text }, i) => !i || !cratelm.text.similar(text, texts[0].text)).map(({ text }) => h("p", { class: "soft" }, "Explanation: ", explanation(text, { brief: true }))));
  }

  /** Explanations that contain the words, from the server. */
  async function fullText(site, question) {
    const rows = await cratelm.api.get(`api/search?q=${encodeURIComponent(question)}`)
      .then(({ found }) => found.map((row) => ({ ...row, place: findPlace(site, row) })).filter(({ place }) => place), (error) => error);
    return section("full-text", "Explanations that contain these words", rows instanceof Error ? errorBox(rows) : [
      h("p", { class: "soft" }, rows.length ? `${count(rows.length)} explanations, best match first in each model.` : "None."),
      h("ul", { class: "full-text" }, rows.map((row) => h("li", {}, h("a", { href: link(row.place, row.neuron) }, titleOf(row.place, row.neuron)),
        h("small", {}, ` ${row.explainer}, ${row.protocol}`), h("p", {}, explanation(row.text, { brief: true })))))]);
  }
})();
