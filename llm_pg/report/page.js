(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const PAGE = 40;

  /* Everything that a model or a user wrote goes through textContent, with control characters by their numbers. */
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\u{e0000}-\u{e007f}]/gu;
  const visible = (text) =>
    String(text).replace(HIDDEN, (c) => "⟨U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
  const el = (name, props = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(props)) {
      if (key in node) node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  };
  const num = (x, digits = 3) => (x === null || x === undefined ? "–" : Number(x.toPrecision(digits)).toString());

  $("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.body).backgroundColor.match(/\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) < 380;
    document.documentElement.style.colorScheme = dark ? "light" : "dark";
    if (chosen) show(chosen, false);
  });

  const curves = chartsOf(data, { el, visible, num });

  /* Completions. */
  let rows = data.rows;
  const text = (row) => (row.full ??= row.t ? row.t.map((i) => data.pieces[i]).join("") : row.text);
  const per = (values, i) => (Array.isArray(values) ? values[i] : values);
  const value = (row, name, i) => {
    const v = per(row[name], i);
    return v === null || v === undefined ? null : v / data.scale;
  };
  const meanKl = (row) => {
    if (row.k === undefined) return -Infinity;
    let sum = 0;
    for (let i = 0; i < row.t.length; i++) sum += value(row, "k", i) ?? 0;
    return sum / Math.max(row.t.length, 1);
  };
  const score = (row) => {
    const k = $("part").selectedIndex - 1;
    return k < 0 ? row.w : row.c[k] ?? null;
  };
  const options = (id, pairs) => $(id).replaceChildren(...pairs.map(([v, label]) => el("option", { value: v, textContent: visible(label) })));
  const clip = (s, n) => (s.length > n ? s.slice(0, n) + "…" : s);
  const ends = (s) => (s.length > 150 ? `${s.slice(0, 70)} … ${s.slice(-70)}` : s); /* an answer is often at the end */

  const choices = () => {
    const run = +$("run").value;
    const mine = rows.filter((row) => row.r === run);
    options("step", [["", "all"], ...[...new Set(mine.map((row) => row.s))].map((s) => [s, `step ${s}`])]);
    options("part", [["", "reward (the sum)"], ...(data.parts[run] ?? []).map((name, i) => [i, name])]);
    const prompts = [...new Set(mine.map((row) => row.p))].slice(0, 500);
    options("prompt", [["", "all"], ...prompts.map((p) => [p, clip(data.prompts[p].trim(), 60) || "(empty)"])]);
    const [kept, there] = [data.steps_shown[run] ?? 0, data.steps_there[run] ?? 0];
    $("shown").textContent = !there
      ? "This run kept no completions (run.log_completions)."
      : kept < there
        ? `${mine.length} completions of ${kept} of the ${there} steps that were kept, spread over the run so that the page stays small. All are in completions/.`
        : `${mine.length} completions of ${there} steps.`;
  };

  let found = [], page = 0, chosen = null;
  const SORTS = {
    step: (a, b) => b.s - a.s || a.g - b.g,
    first: (a, b) => a.s - b.s || a.g - b.g,
    high: (a, b) => (score(b) ?? -Infinity) - (score(a) ?? -Infinity) || b.s - a.s,
    low: (a, b) => (score(a) ?? Infinity) - (score(b) ?? Infinity) || b.s - a.s,
    long: (a, b) => b.n - a.n,
    kl: (a, b) => (b.meanKl ??= meanKl(b)) - (a.meanKl ??= meanKl(a)) || b.s - a.s,
  };
  const KINDS = {
    truncated: (row) => row.x, whole: (row) => !row.x, unscorable: (row) => row.w === null, scored: (row) => row.w !== null,
  };
  const filter = () => {
    const run = +$("run").value, step = $("step").value, prompt = $("prompt").value, wanted = $("search").value.toLowerCase();
    const low = $("low").value, high = $("high").value, kind = KINDS[$("kind").value];
    found = rows.filter((row) =>
      row.r === run && (!step || row.s === +step) && (!prompt || row.p === +prompt) && (!kind || kind(row)) &&
      (!low || (score(row) !== null && score(row) >= +low)) && (!high || (score(row) !== null && score(row) <= +high)) &&
      (!wanted || text(row).toLowerCase().includes(wanted) || data.prompts[row.p].toLowerCase().includes(wanted)));
    found.sort(SORTS[$("sort").value]);
    page = 0;
    list();
  };
  const flags = (row) => [row.x && "truncated", row.w === null && "unscorable"].filter(Boolean).map((f) => el("span", { className: "flag", textContent: f }));
  const list = () => {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    $("count").textContent = found.length === 1 ? "1 completion" : `${found.length} completions`;
    $("page").textContent = `page ${page + 1} of ${pages}`;
    $("back").disabled = page === 0;
    $("next").disabled = page >= pages - 1;
    $("list").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map((row) => {
      const button = el("button", { type: "button", className: "row" },
        el("span", { className: "quiet", textContent: `step ${row.s}` }),
        el("span", { className: "clip", textContent: visible(ends(text(row))) || "(empty)" }),
        el("span", { className: "score" }, num(score(row)), ...flags(row)),
        el("span", { className: "quiet", textContent: `${row.n} tok` }),
        el("span", { className: "clip of-prompt", textContent: visible(clip(data.prompts[row.p].trim(), 200)) }));
      if (row === chosen) button.setAttribute("aria-current", "true");
      button.row = row;
      button.addEventListener("click", () => show(row, true));
      return el("li", {}, button);
    }));
  };
  $("list").addEventListener("keydown", (event) => {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!move) return;
    const buttons = [...$("list").querySelectorAll("button")];
    const to = buttons[buttons.indexOf(document.activeElement) + move];
    if (to) { event.preventDefault(); to.focus(); }
  });
  $("back").addEventListener("click", () => { page--; list(); });
  $("next").addEventListener("click", () => { page++; list(); });

  /* One completion, a span a token. */
  const MODES = {
    a: ["advantage", "of the token: what its log-probability is pushed by"],
    l: ["log-prob", "log-probability under the sampled distribution, nats"],
    q: ["ratio", "probability in the last training pass over that of the sampler; no colour at 1"],
    k: ["KL", "log-probability less that of the reference, nats"],
    m: ["to teacher", "log-probability less that of the teacher, nats; above 0 = the teacher finds the token less likely"],
    e: ["entropy", "of the distribution that the token was drawn from, nats"],
  };
  let mode = "a";
  const ONE_WAY = { l: [-1, 0], e: [0, 1] }; /* numbers of one sign, and where their scale begins and ends */
  const middle = (name) => (name === "q" ? 1 : 0);
  const off = (v, name) => v - middle(name);
  const limits = {};
  const limit = (name) => {
    if (limits[name] === undefined) {
      const seen = [];
      for (const row of rows) if (row.t && row[name] !== undefined) for (let i = 0; i < row.t.length; i += 1 + (row.t.length >> 6)) seen.push(Math.abs(off(value(row, name, i) ?? middle(name), name)));
      seen.sort((a, b) => a - b);
      limits[name] = seen[Math.floor(seen.length * 0.99)] || seen.at(-1) || 1;
    }
    return limits[name];
  };
  const colour = (v, name) => {
    const share = Math.max(-1, Math.min(1, off(v, name) / limit(name)));
    const ink = ONE_WAY[name] ? "138 80 200" : share < 0 ? "226 88 34" : "22 120 240";
    return `rgb(${ink} / ${(0.72 * Math.abs(share)).toFixed(3)})`;
  };
  const paint = (spans, row) => {
    spans.forEach((span, i) => {
      const v = value(row, mode, i);
      span.style.backgroundColor = v === null ? "" : colour(v, mode);
      span.classList.toggle("neg", !ONE_WAY[mode] && v !== null && off(v, mode) < 0);
    });
  };
  const scale = () => {
    const box = el("span"), top = limit(mode);
    const [from, to] = ONE_WAY[mode] ?? [-1, 1], at = (share) => middle(mode) + share * top;
    for (let k = 0; k <= 6; k++) { const i = el("i"); i.style.backgroundColor = colour(at(from + (k * (to - from)) / 6), mode); box.append(i); }
    const note = ONE_WAY[mode] ? "" : `; those under ${middle(mode)} are underlined`;
    return el("p", { className: "scale" }, num(at(from)), box, num(at(to)), el("em", { textContent: MODES[mode][1] + note }));
  };
  const tokens = (row, box) => {
    const out = el("output", { id: "numbers", "aria-live": "polite", hidden: true });
    const spans = row.t.map((place, i) => {
      const piece = visible(data.pieces[place]);
      const span = el("span", { className: "tok", textContent: piece === "\n" ? "↵\n" : piece.replace(/\n/g, "↵\n") || "▯" });
      span.dataset.i = i;
      return span;
    });
    const read = (i) => {
      const said = Object.entries(MODES).filter(([name]) => row[name] !== undefined)
        .map(([name, [label]]) => `${label} ${num(value(row, name, i), 4)}`);
      const l = value(row, "l", i);
      if (l !== null) said.push(`probability ${num(Math.exp(l))}`);
      out.textContent = `token ${i + 1} of ${row.n} “${clip(spans[i].textContent.replace(/\n/g, ""), 40)}”: ${said.join(", ")}`;
      out.hidden = false;
      /* Below the token's first line, or above it where the window ends; never beyond the text's sides. */
      const token = spans[i].getClientRects()[0] ?? spans[i].getBoundingClientRect(), area = frame.getBoundingClientRect();
      const below = token.bottom + out.offsetHeight + 8 < innerHeight;
      out.style.top = `${(below ? token.bottom + 4 : token.top - out.offsetHeight - 4) - area.top}px`;
      out.style.left = `${Math.max(0, Math.min(token.left - area.left, area.width - out.offsetWidth))}px`;
    };
    let at = 0;
    const move = (to) => {
      spans[at].tabIndex = -1;
      at = Math.max(0, Math.min(spans.length - 1, to));
      spans[at].tabIndex = 0;
      spans[at].focus();
      read(at);
    };
    const group = el("div", { className: "text tokens", role: "group", "aria-label": "Tokens of the completion" }, ...spans);
    if (spans.length) spans[0].tabIndex = 0;
    const frame = el("div", { className: "frame" }, group, out);
    group.addEventListener("click", (event) => { if (event.target.dataset.i) move(+event.target.dataset.i); });
    group.addEventListener("pointerleave", () => { if (group.contains(document.activeElement)) read(at); else out.hidden = true; });
    group.addEventListener("focusout", () => { out.hidden = true; });
    group.addEventListener("scroll", () => { out.hidden = true; });
    group.addEventListener("pointerover", (event) => { if (event.target.dataset.i) read(+event.target.dataset.i); });
    group.addEventListener("focusin", (event) => { if (event.target.dataset.i) { at = +event.target.dataset.i; read(at); } });
    group.addEventListener("keydown", (event) => {
      if (event.key === "Escape") out.hidden = true;
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
      if (to !== undefined) { event.preventDefault(); move(to); }
    });
    const picks = el("div", { className: "bar-of-buttons" }, el("label", {}, "Colour tokens by ", el("select", { id: "mode" },
      ...Object.entries(MODES).filter(([name]) => row[name] !== undefined).map(([name, [label]]) => el("option", { value: name, textContent: label, selected: name === mode })))));
    const key = el("div");
    const repaint = () => { paint(spans, row); key.replaceChildren(scale()); };
    picks.querySelector("select").addEventListener("change", (event) => { mode = event.target.value; repaint(); });
    if (row[mode] === undefined) mode = "a";
    repaint();
    const hint = el("p", { className: "quiet", textContent: "Numbers of a token: point at it, tap it, or focus the text and press the arrow keys." });
    box.append(picks, key, hint, frame);
  };
  /* Of every other run its completions of this prompt, at the step that is nearest. */
  const sameInOtherRuns = (row) => data.runs.flatMap((name, run) => {
    const theirs = run === row.r ? [] : rows.filter((other) => other.r === run && other.p === row.p);
    if (!theirs.length) return [];
    const step = theirs.reduce((best, other) => (Math.abs(other.s - row.s) < Math.abs(best - row.s) ? other.s : best), theirs[0].s);
    const there = theirs.filter((other) => other.s === step).sort((a, b) => (b.w ?? -Infinity) - (a.w ?? -Infinity));
    return [el("div", { className: "elsewhere" },
      el("h4", {}, el("span", { className: `key s${run % 8}` }), ` ${visible(name)}, step ${step}`),
      ...there.map((other) => {
        const button = el("button", { type: "button", className: "open", "aria-label": `Open this completion of ${visible(name)}` }, num(other.w), ...flags(other));
        button.addEventListener("click", () => { $("run").value = run; choices(); filter(); show(other, true); $("detail").focus({ preventScroll: true }); });
        return el("div", { className: "beside" }, button, el("div", { className: "text", textContent: visible(text(other)) || "(empty)" }));
      }))];
  });
  const show = (row, scroll) => {
    chosen = row;
    const names = data.parts[row.r] ?? [];
    const facts = el("dl", {},
      el("dt", { textContent: "Reward" }), el("dd", {}, row.w === null ? "unscorable" : num(row.w, 4), ...flags(row)),
      ...(names.length > 1 ? row.c.flatMap((v, i) => [el("dt", { textContent: visible(names[i] ?? i) }), el("dd", { textContent: num(v, 4) })]) : []),
      el("dt", { textContent: "Length" }), el("dd", { textContent: `${row.n} tokens` + (row.cut === undefined ? "" : `; cut for the page (${row.cut} characters in all)`) }));
    const group = rows.filter((other) => other.r === row.r && other.s === row.s && other.g === row.g);
    const others = el("div", { className: "others", role: "group", "aria-label": "Completions of the same prompt" }, ...group.map((other, i) => {
      const button = el("button", { type: "button", textContent: `#${i + 1}: ${num(other.w)}`, "aria-pressed": String(other === row) });
      button.disabled = other === row;
      button.addEventListener("click", () => { show(other, false); $("detail").focus({ preventScroll: true }); });
      return button;
    }));
    const elsewhere = sameInOtherRuns(row);
    const asked = Object.entries(JSON.parse(data.columns[row.d]));
    const given = el("dl", { id: "columns" }, ...asked.flatMap(([name, value]) => [
      el("dt", { textContent: visible(name) }), el("dd", { textContent: visible(value ?? "–") })]));
    const box = $("detail");
    box.replaceChildren(el("h3", { textContent: `Step ${row.s}, group ${row.g + 1}` }), facts,
      el("h3", { textContent: "Prompt" }), el("div", { className: "text", textContent: visible(data.prompts[row.p]) || "(empty)" }),
      ...(asked.length ? [el("h3", { textContent: "Its row: what the reward reads" }), given] : []), el("h3", { textContent: "Completion" }));
    if (row.t && row.t.length) tokens(row, box);
    else box.append(el("div", { className: "text", textContent: visible(text(row)) || "(empty)" }));
    box.append(el("h3", { textContent: "Its group, by reward" }), others);
    if (group.length > 1 && group.every((other) => other.w === row.w)) {
      box.append(el("p", { className: "quiet", textContent: "All rewards of this group are equal: under a group baseline none of its tokens gets any credit." }));
    }
    if (elsewhere.length) box.append(el("h3", { textContent: "The same prompt in the other runs" }), ...elsewhere);
    for (const button of $("list").querySelectorAll("button")) {
      if (button.row === row) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    if (scroll && matchMedia("(max-width: 800px)").matches) box.scrollIntoView();
  };

  /* Where nothing was kept, there is nothing to search. */
  const begin = () => {
    for (const part of [$("filters"), $("count"), document.querySelector(".two")]) part.hidden = !rows.length;
    options("run", data.runs.map((name, i) => [i, name]));
    $("run-label").hidden = data.runs.length < 2;
    choices();
  };
  begin();
  $("filters").addEventListener("input", (event) => { if (event.target.id === "run") choices(); filter(); });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(() => { choices(); filter(); }));
  filter();
  const credited = (row) => row.a !== undefined && (Array.isArray(row.a) ? row.a.some((v) => v) : row.a !== 0);
  const first = () => { if (found.length) show(found.slice(0, PAGE).find(credited) ?? found[0], false); };
  first();

  /* The completions of `fresh`, under the same filters; what is being read stays. */
  const bringCompletions = (fresh) => {
    const before = chosen, read = before && text(before);
    const wanted = Object.fromEntries(["run", "step", "prompt", "part"].map((id) => [id, $(id).value]));
    if (wanted.prompt) wanted.prompt = String(fresh.prompts.indexOf(data.prompts[+wanted.prompt])); /* their numbers change */
    Object.assign(data, fresh);
    rows = data.rows;
    for (const name of Object.keys(limits)) delete limits[name];
    begin();
    for (const [id, value] of Object.entries(wanted)) if ([...$(id).options].some((o) => o.value === value)) $(id).value = value;
    chosen = before && rows.find((row) => row.r === before.r && row.s === before.s && row.g === before.g && text(row) === read);
    filter();
    if (!before) first();
  };
  keepUp({ $, data, el, curves, bringCompletions });
})();
