"use strict";
/* Where the page gets its data. Two sources give the same values under the same names:
   `static` loads data/NAME.js as a script, which works from disk; `served` asks a server for data/NAME.json. */

(() => {
  const { Trouble } = cratelm;
  const FORMAT_VERSION = 1;

  /** Chunks whose script is being loaded, and what it has said. @type {Map<string, {text: ?string}>} */
  const waiting = new Map();

  /** What every chunk calls. @param {string} name @param {string} text JSON */
  globalThis.cratelmChunk = (name, text) => {
    const own = waiting.get(name);
    if (own) own.text = text;
  };

  /** Called for one name at a time only. @returns {Promise<any>} */
  function loadScript(name) {
    return new Promise((resolve, reject) => {
      const own = { text: null };
      const remove = () => {
        waiting.delete(name);
        script.remove();
      };
      const script = document.createElement("script");
      waiting.set(name, own);
      script.src = `data/${name}.js`;
      script.onload = () => {
        // A script that ran has called; one that did not is no chunk, or is another one.
        remove();
        if (own.text === null) {
          reject(new Trouble(`data/${name}.js is there but holds something else.`, "Make the site anew: cratelm report RUN... --site"));
          return;
        }
        try {
          resolve(JSON.parse(own.text));
        } catch (error) {
          reject(new Trouble(`data/${name}.js holds no JSON (${error.message}).`, "Make the site anew: cratelm report RUN... --site"));
        }
      };
      script.onerror = () => {
        remove();
        reject(new Trouble(`data/${name}.js is missing or cannot be read.`,
          "Was the folder copied whole? Make the site anew, which only writes what is missing: cratelm report RUN... --site"));
      };
      document.head.append(script);
    });
  }

  async function loadJson(name) {
    let answer;
    try {
      answer = await fetch(`data/${name}.json`, { headers: { accept: "application/json" } });
    } catch {
      throw new Trouble("The server does not answer.", "Is cratelm serve still running? Start it and reload this page.");
    }
    if (!answer.ok) {
      const wait = answer.headers.get("retry-after");
      const said = wait ? await answer.json().then((value) => String(value.error)).catch(() => "The server is busy") : `The server has no data/${name} (${answer.status})`;
      throw new Trouble(`${said.charAt(0).toUpperCase()}${said.slice(1)}.`.replace(/\.\.$/, "."), wait ? `Try again in ${wait} s.` : "");
    }
    return answer.json();
  }

  const served = document.querySelector('meta[name="cratelm-source"]')?.content === "served";
  const load = served ? loadJson : loadScript;

  /** Chunks that are there, the last used at the end; the oldest are let go. */
  const held = new Map();
  const MOST_HELD = 60;
  /** Chunks that are on their way. Each is loaded once, however many ask for it, and none is let go before it is there. */
  const pending = new Map();
  const MOST_LOADING = 12;
  let loading = 0;
  const queue = [];

  /** Load when it is this one's turn: hundreds of scripts at once would keep a page that is opened meanwhile waiting. */
  async function inTurn(name) {
    if (loading >= MOST_LOADING) await new Promise((go) => { queue.push(go); });
    else loading += 1;
    try {
      return await load(name);
    } finally {
      const next = queue.pop(); // the newest first: it is for the page that is open now
      if (next) next();
      else loading -= 1;
    }
  }

  async function fetched(name) {
    const value = await inTurn(name);
    if (!(value.format_version <= FORMAT_VERSION)) {
      throw new Trouble(`data/${name} has format version ${value.format_version}, this page reads up to ${FORMAT_VERSION}.`,
        "Part of the folder was written by a newer cratelm. Make the site anew with it.");
    }
    return value;
  }

  /**
   * The value of a chunk. A failure is not remembered, so that a later try can succeed.
   * @param {string} name @returns {Promise<any>}
   */
  function chunk(name) {
    if (held.has(name)) {
      const found = held.get(name);
      held.delete(name);
      held.set(name, found);
      return found;
    }
    if (!pending.has(name)) {
      const found = fetched(name);
      pending.set(name, found);
      found.then(() => {
        held.set(name, found);
        if (held.size > MOST_HELD) held.delete(held.keys().next().value);
      }, () => {}).finally(() => pending.delete(name));
    }
    return pending.get(name);
  }

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const ARRAYS = { f32: Float32Array, u32: Uint32Array, u16: Uint16Array, u8: Uint8Array };

  /** A packed array: `{"f32": base64}`. */
  function unpack(packed) {
    const [kind, text] = Object.entries(packed)[0];
    return new ARRAYS[kind](bytes(text).buffer);
  }

  /** Activations of an excerpt: a bit for each token says which are not 0, then those. */
  function unpackSparse(text, length) {
    const all = bytes(text), values = new Float32Array(length), view = new DataView(all.buffer);
    let at = Math.ceil(length / 8);
    for (let i = 0; i < length; i += 1) {
      if (all[i >> 3] & (128 >> (i & 7))) {
        values[i] = view.getFloat32(at, true);
        at += 4;
      }
    }
    return values;
  }

  /** @typedef {{tokens: string[], values: Float32Array, document: number, position: number, interval: ?number, predicted: ?Float32Array}} Excerpt */

  /** An excerpt with the text of its tokens. @returns {Excerpt} */
  function excerpt(item, strings) {
    const tokens = Array.from(new Uint16Array(bytes(item.tokens).buffer), (number) => strings[number]);
    const { document, position, interval = null } = item;
    const predicted = item.predicted ? Float32Array.from(unpack({ u8: item.predicted.u8 }), (step) => (step / 255) * item.predicted.largest) : null;
    return { tokens, values: unpackSparse(item.values, tokens.length), document, position, interval, predicted };
  }

  /** Which models there are. */
  const site = () => chunk("site");
  const overview = () => chunk("overview");

  /** A chunk of a layer, refused where it belongs to another one. */
  async function own(place, name) {
    const value = await chunk(`${place.folder}/${name}`);
    if (value.of.model !== place.model.slug || value.of.tap !== place.tap.slug || value.of.layer !== place.layer) {
      throw new Trouble(`data/${place.folder}/${name} belongs to ${value.of.model}, ${value.of.tap}, layer ${value.of.layer}.`,
        "The site is being renewed, or was renewed only in part. Wait for it, then reload this page.");
    }
    return value;
  }

  /**
   * The numbers of a layer, unpacked: what is sorted, filtered and drawn.
   * @typedef {{place: any, neurons: number, sets: any[], explained: any[], status: string[], statistics: Object<string, Float32Array>}} Layer
   * @returns {Promise<Layer>}
   */
  async function layer(place) {
    const value = await own(place, "layer");
    if (!value.unpacked) {
      const words = (packed) => Array.from(unpack(packed), (code) => value.reasons[code]);
      value.unpacked = {
        place, neurons: value.neurons, textsEach: value.texts_each, neuronsEach: value.neurons_each,
        explained: value.explained, predicted: value.predicted, status: words(value.status),
        sets: value.sets.map((set) => ({ ...set, correlation: unpack(set.correlation), reason: words(set.reason) })),
        statistics: Object.fromEntries(Object.entries(value.statistics).map(([name, packed]) => [name, unpack(packed)])),
      };
    }
    return value.unpacked;
  }

  /** What a list shows of a neuron: its strongest tokens and its explanations. */
  async function texts(place, index, each) {
    const value = await own(place, `texts-${Math.floor(index / each)}`);
    const row = index - value.start;
    return { tokens: value.tokens[row], texts: value.texts[row].map(([text, sets]) => ({ text, sets })) };
  }

  /** All there is of a neuron. */
  async function neuron(place, index) {
    const numbers = await layer(place);
    if (!Number.isInteger(index) || index < 0 || index >= numbers.neurons) {
      throw new Trouble(`There is no neuron ${index} in this layer; it has neurons 0 to ${numbers.neurons - 1}.`);
    }
    const value = await own(place, `neurons-${Math.floor(index / numbers.neuronsEach)}`);
    const found = value.neurons[index - value.start];
    const excerpts = found.excerpts.map((group) => ({
      kind: group.kind, part: group.part, items: group.items.map((item) => excerpt(item, value.strings)),
    }));
    return { ...found, excerpts, place };
  }

  cratelm.data = { served, chunk, site, overview, layer, texts, neuron, unpack };
})();
