"use strict";
/* Try a text: the strongest neurons of every layer at each token, one neuron along the text, and steering.
   The address holds the model, the text, the changes and the neuron shown along the text, so it can be shared. */

(() => {
  const { h, section, button, select, announce, PageError, errorBox } = cratelm;
  const { chip, digits, exact, legible, meter } = cratelm.text;
  const METHODS = new Map([["set", "set to"], ["add", "add"], ["scale", "scale by"], ["silence", "silence"]]);
  const EXAMPLE = "The quick brown fox jumps over the lazy dog.";
  const TO_TEXT = "Show it along the text";

  /** Parse changes such as `1/85:set:2x`. */
  function readChanges(text) {
    return (text ?? "").split(",").map((part) => /^(\d+)\/(\d+)(?::(set|add|scale|silence)(?::(-?[\d.]+)(x?))?)?$/.exec(part)).filter(Boolean)
      .map(([, layer, neuron, how = "set", number = "1", unit = "x"]) => ({
        layer: Number(layer), neuron: Number(neuron), how, strength: Number(number), ofMaximum: how !== "scale" && unit === "x",
      }));
  }

  const writeChange = ({ layer, neuron, how, strength, ofMaximum }) => `${layer}/${neuron}:${how}${how === "silence" ? "" : `:${strength}${ofMaximum ? "x" : ""}`}`;
  /** The change of a neuron that is added to the list: twice its largest activation. */
  const firstChange = ({ layer, neuron }) => ({ layer, neuron, how: "set", strength: 2, ofMaximum: true });

  /** Parse `1/85`, the neuron shown along the text. @returns {?{layer: number, neuron: number}} */
  function readAlong(text) {
    const [, layer, neuron] = /^(\d+)\/(\d+)$/.exec(text ?? "") ?? [];
    return neuron === undefined ? null : { layer: Number(layer), neuron: Number(neuron) };
  }

  /** The address of this page with everything that it shows. */
  function tryLink(model, changes = [], text = null, along = null) {
    const query = new URLSearchParams({ model });
    if (text !== null) query.set("text", text);
    if (along) query.set("along", `${along.layer}/${along.neuron}`);
    if (changes.length) query.set("steer", changes.map(writeChange).join(","));
    return `#/try?${query}`;
  }

  cratelm.pages.try = async (site, query) => {
    const live = site.capabilities.live;
    if (!live) throw new PageError("No model is loaded: the runs of this server have no model files.", "Run: cratelm serve RUN... with runs that have a folder model, or were collected from a Hugging Face model.");
    const models = site.models.filter((model) => Object.hasOwn(live.contexts, model.slug)), slug = query.get("model");
    if (slug && !models.some((model) => model.slug === slug)) {
      throw new PageError(`There is no model ${slug} to try a text on.`, `Models: ${models.map((model) => model.slug).join(", ")}. A run without its folder model can only be browsed.`);
    }
    const state = {
      live, models, changes: readChanges(query.get("steer")).slice(0, live.limits.changes), along: readAlong(query.get("along")),
      model: models.find((model) => model.slug === slug) ?? models[0], text: query.get("text") ?? EXAMPLE,
    };
    const { page, leave, showChanges, showActivations } = build(state);
    showChanges();
    if (state.text) showActivations();
    return { title: "Try a text", page, leave };
  };

  function build(state) {
    const field = textField("typed", 4, state.live.limits.text_characters);
    field.value = state.text;
    const activations = h("div", { class: "activations", "aria-live": "off" }), along = h("div", { class: "along" }), changes = h("div", { class: "changes" });
    const updateAddress = () => cratelm.routes.setAddress(tryLink(state.model.slug, state.changes, field.value, state.along));
    // Only the answer to the latest request counts: an older one is about another text, model or neuron.
    let latestText = 0, latestAlong = 0, textShown = state.text;

    async function showActivations() {
      const number = ++latestText, { model } = state, text = field.value;
      updateAddress();
      activations.setAttribute("aria-busy", "true");
      try {
        const answer = await cratelm.api.post("activations", { model: model.slug, text, strongest: 5 });
        if (number !== latestText) return;
        textShown = text;
        activations.replaceChildren(...tokenList(answer, follow));
        announce(`Activations of ${answer.tokens.length} tokens.`);
        showAlong();
      } catch (error) {
        if (number !== latestText) return;
        activations.replaceChildren(errorBox(error));
        clearAlong();
      }
      activations.removeAttribute("aria-busy");
    }

    function clearAlong() {
      latestAlong += 1;
      along.replaceChildren();
    }

    /** Show a neuron along the text until another neuron is chosen. */
    async function follow(neuron) {
      state.along = neuron;
      updateAddress();
      await showAlong();
      along.scrollIntoView({ block: "nearest" });
    }

    async function showAlong() {
      if (!state.along) return;
      const number = ++latestAlong, { model, along: chosen } = state;
      const shown = await alongText(model, chosen, textShown, () => steerNeuron(chosen), unfollow).catch(errorBox);
      if (number === latestAlong) along.replaceChildren(shown);
    }

    function unfollow() {
      state.along = null;
      updateAddress();
      clearAlong();
    }

    function steerNeuron({ layer, neuron }) {
      const isListed = state.changes.some((change) => change.layer === layer && change.neuron === neuron);
      if (!isListed && state.changes.length < state.live.limits.changes) state.changes.push(firstChange({ layer, neuron }));
      showChanges();
      changes.scrollIntoView({ block: "nearest" });
      announce(`Neuron ${neuron} of layer ${layer} is in the list of steered neurons.`);
    }

    const steering = cratelm.steering({ state, text: () => field.value });
    function showChanges() {
      updateAddress();
      const onChange = (rebuild) => { if (rebuild) showChanges(); else updateAddress(); steering.effectSoon(); };
      changes.replaceChildren(...changeRows(state, { onChange, steerNeuron, follow }, steering));
      steering.effectSoon();
    }

    /** Ignore every answer that is still under way. */
    function leave() {
      latestText += 1;
      clearAlong();
      steering.clear();
    }

    const limit = h("p", { class: "soft" });
    const showLimit = () => { limit.textContent = `The model reads at most ${state.live.contexts[state.model.slug]} tokens. Your text is sent to this server only.`; };
    showLimit();
    function chooseModel(i) {
      leave();
      Object.assign(state, { model: state.models[i], changes: [], along: null });
      activations.replaceChildren();
      showLimit();
      showChanges();
      showActivations();
    }
    const models = select(state.models.map(({ title }) => title), state.models.indexOf(state.model), chooseModel);
    const form = textForm({ class: "type" }, () => { showActivations(); steering.effectSoon(); }, h("label", { for: "typed" }, "Text"), field,
      h("p", { class: "answer" }, h("label", { class: "field" }, "Model ", models), h("button", { class: "choice" }, "Show activations")));
    const page = h("div", { class: "try" }, h("h1", {}, "Try a text"), limit, form, activations, along,
      section("steered", "Steer neurons", changes, steering.results));
    return { page, showActivations, showChanges, leave };
  }

  const textField = (id, rows, maxlength) => h("textarea", { id, rows, maxlength, spellcheck: "false", placeholder: EXAMPLE });

  /** A form that its button and Ctrl+Enter submit. */
  function textForm(attributes, submit, ...children) {
    return h("form", { ...attributes, on: {
      submit: (event) => { event.preventDefault(); submit(); },
      keydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.currentTarget.requestSubmit(); },
    } }, children);
  }

  /** The tokens of the text, and the strongest neurons of each layer at the chosen token. */
  function* tokenList(answer, follow) {
    const strongest = h("div", { class: "strongest" });
    const tokens = answer.tokens.map((text, at) => h("button", { type: "button", class: "token", title: "Strongest neurons of each layer at this token", on: { click: () => showToken(at) } }, legible(text)));

    /** One row per neuron; bars are relative to the strongest of the layer at this token. */
    function neuronRow(layer, [neuron, value], largest) {
      return h("li", {}, button(neuron, () => follow({ layer, neuron }), { class: "plain", "aria-label": `Neuron ${neuron} of layer ${layer}, ${digits(value)}: show it along the text` }),
        meter(value / largest), h("span", { title: exact(value) }, digits(value, 2)));
    }

    function showToken(at) {
      tokens.forEach((token, i) => token.setAttribute("aria-pressed", String(i === at)));
      strongest.replaceChildren(h("h3", {}, "Strongest at ", chip(answer.tokens[at]), h("small", {}, `token ${at + 1} of ${answer.tokens.length}`)),
        h("div", { class: "layers-of" }, answer.layers.map((layer) => h("div", {}, h("h4", {}, `Layer ${layer.layer}`),
          layer.strongest[at].length ? h("ol", { class: "rows" }, layer.strongest[at].map((entry, _, all) => neuronRow(layer.layer, entry, all[0][1]))) : h("p", { class: "missing" }, "No neuron fires.")))));
    }

    yield h("h2", {}, "Tokens", h("small", {}, "choose a token to see which neurons fire on it"));
    yield h("div", { class: "tokens", dir: "ltr", translate: "no" }, tokens);
    yield strongest;
    showToken(answer.tokens.length - 1);
  }

  /** The text on the colours of one neuron, in units of its largest recorded activation, as on the neuron's page. */
  async function alongText(model, { layer, neuron }, text, steer, close) {
    const answer = await cratelm.api.post("activations", { model: model.slug, text, layer, neuron });
    const values = Float32Array.from(answer.values), { extent } = cratelm.charts, { excerptBox, excerptList, legend, scaleOf } = cratelm.excerpts;
    const tap = model.taps.find(({ name }) => name === "neurons"), recorded = tap?.layers.find((entry) => entry.layer === layer);
    const place = recorded && { model, tap, ...recorded }, known = place && (await cratelm.data.neuron(place, neuron)).statistics;
    const [lowest, highest] = extent(values), statistics = known?.maximum ? known : { maximum: highest, minimum: lowest };
    announce(`Neuron ${neuron} of layer ${layer} along the text; its largest activation here is ${digits(highest)}.`);
    return h("div", {}, h("h3", {}, `Neuron ${neuron} of layer ${layer} along the text`),
      legend(statistics, exact, "from 0 to the neuron's largest activation; a token without colour is 0"),
      highest === 0 && lowest === 0 && h("p", { class: "missing" }, "Its activation is 0 at every token."),
      excerptList(excerptBox({ tokens: answer.tokens, values, document: "typed", position: 0 }, scaleOf(statistics))),
      h("p", { class: "gets" }, place && h("a", { class: "get", href: cratelm.routes.link(place, neuron) }, "Its page"), button("Steer it", steer), button("Close", close)));
  }

  /** One row per steered neuron, then the form that adds a neuron. */
  function* changeRows(state, actions, steering) {
    if (!state.changes.length) {
      yield h("p", { class: "missing" }, "No neuron is steered yet. Choose a token above, then a neuron, then “Steer it”; or enter a neuron:");
    }
    for (const change of state.changes) yield changeRow(state, change, actions);
    const first = state.along ?? { layer: 0, neuron: 0 };
    const [layer, neuron] = ["Layer", "Neuron"].map((name) => h("input", { type: "number", min: 0, value: first[name.toLowerCase()], "aria-label": name }));
    const entered = () => ({ layer: Number(layer.value), neuron: Number(neuron.value) });
    const add = textForm({ class: "add" }, () => actions.steerNeuron(entered()), h("span", { class: "field" }, "Layer ", layer), h("span", { class: "field" }, "neuron ", neuron),
      h("button", { class: "get" }, "Add"), button(TO_TEXT, () => add.reportValidity() && actions.follow(entered())));
    yield add;
    yield steering.controls;
  }

  function changeRow(state, change, { onChange, follow }) {
    const name = `neuron ${change.neuron} of layer ${change.layer}`, methods = [...METHODS.keys()];
    const method = select([...METHODS.values()], methods.indexOf(change.how), (i) => {
      Object.assign(change, { how: methods[i], ofMaximum: methods[i] !== "scale" });
      onChange(true);
    }, { "aria-label": `How to change ${name}` });
    const strength = h("output", {});
    const slider = h("input", { type: "range", min: change.how === "set" ? 0 : -5, max: change.how === "scale" ? 5 : 10, step: 0.1, value: change.strength, "aria-label": `Strength of ${name}`, on: {
      input: () => { change.strength = Number(slider.value); showStrength(); onChange(false); },
    } });
    const showStrength = () => { strength.textContent = change.ofMaximum ? `${digits(change.strength)} × its largest` : digits(change.strength); slider.setAttribute("aria-valuetext", strength.textContent); };
    showStrength();
    return h("div", { class: "change", role: "group", "aria-label": name },
      h("b", {}, button(`${change.layer}/${change.neuron}`, () => follow(change), { class: "plain", title: TO_TEXT, "aria-label": `Show ${name} along the text` })),
      method, change.how !== "silence" && [slider, strength],
      button("Remove", () => { state.changes.splice(state.changes.indexOf(change), 1); onChange(true); }, { "aria-label": `Remove ${name}` }));
  }

  /** On a neuron's page: a field for a text, and links to steer the neuron. */
  cratelm.live.live = (site, neuron) => {
    const { place } = neuron, title = "Try and steer";
    if (place.tap.name !== "neurons") {
      return section("live", title, h("p", { class: "missing" }, "Only the model's own neurons can be tried on a text and steered here. To steer latents of an autoencoder, use cratelm steer --sae."));
    }
    const { contexts, limits } = site.capabilities.live;
    if (!Object.hasOwn(contexts, place.model.slug)) return null;
    const strongest = neuron.excerpts.find((group) => group.kind === "top" && group.items.length)?.items[0];
    const text = strongest ? strongest.tokens.join("").slice(-400) : EXAMPLE, along = { layer: place.layer, neuron: neuron.index };
    const field = textField("own-text", 2, limits.text_characters), steerLink = (name, example) =>
      h("a", { class: "get", href: tryLink(place.model.slug, [firstChange(along)], example, along) }, name);
    return section("live", title,
      textForm({ class: "type small" }, () => { location.hash = tryLink(place.model.slug, [], field.value || EXAMPLE, along); },
        h("label", { for: "own-text" }, "This neuron on your text"), field, h("p", { class: "gets" }, h("button", { class: "get" }, TO_TEXT))),
      h("p", { class: "gets" }, steerLink("Steer it on its strongest excerpt", text), steerLink("Steer it on your text", null)));
  };
})();
