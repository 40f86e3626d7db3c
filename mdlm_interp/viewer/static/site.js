// The first page: what was looked at, and a line for each layer.

const data = pageData();
const count = (number) => number.toLocaleString("en");

/** How many features there are of each density, on a logarithmic scale of densities. */
function histogram(bins, layer) {
  const width = 240, floor = 28, step = width / bins.length;
  const largest = Math.max(...bins, 1);
  const drawing = shape("svg", { viewBox: `0 0 ${width} 40`, preserveAspectRatio: "xMinYMid", role: "img", "aria-label": `densities of layer ${layer}` });
  const edge = (bin) => `10^${(-data.decades + (bin * data.decades) / bins.length).toFixed(1)}`;
  bins.forEach((features, bin) => {
    const tall = (26 * features) / largest;
    const said = `share ${bin ? edge(bin) : "0"} to ${edge(bin + 1)}: ${count(features)} features`;
    drawing.append(
      shape("rect", { class: "column", x: bin * step + 1, width: step - 2, y: floor - tall, height: tall }),
      shape("rect", { x: bin * step, width: step, y: 0, height: floor, fill: "transparent" }, shape("title", {}, said)),
    );
  });
  [["0", share(10 ** -data.decades), "start"], [`${width / 2}`, "0.1%", "middle"], [`${width}`, "100%", "end"]].forEach(([x, text, anchor]) =>
    drawing.append(shape("text", { x, y: 38, "text-anchor": anchor }, text)),
  );
  return drawing;
}

function start() {
  const features = data.layers.length * data.nFeatures;
  const silent = data.layers.reduce((total, layer) => total + layer.silent, 0);
  byId("summary").textContent =
    `${count(features)} features in ${data.layers.length} layers, looked for at ${count(data.nRows)} tokens of ` +
    `${count(data.nSequences)} sequences, ${percent(data.maskedRows / data.nRows)} of them masked. ${count(silent)} features are silent there.`;
  byId("pages").replaceChildren(...data.pages.map(([name, href]) => element("li", {}, element("a", { href }, name))));
  byId("layers").replaceChildren(
    ...data.layers.map((layer, number) =>
      element(
        "tr",
        {},
        element("td", {}, `${number}`),
        ...[count(layer.silent), layer.median === null ? "none" : share(layer.median), count(layer.dense), layer.active.toFixed(1)].map((text) => element("td", { class: "number" }, text)),
        element("td", {}, histogram(layer.histogram, number)),
      ),
    ),
  );
  byId("about").replaceChildren(...data.about.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

start();
