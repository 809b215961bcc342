"use strict";
/* Addresses: #/MODEL/[TAP/]layer/L/neuron/N, #/compare?a=...&b=..., #/vote, #/search?q=... */

(() => {
  const { Trouble } = cratelm;

  /** @typedef {{model: any, tap: any, layer: number, folder: string}} Place */

  /** Parts and query of an address. */
  function parse(hash) {
    const [path, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
    const parts = path.split("/").filter(Boolean).map((part) => {
      try {
        return decodeURIComponent(part);
      } catch {
        return part;
      }
    });
    return { parts, query: new URLSearchParams(query) };
  }

  /**
   * The layer, and maybe the neuron, that an address names.
   * @param {any} site @param {string[]} parts
   * @returns {{place: Place, index: ?number}}
   */
  function locate(site, parts) {
    const model = site.models.find((one) => one.slug === parts[0]);
    if (!model) {
      throw new Trouble(`There is no model ${parts[0]} here.`, `Models: ${site.models.map((one) => one.slug).join(", ")}.`);
    }
    if (!model.taps.length) throw new Trouble(`${model.title} has no records.`, model.missing);
    const named = parts[1] !== "layer";
    const tap = named ? model.taps.find((one) => one.slug === parts[1]) : model.taps[0];
    if (!tap) {
      throw new Trouble(`${model.title} has no neurons recorded at ${parts[1] ?? "this place"}.`,
        `Recorded: ${model.taps.map((one) => one.slug).join(", ")}.`);
    }
    const rest = parts.slice(named ? 2 : 1);
    const layer = tap.layers.find((one) => String(one.layer) === rest[1]);
    if (rest[0] !== "layer" || !layer) {
      throw new Trouble(`There is no layer ${rest[1] ?? ""} of ${model.title} here.`,
        `Layers: ${tap.layers.map((one) => one.layer).join(", ")}.`);
    }
    const place = { model, tap, layer: layer.layer, folder: layer.folder };
    if (rest.length === 2) return { place, index: null };
    if (rest.length !== 4 || rest[2] !== "neuron" || !/^\d+$/.test(rest[3])) {
      throw new Trouble("This address leads nowhere.", "A neuron's address ends in /layer/L/neuron/N.");
    }
    return { place, index: Number(rest[3]) };
  }

  /** `crate-2l/layer/1`, with the tap where it is not the model's own. */
  function pathOf(place, index = null) {
    const tap = place.tap === place.model.taps[0] ? "" : `/${place.tap.slug}`;
    return `${place.model.slug}${tap}/layer/${place.layer}${index === null ? "" : `/neuron/${index}`}`;
  }

  const link = (place, index = null) => `#/${pathOf(place, index)}`;

  /** All layers of the site, in order. @returns {Place[]} */
  function places(site) {
    return site.models.flatMap((model) => model.taps.flatMap((tap) =>
      tap.layers.map((one) => ({ model, tap, layer: one.layer, folder: one.folder }))));
  }

  /** `CRATE-2L, layer 1`, for people. */
  function named(place, index = null) {
    const tap = place.tap.name === "neurons" ? "" : `, ${place.tap.name}`;
    return `${place.model.title}${tap}, layer ${place.layer}${index === null ? "" : `, neuron ${index}`}`;
  }

  /** Change the query of the address without a new page in the history. */
  function keep(query) {
    const path = location.hash.split("?", 1)[0] || "#/";
    const text = query.toString();
    history.replaceState(null, "", text ? `${path}?${text}` : path);
  }

  cratelm.routes = { parse, locate, pathOf, link, places, named, keep };
})();
