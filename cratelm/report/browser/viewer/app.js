"use strict";
/* The frame round the pages: which one is shown, keys, theme, help. */

(() => {
  const { h, say, memory, troubleBox } = cratelm;
  const { parse, locate, link, named, places } = cratelm.routes;
  const main = document.getElementById("main");

  /** What the page shown answers to: `keys` of a neuron, `key` for keys of its own, and `leave` when another comes. */
  let shown = {}, visit = 0, first = true;

  /** Where one is: model, tap, layer and neuron, each a link or a choice. */
  cratelm.crumbs = (site, place, index = null) => {
    const all = places(site);
    const layers = h("select", { "aria-label": "Model and layer", on: { change: (event) => { location.hash = link(all[Number(event.target.value)]); } } },
      all.map((one, i) => h("option", { value: i, selected: one.folder === place.folder }, named(one))));
    return h("nav", { class: "crumbs", "aria-label": "Where you are" }, h("a", { href: "#/" }, "Overview"), h("span", { "aria-hidden": "true" }, "›"), layers,
      index !== null && [h("span", { "aria-hidden": "true" }, "›"), h("a", { href: trailLink(place) }, "all its neurons")]);
  };

  /** The list that one came from, with its filters. */
  const trailLink = (place) => (cratelm.trail?.folder === place.folder && cratelm.trail.address) || link(place);

  /** The page of an address. */
  async function pageOf(site, { parts, query }) {
    const { pages } = cratelm;
    if (!parts.length) return pages.overview(site);
    if (parts.length === 1 && Object.hasOwn(alone, parts[0])) return alone[parts[0]](site, query);
    const { place, index } = locate(site, parts);
    return index === null ? pages.layer(site, place, query) : pages.neuron(site, place, index);
  }
  const alone = {
    compare: (site, query) => cratelm.pages.compare(site, query),
    vote: (site) => cratelm.pages.vote(site),
    search: (site, query) => cratelm.pages.search(site, query),
    try: (site, query) => {
      if (!cratelm.pages.try) throw new cratelm.Trouble("A folder of pages has no model to try a text on.", "Run: cratelm serve RUN...");
      return cratelm.pages.try(site, query);
    },
  };

  async function route() {
    const own = ++visit, address = parse(location.hash);
    const waiting = setTimeout(() => main.setAttribute("aria-busy", "true"), 150);
    let found;
    try {
      const site = await cratelm.data.site();
      found = await pageOf(site, address);
    } catch (error) {
      found = { title: "Not here", page: h("div", {}, h("h1", {}, "This page cannot be shown"), troubleBox(error), h("p", {}, h("a", { href: "#/" }, "To the overview"))) };
    }
    clearTimeout(waiting);
    if (own !== visit) return;
    main.removeAttribute("aria-busy");
    cratelm.excerpts.hideTip();
    shown.leave?.();
    shown = found;
    main.replaceChildren(found.page);
    found.placed?.();
    document.title = cratelm.text.visible(`${found.title} · cratelm`);
    for (const one of document.querySelectorAll("#pages a")) {
      const current = one.getAttribute("href") === `#/${address.parts.length === 1 && Object.hasOwn(alone, address.parts[0]) ? address.parts[0] : ""}` && address.parts.length < 2;
      if (current) one.setAttribute("aria-current", "page");
      else one.removeAttribute("aria-current");
    }
    if (!first) {
      scrollTo(0, 0);
      main.focus({ preventScroll: true });
      say(found.title);
    }
    first = false;
    performance.mark("cratelm-shown");
    main.dataset.shown = String(own);
  }

  const THEMES = ["auto", "light", "dark"];
  function setTheme(name) {
    if (name === "auto") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.dataset.theme = name;
    document.getElementById("theme").textContent = `Theme: ${name}`;
    document.querySelector('meta[name="color-scheme"]').content = name === "auto" ? "light dark" : name;
  }

  const KEYS = [
    ["j, →", "next neuron, in the list you came from"], ["k, ←", "previous neuron"], ["u", "up: from a neuron to its layer, from a layer to the overview"],
    ["/", "search"], ["↑ ↓, Enter", "choose and open a neuron in a list"], ["Tab, then ← →", "walk along the tokens of an excerpt and read their values"],
    ["1, 0, 2, n", "on the voting page: left, no difference, right, next pair"], ["t", "light, dark or as the system"], ["?", "this help"],
  ];

  function help() {
    const dialog = document.getElementById("keys");
    dialog.replaceChildren(h("h2", { id: "keys-title" }, "Keys"),
      h("dl", {}, KEYS.map(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)])),
      h("form", { method: "dialog" }, h("button", { class: "choice" }, "Close")));
    dialog.showModal();
  }

  function turnTheme() {
    const now = memory.read("theme") ?? "auto", next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
    memory.write("theme", next);
    setTheme(next);
    say(`Theme: ${next}`);
  }

  function up() {
    const { parts } = parse(location.hash);
    if (shown.keys) location.hash = trailLink(shown.keys.place);
    else if (parts.length) location.hash = "#/";
  }

  function go(to) {
    if (!shown.keys) return false;
    if (to === null) say("There is no further neuron in this list.");
    else location.hash = link(shown.keys.place, to);
    return true;
  }

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("keys").open) return;
    if (event.target.closest("input, select, textarea") && event.key !== "Escape") return;
    if (shown.key?.(event.key)) {
      event.preventDefault();
      return;
    }
    const actions = {
      j: () => go(shown.keys?.next), ArrowRight: () => go(shown.keys?.next), k: () => go(shown.keys?.previous), ArrowLeft: () => go(shown.keys?.previous),
      u: up, "/": () => document.getElementById("query").select(), "?": help, t: turnTheme, Escape: () => document.activeElement?.blur(),
    };
    if (!Object.hasOwn(actions, event.key) || actions[event.key]() === false) return;
    event.preventDefault();
  }

  document.addEventListener("keydown", pressed);
  document.getElementById("help").addEventListener("click", help);
  document.getElementById("theme").addEventListener("click", turnTheme);
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  document.getElementById("find").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = document.getElementById("query").value.trim();
    if (question) location.hash = `#/search?q=${encodeURIComponent(question)}`;
  });
  addEventListener("hashchange", route);
  setTheme(THEMES.includes(memory.read("theme")) ? memory.read("theme") : "auto");
  route();
})();
