"use strict";
/* Type a text: every layer's strongest neurons at each token, one neuron along it, and the text with neurons turned.
   The address holds the model, the text, what is turned and which neuron is followed, so that a trial is a link. */

(() => {
  const { h, say, Trouble, troubleBox } = cratelm;
  const { chip, digits, exact, legible } = cratelm.text;
  const HOWS = new Map([["set", "set to"], ["add", "add"], ["scale", "scale by"], ["silence", "silence"]]);
  const FIRST = "The quick brown fox jumps over the lazy dog.";

  /** `1/85:set:2x` and its like. */
  function readTurns(text) {
    return (text ?? "").split(",").map((part) => /^(\d+)\/(\d+)(?::(set|add|scale|silence)(?::(-?[\d.]+)(x?))?)?$/.exec(part)).filter(Boolean)
      .map(([, layer, neuron, how = "set", number = "1", unit = "x"]) => ({
        layer: Number(layer), neuron: Number(neuron), how, strength: Number(number), ofMaximum: how !== "scale" && unit === "x",
      }));
  }

  const writeTurn = (turn) => `${turn.layer}/${turn.neuron}:${turn.how}${turn.how === "silence" ? "" : `:${turn.strength}${turn.ofMaximum ? "x" : ""}`}`;

  /** `1/85`: the neuron that is followed along the text, or null. @returns {?{layer: number, neuron: number}} */
  function readAlong(text) {
    const [, layer, neuron] = /^(\d+)\/(\d+)$/.exec(text ?? "") ?? [];
    return neuron === undefined ? null : { layer: Number(layer), neuron: Number(neuron) };
  }

  /** The address of a trial. */
  cratelm.tryLink = (model, turns = [], text = null, along = null) => {
    const query = new URLSearchParams({ model });
    if (text !== null) query.set("text", text);
    if (along) query.set("along", `${along.layer}/${along.neuron}`);
    if (turns.length) query.set("turn", turns.map(writeTurn).join(","));
    return `#/try?${query}`;
  };

  cratelm.pages.try = async (site, query) => {
    const live = site.capabilities.live;
    if (!live) throw new Trouble("Nothing can be tried here: the runs of this server hold no model.", "Run: cratelm serve RUN... with runs that have a folder model, or were collected from a Hugging Face model.");
    const models = site.models.filter((one) => Object.hasOwn(live.contexts, one.slug));
    const named = query.get("model");
    if (named && !models.some((one) => one.slug === named)) {
      throw new Trouble(`There is no model ${named} to try a text on here.`, `There are: ${models.map((one) => one.slug).join(", ")}. A run without its folder model is shown only.`);
    }
    const state = {
      site, live, models, turns: readTurns(query.get("turn")).slice(0, live.limits.changes), along: readAlong(query.get("along")),
      model: models.find((one) => one.slug === named) ?? models[0], text: query.get("text") ?? FIRST,
    };
    const parts = build(state);
    parts.showTurns();
    if (state.text) parts.look();
    return { title: "Try a text", page: parts.page, leave: parts.leave };
  };

  function build(state) {
    const field = h("textarea", { id: "typed", rows: 4, maxlength: state.live.limits.text_characters, spellcheck: "false" });
    field.value = state.text;
    const choice = h("select", { id: "model" }, state.models.map((one) => h("option", { value: one.slug, selected: one === state.model }, one.title)));
    const seen = h("div", { class: "seen", "aria-live": "off" }), along = h("div", { class: "along" }), turned = h("div", { class: "turns" });
    const keep = () => history.replaceState(null, "", cratelm.tryLink(state.model.slug, state.turns, field.value, state.along));
    // An answer that was asked for before something else was is let go: it is about another text, model or neuron.
    let looked = 0, followed = 0, read = state.text;

    async function look() {
      const own = ++looked, { model } = state, text = field.value;
      keep();
      seen.setAttribute("aria-busy", "true");
      try {
        const found = await cratelm.api.post("look", { model: model.slug, text, strongest: 5 });
        if (own !== looked) return;
        read = text;
        seen.replaceChildren(...shownText(found, follow));
        say(`Read ${found.tokens.length} tokens.`);
        showAlong();
      } catch (error) {
        if (own !== looked) return;
        seen.replaceChildren(troubleBox(error));
        clearAlong();
      }
      seen.removeAttribute("aria-busy");
    }

    function clearAlong() {
      followed += 1;
      along.replaceChildren();
    }

    /** See one neuron along the text, until another one is chosen. */
    async function follow(layer, neuron) {
      state.along = { layer, neuron };
      keep();
      await showAlong();
      along.scrollIntoView({ block: "nearest" });
    }

    async function showAlong() {
      if (!state.along) return;
      const own = ++followed, { model } = state, { layer, neuron } = state.along;
      let shown;
      try {
        const found = await cratelm.api.post("look", { model: model.slug, text: read, layer, neuron });
        shown = [...alongText(model, layer, neuron, found, () => turn(layer, neuron), unfollow)];
      } catch (error) {
        shown = [troubleBox(error)];
      }
      if (own === followed) along.replaceChildren(...shown);
    }

    function unfollow() {
      state.along = null;
      keep();
      clearAlong();
    }

    function turn(layer, neuron) {
      const already = state.turns.some((one) => one.layer === layer && one.neuron === neuron);
      if (!already && state.turns.length < state.live.limits.changes) {
        state.turns.push({ layer, neuron, how: "set", strength: 2, ofMaximum: true });
      }
      showTurns();
      turned.scrollIntoView({ block: "nearest" });
      say(`Neuron ${neuron} of layer ${layer} is in the list of turned neurons.`);
    }

    const steer = cratelm.steering({ state, text: () => field.value });
    function showTurns() {
      keep();
      turned.replaceChildren(...turnRows(state, { changed: (renew) => { if (renew) showTurns(); else keep(); steer.effectSoon(); }, turn, follow }, steer));
      steer.effectSoon();
    }

    /** Nothing of what was asked may come any more. */
    function leave() {
      looked += 1;
      clearAlong();
      steer.clear();
    }

    choice.addEventListener("change", () => {
      leave();
      state.model = state.models.find((one) => one.slug === choice.value);
      state.turns = [];
      state.along = null;
      seen.replaceChildren();
      tellMost();
      showTurns();
      look();
    });
    const form = h("form", { class: "type" }, h("label", { for: "typed" }, "Text"), field,
      h("p", { class: "answer" }, h("label", { class: "field", for: "model" }, "Model ", choice), h("button", { class: "choice" }, "Look")));
    form.addEventListener("submit", (event) => { event.preventDefault(); look(); steer.effectSoon(); });
    field.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); });
    const most = h("p", { class: "soft" });
    const tellMost = () => { most.textContent = `At most ${state.live.contexts[state.model.slug]} tokens are read. What you type goes to this server and no further.`; };
    tellMost();
    const page = h("div", { class: "try" }, h("h1", {}, "Try a text"),
      most, form, seen, along,
      h("section", { "aria-labelledby": "turned" }, h("h2", { id: "turned" }, "Turn neurons"), turned, steer.made));
    return { page, look, showTurns, leave };
  }

  /** The tokens of the text, and of the one pointed at each layer's strongest neurons. */
  function* shownText(seen, follow) {
    const below = h("div", { class: "strongest" });

    function showToken(at) {
      below.replaceChildren(h("h3", {}, "Strongest at ", chip(seen.tokens[at]), h("small", {}, `token ${at + 1} of ${seen.tokens.length}`)),
        h("div", { class: "layers-of" }, seen.layers.map((layer) => h("div", {}, h("h4", {}, `Layer ${layer.layer}`),
          layer.strongest[at].length ? h("ol", { class: "near" }, layer.strongest[at].map(([neuron, value]) => h("li", {},
            h("button", { type: "button", class: "plain", "aria-label": `Neuron ${neuron} of layer ${layer.layer}, ${digits(value)}: see it along the text`, on: { click: () => follow(layer.layer, neuron) } }, String(neuron)),
            h("span", { title: exact(value) }, digits(value, 2))))) : h("p", { class: "missing" }, "No neuron fires.")))));
    }

    const tokens = seen.tokens.map((text, at) => h("button", {
      type: "button", class: "token", title: "Each layer's strongest neurons here",
      on: { click: (event) => { for (const one of event.target.closest(".tokens").children) one.removeAttribute("aria-pressed"); event.currentTarget.setAttribute("aria-pressed", "true"); showToken(at); } },
    }, legible(text)));
    tokens.at(-1)?.setAttribute("aria-pressed", "true");
    yield h("h2", {}, "Tokens", h("small", {}, "choose one to see which neurons fire there"));
    yield h("div", { class: "tokens", dir: "ltr", translate: "no" }, tokens);
    yield below;
    showToken(seen.tokens.length - 1);
  }

  /** The text on the colours of one neuron. */
  function* alongText(model, layer, neuron, found, turn, unfollow) {
    const own = model.taps.find((one) => one.name === "neurons"), where = own?.layers.find((one) => one.layer === layer);
    const values = Float32Array.from(found.values), largest = values.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
    yield h("h3", {}, `Neuron ${neuron} of layer ${layer} along the text`);
    if (largest > 0) yield cratelm.excerpts.legend({ maximum: largest, minimum: values.reduce((a, b) => Math.min(a, b), 0) });
    else yield h("p", { class: "missing" }, "It is 0 on every token.");
    yield cratelm.excerpts.excerptBox({ tokens: found.tokens, values, document: "typed", position: 0 }, largest);
    yield h("p", { class: "gets" }, where && h("a", { class: "get", href: cratelm.routes.link({ model, tap: own, layer, folder: where.folder }, neuron) }, "Its page"),
      h("button", { type: "button", class: "get", on: { click: turn } }, "Turn it"), h("button", { type: "button", class: "get", on: { click: unfollow } }, "Close"));
    say(`Neuron ${neuron} of layer ${layer} along the text; its largest activation there is ${digits(largest)}.`);
  }

  /** A row for each turned neuron, with its slider. */
  function* turnRows(state, told, steer) {
    if (!state.turns.length) {
      yield h("p", { class: "missing" }, "None yet. Choose a token above, then a neuron, then “Turn it”; or enter a neuron:");
    }
    for (const turn of state.turns) yield turnRow(state, turn, told);
    const first = state.along ?? { layer: 0, neuron: 0 };
    const layer = h("input", { type: "number", min: 0, value: first.layer, "aria-label": "Layer" }), neuron = h("input", { type: "number", min: 0, value: first.neuron, "aria-label": "Neuron" });
    const chosen = () => [Number(layer.value), Number(neuron.value)];
    const add = h("form", { class: "add" }, h("span", { class: "field" }, "Layer ", layer), h("span", { class: "field" }, "neuron ", neuron),
      h("button", { class: "get" }, "Add"), h("button", { type: "button", class: "get", on: { click: () => add.reportValidity() && told.follow(...chosen()) } }, "See it along the text"));
    add.addEventListener("submit", (event) => {
      event.preventDefault();
      told.turn(...chosen());
    });
    yield add;
    yield steer.controls;
  }

  function turnRow(state, turn, { changed, follow }) {
    const name = `neuron ${turn.neuron} of layer ${turn.layer}`;
    const how = h("select", { "aria-label": `What is done to ${name}` }, Array.from(HOWS, ([value, text]) => h("option", { value, selected: turn.how === value }, text)));
    how.addEventListener("change", () => {
      turn.how = how.value;
      turn.ofMaximum = turn.how !== "scale";
      changed(true);
    });
    const slider = h("input", { type: "range", min: turn.how === "set" ? 0 : -5, max: turn.how === "scale" ? 5 : 10, step: 0.1, value: turn.strength, "aria-label": `Strength of ${name}` });
    const shown = h("output", {});
    const tell = () => { shown.textContent = turn.ofMaximum ? `${digits(turn.strength)} × its largest` : digits(turn.strength); slider.setAttribute("aria-valuetext", shown.textContent); };
    slider.addEventListener("input", () => { turn.strength = Number(slider.value); tell(); changed(false); });
    tell();
    const drop = h("button", { type: "button", class: "get", "aria-label": `Leave ${name} alone`, on: { click: () => { state.turns.splice(state.turns.indexOf(turn), 1); changed(true); } } }, "Remove");
    return h("div", { class: "turn", role: "group", "aria-label": name },
      h("b", {}, h("button", { type: "button", class: "plain", title: "See it along the text", "aria-label": `See ${name} along the text`, on: { click: () => follow(turn.layer, turn.neuron) } }, `${turn.layer}/${turn.neuron}`)), how, turn.how !== "silence" && [slider, shown], drop);
  }

  /** On a neuron's page: see it on a text of one's own, and where to turn it. */
  cratelm.live = cratelm.live ?? {};
  cratelm.live.live = (site, neuron) => {
    const { place } = neuron;
    if (place.tap.name !== "neurons") {
      return h("section", { "aria-labelledby": "turn" }, h("h2", { id: "turn" }, "Live"),
        h("p", { class: "missing" }, "Only the model's own neurons can be tried on a text and turned here. cratelm steer --sae turns latents of an autoencoder."));
    }
    const { contexts, limits } = site.capabilities.live;
    if (!Object.hasOwn(contexts, place.model.slug)) return null;
    const strongest = neuron.excerpts.find((group) => group.kind === "top" && group.items.length)?.items[0];
    const text = strongest ? strongest.tokens.join("").slice(-400) : FIRST;
    const along = { layer: place.layer, neuron: neuron.index }, turns = [{ ...along, how: "set", strength: 2, ofMaximum: true }];
    const field = h("textarea", { id: "own-text", rows: 2, maxlength: limits.text_characters, spellcheck: "false", placeholder: FIRST });
    const form = h("form", { class: "type own" }, h("label", { for: "own-text" }, "This neuron on a text of yours"), field,
      h("p", { class: "gets" }, h("button", { class: "get" }, "See it along the text")));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      location.hash = cratelm.tryLink(place.model.slug, [], field.value || FIRST, along);
    });
    field.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); });
    return h("section", { "aria-labelledby": "turn" }, h("h2", { id: "turn" }, "Live"), form,
      h("p", { class: "gets" }, h("a", { class: "get", href: cratelm.tryLink(place.model.slug, turns, text, along) }, "Turn it on its strongest excerpt"),
        h("a", { class: "get", href: cratelm.tryLink(place.model.slug, turns, null, along) }, "Turn it on a text of yours")));
  };
})();
