"use strict";
/* The curves: numbers under the pointer, and drawn anew where a control asks for another view of them. What is drawn first is the
   server's drawing (svg.py), with the same sizes and classes. */
const chartsOf = (data, { el, visible, num }) => {
  const NS = "http://www.w3.org/2000/svg", WIDTH = 360, HEIGHT = 190;
  const node = (name, props, text) => {
    const out = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(props)) out.setAttribute(key, value);
    if (text !== undefined) out.textContent = text;
    return out;
  };
  const view = { x: "step", smooth: "light", log: false };

  /* Where a step is on the axis that is chosen: tokens and seconds are sums over the run's steps until then. */
  const place = (line, x) => {
    const clock = data.clocks[line.run];
    if (view.x === "step" || !clock) return x;
    let at = -1;
    while (at + 1 < clock.step.length && clock.step[at + 1] <= x) at++;
    return at < 0 ? 0 : clock[view.x][at];
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

  const shownLines = (chart) => chart.lines.filter((_, i) => !chart.off.has(i));
  const draw = (chart, drawing) => {
    const lines = shownLines(chart).map((line) => ({ ...line, at: line.x.map((x) => (chart.of === "step" ? place(line, x) : x)) }));
    const bands = lines.flatMap((line) => (line.band ?? []).flatMap(([, low, high]) => [low, high]));
    const log = view.log && [...lines.flatMap((line) => line.y), ...bands].some((y) => y > 0);
    const usable = (y) => !log || y > 0;
    const ys = [...lines.flatMap((line) => line.y), ...bands, ...(log ? [] : [chart.low, chart.high])].filter((y) => y !== null && usable(y));
    const xs = lines.flatMap((line) => line.at);
    let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
    [chart.x0, chart.x1] = [Math.min(...xs), Math.max(...xs)];
    if (!(chart.x1 > chart.x0)) chart.x1 = chart.x0 + 1;
    const scaleY = log ? Math.log10 : (y) => y;
    [y0, y1] = [scaleY(y0), scaleY(y1)];
    const room = (y1 - y0) * 0.06 || Math.abs(y0) * 0.1 || 1;
    if (log || chart.low === null || y0 < chart.low) y0 -= room;
    if (log || chart.high === null || y1 > chart.high) y1 += room;
    const px = (x) => chart.left + ((x - chart.x0) / (chart.x1 - chart.x0)) * (chart.right - chart.left);
    const py = (y) => chart.bottom - ((scaleY(y) - y0) / (y1 - y0)) * (chart.bottom - chart.top);
    const path = (points) => "M" + points.map(([x, y]) => `${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("L");
    const inside = [];
    for (const value of log ? powers(10 ** y0, 10 ** y1) : ticks(y0, y1, 4)) {
      const y = py(value).toFixed(1);
      inside.push(node("path", { class: "grid", d: `M${chart.left} ${y}H${chart.right}` }));
      inside.push(node("text", { x: chart.left - 6, y: +y + 3.5, "text-anchor": "end" }, num(value)));
    }
    for (const value of ticks(chart.x0, chart.x1, 5)) {
      const short = value >= 1e6 ? `${num(value / 1e6)}M` : value >= 1e4 ? `${num(value / 1e3)}k` : num(value, 6);
      inside.push(node("text", { x: px(value).toFixed(1), y: chart.bottom + 15, "text-anchor": "middle" }, short));
    }
    const name = chart.of === "step" && view.x !== "step" ? view.x : chart.of;
    inside.push(node("text", { class: "axis", x: (chart.left + chart.right) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, name));
    const middle = (chart.top + chart.bottom) / 2;
    inside.push(node("text", { class: "axis", x: 10, y: middle, transform: `rotate(-90 10 ${middle})`, "text-anchor": "middle" }, chart.y + (log ? ", log scale" : "")));
    for (const line of lines) {
      const style = `s${line.style % 8}`;
      const points = line.at.map((x, i) => [x, line.y[i]]).filter(([, y]) => usable(y));
      const band = (line.band ?? []).map(([x, low, high]) => [chart.of === "step" ? place(line, x) : x, low, high]).filter(([, low]) => usable(low));
      if (line.marks) {
        for (const [x, low, high] of band) inside.push(node("path", { class: `${style} bar`, d: `M${px(x).toFixed(1)} ${py(low).toFixed(1)}V${py(high).toFixed(1)}` }));
        for (const [x, y] of points) inside.push(node("circle", { class: `${style} dot`, cx: px(x).toFixed(1), cy: py(y).toFixed(1), r: 3 }));
      } else if (band.length) {
        const edge = [...band.map(([x, , high]) => [x, high]), ...band.toReversed().map(([x, low]) => [x, low])];
        inside.push(node("path", { class: `${style} area`, d: path(edge) + "Z" }));
      }
      if (!points.length) continue;
      const calm = line.marks || !chart.smooth ? points.map(([, y]) => y) : smoothed(points.map(([, y]) => y));
      if (calm.some((y, i) => y !== points[i][1])) inside.push(node("path", { class: `${style} line raw`, d: path(points) }));
      inside.push(node("path", { class: `${style} line`, d: path(points.map(([x], i) => [x, calm[i]])) }));
    }
    drawing.replaceChildren(...inside, node("path", { class: "cross", d: "" }));
    chart.view = lines;
    chart.name = name;
  };

  const download = (name, url) => el("a", { href: url, download: name }).click();
  const asCsv = (chart) => {
    const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
    const rows = shownLines(chart).flatMap((line) => line.x.map((x, i) => [quoted(line.label), x, place({ ...line }, x), line.y[i]].join(",")));
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

  const prepare = (drawing) => {
    const chart = data.charts[+drawing.dataset.chart], figure = drawing.closest("figure"), out = figure.querySelector(".reading");
    chart.off = new Set();
    chart.view = chart.lines.map((line) => ({ ...line, at: line.x }));
    chart.name = chart.of;
    let at = 0;
    const read = (k) => {
      const xs = [...new Set(chart.view.flatMap((line) => line.at))].sort((a, b) => a - b);
      at = Math.max(0, Math.min(xs.length - 1, k(xs)));
      const x = xs[at];
      const px = chart.left + ((x - chart.x0) / (chart.x1 - chart.x0)) * (chart.right - chart.left);
      drawing.querySelector(".cross").setAttribute("d", `M${px} ${chart.top}V${chart.bottom}`);
      const said = chart.view.map((line) => [line, line.at.indexOf(x)]).filter(([, i]) => i >= 0);
      out.textContent = `${chart.name} ${num(x, 6)}: ` + said.map(([line, i]) => `${visible(line.label)} ${num(line.y[i], 4)}`).join(", ");
    };
    drawing.addEventListener("pointermove", (event) => {
      const box = drawing.getBoundingClientRect();
      const px = ((event.clientX - box.left) / box.width) * WIDTH;
      const x = chart.x0 + ((px - chart.left) / (chart.right - chart.left)) * (chart.x1 - chart.x0);
      read((xs) => xs.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best), 0));
    });
    drawing.addEventListener("focus", () => { at = Infinity; });
    drawing.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      read((xs) => Math.min(at, xs.length - 1) + move);
    });
    const switches = chart.lines.length < 2 ? [] : chart.lines.map((line, i) => {
      const button = el("button", { type: "button", className: "switch", "aria-pressed": "true" }, el("span", { className: `key s${line.style % 8}` }), visible(line.label));
      button.addEventListener("click", () => {
        if (!chart.off.delete(i) && chart.lines.length - chart.off.size > 1) chart.off.add(i);
        button.setAttribute("aria-pressed", String(!chart.off.has(i)));
        draw(chart, drawing);
      });
      return button;
    });
    const csv = el("button", { type: "button", className: "save", textContent: "CSV", "aria-label": `${chart.title} as CSV` });
    csv.addEventListener("click", () => download(`${chart.title}.csv`, "data:text/csv;charset=utf-8," + encodeURIComponent(asCsv(chart))));
    const png = el("button", { type: "button", className: "save", textContent: "PNG", "aria-label": `${chart.title} as PNG` });
    png.addEventListener("click", () => asPng(drawing, (url) => download(`${chart.title}.png`, url)));
    figure.querySelector(".legend")?.remove();
    out.after(el("p", { className: "legend" }, ...switches, csv, png));
    return () => draw(chart, drawing);
  };

  const redraw = [...document.querySelectorAll(".chart")].map(prepare);
  for (const name of ["x", "smooth", "log"]) {
    const control = document.getElementById(`curve-${name}`);
    control.addEventListener("input", () => {
      view[name] = name === "log" ? control.checked : control.value;
      for (const again of redraw) again();
    });
  }
  document.getElementById("curve-controls").hidden = false;
  return { asCsv, asPng };
};
