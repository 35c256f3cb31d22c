// Memory over the step: areas stacked by kind, the limits, zoom, cursor, and the legend with its values.

// At most about two points a pixel; of the instructions behind one pixel the one with the most bytes is shown, so that
// no peak is lost.
function sample() {
  const {total, byKind, n, program} = model;
  const shown = model.kinds.filter(kind => !hidden.has(kind));
  const low = Math.max(0, Math.floor(view.from) + 1), high = Math.min(n + 1, Math.ceil(view.to));
  const buckets = 2 * Math.max(100, $("chart").clientWidth - GUTTER - MARGIN);
  const width = Math.max(1, (high - low + 1) / buckets), times = [], entries = [];
  for (let start = low; start <= high; start += width) {
    const end = Math.min(high + 1, Math.max(Math.floor(start) + 1, Math.floor(start + width)));
    let best = Math.floor(start);
    for (let entry = best + 1; entry < end; entry++) if (total[entry] > total[best]) best = entry;
    times.push(Math.floor(start) - 1);
    entries.push(best);
  }
  times.push(high);
  entries.push(entries.at(-1));
  const sums = [], level = new Float64Array(entries.length);
  for (const kind of shown) {
    entries.forEach((entry, i) => { level[i] += byKind[kind][entry]; });
    sums.push(Array.from(level));
  }
  const data = [times, ...sums.reverse()];  // the highest sum first: the lower ones are painted over it
  if (program.actual) data.push(entries.map(entry => program.actual[entry]));
  return {data, shown};
}

function ceiling() {
  const highest = Math.max(...[model.program.peak, plan.peak, ...(model.program.actual ? [Math.max.apply(null, sample().data.at(-1))] : [])]);
  const near = plan.budget !== null && plan.budget <= 1.7 * highest;
  return {top: 1.1 * Math.max(highest, near ? plan.budget : 0, 1), near};
}

function drawChart() {
  chart?.destroy();
  const {data, shown} = sample(), {top, near} = ceiling(), width = $("chart").clientWidth;
  const [unit, name] = unitOf(top), steps = [.1, .2, .5, 1, 2, 5, 10, 20, 50, 100, 200, 500];
  const axis = {stroke: colours.quiet, grid: {stroke: colours.grid, width: 1}, ticks: {stroke: colours.grid, width: 1, size: 5},
    font: "12px system-ui, sans-serif"};
  const series = [...shown].reverse().map(kind => ({stroke: colours[kind], width: 0, fill: colours[kind], paths: uPlot.paths.stepped({align: 1}),
    points: {show: false}}));
  if (model.program.actual)
    series.push({stroke: colours.text, width: 1.5, dash: [2, 2], paths: uPlot.paths.stepped({align: 1}), points: {show: false}});
  chart = new uPlot({
    width, height: CHART_HEIGHT, padding: [10, MARGIN, 0, 0], legend: {show: false}, drawOrder: ["series", "axes"],
    scales: {x: {time: false, range: () => [view.from, view.to]}, y: {range: () => [0, top]}},
    axes: [
      {...axis, size: 36, ticks: {show: false}, gap: 12, incrs: [1, 2, 5].flatMap(a => [0, 1, 2, 3, 4, 5, 6].map(e => a * 10 ** e)).sort((a, b) => a - b),
        values: (_, splits) => splits.map(whole)},
      {...axis, size: GUTTER, incrs: steps.map(step => step * unit),
        values: (_, splits, __, ___, step) => splits.map(bytes => `${(bytes / unit).toFixed(step < unit ? 1 : 0)} ${name}`)},
    ],
    series: [{}, ...series],
    cursor: {x: false, y: false, points: {show: false}, drag: {x: true, y: false, setScale: false}, bind: {dblclick: () => () => zoom(-1, model.n + 1)}},
    hooks: {
      setSelect: [u => {
        if (u.select.width < 4) return;
        const from = u.posToVal(u.select.left, "x"), to = u.posToVal(u.select.left + u.select.width, "x");
        u.setSelect({left: 0, top: 0, width: 0, height: 0}, false);
        zoom(from, to);
      }],
      draw: [u => { drawPhases(u); drawLimits(u, top, near); }],
    },
  }, data, $("chart"));
  listen();
  placeRules();
}

