// Drawing of graphs, bars and tables, shared by every page of onnxsplit. Needs dagre.
"use strict";
const draw = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const HUES = ["#3b7dd8", "#c96f2d", "#3c9a68", "#a355b5", "#c94f6d", "#7a8b2a", "#2a98a8", "#8a6d4f"];
  const FONT = "system-ui, sans-serif";
  const LEAST = 40; // height of a box, so that a finger can hit it

  const hue = (stage) => HUES[((stage % HUES.length) + HUES.length) % HUES.length];
  const digits = (ns) => (ns / 1e6 >= 100 ? (ns / 1e6).toFixed(0) : (ns / 1e6).toPrecision(3));
  const milliseconds = (ns) => digits(ns) + " ms";
  const number = (value) => (value >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(3));
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
  const ruler = document.createElement("canvas").getContext("2d");
  const lengthOf = (text, size = 11, weight = "") => { ruler.font = `${weight} ${size}px ${FONT}`; return ruler.measureText(text).width; };

  // ---- graphs
  // dagre ranks boxes and labels and places them from top to bottom. From left to right, a rank is a band as wide as its
  // widest box or label, and the gaps between bands share the width that is left over. Inside a band, lines are level,
  // and they change their height in gaps only; dagre keeps what is in a band apart, so no line meets a box or a label.
  //
  //      band 0        band 1        band 2
  //     |-----|       |-----|       |-----|
  //     | box |--._   | 4 B |    _--| box |
  //     |-----|    `--|     |---'   |-----|
  const GAP = 18, MARGIN = 14;
  let graphs = 0;

  const sized = (boxes, edges, sizes) => {
    const kept = (key, size) => { sizes.set(key, Math.max(size, sizes.get(key) || 0)); return sizes.get(key); };
    const layout = new dagre.graphlib.Graph({ multigraph: false });
    layout.setGraph({ rankdir: "LR", nodesep: 18, edgesep: 18, ranksep: 40, marginx: 0, marginy: MARGIN });
    layout.setDefaultEdgeLabel(() => ({}));
    for (const box of boxes) {
      const widths = [lengthOf(short(box.title, 30), 12), ...box.lines.map((line) => lengthOf(short(line.text ?? line, 30), 11, "600"))];
      layout.setNode(box.id, { width: kept(box.id, Math.max(70, Math.ceil(Math.max(...widths)) + 22)), height: Math.max(LEAST, 24 + 16 * box.lines.length) });
    }
    for (const edge of edges) {
      const lines = edge.label || [];
      layout.setEdge(edge.from, edge.to, lines.length
        ? { width: kept(`${edge.from}>${edge.to}`, Math.ceil(Math.max(...lines.map((line) => lengthOf(line)))) + 12), height: 14 * lines.length + 6, labelpos: "c" }
        : {});
    }
    dagre.layout(layout);
    const placed = [...layout.nodes().map((id) => layout.node(id)), ...edges.map((edge) => layout.edge(edge.from, edge.to)).filter((edge) => edge.width)];
    const points = new Set(edges.flatMap((edge) => layout.edge(edge.from, edge.to).points));
    const top = Math.min(...placed.map((item) => item.y - item.height / 2), ...[...points].map((point) => point.y)) - MARGIN;
    for (const item of [...placed, ...points]) item.y -= top; // dagre does not count lines as part of the graph
    const height = Math.max(...placed.map((item) => item.y + item.height / 2), ...[...points].map((point) => point.y)) + MARGIN;
    return { layout, height };
  };

  const banded = (layout, edges, width) => {
    const items = layout.nodes().map((id) => layout.node(id));
    for (const { from, to } of edges) {
      const edge = layout.edge(from, to);
      if (edge.width) items.push(edge);
      items.push(...edge.points.slice(1, -1).map((point) => ({ x: point.x, width: 0 })));
    }
    const bands = [];
    for (const item of items.sort((one, other) => one.x - other.x)) {
      const last = bands[bands.length - 1];
      if (last && item.x - last.x < 1) last.width = Math.max(last.width, item.width);
      else bands.push({ x: item.x, width: item.width });
    }
    const least = 2 * MARGIN + bands.reduce((sum, band) => sum + band.width, 0) + GAP * (bands.length - 1);
    const gap = GAP + (bands.length > 1 ? Math.max(0, width - least) / (bands.length - 1) : 0);
    let left = MARGIN;
    for (const band of bands) { band.left = left; band.right = left + band.width; band.middle = left + band.width / 2; left = band.right + gap; }
    return { of: (x) => bands.reduce((best, band) => (Math.abs(band.x - x) < Math.abs(best.x - x) ? band : best)), width: Math.max(width, left - gap + MARGIN) };
  };

  // The line of an edge: level in bands, curved in gaps, and open where its label is.
  const lineOf = (edge, from, to, bands) => {
    const stops = [{ band: bands.of(from.x), y: from.y, width: from.width },
      ...edge.points.slice(1, -1).map((point) => ({ band: bands.of(point.x), y: point.y, width: edge.width && Math.abs(point.x - edge.x) < 1 ? edge.width : 0 })),
      { band: bands.of(to.x), y: to.y, width: to.width }];
    const way = Math.sign(stops[stops.length - 1].band.left - stops[0].band.left) || 1;
    const [near, far] = way > 0 ? ["left", "right"] : ["right", "left"];
    const at = (x, y) => `${x.toFixed(1)} ${y.toFixed(1)}`;
    let path = "";
    stops.forEach((stop, number) => {
      const { band, y, width } = stop, before = stops[number - 1];
      if (before) {
        const begin = before.band[far], end = band[near], half = (begin + end) / 2;
        path += y === before.y ? `L${at(end, y)}` : `C${at(half, before.y)} ${at(half, y)} ${at(end, y)}`;
        path += `L${at(band.middle - way * width / 2, y)}`;
      }
      if (number === stops.length - 1) return;
      path += `${before && !width ? "L" : "M"}${at(band.middle + way * width / 2, y)}L${at(band[far], y)}`;
    });
    return path;
  };

  // boxes: {id, title, lines, hue, open?, outside?, about}, where a line is a text or {text, class};
  // edges: {from, to, label?}, where a label is a list of lines. open(box) is called on a click or Enter, show(box) on
  // focus. The graph is at least ``width`` wide. ``sizes`` keeps the sizes, so that a later drawing does not shrink.
  // Returns the <svg>.
  const graph = (boxes, edges, { open, show, zoom = 1, width = 0, sizes = new Map() }) => {
    const { layout, height } = sized(boxes, edges, sizes);
    const bands = banded(layout, edges, width);
    const id = `head${graphs++}`;
    const svg = shape("svg", { viewBox: `0 0 ${bands.width} ${height}`, width: bands.width * zoom, height: height * zoom, role: "group" });
    svg.append(shape("defs", {}, shape("marker", { id, viewBox: "0 0 8 8", refX: 8, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" },
      shape("path", { d: "M0 0L8 4L0 8z", class: "head" }))));
    for (const edge of edges) {
      const found = layout.edge(edge.from, edge.to);
      svg.append(shape("path", { class: "edge", d: lineOf(found, layout.node(edge.from), layout.node(edge.to), bands), "marker-end": `url(#${id})` }));
      if (!found.width) continue;
      const { middle } = bands.of(found.x), label = shape("g", { class: "label" });
      label.append(shape("rect", { x: middle - found.width / 2, y: found.y - found.height / 2, width: found.width, height: found.height, rx: 4 }));
      edge.label.forEach((line, number) => label.append(shape("text", { x: middle, y: found.y - found.height / 2 + 14 + 14 * number, class: "small", "text-anchor": "middle" }, line)));
      svg.append(label);
    }
    for (const box of boxes) {
      const place = layout.node(box.id);
      const group = shape("g", {
        class: ["box", box.open ? "" : "leaf", box.outside ? "outside" : ""].join(" "), tabindex: 0, "data-id": box.id,
        role: box.open ? "button" : "img", "aria-label": [box.title, ...box.lines.map((line) => line.text ?? line)].join(", "),
        style: `--hue:${box.hue}`, transform: `translate(${bands.of(place.x).middle - place.width / 2} ${place.y - place.height / 2})`,
      });
      group.append(shape("title", {}, box.about || box.title), shape("rect", { width: place.width, height: place.height, rx: 5 }));
      const top = (place.height - 16 * (1 + box.lines.length)) / 2;
      [{ text: box.title, class: "" }, ...box.lines].forEach((line, number) => group.append(
        shape("text", { x: 10, y: top + 12 + 16 * number, class: number ? `small ${line.class || ""}` : "" }, short(line.text ?? line, 30))));
      group.addEventListener("click", () => { group.focus(); if (box.open) open(box); });
      group.addEventListener("focus", () => show(box));
      group.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); if (box.open) open(box); } });
      svg.append(group);
    }
    return svg;
  };

  // ---- tables
  // A column is the name of figures, which are aligned to the right, or text(name) for texts, aligned to the left. The
  // rows of a table of cards stand below each other on a phone, each cell with the name of its column.
  const text = (name) => ({ name, text: true });
  const table = (columns, rows, { cards = false } = {}) => {
    const heads = columns.map((column) => (column.text ? column : { name: column, text: false }));
    const side = (column) => (column.text ? { class: "text" } : {});
    return element("table", { role: "table", ...(cards ? { class: "cards" } : {}) },
      element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...heads.map((head) => element("th", { scope: "col", role: "columnheader", ...side(head) }, head.name)))),
      element("tbody", { role: "rowgroup" }, ...rows.map((row) => element("tr", { role: "row" }, ...row.map((cell, number) =>
        element("td", { role: "cell", "data-name": heads[number].name, ...side(heads[number]) }, cell instanceof Node ? cell : String(cell)))))));
  };

  // ---- bars
  // rows: {name, parts: [{from, to, hue, class?}], value, title?} with shares of the width from 0 to 1; marks: {at, class?}. The
  // values have a column of their own, so no bar and no mark runs through them.
  const bars = (title, rows, marks = []) => element("div", { class: "measure" }, ...(title ? [element("h3", {}, title)] : []), ...rows.flatMap((row) => {
    const share = (value) => `${(100 * value).toFixed(3)}%`;
    const bar = element("div", { class: "bar" },
      ...row.parts.map((part) => element("i", { class: part.class || "", style: `--hue:${part.hue};left:${share(part.from)};width:${share(part.to - part.from)}` })),
      ...marks.map((mark) => element("b", { class: mark.class || "", style: `left:${share(mark.at)}` })));
    return [element("div", { class: "name" }, row.name), element("span", { class: "value" }, row.value), bar];
  }));

  return { hue, digits, milliseconds, number, bytes, element, shape, lengthOf, graph, text, table, bars };
})();
