"use strict";
/* Loads the site's data: as scripts data/NAME.js, which works from disk, or as data/NAME.json from a server. */

(() => {
  const { PageError } = cratelm;
  const FORMAT_VERSION = 1;
  const REBUILD = "Make the site again: cratelm report RUN... --site";

  /** Name of a chunk whose script is running -> function that takes its text. @type {Map<string, function(string): void>} */
  const receivers = new Map();

  /** Called by the script of every chunk. @param {string} name @param {string} text JSON */
  globalThis.cratelmChunk = (name, text) => receivers.get(name)?.(text);

  /** Load a chunk from disk. A name is loaded once at a time. @returns {Promise<any>} */
  async function loadScript(name) {
    const script = document.createElement("script");
    let text = null;
    receivers.set(name, (received) => { text = received; });
    script.src = `data/${name}.js`;
    const loaded = await new Promise((resolve) => {
      script.onload = () => resolve(true);
      script.onerror = () => resolve(false);
      document.head.append(script);
    });
    receivers.delete(name);
    script.remove();
    if (!loaded) throw new PageError(`data/${name}.js is missing or cannot be read.`, `Was the whole folder copied? ${REBUILD}`);
    // A script that did not call with this name is not this chunk.
    if (text === null) throw new PageError(`data/${name}.js exists but contains something else.`, REBUILD);
    try {
      return JSON.parse(text);
    } catch (error) {
      throw new PageError(`data/${name}.js is not JSON (${error.message}).`, REBUILD);
    }
  }

  async function loadJson(name) {
    return (await ask(`data/${name}.json`, { headers: { accept: "application/json" } })).json();
  }

  /** Send a request to the server. A failure is a `PageError` with the server's reason and the time to wait. */
  async function ask(address, options = {}) {
    const answer = await fetch(address, options).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new PageError("The server does not answer.", "Is cratelm serve still running? Start it again, then reload this page.");
    });
    if (answer.ok) return answer;
    const reason = await answer.json().then((value) => String(value.error)).catch(() => `The server answered ${answer.status} to ${address}`);
    const wait = answer.headers.get("retry-after");
    throw new PageError(`${reason.charAt(0).toUpperCase()}${reason.slice(1)}`.replace(/[^.!?]$/, "$&."), wait ? `Try again in ${wait} s.` : "");
  }

  const served = document.querySelector('meta[name="cratelm-source"]')?.content === "served";
  const load = served ? loadJson : loadScript;
  /** What follows a command that adds data. */
  const thenRefresh = served ? ", then reload this page." : ", then make the site again.";

  /** Promises of chunks, the last used at the end; the oldest are dropped. */
  const loaded = new Map();
  const MOST_LOADED = 60;
  /** Promises of chunks that are loading. Each chunk is loaded once, however many callers wait for it. */
  const pending = new Map();
  const MOST_LOADING = 12;
  let loading = 0;
  const queue = [];

  /** Load with a limit on parallel loads: hundreds of scripts at once would delay a page that is opened meanwhile. */
  async function loadInTurn(name) {
    if (loading >= MOST_LOADING) await new Promise((start) => { queue.push(start); });
    else loading += 1;
    try {
      return await load(name);
    } finally {
      const next = queue.pop(); // the newest request belongs to the page that is open now
      if (next) next();
      else loading -= 1;
    }
  }

  async function loadChecked(name) {
    const value = await loadInTurn(name);
    if (!(value.format_version <= FORMAT_VERSION)) {
      throw new PageError(`data/${name} has format version ${value.format_version}, this page reads up to ${FORMAT_VERSION}.`,
        `A newer cratelm wrote part of the folder. ${REBUILD}`);
    }
    return value;
  }

  /**
   * The value of a chunk. A failure is not cached, so that the next call tries again.
   * @param {string} name @returns {Promise<any>}
   */
  function chunk(name) {
    if (loaded.has(name)) {
      const promise = loaded.get(name);
      loaded.delete(name);
      loaded.set(name, promise);
      return promise;
    }
    if (!pending.has(name)) {
      const promise = loadChecked(name);
      pending.set(name, promise);
      promise.then(() => {
        loaded.set(name, promise);
        if (loaded.size > MOST_LOADED) loaded.delete(loaded.keys().next().value);
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

  /** Activations of an excerpt: one bit per token says whether it is not 0, then the values that are not 0. */
  function unpackSparse(text, length) {
    const all = bytes(text), view = new DataView(all.buffer);
    let at = Math.ceil(length / 8) - 4;
    return Float32Array.from({ length }, (_, i) => (all[i >> 3] & (128 >> (i & 7)) ? view.getFloat32(at += 4, true) : 0));
  }

  /** @typedef {{tokens: string[], values: Float32Array, document: number, position: number, interval: ?number, predicted: ?Float32Array}} Excerpt */

  /** An excerpt with the text of its tokens. @returns {Excerpt} */
  function excerpt({ tokens: packed, values, document, position, interval = null, predicted }, strings) {
    const tokens = Array.from(unpack({ u16: packed }), (number) => strings[number]);
    return {
      tokens, values: unpackSparse(values, tokens.length), document, position, interval,
      predicted: predicted ? Float32Array.from(unpack({ u8: predicted.u8 }), (step) => (step / 255) * predicted.largest) : null,
    };
  }

  /** Models, taps and layers of the site. */
  const site = () => chunk("site");
  const overview = () => chunk("overview");

  /** A chunk of a layer; an error if it belongs to another layer. */
  async function layerChunk(place, name) {
    const value = await chunk(`${place.folder}/${name}`), { model, tap, layer } = value.of;
    if (model !== place.model.slug || tap !== place.tap.slug || layer !== place.layer) {
      throw new PageError(`data/${place.folder}/${name} belongs to ${model}, ${tap}, layer ${layer}.`, "The site is being rebuilt, or was rebuilt only in part. Wait, then reload this page.");
    }
    return value;
  }

  /**
   * The numbers of a layer, unpacked: what is sorted, filtered and drawn.
   * @typedef {{place: any, neurons: number, sets: any[], explained: any[], status: string[], statistics: Object<string, Float32Array>}} Layer
   * @returns {Promise<Layer>}
   */
  async function layer(place) {
    const value = await layerChunk(place, "layer");
    const words = (packed) => Array.from(unpack(packed), (code) => value.reasons[code]);
    value.unpacked ??= {
      place, neurons: value.neurons, textsEach: value.texts_each, neuronsEach: value.neurons_each,
      explained: value.explained, predicted: value.predicted, status: words(value.status),
      sets: value.sets.map((set) => ({ ...set, correlation: unpack(set.correlation), reason: words(set.reason) })),
      statistics: Object.fromEntries(Object.entries(value.statistics).map(([name, packed]) => [name, unpack(packed)])),
    };
    return value.unpacked;
  }

  /** The strongest tokens of a neuron and its explanations, for lists. */
  async function texts(place, index, each) {
    const value = await layerChunk(place, `texts-${Math.floor(index / each)}`), row = index - value.start;
    return { tokens: value.tokens[row], texts: value.texts[row].map(([text, sets]) => ({ text, sets })) };
  }

  /** Everything about a neuron. */
  async function neuron(place, index) {
    const { neurons, neuronsEach } = await layer(place);
    if (!Number.isInteger(index) || index < 0 || index >= neurons) {
      throw new PageError(`This layer has no neuron ${index}; it has neurons 0 to ${neurons - 1}.`);
    }
    const value = await layerChunk(place, `neurons-${Math.floor(index / neuronsEach)}`), facts = value.neurons[index - value.start];
    const excerpts = facts.excerpts.map((group) => ({ ...group, items: group.items.map((item) => excerpt(item, value.strings)) }));
    return { ...facts, excerpts, place };
  }

  cratelm.data = { ask, thenRefresh, chunk, site, overview, layer, texts, neuron, unpack };
})();