function drawPhases(u) {  // a strip below the plot, a column a pixel: the phase of the instruction there
  const {ctx, bbox} = u, strip = 6 * devicePixelRatio, known = model.program.instructions.phase;
  const top = bbox.top + bbox.height + devicePixelRatio;
  for (let x = 0; x < bbox.width; x++) {
    const time = Math.floor(view.from + (x + .5) / bbox.width * (view.to - view.from));
    if (time < 0 || time >= model.n) continue;
    ctx.fillStyle = colours[texts[known[time]]];
    ctx.fillRect(bbox.left + x, top, 1, strip);
  }
}

function drawLimits(u, top, near) {
  const {ctx, bbox} = u, ratio = devicePixelRatio, right = bbox.left + bbox.width;
  const level = (bytes, colour, dash) => {
    const y = u.valToPos(bytes, "y", true);
    ctx.strokeStyle = colour;
    ctx.lineWidth = 1.5 * ratio;
    ctx.setLineDash(dash.map(length => length * ratio));
    ctx.beginPath(); ctx.moveTo(bbox.left, y); ctx.lineTo(right, y); ctx.stroke();
    return y;
  };
  const label = (text, x, y, align, colour) => {  // on a plate of the card's colour, so that it reads on any area
    ctx.font = `600 ${12 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    ctx.textBaseline = "middle";
    const wide = ctx.measureText(text).width, pad = 5 * ratio;
    x = Math.min(Math.max(align === "right" ? x - wide : align === "center" ? x - wide / 2 : x, bbox.left + pad), right - wide - pad);
    ctx.globalAlpha = .86;
    ctx.fillStyle = colours.card;
    ctx.fillRect(x - pad, y - 9 * ratio, wide + 2 * pad, 18 * ratio);
    ctx.globalAlpha = 1;
    ctx.fillStyle = colour;
    ctx.fillText(text, x, y);
  };
  ctx.save();
  const over = plan.budget !== null && plan.peak > plan.budget;
  const held = u.valToPos(plan.peak, "y", true);
  const limit = near ? u.valToPos(plan.budget, "y", true) : null;
  if (limit !== null && over) {
    ctx.globalAlpha = .12; ctx.fillStyle = colours.bad;
    ctx.fillRect(bbox.left, bbox.top, bbox.width, limit - bbox.top);
    ctx.globalAlpha = 1;
  }
  level(plan.peak, colours.quiet, [2, 4]);
  if (limit !== null) level(plan.budget, colours.bad, [7, 5]);
  const apart = limit === null || Math.abs(limit - held) > 22 * ratio;  // else the labels take different ends
  label(`held: resident + arena ${size(plan.peak)}`, apart ? right : bbox.left, held - (over || apart ? 12 : -12) * ratio, apart ? "right" : "left", colours.quiet);
  if (limit !== null) label(`budget ${size(plan.budget)}`, right, limit - 12 * ratio, "right", colours.bad);
  else if (plan.budget !== null) label(`budget ${size(plan.budget)}: above this chart`, bbox.left + 8 * ratio, bbox.top + 12 * ratio, "left", colours.quiet);
  const time = model.program.peakAt + .5;
  if (time >= view.from && time <= view.to && hidden.size === 0) {
    const x = u.valToPos(time, "x", true), y = u.valToPos(model.program.peak, "y", true);
    ctx.setLineDash([]);
    ctx.beginPath(); ctx.arc(x, y, 4 * ratio, 0, 2 * Math.PI);
    ctx.fillStyle = colours.text; ctx.fill();
    ctx.strokeStyle = colours.card; ctx.lineWidth = 1.5 * ratio; ctx.stroke();
    const clear = x > bbox.left + 300 * ratio && x < right - 340 * ratio;  // of the labels in the corners
    label(`live peak ${size(model.program.peak)}`, x, y + (clear ? -17 : 17) * ratio, "center", colours.text);
  }
  ctx.restore();
}

function zoom(from, to) {
  const least = Math.min(8, model.n + 2), middle = (from + to) / 2;
  if (to - from < least) { from = middle - least / 2; to = middle + least / 2; }
  view = {from: Math.max(-1, from), to: Math.min(model.n + 1, to)};
  $("reset").hidden = view.from <= -1 && view.to >= model.n + 1;
  chart.setData(sample().data);
  drawArena();
  placeRules();
}

// The instruction at a position; of those behind one pixel the one that the chart shows.
function shownAt(x, width) {
  let best = timeAt(x, width);
  for (let time = best + 1; time <= Math.min(model.n, Math.ceil(view.from + (x + 1) / width * (view.to - view.from)) - 1); time++)
    if (model.total[time + 1] > model.total[best + 1]) best = time;
  return best;
}
const timeAt = (x, width) => Math.min(model.n, Math.max(-1, Math.floor(view.from + x / width * (view.to - view.from))));
const xOf = time => GUTTER + (time - view.from) / (view.to - view.from) * ($("chart").clientWidth - GUTTER - MARGIN);

function placeRules(time = null) {  // the upright lines of cursor and pin, in chart and arena
  for (const [holder, height] of [[$("chart"), CHART_HEIGHT - 36], [$("arena"), ARENA_HEIGHT]]) {
    for (const rule of holder.querySelectorAll(":scope > .rule")) rule.remove();
    for (const [where, name] of [[pinned, "rule pin"], [time, "rule"]])
      if (where !== null && where + 1 > view.from && where < view.to)
        holder.append(element("div", {class: name, style: `left:${xOf(where + .5)}px;height:${height}px`}));
  }
}

function hover(time) {  // null: away
  placeRules(time);
  fillLegend(time);
}

function listen() {
  const over = chart.over;
  let down = 0;
  over.tabIndex = 0;
  over.setAttribute("aria-label", "Memory over the step; arrow keys choose an instruction");
  over.addEventListener("mousedown", event => { down = event.clientX; });
  over.addEventListener("mousemove", event => {
    const time = shownAt(event.clientX - over.getBoundingClientRect().left, over.clientWidth);
    hover(time);
    showTip(event, at(time));
  });
  over.addEventListener("mouseleave", () => { hover(null); hideTip(); });
  over.addEventListener("click", event => {
    if (Math.abs(event.clientX - down) < 4) pin(shownAt(event.clientX - over.getBoundingClientRect().left, over.clientWidth));
  });
  over.addEventListener("keydown", event => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!move) return;
    event.preventDefault();
    pin(Math.min(model.n, Math.max(-1, (pinned ?? model.program.peakAt) + move)));
  });
}

function pin(time) {
  pinned = time;
  hover(null);
  fillAlive();
}

function fillLegend(time) {
  const here = time ?? pinned ?? model.program.peakAt, entry = here + 1;
  const place = here === model.program.peakAt ? `at the peak, ${when(here, model.program)}` : when(here, model.program);
  const held = element("span", {}, "alive ", element("small", {class: "quiet"}, place), element("b", {}, size(model.total[entry])));
  const chips = [...model.kinds].reverse().map(kind => element("button", {
    type: "button", class: hidden.has(kind) ? "off" : "", title: "Show or hide", onclick: () => {
      hidden.has(kind) ? hidden.delete(kind) : hidden.add(kind);
      drawChart();
      fillLegend(null);
    },
  }, swatch(kind), kind, element("b", {}, size(model.byKind[kind][entry]))));
  const actual = model.program.actual
    ? [element("span", {}, "┄ measured", element("b", {}, size(model.program.actual[entry])))] : [];
  held.style.minWidth = "190px";
  $("legend").replaceChildren(held, ...chips, ...actual);
}
