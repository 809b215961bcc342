"use strict";
/* Try a text: the strongest neurons of every layer at each token, one neuron along the text, and steering.
   The address holds the model, the text, the changes and the neuron shown along the text, so it can be shared. */

(() => {
  const { h, say, Trouble, troubleBox } = cratelm;
  const { chip, digits, exact, legible } = cratelm.text;
  const HOWS = new Map([["set", "set to"], ["add", "add"], ["scale", "scale by"], ["silence", "silence"]]);
  const EXAMPLE = "The quick brown fox jumps over the lazy dog.";

  /** Parse changes such as `1/85:set:2x`. */
  function readChanges(text) {
    return (text ?? "").split(",").map((part) => /^(\d+)\/(\d+)(?::(set|add|scale|silence)(?::(-?[\d.]+)(x?))?)?$/.exec(part)).filter(Boolean)
      .map(([, layer, neuron, how = "set", number = "1", unit = "x"]) => ({
        layer: Number(layer), neuron: Number(neuron), how, strength: Number(number), ofMaximum: how !== "scale" && unit === "x",
      }));
  }

  const writeChange = ({ layer, neuron, how, strength, ofMaximum }) => `${layer}/${neuron}:${how}${how === "silence" ? "" : `:${strength}${ofMaximum ? "x" : ""}`}`;

  /** Parse `1/85`, the neuron shown along the text. @returns {?{layer: number, neuron: number}} */
  function readAlong(text) {
    const [, layer, neuron] = /^(\d+)\/(\d+)$/.exec(text ?? "") ?? [];
    return neuron === undefined ? null : { layer: Number(layer), neuron: Number(neuron) };
  }

  /** The address of this page with everything that it shows. */
  cratelm.tryLink = (model, changes = [], text = null, along = null) => {
    const query = new URLSearchParams({ model });
    if (text !== null) query.set("text", text);
    if (along) query.set("along", `${along.layer}/${along.neuron}`);
    if (changes.length) query.set("steer", changes.map(writeChange).join(","));
    return `#/try?${query}`;
  };

  cratelm.pages.try = async (site, query) => {
    const live = site.capabilities.live;
    if (!live) throw new Trouble("No model is loaded: the runs of this server have no model files.", "Run: cratelm serve RUN... with runs that have a folder model, or were collected from a Hugging Face model.");
    const models = site.models.filter((model) => Object.hasOwn(live.contexts, model.slug));
    const slug = query.get("model");
    if (slug && !models.some((model) => model.slug === slug)) {
      throw new Trouble(`There is no model ${slug} to try a text on.`, `Models: ${models.map((model) => model.slug).join(", ")}. A run without its folder model can only be browsed.`);
    }
    const state = {
      site, live, models, changes: readChanges(query.get("steer")).slice(0, live.limits.changes), along: readAlong(query.get("along")),
      model: models.find((model) => model.slug === slug) ?? models[0], text: query.get("text") ?? EXAMPLE,
    };
    const parts = build(state);
    parts.showChanges();
    if (state.text) parts.showActivations();
    return { title: "Try a text", page: parts.page, leave: parts.leave };
  };

  function build(state) {
    const field = h("textarea", { id: "typed", rows: 4, maxlength: state.live.limits.text_characters, spellcheck: "false" });
    field.value = state.text;
    const choice = h("select", { id: "model" }, state.models.map((model) => h("option", { value: model.slug, selected: model === state.model }, model.title)));
    const seen = h("div", { class: "seen", "aria-live": "off" }), along = h("div", { class: "along" }), changes = h("div", { class: "changes" });
    const keepAddress = () => history.replaceState(null, "", cratelm.tryLink(state.model.slug, state.changes, field.value, state.along));
    // Only the answer to the latest request counts: an older one is about another text, model or neuron.
    let latestText = 0, latestAlong = 0, textShown = state.text;

    async function showActivations() {
      const number = ++latestText, { model } = state, text = field.value;
      keepAddress();
      seen.setAttribute("aria-busy", "true");
      try {
        const answer = await cratelm.api.post("activations", { model: model.slug, text, strongest: 5 });
        if (number !== latestText) return;
        textShown = text;
        seen.replaceChildren(...tokenList(answer, follow));
        say(`Activations of ${answer.tokens.length} tokens.`);
        showAlong();
      } catch (error) {
        if (number !== latestText) return;
        seen.replaceChildren(troubleBox(error));
        clearAlong();
      }
      seen.removeAttribute("aria-busy");
    }

    function clearAlong() {
      latestAlong += 1;
      along.replaceChildren();
    }

    /** Show a neuron along the text until another neuron is chosen. */
    async function follow(layer, neuron) {
      state.along = { layer, neuron };
      keepAddress();
      await showAlong();
      along.scrollIntoView({ block: "nearest" });
    }

    async function showAlong() {
      if (!state.along) return;
      const number = ++latestAlong, { model } = state, { layer, neuron } = state.along;
      let shown;
      try {
        const answer = await cratelm.api.post("activations", { model: model.slug, text: textShown, layer, neuron });
        shown = [...alongText(model, layer, neuron, answer, () => steerNeuron(layer, neuron), unfollow)];
      } catch (error) {
        shown = [troubleBox(error)];
      }
      if (number === latestAlong) along.replaceChildren(...shown);
    }

    function unfollow() {
      state.along = null;
      keepAddress();
      clearAlong();
    }

    function steerNeuron(layer, neuron) {
      const listed = state.changes.some((change) => change.layer === layer && change.neuron === neuron);
      if (!listed && state.changes.length < state.live.limits.changes) {
        state.changes.push({ layer, neuron, how: "set", strength: 2, ofMaximum: true });
      }
      showChanges();
      changes.scrollIntoView({ block: "nearest" });
      say(`Neuron ${neuron} of layer ${layer} is in the list of steered neurons.`);
    }

    const steering = cratelm.steering({ state, text: () => field.value });
    function showChanges() {
      keepAddress();
      const onChange = (rebuild) => { if (rebuild) showChanges(); else keepAddress(); steering.effectSoon(); };
      changes.replaceChildren(...changeRows(state, { onChange, steerNeuron, follow }, steering));
      steering.effectSoon();
    }

    /** Ignore every answer that is still under way. */
    function leave() {
      latestText += 1;
      clearAlong();
      steering.clear();
    }

    choice.addEventListener("change", () => {
      leave();
      state.model = state.models.find((model) => model.slug === choice.value);
      state.changes = [];
      state.along = null;
      seen.replaceChildren();
      showLimit();
      showChanges();
      showActivations();
    });
    const form = h("form", { class: "type" }, h("label", { for: "typed" }, "Text"), field,
      h("p", { class: "answer" }, h("label", { class: "field", for: "model" }, "Model ", choice), h("button", { class: "choice" }, "Show activations")));
    form.addEventListener("submit", (event) => { event.preventDefault(); showActivations(); steering.effectSoon(); });
    submitOnEnter(field, form);
    const limit = h("p", { class: "soft" });
    const showLimit = () => { limit.textContent = `The model reads at most ${state.live.contexts[state.model.slug]} tokens. Your text is sent to this server only.`; };
    showLimit();
    const page = h("div", { class: "try" }, h("h1", {}, "Try a text"), limit, form, seen, along,
      h("section", { "aria-labelledby": "steered" }, h("h2", { id: "steered" }, "Steer neurons"), changes, steering.results));
    return { page, showActivations, showChanges, leave };
  }

  /** Submit with Ctrl+Enter. */
  function submitOnEnter(field, form) {
    field.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); });
  }

  /** The tokens of the text, and the strongest neurons of each layer at the chosen token. */
  function* tokenList(answer, follow) {
    const below = h("div", { class: "strongest" });

    function showToken(at) {
      below.replaceChildren(h("h3", {}, "Strongest at ", chip(answer.tokens[at]), h("small", {}, `token ${at + 1} of ${answer.tokens.length}`)),
        h("div", { class: "layers-of" }, answer.layers.map((layer) => h("div", {}, h("h4", {}, `Layer ${layer.layer}`),
          layer.strongest[at].length ? h("ol", { class: "near" }, layer.strongest[at].map(([neuron, value]) => h("li", {},
            h("button", { type: "button", class: "plain", "aria-label": `Neuron ${neuron} of layer ${layer.layer}, ${digits(value)}: show it along the text`, on: { click: () => follow(layer.layer, neuron) } }, String(neuron)),
            h("span", { title: exact(value) }, digits(value, 2))))) : h("p", { class: "missing" }, "No neuron fires.")))));
    }

    const tokens = answer.tokens.map((text, at) => h("button", {
      type: "button", class: "token", title: "Strongest neurons of each layer at this token",
      on: { click: (event) => { for (const token of event.target.closest(".tokens").children) token.removeAttribute("aria-pressed"); event.currentTarget.setAttribute("aria-pressed", "true"); showToken(at); } },
    }, legible(text)));
    tokens.at(-1)?.setAttribute("aria-pressed", "true");
    yield h("h2", {}, "Tokens", h("small", {}, "choose a token to see which neurons fire on it"));
    yield h("div", { class: "tokens", dir: "ltr", translate: "no" }, tokens);
    yield below;
    showToken(answer.tokens.length - 1);
  }

  /** The text with the activations of one neuron as colours. */
  function* alongText(model, layer, neuron, answer, steerIt, close) {
    const tap = model.taps.find((one) => one.name === "neurons"), where = tap?.layers.find((one) => one.layer === layer);
    const values = Float32Array.from(answer.values), largest = values.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
    yield h("h3", {}, `Neuron ${neuron} of layer ${layer} along the text`);
    if (largest > 0) yield cratelm.excerpts.legend({ maximum: largest, minimum: values.reduce((a, b) => Math.min(a, b), 0) });
    else yield h("p", { class: "missing" }, "Its activation is 0 at every token.");
    yield cratelm.excerpts.excerptBox({ tokens: answer.tokens, values, document: "typed", position: 0 }, largest);
    yield h("p", { class: "gets" }, where && h("a", { class: "get", href: cratelm.routes.link({ model, tap, layer, folder: where.folder }, neuron) }, "Its page"),
      h("button", { type: "button", class: "get", on: { click: steerIt } }, "Steer it"), h("button", { type: "button", class: "get", on: { click: close } }, "Close"));
    say(`Neuron ${neuron} of layer ${layer} along the text; its largest activation is ${digits(largest)}.`);
  }

  /** One row per steered neuron, then the form that adds a neuron. */
  function* changeRows(state, actions, steering) {
    if (!state.changes.length) {
      yield h("p", { class: "missing" }, "No neuron is steered yet. Choose a token above, then a neuron, then “Steer it”; or enter a neuron:");
    }
    for (const change of state.changes) yield changeRow(state, change, actions);
    const first = state.along ?? { layer: 0, neuron: 0 };
    const layer = h("input", { type: "number", min: 0, value: first.layer, "aria-label": "Layer" }), neuron = h("input", { type: "number", min: 0, value: first.neuron, "aria-label": "Neuron" });
    const entered = () => [Number(layer.value), Number(neuron.value)];
    const add = h("form", { class: "add" }, h("span", { class: "field" }, "Layer ", layer), h("span", { class: "field" }, "neuron ", neuron),
      h("button", { class: "get" }, "Add"), h("button", { type: "button", class: "get", on: { click: () => add.reportValidity() && actions.follow(...entered()) } }, "Show it along the text"));
    add.addEventListener("submit", (event) => {
      event.preventDefault();
      actions.steerNeuron(...entered());
    });
    yield add;
    yield steering.controls;
  }

  function changeRow(state, change, { onChange, follow }) {
    const name = `neuron ${change.neuron} of layer ${change.layer}`;
    const how = h("select", { "aria-label": `How to change ${name}` }, Array.from(HOWS, ([value, text]) => h("option", { value, selected: change.how === value }, text)));
    how.addEventListener("change", () => {
      change.how = how.value;
      change.ofMaximum = change.how !== "scale";
      onChange(true);
    });
    const slider = h("input", { type: "range", min: change.how === "set" ? 0 : -5, max: change.how === "scale" ? 5 : 10, step: 0.1, value: change.strength, "aria-label": `Strength of ${name}` });
    const strength = h("output", {});
    const showStrength = () => { strength.textContent = change.ofMaximum ? `${digits(change.strength)} × its largest` : digits(change.strength); slider.setAttribute("aria-valuetext", strength.textContent); };
    slider.addEventListener("input", () => { change.strength = Number(slider.value); showStrength(); onChange(false); });
    showStrength();
    const remove = h("button", { type: "button", class: "get", "aria-label": `Remove ${name}`, on: { click: () => { state.changes.splice(state.changes.indexOf(change), 1); onChange(true); } } }, "Remove");
    return h("div", { class: "change", role: "group", "aria-label": name },
      h("b", {}, h("button", { type: "button", class: "plain", title: "Show it along the text", "aria-label": `Show ${name} along the text`, on: { click: () => follow(change.layer, change.neuron) } }, `${change.layer}/${change.neuron}`)), how, change.how !== "silence" && [slider, strength], remove);
  }

  /** On a neuron's page: a field to try a text of your own, and links to steer the neuron. */
  cratelm.live = cratelm.live ?? {};
  cratelm.live.live = (site, neuron) => {
    const { place } = neuron;
    if (place.tap.name !== "neurons") {
      return h("section", { "aria-labelledby": "live" }, h("h2", { id: "live" }, "Live"),
        h("p", { class: "missing" }, "Only the model's own neurons can be tried on a text and steered here. To steer latents of an autoencoder, use cratelm steer --sae."));
    }
    const { contexts, limits } = site.capabilities.live;
    if (!Object.hasOwn(contexts, place.model.slug)) return null;
    const strongest = neuron.excerpts.find((group) => group.kind === "top" && group.items.length)?.items[0];
    const text = strongest ? strongest.tokens.join("").slice(-400) : EXAMPLE;
    const along = { layer: place.layer, neuron: neuron.index }, changes = [{ ...along, how: "set", strength: 2, ofMaximum: true }];
    const field = h("textarea", { id: "own-text", rows: 2, maxlength: limits.text_characters, spellcheck: "false", placeholder: EXAMPLE });
    const form = h("form", { class: "type own" }, h("label", { for: "own-text" }, "This neuron on your text"), field,
      h("p", { class: "gets" }, h("button", { class: "get" }, "Show it along the text")));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      location.hash = cratelm.tryLink(place.model.slug, [], field.value || EXAMPLE, along);
    });
    submitOnEnter(field, form);
    return h("section", { "aria-labelledby": "live" }, h("h2", { id: "live" }, "Live"), form,
      h("p", { class: "gets" }, h("a", { class: "get", href: cratelm.tryLink(place.model.slug, changes, text, along) }, "Steer it on its strongest excerpt"),
        h("a", { class: "get", href: cratelm.tryLink(place.model.slug, changes, null, along) }, "Steer it on your text")));
  };
})();
