"use strict";
/* Search where a server answers: explanations by full text, below what the index of tokens and words finds. */

(() => {
  const { h, troubleBox } = cratelm;
  const { visible, count } = cratelm.text;
  const { link, named, places } = cratelm.routes;
  const byIndex = cratelm.pages.search;

  cratelm.pages.search = async (site, query) => {
    const question = (query.get("q") ?? "").trim();
    // While the index is being made the rest of the page works.
    const shown = await byIndex(site, query).catch((error) => ({ title: `Search: ${question}`, page: h("div", {}, h("h1", {}, "Search"), troubleBox(error)) }));
    if (question) shown.page.append(await fullText(site, question));
    return shown;
  };

  async function fullText(site, question) {
    const section = h("section", { "aria-labelledby": "full-text" }, h("h2", { id: "full-text" }, "Explanations that hold these words"));
    try {
      const { found } = await cratelm.api.get(`api/search?q=${encodeURIComponent(question)}`);
      const all = places(site);
      const rows = found.map((one) => ({ ...one, place: all.find((place) => place.model.slug === one.model && place.tap.slug === one.tap && place.layer === one.layer) })).filter((one) => one.place);
      section.append(h("p", { class: "soft" }, rows.length ? `${count(rows.length)} explanations, best match first in each model.` : "None."),
        h("ul", { class: "full-text" }, rows.map((one) => h("li", {}, h("a", { href: link(one.place, one.neuron) }, named(one.place, one.neuron)),
          h("small", {}, ` ${one.explainer}, ${one.protocol}`), h("p", {}, visible(one.text))))));
    } catch (error) {
      section.append(troubleBox(error));
    }
    return section;
  }
})();
