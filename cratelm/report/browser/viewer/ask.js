"use strict";
/* On a neuron's page: ask the configured language model for an explanation. */

(() => {
  const { h, say, troubleBox } = cratelm;

  cratelm.live = cratelm.live ?? {};
  cratelm.live.explain = (site, neuron) => {
    const { place, index } = neuron, said = h("div", { "aria-live": "polite" });
    const button = h("button", { type: "button", class: "get", on: { click: ask } }, `Ask ${site.capabilities.explain.explainer}`);

    async function ask() {
      button.disabled = true;
      said.replaceChildren(h("p", { class: "loading" }, "Asking"));
      try {
        const found = await cratelm.api.post("explain", { model: place.model.slug, tap: place.tap.slug, layer: place.layer, neuron: index });
        said.replaceChildren(found.text ? h("p", { class: "said-of" }, cratelm.text.visible(found.text)) : h("p", { class: "missing" }, `No explanation: ${found.failure}`));
        say(found.text ? `Explanation: ${found.text}` : "The language model gave no explanation.");
      } catch (error) {
        said.replaceChildren(troubleBox(error));
      }
      button.disabled = false;
    }

    return h("section", { "aria-labelledby": "ask" }, h("h2", { id: "ask" }, "Explain it now"), h("p", { class: "gets" }, button), said);
  };
})();
