// Tables that can be sorted: blocks alive at an instruction, layers at the peak.

// columns: {label, number, value(row) to sort by, cell(row) to show}; the first sort is by `by`, largest first.
function table(holder, columns, rows, by) {
  let order = {column: by, down: true}, all = false;
  const draw = () => {
    const {value} = columns[order.column], sign = order.down ? -1 : 1;
    const sorted = [...rows].sort((a, b) => { const p = value(a), q = value(b); return p < q ? -sign : p > q ? sign : 0; });
    const shown = all ? sorted.slice(0, 5000) : sorted.slice(0, ROWS);
    const heads = columns.map((column, i) => element("th", {
      class: column.number ? "n" : "", "aria-sort": i === order.column ? (order.down ? "descending" : "ascending") : null,
    }, element("button", {type: "button", onclick: () => {
      order = {column: i, down: i === order.column ? !order.down : Boolean(column.number)};
      draw();
    }}, column.label)));
    const lines = shown.map(row => element("tr", {}, ...columns.map(column =>
      element("td", {class: column.number ? "n" : column.path ? "path" : ""}, column.cell(row)))));
    const rest = rows.length - shown.length;
    holder.replaceChildren(element("div", {class: "scroll"},
      element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...lines))));
    if (rest > 0) holder.append(element("button", {type: "button", class: "more", onclick: () => { all = true; draw(); }},
      `${all ? "and " : ""}${whole(rest)} more`));
  };
  draw();
}

function fillAlive() {
  const time = pinned ?? model.program.peakAt, {blocks, first, last, program} = model, resident = plan.resident;
  const rows = resident.nbytes.map((bytes, i) => ({bytes, kind: plan.kinds[resident.kind[i]], layer: texts[resident.layer[i]],
    op: texts[resident.op[i]], spec: texts[resident.spec[i]], site: "", first: -2, life: "always"}));
  for (let i = 0; i < model.count; i++)
    if (first[i] <= time && time <= last[i]) rows.push({bytes: blocks.nbytes[i], kind: plan.kinds[blocks.kind[i]],
      layer: texts[blocks.layer[i]], op: texts[blocks.op[i]], spec: texts[blocks.spec[i]], site: texts[blocks.site[i]], first: first[i],
      life: `${first[i] < 0 ? "start" : whole(first[i])} – ${last[i] >= program.count ? "end" : whole(last[i])}`});
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(word => word);
  const kept = rows.filter(row => words.every(word => `${row.layer} ${row.op} ${row.kind} ${row.spec} ${row.site}`.toLowerCase().includes(word)));
  const sum = kept.reduce((total, row) => total + row.bytes, 0);
  $("alive-title").textContent = (pinned === null ? `Alive at the peak, ${when(time, program)}` : `Alive at ${when(time, program)}`)
    .replace("Alive at before", "Alive before").replace("Alive at after", "Alive after")
    + `: ${whole(kept.length)} blocks, ${size(sum)}`;
  $("to-peak").hidden = pinned === null;
  table($("alive"), [
    {label: "Bytes", number: true, value: row => row.bytes, cell: row => size(row.bytes)},
    {label: "Kind", value: row => row.kind, cell: row => element("span", {class: "name"}, swatch(row.kind), row.kind)},
    {label: "Layer", path: true, value: row => row.layer, cell: row => row.layer},
    {label: "Made by", path: true, value: row => row.op, cell: row => row.op},
    {label: "Shape", path: true, value: row => row.spec, cell: row => row.spec},
    {label: "Instructions", number: true, value: row => row.first, cell: row => row.life},
    {label: "Source", path: true, value: row => row.site, cell: row => row.site},
  ], kept, 0);
}

function fillLayers() {
  const rows = plan.layers.layer.map((layer, i) => ({layer: texts[layer], parts: plan.layers.bytes[i],
    sum: plan.layers.bytes[i].reduce((a, b) => a + b, 0)}));
  const most = Math.max(1, ...rows.map(row => row.sum));
  const used = plan.layerKinds.map((kind, k) => ({kind, k})).filter(({k}) => rows.some(row => row.parts[k]));
  const meter = row => element("div", {class: "meter"}, ...used.map(({kind, k}) =>
    element("i", {class: `k-${kind}`, style: `width:${100 * row.parts[k] / most}%`})));
  table($("layers"), [
    {label: "Layer", path: true, value: row => row.layer, cell: row => row.layer || "(no layer)"},
    {label: "At the peak", number: true, value: row => row.sum, cell: row => size(row.sum)},
    {label: "Share", number: true, value: row => row.sum, cell: row => percent(row.sum, plan.peak)},
    {label: "By kind", value: row => row.sum, cell: meter},
    ...used.map(({kind, k}) => ({label: kind, number: true, value: row => row.parts[k], cell: row => row.parts[k] ? size(row.parts[k]) : ""})),
  ], rows, 1);
}
