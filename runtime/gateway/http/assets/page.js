// The live part of the page: every second the server sends the state of its models.
"use strict";
(() => {
  const { hue, milliseconds, digits, number, bytes, element, shape, text } = draw;
  const by = (id) => document.getElementById(id);
  const DOWN = "#c92a2a";
  const OVER = 1.25; // measured over planned time from which the ratio is marked
  const KEPT = 60;
  const MINUTE_MS = 60_000;
  const rate = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1)) + "/s";
  const percent = (share) => (100 * share).toFixed(0) + " %";
  const key = (model) => `${model.name}/${model.version}`;
  const ago = (ms) => {
    const s = Math.max(0, Math.round(ms / 1000));
    return s < 120 ? `${s} s ago` : s < 7200 ? `${Math.round(s / 60)} min ago` : `${Math.round(s / 3600)} h ago`;
  };
  const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
  const rates = new Map(); // requests per second of each node in each of the last seconds
  let plans = new Map();

  const remember = (name, value) => {
    const values = rates.get(name) || [];
    values.push(value);
    if (values.length > KEPT) values.shift();
    rates.set(name, values);
  };
  const spark = (name, colour) => {
    const values = rates.get(name) || [];
    const top = Math.max(1e-9, ...values);
    const points = values.map((value, at) => `${(100 * at / (KEPT - 1)).toFixed(1)} ${(20 - 18 * value / top).toFixed(1)}`);
    return shape("svg", { class: "spark", viewBox: "0 0 100 22", preserveAspectRatio: "none", role: "img", style: `--hue:${colour}`,
      "aria-label": `requests per second in the last ${values.length} seconds, at most ${top.toFixed(1)}` },
      shape("path", { d: points.length > 1 ? "M" + points.join("L") : "M0 20" }));
  };
  const figure = (name, value) => element("div", {}, element("b", {}, value), element("span", {}, name));

  // The measured time beside the planned one, in words; and by how much it is above, where that is much.
  const beside = (measured, planned, word) => (measured ? `${milliseconds(measured)}, ${word} ${digits(planned)}` : `${word} ${milliseconds(planned)}`);
  const excess = (measured, planned) => (measured > OVER * planned && planned ? `▲ ${number(measured / planned)} x` : "");

  // ---- one model
  const sections = new Map();
  const section = (model) => {
    const id = key(model);
    if (!sections.has(id)) {
      const parts = {
        root: element("section", { "aria-label": `model ${model.name}`, "data-model": model.name }),
        title: element("h2"), figures: element("div", { class: "figures" }), text: element("div", { class: "figures text" }), trouble: element("p", { class: "trouble" }),
        quiet: element("p", { class: "hint quiet" }), recut: element("p", { class: "hint recut" }), generation: 0, chart: chart.make(), slowest: slowest.make(), seen: -1, sizes: new Map(),
        graph: element("div", { class: "graph" }), detail: element("p", { class: "hint detail" }), nodes: element("div", { class: "wide nodes" }),
      };
      parts.root.append(parts.title, parts.trouble, parts.quiet, parts.recut, parts.figures, parts.text, parts.chart.root, parts.graph, parts.detail, parts.nodes, parts.slowest.root);
      sections.set(id, parts);
      by("models").append(parts.root);
    }
    return sections.get(id);
  };
  const isIdle = (model) => !model.answered && !(model.text && (model.text.running || model.text.tokens_per_s));

  const stageBox = (model, plan, stage) => {
    const nodes = model.nodes.filter((node) => node.stage === stage.index);
    const ready = nodes.filter((node) => node.state === "ready");
    const runs = nodes.filter((node) => node.run_ns);
    const handled = runs.reduce((sum, node) => sum + node.per_s, 0);
    const measured = handled ? runs.reduce((sum, node) => sum + node.run_ns * node.per_s, 0) / handled : 0;
    const busy = nodes.length ? nodes.reduce((sum, node) => sum + node.utilisation, 0) / nodes.length : 0;
    const above = excess(measured, stage.predicted_ns);
    return {
      id: `s${stage.index}`, title: `stage ${stage.index}` + (ready.length ? "" : ": down"), open: false,
      lines: [`${ready.length} of ${nodes.length} nodes${stage.replicas ? ` (${stage.replicas})` : ""}, ${percent(busy)} busy`, beside(measured, stage.predicted_ns, plan.word),
        ...(above ? [{ text: `${above} the plan`, class: "over" }] : [])],
      hue: ready.length ? hue(stage.index) : DOWN, down: !ready.length,
      about: `Stage ${stage.index}: ${nodes.map((node) => `node ${node.stage}.${node.replica} ${node.state}`).join(", ")}. ` +
        `A request took ${measured ? milliseconds(measured) : "an unknown time"}; ${milliseconds(stage.predicted_ns)} was ${plan.word}. Queue ${nodes.reduce((sum, node) => sum + node.queue, 0).toFixed(1)}.`,
    };
  };

  const drawGraph = (model, plan, parts) => {
    const passed = isIdle(model) ? "idle" : rate(model.per_s);
    const outside = (id, title, names) => ({ id, title, lines: [passed], hue: "#888888", outside: true, about: names.join(", ") });
    const boxes = [outside("in", "inputs", plan.inputs), ...plan.stages.map((stage) => stageBox(model, plan, stage)), outside("out", "outputs", plan.outputs)];
    const planned = (stage) => plan.edges.reduce((sum, edge) => sum + (edge.from === stage ? edge.bytes : 0), 0);
    const sent = (stage) => model.nodes.reduce((sum, node) => sum + (node.stage === stage ? node.output_bytes_per_s : 0), 0);
    const edges = plan.edges.map((edge) => ({
      from: edge.from < 0 ? "in" : `s${edge.from}`, to: edge.to < 0 ? "out" : `s${edge.to}`,
      label: edge.bytes ? [bytes(edge.bytes), `${bytes(Math.round(sent(edge.from) * edge.bytes / planned(edge.from)))}/s`] : [],
    }));
    const focused = parts.graph.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    const scroll = parts.graph.scrollLeft;
    parts.graph.replaceChildren(draw.graph(boxes, edges, {
      open: () => {}, show: (box) => { parts.detail.textContent = box.about; }, width: parts.graph.clientWidth, sizes: parts.sizes }));
    for (const box of boxes) if (box.down) parts.graph.querySelector(`[data-id="${box.id}"]`).classList.add("down");
    parts.graph.scrollLeft = scroll;
    if (focused) parts.graph.querySelector(`[data-id="${focused}"]`)?.focus({ preventScroll: true });
  };

  const drawNodes = (model, plan, parts) => {
    const columns = [text("node"), text("state"), "requests/s", text(""), "time", "p99", "busy", "queue", "sent", "restarts", "failures"];
    const table = draw.table(columns, model.nodes.map((node) => {
      const planned = plan.stages[node.stage].predicted_ns, above = excess(node.run_ns, planned);
      return [
        `${node.stage}.${node.replica}`, node.state, node.per_s.toFixed(1), spark(`${key(model)}/${node.stage}.${node.replica}`, hue(node.stage)),
        element("span", {}, beside(node.run_ns, planned, plan.word), ...(above ? [" ", element("b", { class: "over" }, above)] : [])),
        node.p99_ns ? milliseconds(node.p99_ns) : "–", percent(node.utilisation), node.queue.toFixed(1),
        bytes(Math.round(node.output_bytes_per_s)) + "/s", node.restarts, node.failures];
    }), { cards: true });
    [...table.tBodies[0].rows].forEach((row, at) => {
      const node = model.nodes[at];
      row.cells[0].title = `process ${node.pid ?? "–"} on ${node.host ?? "–"}`;
      if (node.state !== "ready") row.cells[1].classList.add("bad");
      if (node.restarts) row.cells[9].classList.add("bad");
      if (node.failures) row.cells[10].classList.add("bad");
      row.cells[4].classList.add("wide");
    });
    parts.nodes.replaceChildren(table);
  };

  const showText = (texts, figures) => {
    figures.hidden = !texts;
    if (!texts) return;
    figures.replaceChildren(
      figure("tokens/s", texts.tokens_per_s.toFixed(1)), figure("sequences running", texts.running), figure("sequences waiting", texts.waiting),
      figure("time to first token", texts.first_token_ns ? milliseconds(texts.first_token_ns) : "–"),
      figure("between tokens", texts.gap_ns ? milliseconds(texts.gap_ns) : "–"),
      figure("caches", bytes(texts.cache_bytes)), figure("caches reserved", percent(texts.cache_usage)),
      figure("sequences in a step", texts.rows_per_step ? texts.rows_per_step.toFixed(1) : "–"), figure("replays", texts.replays));
  };

  // ---- what is wrong: with the server, in red, and with requests, in the usual colour
  const lines = (place, all) => {
    place.hidden = !all.length;
    const said = all.flatMap((line, at) => (at ? [element("br"), line] : [line]));
    if (place.textContent !== all.join("")) place.replaceChildren(...said);
  };
  const lastSaid = (failure) => (failure.last ? `: the last said “${failure.last}”` : ".");
  const showTrouble = (model, plan, at_ms, parts) => {
    const { OTHER, INVALID, REJECTED, TIMEOUT, CANCELED } = model.failures;
    const down = plan ? plan.stages.filter((stage) => !model.nodes.some((node) => node.stage === stage.index && node.state === "ready")) : [];
    const troubled = !model.ready || model.nodes.some((node) => node.state !== "ready");
    const story = model.loss && model.loss.story.split("\n")[0];
    const recent = model.loss && (troubled || at_ms - model.loss.at_ms < MINUTE_MS);
    lines(parts.trouble, [
      model.state === "ready" && down.length ? `Stage ${down.map((stage) => stage.index).join(", ")} has no node.`
        : !model.ready && `The model takes no requests: ${model.reason}`,
      recent && `Last node lost: ${story} (${ago(at_ms - model.loss.at_ms)})`,
      OTHER && `${counted(OTHER.count, "request")} of the last minute failed${lastSaid(OTHER)}`].filter(Boolean));
    lines(parts.quiet, [
      INVALID && `${counted(INVALID.count, "request")} of the last minute ${INVALID.count === 1 ? "was" : "were"} refused (wrong input)${lastSaid(INVALID)}`,
      REJECTED && `${counted(REJECTED.count, "request")} of the last minute ${REJECTED.count === 1 ? "was" : "were"} rejected${lastSaid(REJECTED)}`,
      TIMEOUT && `${counted(TIMEOUT.count, "request")} of the last minute ran out of time${lastSaid(TIMEOUT)}`,
      CANCELED && `${counted(CANCELED.count, "request")} of the last minute ${CANCELED.count === 1 ? "was" : "were"} given up by the caller.`,
      model.loss && !recent && `A node was lost ${ago(at_ms - model.loss.at_ms)}: ${story}`].filter(Boolean));
  };

  // ---- changes of the plan
  const DOING = {
    planning: "another cut of the model is being planned",
    loading: "the nodes of another plan start beside those that serve",
    warming: "the answers of both plans are compared",
    swapped: "requests enter the new plan, and the old one answers those that it has",
    proving: "the new plan takes the requests, and is compared with the old one",
  };
  const sentence = (said) => `${said}.`.replace(/[.]+$/, ".");
  const showRecut = (model, parts) => {
    const { phase, last, advice } = model.recut || {};
    lines(parts.recut, [
      DOING[phase] ? `The plan is being changed: ${DOING[phase]}.` : advice && `Watched for a better cut: ${sentence(advice)}`,
      last && `Last change of the plan: ${sentence(last)}${model.generation > 1 ? ` Plan ${model.generation} serves.` : ""}`].filter(Boolean));
  };

  const showFigures = (model, at_ms, parts) => {
    const idle = isIdle(model), failed = Object.values(model.failures).reduce((sum, failure) => sum + failure.count, 0);
    parts.figures.replaceChildren(
      idle ? figure(model.last_ms ? `last request ${ago(at_ms - model.last_ms)}` : "no request yet", "idle")
        : figure("requests/s", model.answered ? model.per_s.toFixed(1) : "–"),
      figure("median", model.p50_ns ? milliseconds(model.p50_ns) : "–"), figure("99th percentile", model.p99_ns ? milliseconds(model.p99_ns) : "–"),
      figure("failed or refused", failed), figure("waiting", model.waiting), figure("in the pipeline", model.inside),
      figure("retries in all", model.retries), figure("nodes lost in all", model.losses));
  };

  const showSlowest = async (model, parts) => {
    if (parts.seen === model.slowest) return;
    parts.seen = model.slowest;
    try {
      const response = await fetch("slowest");
      const found = (await response.json()).find((one) => key(one) === key(model));
      parts.slowest.show(found ? found.requests : []);
    } catch { parts.seen = -1; } // the next second tries again
  };

  const show = (view) => {
    by("health").textContent = view.ready ? "ready" : "not ready";
    by("health").className = "pill " + (view.ready ? "good" : "bad");
    by("astray").hidden = !view.astray;
    if (view.astray) by("astray").textContent = `${counted(view.astray.count, "request")} of the last minute asked for a model that is not here${lastSaid(view.astray)}`;
    const wanted = new Set(view.models.map(key));
    for (const [id, parts] of sections) if (!wanted.has(id)) { parts.chart.remove(); parts.root.remove(); sections.delete(id); }
    for (const model of view.models) {
      const known = plans.get(key(model)), plan = known && known.generation === model.generation ? known : undefined; // else it follows
      const parts = section(model);
      parts.title.replaceChildren(`${model.name} `, element("span", { class: "hint" }, `version ${model.version} `),
        element("span", { class: "pill " + (model.ready ? "good" : "bad") }, model.ready ? "ready" : model.state === "ready" ? "not ready" : model.state));
      showTrouble(model, plan, view.at_ms, parts);
      showFigures(model, view.at_ms, parts);
      showRecut(model, parts);
      showText(model.text, parts.text);
      if (parts.generation !== model.generation) { // the nodes are others now
        if (parts.generation) for (const name of [...rates.keys()]) if (name.startsWith(`${key(model)}/`)) rates.delete(name);
        parts.generation = model.generation; parts.sizes.clear(); parts.detail.textContent = "";
      }
      for (const node of model.nodes) remember(`${key(model)}/${node.stage}.${node.replica}`, node.now_per_s);
      parts.chart.add(model);
      parts.graph.hidden = parts.nodes.hidden = !known || !model.nodes.length;
      if (plan && model.nodes.length) { drawGraph(model, plan, parts); drawNodes(model, plan, parts); }
      showSlowest(model, parts);
    }
    window.chatModels(view.models);
    const select = by("model"), names = [...new Set(view.models.map((model) => model.name))];
    if (names.join("\n") !== [...select.options].map((option) => option.value).join("\n"))
      select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  };

  // ---- live
  const source = new EventSource("events");
  source.addEventListener("plans", (event) => {
    plans = new Map(JSON.parse(event.data).map((plan) => [key(plan), { ...plan, word: plan.estimated ? "estimated" : "planned" }]));
  });
  source.addEventListener("history", (event) => {
    rates.clear();
    for (const past of JSON.parse(event.data)) {
      section(past).chart.past(past);
      for (const [node, values] of Object.entries(past.nodes)) rates.set(`${key(past)}/${node}`, values.slice(0, -1)); // the last one follows
    }
  });
  source.addEventListener("message", (event) => { show(JSON.parse(event.data)); by("news").textContent = ""; });
  source.addEventListener("full", () => { by("news").textContent = "Too many pages are open; this one is not updated."; source.close(); });
  source.addEventListener("error", () => {
    by("health").textContent = "no connection"; by("health").className = "pill bad";
    by("news").textContent = "The server does not answer; trying again.";
  });
})();
