"use strict";
/* Drawings from numbers: bars, and points of two quantities. Colours come from the style sheet. */

(() => {
  const { s } = cratelm;
  const { digits } = cratelm.text;
  const MARGIN = { left: 54, right: 10, top: 12, bottom: 38 };

  const narrow = () => innerWidth < 640;

  /** An empty drawing with room for axes, wide or narrow as the screen is. */
  function frame(label, height = 220, small = false) {
    const width = small || narrow() ? 330 : 480;
    const drawing = s("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label });
    const box = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    return { drawing, box };
  }

  /** Round numbers that cover a range. */
  function ticks(low, high, wanted = 5) {
    const raw = (high - low) / wanted || 1;
    const size = 10 ** Math.floor(Math.log10(raw));
    const step = size * [1, 2, 5, 10].find((factor) => factor * size >= raw);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(k * step);
    return found;
  }

  function axisX(drawing, box, marks, title) {
    drawing.append(s("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" }));
    for (const { x, text } of marks) {
      drawing.append(
        s("line", { x1: x, x2: x, y1: box.bottom, y2: box.bottom + 4, class: "axis" }),
        s("text", { x, y: box.bottom + 16, "text-anchor": "middle", class: "tick" }, text),
      );
    }
    drawing.append(s("text", { x: (box.left + box.right) / 2, y: box.bottom + 33, "text-anchor": "middle", class: "label" }, title));
  }

  function axisY(drawing, box, marks, title) {
    for (const { y, text } of marks) {
      drawing.append(
        s("line", { x1: box.left, x2: box.right, y1: y, y2: y, class: "grid" }),
        s("text", { x: box.left - 6, y: y + 3.5, "text-anchor": "end", class: "tick" }, text),
      );
    }
    const x = 11, y = (box.top + box.bottom) / 2;
    drawing.append(s("text", { x, y, transform: `rotate(-90 ${x} ${y})`, "text-anchor": "middle", class: "label" }, title));
  }

  /**
   * Bars next to each other.
   * @param {{from: number, to: number, count: number, text: string, kind?: string}[]} bars in units of the horizontal axis
   * @param {{label: string, x: string, y: string, marks?: {at: number, text: string}[], root?: boolean, small?: boolean}} told
   */
  function bars(bars, told) {
    const { drawing, box } = frame(told.label, 220, told.small);
    const low = bars[0].from, high = bars[bars.length - 1].to;
    const most = Math.max(1, ...bars.map((bar) => bar.count));
    // The root of a count lets one neuron or token be seen beside thousands.
    const scale = (count) => (told.root ? Math.sqrt(count / most) : count / most);
    const x = (value) => box.left + ((value - low) / (high - low)) * (box.right - box.left);
    const y = (count) => box.bottom - scale(count) * (box.bottom - box.top);
    const levels = told.root ? rootTicks(most) : ticks(0, most, 4).filter(Number.isInteger);
    axisY(drawing, box, levels.map((count) => ({ y: y(count), text: digits(count) })), told.y);
    for (const bar of bars) {
      if (!bar.count) continue;
      const top = Math.min(y(bar.count), box.bottom - 1);
      const shape = s("rect", {
        x: x(bar.from) + 0.5, y: top, width: Math.max(x(bar.to) - x(bar.from) - 1, 0.5), height: box.bottom - top,
        class: bar.kind ?? "bar",
      }, s("title", {}, bar.text));
      drawing.append(shape);
    }
    const marks = told.marks ?? ticks(low, high).map((at) => ({ at, text: digits(at) }));
    axisX(drawing, box, marks.map(({ at, text }) => ({ x: x(at), text })), told.x);
    return drawing;
  }

  /** 0 and some powers of ten below the largest count. */
  function rootTicks(most) {
    const found = [0];
    for (let level = 10 ** Math.floor(Math.log10(most)); level >= most / 200 && level >= 1; level /= 10) found.push(level);
    return found;
  }

  /**
   * Points of two quantities, the horizontal one by powers of ten.
   * @param {{x: number, y: number, index: number}[]} points x > 0
   * @param {{label: string, x: string, y: string, describe: function(any): string, open: function(any): void}} told
   */
  function scatter(points, told) {
    const { drawing, box } = frame(told.label, 260);
    const logs = points.map((point) => Math.log10(point.x));
    const low = Math.floor(Math.min(...range(logs, -4)) * 2) / 2, high = Math.max(Math.ceil(Math.max(...range(logs, 0)) * 2) / 2, low + 1);
    const bottom = Math.min(0, ...range(points.map((point) => point.y), 0)), top = Math.max(bottom + 1, ...range(points.map((point) => point.y), 1));
    const x = (value) => box.left + ((Math.log10(value) - low) / (high - low)) * (box.right - box.left);
    const y = (value) => box.bottom - ((value - bottom) / (top - bottom)) * (box.bottom - box.top);
    axisY(drawing, box, ticks(bottom, top).map((at) => ({ y: y(at), text: digits(at) })), told.y);
    const powers = [];
    for (let power = Math.ceil(low); power <= high + 1e-9; power += 1) powers.push({ x: x(10 ** power), text: digits(10 ** power, 1) });
    axisX(drawing, box, powers, told.x);
    // One path for all: ten thousand elements would be slow.
    const placed = points.map((point) => ({ ...point, px: x(point.x), py: y(point.y) }));
    drawing.append(s("path", { class: "points", d: placed.map((one) => `M${one.px.toFixed(1)} ${one.py.toFixed(1)}h0`).join("") }));
    const ring = s("circle", { r: 5, class: "ring", visibility: "hidden" });
    const caption = s("text", { class: "tick", y: box.top - 2 });
    drawing.append(ring, caption);
    const nearest = (event) => {
      const area = drawing.getBoundingClientRect(), scale = drawing.viewBox.baseVal.width / area.width;
      const ex = (event.clientX - area.left) * scale, ey = (event.clientY - area.top) * scale;
      let best = null, distance = 14 ** 2;
      for (const one of placed) {
        const found = (one.px - ex) ** 2 + (one.py - ey) ** 2;
        if (found < distance) [best, distance] = [one, found];
      }
      return best;
    };
    drawing.addEventListener("pointermove", (event) => {
      const one = nearest(event);
      ring.setAttribute("visibility", one ? "visible" : "hidden");
      drawing.classList.toggle("aims", Boolean(one));
      caption.textContent = one ? told.describe(one) : "";
      if (!one) return;
      ring.setAttribute("cx", one.px);
      ring.setAttribute("cy", one.py);
      const right = one.px > (box.left + box.right) / 2;
      caption.setAttribute("text-anchor", right ? "end" : "start");
      caption.setAttribute("x", right ? box.right : box.left);
    });
    drawing.addEventListener("click", (event) => {
      const one = nearest(event);
      if (one) told.open(one);
    });
    return drawing;
  }

  /** Least and largest of many numbers, which are too many to be arguments of one call. */
  function range(values, otherwise) {
    if (!values.length) return [otherwise];
    let low = values[0], high = values[0];
    for (const value of values) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    return [low, high];
  }

  /** Lower edges of the bins of a record's histogram: 2^-16 times 1.5, 2, 3, 4, 6, ...; the first bin has none. */
  const binEdge = (bin) => 2 ** (Math.floor(bin / 2) - 16) * (bin % 2 ? 1.5 : 1);

  cratelm.charts = { bars, scatter, ticks, range, binEdge };
})();
