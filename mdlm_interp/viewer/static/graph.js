// The view of an attribution graph: one state, drawn anew after each change of it. The page says which graph.

let graph = null;
const view = { chosen: null, scale: 1, x: 0, y: 0, plan: null, links: [], moved: false, address: "", open: null };
const scene = { behind: shape("g"), links: shape("g"), nodes: shape("g") };
const world = shape("g", {}, scene.behind, scene.links, scene.nodes);

function rowName(layer) {
  if (layer < 0) return "tokens";
  return graph.nodes.some((node) => node.kind === "logit" && node.layer === layer) ? "predictions" : `layer ${layer}`;
}

/** Lay out what is shown, and draw it. */
function build() {
  const { items, links } = graph.shown();
  const { clientWidth, clientHeight } = byId("drawing");
  view.plan = layOut(items, graph.tokens, { width: clientWidth, height: clientHeight });
  view.links = links;
  if (!view.plan.places.has(view.chosen)) view.chosen = null;
  scene.behind.replaceChildren(...background(view.plan, rowName));
  scene.nodes.replaceChildren(...[...view.plan.places.values()].map(nodeShape));
  byId("kept").value = `${items.length} nodes, ${links.length} links`;
  draw();
}

function nodeShape(place) {
  const name = graph.name(place.key);
  const made = shape("g", { class: "node", tabindex: "-1", role: "button", "data-key": place.key, transform: `translate(${place.x} ${place.y})` });
  made.append(shape("circle", { class: "hit", r: 12 }), shape("circle", { class: "halo", r: 11 }), mark(place.kind, 7.5), shape("title", {}, name));
  made.classList.toggle("origin", originOf(place.key) !== null);
  if (place.kind === "group") made.append(shape("text", { y: -14, "text-anchor": "middle" }, shortened(graph.groupOf(place.key).name)));
  made.setAttribute("aria-label", `${name}, ${rowName(place.layer)}, position ${place.position}`);
  made.addEventListener("click", () => view.moved || choose(place.key));
  made.addEventListener("dblclick", () => togglePin(place.key));
  made.addEventListener("focus", () => view.chosen !== place.key && made.matches(":focus-visible") && choose(place.key));
  return made;
}

const shapeOf = (key) => [...scene.nodes.children].find((made) => made.dataset.key === `${key}`);

/** What depends on the choice and the pins alone. */
function draw() {
  const near = new Set();
  for (const { source, target } of view.links) {
    if (source === view.chosen) near.add(target);
    if (target === view.chosen) near.add(source);
  }
  scene.links.replaceChildren(...linkShapes(view.links, view.plan, view.chosen));
  let reachable = null;
  for (const made of scene.nodes.children) {
    const key = /^\d+$/.test(made.dataset.key) ? Number(made.dataset.key) : made.dataset.key;
    const isChosen = key === view.chosen;
    made.classList.toggle("chosen", isChosen);
    made.classList.toggle("near", near.has(key));
    made.classList.toggle("far", view.chosen !== null && !isChosen && !near.has(key));
    made.classList.toggle("pinned", graph.pinned.has(key));
    made.setAttribute("aria-pressed", isChosen);
    made.setAttribute("tabindex", "-1");
    if (isChosen || reachable === null) reachable = made;
  }
  reachable?.setAttribute("tabindex", "0");
  byId("details").replaceChildren(...details());
  drawPinned();
  history.replaceState(null, "", `#${[view.address, graph.state(view.chosen)].filter(Boolean).join("&")}`);
}

function choose(key, focus = false) {
  view.chosen = key;
  draw();
  if (focus && key !== null) {
    shapeOf(key).focus();
    bringIn(view.plan.places.get(key));
  }
}

function togglePin(key) {
  if (!graph.pinned.delete(key)) graph.pinned.add(key);
  if (graph.only) build();
  else draw();
}

// The panel

function drawPinned() {
  const button = (text, label, action) => {
    const made = element("button", { type: "button", class: "small", "aria-label": label }, text);
    made.addEventListener("click", action);
    return made;
  };
  const pins = [...graph.pinned];
  byId("pinned").replaceChildren(
    ...pins.map((key) => element("li", {}, nameButton(key), button("Unpin", `Unpin ${graph.name(key)}`, () => togglePin(key)))),
  );
  byId("grouping").hidden = pins.length < 2;
  byId("groups").replaceChildren(
    ...graph.groups.map((group) => {
      const open = () => {
        graph.ungroup(group.key);
        build();
      };
      return element("li", {}, element("span", {}, `Group ${group.name}`), button("Ungroup", `Ungroup ${group.name}`, open));
    }),
  );
}

// Zoom

function place() {
  world.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
}

