// Elements of drawings. Their text is text, like everything from the data.

const SVG = "http://www.w3.org/2000/svg";

/** A new element of a drawing; children are elements or text. */
function shape(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}
