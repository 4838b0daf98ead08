"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { plan, ops, sweep } = data;
  const { hue, milliseconds, number, bytes, element, text } = draw;
  const by = (id) => document.getElementById(id);
  const MOST = 200; // boxes drawn at once
  const percent = (share) => (100 * share).toFixed(2).replace(/\.?0+$/, "") + " %";
  const timeOf = (stage) => stage.measured_time_ns ?? stage.predicted_time_ns;
  const sum = (values) => values.reduce((a, b) => a + b, 0);

  // ---- title and summary
  const { prediction } = plan;
  document.title = `${data.model} in ${plan.stages.length} stages`;
  by("title").textContent = `${data.model}, ${plan.stages.length} ${plan.stages.length === 1 ? "stage" : "stages"}`;
  const memory = prediction.lower_bound_bytes != null;
  const value = memory ? bytes(prediction.peak_memory_bytes)
    : milliseconds(plan.objective === "latency" ? prediction.latency_ns : prediction.bottleneck_ns);
  const bound = memory ? bytes(prediction.lower_bound_bytes) : milliseconds(prediction.lower_bound_ns);
  by("summary").textContent =
    `${{ throughput: "Bottleneck", latency: "Latency", memory: "Largest memory of a stage" }[plan.objective]} ${value}; no cut is below ${bound} ` +
    `(gap ${percent(prediction.gap)}). ${prediction.throughput_per_s.toFixed(1)} requests/s, one request in ${milliseconds(prediction.latency_ns)}. ` +
    `The whole model: ${milliseconds(plan.costs.whole_time_ns)}, ${bytes(plan.costs.whole_weight_bytes)} of weights. ` +
    `Times are ${plan.costs.source}${plan.costs.interval == null ? "" : `, ±${percent(plan.costs.interval)}`}. ${plan.strategy} split, ${plan.parallel} parallel.`;

  // ---- bars
  const sent = plan.stages.map((stage) => sum(plan.cuts.filter((cut) => cut.from_stage === stage.index).map((cut) => cut.bytes)));
  const bars = (title, values, format, { marks = [], part, notes, labels } = {}) => {
    const top = 1.02 * Math.max(1, ...values, ...marks.map((mark) => mark.value));
    const rows = values.map((value, index) => ({
      name: labels ? labels[index] : `stage ${index}`, value: format(value) + (notes ? notes[index] : ""),
      parts: [{ from: 0, to: value / top, hue: hue(index) }, ...(part ? [{ from: 0, to: part[index] / top, hue: hue(index), class: "hatched" }] : [])],
    }));
    return draw.bars(title, rows, marks.map((mark) => ({ at: mark.value / top, class: mark.class })));
  };
  const legend = (marks, format) => element("p", { class: "legend" },
    ...marks.map((mark) => element("span", {}, element("b", { class: mark.class }), `${mark.name} ${format(mark.value)}${mark.more}`)));
  if (plan.stages.length) {
    const times = plan.stages.map(timeOf);
    const marks = [{ name: "equal shares", class: "", value: sum(times) / times.length, more: "" }];
    if (plan.objective === "throughput" && prediction.lower_bound_ns)
      marks.push({ name: "lower bound", class: "bound", value: prediction.lower_bound_ns, more: ", transfers included" });
    by("bars").append(
      bars("Time of a run", times, milliseconds, {
        marks,
        notes: plan.stages.map((s) => (s.measured_time_ns ? `, predicted ${milliseconds(s.predicted_time_ns)}` : "") +
          (s.replicas > 1 ? `, ${s.replicas} replicas` : "") + (s.device ? `, on ${s.devices.join(", ")}` : "")),
      }),
      legend(marks, milliseconds),
      bars("Memory (weights hatched)", plan.stages.map((s) => s.peak_memory_bytes), bytes, { part: plan.stages.map((s) => s.weight_bytes) }),
      bars("Bytes sent to other stages", sent, bytes));
  }

  // ---- the verdict
  if (plan.verdict) {
    const nameOfWay = ({ kind, count, threads }) =>
      `${count} ${kind === "stages" && count === 1 ? "stage" : count === 1 ? kind.replace(/s$/, "") : kind}, ${threads} ${threads === 1 ? "thread" : "threads"}`;
    by("verdict").append(element("p", {}, plan.verdict.text),
      bars("Requests per second", plan.verdict.ways.map((way) => way.throughput_per_s), number, {
        labels: plan.verdict.ways.map(nameOfWay),
        notes: plan.verdict.ways.map((way) => `, ${way.source}; one request in ${milliseconds(way.latency_ns)}` + (way.fits ? "" : "; does not fit in memory")),
      }));
  } else by("verdict-section").remove();

  // ---- the decoder
  if (plan.decoder) {
    const { decoder } = plan, caches = (stage) => sum(decoder.states.filter((state) => state.stage === stage.index).map((state) =>
      state.token_bytes * decoder.cache_tokens + state.fixed_bytes * (decoder.cost_rows || 1)));
    const rows = decoder.cost_rows, steps = prediction.throughput_per_s;
    const facts = rows ? [["A step", `${rows} ${rows === 1 ? "sequence" : "sequences"} with ${decoder.cost_context} positions each, in ${milliseconds(prediction.latency_ns)}`],
      ["Tokens per second", `${number(rows * steps)}: ${number(steps)} steps per second with every stage busy, a token for each sequence`]] : [];
    facts.push(["States", `${decoder.states.length}`], ["Memory for caches", `${bytes(sum(plan.stages.map(caches)))}: room for ${decoder.cache_tokens} positions` +
      (decoder.states.some((state) => state.fixed_bytes) ? `, and for the states of ${rows || 1} sequences` : "")]);
    by("decoder").append(element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
      bars("Memory for caches, by stage", plan.stages.map(caches), bytes), ...data.decoder.map((line) => element("p", {}, line)));
  } else by("decoder-section").remove();

  // ---- graph: stages -> atoms (or groups of them) -> ops
  const atoms = new Map();
  ops.forEach((op, place) => {
    const key = op.atom >= 0 ? `a${op.atom}` : `c${place}`;
    if (!atoms.has(key)) atoms.set(key, { stage: op.stage, ops: [] });
    atoms.get(key).ops.push(place);
  });
  const nameOf = (places) => places.length === 1 ? ops[places[0]].name : `${ops[places[0]].name} … ${ops[places[places.length - 1]].name}`;
  const typesOf = (places) => {
    const counts = {};
    for (const place of places) counts[ops[place].type] = (counts[ops[place].type] || 0) + 1;
    return Object.entries(counts).sort((a, b) => b[1] - a[1]).slice(0, 2).map(([type, count]) => count > 1 ? `${count} ${type}` : type).join(", ");
  };
  const group = (items, title) => ({ items, title, places: items.flatMap((item) => item.places) });
  const packed = (items) => {
    if (items.length <= MOST) return items;
    const size = Math.ceil(items.length / Math.ceil(MOST / 2));
    const groups = [];
    for (let first = 0; first < items.length; first += size) {
      const part = items.slice(first, first + size);
      groups.push(group(part, `${part.length} atoms`));
    }
    return groups;
  };
  const leaf = (place) => ({ places: [place], title: ops[place].type, items: null });
  const stageItems = plan.stages.map((stage) => group(
    [...atoms.values()].filter((atom) => atom.stage === stage.index).map((atom) =>
      atom.ops.length === 1 ? leaf(atom.ops[0]) : group(atom.ops.map(leaf), `${atom.ops.length} ops`)),
    `stage ${stage.index}`));
  const root = group(stageItems, data.model);
  let trail = [root];
  let zoom = 1;

  const show = (box) => { by("detail").textContent = box.about; };
  const view = () => {
    const here = trail[trail.length - 1];
    const items = packed(here.items);
    const owner = new Map();
    items.forEach((item, number) => item.places.forEach((place) => owner.set(place, `i${number}`)));
    const boxes = items.map((item, number) => {
      const first = ops[item.places[0]];
      const time = sum(item.places.map((place) => ops[place].time_ns));
      const single = item.items === null;
      return {
        id: `i${number}`, title: here === root || !single ? item.title : first.type,
        lines: here === root ? [`${item.places.length} ops`, milliseconds(time)] : single ? [milliseconds(time)] : [typesOf(item.places), milliseconds(time)],
        hue: hue(first ? first.stage : number), open: !single, item,
        about: item.places.length ? `${nameOf(item.places)}: ${milliseconds(time)}, writes ${bytes(sum(item.places.map((p) => ops[p].bytes)))}` : item.title,
      };
    });
    const edges = new Map();
    const outside = new Map();
    const inside = new Set(here.places);
    const elsewhere = (place, side) => {
      const id = `${side}${ops[place].stage}`;
      if (!outside.has(id)) outside.set(id, { id, title: `stage ${ops[place].stage}`, lines: [], hue: hue(ops[place].stage), outside: true, about: side === "b" ? "before" : "after" });
      return id;
    };
    ops.forEach((op, place) => op.readers.forEach((reader) => {
      if (!inside.has(place) && !inside.has(reader)) return;
      const from = inside.has(place) ? owner.get(place) : elsewhere(place, "b");
      const to = inside.has(reader) ? owner.get(reader) : elsewhere(reader, "z");
      if (from !== to) edges.set(`${from}>${to}`, { from, to });
    }));
    if (here === root) {
      edges.clear();
      for (const cut of plan.cuts) for (const target of cut.to_stages) {
        const key = `i${cut.from_stage}>i${target}`;
        const edge = edges.get(key) || { from: `i${cut.from_stage}`, to: `i${target}`, bytes: 0 };
        edge.bytes += cut.bytes;
        edge.label = [bytes(edge.bytes)];
        edges.set(key, edge);
      }
    }
    const svg = draw.graph([...boxes, ...outside.values()], [...edges.values()], {
      zoom, show, width: by("graph").clientWidth, open: (box) => { if (box.item) { trail.push(box.item); view(); focusFirst(); } },
    });
    by("graph").replaceChildren(svg);
    by("path").replaceChildren(...trail.flatMap((item, depth) => {
      const button = element("button", { type: "button", ...(depth === trail.length - 1 ? { "aria-current": "location" } : {}) }, item.title);
      button.addEventListener("click", () => { trail = trail.slice(0, depth + 1); view(); });
      return depth ? [" › ", button] : [button];
    }));
    by("detail").textContent = "";
  };
  const focusFirst = () => by("graph").querySelector(".box:not(.outside)")?.focus({ preventScroll: true });
  document.addEventListener("keydown", (event) => {
    const within = by("graph").contains(document.activeElement);
    if (event.key === "Escape" && trail.length > 1) { trail.pop(); view(); focusFirst(); }
    if (!within) return;
    if (event.key === "+" || event.key === "-") { zoom = Math.min(3, Math.max(0.2, zoom * (event.key === "+" ? 1.25 : 0.8))); view(); focusFirst(); }
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      const all = [...by("graph").querySelectorAll(".box")];
      all[(all.indexOf(document.activeElement) + step + all.length) % all.length].focus();
    }
  });
  if (plan.stages.length) view();
  let wide = by("graph").clientWidth;
  addEventListener("resize", () => {
    if (!plan.stages.length || wide === by("graph").clientWidth) return;
    wide = by("graph").clientWidth;
    view();
  });

  // ---- tables
  const list = (times) => times.map(draw.digits).join(" · ") + "\u00a0ms";
  const hideEmpty = (id, empty) => { by(id).hidden = empty; };
  hideEmpty("cuts-section", !plan.cuts.length);
  by("cuts").append(draw.table([text("tensor"), text("from"), text("to"), text("type"), "bytes"], plan.cuts.map((cut) => {
    const spec = plan.tensors[cut.tensor];
    return [cut.tensor, `stage ${cut.from_stage}`, cut.to_stages.map((stage) => `stage ${stage}`).join(", "),
      spec ? `${spec.dtype} ${spec.shape ? "[" + spec.shape.join(", ") + "]" : ""}` : "", bytes(cut.bytes)];
  }), { cards: true }));
  hideEmpty("rounds-section", !plan.costs.rounds.length);
  by("rounds").append(draw.table(["round", "stages as predicted", "as measured", "slowest over mean", "prediction off by"],
    plan.costs.rounds.map((round, number) => {
      const top = Math.max(...round.measured_ns), expected = Math.max(...round.predicted_ns);
      return [number + 1, list(round.predicted_ns), list(round.measured_ns),
        (top * round.measured_ns.length / sum(round.measured_ns)).toFixed(3), percent(top / expected - 1)];
    }), { cards: true }));
  hideEmpty("sweep-section", !sweep.length);
  if (sweep.length) {
    const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--soft");
    const axis = (label, scale, side) => ({ label, scale, side, stroke: ink, grid: { show: side !== 1, stroke: () => ink() + "33" }, size: side === 2 ? 36 : 56, labelSize: 18, labelFont: "12px system-ui, sans-serif", font: "12px system-ui, sans-serif" });
    const width = () => Math.min(1100, document.body.clientWidth - 32);
    const chart = new uPlot({
      width: width(), height: 320,
      scales: { x: { time: false }, ms: { range: (u, low, high) => [0, high * 1.05] }, MiB: { range: (u, low, high) => [0, high * 1.05] } },
      axes: [{ ...axis("stages", "x", 2), incrs: [1, 2, 4] }, axis("milliseconds", "ms", 3), axis("MiB", "MiB", 1)],
      series: [{ label: "stages", value: (u, v) => v ?? "" },
        { label: "bottleneck", scale: "ms", stroke: "#3b7dd8", width: 2, value: (u, v) => v == null ? "" : v.toFixed(3) + " ms" },
        { label: "lower bound", scale: "ms", stroke: "#c96f2d", dash: [5, 4], value: (u, v) => v == null ? "" : v.toFixed(3) + " ms" },
        { label: "largest stage in memory", scale: "MiB", stroke: "#3c9a68", width: 2, value: (u, v) => v == null ? "" : v.toFixed(1) + " MiB" }],
    }, [sweep.map((r) => r.stages), sweep.map((r) => r.bottleneck_ns / 1e6), sweep.map((r) => r.lower_bound_ns / 1e6),
      sweep.map((r) => r.peak_memory_bytes / 1048576)], by("sweep"));
    addEventListener("resize", () => chart.setSize({ width: width(), height: 320 }));
    by("sweep-table").append(draw.table(["stages", "bottleneck", "lower bound", "gap", "latency", "largest stage in memory"],
      sweep.map((r) => [r.stages, milliseconds(r.bottleneck_ns), milliseconds(r.lower_bound_ns), percent(r.gap), milliseconds(r.latency_ns), bytes(r.peak_memory_bytes)])));
  }
  by("footer").textContent = `Made by onnxsplit ${plan.created_with.onnxsplit}` +
    (plan.created_with.onnxruntime ? ` with ONNX Runtime ${plan.created_with.onnxruntime}.` : ".");
})();
