// A trajectory in memory: the tokens of every frame, and what each position is in it. Frame n is the text after n steps;
// step n, counted from 0 in the data and from 1 for people, leads from frame n to frame n + 1.

const NEVER = -1;

/** The frames of one sequence of the page's data. */
class Sequence {
  constructor(run, data) {
    this.run = run;
    this.data = data;
    this.nFrames = data.changes.length + 1;
    this.frames = [Int32Array.from(data.start)];
    this.written = [new Int32Array(data.start.length).fill(NEVER)];
    data.changes.forEach((changes, step) => {
      const tokens = this.frames[step].slice();
      const written = this.written[step].slice();
      for (const [position, token] of changes) {
        tokens[position] = token;
        written[position] = token === run.mask ? NEVER : step;
      }
      // A step that wrote the token that stood there changed nothing, but it is the one that the trajectory names.
      data.revealed.forEach((last, position) => {
        if (last === step && tokens[position] !== run.mask) written[position] = step;
      });
      this.frames.push(tokens);
      this.written.push(written);
    });
  }

  isMask(frame, position) {
    return this.frames[frame][position] === this.run.mask;
  }

  /** What a position is: given, mask, new, settled or back (taken back in the step before). */
  state(frame, position) {
    const token = this.frames[frame][position];
    const before = this.frames[Math.max(frame - 1, 0)][position];
    if (token === this.run.mask) return before === token ? "mask" : "back";
    if (before !== token) return "new";
    return this.data.given[position] ? "given" : "settled";
  }

  /** The step that a position's figures come from: the one that wrote it, for a mask the next one; or NEVER. */
  stepOf(frame, position) {
    if (!this.isMask(frame, position)) return this.written[frame][position];
    return frame < this.nFrames - 1 ? frame : NEVER;
  }

  /** Probability of the token drawn in that step, or null. */
  confidence(frame, position) {
    const step = this.stepOf(frame, position);
    return step === NEVER ? null : this.data.confidence[step][position];
  }

  /** When a token came, from 0 (first step) to 1 (last), or null. */
  order(frame, position) {
    const step = this.written[frame][position];
    return step === NEVER ? null : step / Math.max(this.nFrames - 2, 1);
  }

  /** Text of neighbouring positions, as parts: {text} or {mask: true}. */
  parts(frame, positions) {
    const parts = [];
    let known = [];
    const flush = () => {
      if (known.length) parts.push({ text: this.text(known) });
      known = [];
    };
    for (const position of positions) {
      if (this.isMask(frame, position)) {
        flush();
        parts.push({ mask: true });
      } else known.push(this.frames[frame][position]);
    }
    flush();
    return parts;
  }

  /** Text of tokens; some only together make a character. */
  text(tokens) {
    return this.run.joined[tokens.join(",")] ?? tokens.map((token) => this.run.tokens[token]).join("");
  }

  /** What is shown as one: each position by itself, or the words of the final text. */
  groups(kind) {
    return kind === "word" ? this.data.words : this.data.start.map((_, position) => [position]);
  }

  /** A group's state: that of a part which is not there yet, else of a new one, else what all are. */
  groupState(frame, positions) {
    const states = positions.map((position) => this.state(frame, position));
    return ["back", "mask", "new", "settled", "given"].find((state) => states.includes(state));
  }

  /** A group's confidence is its lowest, its place in the order that of the token that came last. */
  groupValue(frame, positions, kind) {
    const read = kind === "confidence" ? "confidence" : "order";
    const values = positions.map((position) => this[read](frame, position)).filter((value) => value !== null);
    if (!values.length) return null;
    return kind === "confidence" ? Math.min(...values) : Math.max(...values);
  }

  /** Runs of positions that were given or were to be written: [{given, first, last}]. */
  segments() {
    const found = [];
    this.data.given.forEach((given, position) => {
      const last = found.at(-1);
      if (last && last.given === given) last.last = position;
      else found.push({ given, first: position, last: position });
    });
    return found;
  }

  /** How many positions of a frame are in each state. */
  counts(frame) {
    const counts = { given: 0, mask: 0, new: 0, settled: 0, back: 0 };
    for (let position = 0; position < this.data.start.length; position++) counts[this.state(frame, position)]++;
    return counts;
  }
}
