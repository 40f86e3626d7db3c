// A graph in memory: what is shown of it, with groups standing for their members.

/** Nodes by number, links, and the choices that decide what is shown. */
class Graph {
  constructor(data) {
    this.tokens = data.tokens;
    this.nodes = data.nodes;
    this.links = data.links.map(([source, target, weight]) => ({ source, target, weight }));
    this.byId = new Map(data.nodes.map((node, number) => [node.id, number]));
    this.pinned = new Set(data.pinned);
    this.groups = [];
    for (const [name, members] of data.groups) this.group(name, members);
    this.influence = 1;
    this.errors = true;
    this.only = false;
  }

  /** Let nodes, numbers or keys of groups, be one; those in another group leave it. Returns the group's key. */
  group(name, members) {
    const numbers = [...new Set(members.flatMap((key) => this.membersOf(key)))];
    for (const group of this.groups) group.members = group.members.filter((number) => !numbers.includes(number));
    this.groups = this.groups.filter((group) => group.members.length);
    const taken = new Set(this.groups.map((group) => group.key));
    let count = 0;
    while (taken.has(`g${count}`)) count++;
    this.groups.push({ key: `g${count}`, name, members: numbers });
    this.pinned = new Set([...this.pinned].filter((key) => !numbers.includes(key) && (typeof key === "number" || taken.has(key))));
    this.pinned.add(`g${count}`);
    return `g${count}`;
  }

  ungroup(key) {
    const group = this.groupOf(key);
    this.groups = this.groups.filter((other) => other !== group);
    if (this.pinned.delete(key)) group.members.forEach((number) => this.pinned.add(number));
  }

  groupOf(key) {
    return this.groups.find((group) => group.key === key);
  }

  membersOf(key) {
    return typeof key === "number" ? [key] : this.groupOf(key).members;
  }

  /** Whether a node passes the choices; predictions always pass. */
  passes(number) {
    const node = this.nodes[number];
    if (node.kind === "logit") return true;
    if (node.kind === "error" && !this.errors) return false;
    return node.influence === null || node.influence <= this.influence + 1e-9;
  }

  /** What is drawn: keys with place and kind, and the links between them, parallel ones added up. */
  shown() {
    const keyOf = new Map();
    for (const group of this.groups) group.members.forEach((number) => keyOf.set(number, group.key));
    this.nodes.forEach((_, number) => {
      if (!keyOf.has(number) && (this.passes(number) || this.pinned.has(number))) keyOf.set(number, number);
    });
    const visible = new Set([...keyOf.values()].filter((key) => !this.only || this.pinned.has(key)));
    const sums = new Map();
    for (const { source, target, weight } of this.links) {
      const [from, to] = [keyOf.get(source), keyOf.get(target)];
      if (from === to || !visible.has(from) || !visible.has(to)) continue;
      const name = `${from} ${to}`;
      const link = sums.get(name) ?? { source: from, target: to, weight: 0 };
      link.weight += weight;
      sums.set(name, link);
    }
    return { items: [...visible].map((key) => this.item(key)), links: [...sums.values()] };
  }

  item(key) {
    if (typeof key === "number") {
      const { kind, layer, position } = this.nodes[key];
      return { key, kind, layer, position };
    }
    const members = this.groupOf(key).members.map((number) => this.nodes[number]);
    const middle = (values) => values.sort((a, b) => a - b)[Math.floor((values.length - 1) / 2)];
    return { key, kind: "group", layer: middle(members.map((node) => node.layer)), position: middle(members.map((node) => node.position)) };
  }

  /** A node's name, short. */
  name(key) {
    if (typeof key !== "number") return `${this.groupOf(key).name} (${this.groupOf(key).members.length})`;
    const node = this.nodes[key];
    const token = oneLine(this.tokens[node.position]);
    if (node.kind === "feature") return `${node.layer}/${node.number} at ${node.position}${node.text ? ` ${oneLine(node.text)}` : ""}`;
    if (node.kind === "error") return `error ${node.layer} at ${node.position}`;
    if (node.kind === "embedding") return `“${token}” at ${node.position}`;
    return oneLine(node.text) || `prediction at ${node.position}`;
  }

  /** Pins and groups as text for the address. */
  state(chosen) {
    const id = (key) => encodeURIComponent(this.nodes[key].id);
    const parts = [];
    const pins = [...this.pinned].filter((key) => typeof key === "number");
    if (pins.length) parts.push(`pin=${pins.map(id).join(",")}`);
    for (const group of this.groups) parts.push(`group=${encodeURIComponent(group.name)}:${group.members.map(id).join(",")}`);
    if (typeof chosen === "number") parts.push(`node=${id(chosen)}`);
    return parts.join("&");
  }

  /** Take such text; returns the chosen node or null. What names no node of this graph is left out. */
  restore(text) {
    const numbers = (list) => list.split(",").map((id) => this.byId.get(decode(id))).filter((number) => number !== undefined);
    let chosen = null;
    if (/(^|&)(pin|group)=/.test(text)) {
      this.pinned.clear();
      this.groups = [];
    }
    for (const part of text.split("&")) {
      const [name, value = ""] = part.split(/=(.*)/s);
      if (name === "node") chosen = numbers(value)[0] ?? null;
      if (name === "pin") numbers(value).forEach((number) => this.pinned.add(number));
      if (name !== "group") continue;
      const [label, list = ""] = value.split(/:(.*)/s);
      const members = numbers(list);
      if (members.length) this.group(decode(label), members);
    }
    return chosen;
  }
}

/** Text with its line breaks as signs. */
function oneLine(text) {
  return text.replaceAll("\n", "↵");
}

/** Undo encodeURIComponent; an address may have been cut off anywhere. */
function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
