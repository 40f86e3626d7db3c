// Where nodes stand, and the drawing of them: positions from left to right, layers upwards.

const CELL = 20, LINE = 20, IN_LINE = 5, GAP = 26, ROW = 56, MARGIN = 30, LABEL = 44;
const LEAST_SCALE = 0.6, MOST_SCALE = 1.6; // of a drawing that nobody zoomed: with smaller ones nobody reads the text
const MOST_LINKS = 400; // the strongest; the chosen node's are all drawn

/** The items of a cell in lines of a few, the lines above one another. */
function inLines(cell) {
  const lines = [];
  for (let first = 0; first < cell.length; first += IN_LINE) lines.push(cell.slice(first, first + IN_LINE));
  return lines;
}

/** Heights of the rows' middles, layers upwards; the rows share what `height` leaves them. */
function rowsOf(layers, linesIn, height) {
  const all = [];
  for (let layer = layers.at(-1) ?? 0; layer >= (layers[0] ?? 0); layer--) all.push(layer);
  const tall = all.map((layer) => ROW + (Math.max(linesIn.get(layer) ?? 1, 1) - 1) * LINE);
  const spare = Math.max(height - 2 * MARGIN - tall.reduce((total, one) => total + one, 0), 0) / Math.max(all.length, 1);
  let y = MARGIN - ROW / 2;
  return all.map((layer, index) => {
    y += tall[index] + spare;
    return { layer, y: y - (tall[index] + spare) / 2 };
  });
}

/** Places of what is shown, by key, and the columns of positions that have any; as tall as a drawing has room. */
function layOut(items, tokens, room) {
  const cells = new Map();
  const nameOf = (position, layer) => `${position} ${layer}`;
  for (const item of items) {
    const name = nameOf(item.position, item.layer);
    cells.set(name, [...(cells.get(name) ?? []), item]);
  }
  const ascending = (values) => [...new Set(values)].sort((a, b) => a - b);
  const positions = ascending(items.map((item) => item.position));
  const layers = ascending(items.map((item) => item.layer));
  const sizeOf = (position, layer) => cells.get(nameOf(position, layer))?.length ?? 0;
  const widths = positions.map((position) => Math.max(Math.min(Math.max(...layers.map((layer) => sizeOf(position, layer))), IN_LINE) * CELL, 34));
  const width = widths.reduce((total, one) => total + one + GAP, 2 * MARGIN + LABEL - GAP);
  const linesIn = new Map(layers.map((layer) => [layer, Math.max(...positions.map((position) => Math.ceil(sizeOf(position, layer) / IN_LINE)))]));
  const scale = Math.min(Math.max(room.width / width, LEAST_SCALE), MOST_SCALE);
  const rows = rowsOf(layers, linesIn, room.height / scale);
  const heightOf = new Map(rows.map((row) => [row.layer, row.y]));
  const places = new Map();
  const columns = [];
  let left = MARGIN + LABEL;
  positions.forEach((position, index) => {
    const x = left + widths[index] / 2;
    for (const layer of layers) {
      const lines = inLines(cells.get(nameOf(position, layer)) ?? []);
      lines.forEach((line, number) =>
        line.forEach((item, place) => {
          const y = heightOf.get(layer) + (number - (lines.length - 1) / 2) * LINE;
          places.set(item.key, { ...item, row: layer, x: x + (place - (line.length - 1) / 2) * CELL, y });
        }),
      );
    }
    columns.push({ position, x, text: tokens[position] });
    left += widths[index] + GAP;
  });
  return { places, columns, rows, width, height: (rows.at(-1)?.y ?? 0) + MARGIN + 14 };
}

function mark(kind, radius) {
  const r = radius;
  if (kind === "error") return shape("path", { class: "mark error", d: `M0-${r} ${r} 0 0 ${r}-${r} 0Z` });
  if (kind === "embedding") return shape("rect", { class: "mark embedding", x: -r + 1, y: -r + 1, width: 2 * r - 2, height: 2 * r - 2 });
  if (kind === "logit") return shape("path", { class: "mark logit", d: `M-${r} ${r - 1} 0-${r} ${r} ${r - 1}Z` });
  if (kind === "group") return shape("g", {}, shape("circle", { class: "mark group", r: r + 1 }), shape("circle", { class: "mark group", r: r - 3 }));
  return shape("circle", { class: "mark feature", r: r - 1 });
}

function path(from, to) {
  const middle = (from.y + to.y) / 2;
  // Nodes of one row are joined by an arc below it.
  if (from.row === to.row) {
    return `M${from.x} ${from.y}Q${(from.x + to.x) / 2} ${Math.max(from.y, to.y) + ROW / 2} ${to.x} ${to.y}`;
  }
  return `M${from.x} ${from.y}C${from.x} ${middle} ${to.x} ${middle} ${to.x} ${to.y}`;
}

function linkShape(link, plan, largest, chosen) {
  const { source, target, weight } = link;
  const share = Math.abs(weight) / (largest || 1);
  const strength = chosen ? { "stroke-opacity": (0.25 + 0.75 * share).toFixed(2), "stroke-width": (1 + 4 * share).toFixed(2) } : { "stroke-width": (0.6 + 3 * share).toFixed(2) };
  const names = ["link", weight < 0 ? "negative" : "positive", chosen && "chosen"].filter(Boolean).join(" ");
  return shape("path", { class: names, d: path(plan.places.get(source), plan.places.get(target)), ...strength });
}

const shortened = (text) => (text.length > 10 ? `${text.slice(0, 9)}…` : text);

/** Everything behind the nodes: rows, the columns' tokens, and links. */
function background(plan, rowName) {
  const made = [];
  for (const { layer, y } of plan.rows) {
    made.push(
      shape("line", { class: "row", x1: 0, x2: plan.width, y1: y, y2: y }),
      shape("text", { class: "quiet", x: 4, y: y - 5 }, rowName(layer)),
    );
  }
  for (const { position, x, text } of plan.columns) {
    made.push(
      shape("text", { x, y: plan.height - 22, "text-anchor": "middle" }, shortened(oneLine(text).trim() || "·"), shape("title", {}, text)),
      shape("text", { class: "quiet", x, y: plan.height - 8, "text-anchor": "middle" }, `${position}`),
    );
  }
  return made;
}

/** The links to draw: of all the strongest, and every one of the chosen node. */
function linkShapes(links, plan, chosen) {
  const strongest = [...links].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  const largest = Math.abs(strongest[0]?.weight ?? 0);
  const touches = (link) => link.source === chosen || link.target === chosen;
  const plain = strongest.filter((link) => !touches(link)).slice(0, MOST_LINKS);
  const own = strongest.filter(touches);
  const most = Math.abs(own[0]?.weight ?? 0);
  return [
    ...plain.reverse().map((link) => linkShape(link, plan, largest, false)),
    ...own.reverse().map((link) => linkShape(link, plan, most, true)),
  ];
}

/** The nearest item in a direction, or null: what is straight that way counts as nearer than what is aside. */
function towards(plan, key, dx, dy) {
  const from = plan.places.get(key);
  let best = null, least = Infinity;
  for (const to of plan.places.values()) {
    const along = (to.x - from.x) * dx + (to.y - from.y) * dy;
    const aside = Math.abs((to.x - from.x) * dy) + Math.abs((to.y - from.y) * dx);
    if (to.key === key || along < 1) continue;
    const cost = along + 3 * aside;
    if (cost < least) [best, least] = [to.key, cost];
  }
  return best;
}
