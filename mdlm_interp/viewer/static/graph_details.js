// The panel beside an attribution graph: what the chosen node is, and its strongest links.

const MOST_ROWS = 12;

function nameButton(key) {
  const made = element("button", { type: "button", class: "name" }, graph.name(key));
  made.addEventListener("click", () => choose(key, true));
  return made;
}

function linkTable(caption, end, links) {
  const strongest = [...links].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  const rows = strongest.slice(0, MOST_ROWS).map((link) =>
    element("tr", {}, element("td", {}, nameButton(link[end])), element("td", { class: "number" }, figure(link.weight))),
  );
  const more = links.length > MOST_ROWS ? `, the strongest ${MOST_ROWS} of ${links.length}` : "";
  return element("table", {}, element("caption", {}, links.length ? caption + more : `${caption}: none shown`), element("tbody", {}, ...rows));
}

function facts(node) {
  const found = [`position ${node.position}, “${oneLine(graph.tokens[node.position])}”`];
  if (node.kind === "feature") found.unshift(`layer ${node.layer}`);
  if (node.activation !== null) found.push(`activation ${figure(node.activation)}`);
  if (node.probability !== null) found.push(`probability ${percent(node.probability)}`);
  if (node.influence !== null && node.kind !== "logit") found.push(`among the nodes with ${percent(node.influence)} of the influence`);
  return found.join("; ");
}

function details() {
  const key = view.chosen;
  if (key === null) {
    return [element("h2", {}, "No node chosen"), element("p", { class: "quiet" }, "Click one, or Tab into the graph and use the arrow keys.")];
  }
  const made = [element("h2", {}, graph.name(key))];
  if (typeof key === "number") {
    made.push(element("p", { class: "quiet" }, facts(graph.nodes[key])));
    if (graph.nodes[key].href) made.push(element("p", {}, element("a", { href: graph.nodes[key].href, id: "dashboard" }, "Open the feature's dashboard")));
    if (originOf(key) !== null) made.push(element("p", {}, originButton(originOf(key))));
  } else {
    made.push(element("ul", { class: "plain" }, ...graph.membersOf(key).map((number) => element("li", {}, graph.name(number)))));
  }
  const pin = element("button", { type: "button", id: "pin", class: "small" }, graph.pinned.has(key) ? "Unpin" : "Pin");
  pin.addEventListener("click", () => {
    togglePin(key);
    byId("pin")?.focus();
  });
  made.push(element("p", {}, pin));
  made.push(linkTable("From", "source", view.links.filter((link) => link.target === key)));
  made.push(linkTable("To", "target", view.links.filter((link) => link.source === key)));
  return made;
}

/** Number of the graph that says how a token came to stand here, or null: only some pages have several. */
function originOf(key) {
  return graph.nodes[key]?.origin ?? null;
}

function originButton(origin) {
  const made = element("button", { type: "button", id: "origin", class: "small" }, "Open the graph of this token's own commitment");
  made.addEventListener("click", () => view.open(origin));
  return made;
}
