"use strict";
/* Charts: bars, and points of two quantities. Colours come from the style sheet. */

(() => {
  const { s } = cratelm;
  const { digits } = cratelm.text;
  const MARGIN = { left: 54, right: 10, top: 12, bottom: 38 };

  /** An empty drawing with room for axes; narrower on a narrow screen. */
  function frame(label, height, small = false) {
    const width = small || innerWidth < 640 ? 330 : 480;
    const drawing = s("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label });
    return { drawing, box: { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom } };
  }

  const line = (x1, y1, x2, y2, kind) => s("line", { x1, y1, x2, y2, class: kind });
  const text = (x, y, anchor, kind, content, more = {}) => s("text", { x, y, "text-anchor": anchor, class: kind, ...more }, content);

  /** Axes with ticks `[position, text]` and titles. */
  function drawAxes(drawing, { left, right, top, bottom }, x, y) {
    const middle = (top + bottom) / 2;
    drawing.append(
      ...y.ticks.flatMap(([at, label]) => [line(left, at, right, at, "grid"), text(left - 6, at + 3.5, "end", "tick", label)]),
      text(11, middle, "middle", "label", y.title, { transform: `rotate(-90 11 ${middle})` }),
      line(left, bottom, right, bottom, "axis"),
      ...x.ticks.flatMap(([at, label]) => [line(at, bottom, at, bottom + 4, "axis"), text(at, bottom + 16, "middle", "tick", label)]),
      text((left + right) / 2, bottom + 33, "middle", "label", x.title));
  }

  /** Round numbers that cover a range. */
  function ticks(low, high, wanted = 5) {
    const raw = (high - low) / wanted || 1, size = 10 ** Math.floor(Math.log10(raw));
    const step = size * [1, 2, 5, 10].find((factor) => factor * size >= raw), first = Math.ceil(low / step - 1e-9);
    return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
  }

  /** 0 and the powers of ten from 1/200 of the largest count. */
  const rootTicks = (largest) => [0, 1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9].filter((level) => !level || (level >= largest / 200 && level <= largest));

  /** Function from a range of values to a range of pixels. */
  const scaleTo = (low, high, from, to) => (value) => from + ((value - low) / (high - low)) * (to - from);

  /**
   * Bars next to each other. With `root`, heights follow the square root, so that one token is visible next to thousands.
   * @param {{from: number, to: number, count: number, text: string}[]} all in units of the horizontal axis
   * @param {{label: string, x: string, y: string, marks?: {at: number, text: string}[], root?: boolean, small?: boolean}} options
   */
  function bars(all, { label, x: titleX, y: titleY, marks, root = false, small = false }) {
    const { drawing, box } = frame(label, 220, small);
    const low = all[0].from, high = all.at(-1).to, largest = Math.max(1, ...all.map(({ count }) => count));
    const x = scaleTo(low, high, box.left, box.right), height = scaleTo(0, 1, box.bottom, box.top);
    const y = (count) => height(root ? Math.sqrt(count / largest) : count / largest);
    const levels = root ? rootTicks(largest) : ticks(0, largest, 4).filter(Number.isInteger);
    drawAxes(drawing, box,
      { title: titleX, ticks: marks ? marks.map((mark) => [x(mark.at), mark.text]) : ticks(low, high).map((at) => [x(at), digits(at)]) },
      { title: titleY, ticks: levels.map((count) => [y(count), digits(count)]) });
    drawing.append(...all.filter(({ count }) => count).map((bar) => {
      const top = Math.min(y(bar.count), box.bottom - 1), left = x(bar.from) + 0.5;
      return s("rect", { x: left, y: top, width: Math.max(x(bar.to) - left - 0.5, 0.5), height: box.bottom - top, class: "bar" }, s("title", {}, bar.text));
    }));
    return drawing;
  }

  /**
   * Points of two quantities, the horizontal one on a logarithmic axis.
   * @param {{x: number, y: number, index: number}[]} points x > 0
   * @param {{label: string, x: string, y: string, describe: function(any): string, open: function(any): void}} options
   */
  function scatter(points, { label, x: titleX, y: titleY, describe, open }) {
    const { drawing, box } = frame(label, 220);
    const [least, most] = extent(points.map((point) => Math.log10(point.x)), [-4, 0]), [lowest, highest] = extent(points.map((point) => point.y), [0, 1]);
    const low = Math.floor(least * 2) / 2, high = Math.max(Math.ceil(most * 2) / 2, low + 1), bottom = Math.min(0, lowest), top = Math.max(bottom + 1, highest);
    const x = scaleTo(low, high, box.left, box.right), y = scaleTo(bottom, top, box.bottom, box.top);
    const powers = Array.from({ length: Math.floor(high + 1e-9) - Math.ceil(low) + 1 }, (_, i) => Math.ceil(low) + i);
    drawAxes(drawing, box, { title: titleX, ticks: powers.map((power) => [x(power), digits(10 ** power, 1)]) },
      { title: titleY, ticks: ticks(bottom, top).map((at) => [y(at), digits(at)]) });
    // One path for all points: ten thousand elements would be slow.
    const placed = points.map((point) => ({ ...point, px: x(Math.log10(point.x)), py: y(point.y) }));
    const ring = s("circle", { r: 5, class: "ring", visibility: "hidden" }), caption = s("text", { class: "tick", y: box.top - 2 });
    drawing.append(s("path", { class: "points", d: placed.map(({ px, py }) => `M${px.toFixed(1)} ${py.toFixed(1)}h0`).join("") }), ring, caption);

    /** The point within 14 units of the pointer that is nearest to it. */
    function nearest({ clientX, clientY }) {
      const area = drawing.getBoundingClientRect(), unit = drawing.viewBox.baseVal.width / area.width;
      const distance = ({ px, py }) => Math.hypot(px - (clientX - area.left) * unit, py - (clientY - area.top) * unit);
      const closest = placed.reduce((best, point) => (best && distance(best) <= distance(point) ? best : point), null);
      return closest && distance(closest) < 14 ? closest : null;
    }
    drawing.addEventListener("pointermove", (event) => {
      const point = nearest(event), isRight = point?.px > (box.left + box.right) / 2;
      ring.setAttribute("visibility", point ? "visible" : "hidden");
      drawing.classList.toggle("aims", Boolean(point));
      caption.textContent = point ? describe(point) : "";
      const attributes = point ? [[ring, { cx: point.px, cy: point.py }], [caption, { "text-anchor": isRight ? "end" : "start", x: isRight ? box.right : box.left }]] : [];
      for (const [element, values] of attributes) for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
    });
    drawing.addEventListener("click", (event) => {
      const point = nearest(event);
      if (point) open(point);
    });
    return drawing;
  }

  /** Smallest and largest of many numbers; `Math.min(...values)` fails on long lists. */
  const extent = (values, otherwise = [0, 0]) => (values.length ? values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [values[0], values[0]]) : otherwise);

  cratelm.charts = { bars, scatter, extent };
})();
