// The chart of a model: requests per second and p99, over the last minute or the last hour. Needs uPlot.
"use strict";
const chart = (() => {
  const { element, digits } = draw;
  const SPANS = { minute: { name: "last minute", s: 60, gap_s: 2.5 }, hour: { name: "last hour", s: 3600, gap_s: 15 } };
  const HEIGHT = 200;
  const colour = (name) => () => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const two = (value) => String(value).padStart(2, "0");
  const clock = (seconds, exact = true) => {
    const date = new Date(1000 * seconds);
    return `${two(date.getHours())}:${two(date.getMinutes())}` + (exact ? `:${two(date.getSeconds())}` : "");
  };

  // Points [at_ms, per_s, p99_ns] as the columns that uPlot takes; where no sample was taken there is a gap.
  const columns = (points, gap_s) => {
    const times = [], rates = [], p99s = [];
    for (const [at_ms, per_s, p99_ns] of points) {
      const at = at_ms / 1000, before = times[times.length - 1];
      if (before !== undefined && at - before > gap_s) { times.push((at + before) / 2); rates.push(null); p99s.push(null); }
      times.push(at);
      rates.push(per_s);
      p99s.push(p99_ns ? p99_ns / 1e6 : null);
    }
    return [times, rates, p99s];
  };

  const make = () => {
    const points = { minute: [], hour: [] };
    let shown = "minute", drawn = 0;
    const root = element("div", { class: "chart" });
    const said = element("p", { class: "hint said" });
    const canvas = element("div", { class: "canvas", tabindex: 0, role: "img", "aria-label": "chart of requests per second and p99; arrow keys move along it" });
    const buttons = Object.entries(SPANS).map(([name, span]) => {
      const button = element("button", { type: "button", class: "plain", "aria-pressed": String(name === shown) }, span.name);
      button.addEventListener("click", () => {
        shown = name;
        buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
        refresh();
      });
      return button;
    });
    const key = (name, kind) => element("span", {}, element("i", { class: kind }), name);
    root.append(element("div", { class: "bar-of-chart" }, element("div", { class: "switch", role: "group", "aria-label": "span of the chart" }, ...buttons),
      element("p", { class: "keys" }, key("requests/s", "rate"), key("p99", "p99"))), canvas, said);

    const last = () => points[shown][points[shown].length - 1];
    const say = (at) => {
      const [times, rates, p99s] = plot.data;
      const place = at ?? times.length - 1;
      if (place < 0 || rates[place] == null) { said.textContent = times.length ? "No sample was taken then." : "No sample was taken yet."; return; }
      const over = shown === "hour" ? "10 s until " : "";
      said.textContent = `${over}${clock(times[place])}: ${rates[place].toFixed(1)} requests/s, ${p99s[place] == null ? "none answered" : `p99 ${digits(p99s[place] * 1e6)} ms`}`;
    };
    const axis = (scale, side, values, label) => ({
      scale, side, values, stroke: colour("--soft"), font: "11px system-ui, sans-serif", size: side === 2 ? 26 : 52, gap: 4,
      label, labelSize: label ? 16 : 0, labelFont: "11px system-ui, sans-serif", ticks: { show: false },
      grid: { show: side !== 1, width: 1, stroke: colour("--line") } });
    const range = (_, low, high) => [0, high > 0 ? 1.15 * high : 1];
    const plot = new uPlot({
      width: 320, height: HEIGHT, legend: { show: false }, cursor: { drag: { setScale: false }, y: false },
      scales: { x: { time: true, range: () => { const end = (last()?.[0] ?? Date.now()) / 1000; return [end - SPANS[shown].s, end]; } }, rate: { range }, ms: { range } },
      axes: [{ ...axis("x", 2, (_, splits) => splits.map((at) => clock(at, shown === "minute"))), space: 70 },
        axis("rate", 3, (_, splits) => splits.map(String), "requests/s"), axis("ms", 1, (_, splits) => splits.map(String), "p99, ms")],
      series: [{}, { scale: "rate", stroke: colour("--accent"), width: 2, points: { size: 4 } }, { scale: "ms", stroke: colour("--warm"), width: 1.5, dash: [5, 3], points: { size: 4 } }],
      hooks: { setCursor: [(self) => { if (self.data[0].length) say(self.cursor.left >= 0 ? self.cursor.idx : null); }] },
    }, [[], [], []], canvas);
    root.plot = plot;
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], [times] = plot.data;
      if (!step || !times.length) return;
      event.preventDefault();
      const place = Math.min(times.length - 1, Math.max(0, (plot.cursor.left >= 0 ? plot.cursor.idx : times.length - 1) + step));
      plot.setCursor({ left: plot.valToPos(times[place], "x"), top: 0 });
    });
    const refresh = () => {
      plot.setData(columns(points[shown], SPANS[shown].gap_s));
      if (!(plot.cursor.left >= 0)) say(null);
      drawn = Date.now();
    };
    const fit = () => { const width = canvas.clientWidth; if (width && width !== plot.width) plot.setSize({ width, height: HEIGHT }); };
    const keep = (name, point, most) => {
      const list = points[name];
      if (!point || (list.length && point[0] <= list[list.length - 1][0])) return;
      list.push(point);
      if (list.length > most) list.shift();
    };
    addEventListener("resize", fit);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plot.redraw(false));
    return {
      root,
      past: ({ minute, hour }) => { points.minute = minute.slice(); points.hour = hour.slice(); refresh(); },
      // Every second the chart moves on; for those who want little motion, every ten seconds.
      add: ({ now, bin }) => {
        keep("minute", now, 60);
        keep("hour", bin, 360);
        fit();
        if (!still.matches || Date.now() - drawn > 9_500) refresh();
      },
      remove: () => { removeEventListener("resize", fit); plot.destroy(); root.remove(); },
    };
  };
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  return { make, clock, still };
})();
