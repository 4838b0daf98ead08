// The page of `onnxsplit advise`: a picture and a table of the candidates.
"use strict";
(() => {
  const { element, shape, hue, milliseconds, bytes } = draw;
  const by = (id) => document.getElementById(id);
  const { model, wishes, asked, rows, reason, whole, commands, notes } = JSON.parse(by("data").textContent);
  const rate = (value) => value >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
  const KINDS = ["session", "replicas", "stages", "hybrid"];

  by("title").textContent = `How to run ${model}`;
  by("asked").textContent = asked;
  by("reason").textContent = whole ? `${reason} ${whole}` : reason;
  by("commands").textContent = commands.join("\n");
  by("commands").hidden = !commands.length;
  by("notes").append(...notes.map((note) => element("p", {}, note)));

  // ---- picture: the rate to the right, the p99 upwards in powers of ten
  const figures = (row) => row.choice.measured || row.choice.predicted;
  const shown = rows.filter((row) => figures(row) && figures(row).p99_ns && row.rate_per_s > 0 && !row.choice.left_out);
  if (shown.length) {
    const [width, height, left, bottom, top, right] = [1000, 460, 70, 50, 20, 40];
    const times = shown.map((row) => figures(row).p99_ns).concat(wishes.p99_ns || []);
    const low = Math.log10(Math.min(...times)) - 0.15, high = Math.log10(Math.max(...times)) + 0.15;
    const most = 1.1 * Math.max(...shown.map((row) => row.rate_per_s), wishes.rate_per_s || 0);
    const x = (value) => left + (width - left - right) * value / most;
    const y = (ns) => height - bottom - (height - bottom - top) * (Math.log10(ns) - low) / (high - low);
    const largest = Math.max(1, ...shown.map((row) => row.choice.total_bytes));
    const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "Rate against p99 of all candidates" });
    const step = 10 ** Math.floor(Math.log10(most)) / (most / 10 ** Math.floor(Math.log10(most)) < 3 ? 4 : 1);
    for (let value = 0; value <= most; value += step) {
      svg.append(shape("line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: height - bottom }),
        shape("text", { x: x(value), y: height - bottom + 18, "text-anchor": "middle" }, rate(value)));
    }
    for (let power = Math.floor(low); power <= high; power++) for (const part of [1, 2, 5]) {
      const ns = part * 10 ** power;
      if (Math.log10(ns) < low || Math.log10(ns) > high) continue;
      svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(ns), y2: y(ns) }),
        shape("text", { x: left - 8, y: y(ns) + 4, "text-anchor": "end" }, milliseconds(ns)));
    }
    svg.append(shape("text", { x: (width + left) / 2, y: height - 8, "text-anchor": "middle" }, "requests per second"),
      shape("text", { x: 8, y: 12 }, "p99"));
    if (wishes.p99_ns) svg.append(shape("line", { class: "limit", x1: left, x2: width - right, y1: y(wishes.p99_ns), y2: y(wishes.p99_ns) }));
    if (wishes.rate_per_s) svg.append(shape("line", { class: "limit", x1: x(wishes.rate_per_s), x2: x(wishes.rate_per_s), y1: top, y2: height - bottom }));
    const front = shown.filter((row) => row.on_front).sort((a, b) => a.rate_per_s - b.rate_per_s);
    svg.append(shape("path", { class: "front", d: "M" + front.map((row) => `${x(row.rate_per_s)} ${y(figures(row).p99_ns)}`).join("L") }));
    for (const row of shown) {
      const { candidate, measured, total_bytes } = row.choice, found = figures(row);
      const dot = shape("circle", {
        cx: x(row.rate_per_s), cy: y(found.p99_ns), r: 5 + 17 * Math.sqrt(total_bytes / largest), tabindex: 0,
        style: `--hue:${hue(KINDS.indexOf(candidate.kind))}`,
        class: `${measured ? "" : "predicted"} ${row.picked ? "picked" : ""}`,
      }, shape("title", {}, `${row.name}: ${rate(row.rate_per_s)}/s, p99 ${milliseconds(found.p99_ns)}, ${bytes(total_bytes)}`));
      svg.append(dot);
      if (row.on_front || row.picked) {
        const end = row.rate_per_s > most / 2;
        svg.append(shape("text", { class: "name", x: x(row.rate_per_s) + (end ? -26 : 26), y: y(found.p99_ns) - 10, "text-anchor": end ? "end" : "start" }, row.name));
      }
    }
    by("picture").append(svg);
  } else by("picture").append(element("p", {}, "No candidate has a p99 at the rate that was asked for."));

  // ---- table
  const time = (ns) => ns == null ? "" : milliseconds(ns);
  const table = draw.table(["candidate", "predicted limit/s", "measured limit/s", "at rate/s", "p50", "p99", "memory of a device", "memory in all", ""],
    rows.map((row) => {
      const { predicted, measured, memory_bytes, total_bytes, left_out, not_run } = row.choice, found = figures(row);
      const marks = [row.picked && "picked", row.on_front && "front", !row.keeps && found && "not as asked", left_out || (measured ? "" : not_run || "not run")];
      return [row.name, predicted ? rate(predicted.limit_per_s) : "", measured ? rate(measured.limit_per_s) : "", found ? rate(found.rate_per_s) : "",
        time(found && found.p50_ns), time(found && found.p99_ns), bytes(memory_bytes), bytes(total_bytes), marks.filter(Boolean).join(", ")];
    }));
  table.querySelectorAll("tbody tr").forEach((line, number) => { if (rows[number].picked) line.className = "picked"; });
  by("table").append(table);
})();
