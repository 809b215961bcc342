"use strict";
/* Type a text: every layer's strongest neurons at each token, one neuron along it, and the text with neurons turned.
   The address holds the model, the text and what is turned, so that a trial is a link. */

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

  /** The address of a trial. */
  cratelm.tryLink = (model, turns = [], text = null) => {
    const query = new URLSearchParams({ model });
    if (text !== null) query.set("text", text);
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
      site, live, models, turns: readTurns(query.get("turn")).slice(0, live.limits.changes), seen: null, along: null,
      model: models.find((one) => one.slug === named) ?? models[0], text: query.get("text") ?? FIRST,
    };
    const parts = build(state);
    parts.showTurns();
    if (state.text) parts.look();
    return { title: "Try a text", page: parts.page };
  };

  function build(state) {
    const field = h("textarea", { id: "typed", rows: 4, maxlength: state.live.limits.text_characters, spellcheck: "false" });
    field.value = state.text;
    const choice = h("select", { id: "model" }, state.models.map((one) => h("option", { value: one.slug, selected: one === state.model }, one.title)));
    const seen = h("div", { class: "seen", "aria-live": "off" }), turned = h("div", { class: "turns" }), made = h("div", { class: "made" });
    const keep = () => {
      const address = cratelm.tryLink(state.model.slug, state.turns, field.value);
      history.replaceState(null, "", address);
    };

    async function look() {
      keep();
      seen.setAttribute("aria-busy", "true");
      try {
        state.seen = await cratelm.api.post("look", { model: state.model.slug, text: field.value, strongest: 5 });
        state.text = field.value;
        state.along = null;
        seen.replaceChildren(...shownText(state, turn));
        say(`Read ${state.seen.tokens.length} tokens.`);
      } catch (error) {
        seen.replaceChildren(troubleBox(error));
      }
      seen.removeAttribute("aria-busy");
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

    const steer = cratelm.steering({ state, made, text: () => field.value });
    function showTurns() {
      keep();
      turned.replaceChildren(...turnRows(state, (renew) => { if (renew) showTurns(); else keep(); steer.effectSoon(); }, steer));
      steer.effectSoon();
    }

    choice.addEventListener("change", () => {
      state.model = state.models.find((one) => one.slug === choice.value);
      state.turns = [];
      tellMost();
      made.replaceChildren();
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
      most, form, seen,
      h("section", { "aria-labelledby": "turned" }, h("h2", { id: "turned" }, "Turn neurons"), turned, made));
    return { page, look, showTurns };
  }

  /** The text with a neuron's heat on it, and of the token pointed at each layer's strongest neurons. */
  function* shownText(state, turn) {
    const { seen } = state, below = h("div", { class: "strongest" }), along = h("div", { class: "along" });
    const own = state.model.taps.find((one) => one.name === "neurons");
    const place = (layer) => own?.layers.find((one) => one.layer === layer);

    function showToken(at) {
      below.replaceChildren(h("h3", {}, "Strongest at ", chip(seen.tokens[at]), h("small", {}, `token ${at + 1} of ${seen.tokens.length}`)),
        h("div", { class: "layers-of" }, seen.layers.map((layer) => h("div", {}, h("h4", {}, `Layer ${layer.layer}`),
          layer.strongest[at].length ? h("ol", { class: "near" }, layer.strongest[at].map(([neuron, value]) => h("li", {},
            h("button", { type: "button", class: "plain", "aria-label": `Neuron ${neuron} of layer ${layer.layer}, ${digits(value)}: see it along the text`, on: { click: () => showAlong(layer.layer, neuron) } }, String(neuron)),
            h("span", { title: exact(value) }, digits(value, 2))))) : h("p", { class: "missing" }, "No neuron fires.")))));
    }

    async function showAlong(layer, neuron) {
      try {
        const found = await cratelm.api.post("look", { model: state.model.slug, text: state.text, layer, neuron });
        const values = Float32Array.from(found.values), largest = values.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
        const where = place(layer);
        along.replaceChildren(h("h3", {}, `Neuron ${neuron} of layer ${layer} along the text`),
          cratelm.excerpts.legend({ maximum: largest, minimum: values.reduce((a, b) => Math.min(a, b), 0) }),
          cratelm.excerpts.excerptBox({ tokens: found.tokens, values, document: "typed", position: 0 }, largest),
          h("p", { class: "gets" }, where && h("a", { class: "get", href: cratelm.routes.link({ model: state.model, tap: own, layer, folder: where.folder }, neuron) }, "Its page"),
            h("button", { type: "button", class: "get", on: { click: () => turn(layer, neuron) } }, "Turn it")));
        say(`Neuron ${neuron} of layer ${layer} along the text; its largest activation there is ${digits(largest)}.`);
      } catch (error) {
        along.replaceChildren(troubleBox(error));
      }
    }

    const tokens = seen.tokens.map((text, at) => h("button", {
      type: "button", class: "token", title: "Each layer's strongest neurons here",
      on: { click: (event) => { for (const one of event.target.closest(".tokens").children) one.removeAttribute("aria-pressed"); event.currentTarget.setAttribute("aria-pressed", "true"); showToken(at); } },
    }, legible(text)));
    tokens.at(-1)?.setAttribute("aria-pressed", "true");
    yield h("h2", {}, "Tokens", h("small", {}, "choose one to see which neurons fire there"));
    yield h("div", { class: "tokens", dir: "ltr", translate: "no" }, tokens);
    yield below;
    yield along;
    showToken(seen.tokens.length - 1);
  }

  /** A row for each turned neuron, with its slider. */
  function* turnRows(state, changed, steer) {
    if (!state.turns.length) {
      yield h("p", { class: "missing" }, "None yet. Choose a token above, then a neuron, then “Turn it”; or enter one:");
    }
    for (const turn of state.turns) yield turnRow(state, turn, changed);
    const layer = h("input", { type: "number", min: 0, value: 0, "aria-label": "Layer" }), neuron = h("input", { type: "number", min: 0, value: 0, "aria-label": "Neuron" });
    const add = h("form", { class: "add" }, h("span", { class: "field" }, "Layer ", layer), h("span", { class: "field" }, "neuron ", neuron), h("button", { class: "get" }, "Add"));
    add.addEventListener("submit", (event) => {
      event.preventDefault();
      if (state.turns.length >= state.live.limits.changes) return;
      state.turns.push({ layer: Number(layer.value), neuron: Number(neuron.value), how: "set", strength: 2, ofMaximum: true });
      changed(true);
    });
    yield add;
    yield steer.controls();
  }

  function turnRow(state, turn, changed) {
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
    return h("div", { class: "turn", role: "group", "aria-label": name }, h("b", {}, `${turn.layer}/${turn.neuron}`), how, turn.how !== "silence" && [slider, shown], drop);
  }

  /** On a neuron's page: where to turn it. */
  cratelm.live = cratelm.live ?? {};
  cratelm.live.live = (site, neuron) => {
    const { place } = neuron;
    if (place.tap.name !== "neurons") {
      return h("section", { "aria-labelledby": "turn" }, h("h2", { id: "turn" }, "Live"),
        h("p", { class: "missing" }, "Only the model's own neurons can be turned here. cratelm steer --sae turns latents of an autoencoder."));
    }
    if (!Object.hasOwn(site.capabilities.live.contexts, place.model.slug)) return null;
    const strongest = neuron.excerpts.find((group) => group.kind === "top" && group.items.length)?.items[0];
    const text = strongest ? strongest.tokens.join("").slice(-400) : FIRST;
    const turns = [{ layer: place.layer, neuron: neuron.index, how: "set", strength: 2, ofMaximum: true }];
    return h("section", { "aria-labelledby": "turn" }, h("h2", { id: "turn" }, "Live"),
      h("p", { class: "gets" }, h("a", { class: "get", href: cratelm.tryLink(place.model.slug, turns, text) }, "Turn it on its strongest excerpt"),
        h("a", { class: "get", href: cratelm.tryLink(place.model.slug, turns) }, "Turn it on a text of yours")));
  };
})();
