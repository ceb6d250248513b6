"use strict";
/* The curves: numbers under the pointer, a part of them drawn larger, and drawn anew where a control asks for another view of them.
   What is drawn first is the server's drawing (svg.py), with the same sizes and classes. */
const chartsOf = (data, { el, visible, num }) => {
  const NS = "http://www.w3.org/2000/svg", WIDTH = 360, HEIGHT = 190;
  const FEWEST_UNITS = 6; /* of the drawing: a shorter drag is a click */
  const node = (name, props, text) => {
    const out = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(props)) out.setAttribute(key, value);
    if (text !== undefined) out.textContent = text;
    return out;
  };
  const view = { x: "step", smooth: "light", log: false };
  /* Of a chart by its title: which lines are off and which part is shown, kept for a page that is brought up to date. */
  const memory = new Map();

  /* As svg.py writes a number at an axis. */
  const short = (v) => {
    const size = Math.abs(v);
    if (v === 0) return "0";
    if (size >= 9999.5 && size < 999500) return `${num(v / 1000)}k`;
    if (size >= 999500 || size < 0.001) return v.toExponential(1).replace(".0e", "e").replace("e+", "e");
    return size >= 999.5 ? v.toFixed(0) : num(v);
  };
  /* Where a step is on the axis that is chosen: tokens and seconds are sums over the run's steps until then. */
  const place = (line, x) => {
    const clock = data.clocks[line.run];
    if (view.x === "step" || !clock) return x;
    let low = 0, high = clock.step.length; /* the first step after x is between them */
    while (low < high) {
      const middle = (low + high) >> 1;
      if (clock.step[middle] <= x) low = middle + 1;
      else high = middle;
    }
    return low === 0 ? 0 : clock[view.x][low - 1];
  };
  const smoothed = (ys) => {
    const half = view.smooth === "none" ? 0 : Math.max(1, Math.floor(ys.length / (view.smooth === "light" ? 40 : 10)));
    if (!half || ys.length < 8) return ys;
    return ys.map((_, i) => {
      const near = ys.slice(Math.max(i - half, 0), i + half + 1);
      return near.reduce((a, b) => a + b, 0) / near.length;
    });
  };
  const ticks = (low, high, most) => {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= rough * 0.999);
    const out = [];
    for (let k = Math.ceil(low / step - 1e-9); k <= Math.floor(high / step + 1e-9); k++) out.push(+(k * step).toPrecision(12));
    return out;
  };
  const powers = (low, high) => {
    const out = [];
    for (let k = Math.ceil(Math.log10(low) - 1e-9); k <= Math.log10(high) + 1e-9; k++) out.push(10 ** k);
    return out.length ? out : [low, high];
  };

  /* The lines that are on, with their places on the axis that is chosen. */
  const shownLines = (chart) => chart.lines.filter((_, i) => !chart.off.has(i)).map((line) => {
    const at = (x) => (chart.of === "step" ? place(line, x) : x);
    return { ...line, at: line.x.map(at), band: (line.band ?? []).map(([x, low, high]) => [at(x), low, high]) };
  });
  const wholeOf = (lines) => {
    const xs = lines.flatMap((line) => line.at);
    return [Math.min(...xs), Math.max(...xs)];
  };
  /* From data to the coordinates of the drawing; sets the limits of x that are shown. */
  const frameOf = (chart, lines) => {
    const numbers = (inside) => lines.flatMap((line) => [
      ...line.y.filter((_, i) => inside(line.at[i])), ...line.band.filter(([x]) => inside(x)).flatMap(([, low, high]) => [low, high])]);
    [chart.x0, chart.x1] = chart.zoom ?? wholeOf(lines);
    if (!(chart.x1 > chart.x0)) chart.x1 = chart.x0 + 1;
    const log = view.log && numbers(() => true).some((y) => y > 0), usable = (y) => !log || y > 0;
    /* A part is as high as what is in it; the whole also shows the ends that its unit has. */
    const ends = log || chart.zoom ? [null, null] : [chart.low, chart.high];
    const seen = [...numbers((x) => x >= chart.x0 && x <= chart.x1), ...ends].filter((y) => y !== null && usable(y));
    const scale = log ? Math.log10 : (y) => y;
    let [y0, y1] = [scale(Math.min(...seen)), scale(Math.max(...seen))];
    const room = (y1 - y0) * 0.06 || Math.abs(y0) * 0.1 || 1;
    if (ends[0] === null || y0 < ends[0]) y0 -= room;
    if (ends[1] === null || y1 > ends[1]) y1 += room;
    const px = (x) => (chart.left + ((x - chart.x0) / (chart.x1 - chart.x0)) * (chart.right - chart.left)).toFixed(1);
    const py = (y) => (chart.bottom - ((scale(y) - y0) / (y1 - y0)) * (chart.bottom - chart.top)).toFixed(1);
    const path = (points) => "M" + points.map(([x, y]) => `${px(x)} ${py(y)}`).join("L");
    return { log, usable, px, py, path, marks: log ? powers(10 ** y0, 10 ** y1) : ticks(y0, y1, 4) };
  };
  const axesOf = (chart, frame) => {
    const middle = (chart.top + chart.bottom) / 2, across = (chart.left + chart.right) / 2, out = [];
    out.push(node("text", { class: "axis", x: across, y: HEIGHT - 3, "text-anchor": "middle" }, chart.name));
    const turned = { class: "axis", x: 10, y: middle, transform: `rotate(-90 10 ${middle})`, "text-anchor": "middle" };
    out.push(node("text", turned, chart.y + (frame.log ? ", log scale" : "")));
    for (const value of frame.marks) {
      const y = frame.py(value);
      out.push(node("path", { class: "grid", d: `M${chart.left} ${y}H${chart.right}` }));
      out.push(node("text", { x: chart.left - 6, y: +y + 3.5, "text-anchor": "end" }, short(value)));
    }
    for (const value of ticks(chart.x0, chart.x1, 5)) {
      if (chart.name !== "seconds" && value % 1) continue; /* there are no halves of steps */
      const words = value >= 1e6 ? `${num(value / 1e6)}M` : value >= 1e4 ? `${num(value / 1e3, 6)}k` : num(value, 6);
      out.push(node("text", { x: frame.px(value), y: chart.bottom + 15, "text-anchor": "middle" }, words));
    }
    return out;
  };
  const drawLine = (chart, line, { px, py, path, usable }) => {
    const style = `s${line.style % 8}`, out = [];
    const points = line.at.map((x, i) => [x, line.y[i]]).filter(([, y]) => usable(y));
    const band = line.band.filter(([, low]) => usable(low));
    if (line.marks) {
      for (const [x, low, high] of band) out.push(node("path", { class: `${style} bar`, d: `M${px(x)} ${py(low)}V${py(high)}` }));
      for (const [x, y] of points) out.push(node("circle", { class: `${style} dot`, cx: px(x), cy: py(y), r: 3 }));
    } else if (band.length) {
      const edge = [...band.map(([x, , high]) => [x, high]), ...band.toReversed().map(([x, low]) => [x, low])];
      out.push(node("path", { class: `${style} area`, d: path(edge) + "Z" }));
    }
    if (!points.length) return out;
    const calm = line.marks || !chart.smooth ? points.map(([, y]) => y) : smoothed(points.map(([, y]) => y));
    if (calm.some((y, i) => y !== points[i][1])) out.push(node("path", { class: `${style} line raw`, d: path(points) }));
    out.push(node("path", { class: `${style} line`, d: path(points.map(([x], i) => [x, calm[i]])) }));
    return out;
  };
  const draw = (chart, drawing) => {
    const lines = shownLines(chart), frame = frameOf(chart, lines), id = `part-${drawing.dataset.chart}`;
    chart.view = lines;
    chart.name = chart.of === "step" && view.x !== "step" ? view.x : chart.of;
    const outline = node("clipPath", { id });
    outline.append(node("rect", { x: chart.left, y: chart.top - 4, width: chart.right - chart.left, height: chart.bottom - chart.top + 8 }));
    const inside = node("g", chart.zoom ? { "clip-path": `url(#${id})` } : {});
    inside.append(...lines.flatMap((line) => drawLine(chart, line, frame)));
    const movable = [node("path", { class: "cross", d: "" }), node("rect", { class: "mark", width: 0 })];
    drawing.replaceChildren(outline, ...axesOf(chart, frame), inside, ...movable);
  };

  const download = (name, url) => el("a", { href: url, download: name }).click();
  const asCsv = (chart) => {
    const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
    const rows = shownLines(chart).flatMap((line) => line.x.map((x, i) => [quoted(line.label), x, place(line, x), line.y[i]].join(",")));
    return `series,${chart.of},${view.x},${quoted(chart.title)}\n${rows.join("\n")}\n`;
  };
  /* The drawing as an image: outside of the page it has no style sheet, so every element carries its own style. */
  const asPng = (drawing, done) => {
    const copy = drawing.cloneNode(true), factor = 3;
    const from = [drawing, ...drawing.querySelectorAll("*")], to = [copy, ...copy.querySelectorAll("*")];
    from.forEach((one, i) => {
      const style = getComputedStyle(one);
      for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-family"]) to[i].style[name] = style.getPropertyValue(name);
    });
    copy.setAttribute("xmlns", NS);
    copy.setAttribute("width", WIDTH * factor);
    copy.setAttribute("height", HEIGHT * factor);
    const image = new Image();
    image.onload = () => {
      const canvas = el("canvas", { width: WIDTH * factor, height: HEIGHT * factor }), brush = canvas.getContext("2d");
      brush.fillStyle = getComputedStyle(drawing.closest("figure")).backgroundColor;
      brush.fillRect(0, 0, canvas.width, canvas.height);
      brush.drawImage(image, 0, 0);
      done(canvas.toDataURL("image/png"));
    };
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(copy));
  };

  /* The places of the points that are shown, in their order. */
  const placesOf = (chart) =>
    [...new Set(chart.view.flatMap((line) => line.at))].filter((x) => x >= chart.x0 && x <= chart.x1).sort((a, b) => a - b);
  const pointsIn = (chart, [low, high]) => placesOf(chart).filter((x) => x >= low && x <= high).length;

  /* A drag across the drawing, by pointer or finger, shows that part; a double click all of it again. */
  const dragToZoom = (chart, drawing, zoom, read, out) => {
    let from = null; /* where the drag began, in units of the drawing */
    const units = (event) => {
      const box = drawing.getBoundingClientRect();
      return Math.max(chart.left, Math.min(chart.right, ((event.clientX - box.left) / box.width) * WIDTH));
    };
    const value = (px) => chart.x0 + ((px - chart.left) / (chart.right - chart.left)) * (chart.x1 - chart.x0);
    const mark = (to) => {
      const [a, b] = from === null ? [0, 0] : [Math.min(from, to), Math.max(from, to)];
      const shape = { x: a, y: chart.top, width: b - a, height: chart.bottom - chart.top };
      for (const [key, length] of Object.entries(shape)) drawing.querySelector(".mark").setAttribute(key, length);
    };
    drawing.append(node("rect", { class: "mark", width: 0 }));
    drawing.addEventListener("pointerdown", (event) => {
      if (event.button || !event.isPrimary) return;
      from = units(event);
      drawing.setPointerCapture(event.pointerId);
    });
    drawing.addEventListener("pointermove", (event) => {
      const x = value(units(event));
      read((xs) => xs.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best), 0));
      if (from !== null) mark(units(event));
    });
    drawing.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const [a, b] = [from, units(event)].sort((one, other) => one - other), part = [value(a), value(b)];
      from = null;
      mark(0);
      if (b - a < FEWEST_UNITS) return;
      if (pointsIn(chart, part) > 1) zoom(part);
      else out.textContent = "There are fewer than two points in that part.";
    });
    drawing.addEventListener("pointercancel", () => { from = null; mark(0); });
    drawing.addEventListener("dblclick", () => { if (chart.zoom) zoom(null); });
  };
  const keysOf = (chart, drawing, zoom, read, cursor) => {
    /* The part around the cursor that is `factor` times as wide as what is shown, inside the whole. */
    const scaled = (factor) => {
      const [low, high] = wholeOf(chart.view), xs = placesOf(chart), wide = (chart.x1 - chart.x0) * factor;
      if (wide >= high - low) return zoom(null);
      const middle = xs[Math.min(cursor.at, xs.length - 1)] ?? (chart.x0 + chart.x1) / 2;
      const from = Math.max(low, Math.min(middle - wide / 2, high - wide));
      if (pointsIn(chart, [from, from + wide]) > 1 || factor > 1) zoom([from, from + wide]);
    };
    drawing.addEventListener("focus", () => { cursor.at = Infinity; });
    drawing.addEventListener("keydown", (event) => {
      const part = { "+": () => scaled(0.5), "=": () => scaled(0.5), "-": () => scaled(2), 0: () => zoom(null), Escape: () => zoom(null) }[event.key];
      const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey || (!part && move === undefined)) return;
      event.preventDefault();
      if (part) part();
      else read((xs) => Math.min(cursor.at, xs.length - 1) + move);
    });
  };

  const prepare = (drawing) => {
    const chart = data.charts[+drawing.dataset.chart], figure = drawing.closest("figure"), out = figure.querySelector(".reading");
    const kept = memory.get(chart.title) ?? { off: new Set(), zoom: null, axis: view.x };
    memory.set(chart.title, kept);
    chart.off = new Set(chart.lines.flatMap((line, i) => (kept.off.has(line.label) ? [i] : [])));
    chart.view = chart.lines.map((line) => ({ ...line, at: line.x }));
    chart.name = chart.of;
    const cursor = { at: 0 };
    const read = (k) => {
      const xs = placesOf(chart);
      cursor.at = Math.max(0, Math.min(xs.length - 1, k(xs)));
      const x = xs[cursor.at];
      if (x === undefined) return;
      const px = chart.left + ((x - chart.x0) / (chart.x1 - chart.x0)) * (chart.right - chart.left);
      drawing.querySelector(".cross").setAttribute("d", `M${px} ${chart.top}V${chart.bottom}`);
      const said = chart.view.map((line) => [line, line.at.indexOf(x)]).filter(([, i]) => i >= 0);
      out.textContent = `${chart.name} ${num(x, 6)}: ` + said.map(([line, i]) => `${visible(line.label)} ${num(line.y[i], 4)}`).join(", ");
    };
    const again = () => {
      if (kept.axis !== view.x && chart.of === "step") kept.zoom = null; /* a part of the steps is none of the seconds */
      kept.axis = view.x;
      chart.zoom = kept.zoom;
      whole.hidden = !kept.zoom;
      draw(chart, drawing);
    };
    const zoom = (part) => {
      kept.zoom = part;
      again();
      out.textContent = part ? `${chart.name} ${num(part[0], 4)} to ${num(part[1], 4)}` : `${chart.name}: all of it`;
    };
    dragToZoom(chart, drawing, zoom, read, out);
    keysOf(chart, drawing, zoom, read, cursor);
    const switches = chart.lines.length < 2 ? [] : chart.lines.map((line, i) => {
      const key = el("span", { className: `key s${line.style % 8}` });
      const button = el("button", { type: "button", className: "switch", "aria-pressed": String(!chart.off.has(i)) }, key, visible(line.label));
      button.addEventListener("click", () => {
        if (!chart.off.delete(i) && chart.lines.length - chart.off.size > 1) chart.off.add(i);
        kept.off = new Set([...chart.off].map((k) => chart.lines[k].label));
        button.setAttribute("aria-pressed", String(!chart.off.has(i)));
        again();
      });
      return button;
    });
    const action = (label, does, props) => {
      const button = el("button", { type: "button", className: "save", textContent: label, ...props });
      button.addEventListener("click", does);
      return button;
    };
    const whole = action("Whole curve", () => zoom(null), { className: "whole", hidden: true });
    const csv = action("CSV", () => download(`${chart.title}.csv`, "data:text/csv;charset=utf-8," + encodeURIComponent(asCsv(chart))), { "aria-label": `${chart.title} as CSV` });
    const png = action("PNG", () => asPng(drawing, (url) => download(`${chart.title}.png`, url)), { "aria-label": `${chart.title} as PNG` });
    figure.querySelector(".legend")?.remove();
    out.after(el("p", { className: "legend" }, ...switches, whole, csv, png));
    if (kept.zoom || kept.off.size || view.x !== "step" || view.smooth !== "light" || view.log) again();
    return again;
  };

  let redraw = [];
  /* The charts that are in the page now, with the numbers that are in `data` now. */
  const take = () => {
    redraw = [...document.querySelectorAll(".chart")].map(prepare);
    document.getElementById("curve-controls").hidden = !redraw.length;
  };
  for (const name of ["x", "smooth", "log"]) {
    const control = document.getElementById(`curve-${name}`);
    control.addEventListener("input", () => {
      view[name] = name === "log" ? control.checked : control.value;
      for (const again of redraw) again();
    });
  }
  take();
  return { take };
};
