// One feature's dashboard; which one, the address says behind "#f".

const data = pageData();
const last = data.first + data.features.length - 1;

function pageOf(layer, number) {
  return `${layer}_${number - (number % data.perPage)}.html#f${number}`;
}

/** The feature before or after in the transcoder, as an address; null at either end. */
function neighbour(number, by) {
  const place = data.layer * data.nFeatures + number + by;
  if (place < 0 || place >= data.nLayers * data.nFeatures) return null;
  return pageOf(Math.floor(place / data.nFeatures), place % data.nFeatures);
}

function chosen() {
  const number = Number(location.hash.match(/^#f(\d+)$/)?.[1] ?? data.first);
  return Math.min(Math.max(number, data.first), last);
}

function setHref(id, href) {
  if (href === null) byId(id).removeAttribute("href");
  else byId(id).setAttribute("href", href);
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
const textOf = (token) => data.tokens[token];

function bar(value, largest) {
  const made = element("span", { class: "bar" });
  made.style.width = `${(100 * Math.max(value, 0)) / (largest || 1)}%`;
  return made;
}

function tokenRows(pairs) {
  return pairs.map(([token, effect]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, element("span", { class: "token", title: `token ${token}` }, ...tokenNodes(textOf(token)))),
      element("td", { class: "number" }, figure(effect)),
    ),
  );
}

function barRows(rows) {
  const largest = Math.max(...rows.map(([, value]) => value), 0);
  return rows.map(([head, value]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, head),
      element("td", {}, bar(value, largest)),
      element("td", { class: "number" }, figure(value)),
    ),
  );
}

/** Share of tokens at which the feature is active, in each part of t, as columns of one scale. */
function timeFigure(caption, active, rows, total, largest) {
  const shares = active.map((count, part) => (rows[part] ? count / rows[part] : null));
  const width = 300, height = 110, floor = 88, step = width / active.length;
  const drawing = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${caption}, by t from 0 to 1` });
  shares.forEach((value, part) => {
    const tall = value === null ? 0 : (74 * value) / (largest || 1);
    const mean = active[part] ? `, mean activation ${figure(total[part] / active[part])}` : "";
    const said = `t ${(part / active.length).toFixed(1)} to ${((part + 1) / active.length).toFixed(1)}: `;
    const what = value === null ? "no tokens" : `active at ${share(value)} of ${rows[part].toLocaleString("en")} tokens${mean}`;
    drawing.append(
      shape("rect", { class: "column", x: part * step + 2, width: step - 4, y: floor - tall, height: tall }),
      // A whole column answers to the pointer, also where the bar is low.
      shape("rect", { x: part * step, width: step, y: 0, height: floor, fill: "transparent" }, shape("title", {}, said + what)),
    );
    if (value === null) drawing.append(shape("text", { x: (part + 0.5) * step, y: floor - 4, "text-anchor": "middle" }, "–"));
  });
  drawing.append(
    shape("line", { class: "axis", x1: 0, x2: width, y1: floor, y2: floor }),
    shape("text", { x: 0, y: height - 8 }, "t 0, clean"),
    shape("text", { x: width, y: height - 8, "text-anchor": "end" }, "t 1, all masked"),
    shape("text", { x: 0, y: 11 }, share(largest)),
  );
  return element("figure", {}, element("figcaption", {}, caption), drawing);
}

function times(feature) {
  const shares = feature.active.flatMap((counts, masked) => counts.map((count, part) => count / (data.rows[masked][part] || 1)));
  const largest = Math.max(...shares);
  return ["where the model read the token", "where it read a mask"].map((caption, masked) =>
    timeFigure(caption, feature.active[masked], data.rows[masked], feature.total[masked], largest),
  );
}

function context(example, largest) {
  const tokens = example.clean.flatMap((token, place) => {
    const value = example.acts[place];
    const masked = example.read[place] === data.mask;
    const peak = example.start + place === example.pos;
    const names = ["tok", value && "valued", masked && "masked", peak && "peak"].filter(Boolean).join(" ");
    const said = value === null ? "not recorded" : `activation ${figure(value)}`;
    const text = textOf(token);
    const made = element("span", { class: names, title: `${said}${masked ? "; the model read a mask" : ""}` }, text.replaceAll("\n", "↵"));
    if (value) made.style.setProperty("--value", Math.min(value / largest, 1).toFixed(3));
    return [made, text.includes("\n") ? element("wbr") : ""];
  });
  const where = `${figure(example.value)} · sequence ${example.seq}, position ${example.pos}, t ${example.t.toFixed(3)}`;
  return element("li", {}, element("p", { class: "words" }, ...tokens), element("p", { class: "where" }, where));
}

function figures(feature) {
  const active = sum(feature.active.flat());
  const rows = sum(data.rows.flat());
  const pairs = [["active", `${share(active / rows)} of ${rows.toLocaleString("en")} tokens`]];
  if (active) {
    pairs.push(["of these on masks", percent(sum(feature.active[1]) / active)]);
    pairs.push(["mean activation", figure(sum(feature.total.flat()) / active)], ["largest", figure(feature.examples[0].value)]);
  }
  return pairs.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

function draw() {
  const number = chosen();
  const feature = data.features[number - data.first];
  document.title = `Feature ${data.layer}/${number}`;
  byId("name").textContent = `Feature ${data.layer}/${number}`;
  byId("which").value = number;
  setHref("before", neighbour(number, -1));
  setHref("after", neighbour(number, 1));
  byId("figures").replaceChildren(...figures(feature));
  byId("promoted").replaceChildren(...tokenRows(feature.promoted));
  byId("suppressed").replaceChildren(...tokenRows(feature.suppressed));
  byId("norms").replaceChildren(...barRows(feature.norms.map((norm, later) => [`layer ${data.targets[later]}`, norm])));
  const near = feature.nearest.map(([layer, other, cosine]) => [element("a", { href: pageOf(layer, other) }, `${layer}/${other}`), cosine]);
  byId("nearest").replaceChildren(...barRows(near));
  byId("times").replaceChildren(...times(feature));
  const items = feature.examples.map((example) => context(example, feature.examples[0].value));
  if (!items.length) items.push(element("li", { class: "quiet" }, "Silent: nowhere active in the store."));
  byId("contexts").replaceChildren(...items);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input")) return;
  const step = { ArrowLeft: "before", ArrowRight: "after" }[event.key];
  const href = step && byId(step).getAttribute("href");
  if (!href) return;
  event.preventDefault();
  location.href = href;
}

function start() {
  data.features.forEach((_, index) => {
    const number = data.first + index;
    byId("which").append(element("option", { value: number }, `${data.layer}/${number}`));
  });
  byId("which").addEventListener("change", (event) => (location.hash = `f${event.target.value}`));
  addEventListener("hashchange", draw);
  addEventListener("pageshow", draw); // browsers restore the choice of an earlier visit
  document.addEventListener("keydown", onKey);
  draw();
}

start();
