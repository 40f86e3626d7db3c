// The timeline of commitments: a line for each, and arcs from those that a later one depends on.

const ORIGINS = ["given", "committed", "masks", "errors"];
const ROOM_FOR_TEXT = 0.13; // of a share's part of the bar

/** Shares as a bar whose parts are told by pattern and text, not by colour alone. */
function splitBar(shares) {
  const said = ORIGINS.map((name, index) => `${name} ${percent(shares[index])}`).join(", ");
  const made = element("span", { class: "split", role: "img", "aria-label": said, title: said });
  shares.forEach((value, index) => {
    const part = element("span", { class: `origin-${ORIGINS[index]}` });
    if (value >= ROOM_FOR_TEXT) part.append(element("span", {}, percent(value)));
    part.style.width = `${100 * value}%`;
    made.append(part);
  });
  return made;
}

function weightBar(weight) {
  const bar = element("span", { class: "bar" });
  bar.style.width = `${Math.min(100 * weight, 100)}%`;
  return element("span", { class: "weight" }, percent(weight), element("span", { "aria-hidden": "true" }, bar));
}

/** A commitment's token and where it stands. */
function tokenName({ token, position }) {
  return element("span", { class: "word" }, ...tokenNodes(token), element("sub", {}, ` at ${position}`));
}

function timelineLine(commitment, number) {
  const line = element(
    "button",
    { type: "button", class: "line", "data-number": number, tabindex: "-1", "aria-pressed": "false" },
    element("span", { class: "step" }, `step ${commitment.step}`),
    tokenName(commitment),
    weightBar(commitment.weight),
    splitBar(commitment.shares),
  );
  return element("li", {}, line);
}

function legendOfOrigins() {
  const words = { given: "tokens given", committed: "tokens committed before", masks: "masks", errors: "error terms" };
  const keys = ORIGINS.map((name) => element("span", {}, element("span", { class: `swatch origin-${name}`, "aria-hidden": "true" }), ` ${words[name]}`));
  return [element("span", {}, "Bar: weight. Parts: where the token's influence begins:"), ...keys];
}

/** Arcs left of the lines: the farther apart the steps' lines, the wider; the larger the share, the thicker. */
function drawArcs(drawing, lines, links, chosen) {
  const middle = (number) => lines.get(number).offsetTop + lines.get(number).offsetHeight / 2;
  const order = [...lines.keys()];
  const right = drawing.clientWidth - 8;
  const largest = Math.max(...links.map(([, , share]) => share), 1e-9);
  const drawn = links.map(([earlier, later, share]) => {
    const apart = (order.indexOf(later) - order.indexOf(earlier)) / Math.max(order.length - 1, 1);
    const reach = (right - 6) * (0.25 + 0.75 * apart);
    const from = middle(earlier), to = middle(later);
    // A cubic with both handles at one x comes three quarters of the way to it.
    const d = `M${right} ${from}C${right - reach / 0.75} ${from} ${right - reach / 0.75} ${to} ${right} ${to}`;
    const names = ["arc", (earlier === chosen || later === chosen) && "chosen", earlier === chosen && "later"].filter(Boolean).join(" ");
    return shape("path", { class: names, d, "stroke-width": (0.8 + 5 * (share / largest)).toFixed(2) });
  });
  const isChosen = (arc) => arc.classList.contains("chosen");
  drawn.sort((a, b) => isChosen(a) - isChosen(b));
  const stops = order.map((number) => shape("circle", { class: number === chosen ? "stop chosen" : "stop", cx: right, cy: middle(number), r: 5 }));
  drawing.replaceChildren(...drawn, ...stops);
}