/** All of the graph, or of a large one the part around the chosen node or the prediction, at a size to read. */
function fit() {
  const { clientWidth, clientHeight } = byId("drawing");
  const whole = Math.min(clientWidth / view.plan.width, clientHeight / view.plan.height, MOST_SCALE);
  view.scale = Math.max(whole, LEAST_SCALE);
  view.x = (clientWidth - view.plan.width * view.scale) / 2;
  view.y = (clientHeight - view.plan.height * view.scale) / 2;
  const places = [...view.plan.places.values()];
  const middle = view.plan.places.get(view.chosen) ?? places.find((one) => one.kind === "logit");
  if (whole < LEAST_SCALE && middle) {
    const within = (at, size, drawn) => (drawn * view.scale <= size ? (size - drawn * view.scale) / 2 : Math.min(Math.max(size / 2 - at * view.scale, size - drawn * view.scale), 0));
    view.x = within(middle.x, clientWidth, view.plan.width);
    view.y = within(middle.y, clientHeight, view.plan.height);
  }
  place();
}

/** Zoom about a point of the drawing, its middle if none. */
function zoom(factor, x = byId("drawing").clientWidth / 2, y = byId("drawing").clientHeight / 2) {
  const scale = Math.min(Math.max(view.scale * factor, 0.05), 8);
  view.x = x - ((x - view.x) * scale) / view.scale;
  view.y = y - ((y - view.y) * scale) / view.scale;
  view.scale = scale;
  place();
}

/** Move so that a place is inside the drawing. */
function bringIn({ x, y }) {
  const { clientWidth, clientHeight } = byId("drawing");
  const inside = (at, size) => Math.min(Math.max(at, 30), size - 30);
  const [left, top] = [view.x + x * view.scale, view.y + y * view.scale];
  view.x += inside(left, clientWidth) - left;
  view.y += inside(top, clientHeight) - top;
  place();
}

function wireDrawing(drawing) {
  let from = null;
  drawing.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = drawing.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  drawing.addEventListener("pointerdown", (event) => {
    from = { x: event.clientX, y: event.clientY };
    view.moved = false;
  });
  addEventListener("pointermove", (event) => {
    if (!from) return;
    const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
    if (!view.moved && Math.hypot(dx, dy) < 4) return; // a press that trembles is a press
    view.moved = true;
    drawing.classList.add("dragged");
    view.x += dx;
    view.y += dy;
    from = { x: event.clientX, y: event.clientY };
    place();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    addEventListener(end, () => {
      from = null;
      drawing.classList.remove("dragged");
    });
  }
  drawing.addEventListener("click", (event) => view.moved || event.target.closest(".node") || choose(null));
}

// Keys

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) return;
  const onNode = event.target.closest?.(".node") && view.chosen !== null;
  const to = (dx, dy) => () => {
    const next = towards(view.plan, view.chosen, dx, dy);
    if (next !== null) choose(next, true);
  };
  const actions = { "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: fit, Escape: () => choose(null) };
  if (onNode) {
    Object.assign(actions, { ArrowLeft: to(-1, 0), ArrowRight: to(1, 0), ArrowUp: to(0, -1), ArrowDown: to(0, 1) });
    for (const key of ["Enter", " ", "p"]) actions[key] = () => togglePin(view.chosen);
    if (byId("dashboard")) actions.f = () => byId("dashboard").click();
    if (byId("origin")) actions.c = () => byId("origin").click();
  }
  const action = actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

/** Take the choices of the controls; browsers restore those of an earlier visit. */
function readControls() {
  graph.influence = Number(byId("influence").value) / 100;
  graph.errors = byId("errors").checked;
  graph.only = byId("only").checked;
  build();
}

/** Make the view work; once, before the first graph. Of several, `open` shows the one of a number. */
function wireGraph(open = null) {
  const drawing = byId("drawing");
  view.open = open;
  drawing.append(world);
  wireDrawing(drawing);
  byId("in").addEventListener("click", () => zoom(1.25));
  byId("out").addEventListener("click", () => zoom(0.8));
  byId("fit").addEventListener("click", fit);
  for (const id of ["influence", "errors", "only"]) byId(id).addEventListener("input", readControls);
  byId("grouping").addEventListener("submit", (event) => {
    event.preventDefault();
    view.chosen = graph.group(byId("group-name").value.trim() || "group", [...graph.pinned]);
    byId("group-name").value = "";
    build();
  });
  document.addEventListener("keydown", onKey);
  addEventListener("resize", () => {
    build();
    fit();
  });
  addEventListener("pageshow", readControls);
}

/** Show a graph, with a node chosen or none; `address` is what the page's address begins with. */
function showGraph(found, chosen = null, address = "") {
  graph = found;
  view.chosen = chosen;
  view.address = address;
  readControls();
  fit();
}
