// Elements and words. Text goes in as text, never as markup.

export const $ = (id) => document.getElementById(id);

function made(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export const el = (tag, attributes = {}, ...children) => made(document.createElement(tag), attributes, children);

export const svg = (tag, attributes = {}, ...children) =>
  made(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);

const rounded = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));

export function seconds(value) {
  if (value === null || value === undefined) return '–';
  if (value >= 1) return `${rounded(value)} s`;
  return value >= 0.001 ? `${rounded(value * 1e3)} ms` : `${Math.round(value * 1e6)} µs`;
}

export function bytes(value) {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let unit = 0;
  for (; value >= 1000 && unit < units.length - 1; unit += 1) value /= 1000;
  return `${unit ? rounded(value) : Math.round(value)} ${units[unit]}`;
}

export const count = (value) =>
  value === null || value === undefined ? '–' : value >= 10 || Number.isInteger(value)
    ? Math.round(value).toLocaleString('en') : value.toFixed(1);

export const clock = (unix) => new Date(unix * 1000).toLocaleTimeString([], { hour12: false });

// Enough of an id to know it by, and for `tercet explain`.
export function short(id) {
  const own = id.replace(/^(chatcmpl|cmpl)-/, '');
  return own.length > 12 ? own.slice(0, 8) : own;
}

export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? '' : 's'}`;

// The rows of a table, from texts; the first row of `cells` is the head.
export function fill(table, head, rows) {
  const line = (cells, tag) => el('tr', {}, ...cells.map((cell) => el(tag, tag === 'th' ? { scope: 'col' } : {}, String(cell))));
  table.tHead.replaceChildren(line(head, 'th'));
  table.tBodies[0].replaceChildren(...rows.map((row) => line(row, 'td')));
}
