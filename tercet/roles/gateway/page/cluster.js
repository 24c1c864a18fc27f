// The cluster as a picture: roles are columns, workers boxes, links curves as thick as what they carry.

import { $, bytes, count, el, fill, seconds, svg } from './dom.js';

const ORDER = ['encode', 'prefill', 'aggregated', 'decode', ''];
const MARKS = { live: '●', starting: '◌', switching: '↻', draining: '◐', drained: '○', lost: '✕', unreachable: '✕', stopping: '◍', gone: '○' };
const MOST_LABELS = 8; // links with their speed beside them: the busiest
const MOST_TALL = 8; // workers of a role; with more, boxes are flat

export function drawCluster(state) {
  const box = $('picture');
  box.replaceChildren(state.workers.length ? picture(state, box.clientWidth - 2) : el('p', {}, 'No worker is known yet.'));
  fill($('workers'), ['worker', 'role', 'pool', 'state', 'epoch', 'node', 'running', 'waiting', 'KV in use', 'why'],
    state.workers.map((w) => [w.id, w.role ?? '', w.pool, w.state, w.epoch, w.node, w.load ? w.load.running : '',
      w.load ? w.load.waiting : '', use(w), w.reason]));
  fill($('links'), ['from', 'to', 'transport', 'now', 'in all', 'measured at connect', 'round trip'],
    state.pairs.map((p) => [p.from, p.to, p.fault || p.transport, `${bytes(p.bytes_per_s)}/s`, bytes(p.bytes),
      `${bytes(p.bandwidth)}/s`, seconds(p.latency_s)]));
}

const use = (worker) => (worker.load && worker.load.kv_use !== null ? `${Math.round(100 * worker.load.kv_use)}%` : '');

