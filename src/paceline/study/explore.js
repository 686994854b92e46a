"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const root = document.documentElement;
const narrow = matchMedia("(max-width: 640px)");
const dark = matchMedia("(prefers-color-scheme: dark)");
const unique = values => [...new Set(values)];
const number = value => value === null ? "–" : String(+value.toPrecision(6));

// ---- tables ------------------------------------------------------------------------------------

function sort(table, column, ascending) {
  const body = table.tBodies[0];
  const numeric = column > 1;
  const key = line => {
    const cell = line.cells[column];
    return numeric ? cell.dataset.sort : cell.textContent;
  };
  const order = (a, b) => numeric ? (+a > +b) - (+a < +b)
    : a.localeCompare(b, undefined, { numeric: true });
  const lines = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");  // empty cells go last in both orders
    return ascending ? order(x, y) : order(y, x);
  });
  body.append(...lines);
  [...table.tHead.rows[0].cells].forEach((head, i) => head.setAttribute(
    "aria-sort", i !== column ? "none" : ascending ? "ascending" : "descending"));
}

for (const section of document.querySelectorAll(".results")) {
  const table = section.querySelector("table");
  if (!table) continue;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () =>
    sort(table, column, head.getAttribute("aria-sort") !== "ascending")));

  const baseline = section.querySelector(".baseline");
  baseline.addEventListener("change", () => {
    const shown = data.tables[section.dataset.table][baseline.value];
    for (const line of table.tBodies[0].rows) {
      const cell = line.cells[line.cells.length - 1];
      [cell.dataset.sort, cell.textContent] = shown[line.dataset.line];
    }
    const name = baseline.selectedOptions[0].textContent;
    section.querySelector(".verdict").textContent = data.verdicts[section.dataset.table][baseline.value];
    section.querySelector(".of").textContent = name.slice(0, name.lastIndexOf(","));
    const last = heads[heads.length - 1].getAttribute("aria-sort");
    if (last !== "none") sort(table, heads.length - 1, last === "ascending");
  });

  const filter = section.querySelector(".filter");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    const lines = [...table.tBodies[0].rows];
    for (const line of lines) {
      const text = [...line.cells].slice(0, 3).map(cell => cell.textContent).join(" ").toLowerCase();
      line.classList.toggle("out", !words.every(word => text.includes(word)));
    }
    const left = lines.filter(line => !line.classList.contains("out")).length;
    section.querySelector("[role=status]").textContent =
      left < lines.length ? `${left} of ${lines.length} lines` : "";
  });
}

// ---- charts ------------------------------------------------------------------------------------

// Plotly must show the users' names as text, not as its tags.
const plain = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const colour = name => getComputedStyle(root).getPropertyValue(name).trim();

function choices(select, values, show = String, chosen = select.value) {
  select.replaceChildren(...values.map(value => new Option(show(value), JSON.stringify(value))));
  if (values.some(value => JSON.stringify(value) === chosen)) select.value = chosen;
}

const chosen = id => JSON.parse(by(id).value);

function layout(height, more) {
  const axis = { gridcolor: colour("--line"), zeroline: false, automargin: true };
  return {
    height, autosize: true, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    ...(root.classList.contains("paper") ? { width: 680 } : {}),
    font: { family: "system-ui, sans-serif", size: 13, color: colour("--ink") },
    hoverlabel: { namelength: -1 }, margin: { l: 60, r: 12, t: 12, b: 48 },
    dragmode: narrow.matches ? false : "zoom",  // a finger scrolls the page
    ...more(axis),
  };
}

function show(id, traces, layout, label) {
  const options = { responsive: true, displaylogo: false };
  const chart = by(id);
  chart.setAttribute("role", "group");
  chart.setAttribute("aria-label", label);
  return Plotly.react(chart, traces, layout, options);
}

// What looks are in matplotlib's letters.
const DASHES = { "-": "solid", "--": "dash", "-.": "dashdot" };
const SYMBOLS = {
  o: "circle", s: "square", D: "diamond", "^": "triangle-up", v: "triangle-down", P: "cross", X: "x",
};
const BEST = "best";

