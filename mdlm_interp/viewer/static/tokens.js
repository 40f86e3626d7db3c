// Tokens and numbers as every page about features shows them.

/** A token's text with its white space visible, as nodes. */
function tokenNodes(text) {
  const nodes = [];
  for (const piece of text.split(/([ \n]+)/)) {
    if (!piece) continue;
    if (/[ \n]/.test(piece[0])) {
      const signs = piece.replaceAll(" ", "·").replaceAll("\n", "↵");
      nodes.push(element("span", { class: "sign", "aria-hidden": "true" }, signs));
    } else nodes.push(piece);
  }
  return nodes;
}

/** A number to three digits, with a true minus. */
function figure(value) {
  if (value === null) return "none";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 0.001 || size >= 1e5) ? size.toExponential(1) : size.toPrecision(3);
  return (value < 0 ? "−" : "") + text;
}

/** Share of tokens, also of the rare. */
function share(value) {
  if (value === 0) return "0";
  return value < 0.001 ? `${parseFloat((100 * value).toPrecision(2))}%` : percent(value);
}
