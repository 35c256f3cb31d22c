// Puts the page together: colours, programs, buttons. <html data-state="drawn"> says that everything was drawn.

function readColours() {
  const style = getComputedStyle(root), read = name => style.getPropertyValue(name).trim();
  colours = Object.fromEntries(["card", "grid", "text", "quiet", "bad", "hole", "hatch"].map(name => [name, read(`--${name}`)]));
  for (const kind of STACK) colours[kind] = read(`--k-${kind}`);
  for (const phase of PHASES) colours[phase] = read(`--p-${phase}`);
}

function choose(index) {
  model = unpack(plan.programs[index]);
  view = {from: -1, to: model.n + 1};
  pinned = null;
  [...$("programs").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
  redraw();
  fillAlive();
  $("reset").hidden = true;
  $("near").hidden = model.n <= 4 * NEAR;
}

function redraw() {
  drawChart();
  drawArena();
  fillLegend(null);
}

$("drawn").hidden = false;
readColours();
$("phases").append(...PHASES.map(phase => element("span", {}, element("i", {class: `swatch p-${phase}`}), phase)));
if (plan.programs.length > 1)
  $("programs").append(...plan.programs.map((program, i) => element("button", {type: "button", onclick: () => choose(i)},
    program.name, element("small", {}, size(program.peak)))));
$("reset").addEventListener("click", () => zoom(-1, model.n + 1));
$("near").addEventListener("click", () => zoom(model.program.peakAt + .5 - NEAR, model.program.peakAt + .5 + NEAR));
$("to-peak").addEventListener("click", () => { pinned = null; hover(null); fillAlive(); });
$("filter").addEventListener("input", fillAlive);
$("arena").addEventListener("mousemove", arenaHover);
$("arena").addEventListener("mouseleave", () => { $("arena").querySelector(".box")?.remove(); hover(null); hideTip(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); redraw(); });
let width = innerWidth, waiting = 0;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(redraw, 80);
});
choose(plan.highest);
fillLayers();
// uPlot paints in a microtask: the next task comes after it.
setTimeout(() => { root.dataset.state = "drawn"; }, 0);
