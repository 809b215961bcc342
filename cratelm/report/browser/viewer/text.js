"use strict";
/* Numbers, tokens and explanations as a person reads them. */

(() => {
  const { h } = cratelm;
  const INVISIBLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/u;
  const JOINERS = new Set(["\u200c", "\u200d"]);
  const SIGNS = { "\n": "↵", "\t": "⇥", "\r": "␍" };

  /** The sign that replaces an invisible or reordering character; empty for a visible character. */
  function sign(character) {
    if (!INVISIBLE.test(character) || JOINERS.has(character)) return "";
    return SIGNS[character] ?? `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  }

  /** Text on one line, with signs for invisible characters. */
  function visible(text) {
    return INVISIBLE.test(text) ? Array.from(text, (character) => sign(character) || character).join("") : text;
  }

  /** The same as nodes; the signs are elements, so that they can be styled. */
  function marked(text) {
    const nodes = [];
    for (const character of text) {
      const shown = sign(character);
      if (shown) nodes.push(h("b", {}, shown));
      else if (typeof nodes.at(-1) === "string") nodes.push(nodes.pop() + character);
      else nodes.push(character);
    }
    return nodes;
  }

  /** A token in a list: a token of spaces shows them as signs. */
  const legible = (token) => (/^ *$/.test(token) ? "␣".repeat(token.length) || "(empty)" : visible(token));

  /** Spaces that no letter follows become signs: up to four, or a sign with their number. */
  const spaced = (text) => text.replace(/ {2,}| +$/g, (run) => (run.length <= 4 ? "␣".repeat(run.length) : `␣×${run.length}`));

  /** A token as a chip; its leading space is faint. */
  function chip(token, attributes = {}) {
    const leading = /^ (?=[^ ])/.test(token);
    return h("span", { class: "chip", dir: "ltr", ...attributes },
      leading && h("i", {}, "␣"), spaced(leading ? visible(token.slice(1)) : legible(token)));
  }

  const minus = (text) => text.replace("-", "\u2212");
  const isMissing = (value) => value === null || value === undefined || Number.isNaN(value);
  const MISSING = "\u2013";

  /** A number with `count` significant digits, without an exponent for common sizes. */
  function digits(value, count = 3) {
    if (isMissing(value) || !Number.isFinite(value)) return MISSING;
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-4) return minus(value.toExponential(count - 1));
    const rounded = Number(value.toPrecision(count));
    return minus(Math.abs(rounded) >= 1000 ? rounded.toLocaleString("en") : String(rounded));
  }

  /** The shortest decimal number that gives this float32 again. */
  function exact(value) {
    const lengths = [6, 7, 8, 9].map((count) => value.toPrecision(count));
    return minus(String(Number(lengths.find((text) => Math.fround(Number(text)) === Math.fround(value)) ?? value)));
  }

  /** A correlation as points with one decimal. */
  function points(correlation) {
    if (isMissing(correlation)) return MISSING;
    const text = (100 * correlation).toFixed(1);
    return minus(Number(text) === 0 ? "0.0" : text);
  }

  /** A share in per cent. */
  function percent(share) {
    if (isMissing(share)) return MISSING;
    const value = 100 * share;
    return value === 0 ? "0" : value >= 0.1 ? value.toFixed(1) : digits(value, 1);
  }

  const count = (number) => number.toLocaleString("en");

  /** State of a neuron, or reason for a missing score -> sentence. */
  const STATES = new Map([
    ["scored", "Scored."],
    ["dead", "Dead: it never fired in the collected text."],
    ["too rare", "Too rare: it fired in fewer documents than the protocol needs to explain it and to score it."],
    ["constant activations", "Not scored: its activation is the same on every scored token, so no correlation is defined."],
    ["constant simulation", "Not scored: its explanation predicts the same on every scored token, so no correlation is defined."],
    ["not simulated", "Not scored: it was not simulated."],
    ["not scored", "Not scored yet."],
    ["no record", "No record: the imported files do not contain it."],
  ]);
  const state = (reason) => STATES.get(reason) ?? `Not scored: ${reason}.`;

  /** Explainer, simulator and sample of a set. */
  function madeBy(set) {
    return [set.explainer, set.simulator && `simulated by ${set.simulator}`, set.sample && `sample ${set.sample}`].filter(Boolean).join(", ");
  }

  const NUMBER = "[\\d.]+(?:e[+-]?\\d+)?";
  const LOOKUP = new RegExp(`^fires on (".+" \\(${NUMBER}\\))(?:; up to (${NUMBER}) on (\\d+) more tokens?)?; on nothing else$`, "su");
  const ENTRY = new RegExp(`"(.+?)" \\((${NUMBER})\\)(?:, (?=")|$)`, "gsu");

  /**
   * The table in the lookup explainer's sentence, `fires on " a" (3.2), "b" (2); up to 0.5 on 9 more tokens; on nothing else`.
   * @returns {?{tokens: {token: string, strength: number}[], more: number, below: number}} null for another text
   */
  function lookupTable(text) {
    const [, list, below = 0, more = 0] = LOOKUP.exec(text) ?? [];
    const tokens = Array.from((list ?? "").matchAll(ENTRY), ([, token, strength]) => ({ token, strength: Number(strength) }));
    return tokens.length ? { tokens, more: Number(more), below: Number(below) } : null;
  }

  /** An explanation: text, or for the lookup explainer its tokens (at most `most`) with a bar for each strength. */
  function explanation(text, { write = (strength) => digits(strength, 2), brief = false, most = Infinity } = {}) {
    const table = lookupTable(text);
    if (!table) return h("span", { class: "explanation" }, visible(text));
    const largest = table.tokens[0].strength, shown = table.tokens.slice(0, most), more = table.more + table.tokens.length - shown.length;
    return h("span", { class: "explanation lookup", "aria-label": `Fires on ${table.tokens.map(({ token, strength }) => `${token} ${write(strength)}`).join(", ")}` },
      shown.map(({ token, strength }) => h("span", { class: "strength", title: `mean activation ${write(strength)}` },
        chip(token), !brief && meter(strength / largest), !brief && h("small", {}, write(strength)))),
      more > 0 && h("small", {}, brief ? `+${more}` : `at most ${write(table.below)} on ${count(more)} other token${more > 1 ? "s" : ""}`));
  }

  /** Whether two explanations say nearly the same: most tokens of two lookup tables, or nearly all words of two texts. */
  function similar(a, b) {
    const tables = [lookupTable(a), lookupTable(b)], lookup = tables.every(Boolean);
    const words = [a, b].map((text, i) => new Set(lookup ? tables[i].tokens.map(({ token }) => token) : text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [text]));
    const shared = [...words[0]].filter((word) => words[1].has(word)).length;
    return shared >= (lookup ? 0.5 : 0.8) * Math.max(words[0].size, words[1].size);
  }

  /** A small bar of a share of 1. */
  function meter(share) {
    const inner = h("i", {});
    inner.style.width = `${Math.max(0, Math.round(100 * share))}%`;
    return h("span", { class: "meter", "aria-hidden": "true" }, inner);
  }

  cratelm.text = { visible, marked, legible, chip, digits, exact, points, percent, count, state, madeBy, lookupTable, explanation, similar, meter };
})();
