"use strict";
/* The frame around the pages: navigation, keys, theme and help. */

(() => {
  const { h, announce, storage, errorBox, PageError } = cratelm;
  const { parse, locate, link } = cratelm.routes;
  const main = document.getElementById("main");

  /**
   * The page that is shown. `keys` has the neurons for j and k, `key` handles other keys, `leave` runs before another page,
   * `placed` runs in the document, `position` returns what `placed` needs to restore the page after Back.
   */
  let shown = {}, visit = 0;
  /** Entry of the history -> scroll position and position in the page. */
  const positions = new Map();
  let entry = null;
  history.scrollRestoration = "manual";

  /** Pages with an address of one word. */
  const NAMED = new Set(["compare", "vote", "search", "try"]);
  const nameOf = ({ parts }) => (parts.length === 1 && NAMED.has(parts[0]) ? parts[0] : "");

  /** The page of an address. */
  async function pageOf(site, address) {
    const { pages } = cratelm, name = nameOf(address);
    if (!address.parts.length) return pages.overview(site);
    if (name) {
      if (!pages[name]) throw new PageError("These pages are files: they have no model for your text.", "Run: cratelm serve RUN...");
      return pages[name](site, address.query);
    }
    const { place, index } = locate(site, address.parts);
    return index === null ? pages.layer(site, place, address.query) : pages.neuron(site, place, index);
  }

  function errorPage(error) {
    return { title: "Error", page: h("div", {}, h("h1", {}, "This page cannot be shown"), errorBox(error), h("p", {}, h("a", { href: "#/" }, "To the overview"))) };
  }

  /** Position to restore: after Back and Forward, or when the list is opened again from one of its neurons. */
  function positionOf(address) {
    const { lastList } = cratelm;
    return positions.get(history.state?.entry ?? (lastList?.address === address ? lastList.entry : null));
  }

  async function route() {
    const number = ++visit, address = parse(location.hash), position = positionOf(location.hash);
    positions.set(entry, { y: scrollY, inPage: shown.position?.() });
    entry = history.state?.entry ?? `${performance.timeOrigin} ${number}`;
    history.replaceState({ entry }, "");
    const waiting = setTimeout(() => main.setAttribute("aria-busy", "true"), 150);
    const next = await cratelm.data.site().then((site) => pageOf(site, address)).catch(errorPage);
    clearTimeout(waiting);
    if (number !== visit) return;
    main.removeAttribute("aria-busy");
    cratelm.excerpts.hideTip();
    shown.leave?.();
    shown = next;
    main.replaceChildren(next.page);
    document.title = cratelm.text.visible(`${next.title} · cratelm`);
    for (const anchor of document.querySelectorAll("#pages a")) {
      anchor.removeAttribute("aria-current");
      if (anchor.getAttribute("href") === `#/${nameOf(address)}` && address.parts.length < 2) anchor.setAttribute("aria-current", "page");
    }
    next.placed?.(position?.inPage);
    if (number > 1) {
      scrollTo(0, position?.y ?? 0);
      main.focus({ preventScroll: true });
      announce(next.title);
    }
    performance.mark("cratelm-shown");
    main.dataset.shown = String(number);
  }

  const THEMES = ["auto", "light", "dark"];
  const theme = () => THEMES.find((name) => name === storage.getItem("cratelm.theme")) ?? "auto";
  function setTheme(name) {
    document.documentElement.dataset.theme = name;
    document.getElementById("theme").textContent = `Theme: ${name}`;
  }

  function nextTheme() {
    const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
    storage.setItem("cratelm.theme", next);
    setTheme(next);
    announce(`Theme: ${next}`);
  }

  const KEYS = [
    ["j, →", "next neuron, in the list you came from"], ["k, ←", "previous neuron"], ["u", "up: from a neuron to its layer, from a layer to the overview"],
    ["/", "search"], ["↑ ↓, Enter", "choose and open a neuron in a list"], ["Tab, then ↑ ↓ ← →", "choose an excerpt and read the values of its tokens"],
    ["1, 0, 2, n", "on the voting page: A, no difference, B, next pair"], ["t", "theme: light, dark or as the system"], ["?", "this help"],
  ];

  function help() {
    const dialog = document.getElementById("keys");
    dialog.replaceChildren(h("h2", { id: "keys-title" }, "Keys"),
      h("dl", {}, KEYS.map(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)])),
      h("form", { method: "dialog" }, h("button", { class: "choice" }, "Close")));
    dialog.showModal();
  }

  function up() {
    if (shown.keys) location.hash = cratelm.listLink(shown.keys.place);
    else if (parse(location.hash).parts.length) location.hash = "#/";
  }

  function open(index) {
    if (!shown.keys) return false;
    if (index === null) announce("This is the last neuron in this direction.");
    else location.hash = link(shown.keys.place, index);
    return true;
  }

  const next = () => open(shown.keys?.next), previous = () => open(shown.keys?.previous);
  const ACTIONS = new Map(Object.entries({
    j: next, ArrowRight: next, k: previous, ArrowLeft: previous, u: up, "/": () => document.getElementById("query").select(), "?": help, t: nextTheme,
    Escape: () => document.activeElement?.blur(),
  }));

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("keys").open) return;
    if (event.target.closest("input, select, textarea") && event.key !== "Escape") return;
    if (shown.key?.(event.key) || (ACTIONS.has(event.key) && ACTIONS.get(event.key)() !== false)) event.preventDefault();
  });
  document.getElementById("help").addEventListener("click", help);
  document.getElementById("theme").addEventListener("click", nextTheme);
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
  setTheme(theme());
  route();
})();
