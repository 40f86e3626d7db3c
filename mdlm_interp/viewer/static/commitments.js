// The page of commitments: which one is chosen, its state, and its graph.

const data = pageData();
const byStep = data.commitments.map((_, number) => number).sort((a, b) => data.commitments[a].step - data.commitments[b].step || data.commitments[a].position - data.commitments[b].position);
const graphs = new Map(); // made when first shown; each keeps its pins
const lines = new Map();
let chosenCommitment = 0;

const spoken = (commitment) => `“${oneLine(commitment.token)}” at position ${commitment.position}`;

function graphOf(number) {
  if (!graphs.has(number)) {
    const { graph: given } = data.commitments[number];
    const origins = data.origins[number];
    const nodes = given.nodes.map((node) => (node.kind === "embedding" && node.position in origins ? { ...node, origin: origins[node.position] } : node));
    graphs.set(number, new Graph({ ...given, nodes }));
  }
  return graphs.get(number);
}

/** Show a commitment; `restored` is the part of an address that belongs to its graph. */
function showCommitment(number, restored = "") {
  chosenCommitment = number;
  for (const [other, line] of lines) {
    line.setAttribute("aria-pressed", other === number);
    line.tabIndex = other === number ? 0 : -1;
  }
  const commitment = data.commitments[number];
  byId("name").replaceChildren(tokenName(commitment), `, committed in step ${commitment.step}; steps are 0 to ${data.nSteps - 1}`);
  byId("shares").textContent =
    (number === 0 ? "The explained token. " : `${percent(commitment.weight)} of the explained token's influence passes through it. `) +
    `Its own influence begins at tokens given (${percent(commitment.shares[0])}), tokens committed before (${percent(commitment.shares[1])}), ` +
    `masks (${percent(commitment.shares[2])}) and error terms (${percent(commitment.shares[3])}).`;
  showState(commitment, number);
  showDependences(number);
  drawArcs(byId("arcs"), lines, data.links, number);
  const found = graphOf(number);
  showGraph(found, found.restore(restored), `commitment=${number}`);
}

/** Show one and go there, as after a press. */
function openCommitment(number) {
  showCommitment(number);
  byId("commitment").scrollIntoView({ block: "start" });
  byId("name").focus({ preventScroll: true });
}

/** The state before the step: what stood where, and how much of the influence begins there. */
function showState(commitment, number) {
  const most = Math.max(...commitment.at, 1e-9);
  byId("state-caption").textContent = `The text before that step. The stronger the colour, the more influence begins there, at most ${percent(most)}; small numbers are the steps that wrote a token, and a framed one opens its graph.`;
  const made = commitment.graph.tokens.flatMap((token, position) => {
    const isMask = commitment.masked[position], writer = commitment.writers[position];
    const origin = data.origins[number][position];
    const what = isMask ? "mask" : writer < 0 ? "given" : `written in step ${writer}`;
    const names = ["at", isMask ? "mask" : writer < 0 ? "given" : "committed", position === commitment.position && "this", commitment.at[position] > most / 2 && "strong"];
    const said = `position ${position}: ${what}; ${percent(commitment.at[position])} of the influence begins here`;
    const attributes = { class: names.filter(Boolean).join(" "), title: said, ...(origin === undefined ? {} : { type: "button", "aria-label": `“${oneLine(token)}”, ${said}; open its graph` }) };
    const text = position === commitment.position ? [...tokenNodes(commitment.token)] : isMask ? ["▢"] : tokenNodes(token);
    const unit = element(origin === undefined ? "span" : "button", attributes, ...text);
    if (!isMask && writer >= 0) unit.append(element("sub", {}, ` ${writer}`));
    unit.style.setProperty("--value", (commitment.at[position] / most).toFixed(3));
    if (origin !== undefined) unit.addEventListener("click", () => openCommitment(origin));
    return [unit, element("wbr")];
  });
  byId("state").replaceChildren(...made);
}

function showDependences(number) {
  const table = (caption, none, links, end) => {
    const sorted = [...links].sort((a, b) => b[2] - a[2]);
    const rows = sorted.map((link) => {
      const other = data.commitments[link[end]];
      const button = element("button", { type: "button", class: "name" }, tokenName(other), ` step ${other.step}`);
      button.addEventListener("click", () => openCommitment(link[end]));
      return element("tr", {}, element("td", {}, button), element("td", { class: "number" }, percent(link[2])));
    });
    return element("table", {}, element("caption", {}, rows.length ? caption : none), element("tbody", {}, ...rows));
  };
  const before = data.links.filter((link) => link[1] === number), after = data.links.filter((link) => link[0] === number);
  byId("before").replaceChildren(table("Its influence begins at these earlier ones", "Begins at none of the earlier ones shown", before, 0));
  byId("after").replaceChildren(table("Share of these later ones' influence that begins at it", "No later one shown depends on it", after, 1));
}

function onTimelineKey(event) {
  const at = byStep.indexOf(chosenCommitment);
  const to = { ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: byStep.length - 1 }[event.key];
  if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (byStep[to] === undefined) return;
  showCommitment(byStep[to]);
  lines.get(byStep[to]).focus();
}

function showLeftOut() {
  byId("left-out").hidden = data.leftOut.length === 0;
  const { length } = data.leftOut;
  byId("left-out").querySelector("summary").textContent = `${length} more committed token${length === 1 ? " has" : "s have"} a weight and no graph here`;
  byId("left-out").querySelector("tbody").replaceChildren(
    ...data.leftOut.map(({ token, position, step, weight }) =>
      element("tr", {}, element("td", { class: "word" }, ...tokenNodes(token)), ...[`${position}`, `${step}`, percent(weight)].map((text) => element("td", { class: "number" }, text))),
    ),
  );
}

function startPage() {
  const root = data.commitments[0];
  byId("summary").textContent =
    `${spoken(root)} was committed in step ${root.step}. Of its influence, ${percent(root.shares[1])} begins at tokens that earlier steps committed. ` +
    `${data.commitments.length - 1} earlier commitment${data.commitments.length === 2 ? " has a graph" : "s have graphs"} here too. Weight: share of the influence on ${spoken(root)} that passes through a token.`;
  byId("legend").replaceChildren(...legendOfOrigins());
  for (const number of byStep) {
    const item = timelineLine(data.commitments[number], number);
    const line = item.firstChild;
    line.addEventListener("click", () => openCommitment(number));
    lines.set(number, line);
    byId("timeline").append(item);
  }
  byId("timeline").addEventListener("keydown", onTimelineKey);
  showLeftOut();
  wireGraph(openCommitment);
  addEventListener("resize", () => drawArcs(byId("arcs"), lines, data.links, chosenCommitment));
  const address = location.hash.slice(1);
  const wanted = Number(/(?:^|&)commitment=(\d+)/.exec(address)?.[1] ?? 0);
  showCommitment(wanted in data.commitments ? wanted : 0, wanted in data.commitments ? address : "");
}

startPage();
