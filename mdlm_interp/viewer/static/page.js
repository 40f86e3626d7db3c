// What every page's script uses. All files of a page run in one module, so nothing here is global.
// Text from the data is always put on the page as text nodes, never as markup.

/** The page's data. */
function pageData() {
  return JSON.parse(document.getElementById("page-data").textContent);
}

/** The element with an id that the page's own markup has. */
function byId(id) {
  return document.getElementById(id);
}

/** A new element; attributes whose value is null or false are left out, children are elements or text. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** A share as a percentage that never rounds to a certainty or an impossibility that it is not. */
function percent(share) {
  if (share > 0 && share < 0.001) return "<0.1%";
  if (share < 1 && share > 0.999) return ">99.9%";
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;
}
