// The panel about one position or word: what stands there, how sure the model was, and what else it considered.

const STATE_WORDS = {
  given: "given",
  mask: "not written yet",
  new: "written in this step",
  settled: "settled",
  back: "taken back in this step",
};

/** Fill the panel; no positions: say how to choose one. */
function showDetails(panel, sequence, frame, positions) {
  if (!positions) {
    panel.replaceChildren(
      element("h2", {}, "No position chosen"),
      element("p", { class: "quiet" }, "Hover over the text, tap it, or move to it with Tab and the arrow keys."),
    );
    return;
  }
  panel.replaceChildren(...positions.map((position) => describe(sequence, frame, position)));
}

function describe(sequence, frame, position) {
  const token = sequence.frames[frame][position];
  const state = sequence.state(frame, position);
  const step = sequence.stepOf(frame, position);
  const isMask = sequence.isMask(frame, position);
  const shown = isMask ? ["mask"] : tokenNodes(sequence.run.tokens[token]);
  const block = element(
    "div",
    { class: "position" },
    element("h2", {}, `Position ${position}: `, element("bdi", {}, ...shown)),
    element("p", {}, `Token ${token}, ${STATE_WORDS[state]}.`),
  );
  if (step === NEVER) {
    const why = isMask ? "Nothing wrote it." : "It stood there from the start.";
    block.append(element("p", { class: "quiet" }, why));
    return block;
  }
  const confidence = sequence.data.confidence[step][position];
  const entropy = sequence.data.entropy[step][position];
  if (confidence === null) {
    block.append(element("p", { class: "quiet" }, `Step ${step + 1} cannot write it: its block comes later.`));
    return block;
  }
  const what = isMask ? `Step ${step + 1} draws a token of` : `Step ${step + 1} wrote it with`;
  block.append(
    element("p", {}, `${what} probability ${percent(confidence)}; entropy ${entropy.toFixed(2)} nats.`),
    alternatives(sequence, step, position, isMask ? null : [token, confidence]),
  );
  return block;
}

/** The most probable tokens of a step, and the one that was written, in bold, if it is not among them. */
function alternatives(sequence, step, position, written) {
  const found = sequence.data.top[step][position];
  if (!found) {
    return element("p", { class: "quiet" }, "No alternatives were recorded (sample with --alternatives 5).");
  }
  const isListed = written === null || found.some(([token]) => token === written[0]);
  const rows = (isListed ? found : [...found, written]).map(([token, probability]) => {
    const bar = element("span", { class: "bar" });
    bar.style.width = `${100 * probability}%`;
    const chosen = written !== null && token === written[0];
    return element(
      "tr",
      { class: chosen ? "chosen" : null },
      element("th", { scope: "row" }, ...tokenNodes(sequence.run.tokens[token]), chosen ? " ✓" : ""),
      element("td", { class: "number" }, percent(probability)),
      element("td", {}, bar),
    );
  });
  const caption = written === null ? `Most probable in step ${step + 1}` : "Most probable then";
  return element("table", {}, element("caption", {}, caption), element("tbody", {}, ...rows));
}
