// The page of one attribution graph.

const only = new Graph(pageData());
wireGraph();
showGraph(only, only.restore(location.hash.slice(1)));
