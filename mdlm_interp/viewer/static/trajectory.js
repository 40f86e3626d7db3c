// The page of a trajectory: one state (which frame, what is chosen), drawn anew after each change of it.

const SPEEDS = [0.5, 1, 2, 4, 8, 16, 32];
const LEGENDS = {
  state: [["given", "given"], ["mask", "mask"], ["new", "new in this step"], ["settled", "settled"], ["back", "taken back"]],
  confidence: "probability of the token when it was drawn; of a mask, of the next draw",
  order: "step that wrote the token; its number stands beside it",
};

const run = pageData();
const sequences = run.sequences.map((data) => new Sequence(run, data));
const view = { sequence: 0, frame: 0, playing: false, speed: 3, group: "token", colour: "state", chosen: null, hovered: null };
let units = [];
let timer = null;

const current = () => sequences[view.sequence];
const lastFrame = () => current().nFrames - 1;

/** Make the text's elements: one button for each group, and a line break after it that is shown if it ends a line. */
function build() {
  const groups = current().groups(view.group);
  units = groups.map((positions) => ({
    positions,
    button: element("button", { type: "button", class: "unit", tabindex: "-1" }),
    end: element("br", { hidden: true }),
    letGo: false,
  }));
  const nodes = units.flatMap(({ positions, button, end }) => {
    // A word's own white space stands outside its box; tokens show theirs as signs, and a space lets lines break.
    const first = run.tokens[current().frames[lastFrame()][positions[0]]];
    const spaced = view.group === "token" || first.startsWith(" ") || current().isMask(lastFrame(), positions[0]);
    return [spaced ? " " : element("wbr"), button, end];
  });
  byId("text").replaceChildren(...nodes);
  byId("text").classList.toggle("by-token", view.group === "token");
  units.forEach((unit, index) => wireUnit(unit, index));
  view.chosen = view.hovered = null;
  if (units.length) units[0].button.tabIndex = 0;
  byId("segments").replaceChildren("Segments:", ...current().segments().map(segmentButton));
}

function segmentButton({ given, first, last }) {
  const where = first === last ? `${first}` : `${first}–${last}`;
  const label = `${given ? "given" : "to write"} ${where}`;
  const button = element("button", { type: "button", class: given ? "given" : null }, label);
  button.addEventListener("click", () => choose(units.findIndex((unit) => unit.positions.includes(first)), true));
  return button;
}

function wireUnit(unit, index) {
  // A finger does not hover: after a tap the browser would leave the position hovered.
  unit.button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && hover(index));
  unit.button.addEventListener("pointerleave", () => hover(null));
  // A press chooses, by its focus before the click; a press on what was chosen before it lets go.
  unit.button.addEventListener("pointerdown", () => (unit.letGo = view.chosen === index));
  unit.button.addEventListener("focus", () => choose(index, false));
  unit.button.addEventListener("click", () => {
    choose(unit.letGo ? null : index, false);
    unit.letGo = false;
  });
}

function hover(index) {
  view.hovered = index;
  drawDetails();
}

/** Choose a group, or none; one of them is always reachable by Tab. */
function choose(index, focus) {
  if (view.chosen !== null) units[view.chosen].button.setAttribute("aria-pressed", "false");
  if (index !== null) {
    units.forEach(({ button }) => (button.tabIndex = -1));
    units[index].button.tabIndex = 0;
    units[index].button.setAttribute("aria-pressed", "true");
  }
  view.chosen = index;
  if (focus && index !== null) units[index].button.focus();
  drawDetails();
}

function draw() {
  const sequence = current();
  byId("text").classList.toggle("heat", view.colour !== "state");
  byId("text").classList.toggle("order", view.colour === "order");
  units.forEach((unit) => drawUnit(sequence, unit));
  const step = byId("step");
  step.max = lastFrame();
  step.value = view.frame;
  step.setAttribute("aria-valuetext", `step ${view.frame} of ${lastFrame()}`);
  const t = view.frame ? ` · t ${sequence.data.t[view.frame - 1].toFixed(3)}` : "";
  const where = byId("where");
  // Played steps are not read aloud: they come faster than speech.
  where.setAttribute("aria-live", view.playing ? "off" : "polite");
  where.value = `Step ${view.frame} of ${lastFrame()}${t}`;
  const counts = sequence.counts(view.frame);
  byId("counts").textContent =
    `${counts.mask + counts.back} masked, ${counts.new} new` + (counts.back ? `, ${counts.back} taken back` : "");
  byId("play").textContent = view.playing ? "Pause" : "Play";
  byId("speed").replaceChildren(`${SPEEDS[view.speed]}`, element("span", { class: "word" }, " steps"), "/s");
  byId("slower").disabled = view.speed === 0;
  byId("faster").disabled = view.speed === SPEEDS.length - 1;
  byId("back").disabled = view.frame === 0;
  byId("forward").disabled = view.frame === lastFrame();
  drawLegend();
  drawDetails();
}

