"use strict";
(() => {
  const { hue, milliseconds, bytes, element, shape } = draw;
  const by = (id) => document.getElementById(id);
  const DOWN = "#c92a2a";
  const rate = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1)) + "/s";
  const percent = (share) => (100 * share).toFixed(0) + " %";
  const key = (model) => `${model.name}/${model.version}`;
  const history = new Map(); // requests per second of each node and model in the last minute
  const KEPT = 60;
  let plans = new Map();

  const remember = (name, value) => {
    const values = history.get(name) || [];
    values.push(value);
    if (values.length > KEPT) values.shift();
    history.set(name, values);
  };
  const note = (view) => {
    for (const model of view.models) {
      remember(key(model), model.per_s);
      for (const node of model.nodes) remember(`${key(model)}/${node.stage}.${node.replica}`, node.per_s);
    }
  };
  const spark = (name, colour) => {
    const values = history.get(name) || [];
    const top = Math.max(1e-9, ...values);
    const points = values.map((value, at) => `${(100 * at / (KEPT - 1)).toFixed(1)} ${(20 - 18 * value / top).toFixed(1)}`);
    return shape("svg", { class: "spark", viewBox: "0 0 100 22", preserveAspectRatio: "none", role: "img", style: `--hue:${colour}`,
      "aria-label": `requests per second in the last ${values.length} seconds, at most ${top.toFixed(1)}` },
      shape("path", { d: points.length > 1 ? "M" + points.join("L") : "M0 20" }));
  };
  const figure = (name, value) => element("div", {}, element("b", {}, value), element("span", {}, name));

  // ---- one model
  const sections = new Map();
  const section = (model) => {
    const id = key(model);
    if (!sections.has(id)) {
      const parts = {
        root: element("section", { "aria-label": `model ${model.name}`, "data-model": model.name }),
        title: element("h2"), figures: element("div", { class: "figures" }), text: element("div", { class: "figures text" }), trouble: element("p", { class: "trouble" }),
        graph: element("div", { class: "graph" }), detail: element("p", { class: "hint" }), nodes: element("div", { class: "wide" }),
      };
      parts.root.append(parts.title, parts.trouble, parts.figures, parts.text, parts.graph, parts.detail, parts.nodes);
      sections.set(id, parts);
      by("models").append(parts.root);
    }
    return sections.get(id);
  };

  const drawGraph = (model, plan, parts) => {
    const boxes = [{ id: "in", title: "inputs", lines: [rate(model.per_s)], hue: "#888888", outside: true, about: plan.inputs.join(", ") }];
    for (const stage of plan.stages) {
      const nodes = model.nodes.filter((node) => node.stage === stage.index);
      const ready = nodes.filter((node) => node.state === "ready");
      const runs = nodes.filter((node) => node.run_ns);
      const measured = runs.length ? runs.reduce((sum, node) => sum + node.run_ns, 0) / runs.length : 0;
      const busy = nodes.length ? nodes.reduce((sum, node) => sum + node.utilisation, 0) / nodes.length : 0;
      boxes.push({
        id: `s${stage.index}`, title: `stage ${stage.index}` + (ready.length ? "" : ": down"), open: false,
        lines: [`${ready.length} of ${nodes.length} nodes`, `${measured ? milliseconds(measured) : "–"} of ${milliseconds(stage.predicted_ns)}`, `${percent(busy)} busy`],
        hue: ready.length ? hue(stage.index) : DOWN, down: !ready.length,
        about: `Stage ${stage.index}: ${nodes.map((node) => `node ${node.stage}.${node.replica} ${node.state}`).join(", ")}. ` +
          `A request takes ${measured ? milliseconds(measured) : "an unknown time"}; ${milliseconds(stage.predicted_ns)} was predicted. Queue ${nodes.reduce((sum, node) => sum + node.queue, 0).toFixed(1)}.`,
      });
    }
    boxes.push({ id: "out", title: "outputs", lines: [rate(model.per_s)], hue: "#888888", outside: true, about: plan.outputs.join(", ") });
    const planned = (stage) => plan.edges.reduce((sum, edge) => sum + (edge.from === stage ? edge.bytes : 0), 0);
    const sent = (stage) => model.nodes.reduce((sum, node) => sum + (node.stage === stage ? node.output_bytes_per_s : 0), 0);
    const edges = plan.edges.map((edge) => ({
      from: edge.from < 0 ? "in" : `s${edge.from}`, to: edge.to < 0 ? "out" : `s${edge.to}`,
      label: edge.bytes ? [bytes(edge.bytes), `${bytes(Math.round(sent(edge.from) * edge.bytes / planned(edge.from)))}/s`] : [],
    }));
    const focused = parts.graph.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    const scroll = parts.graph.scrollLeft;
    parts.graph.replaceChildren(draw.graph(boxes, edges, { open: () => {}, show: (box) => { parts.detail.textContent = box.about; } }));
    for (const box of boxes) if (box.down) parts.graph.querySelector(`[data-id="${box.id}"]`).classList.add("down");
    parts.graph.scrollLeft = scroll;
    if (focused) parts.graph.querySelector(`[data-id="${focused}"]`)?.focus({ preventScroll: true });
  };

  const drawNodes = (model, plan, parts) => {
    const names = ["node", "state", "requests/s", "", "time", "predicted", "p99", "busy", "queue", "sent", "restarts", "failures"];
    const table = draw.table(names, model.nodes.map((node) => [
      `${node.stage}.${node.replica}`, node.state, node.per_s.toFixed(1), "", node.run_ns ? milliseconds(node.run_ns) : "–",
      milliseconds(plan.stages[node.stage].predicted_ns), node.p99_ns ? milliseconds(node.p99_ns) : "–", percent(node.utilisation),
      node.queue.toFixed(1), bytes(Math.round(node.output_bytes_per_s)) + "/s", node.restarts, node.failures,
    ]));
    [...table.tBodies[0].rows].forEach((row, at) => {
      const node = model.nodes[at];
      row.cells[0].title = `process ${node.pid ?? "–"} on ${node.host ?? "–"}`;
      if (node.state !== "ready") row.cells[1].className = "bad";
      if (node.restarts) row.cells[10].className = "bad";
      row.cells[3].replaceChildren(spark(`${key(model)}/${node.stage}.${node.replica}`, hue(node.stage)));
    });
    parts.nodes.replaceChildren(table);
  };

  const showText = (text, figures) => {
    figures.hidden = !text;
    if (!text) return;
    figures.replaceChildren(
      figure("tokens/s", text.tokens_per_s.toFixed(1)), figure("sequences running", text.running), figure("sequences waiting", text.waiting),
      figure("time to first token", text.first_token_ns ? milliseconds(text.first_token_ns) : "–"),
      figure("between tokens", text.gap_ns ? milliseconds(text.gap_ns) : "–"),
      figure("caches", bytes(text.cache_bytes)), figure("caches reserved", percent(text.cache_usage)),
      figure("sequences in a step", text.rows_per_step ? text.rows_per_step.toFixed(1) : "–"), figure("replays", text.replays));
  };

  const show = (view) => {
    by("health").textContent = view.ready ? "ready" : "not ready";
    by("health").className = "pill " + (view.ready ? "good" : "bad");
    const wanted = new Set(view.models.map(key));
    for (const [id, parts] of sections) if (!wanted.has(id)) { parts.root.remove(); sections.delete(id); }
    for (const model of view.models) {
      const plan = plans.get(key(model));
      const parts = section(model);
      parts.title.replaceChildren(`${model.name} `, element("span", { class: "hint" }, `version ${model.version} `),
        element("span", { class: "pill " + (model.ready ? "good" : "bad") }, model.ready ? "ready" : model.state === "ready" ? "a stage is down" : model.state));
      const trouble = [model.reason, model.cause && `Last node lost: ${model.cause.split("\n")[0]}`, model.last_error && `Last error: ${model.last_error}`].filter(Boolean);
      parts.trouble.hidden = !trouble.length;
      parts.trouble.replaceChildren(...trouble.flatMap((line, at) => (at ? [element("br"), line] : [line])));
      parts.figures.replaceChildren(
        figure("requests/s", model.per_s.toFixed(1)), element("div", {}, spark(key(model), "var(--accent)"), element("span", {}, "last minute")),
        figure("median", model.p50_ns ? milliseconds(model.p50_ns) : "–"), figure("99th percentile", model.p99_ns ? milliseconds(model.p99_ns) : "–"),
        figure("waiting", model.waiting), figure("in the pipeline", model.inside), figure("failures/s", model.failures_per_s.toFixed(1)),
        figure("retries", model.retries), figure("nodes lost", model.losses));
      showText(model.text, parts.text);
      parts.graph.hidden = parts.nodes.hidden = !plan || !model.nodes.length;
      if (plan && model.nodes.length) { drawGraph(model, plan, parts); drawNodes(model, plan, parts); }
    }
    window.chatModels(view.models);
    const select = by("model"), names = [...new Set(view.models.map((model) => model.name))];
    if (names.join("\n") !== [...select.options].map((option) => option.value).join("\n"))
      select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  };

  // ---- live
  const source = new EventSource("events");
  source.addEventListener("plans", (event) => { plans = new Map(JSON.parse(event.data).map((plan) => [key(plan), plan])); });
  source.addEventListener("history", (event) => {
    history.clear();
    const views = JSON.parse(event.data);
    views.forEach(note);
    if (views.length) show(views[views.length - 1]);
  });
  source.addEventListener("message", (event) => { const view = JSON.parse(event.data); note(view); show(view); by("news").textContent = ""; });
  source.addEventListener("full", () => { by("news").textContent = "Too many pages are open; this one is not updated."; source.close(); });
  source.addEventListener("error", () => {
    by("health").textContent = "no connection"; by("health").className = "pill bad";
    by("news").textContent = "The server does not answer; trying again.";
  });

  // ---- one request
  const SIZES = { BOOL: 1, UINT8: 1, INT8: 1, UINT16: 2, INT16: 2, FP16: 2, BF16: 2, UINT32: 4, INT32: 4, FP32: 4, UINT64: 8, INT64: 8, FP64: 8, BYTES: 4 };
  const half = (bits) => {
    const sign = bits >> 15 ? -1 : 1, power = (bits >> 10) & 31, part = bits & 1023;
    return sign * (power === 31 ? (part ? NaN : Infinity) : power ? 2 ** (power - 15) * (1 + part / 1024) : 2 ** -14 * (part / 1024));
  };
  const READ = {
    BOOL: (v, at) => !!v.getUint8(at), UINT8: (v, at) => v.getUint8(at), INT8: (v, at) => v.getInt8(at),
    UINT16: (v, at) => v.getUint16(at, true), INT16: (v, at) => v.getInt16(at, true), UINT32: (v, at) => v.getUint32(at, true),
    INT32: (v, at) => v.getInt32(at, true), UINT64: (v, at) => v.getBigUint64(at, true), INT64: (v, at) => v.getBigInt64(at, true),
    FP16: (v, at) => half(v.getUint16(at, true)), FP32: (v, at) => v.getFloat32(at, true), FP64: (v, at) => v.getFloat64(at, true),
    BF16: (v, at) => { const four = new DataView(new ArrayBuffer(4)); four.setUint16(2, v.getUint16(at, true), true); return four.getFloat32(0, true); },
  };
  const first = (view, datatype, most = 6) => {
    const values = [];
    let at = 0;
    while (at < view.byteLength && values.length < most) {
      if (datatype === "BYTES") {
        const size = view.getUint32(at, true);
        values.push(JSON.stringify(new TextDecoder().decode(new Uint8Array(view.buffer, view.byteOffset + at + 4, size))));
        at += 4 + size;
      } else {
        const value = READ[datatype](view, at);
        values.push(typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(6) : String(value));
        at += SIZES[datatype];
      }
    }
    return values.join(", ") + (at < view.byteLength ? ", …" : "");
  };
  const sized = (inputs) => inputs.map((input) => ({ ...input, shape: input.shape.map((size) => (size < 0 ? 1 : size)) }));
  const elements = (input) => input.shape.reduce((a, b) => a * b, 1);
  const asked = async (name) => {
    const response = await fetch(`v2/models/${encodeURIComponent(name)}`);
    return sized((await response.json()).inputs);
  };
  const prepared = {
    example: async (name) => {
      const response = await fetch(`example/${encodeURIComponent(name)}`);
      if (!response.ok) throw new Error((await response.json()).error);
      return { body: await response.arrayBuffer(), length: response.headers.get("inference-header-content-length") };
    },
    zeros: async (name) => {
      const inputs = await asked(name);
      const sizes = inputs.map((input) => elements(input) * SIZES[input.datatype]);
      const head = new TextEncoder().encode(JSON.stringify({
        inputs: inputs.map(({ name, datatype, shape }, at) => ({ name, datatype, shape, parameters: { binary_data_size: sizes[at] } })) }));
      const body = new Uint8Array(head.length + sizes.reduce((a, b) => a + b, 0));
      body.set(head);
      return { body, length: String(head.length) };
    },
    json: async () => ({ body: by("json").value, length: null }),
  };
  const binary = (body, length) => { // ask for the outputs as bytes, because only their beginning is shown
    if (length === null) {
      const said = JSON.parse(body);
      return { body: JSON.stringify({ ...said, parameters: { ...said.parameters, binary_data_output: true } }), length };
    }
    const whole = new Uint8Array(body), head = JSON.parse(new TextDecoder().decode(whole.subarray(0, Number(length))));
    const asking = new TextEncoder().encode(JSON.stringify({ ...head, parameters: { ...head.parameters, binary_data_output: true } }));
    const made = new Uint8Array(asking.length + whole.length - Number(length));
    made.set(asking);
    made.set(whole.subarray(Number(length)), asking.length);
    return { body: made, length: String(asking.length) };
  };
  const shown = (answer, buffer, length) => {
    let at = length;
    return answer.outputs.map((output) => {
      const size = output.parameters?.binary_data_size;
      if (size === undefined) return [output.name, output.datatype, `[${output.shape.join(", ")}]`, output.data.slice(0, 6).join(", ")];
      const view = new DataView(buffer, at, size);
      at += size;
      return [output.name, output.datatype, `[${output.shape.join(", ")}]`, first(view, output.datatype)];
    });
  };
  by("source").addEventListener("change", async () => {
    const own = by("source").value === "json";
    by("json-label").hidden = !own;
    if (!own) return;
    const inputs = await asked(by("model").value);
    by("json").value = JSON.stringify({ inputs: inputs.map(({ name, datatype, shape }) => {
      const count = elements({ shape });
      return { name, datatype, shape, data: count <= 256 ? Array(count).fill(datatype === "BYTES" ? "" : datatype === "BOOL" ? false : 0) : [] };
    }) }, null, 1);
  });
  by("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    by("run").disabled = true;
    by("ran").textContent = "running";
    by("outputs").replaceChildren();
    try {
      const name = by("model").value;
      const made = await prepared[by("source").value](name);
      const { body, length } = binary(made.body, made.length);
      const begun = performance.now();
      const response = await fetch(`v2/models/${encodeURIComponent(name)}/infer`, {
        method: "POST", body, headers: { "content-type": "application/octet-stream", ...(length ? { "inference-header-content-length": length } : {}) } });
      const buffer = await response.arrayBuffer();
      const took = performance.now() - begun;
      const head = Number(response.headers.get("inference-header-content-length") || buffer.byteLength);
      const answer = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 0, head)));
      if (!response.ok) throw new Error(answer.error);
      by("outputs").append(draw.table(["output", "type", "shape", "begins with"], shown(answer, buffer, head)));
      by("ran").textContent = `Answered in ${took.toFixed(1)} ms.`;
    } catch (error) {
      by("ran").textContent = `No answer: ${error.message}`;
    } finally {
      by("run").disabled = false;
    }
  });
})();
