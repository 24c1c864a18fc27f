// Asks the gateway each second, draws what it says, and says so if it says nothing.

import { addPoints, drawCharts, newest, recolour } from './charts.js';
import { drawCluster } from './cluster.js';
import { drawDetail } from './detail.js';
import { $, clock, el } from './dom.js';
import { buttonOf, drawList, startList } from './requests.js';

const EVERY_MS = 1000;
const PATIENCE_MS = 5000;
const LISTED = 50;

let state = null;
let shown = null; // id of the request in the dialog
let answered = null; // when the gateway last did

class Refused extends Error {}

async function get(path) {
  const answer = await fetch(`dashboard/${path}`, { credentials: 'same-origin', signal: AbortSignal.timeout(PATIENCE_MS) });
  if (answer.status === 401 || answer.status === 403) throw new Refused('The gateway asks for an API key: reload this page and give it as the password.');
  if (answer.status === 404) return null;
  if (!answer.ok) throw new Error(`the gateway answers ${answer.status}`);
  return answer.json();
}

async function look() {
  const [told, listed] = await Promise.all([get(`state?since=${newest()}`), get(`requests?limit=${LISTED}`)]);
  if (!told || !listed) throw new Error('this gateway has no dashboard');
  state = told;
  drawHead();
  drawCluster(state);
  addPoints(state.points);
  drawList(listed.requests, shown);
  if (shown !== null) await drawShown();
}

async function drawShown() {
  const id = shown;
  const request = await get(`requests/${encodeURIComponent(id)}`);
  if (shown !== id) return;
  if (request) drawDetail(request);
  else {
    $('detail-title').textContent = `Request ${id}`;
    $('detail-body').replaceChildren(el('p', {}, 'It is not, or no longer, among the requests that are kept.'));
  }
}

function drawHead() {
  document.title = `Tercet ${state.cluster}`;
  $('cluster-name').textContent = state.cluster;
  $('ready').className = `pill ${state.ready ? 'good' : 'bad'}`;
  const told = state.ready ? '● ready' : `✕ not ready: ${state.reason}`;
  if ($('ready').textContent !== told) $('ready').textContent = told;
  const facts = [['model', state.model], ['topology', state.topology], ['in flight', state.inflight], ['as of', clock(state.now)]];
  $('facts').replaceChildren(...facts.map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, String(value)))));
}

function say(fault) {
  const told = fault === null ? '' : fault instanceof Refused ? fault.message
    : `The gateway does not answer (${fault.message}); ${answered ? `what is shown is of ${clock(answered)}. ` : ''}It is asked again each second.`;
  document.body.classList.toggle('stale', fault !== null);
  $('fault').hidden = fault === null;
  if ($('fault').textContent !== told) $('fault').textContent = told;
  if (fault !== null) {
    $('ready').className = 'pill bad';
    $('ready').textContent = fault instanceof Refused ? '✕ key wanted' : '✕ unreachable';
  }
}

async function run() {
  for (;;) {
    if (!document.hidden) {
      try {
        await look();
        answered = state.now;
        say(null);
      } catch (fault) {
        say(fault);
      }
    }
    await new Promise((done) => setTimeout(done, EVERY_MS));
  }
}

function open(id) {
  shown = id;
  history.replaceState(null, '', `#${encodeURIComponent(id)}`);
  $('detail-title').textContent = `Request ${id}`;
  $('detail-body').replaceChildren(el('p', { class: 'faint' }, 'asking the gateway'));
  $('detail').showModal();
  drawShown().catch(say);
}

function closed() {
  const id = shown;
  shown = null;
  history.replaceState(null, '', location.pathname);
  buttonOf(id)?.focus();
}

const THEMES = { '': 'Theme: system', light: 'Theme: light', dark: 'Theme: dark' };

function theme(chosen) {
  document.documentElement.dataset.theme = chosen;
  localStorage.setItem('tercet-theme', chosen);
  $('theme').textContent = THEMES[chosen];
  recolour();
}

function start() {
  drawCharts();
  startList(open);
  theme(localStorage.getItem('tercet-theme') ?? '');
  const names = Object.keys(THEMES);
  $('theme').addEventListener('click', () => theme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]));
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', recolour);
  addEventListener('resize', () => state && drawCluster(state));
  $('close').addEventListener('click', () => $('detail').close());
  $('detail').addEventListener('close', closed);
  $('detail').addEventListener('click', (event) => event.target === $('detail') && $('detail').close());
  if (location.hash.length > 1) open(decoded(location.hash.slice(1)));
  run();
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

start();
