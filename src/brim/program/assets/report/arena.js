// The arena: a rectangle for each block, over the same instructions as the chart above it.

function scene() {
  const width = $("arena").clientWidth;
  const highest = model.reserved.reduce((top, bytes, i) => Math.max(top, bytes + model.offset[i]), 0);
  return {width, inner: width - GUTTER - MARGIN, highest, top: 8, height: ARENA_HEIGHT - 16, bytes: Math.max(plan.arena, 1)};
}

function drawArena() {
  const canvas = $("arena").querySelector("canvas"), ratio = devicePixelRatio, {width, inner, highest, top, height, bytes} = scene();
  canvas.width = width * ratio;
  canvas.height = ARENA_HEIGHT * ratio;
  const ctx = canvas.getContext("2d");
  ctx.scale(ratio, ratio);
  ctx.fillStyle = colours.hole;
  ctx.fillRect(GUTTER, top, inner, height);
  ctx.save();
  ctx.beginPath(); ctx.rect(GUTTER, top, inner, height); ctx.clip();
  ctx.strokeStyle = colours.hatch;
  ctx.lineWidth = 1;
  ctx.beginPath();
  for (let x = GUTTER - height; x < width; x += 9) { ctx.moveTo(x, top + height); ctx.lineTo(x + height, top); }
  ctx.stroke();
  const {blocks, count, first, last, offset, reserved} = model, scale = height / bytes;
  const shades = Object.fromEntries(STACK.map(kind => [kind, [0, .16, .3].map(part => mix(colours[kind], colours.card, part))]));
  const inks = Object.fromEntries(STACK.map(kind => [kind, ink(colours[kind])]));
  ctx.font = "11px system-ui, sans-serif";
  ctx.textBaseline = "middle";
  // Small blocks first: what is drawn at a pixel's least size must not hide a larger one beside it.
  for (const i of model.bySize ??= Array.from({length: count}, (_, i) => i).sort((a, b) => reserved[a] - reserved[b])) {
    if (last[i] + 1 <= view.from || first[i] >= view.to || !reserved[i]) continue;
    const left = Math.max(GUTTER - 2, xOf(first[i])), right = Math.min(width - MARGIN + 2, xOf(last[i] + 1));
    const wide = Math.max(right - left, .8), tall = Math.max(reserved[i] * scale, .8), y = top + height - offset[i] * scale - tall;
    const kind = plan.kinds[blocks.kind[i]];
    ctx.fillStyle = shades[kind][blocks.layer[i] % 3];
    ctx.fillRect(left, y, wide, tall);
    if (wide < 4 || tall < 3) continue;
    ctx.strokeStyle = colours.card;
    ctx.lineWidth = wide > 12 && tall > 8 ? 1 : .5;
    ctx.strokeRect(left, y, wide, tall);
    if (wide < 52 || tall < 15) continue;
    const layer = texts[blocks.layer[i]], name = (layer ? `${layer} ` : "") + texts[blocks.op[i]];
    const letters = Math.floor((wide - 10) / 5.9);
    ctx.fillStyle = inks[kind];
    ctx.fillText(name.length > letters ? `${name.slice(0, letters - 1)}…` : name, left + 6, y + tall / 2);
  }
  const peak = xOf(model.program.peakAt + .5);
  ctx.strokeStyle = colours.text;
  ctx.setLineDash([3, 3]);
  ctx.beginPath(); ctx.moveTo(peak, top); ctx.lineTo(peak, top + height); ctx.stroke();
  ctx.restore();
  ctx.fillStyle = colours.quiet;
  ctx.font = "12px system-ui, sans-serif";
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  for (const part of [0, .25, .5, .75, 1]) ctx.fillText(size(part * bytes), GUTTER - 9, Math.min(top + height - 6, Math.max(top + 6, top + height * (1 - part))));
  $("arena-note").textContent = `${whole(count)} blocks; this program uses ${size(highest)} of ${size(plan.arena)}`;
}

const channels = colour => [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16));  // of a colour #rrggbb
const mix = (one, other, part) => `rgb(${channels(one).map((c, i) => Math.round(c + part * (channels(other)[i] - c))).join(" ")})`;

function ink(colour) {  // black or white, whichever reads on a colour
  const [r, g, b] = channels(colour).map(c => c / 255).map(c => c <= .04 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b > .25 ? "#10151c" : "#ffffff";
}

function arenaHover(event) {
  const {width, inner, top, height, bytes} = scene(), box = $("arena").getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top;
  $("arena").querySelector(".box")?.remove();
  if (x < GUTTER || x > width - MARGIN || y < top || y > top + height) { hover(null); hideTip(); return; }
  const time = timeAt(x - GUTTER, inner), byte = (top + height - y) / height * bytes;
  const {count, first, last, offset, reserved} = model;
  let found = -1;
  for (let i = 0; i < count && found < 0; i++)
    if (first[i] <= time && time <= last[i] && offset[i] <= byte && byte < offset[i] + reserved[i]) found = i;
  hover(time);
  if (found < 0) {
    showTip(event, {head: "free", lines: [when(time, model.program)], strong: `${size(model.total[time + 1])} alive`});
    return;
  }
  const left = Math.max(GUTTER, xOf(first[found])), right = Math.min(width - MARGIN, xOf(last[found] + 1));
  const tall = Math.max(3, reserved[found] / bytes * height), base = top + height - offset[found] / bytes * height;
  $("arena").append(element("div", {class: "box", style: `left:${left}px;top:${base - tall}px;width:${Math.max(3, right - left)}px;height:${tall}px`}));
  showTip(event, blockText(found));
}
