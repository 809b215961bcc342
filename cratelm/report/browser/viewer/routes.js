"use strict";
/* Addresses: #/MODEL/[TAP/]layer/L/neuron/N, #/compare?a=...&b=..., #/vote, #/search?q=... */

(() => {
  const { PageError, select } = cratelm;

  /** @typedef {{model: any, tap: any, layer: number, folder: string}} Place */

  function decode(part) {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  }

  /** Parts and query of an address. */
  function parse(hash) {
    const [path, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
    return { parts: path.split("/").filter(Boolean).map(decode), query: new URLSearchParams(query) };
  }

  /**
   * The layer, and maybe the neuron, that an address names.
   * @param {any} site @param {string[]} parts
   * @returns {{place: Place, index: ?number}}
   */
  function locate(site, parts) {
    const model = site.models.find(({ slug }) => slug === parts[0]);
    if (!model) throw new PageError(`This site has no model ${parts[0]}.`, `Models: ${site.models.map(({ slug }) => slug).join(", ")}.`);
    if (!model.taps.length) throw new PageError(`${model.title} has no records.`, model.missing);
    const hasTap = parts[1] !== "layer", tap = hasTap ? model.taps.find(({ slug }) => slug === parts[1]) : model.taps[0];
    if (!tap) throw new PageError(`${model.title} has no records of the tap ${parts[1] ?? ""}.`, `Taps: ${model.taps.map(({ slug }) => slug).join(", ")}.`);
    const [word, number, neuron, index, ...rest] = parts.slice(hasTap ? 2 : 1);
    const layer = tap.layers.find((entry) => String(entry.layer) === number);
    if (word !== "layer" || !layer) {
      throw new PageError(`This site has no layer ${number ?? ""} of ${model.title}.`, `Layers: ${tap.layers.map((entry) => entry.layer).join(", ")}.`);
    }
    const place = { model, tap, ...layer };
    if (neuron === undefined) return { place, index: null };
    if (neuron !== "neuron" || !/^\d+$/.test(index) || rest.length) {
      throw new PageError("This address does not exist.", "The address of a neuron ends in /layer/L/neuron/N.");
    }
    return { place, index: Number(index) };
  }

  /** `crate-2l/layer/1`, with the tap unless it is the model's first. */
  function pathOf(place, index = null) {
    const tap = place.tap === place.model.taps[0] ? "" : `/${place.tap.slug}`;
    return `${place.model.slug}${tap}/layer/${place.layer}${index === null ? "" : `/neuron/${index}`}`;
  }

  const link = (place, index = null) => `#/${pathOf(place, index)}`;

  /** The path as part of a file name. */
  const fileName = (place, index = null) => pathOf(place, index).replaceAll("/", "-");

  /** All layers of the site, in order. @returns {Place[]} */
  const places = (site) => site.models.flatMap((model) => model.taps.flatMap((tap) => tap.layers.map((layer) => ({ model, tap, ...layer }))));

  /** The layer with these slugs and this number; undefined if the site does not have it. */
  const findPlace = (site, { model, tap, layer }) =>
    places(site).find((place) => place.model.slug === model && place.tap.slug === tap && place.layer === layer);

  /** `CRATE-2L, layer 1`, as a title. */
  function titleOf(place, index = null) {
    const tap = place.tap.name === "neurons" ? "" : `, ${place.tap.name}`;
    return `${place.model.title}${tap}, layer ${place.layer}${index === null ? "" : `, neuron ${index}`}`;
  }

  /** A choice of a layer of the site. */
  function placeSelect(site, place, choose, attributes) {
    const all = places(site);
    return select(all.map((entry) => titleOf(entry)), all.findIndex(({ folder }) => folder === place.folder), (i) => choose(all[i]), attributes);
  }

  /** Replace the address without a new entry in the history. */
  const setAddress = (address) => history.replaceState(history.state, "", address);

  /** Replace the query of the address. */
  function setQuery(query) {
    const path = location.hash.split("?", 1)[0] || "#/", text = query.toString();
    setAddress(text ? `${path}?${text}` : path);
  }

  cratelm.routes = { parse, locate, pathOf, link, fileName, places, findPlace, titleOf, placeSelect, setAddress, setQuery };
})();
