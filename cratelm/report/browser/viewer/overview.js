"use strict";
/* The first page: which models there are, the report's sentences, tables and figures. */

(() => {
  const { h, troubleBox } = cratelm;
  const { count } = cratelm.text;
  const { link } = cratelm.routes;

  cratelm.pages.overview = async (site) => {
    const report = h("div", {}, h("p", { class: "loading" }, "Loading the report"));
    const page = h("div", {},
      h("p", { class: "eyebrow" }, "How interpretable are the neurons?"),
      h("h1", {}, listed(site.models.filter((model) => !model.control).map((model) => model.title)) || site.models[0].title),
      h("div", { class: "said", data: { part: "sentences" } }),
      h("section", { "aria-labelledby": "models" }, h("h2", { id: "models" }, "Neurons to look at"), models(site)),
      report);
    try {
      const show = (found) => {
        page.querySelector("[data-part=sentences]").replaceChildren(
          ...found.sentences.map((text, i) => h("p", { class: i ? "" : "lead" }, text)),
          ...[found.making, found.problem].filter(Boolean).map((text) => h("p", { class: "loading", role: "status" }, text)));
        report.replaceChildren(...reported(found, site));
      };
      const found = await cratelm.data.overview();
      show(found);
      if (found.making) renew(page, show, found);
    } catch (error) {
      report.replaceChildren(troubleBox(error));
    }
    return { title: "Overview", page };
  };

  /** Ask a server that is making the report anew, less and less often, until that is done or the page is left. */
  async function renew(page, show, before) {
    for (let wait = 1; before.making; wait = Math.min(2 * wait, 60)) {
      await new Promise((done) => setTimeout(done, 1000 * wait));
      if (!page.isConnected) return;
      const found = await cratelm.api.get("data/overview.json").catch(() => before); // told elsewhere, tried again here
      if (page.isConnected && JSON.stringify(found) !== JSON.stringify(before)) show(found);
      before = found;
    }
  }

  function listed(names) {
    return names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
  }

  /** A card for each model, with a link to every layer of every tap. */
  function models(site) {
    return h("ul", { class: "models" }, site.models.map((model) => h("li", { class: model.control ? "card control" : "card" },
      h("h3", {}, model.title, model.control && h("small", {}, "control")),
      model.tokens !== null && h("p", { class: "soft" }, `${count(model.tokens)} tokens observed in ${count(model.documents)} documents`),
      model.missing && h("p", { class: "missing" }, model.missing),
      model.taps.map((tap) => h("p", { class: "layers" },
        h("span", { class: "soft" }, tap.name === "neurons" ? "Layers" : tap.name),
        tap.layers.map(({ layer, folder }) => h("a", {
          href: link({ model, tap, layer, folder }), "aria-label": `${model.title}, ${tap.name}, layer ${layer}`,
        }, String(layer))))))));
  }

  function* reported(found, site) {
    const [first, ...others] = found.tables.filter((table) => !table.folded), folded = found.tables.filter((table) => table.folded);
    if (first) yield h("section", { "aria-labelledby": "numbers" }, h("h2", { id: "numbers" }, "Numbers"), cratelm.table.table(first));
    if (found.figures.length) {
      yield h("section", { "aria-labelledby": "figures" }, h("h2", { id: "figures" }, "Figures"),
        found.figures.map((one) => cratelm.figure.figure(one.name, cratelm.figure.built(one.drawing), one.caption)));
    }
    if (others.length || folded.length) {
      yield h("section", { "aria-labelledby": "tables" }, h("h2", { id: "tables" }, "Every number"), others.map(cratelm.table.table),
        folded.length > 0 && h("details", {}, h("summary", {}, "Every layer"), folded.map(cratelm.table.table)));
    }
    if (found.missing.length) {
      yield h("section", { "aria-labelledby": "absent" }, h("h2", { id: "absent" }, "Not in this report"),
        h("ul", { class: "missing" }, found.missing.map((line) => h("li", {}, line))));
    }
    const { origin } = site;
    yield h("section", { "aria-labelledby": "made" }, h("h2", { id: "made" }, "How this was made"),
      h("p", { class: "soft" }, `${site.mode} mode; written ${origin.date} by cratelm ${origin.versions?.cratelm ?? ""}${origin.commit ? `, commit ${origin.commit}` : ""}, on ${origin.machine}, Python ${origin.python}.`),
      h("p", { class: "soft" }, h("code", {}, origin.command)));
  }
})();
