"use strict";
/* Search over the tokens that neurons fire on and over explanations, by an index of prefixes in chunks. */

(() => {
  const { h, say } = cratelm;
  const { points, chip, visible, count } = cratelm.text;
  const { link, named } = cratelm.routes;
  const NEURON_BITS = 20, PAGE = 25;

  /** The words of a question as the index knows them; in quotes, spaces and all. */
  function words(question) {
    return Array.from(question.matchAll(/"([^"]+)"|(\S+)/g), ([, quoted, plain]) => term(quoted ?? plain)).filter(Boolean);
  }

  function term(text) {
    const shown = text.replace(/^ +| +$/g, "") || "␣".repeat(text.length);
    return Array.from(shown.replaceAll("\r", "␍").replaceAll("\n", "↵").replaceAll("\t", "⇥").toLowerCase()).slice(0, 40).join("");
  }

  /** Which chunk may hold the first term that is not before this one. */
  function chunkOf(first, word) {
    let low = 0, high = first.length - 1;
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (first[middle] <= word) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  /**
   * Neurons of all terms that begin with a word; those of the word itself come first.
   * @returns {Promise<{neurons: Map<number, number>, cut: boolean}>} entry -> rank
   */
  async function beginningWith(directory, word) {
    const neurons = new Map();
    const numbers = [];
    let cut = false;
    for (let number = chunkOf(directory.first, word); number < directory.first.length; number += 1) {
      if (numbers.length && !directory.first[number].startsWith(word)) break;
      numbers.push(number);
      if (numbers.length > 6) { cut = true; break; }
    }
    for (const part of await Promise.all(numbers.map((number) => cratelm.data.chunk(`search/${number}`)))) {
      part.terms.forEach((one, i) => {
        if (!one.startsWith(word)) return;
        const found = cratelm.data.unpack(part.neurons[i]);
        cut ||= found.length < part.totals[i];
        // The word itself before longer ones; among those, the best match of each term first.
        found.forEach((entry, rank) => neurons.set(entry, Math.min(neurons.get(entry) ?? Infinity, rank + (one === word ? 0 : 1e4))));
      });
    }
    return { neurons, cut };
  }

  /**
   * Neurons that match every word, best match first; a server's script may put its own search in place of `cratelm.search`.
   * @returns {Promise<{found: {place: {model: string, tap: string, layer: number}, index: number}[], cut: boolean}>}
   */
  async function matches(question) {
    const asked = words(question);
    const directory = await cratelm.data.chunk("search/directory");
    if (!asked.length || !directory.first.length) return { found: [], cut: false };
    const each = await Promise.all(asked.map((word) => beginningWith(directory, word)));
    const [shortest, ...others] = each.toSorted((a, b) => a.neurons.size - b.neurons.size);
    const found = [...shortest.neurons].filter(([entry]) => others.every(({ neurons }) => neurons.has(entry)))
      .map(([entry, rank]) => [entry, rank + others.reduce((sum, { neurons }) => sum + neurons.get(entry), 0)])
      .sort((a, b) => a[1] - b[1])
      .map(([entry]) => ({ place: directory.places[Math.floor(entry / 2 ** NEURON_BITS)], index: entry % 2 ** NEURON_BITS }));
    return { found, cut: each.some((one) => one.cut) };
  }

  cratelm.search = matches;

  cratelm.pages.search = async (site, query) => {
    const question = (query.get("q") ?? "").trim(), only = query.get("in") ?? "";
    document.getElementById("query").value = question;
    const page = h("div", {}, h("h1", {}, question ? ["Search: ", h("span", { class: "asked" }, visible(question))] : "Search"));
    if (!question) {
      page.append(h("p", {}, "Type a token or a word of an explanation above. All words must match, each from its beginning; quotes keep spaces together."));
      return { title: "Search", page };
    }
    const { found, cut } = await cratelm.search(question), asked = words(question);
    const all = cratelm.routes.places(site);
    const located = found.map((one) => ({ ...one, place: all.find((place) => place.model.slug === one.place.model && place.tap.slug === one.place.tap && place.layer === one.place.layer) }))
      .filter((one) => one.place);
    const kept = located.filter((one) => !only || one.place.model.slug === only);
    const total = `${cut ? "at least " : ""}${count(kept.length)} neuron${kept.length === 1 ? "" : "s"}`;
    page.append(h("p", { class: "soft", role: "status" }, kept.length ? total : `No neuron fires most on a token like this, and no explanation says it.`), models(site, located, only, question));
    const results = h("ol", { class: "results" });
    const more = h("button", { type: "button", class: "get" }, "Show more");
    let shown = 0;
    async function show() {
      const part = kept.slice(shown, shown + PAGE);
      shown += part.length;
      more.hidden = shown >= kept.length;
      results.append(...await Promise.all(part.map((one) => result(one, asked))));
      say(`${shown} of ${total} shown.`);
    }
    more.addEventListener("click", show);
    page.append(results, more);
    await show();
    return { title: `Search: ${question}`, page };
  };

  /** A token, marked where it is one that was asked for. */
  function shownToken(token, asked) {
    return chip(token, asked.some((word) => term(token).startsWith(word)) ? { class: "chip hit" } : {});
  }

  /** Links that keep the results of one model only. */
  function models(site, located, only, question) {
    const there = site.models.filter((model) => located.some((one) => one.place.model === model));
    if (there.length < 2) return null;
    const address = (slug) => `#/search?q=${encodeURIComponent(question)}${slug ? `&in=${slug}` : ""}`;
    return h("nav", { class: "tabs", "aria-label": "Models" },
      [["", "All models"], ...there.map((model) => [model.slug, model.title])].map(([slug, title]) =>
        h("a", { href: address(slug), "aria-current": slug === only ? "true" : null }, title)));
  }

  async function result({ place, index }, asked) {
    const layer = await cratelm.data.layer(place);
    const { tokens, texts } = await cratelm.data.texts(place, index, layer.textsEach);
    return h("li", {}, h("a", { href: link(place, index) }, named(place, index)),
      h("span", { class: "points" }, layer.sets.length ? points(layer.sets[0].correlation[index]) : ""),
      h("p", {}, tokens.map((token) => shownToken(token, asked))),
      texts.slice(0, 2).map(({ text }) => h("p", { class: "soft" }, visible(text))));
  }
})();