function drawCurves() {
  const setting = chosen("curve-setting"), rate = chosen("curve-rate");
  const series = data.curves.filter(s => s.setting === setting
    && (rate === BEST ? s.best : s.lr === rate));
  const tokens = series.some(s => s.tokens.some(value => value !== null));
  const x = tokens ? by("curve-x").value : "steps";
  by("curve-x").disabled = !tokens;
  const pulled = series.some(s => s.gain.some(value => value !== null));
  const traces = [], trainings = new Set(), late = [], differences = [];
  for (const s of series) {
    const [hue, symbol, dash] = s.look;
    const line = { color: hue === "#000000" ? colour("--ink") : hue, dash: DASHES[dash] };
    const marked = {
      mode: "lines+markers",
      marker: { symbol: SYMBOLS[symbol], size: 8, color: line.color, maxdisplayed: 12,
        line: { width: 1, color: colour("--page") } },
    };
    const name = plain(s.label + (rate === BEST ? `, ${number(s.lr)}` : "")
      + (s.finished ? "" : " (unfinished)"));
    const common = { type: "scatter", mode: "lines", legendgroup: name, showlegend: false };
    const hover = what => `<b>${name.replace(/%/g, "%\u200b")}</b><br>${what} %{y:.4f}<br>`
      + `${x} %{x:,}<extra></extra>`;
    const place = s[x];
    const seen = place.map((_, i) => i).filter(i => s.returned[i] !== null && place[i] !== null);
    if (s.seeds > 1) traces.push({
      ...common, x: [...seen, ...seen.toReversed()].map(i => place[i]),
      y: [...seen.map(i => s.high[i]), ...seen.toReversed().map(i => s.low[i])],
      fill: "toself", fillcolor: line.color, opacity: .16, line: { width: 0 }, hoverinfo: "skip",
    });
    traces.push({
      ...common, ...marked, x: place, y: s.returned, name, showlegend: true, line: { ...line, width: 2.6 },
      hovertemplate: hover("returned"),
    });
    const training = s.training.join();
    const differs = s.live.some((value, i) => value !== s.returned[i]);
    if (differs && !trainings.has(training)) {
      trainings.add(training);
      traces.push({
        ...common, x: place, y: s.live, name, line: { ...line, dash: "dot", width: 1.2 },
        hovertemplate: hover("live"),
      });
    }
    for (const [key, what, dash] of [["gain", "mean gain", "solid"], ["clipped", "clipped", "dot"]])
      if (s[key].some(value => value !== null)) traces.push({
        ...common, x: place, y: s[key], name, yaxis: "y2", line: { ...line, dash, width: 1.6 },
        hovertemplate: hover(what), connectgaps: true,
      });
    const gaps = s.returned.map((loss, i) => loss === null || s.live[i] === null ? null : loss - s.live[i]);
    differences.push([Math.max(...gaps.map(Math.abs)), {
      ...common, ...marked, x: place, y: gaps, name, yaxis: "y3", line: { ...line, width: 1.6 },
      hovertemplate: hover("returned − live"),
    }]);
    const half = Math.max(...s.steps) / 2;
    s.steps.forEach((step, i) => step >= half && late.push(s.live[i], s.returned[i]));
  }
  const losses = late.filter(value => value !== null);
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const margin = .06 * (high - low) || .1;
  const paper = root.classList.contains("paper"), below = narrow.matches || paper;
  const legend = below ? 21 * Math.ceil(series.length / (paper ? 3 : 1)) : 0;
  // Where live and returned look like one line, a panel has their difference.
  const near = differences.filter(([most]) => most > 0 && most < data.coincide * (high - low + 2 * margin));
  traces.push(...near.map(([, trace]) => trace));
  by("curve-differences").hidden = !near.length;
  const panels = [...(pulled ? ["y2"] : []), ...(near.length ? ["y3"] : [])];  // from the bottom
  const domain = axis => [.3 * panels.indexOf(axis), .3 * panels.indexOf(axis) + .22];
  const height = Math.min(440 + 140 * panels.length + legend, 980);  // a page's
  show("curves", traces, layout(height, axis => ({
    uirevision: JSON.stringify([setting, rate, x]), hovermode: "closest",
    legend: below ? { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom" }
      : { title: { text: "returned" } },
    xaxis: { ...axis, title: { text: x }, anchor: panels[0] ?? "y" },
    yaxis: {
      ...axis, title: { text: "validation loss, nats a token" },
      domain: [.3 * panels.length, 1], ...(losses.length ? { range: [low - margin, high + margin] } : {}),
    },
    ...(pulled ? {
      yaxis2: { ...axis, title: { text: "gain –, clipped ⋯" }, domain: domain("y2"), range: [-.02, 1.02] },
    } : {}),
    ...(near.length ? {
      yaxis3: { ...axis, title: { text: "returned − live" }, domain: domain("y3"), zeroline: true,
        zerolinecolor: colour("--ink") },
    } : {}),
  })), `Loss against ${x}; the end of it is in the tables`);
  by("curve-caption").textContent = `${setting}, `
    + (rate === BEST ? "each method at its best learning rate" : `learning rate ${number(rate)}`);
}

function drawMap() {
  const here = data.maps.find(m => m.setting === chosen("map-setting")
    && m.family === chosen("map-family"));
  const [i, j] = [chosen("map-x"), chosen("map-y")].map(axis => here.axes.indexOf(axis));
  const fixed = here.axes.map((_, k) => k === i || k === j ? undefined : chosen(`map-fixed-${k}`));
  const points = here.points.filter(p => fixed.every((value, k) =>
    value === undefined || p.at[k] === value));
  const values = k => unique(points.map(p => p.at[k])).sort((a, b) => a - b);
  const [across, up] = [values(i), values(j)];
  const at = (a, b) => points.find(p => p.at[i] === a && p.at[j] === b);
  const grid = show => up.map(b => across.map(a => at(a, b) ? show(at(a, b)) : null));
  const losses = points.map(p => p.loss).filter(loss => loss !== null).sort((a, b) => a - b);
  const best = losses[0], median = losses[Math.floor(losses.length / 2)];
  const common = {
    type: "heatmap", x: across.map(number), y: up.map(number), xgap: 2, ygap: 2,
    textfont: { size: narrow.matches ? 10 : 13 }, texttemplate: "%{text}",
  };
  const hover = `${here.axes[i]} %{x}, ${here.axes[j]} %{y}<br>%{text}`
    + "<br>seeds %{customdata}<extra></extra>";
  const traces = [{
    ...common, z: grid(p => p.loss), customdata: grid(p => p.seeds), hovertemplate: hover,
    text: grid(p => p.loss === null ? "" : (p.loss === best ? "★ " : "") + p.loss.toFixed(3)),
    colorscale: "Viridis", reversescale: true, zmin: best,
    zmax: Math.min(losses[losses.length - 1], 2 * median - best) || undefined,
    colorbar: narrow.matches ? { orientation: "h", y: 1, yanchor: "bottom", thickness: 12 }
      : { thickness: 14, title: { text: "loss" } },
  }, {
    ...common, z: grid(p => p.loss === null ? 1 : null), text: grid(p => p.loss === null ? "✕" : ""),
    customdata: grid(p => p.seeds), hovertemplate: hover.replace("%{text}", "diverged"),
    textfont: { size: 16, color: "#ffffff" },
    colorscale: [[0, "#6b737c"], [1, "#6b737c"]], showscale: false,
  }];
  const frames = points.filter(p => p.loss !== null && p.loss === best).map(p => {
    const [a, b] = [across.indexOf(p.at[i]), up.indexOf(p.at[j])];
    return {
      type: "rect", x0: a - .5, x1: a + .5, y0: b - .5, y1: b + .5,
      line: { color: colour("--ink"), width: 3 },
    };
  });
  show("map", traces, layout(150 + 46 * Math.max(3, up.length), axis => ({
    xaxis: { ...axis, type: "category", title: { text: here.axes[i] }, showgrid: false },
    yaxis: { ...axis, type: "category", title: { text: here.axes[j] }, showgrid: false },
    shapes: frames,
    annotations: points.length ? [] : [{ text: "not run", showarrow: false, xref: "paper", yref: "paper" }],
  })), `Loss over ${here.axes[i]} and ${here.axes[j]}`);
  const rest = here.axes.map((axis, k) => fixed[k] === undefined ? "" : `, ${axis} ${number(fixed[k])}`);
  by("map-caption").textContent = `${here.setting}: ${here.family}${rest.join("")}`;
}

// ---- controls ----------------------------------------------------------------------------------

function chooseRates() {
  const rates = unique(data.curves.filter(s => s.setting === chosen("curve-setting"))
    .map(s => s.lr)).sort((a, b) => a - b);
  choices(by("curve-rate"), rates.length > 1 ? [BEST, ...rates] : rates,
    rate => rate === BEST ? "each at its best" : number(rate));
  drawCurves();
}

function chooseFamily() {
  choices(by("map-family"), data.maps.filter(m => m.setting === chosen("map-setting"))
    .map(m => m.family));
  chooseAxes();
}

function chooseAxes(changed) {
  const here = data.maps.find(m => m.setting === chosen("map-setting")
    && m.family === chosen("map-family"));
  const [x, y] = ["map-x", "map-y"].map(by);
  choices(x, here.axes);
  choices(y, here.axes, String, y.value || JSON.stringify(here.axes[1]));
  if (x.value === y.value) {
    const other = changed === y ? x : y;
    other.value = JSON.stringify(here.axes.find(axis => JSON.stringify(axis) !== x.value));
  }
  const losses = here.points.map(p => p.loss ?? Infinity);
  const best = here.points[losses.indexOf(Math.min(...losses))];
  by("map-fixed").replaceChildren(...here.axes.flatMap((axis, k) => {
    if (JSON.stringify(axis) === x.value || JSON.stringify(axis) === y.value) return [];
    const label = document.createElement("label"), select = document.createElement("select");
    select.id = `map-fixed-${k}`;
    choices(select, unique(here.points.map(p => p.at[k])).sort((a, b) => a - b), number,
      JSON.stringify(best.at[k]));
    select.addEventListener("change", drawMap);
    label.append(`${axis} `, select);
    return [label];
  }));
  drawMap();
}

function draw() {
  drawCurves();
  if (!data.maps.length) return;
  Plotly.purge("map");  // it keeps the margins of a colour bar that has turned
  drawMap();
}

async function start() {
  const packed = Uint8Array.from(atob(by("plotly").textContent), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);

  choices(by("curve-setting"), unique(data.curves.map(s => s.setting)));
  by("curve-setting").addEventListener("change", chooseRates);
  for (const id of ["curve-rate", "curve-x"]) by(id).addEventListener("change", drawCurves);
  chooseRates();
  if (data.maps.length) {
    by("maps").hidden = false;
    choices(by("map-setting"), unique(data.maps.map(m => m.setting)));
    by("map-setting").addEventListener("change", chooseFamily);
    by("map-family").addEventListener("change", () => chooseAxes());
    for (const id of ["map-x", "map-y"]) by(id).addEventListener("change", e => chooseAxes(e.target));
    chooseFamily();
  }
  for (const media of [narrow, dark]) media.addEventListener("change", draw);
  const paper = on => () => { root.classList.toggle("paper", on); draw(); };
  addEventListener("beforeprint", paper(true));
  addEventListener("afterprint", paper(false));
}

start().catch(error => {
  console.error(error);
  by("curves").textContent = "The charts need a browser of 2023 or later.";
});
