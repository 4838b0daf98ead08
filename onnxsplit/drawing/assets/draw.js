// Drawing of graphs of boxes, shared by every page of onnxsplit. Needs dagre.
"use strict";
const draw = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const HUES = ["#3b7dd8", "#c96f2d", "#3c9a68", "#a355b5", "#c94f6d", "#7a8b2a", "#2a98a8", "#8a6d4f"];

  const hue = (stage) => HUES[((stage % HUES.length) + HUES.length) % HUES.length];
  const milliseconds = (ns) => (ns / 1e6 >= 100 ? (ns / 1e6).toFixed(0) : (ns / 1e6).toPrecision(3)) + " ms";
  const bytes = (n) => {
    let unit = 0;
    while (n >= 1024 && unit < 4) { n /= 1024; unit++; }
    return (unit ? n.toFixed(1) : n) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][unit];
  };
  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const shape = (name, attributes = {}, ...children) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const short = (text, length) => (text.length > length ? "…" + text.slice(1 - length) : text);

  // boxes: {id, title, lines, hue, open?, outside?, about}; edges: {from, to, label?}.
  // open(box) is called on a click or Enter, show(box) on focus. Returns the <svg>.
  const graph = (boxes, edges, { open, show, zoom = 1 }) => {
    const layout = new dagre.graphlib.Graph({ multigraph: false });
    layout.setGraph({ rankdir: "LR", nodesep: 14, ranksep: edges.some((e) => e.label) ? 90 : 40, marginx: 16, marginy: 16 });
    layout.setDefaultEdgeLabel(() => ({}));
    for (const box of boxes) {
      const longest = Math.max(...[box.title, ...box.lines].map((line) => line.length));
      layout.setNode(box.id, { width: Math.max(70, 7 * Math.min(longest, 30) + 20), height: 22 + 16 * box.lines.length });
    }
    for (const edge of edges) layout.setEdge(edge.from, edge.to, edge.label ? { width: 7 * edge.label.length, height: 14, labelpos: "c" } : {});
    dagre.layout(layout);
    const { width, height } = layout.graph();
    const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width: width * zoom, height: height * zoom, role: "group" });
    svg.append(shape("defs", {}, shape("marker", { id: "head", viewBox: "0 0 8 8", refX: 8, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" },
      shape("path", { d: "M0 0L8 4L0 8z", class: "head" }))));
    for (const edge of edges) {
      const { points, x, y } = layout.edge(edge.from, edge.to);
      svg.append(shape("path", { class: "edge", d: "M" + points.map((p) => `${p.x.toFixed(1)} ${p.y.toFixed(1)}`).join("L"), "marker-end": "url(#head)" }));
      if (edge.label) svg.append(shape("text", { x, y: y - 4, class: "small", "text-anchor": "middle" }, edge.label));
    }
    for (const box of boxes) {
      const place = layout.node(box.id);
      const group = shape("g", {
        class: ["box", box.open ? "" : "leaf", box.outside ? "outside" : ""].join(" "), tabindex: 0, "data-id": box.id,
        role: box.open ? "button" : "img", "aria-label": [box.title, ...box.lines].join(", "),
        style: `--hue:${box.hue}`, transform: `translate(${place.x - place.width / 2} ${place.y - place.height / 2})`,
      });
      group.append(shape("title", {}, box.about || box.title), shape("rect", { width: place.width, height: place.height, rx: 5 }));
      [box.title, ...box.lines].forEach((line, number) => group.append(
        shape("text", { x: 10, y: 16 + 16 * number, class: number ? "small" : "" }, short(line, 30))));
      group.addEventListener("click", () => { group.focus(); if (box.open) open(box); });
      group.addEventListener("focus", () => show(box));
      group.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); if (box.open) open(box); } });
      svg.append(group);
    }
    return svg;
  };

  const table = (columns, rows) => element("table", {},
    element("thead", {}, element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((cell, number) => element("td", number ? {} : { class: "name" }, String(cell)))))));

  return { hue, milliseconds, bytes, element, shape, graph, table };
})();
