// Time series by uPlot, which is here as `uPlot` (vendor/). All charts share one time axis and one cursor.

import { $, bytes, clock, count, el, seconds } from './dom.js';

const SPAN_S = 600;
const LEAST_S = 60; // of the axis, while little is known
const each = (value) => `${count(value)}/s`;
const CHARTS = [
  ['TTFT', 'time to first token', seconds, [['ttft_p50', 'p50'], ['ttft_p99', 'p99']]],
  ['TPOT', 'time per output token', seconds, [['tpot_p50', 'p50'], ['tpot_p99', 'p99']]],
  ['Tokens', 'per second', each, [['tokens_out', 'out'], ['tokens_in', 'in']]],
  ['In the gateway', 'requests', count, [['running', 'running'], ['waiting', 'waiting']]],
  ['Ended', 'requests per second', each, [['finished', 'finished'], ['failed', 'failed']]],
  ['KV moved', 'bytes per second', (value) => `${bytes(value ?? 0)}/s`, [['kv_sum', 'all links']]],
];
const STROKES = ['--line-1', '--line-2'];

let points = [];
let charts = [];

const colour = (name) => {
  const probe = $('charts');
  probe.style.color = `var(${name})`;
  const found = getComputedStyle(probe).color;
  probe.style.color = '';
  return found;
};

export function drawCharts() {
  charts = CHARTS.map(make);
  new ResizeObserver(() => charts.forEach((chart) => chart.plot.setSize(size(chart.box)))).observe($('charts'));
}

export const newest = () => (points.length ? points[points.length - 1].t : 0);

export function addPoints(more) {
  points.push(...more.map((point) => ({ ...point, kv_sum: point.kv.reduce((sum, [, , rate]) => sum + rate, 0) })));
  points = points.filter((point) => point.t > newest() - SPAN_S);
  charts.forEach(draw);
}

export const recolour = () => charts.forEach((chart) => chart.plot.redraw(false));

const size = (box) => ({ width: Math.max(100, box.clientWidth), height: 132 });

function make([title, what, format, lines]) {
  const values = lines.map(() => el('b', {}, '–'));
  const key = lines.flatMap(([, name], i) => [el('span', { class: `swatch s${i}`, 'aria-hidden': 'true' }), el('span', {}, `${name} `), values[i]]);
  const box = el('div', { class: 'plot' });
  const figure = el('figure', {}, el('figcaption', {}, el('strong', {}, title), el('span', { class: 'faint' }, ` ${what}`), el('span', { class: 'values' }, ...key)), box);
  $('charts').append(figure);
  const chart = { box, lines, format, values };
  chart.plot = new uPlot(options(chart), [[], ...lines.map(() => [])], box);
  return chart;
}

function options(chart) {
  const grid = { stroke: () => colour('--rule'), width: 1 };
  const axis = { stroke: () => colour('--faint'), grid, ticks: { show: false }, font: '11px system-ui' };
  return {
    ...size(chart.box),
    legend: { show: false },
    cursor: { sync: { key: 'time' }, points: { size: 6 }, drag: { x: false, y: false } },
    padding: [8, 22, 0, 0],
    scales: { x: { time: true }, y: { range: (plot, low, high) => [0, high > 0 ? high * 1.1 : 1] } },
    axes: [
      { ...axis, space: 80, size: 24, values: (plot, splits, axis, room, step) => splits.map((at) => clock(at).slice(0, step < 60 ? 8 : 5)) },
      { ...axis, size: 58, space: 28, values: (plot, splits) => splits.map(chart.format) },
    ],
    series: [{}, ...chart.lines.map(([, name], i) => ({
      label: name, stroke: () => colour(STROKES[i]), width: 1.5, dash: i ? [5, 3] : [], spanGaps: false,
      points: { show: false },
    }))],
    hooks: { setCursor: [() => say(chart)] },
  };
}

function draw(chart) {
  const columns = chart.lines.map(([field]) => points.map((point) => point[field]));
  chart.plot.setData([points.map((point) => point.t), ...columns], false);
  chart.plot.batch(() => {
    const oldest = points.length ? points[0].t : 0;
    chart.plot.setScale('x', { min: Math.min(oldest, newest() - LEAST_S), max: newest() });
  });
  say(chart);
}

// Values under the cursor, else the newest ones.
function say(chart) {
  const index = chart.plot?.cursor.idx ?? points.length - 1;
  chart.lines.forEach(([field], i) => {
    const value = points[index]?.[field];
    chart.values[i].textContent = value === null || value === undefined ? '–' : chart.format(value);
  });
}
