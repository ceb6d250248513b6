/* Keeping up with a run that goes on: a page in a file loads itself again, a page that is served is brought up to date. */
const keepUp = ({ $, data, el, curves, bringCompletions }) => {
  const live = $("live");
  if (!live) return;
  const LATE = 3, SHORTEST = 2000; /* times its seconds until a page is late; milliseconds between two fetches */
  const ago = (seconds) => {
    const parts = [[86400, "day"], [3600, "hour"], [60, "minute"], [1, "second"]];
    const [length, name] = parts.find(([length]) => seconds >= 2 * length || length === 1), count = Math.round(seconds / length);
    return count < 1 ? "just now" : `${count} ${name}${count === 1 ? "" : "s"} ago`;
  };
  const head = live.querySelector("strong"), age = $("age"), more = $("reload");

  const ofFile = () => {
    const { when } = live.dataset, written = 1000 * +live.dataset.written, seconds = +live.dataset.seconds;
    const reload = setInterval(() => location.reload(), 1000 * seconds);
    const tell = () => {
      const old = (Date.now() - written) / 1000;
      age.textContent = `This page was written ${ago(old)}, ${when}.`;
      if (old < Math.max(LATE * seconds, 60)) return;
      head.textContent = "The run went on when this page was written.";
      age.textContent += " No newer one has come: the run is in a long step, or its process is gone.";
    };
    tell();
    setInterval(tell, 1000);
    const stay = () => {
      clearInterval(reload);
      more.textContent = "It stays as it is while you use it; load it again to see newer steps.";
    };
    for (const kind of ["pointerdown", "keydown"]) addEventListener(kind, stay, { once: true, capture: true });
  };

  /* What the keyboard is at in the curves, to be found again in their new form: a chart's title and a place in its figure. */
  const focusables = (figure) => [...figure.querySelectorAll("svg, button")];
  const titleOf = (figure) => figure.querySelector("figcaption strong").textContent;
  const focusKept = (replace) => {
    const figure = document.activeElement?.closest("#curve-groups figure");
    const title = figure && titleOf(figure), place = figure && focusables(figure).indexOf(document.activeElement);
    replace();
    const now = figure && [...document.querySelectorAll("#curve-groups figure")].find((each) => titleOf(each) === title);
    if (now) focusables(now)[place]?.focus({ preventScroll: true });
  };
  const putInPlace = (fresh) => {
    for (const id of ["outcome", "doctor"]) {
      const [old, now] = [$(id), fresh.getElementById(id)];
      if (old.sent === now.innerHTML) continue;
      const open = new Set([...old.querySelectorAll("details[open] > summary")].map((each) => each.textContent));
      const sent = now.innerHTML;
      old.replaceChildren(...now.childNodes);
      for (const each of old.querySelectorAll("summary")) if (open.has(each.textContent)) each.parentElement.open = true;
      old.sent = sent;
    }
    const { charts, clocks } = JSON.parse(fresh.getElementById("data").textContent);
    Object.assign(data, { charts, clocks });
    focusKept(() => {
      $("curve-groups").replaceChildren(...fresh.getElementById("curve-groups").childNodes);
      $("how").hidden = !charts.length;
      curves.take();
    });
  };

  const ofServer = () => {
    const from = (name) => fetch(name + location.search, { cache: "no-store" });
    let state = null, shown = +live.dataset.version, busy = false, heard = Date.now();
    const button = el("button", { type: "button", hidden: true });
    $("shown").after(button);
    const bring = async () => {
      if (busy || !state || state.version === shown || document.querySelector(".chart:active")) return;
      busy = true;
      const version = state.version;
      try {
        const answer = await from("now");
        if (answer.ok) putInPlace(new DOMParser().parseFromString(await answer.text(), "text/html"));
        if (answer.ok) shown = version;
      } catch { /* the connection is lost; the stream of events says so, and comes back */ }
      setTimeout(() => { busy = false; bring(); }, SHORTEST);
    };
    const steps = () => data.steps_there.reduce((a, b) => a + b, 0);
    const bringRows = async () => {
      const answer = await from("completions");
      if (!answer.ok) return;
      bringCompletions(await answer.json());
      button.hidden = true;
    };
    button.addEventListener("click", bringRows);
    const tell = () => {
      const late = Date.now() - heard > 45_000;
      more.textContent = late ? "The server does not answer: this is what was known then." : "";
      if (!state) return;
      head.textContent = state.head;
      age.textContent = state.text + (state.at ? ` (${ago(Date.now() / 1000 - state.at)})` : "");
    };
    const events = new EventSource("events" + location.search);
    events.addEventListener("state", (event) => {
      heard = Date.now();
      state = JSON.parse(event.data);
      if (state.begun !== live.dataset.begun) return location.reload(); /* the run begins, or another one is in its place */
      tell();
      bring();
      const newer = state.completions - steps();
      button.hidden = newer <= 0;
      button.textContent = `Show the completions of ${newer} newer step${newer === 1 ? "" : "s"}`;
      if (newer > 0 && !data.rows.length) bringRows();
    });
    events.addEventListener("beat", () => { heard = Date.now(); });
    events.addEventListener("error", () => { heard = Math.min(heard, Date.now() - 46_000); tell(); });
    setInterval(tell, 1000);
  };

  if (live.dataset.begun === undefined) ofFile();
  else ofServer();
};
