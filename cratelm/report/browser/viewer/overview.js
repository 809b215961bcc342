"use strict";
/* The first page: the models, and the report's sentences, tables and figures. */

(() => {
  const { h, section, errorBox } = cratelm;
  const { count } = cratelm.text;
  const { link } = cratelm.routes;

  cratelm.pages.overview = async (site) => {
    const sentences = h("div", { class: "sentences" }), report = h("div", {});
    const titles = site.models.filter((model) => !model.control).map((model) => model.title);
    const page = h("div", {},
      h("p", { class: "eyebrow" }, "How interpretable are the neurons?"),
      h("h1", {}, new Intl.ListFormat("en-GB").format(titles) || site.models[0].title),
      sentences, section("models", "Browse the neurons", modelCards(site)), report);
    const show = (overview) => {
      sentences.replaceChildren(
        ...overview.sentences.map((text, i) => h("p", { class: i ? null : "lead" }, text)),
        ...[overview.making, overview.problem].filter(Boolean).map((text) => h("p", { class: "loading", role: "status" }, text)));
      report.replaceChildren(...reportSections(overview, site));
    };
    try {
      const overview = await cratelm.data.overview();
      show(overview);
      if (overview.making) poll(page, show, overview);
    } catch (error) {
      report.replaceChildren(errorBox(error));
    }
    return { title: "Overview", page };
  };

  /** Ask the server for the report, less and less often, until it is complete or the reader leaves the page. */
  async function poll(page, show, shown) {
    for (let wait = 1; shown.making; wait = Math.min(2 * wait, 60)) {
      await new Promise((done) => setTimeout(done, 1000 * wait));
      if (!page.isConnected) return;
      const overview = await cratelm.api.get("data/overview.json").catch(() => shown);
      if (page.isConnected && JSON.stringify(overview) !== JSON.stringify(shown)) show(overview);
      shown = overview;
    }
  }

  /** A card for each model, with links to the layers of every tap. */
  function modelCards(site) {
    return h("ul", { class: "models" }, site.models.map((model) => h("li", { class: model.control ? "card control" : "card" },
      h("h3", {}, model.title, model.control && h("small", {}, "control")),
      model.tokens !== null && h("p", { class: "soft" }, `${count(model.tokens)} tokens in ${count(model.documents)} documents`),
      model.missing && h("p", { class: "missing" }, model.missing),
      model.taps.map((tap) => h("p", { class: "layers" }, h("span", { class: "soft" }, tap.name === "neurons" ? "Layers" : tap.name),
        tap.layers.map((entry) => h("a", { href: link({ model, tap, ...entry }), "aria-label": `${model.title}, ${tap.name}, layer ${entry.layer}` }, entry.layer)))))));
  }

  function* reportSections(overview, site) {
    const { table } = cratelm.table;
    const [first, ...others] = overview.tables.filter(({ folded }) => !folded), folded = overview.tables.filter((entry) => entry.folded);
    if (first) yield section("numbers", "Summary", table(first));
    if (overview.figures.length) {
      yield section("figures", "Figures", overview.figures.map(({ name, drawing, caption }) => cratelm.figure.figure(name, cratelm.figure.drawingOf(drawing), caption)));
    }
    if (others.length || folded.length) {
      yield section("tables", "All tables", others.map(table), folded.length > 0 && h("details", {}, h("summary", {}, "Tables by layer"), folded.map(table)));
    }
    if (overview.missing.length) yield section("absent", "Not in this report", h("ul", { class: "missing" }, overview.missing.map((line) => h("li", {}, line))));
    const { origin, mode } = site;
    yield section("made", "How this was made",
      h("p", { class: "soft" }, `${mode} mode; written ${origin.date} by cratelm ${origin.versions?.cratelm ?? ""}${origin.commit ? `, commit ${origin.commit}` : ""}, on ${origin.machine}, Python ${origin.python}.`),
      h("p", { class: "soft" }, h("code", {}, origin.command)));
  }
})();
