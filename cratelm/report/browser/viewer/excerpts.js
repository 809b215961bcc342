"use strict";
/* Excerpts: each token has the colour of its activation, and shows its exact value to pointer and keyboard. */

(() => {
  const { h, storage } = cratelm;
  const { marked, visible, exact, digits } = cratelm.text;
  const LEVELS = [1, 2, 3, 4, 5, 6, 7, 8];
  /** A token with more characters may be broken over two lines. */
  const LONG = 24;

  /** Shade of a token, 1 to 8, by its activation in units of the neuron's largest; warm above 0, blue below. */
  function shade(value, scale) {
    if (!value || !Number.isFinite(value) || !(scale > 0)) return "";
    const level = Math.min(LEVELS.length, Math.max(1, Math.ceil((LEVELS.length * Math.abs(value)) / scale)));
    return `${value > 0 ? "h" : "b"}${level}`;
  }

  /** The unit of the colours: the neuron's activation that is furthest from 0. */
  const scaleOf = (statistics) => Math.max(Math.abs(statistics.maximum ?? 0), Math.abs(statistics.minimum ?? 0));

  /** Excerpt of each box, and the function that writes its values. @type {WeakMap<Element, {excerpt: any, write: function(number): string}>} */
  const boxes = new WeakMap();

  /** The text of an excerpt on the colours of `values`. Lines break before the space of a token, not after it. */
  function colouredText(tokens, values, scale) {
    return tokens.map((text, i) => [/^ /.test(text) && h("wbr"), h("span", {
      class: [shade(values[i], scale), text.length > LONG && "long"].filter(Boolean).join(" ") || null, tabindex: "-1", data: { at: i },
    }, marked(text))]);
  }

  /** @param {any} excerpt @param {number} scale @param {function(number): string} [write] how a value is written */
  function excerptBox(excerpt, scale, write = exact) {
    const peak = peakOf(excerpt);
    const box = h("div", {
      class: "excerpt", dir: "ltr", role: "group", translate: "no",
      "aria-label": `Excerpt of document ${excerpt.document}; strongest on ${visible(excerpt.tokens[peak])}, ${write(excerpt.values[peak])}`,
    }, colouredText(excerpt.tokens, excerpt.values, scale));
    boxes.set(box, { excerpt, write });
    if (!excerpt.predicted) return box;
    // The same text on the colours of the prediction; hidden until the reader asks for it.
    return h("div", { class: "pair" }, box, h("div", { class: "excerpt predicted", dir: "ltr", translate: "no", "aria-hidden": "true" },
      colouredText(excerpt.tokens, excerpt.predicted, scale)));
  }

  const peakOf = ({ values }) => values.reduce((peak, value, i) => (value > values[peak] ? i : peak), 0);

  /**
   * Excerpts, maybe with headings between them. Together they are one tab stop: left and right arrows walk along the tokens
   * of an excerpt, up and down arrows go to the strongest token of another excerpt.
   */
  function excerptList(...children) {
    const list = h("div", { class: "excerpts", role: "group", "aria-label": "Excerpts: up and down choose one, left and right read its tokens" }, children);
    const all = Array.from(list.querySelectorAll(".excerpt")).filter((box) => boxes.has(box));
    const tokenOf = (box, at = peakOf(boxes.get(box).excerpt)) => box.querySelector(`[data-at="${at}"]`);
    if (all.length) tokenOf(all[0]).tabIndex = 0;

    /** The token of an event, its box and its place. */
    function target(event) {
      const token = event.target.closest("[data-at]"), box = token?.closest(".excerpt");
      return boxes.has(box) ? { token, box, at: Number(token.dataset.at), ...boxes.get(box) } : null;
    }
    list.addEventListener("pointerover", (event) => {
      const over = target(event);
      if (over) showTip(over);
      else hideTip();
    });
    list.addEventListener("pointerleave", hideTip);
    list.addEventListener("focusout", hideTip);
    list.addEventListener("focusin", (event) => {
      const focused = target(event);
      if (!focused) return;
      for (const token of list.querySelectorAll('[tabindex="0"]')) token.tabIndex = -1;
      focused.token.tabIndex = 0;
      focused.token.setAttribute("aria-label", [focused.excerpt.tokens[focused.at], ...valuesAt(focused)].map(visible).join(" "));
      showTip(focused);
    });
    list.addEventListener("keydown", (event) => {
      const focused = target(event);
      if (!focused || event.ctrlKey || event.metaKey || event.altKey) return;
      const { box, at, excerpt } = focused, last = excerpt.tokens.length - 1, along = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
      const other = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (along === undefined && other === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      const next = other ? all[all.indexOf(box) + other] : box;
      if (next) tokenOf(next, other ? undefined : Math.min(Math.max(along, 0), last)).focus();
    });
    return list;
  }

  const valuesAt = ({ excerpt, at, write }) => [write(excerpt.values[at]), ...(excerpt.predicted ? [`predicted ${digits(excerpt.predicted[at])}`] : [])];

  function showTip(target) {
    const tip = document.getElementById("tip"), [value, predicted] = valuesAt(target);
    tip.replaceChildren(h("b", {}, target.excerpt.tokens[target.at]), h("span", {}, value), predicted ? h("i", {}, predicted) : "");
    tip.hidden = false;
    const token = target.token.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const left = Math.min(Math.max(token.left + token.width / 2 - size.width / 2, 6), innerWidth - size.width - 6);
    const above = token.top - size.height - 6;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 4 ? above : token.bottom + 6) + scrollY}px`;
  }

  function hideTip() {
    document.getElementById("tip").hidden = true;
  }

  /** A switch that shows predictions below the excerpts; remembered. */
  function predictionSwitch(maker) {
    const apply = (on) => document.documentElement.classList.toggle("predicts", on);
    const box = h("input", { type: "checkbox", checked: storage.getItem("cratelm.predicted") === "yes", on: {
      change: () => {
        storage.setItem("cratelm.predicted", box.checked ? "yes" : "no");
        apply(box.checked);
      },
    } });
    apply(box.checked);
    return h("label", { class: "predictions" }, box, ` Show what the explanation predicts below each scored excerpt (${maker})`);
  }

  /** The scale of the colours, in the neuron's units by default. */
  function legend(statistics, write = exact, unit = "in the model's units; a token without colour is 0") {
    const scale = scaleOf(statistics);
    const steps = (letter, levels) => h("span", { class: "scale", "aria-hidden": "true" }, levels.map((level) => h("i", { class: `${letter}${level}` })));
    return h("p", { class: "legend" },
      statistics.minimum < 0 && [h("span", {}, write(-scale)), steps("b", LEVELS.toReversed())],
      h("span", {}, "0"), steps("h", LEVELS), h("span", {}, write(scale)), h("span", { class: "soft" }, unit));
  }

  cratelm.excerpts = { excerptBox, excerptList, predictionSwitch, legend, scaleOf, shade, hideTip };
})();
