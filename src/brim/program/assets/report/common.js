// What all parts of the page share: the plan, formatting, elements, the model of one program, the tooltip.
// Reads the columns that html.py packed. Times are instruction numbers: -1 before the first, n after the last; a block is
// drawn from `first` to `last + 1`. Texts go into the page as text only, never as markup. html.py puts the files of this
// folder into one function, in the order common, chart, arena, tables, page.

const root = document.documentElement;
addEventListener("error", event => { root.dataset.error = event.message; });

const $ = id => document.getElementById(id);
const plan = JSON.parse($("plan-data").textContent);
const texts = plan.strings;
const GUTTER = 82, MARGIN = 14, CHART_HEIGHT = 360, ARENA_HEIGHT = 300, ROWS = 25, NEAR = 24;
const STACK = ["overhead", "unattributed", "params", "buffers", "optimizer", "inputs", "grads", "activations", "temps",
  "workspace", "rounding"];  // from the bottom: what is there all the time, then what comes and goes
const PHASES = ["forward", "backward", "update"];
const hidden = new Set();  // kinds that the legend switched off
let model, view, chart, colours, pinned = null;

function size(bytes) {  // as brim.units.format_bytes
  const sign = bytes < 0 ? "-" : "";
  let value = Math.abs(bytes);
  if (value < 1024) return `${sign}${Math.trunc(value)} B`;
  const units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  for (value /= 1024; value >= 1023.95 && unit < units.length - 1; unit++) value /= 1024;
  return sign + value.toLocaleString("en-US", {minimumFractionDigits: 1, maximumFractionDigits: 1}) + " " + units[unit];
}
function unitOf(bytes) {  // the unit of an axis that reaches so far: its bytes and name
  const power = Math.min(5, Math.max(0, Math.floor(Math.log2(bytes) / 10)));
  return [1024 ** power, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"][power]];
}
const whole = number => number.toLocaleString("en-US");
function percent(part, all) {  // as _percent in html.py
  if (!all) return "";
  return part > 0 && part / all < .0005 ? "< 0.1 %" : `${(100 * part / all).toFixed(1)} %`;
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  made.append(...children.filter(child => child !== null && child !== ""));
  return made;
}
const swatch = kind => element("i", {class: `swatch k-${kind}`});

function when(time, program) {
  if (time < 0) return "before the first instruction";
  return time >= program.count ? "after the last instruction" : `instruction ${whole(time)}`;
}


// ---- the model of one program ----

function unpack(program) {
  const blocks = program.blocks, count = blocks.birth.length, n = program.count;
  const first = new Int32Array(count), last = new Int32Array(count);
  const offset = new Float64Array(count), reserved = new Float64Array(count);
  const changes = Object.fromEntries(STACK.map(kind => [kind, new Float64Array(n + 3)]));
  for (let i = 0, birth = 0; i < count; i++) {
    birth += blocks.birth[i];
    first[i] = birth;
    last[i] = birth + blocks.span[i];
    offset[i] = blocks.offset[i] * program.unit;
    reserved[i] = blocks.nbytes[i] + blocks.rounding[i];
    for (const [kind, bytes] of [[plan.kinds[blocks.kind[i]], blocks.nbytes[i]], ["rounding", blocks.rounding[i]]]) {
      changes[kind][first[i] + 1] += bytes;
      changes[kind][last[i] + 2] -= bytes;
    }
  }
  plan.resident.nbytes.forEach((bytes, i) => {
    changes[plan.kinds[plan.resident.kind[i]]][0] += bytes;
    changes.rounding[0] += plan.resident.rounding[i];
  });
  const total = new Float64Array(n + 2), byKind = {};
  for (const kind of STACK) {
    const values = new Float64Array(n + 2);
    let level = 0, used = false;
    for (let entry = 0; entry < n + 2; entry++) {
      level += changes[kind][entry];
      values[entry] = level;
      total[entry] += level;
      used ||= level > 0;
    }
    if (used) byKind[kind] = values;
  }
  return {program, blocks, count, n, first, last, offset, reserved, total, byKind, kinds: Object.keys(byKind)};
}

function at(time) {  // what an instruction is, as lines of text: layer and op, output, source, bytes alive
  const {program, total} = model, bytes = total[time + 1], known = program.instructions;
  const inside = time >= 0 && time < program.count;
  const layer = inside ? texts[known.layer[time]] : "";
  const share = plan.budget ? `, ${percent(bytes, plan.budget)} of the budget` : "";
  return {
    head: inside ? (layer ? `${layer}  ` : "") + texts[known.op[time]] : when(time, program),
    lines: inside ? [`${when(time, program)}, ${texts[known.phase[time]]}`, texts[known.outs[time]], texts[known.site[time]]] : [],
    strong: `${size(bytes)} alive${share}`,
  };
}

function blockText(i) {
  const {blocks, first, last, offset, program} = model;
  const layer = texts[blocks.layer[i]], born = first[i] < 0 ? "the start" : whole(first[i]);
  const died = last[i] >= program.count ? "the end" : whole(last[i]);
  return {
    head: (layer ? `${layer}  ` : "") + texts[blocks.op[i]],
    lines: [`${texts[blocks.spec[i]]}, ${plan.kinds[blocks.kind[i]]}`, `alive from ${born} through ${died}, at offset ${size(offset[i])}`,
      texts[blocks.site[i]]],
    strong: size(blocks.nbytes[i]),
  };
}

function showTip(event, {head, lines, strong}) {
  const tip = $("tip");
  tip.replaceChildren(element("b", {}, head), ...lines.filter(line => line).map(line => element("div", {}, line)),
    element("div", {class: "strong"}, strong));
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), right = event.clientX + 18 + box.width > innerWidth;
  tip.style.left = `${Math.max(4, right ? event.clientX - 18 - box.width : event.clientX + 18)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 8))}px`;
}
const hideTip = () => { $("tip").hidden = true; };
