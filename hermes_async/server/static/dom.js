// Elements and figures as text. Text from anywhere becomes text nodes, and never markup.

export const byId = (id) => document.getElementById(id);

/** Makes an element. `attributes` may have `on...` functions; an attribute that is false or null is left out. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Sets the text of an element where it differs, so that unchanged text costs no layout. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(count) {
  let unit = 0;
  while (count >= 1024 && unit < UNITS.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${significant(count)} ${UNITS[unit]}`;
}

/** Three digits, such as 7.55, 42.1 and 704. */
export function significant(value) {
  if (value === 0) return "0";
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : value >= 1 ? 2 : 3;
  return value.toFixed(digits);
}

export const integer = (value) => Math.round(value).toLocaleString("en");

export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;

/** Seconds, or milliseconds where there are few: [number, unit]. */
export const duration = (s) => (s < 0.0995 ? [significant(1000 * s), "ms"] : [significant(s), "s"]);

export const counted = (count, noun, nouns = `${noun}s`) => `${integer(count)} ${count === 1 ? noun : nouns}`;
