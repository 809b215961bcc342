"use strict";
/* Neurons side by side, whichever model or autoencoder they are from. */

(() => {
  const { h, fresh, troubleBox } = cratelm;
  const { locate, pathOf, places, named, keep } = cratelm.routes;
  const NAMES = ["a", "b", "c", "d"];

  cratelm.pages.compare = async (site, query) => {
    const asked = NAMES.map((name) => query.get(name)).filter((path) => path !== null);
    const paths = asked.length ? asked : await matched(site);
    if (paths.length === 1) paths.push((await matched(site, locate(site, paths[0].split("/")))).find((path) => path !== paths[0]) ?? paths[0]);
    const columns = h("div", { class: "side" });
    const page = h("div", {}, h("h1", {}, "Side by side"),
      h("p", { class: "soft" }, "Neurons of any model and tap. The first choice are the neurons in the middle of each model's first layer, by score; the colours of each are in units of its own largest activation."),
      columns,
      h("p", { class: "gets" }, cratelm.downloads.linkButton(),
        h("button", { type: "button", class: "get", on: { click: () => { if (paths.length < NAMES.length) { paths.push(paths.at(-1)); refresh(); } } } }, "One more")));

    async function refresh() {
      keep(new URLSearchParams(paths.map((path, i) => [NAMES[i], path])));
      columns.replaceChildren(...await Promise.all(paths.map((path, i) => slot(site, path,
        (to) => { paths[i] = to; refresh(); }, paths.length > 1 ? () => { paths.splice(i, 1); refresh(); } : null))));
    }

    await refresh();
    return { title: "Side by side", page };
  };

  /** Of every model that is no control, the neuron in the middle of the same layer by score. */
  async function matched(site, near = null) {
    const all = places(site);
    const wanted = near?.place.layer ?? all[0].layer;
    const chosen = [];
    for (const model of site.models.filter((one) => one.taps.length && !one.control)) {
      for (const tap of model.taps) {
        const place = all.find((one) => one.model === model && one.tap === tap && one.layer === wanted) ?? all.find((one) => one.model === model && one.tap === tap);
        if (!near || place.folder !== near.place.folder) chosen.push(place);
      }
    }
    const found = await Promise.all((chosen.length ? chosen : [all[0]]).slice(0, 3).map(async (place) => {
      const layer = await cratelm.data.layer(place), scores = layer.sets[0]?.correlation ?? [];
      const scored = Array.from(scores, (score, i) => [score, i]).filter(([score]) => !Number.isNaN(score)).sort((a, b) => b[0] - a[0]);
      return pathOf(place, scored.length ? scored[Math.floor(scored.length / 2)][1] : 0);
    }));
    return found;
  }

  /** A neuron with the fields that choose another in its place. */
  async function slot(site, path, told, remove) {
    let place, index, body;
    try {
      ({ place, index } = locate(site, path.split("/")));
      index ??= 0;
      body = cratelm.cards.column(await cratelm.data.neuron(place, index));
    } catch (error) {
      place ??= places(site)[0];
      body = troubleBox(error);
    }
    const all = places(site), whereId = fresh("where"), whichId = fresh("which");
    return h("div", { class: "slot" },
      h("div", { class: "pick" },
        h("label", { for: whereId, class: "unseen" }, "Model and layer"),
        h("select", { id: whereId, on: { change: (event) => told(pathOf(all[Number(event.target.value)], 0)) } },
          all.map((one, i) => h("option", { value: i, selected: one.folder === place.folder }, named(one)))),
        h("label", { for: whichId, class: "unseen" }, "Neuron"),
        h("input", { id: whichId, type: "number", min: "0", step: "1", value: index ?? 0, on: {
          change: (event) => told(pathOf(place, Math.max(0, Math.floor(Number(event.target.value) || 0)))),
        } }),
        remove && h("button", { type: "button", class: "get", "aria-label": `Remove ${named(place, index ?? 0)}`, on: { click: remove } }, "×")),
      body);
  }
})();
