"use strict";
/* On a neuron's page: ask the configured language model for an explanation. */

(() => {
  const { h, section, announce, errorBox } = cratelm;

  cratelm.live.explain = (site, { place, index }) => {
    const result = h("div", { "aria-live": "polite" });
    const ask = cratelm.button(`Ask ${site.capabilities.explain.explainer}`, async () => {
      ask.disabled = true;
      result.replaceChildren(h("p", { class: "loading" }, "Waiting for the answer"));
      try {
        const { text, failure } = await cratelm.api.post("explain", { model: place.model.slug, tap: place.tap.slug, layer: place.layer, neuron: index });
        result.replaceChildren(text ? h("p", { class: "explanation" }, text) : h("p", { class: "missing" }, `No explanation: ${failure}`));
        announce(text ? `Explanation: ${text}` : "The language model gave no explanation.");
      } catch (error) {
        result.replaceChildren(errorBox(error));
      }
      ask.disabled = false;
    });
    return section("ask", "Explain it with a language model", h("p", { class: "gets" }, ask), result);
  };
})();
