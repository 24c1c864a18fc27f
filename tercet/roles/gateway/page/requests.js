// The list of requests. A row stays the same element while its request is listed, so that focus stays where it is.

import { $, clock, count, el, seconds, short, svg } from './dom.js';

export const STAGES = ['gateway', 'queue', 'encode', 'embed_transfer', 'prefill', 'transfer', 'first_decode', 'decode', 'first token'];
export const words = (stage) => stage.replaceAll('_', ' ');
const MARKS = { finished: '✓', running: '▸', waiting: '…', failed: '✕', cancelled: '–' };
export const stateOf = (request) => `${MARKS[request.state]} ${request.state}`;

const rows = new Map();

export function startList(open) {
  $('key').append(...STAGES.slice(0, -1).map((stage) => el('li', {}, swatch(stage), words(stage))));
  $('list').tBodies[0].addEventListener('click', (event) => {
    const row = event.target.closest('tr');
    if (row) open(row.dataset.id);
  });
  $('list').addEventListener('keydown', move);
}

export const swatch = (stage) =>
  svg('svg', { width: 10, height: 10, 'aria-hidden': 'true' }, svg('rect', { width: 10, height: 10, rx: 2, class: `stage ${stage.replace(' ', '_')}` }));

export const buttonOf = (id) => rows.get(id)?.querySelector('button');

// kept: the id of a request whose row stays, as that with the focus does, though it is no longer listed.
export function drawList(requests, kept) {
  const body = $('list').tBodies[0];
  const listed = new Set(requests.map((request) => request.id));
  for (const [id, row] of rows) {
    if (!listed.has(id) && id !== kept && !row.contains(document.activeElement)) {
      row.remove();
      rows.delete(id);
    }
  }
  requests.forEach((request, place) => {
    const row = rows.get(request.id) ?? add(request.id);
    update(row, request);
    if (body.rows[place] !== row) body.insertBefore(row, body.rows[place] ?? null);
  });
  $('none').hidden = requests.length > 0;
  rove(body.querySelector('button[tabindex="0"]') ?? body.querySelector('button'));
}

function add(id) {
  const button = el('button', { type: 'button', tabindex: -1, title: id }, short(id));
  const row = el('tr', { 'data-id': id }, el('th', { scope: 'row' }, button), ...['state', 'wide', 'num wide', 'num wide', 'num wide', 'num', 'num', 'stages'].map((kind) => el('td', { class: kind })));
  rows.set(id, row);
  return row;
}

function update(row, request) {
  const cells = [...row.cells].slice(1);
  const texts = [stateOf(request), clock(request.at), count(request.prompt_tokens), count(request.cached_tokens),
    count(request.output_tokens), seconds(request.timings.ttft_s || null), seconds(request.elapsed_s)];
  texts.forEach((text, i) => {
    if (cells[i].textContent !== text) cells[i].textContent = text;
  });
  row.className = request.state;
  cells[0].title = request.code;
  cells[7].replaceChildren(stageBar(request));
}

function stageBar(request) {
  const whole = Math.max(request.elapsed_s, 1e-6);
  const told = request.stages.map((bar) => `${words(bar.stage)} ${seconds(bar.seconds)}`).join(', ');
  return svg('svg', { viewBox: '0 0 100 8', preserveAspectRatio: 'none', class: 'bars', role: 'img', 'aria-label': told || 'no stage has been told yet' },
    svg('title', {}, told), svg('rect', { width: 100, height: 8, class: 'kv-all' }),
    ...request.stages.map((bar) => svg('rect', {
      x: 100 * bar.at_s / whole, width: Math.max(0.5, 100 * bar.seconds / whole), height: 8, class: `stage ${bar.stage.replace(' ', '_')}`,
    })));
}

// One row is in the tab order; arrow keys move to others.
function rove(button) {
  if (!button) return;
  for (const other of $('list').querySelectorAll('button[tabindex="0"]')) other.tabIndex = -1;
  button.tabIndex = 0;
}

function move(event) {
  const row = event.target.closest('tbody tr');
  if (!row) return;
  const body = row.parentElement;
  const places = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling, Home: body.firstElementChild, End: body.lastElementChild };
  const button = places[event.key]?.querySelector('button');
  if (!button) return;
  event.preventDefault();
  rove(button);
  button.focus();
}
