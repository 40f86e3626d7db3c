// The table of all features: filtered and ordered in memory, and shown so many rows at a time.

const CHUNK = 60;
const data = pageData();
const all = data.active.length;
const words = data.promoted.map((ids) => ids.map((id) => data.tokens[id]));
const haystack = words.map((list) => list.join("\n").toLowerCase());
let shown = [];
let limit = CHUNK;

const layerOf = (feature) => Math.floor(feature / data.nFeatures);
const numberOf = (feature) => feature % data.nFeatures;

function hrefOf(feature) {
  const number = numberOf(feature);
  return `features/${layerOf(feature)}_${number - (number % data.perPage)}.html#f${number}`;
}

const ORDERS = {
  largest: (a, b) => data.largest[b] - data.largest[a],
  active: (a, b) => data.active[b] - data.active[a],
  rare: (a, b) => data.active[a] - data.active[b],
  masked: (a, b) => data.masked[b] - data.masked[a] || data.active[b] - data.active[a],
  unmasked: (a, b) => data.masked[a] - data.masked[b] || data.active[b] - data.active[a],
  number: (a, b) => a - b,
};

function matches(query, layer, silent) {
  const place = query.trim().match(/^(\d+)\s*\/\s*(\d+)$/);
  const found = [];
  for (let feature = 0; feature < all; feature++) {
    if (layer !== "" && layerOf(feature) !== Number(layer)) continue;
    if (place) {
      if (layerOf(feature) === Number(place[1]) && numberOf(feature) === Number(place[2])) found.push(feature);
      continue;
    }
    if (!silent && !data.active[feature]) continue;
    if (query === "" || haystack[feature].includes(query.toLowerCase())) found.push(feature);
  }
  return found;
}

const pill = (id) => element("span", { class: "token", title: `token ${id}` }, ...tokenNodes(data.tokens[id]));

function row(feature) {
  const cell = (text) => element("td", { class: "number" }, text);
  return element(
    "tr",
    {},
    element("td", {}, element("a", { href: hrefOf(feature) }, `${layerOf(feature)}/${numberOf(feature)}`)),
    element("td", {}, ...data.promoted[feature].map(pill)),
    cell(share(data.active[feature] / data.nRows)),
    cell(data.active[feature] ? percent(data.masked[feature]) : ""),
    cell(data.active[feature] ? figure(data.mean[feature]) : ""),
    cell(data.active[feature] ? figure(data.largest[feature]) : "silent"),
  );
}

function draw() {
  byId("rows").replaceChildren(...shown.slice(0, limit).map(row));
  byId("more").hidden = shown.length <= limit;
  const some = shown.length > limit ? `, the first ${limit} shown` : "";
  byId("found").textContent = `${shown.length.toLocaleString("en")} of ${all.toLocaleString("en")} features${some}`;
}

function search() {
  const order = ORDERS[byId("order").value];
  shown = matches(byId("query").value, byId("layer").value, byId("silent").checked);
  shown.sort((a, b) => order(a, b) || a - b);
  limit = CHUNK;
  draw();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inField = event.target.matches("input, select");
  const links = [...document.querySelectorAll("#rows a")];
  const at = links.indexOf(event.target);
  if (event.key === "/" && !inField) byId("query").focus();
  else if (event.key === "ArrowDown" && (at >= 0 || event.target === byId("query"))) links[at + 1]?.focus();
  else if (event.key === "ArrowUp" && at >= 0) (links[at - 1] ?? byId("query")).focus();
  else return;
  event.preventDefault();
}

function start() {
  byId("layer").append(element("option", { value: "" }, "all"));
  for (let layer = 0; layer < data.nLayers; layer++) byId("layer").append(element("option", { value: layer }, `${layer}`));
  // Browsers restore an earlier visit's choices after this; what is shown follows the controls.
  addEventListener("pageshow", search);
  for (const id of ["query", "layer", "order", "silent"]) byId(id).addEventListener("input", search);
  byId("search").addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", () => {
    const before = limit;
    limit += 4 * CHUNK;
    draw();
    document.querySelectorAll("#rows a")[before]?.focus();
  });
  document.addEventListener("keydown", onKey);
  search();
}

start();
