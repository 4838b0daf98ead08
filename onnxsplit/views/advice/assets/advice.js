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
  const meet = (one, other) => one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom;
  const around = (points) => ({ left: Math.min(...points.map((p) => p.x)) - 2, right: Math.max(...points.map((p) => p.x)) + 2,
    top: Math.min(...points.map((p) => p.y)) - 2, bottom: Math.max(...points.map((p) => p.y)) + 2 });
  const pieces = (from, to) => { // boxes that cover a straight line
    const count = Math.max(1, Math.ceil(Math.hypot(to.x - from.x, to.y - from.y) / 8));
    const at = (k) => ({ x: from.x + (to.x - from.x) * k / count, y: from.y + (to.y - from.y) * k / count });
    return Array.from({ length: count }, (_, k) => around([at(k), at(k + 1)]));
  };
  // The first place beside a circle, near ones first, where a name meets nothing that is there already.
  const place = (circle, width, frame, taken) => {
    for (const away of [6, 14, 26]) for (const [dx, dy] of [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [-1, -1], [1, 1], [-1, 1]]) {
      const reach = circle.r + away, x = circle.x + dx * (reach + width / 2), y = circle.y + dy * (reach + 8);
      const box = { left: x - width / 2 - 3, right: x + width / 2 + 3, top: y - 9, bottom: y + 9 };
      if (box.left >= frame.left && box.right <= frame.right && box.top >= frame.top && box.bottom <= frame.bottom && !taken.some((one) => meet(one, box))) return box;
    }
    return null;
  };
  const picture = (width) => {
    const phone = width < 600, [height, left, bottom, top, right] = [phone ? 340 : 460, 66, 50, 26, 16];
    const times = shown.map((row) => figures(row).p99_ns).concat(wishes.p99_ns || []);
    const low = Math.log10(Math.min(...times)) - 0.15, high = Math.log10(Math.max(...times)) + 0.15;
    const most = 1.1 * Math.max(...shown.map((row) => row.rate_per_s), wishes.rate_per_s || 0);
    const x = (value) => left + (width - left - right) * value / most;
    const y = (ns) => height - bottom - (height - bottom - top) * (Math.log10(ns) - low) / (high - low);
    const largest = Math.max(1, ...shown.map((row) => row.choice.total_bytes));
    const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "Rate against p99 of all candidates" });
    const power = 10 ** Math.floor(Math.log10(most)), step = [0.1, 0.2, 0.25, 0.5, 1, 2, 5].map((part) => part * power).find((one) => most / one <= width / 90) || power;
    for (let value = 0; value <= most; value += step) {
      svg.append(shape("line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: height - bottom }),
        shape("text", { x: x(value), y: height - bottom + 18, "text-anchor": "middle" }, value ? rate(value) : "0"));
    }
    for (let power = Math.floor(low); power <= high; power++) for (const part of [1, 2, 5]) {
      const ns = part * 10 ** power;
      if (Math.log10(ns) < low || Math.log10(ns) > high) continue;
      svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(ns), y2: y(ns) }),
        shape("text", { x: left - 8, y: y(ns) + 4, "text-anchor": "end" }, milliseconds(ns)));
    }
    svg.append(shape("text", { x: (width + left) / 2, y: height - 8, "text-anchor": "middle" }, "requests per second"), shape("text", { x: 8, y: 14 }, "p99"));
    const taken = [];
    const line = (name, from, to) => { svg.append(shape("line", { class: name, x1: from.x, x2: to.x, y1: from.y, y2: to.y })); taken.push(...pieces(from, to)); };
    if (wishes.p99_ns) line("limit", { x: left, y: y(wishes.p99_ns) }, { x: width - right, y: y(wishes.p99_ns) });
    if (wishes.rate_per_s) line("limit", { x: x(wishes.rate_per_s), y: top }, { x: x(wishes.rate_per_s), y: height - bottom });
    const spot = (row) => ({ x: x(row.rate_per_s), y: y(figures(row).p99_ns), r: 5 + (phone ? 9 : 17) * Math.sqrt(row.choice.total_bytes / largest) });
    const front = shown.filter((row) => row.on_front).sort((a, b) => a.rate_per_s - b.rate_per_s).map(spot);
    svg.append(shape("path", { class: "front", d: "M" + front.map((at) => `${at.x} ${at.y}`).join("L") }));
    front.slice(1).forEach((to, number) => taken.push(...pieces(front[number], to)));
    for (const row of shown) {
      const { candidate, measured, total_bytes } = row.choice, at = spot(row);
      svg.append(shape("circle", {
        cx: at.x, cy: at.y, r: at.r, tabindex: 0, style: `--hue:${hue(KINDS.indexOf(candidate.kind))}`,
        class: `${measured ? "" : "predicted"} ${row.picked ? "picked" : ""}`,
      }, shape("title", {}, `${row.name}: ${rate(row.rate_per_s)}/s, p99 ${milliseconds(figures(row).p99_ns)}, ${bytes(total_bytes)}`)));
      taken.push({ left: at.x - at.r - 2, right: at.x + at.r + 2, top: at.y - at.r - 2, bottom: at.y + at.r + 2 });
    }
    const frame = { left: left + 1, right: width - 2, top: top - 6, bottom: height - bottom - 1 };
    for (const row of shown.filter((one) => one.on_front || one.picked).sort((a, b) => Number(b.picked) - Number(a.picked))) {
      const box = place(spot(row), draw.lengthOf(row.name, 12), frame, taken);
      if (!box) continue; // the table has its name, too
      taken.push(box);
      svg.append(shape("g", { class: "name" }, shape("rect", { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top, rx: 3 }),
        shape("text", { x: (box.left + box.right) / 2, y: box.bottom - 5, "text-anchor": "middle" }, row.name)));
    }
    return svg;
  };
  if (shown.length) {
    let wide = 0;
    const fit = () => {
      if (by("picture").clientWidth === wide) return;
      wide = by("picture").clientWidth;
      by("picture").replaceChildren(picture(wide));
    };
    addEventListener("resize", fit);
    fit();
    const limits = [wishes.p99_ns && `p99 of ${milliseconds(wishes.p99_ns)}`, wishes.rate_per_s && `${rate(wishes.rate_per_s)} requests/s`].filter(Boolean);
    if (limits.length) by("picture").after(element("p", { class: "legend" }, element("span", {}, element("i", { class: "limit" }), `asked for: ${limits.join(", ")}`)));
  } else by("picture").append(element("p", {}, "No candidate has a p99 at the rate that was asked for."));

  // ---- table
  const time = (ns) => ns == null ? "" : milliseconds(ns);
  const table = draw.table([draw.text("candidate"), "predicted limit/s", "measured limit/s", "at rate/s", "p50", "p99", "memory of a device", "memory in all", draw.text("")],
    rows.map((row) => {
      const { predicted, measured, memory_bytes, total_bytes, left_out, not_run } = row.choice, found = figures(row);
      const marks = [row.picked && "picked", row.on_front && "front", !row.keeps && found && "not as asked", left_out || (measured ? "" : not_run || "not run")];
      return [row.name, predicted ? rate(predicted.limit_per_s) : "", measured ? rate(measured.limit_per_s) : "", found ? rate(found.rate_per_s) : "",
        time(found && found.p50_ns), time(found && found.p99_ns), bytes(memory_bytes), bytes(total_bytes), marks.filter(Boolean).join(", ")];
    }), { cards: true });
  table.querySelectorAll("tbody tr").forEach((line, number) => { if (rows[number].picked) line.className = "picked"; });
  by("table").append(table);
})();
