// One request: its timeline, and each choice of workers with what it was made from.

import { $, bytes, clock, count, el, plural, seconds, svg } from './dom.js';
import { stateOf, swatch, words } from './requests.js';

export function drawDetail(request) {
  $('detail-title').textContent = `Request ${request.id}`;
  const open = new Set([...$('detail-body').querySelectorAll('details[open]')].map((one) => one.dataset.key));
  $('detail-body').replaceChildren(facts(request), timeline(request), ...request.told.map((choice) => trail(request, choice, open)));
}

function facts(request) {
  const t = request.timings;
  const all = [
    ['state', stateOf(request) + (request.code ? `: ${request.code}` : '')],
    ['why', request.message], ['came', clock(request.at)], ['took', seconds(request.elapsed_s)],
    ['client', request.client], ['model', request.model],
    ['prompt', `${count(request.prompt_tokens)} tokens, ${count(request.cached_tokens)} of them cached`],
    ['output', `${plural(request.output_tokens, 'token')} in ${plural(request.choices, 'choice')}`],
    ['TTFT', t.ttft_s ? seconds(t.ttft_s) : ''], ['TPOT', t.tpot_s ? seconds(t.tpot_s) : ''],
    ['KV moved', t.kv_bytes ? `${bytes(t.kv_bytes)} by ${t.transport}` : t.kv_bytes === 0 ? 'none' : ''],
    ['workers', Object.entries(t.workers ?? {}).map(([role, id]) => `${role}: ${id}`).join(', ')],
    ['attempts', t.attempts ?? ''],
  ];
  return el('dl', { class: 'facts' }, ...all.filter(([, value]) => value !== '' && value !== undefined)
    .flatMap(([name, value]) => [el('dt', {}, name), el('dd', {}, String(value))]));
}

function timeline(request) {
  const whole = Math.max(request.elapsed_s, 1e-6);
  const lines = request.stages.map((bar) => el('tr', {},
    el('th', { scope: 'row' }, swatch(bar.stage), words(bar.stage)),
    el('td', { class: 'who' }, bar.worker),
    el('td', { class: 'track' }, svg('svg', { viewBox: '0 0 100 10', preserveAspectRatio: 'none', 'aria-hidden': 'true' },
      svg('rect', { width: 100, height: 10, class: 'kv-all' }),
      svg('rect', { x: Math.min(99.5, 100 * bar.at_s / whole), width: Math.max(0.5, 100 * bar.seconds / whole), height: 10, class: `stage ${bar.stage.replace(' ', '_')}` }))),
    el('td', { class: 'num' }, seconds(bar.seconds))));
  if (!lines.length) return el('p', { class: 'faint' }, 'No stage has been told yet.');
  return el('table', { class: 'timeline' }, el('caption', {}, 'What each stage took'), el('tbody', {}, ...lines));
}

function trail(request, choice, open) {
  const title = request.choices > 1 ? `Choice ${choice.index}: where it was sent, and why` : 'Where it was sent, and why';
  const left = choice.notes_left_out ? [el('p', { class: 'faint' }, `${choice.notes_left_out} further notes were not kept.`)] : [];
  const notes = choice.notes.map((note, i) => el('li', {}, ...(note.kind === 'end' ? ending(note) : decision(note, `${choice.index}.${i}`, open))));
  return el('section', {}, el('h3', {}, title), ...left, notes.length ? el('ol', { class: 'trail' }, ...notes) : el('p', { class: 'faint' }, 'Nothing was decided yet.'));
}

const at = (note) => el('span', { class: 'faint' }, `at ${seconds(note.at_s)} `);

function ending(note) {
  const who = note.worker ? ` by ${note.worker}` : '';
  return [at(note), el('strong', { class: 'bad' }, `✕ attempt ${note.how}${who}`), ` ${note.code} ${note.message}`];
}

function decision(note, key, open) {
  const images = note.encode.map(([worker, numbers]) => `, ${plural(numbers.length, 'image')} to ${worker}`).join('');
  const one = note.prefill === note.decode;
  const chosen = note.prefill
    ? `attempt ${note.attempt}: ${one ? note.prefill : `${note.prefill} → ${note.decode}`}${images}`
    : 'nobody had room: it waits in line';
  const details = el('details', { 'data-key': key, open: open.has(key) }, el('summary', {}, candidates(note)), scores(note), unable(note));
  return [at(note), el('strong', {}, chosen), details];
}

function candidates(note) {
  const able = note.workers.filter((row) => !row[7]).length;
  const more = note.left_out ? `, ${note.left_out} more not kept` : '';
  return `${able} of ${note.workers.length} workers could take it${more}`;
}

function scores(note) {
  const head = ['pair', 'has its KV', 'failures', 'strikes', 'cut off', 'prefill load', 'decode load'];
  const lines = note.pairs.map(([prefill, decode, [notKept, failures, strikes, faulty, p, d]], i) => {
    const chosen = prefill === note.prefill && decode === note.decode;
    const cells = [notKept ? 'no' : 'yes', failures, strikes, faulty ? 'yes' : 'no', load(p), load(d)];
    return el('tr', { class: chosen ? 'chosen' : '' }, el('th', { scope: 'row' }, `${chosen ? '✓ ' : ''}${prefill === decode ? prefill : `${prefill} → ${decode}`}`),
      ...cells.map((cell) => el('td', {}, String(cell))));
  });
  if (!lines.length) return el('p', { class: 'faint' }, 'No pair of workers had room.');
  return el('div', { class: 'scroll', tabindex: 0, role: 'group', 'aria-label': 'Scores' }, el('table', { class: 'scores' },
    el('caption', {}, 'Scores: the first column that differs decides, and the lower number wins; with equal ones, the name'),
    el('thead', {}, el('tr', {}, ...head.map((name) => el('th', { scope: 'col' }, name)))), el('tbody', {}, ...lines)));
}

const load = ([tokens, requests]) => `${plural(tokens, 'token')}, ${plural(requests, 'request')}`;

function unable(note) {
  const lines = note.workers.filter((row) => row[7]).map((row) => el('li', {}, `${row[0]} (${row[2]}): ${row[7]}`));
  return lines.length ? el('ul', {}, ...lines) : el('span');
}