function drawUnit(sequence, { positions, button, end }) {
  const state = sequence.groupState(view.frame, positions);
  const parts = sequence.parts(view.frame, positions);
  const value = view.colour === "state" ? null : sequence.groupValue(view.frame, positions, view.colour);
  const all = parts.map((part) => (part.mask ? "▁" : part.text)).join("");
  const masks = parts.filter((part) => part.mask).length;
  const lone = masks === parts.length;
  let nodes = ["\u00a0"];
  if (!lone) nodes = view.group === "token" ? tokenNodes(all) : [all.trim() || "↵"];
  button.style.setProperty("--masks", lone ? masks : 1);
  if (view.colour === "order" && value !== null) {
    const step = Math.max(...positions.map((position) => sequence.written[view.frame][position]));
    nodes.push(element("sub", {}, `${step + 1}`));
  }
  button.replaceChildren(...nodes);
  button.className = `unit ${state}${value === null ? "" : " valued"}`;
  if (value !== null) button.style.setProperty("--value", value.toFixed(3));
  const said = lone ? "mask" : all.trim() || "white space";
  button.setAttribute("aria-label", `${said}, ${STATE_WORDS[state]}`);
  end.hidden = !all.includes("\n");
}

function drawLegend() {
  const legend = byId("legend");
  if (legend.dataset.colour === view.colour) return;
  legend.dataset.colour = view.colour;
  if (view.colour === "state") {
    const keys = LEGENDS.state.map(([state, words]) =>
      element("span", { class: "key" }, element("span", { class: `unit ${state}`, "aria-hidden": "true" }, /mask|back/.test(state) ? "\u00a0" : "\u00a0a\u00a0"), words),
    );
    legend.replaceChildren(...keys);
    return;
  }
  const [low, high] = view.colour === "order" ? ["first", "last"] : ["0", "1"];
  const scale = element("span", { class: `scale ${view.colour}`, "aria-hidden": "true" });
  legend.replaceChildren(element("span", { class: "key" }, low, scale, high), LEGENDS[view.colour]);
}

function drawDetails() {
  const index = view.hovered ?? view.chosen;
  showDetails(byId("details"), current(), view.frame, index === null ? null : units[index].positions);
}

// Playback

function goTo(frame) {
  view.frame = Math.min(Math.max(frame, 0), lastFrame());
  draw();
}

function setPlaying(playing) {
  clearTimeout(timer);
  view.playing = playing;
  if (playing && view.frame === lastFrame()) view.frame = 0;
  if (playing) timer = setTimeout(tick, 1000 / SPEEDS[view.speed]);
  draw();
}

function tick() {
  if (view.frame + 1 >= lastFrame()) view.playing = false;
  else timer = setTimeout(tick, 1000 / SPEEDS[view.speed]);
  goTo(view.frame + 1);
}

/** A step by hand ends playing. */
function stepTo(frame) {
  if (view.playing) setPlaying(false);
  goTo(frame);
}

function changeSpeed(by) {
  view.speed = Math.min(Math.max(view.speed + by, 0), SPEEDS.length - 1);
  draw();
}

// Keys: those that a focused control uses itself stay its own; a position of the text leaves all to us.
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  const onUnit = target.classList.contains("unit");
  const own = target.matches("select, input[type=radio]") || (target.matches("input[type=range]") && event.key !== " ");
  const actions = {
    " ": () => setPlaying(!view.playing),
    ArrowLeft: () => stepTo(view.frame - 1),
    ArrowRight: () => stepTo(view.frame + 1),
    Home: () => stepTo(0),
    End: () => stepTo(lastFrame()),
    "+": () => changeSpeed(1),
    "=": () => changeSpeed(1), // the same key without Shift
    "-": () => changeSpeed(-1),
    Escape: () => choose(null, false),
  };
  if (onUnit) {
    // From the position with the focus: after Escape none is chosen, and that one still has it.
    const at = units.findIndex((unit) => unit.button === target);
    actions.ArrowUp = () => choose(Math.max(at - 1, 0), true);
    actions.ArrowDown = () => choose(Math.min(at + 1, units.length - 1), true);
  }
  const action = actions[event.key];
  const presses = event.key === " " && target.matches("button:not(.unit), summary");
  if (!action || presses || (own && !"+-=".includes(event.key) && event.key !== "Escape")) return;
  event.preventDefault();
  action();
}

function start() {
  sequences.forEach((sequence, index) =>
    byId("sequence").append(element("option", { value: index }, `${sequence.data.number}`)),
  );
  byId("sequence-choice").hidden = sequences.length === 1;
  byId("about").replaceChildren(
    ...run.about.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]),
  );
  const clicks = {
    restart: () => stepTo(0),
    back: () => stepTo(view.frame - 1),
    play: () => setPlaying(!view.playing),
    forward: () => stepTo(view.frame + 1),
    slower: () => changeSpeed(-1),
    faster: () => changeSpeed(1),
  };
  for (const [id, action] of Object.entries(clicks)) byId(id).addEventListener("click", action);
  byId("step").addEventListener("input", (event) => stepTo(Number(event.target.value)));
  byId("sequence").addEventListener("change", (event) => {
    view.sequence = Number(event.target.value);
    view.frame = Math.min(view.frame, lastFrame());
    build();
    draw();
  });
  for (const radio of document.querySelectorAll("input[type=radio]")) {
    radio.checked = view[radio.name] === radio.value; // browsers restore an earlier visit's choice
    radio.addEventListener("change", () => {
      view[radio.name] = radio.value;
      if (radio.name === "group") build();
      draw();
    });
  }
  document.addEventListener("keydown", onKey);
  build();
  draw();
}

start();
