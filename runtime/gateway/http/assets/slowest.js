// The slowest requests of a model, and the timeline of each.
"use strict";
const slowest = (() => {
  const { element, hue, milliseconds } = draw;
  const GREY = "#8a94a1";
  const WORDS = {
    read: () => "its inputs were read", queue: () => "waited in the gateway's queue", admission: () => "waited until the pipeline had room",
    send: (node) => (node ? `on its way to node ${node}` : "on its way back"), wait: (node) => `waited for node ${node}`, run: (node) => `ran in stage ${node.split(".")[0]} (node ${node})`,
    answer: () => "its response was written", failed: () => "until it failed",
  };
  const stageOf = (node) => Number(node.split(".")[0]);
  const row = (period, total_ns, beside, next = "") => ({
    name: WORDS[period.kind](period.node || next) + (beside ? ", beside" : ""), value: `${(period.ns / 1e6).toFixed(total_ns >= 1e8 ? 1 : total_ns >= 1e7 ? 2 : 3)} ms`,
    parts: [{ from: period.start_ns / total_ns, to: (period.start_ns + period.ns) / total_ns,
      hue: period.node ? hue(stageOf(period.node)) : period.kind === "failed" ? "var(--warm)" : GREY,
      class: period.kind === "run" || period.kind === "failed" ? "" : "hatched" }],
  });
  const timeline = (request) => {
    const rows = [...request.periods.map((period, at) => row(period, request.total_ns, false, request.periods.slice(at).find((later) => later.node)?.node)), ...request.beside.map((period) => row(period, request.total_ns, true))];
    const root = element("div", { class: "timeline" }, element("p", { class: "summary" }, request.summary), draw.bars("", rows));
    root.append(element("p", { class: "hint" }, `Together ${milliseconds(request.total_ns)}; hatched where nothing ran.` +
      (request.beside.length ? " What ran beside is not part of the sum." : "") +
      (request.placed ? "" : " Some nodes are on other hosts, whose clocks differ: their periods are as long as shown, but placed in order.")));
    return root;
  };
  const when = (at_ms) => `${chart.clock(at_ms / 1000)}.${String(at_ms % 1000).padStart(3, "0")}`;
  const nameOf = (request) => `${request.at_ms}/${request.total_ns}`;

  // One list; ``show`` takes the requests. A request whose timeline is open stays until that is closed.
  const make = () => {
    const list = element("ol", { class: "slow" });
    const root = element("div", { hidden: "" }, element("h3", {}, "Slowest requests of the last minute"), list);
    let open = null, shown = [];
    const drawList = () => {
      const focused = list.contains(document.activeElement) ? document.activeElement.dataset.request : null;
      list.replaceChildren(...shown.map((request) => {
        const name = nameOf(request), is = open === name;
        const button = element("button", { type: "button", class: "plain", "aria-expanded": String(is), "data-request": name },
          element("span", {}, when(request.at_ms)), element("b", {}, milliseconds(request.total_ns)),
          ...(request.reason ? [element("span", { class: "failed" }, `failed: ${request.reason.toLowerCase()}`)] : []));
        button.addEventListener("click", () => { open = is ? null : name; drawList(); });
        return element("li", {}, button, ...(is ? [timeline(request)] : []));
      }));
      if (focused) list.querySelector(`[data-request="${focused}"]`)?.focus({ preventScroll: true });
    };
    return { root, show: (requests) => {
      const held = shown.filter((one) => nameOf(one) === open && !requests.some((other) => nameOf(other) === open));
      shown = [...requests, ...held];
      root.hidden = !shown.length;
      drawList();
    } };
  };
  return { make };
})();
