"use strict";
/* Compare up to four neurons of any model and tap. */

(() => {
  const { h, button, errorBox } = cratelm;
  const { locate, pathOf, places, titleOf, placeSelect, setQuery } = cratelm.routes;
  const NAMES = ["a", "b", "c", "d"];

  cratelm.pages.compare = async (site, query) => {
    const paths = NAMES.map((name) => query.get(name)).filter((path) => path !== null);
    if (!paths.length) paths.push(...await suggested(site, places(site)[0].layer));
    else if (paths.length === 1) paths.push(await another(site, paths));
    const columns = h("div", { class: "side" });
    const more = button("Add a neuron", async () => {
      paths.push(await another(site, paths));
      refresh();
    });

    async function refresh() {
      setQuery(new URLSearchParams(paths.map((path, i) => [NAMES[i], path])));
      more.hidden = paths.length >= NAMES.length;
      columns.replaceChildren(...await Promise.all(paths.map((path, i) => slot(site, path,
        (other) => { paths[i] = other; refresh(); }, paths.length > 1 ? () => { paths.splice(i, 1); refresh(); } : null))));
    }

    await refresh();
    return {
      title: "Compare neurons",
      page: h("div", {}, h("h1", {}, "Compare neurons"),
        h("p", { class: "soft" }, "Choose up to four neurons of any model and tap. By default these are the neurons with the median score of each model's first layer. Colours are in units of each neuron's largest activation."),
        columns, h("p", { class: "gets" }, cratelm.downloads.linkButton(), more)),
    };
  };

  /** The neuron with the median score in a layer of every model and tap, controls left out; three at most. */
  async function suggested(site, number) {
    const models = site.models.filter((model) => !model.control), all = places(site).filter(({ model }) => models.includes(model));
    const taps = models.flatMap((model) => model.taps);
    const chosen = taps.map((tap) => all.find((place) => place.tap === tap && place.layer === number) ?? all.find((place) => place.tap === tap));
    return Promise.all((chosen.length ? chosen : [places(site)[0]]).slice(0, 3).map(async (place) => {
      const { sets } = await cratelm.data.layer(place);
      const scored = Array.from(sets[0]?.correlation ?? [], (score, i) => [score, i]).filter(([score]) => !Number.isNaN(score)).sort((a, b) => b[0] - a[0]);
      return pathOf(place, scored.length ? scored[Math.floor(scored.length / 2)][1] : 0);
    }));
  }

  /** A neuron that is not compared yet: one of another model or tap, or else the next neuron of the last one's layer. */
  async function another(site, paths) {
    try {
      const { place, index } = locate(site, paths.at(-1).split("/"));
      const compared = paths.map((path) => path.split("/neuron/")[0]);
      const fresh = (await suggested(site, place.layer)).find((path) => !compared.includes(path.split("/neuron/")[0]));
      const { neurons } = await cratelm.data.layer(place);
      return fresh ?? Array.from({ length: neurons }, (_, i) => pathOf(place, ((index ?? 0) + 1 + i) % neurons)).find((path) => !paths.includes(path)) ?? paths.at(-1);
    } catch {
      return pathOf(places(site)[0], 0);
    }
  }

  /** A neuron, and the fields that choose another one. */
  async function slot(site, path, choose, remove) {
    let place, index, body;
    try {
      ({ place, index } = locate(site, path.split("/")));
      index ??= 0;
      body = cratelm.cards.column(await cratelm.data.neuron(place, index));
    } catch (error) {
      place ??= places(site)[0];
      body = errorBox(error);
    }
    return h("div", { class: "slot" },
      h("div", { class: "pick" },
        placeSelect(site, place, (other) => choose(pathOf(other, 0)), { "aria-label": "Model and layer" }),
        h("input", { "aria-label": "Neuron", type: "number", min: "0", step: "1", value: index ?? 0, on: {
          change: (event) => choose(pathOf(place, Math.max(0, Math.floor(Number(event.target.value) || 0)))),
        } }),
        remove && button("×", remove, { "aria-label": `Remove ${titleOf(place, index ?? 0)}` })),
      body);
  }
})();