function picture(state, width) {
  const columns = ORDER.map((role) => [role, state.workers.filter((w) => (w.role ?? '') === role)])
    .filter(([role, workers]) => workers.length || role in state.target);
  const tallest = Math.max(...columns.map(([, workers]) => workers.length));
  const flat = tallest > MOST_TALL;
  const box = { height: flat ? 24 : 62, gap: flat ? 6 : 14, top: 34, flat };
  box.width = Math.min(230, Math.floor(width / (columns.length * 1.45)));
  const between = columns.length > 1 ? (width - columns.length * box.width) / (columns.length - 1) : 0;
  const height = box.top + tallest * (box.height + box.gap);
  const at = new Map();
  const heads = [];
  columns.forEach(([role, workers], column) => {
    const x = columns.length > 1 ? column * (box.width + between) : (width - box.width) / 2;
    heads.push(heading(role, workers, state.target, x, box.width));
    const spare = (tallest - workers.length) * (box.height + box.gap) / 2;
    workers.forEach((worker, row) => at.set(worker.id, { x, y: box.top + spare + row * (box.height + box.gap), worker }));
  });
  const links = state.pairs.filter((pair) => at.has(pair.from) && at.has(pair.to));
  const named = new Set([...links].sort((a, b) => b.bytes_per_s - a.bytes_per_s).slice(0, MOST_LABELS));
  const told = `${state.workers.length} workers, ${state.workers.filter((w) => w.state === 'live').length} live`;
  return svg('svg', { width, height, viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': `Picture of the cluster: ${told}` },
    ...heads, ...links.map((pair) => curve(pair, at, box)),
    ...[...at.values()].map((place) => worker(place, box)),
    ...links.filter((pair) => named.has(pair)).map((pair) => label(pair, at, box)));
}

function heading(role, workers, target, x, width) {
  const live = workers.filter((w) => w.state === 'live').length;
  const wanted = role in target ? `/${target[role]}` : '';
  const pools = [...new Set(workers.map((w) => w.pool).filter(Boolean))].join(', ');
  return svg('g', {}, svg('text', { x, y: 14, class: 'role' }, role || 'unknown role'),
    svg('text', { x: x + width, y: 14, class: 'faint', 'text-anchor': 'end' },
      `${live}${wanted} live${pools && width > 160 ? ` · ${pools}` : ''}`));
}

function worker({ x, y, worker: w }, box) {
  const load = w.load ?? { running: 0, waiting: 0, kv_use: null };
  const wide = box.width > 150;
  const status = `${MARKS[w.state] ?? '?'} ${w.state}`;
  const below = !wide && !box.flat && w.state !== 'live'; // there is no room for it beside the name
  const work = w.load ? (wide ? `${load.running} running, ${load.waiting} waiting` : `${load.running} run, ${load.waiting} wait`) : '';
  const parts = [
    svg('title', {}, [`${w.id}, ${w.role}, ${w.state}, epoch ${w.epoch}`, w.node && `on ${w.node}`, w.reason].filter(Boolean).join('\n')),
    svg('rect', { x, y, width: box.width, height: box.height, rx: 6, class: 'box' }),
    svg('text', { x: x + 9, y: y + 16, class: 'name' }, w.id),
    below ? svg('text', { x: x + 9, y: y + 34, class: 'state' }, status)
      : svg('text', { x: x + box.width - 9, y: y + 16, class: 'state', 'text-anchor': 'end' }, box.flat && !wide ? MARKS[w.state] : status),
  ];
  if (!box.flat && !below) parts.push(svg('text', { x: x + 9, y: y + 34, class: 'work' }, work || `epoch ${w.epoch}`));
  if (load.kv_use !== null) parts.push(...kvBar(load.kv_use, x, y, box));
  return svg('g', { class: `worker ${w.state}`, 'data-worker': w.id }, ...parts);
}

function kvBar(share, x, y, box) {
  const width = box.width - (box.flat ? 18 : 64);
  const top = y + box.height - (box.flat ? 4 : 16);
  const bar = [
    svg('rect', { x: x + 9, y: top, width, height: box.flat ? 2 : 6, rx: 2, class: 'kv-all' }),
    svg('rect', { x: x + 9, y: top, width: Math.max(0, width * share), height: box.flat ? 2 : 6, rx: 2, class: 'kv' }),
  ];
  if (!box.flat) bar.push(svg('text', { x: x + box.width - 9, y: top + 7, class: 'faint', 'text-anchor': 'end' }, `KV ${Math.round(100 * share)}%`));
  return bar;
}

function ends(pair, at, box) {
  const from = at.get(pair.from);
  const to = at.get(pair.to);
  const middle = box.height / 2;
  return [from.x + box.width, from.y + middle, to.x, to.y + middle];
}

function curve(pair, at, box) {
  const [x1, y1, x2, y2] = ends(pair, at, box);
  const half = (x2 - x1) / 2;
  const thick = pair.bytes_per_s > 0 ? Math.min(7, 1 + Math.log10(1 + pair.bytes_per_s / 1e3)) : 1;
  const kind = pair.fault ? 'fault' : pair.bytes_per_s > 0 ? 'busy' : 'idle';
  const told = pair.fault || `${pair.transport}, measured at connect ${bytes(pair.bandwidth)}/s, ${bytes(pair.bytes)} in all`;
  return svg('path', { d: `M${x1},${y1} C${x1 + half},${y1} ${x2 - half},${y2} ${x2},${y2}`, class: `link ${kind}`, 'stroke-width': thick },
    svg('title', {}, `${pair.from} to ${pair.to}: ${told}`));
}

// Where the curve is three quarters of its way, so that links that cross keep their labels apart.
function label(pair, at, box) {
  const [x1, y1, x2, y2] = ends(pair, at, box);
  if (!pair.fault && pair.bytes_per_s <= 0) return svg('g');
  const t = 0.72;
  const x = x1 + (x2 - x1) * (1.5 * t * (1 - t) ** 2 + 1.5 * t ** 2 * (1 - t) + t ** 3);
  const y = y1 + (y2 - y1) * (3 * t ** 2 * (1 - t) + t ** 3);
  const text = pair.fault ? '✕ no connection' : `${bytes(pair.bytes_per_s)}/s`;
  return svg('text', { x, y: y + 4, class: `speed ${pair.fault ? 'fault' : ''}`, 'text-anchor': 'middle' }, x2 - x1 > 60 ? text : '');
}

export const workerCount = (state) => count(state.workers.filter((w) => w.state === 'live').length);
