// The charts and tables of report.html: sorting, filtering, curves with uPlot. Text from runs is only ever set as text.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const GREY = "#7d7d7d", GRID = "#8883", HEIGHT = 230;
  const filtered = new Set(), hidden = new Set(); // numbers of runs
  const drawn = []; // {spec, plot, legend}
  const byId = (id) => document.getElementById(id);
  const look = (run) => data.runs[run] || { name: "reference", colour: GREY, mark: "★" };
  const visible = (line) => !filtered.has(line.run) && !hidden.has(line.run) && (line.kind !== "train" || byId("trains").checked);
  document.querySelectorAll(".controls").forEach((element) => (element.hidden = false));

  // --- Tables ---

  const key = (cell) => {
    const text = cell.dataset.v ?? cell.textContent.trim();
    return text !== "" && isFinite(text) ? Number(text) : text;
  };
  const before = (a, b) => { // numbers before texts
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return typeof a === "number" ? a - b : a.localeCompare(b);
  };
  document.querySelectorAll("thead th > button").forEach((button) => {
    button.addEventListener("click", () => {
      const head = button.parentElement, body = head.closest("table").tBodies[0];
      const column = head.cellIndex, sorted = head.getAttribute("aria-sort");
      const numbers = [...body.rows].some((row) => typeof key(row.cells[column]) === "number"); // largest first
      const up = sorted ? sorted === "descending" : !numbers;
      head.parentElement.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => before(key(a.cells[column]), key(b.cells[column])) * (up ? 1 : -1));
      body.append(...rows);
    });
  });

  byId("filter").addEventListener("input", () => {
    const words = byId("filter").value.toLowerCase().split(/\s+/);
    filtered.clear();
    document.querySelectorAll(".results tbody tr").forEach((row) => {
      const text = row.textContent.toLowerCase();
      if (!words.every((word) => text.includes(word))) filtered.add(Number(row.dataset.run));
    });
    document.querySelectorAll("[data-run]").forEach((element) => (element.hidden = filtered.has(Number(element.dataset.run))));
    byId("n-shown").textContent = filtered.size ? `${data.runs.length - filtered.size} of ${data.runs.length} runs` : "";
    redraw();
  });

  // --- Charts ---

  const short = (value) => (value == null ? "–" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4)));

  const smoothed = (values) => { // exponential moving average, corrected for its start at 0
    const keep = Number(byId("smoothing").value);
    let mean = 0, weight = 0;
    return values.map((value) => {
      if (value == null) return value;
      mean = keep * mean + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return mean / weight;
    });
  };

  const aligned = (spec) => { // uPlot's columns: all x, then a column for each line
    const xs = [...new Set(spec.lines.flatMap((line) => [...line.x, ...(line.left || []), ...(line.right || [])]))].sort((a, b) => a - b);
    const place = new Map(xs.map((x, i) => [x, i]));
    return [xs, ...spec.lines.map((line) => {
      const column = new Array(xs.length).fill(null), shown = line.kind === "train" ? smoothed(line.y) : line.y;
      line.x.forEach((x, i) => (column[place.get(x)] = shown[i]));
      return column;
    })];
  };

  const range = (spec) => {
    if (!byId("whole").checked && spec.range) return spec.range;
    const all = spec.lines.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])]).filter((y) => y != null);
    const low = Math.min(...all), high = Math.max(...all), room = 0.05 * (high - low) || 1;
    return [low - room, high + room];
  };

  const marks = (spec) => (plot) => { // evaluations: lines in their own order, intervals, marks
    const { ctx, bbox } = plot, ratio = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.textAlign = "center";
    ctx.textBaseline = "middle";
    const [low, high] = [plot.scales.y.min, plot.scales.y.max];
    if (low < 0 && high > 0) {
      const zero = plot.valToPos(0, "y", true);
      ctx.fillStyle = GREY;
      ctx.fillRect(bbox.left, zero, bbox.width, ratio);
    }
    for (const line of spec.lines) {
      if (line.kind === "train" || !visible(line)) continue;
      const { colour, mark } = look(line.run);
      const at = (x, y) => [plot.valToPos(x, "x", true), plot.valToPos(y, "y", true)];
      const stroke = (width, points) => {
        ctx.lineWidth = width * ratio;
        ctx.beginPath();
        points.forEach(([x, y], i) => (i ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
        ctx.stroke();
      };
      ctx.strokeStyle = ctx.fillStyle = colour;
      const there = line.x.map((_, i) => i).filter((i) => line.y[i] != null);
      stroke(2, there.map((i) => at(line.x[i], line.y[i])));
      there.forEach((i) => {
        const [x, y] = [line.x[i], line.y[i]];
        if (line.low[i] != null) stroke(1, [at(x, line.low[i]), at(x, line.high[i])]);
        if (line.left) stroke(1, [at(line.left[i], y), at(line.right[i], y)]);
        ctx.font = `${(line.kind === "path" && i === there.at(-1) ? 17 : 11) * ratio}px sans-serif`;
        if (there.length < 60) ctx.fillText(mark, ...at(x, y));
      });
    }
    ctx.restore();
  };

  const nearest = (line, x) => {
    let best = null;
    line.x.forEach((other, i) => {
      if (line.y[i] != null && (best == null || Math.abs(other - x) <= Math.abs(line.x[best] - x))) best = i;
    });
    return best;
  };

  const say = (chart) => { // values beside the names: where the cursor is, or the last ones
    const { spec, plot, legend } = chart, left = plot.cursor.left;
    const x = left >= 0 ? plot.posToVal(left, "x") : Infinity;
    for (const [run, element] of legend) {
      const parts = [];
      for (const line of spec.lines.filter((each) => each.run === run && (each.kind !== "train" || left >= 0))) {
        const i = x === Infinity ? line.y.length - 1 : nearest(line, x);
        if (i == null || !visible(line)) continue;
        const ends = line.low && line.low[i] != null ? ` [${short(line.low[i])}, ${short(line.high[i])}]` : "";
        const where = left >= 0 ? ` at ${short(line.x[i])}` : "";
        parts.push(`${line.kind === "train" ? "batch " : ""}${short(line.y[i])}${ends}${where}`);
      }
      element.textContent = parts.join("; ");
    }
  };

  const redraw = () => drawn.forEach((chart) => {
    chart.spec.lines.forEach((line, i) => chart.plot.setSeries(i + 1, { show: visible(line) }));
    chart.plot.setData(aligned(chart.spec));
    chart.buttons.forEach((button, run) => button.classList.toggle("off", hidden.has(run) || filtered.has(run)));
    say(chart);
  });

  const legendOf = (spec, list) => {
    const legend = new Map(), buttons = new Map();
    for (const run of new Set(spec.lines.map((line) => line.run))) {
      const item = document.createElement("li"), button = document.createElement("button");
      const glyph = document.createElement("span"), value = document.createElement("span");
      glyph.textContent = `${look(run).mark} `;
      glyph.style.color = look(run).colour;
      value.className = "value";
      button.type = "button";
      button.append(glyph, look(run).name, value);
      button.addEventListener("click", () => {
        if (!hidden.delete(run)) hidden.add(run);
        redraw();
      });
      item.append(button);
      list.append(item);
      legend.set(run, value);
      buttons.set(run, button);
    }
    return [legend, buttons];
  };

  document.querySelectorAll("figure.chart").forEach((figure) => {
    const spec = data.charts[Number(figure.dataset.chart)], place = figure.querySelector(".plot");
    const [legend, buttons] = legendOf(spec, figure.querySelector(".legend"));
    const axis = { stroke: GREY, grid: { stroke: GRID, width: 1 }, ticks: { stroke: GRID }, font: "11px system-ui, sans-serif", labelFont: "11px system-ui, sans-serif", labelSize: 16, labelGap: 2 };
    const chart = { spec, legend, buttons };
    const options = {
      width: place.clientWidth || 300,
      height: HEIGHT,
      legend: { show: false },
      cursor: { sync: spec.x === "examples" ? { key: "examples", scales: ["x", null] } : undefined, drag: { x: true, y: false }, points: { show: false } },
      scales: {
        x: { time: false, range: (_, low, high) => (low === high ? [low - 1, high + 1] : [low - 0.03 * (high - low), high + 0.03 * (high - low)]) },
        y: { range: () => range(spec) },
      },
      axes: [
        { ...axis, size: 28, label: spec.x, space: 60, values: (_, ticks) => ticks.map((tick) => (Math.abs(tick) >= 1e4 ? `${+(tick / 1000).toPrecision(4)}k` : short(tick))) },
        { ...axis, size: 52, label: spec.y || undefined },
      ],
      series: [{}, ...spec.lines.map((line) => ({
        stroke: `${look(line.run).colour}99`, width: 1, spanGaps: true, points: { show: false },
        ...(line.kind === "train" ? {} : { paths: () => null }),
      }))],
      hooks: { draw: [marks(spec)], setCursor: [() => chart.plot && say(chart)] },
    };
    chart.plot = new uPlot(options, aligned(spec), place);
    drawn.push(chart);
    say(chart);
    new ResizeObserver(() => {
      if (place.clientWidth && place.clientWidth !== chart.plot.width) chart.plot.setSize({ width: place.clientWidth, height: HEIGHT });
    }).observe(place);
  });

  byId("smoothing")?.addEventListener("input", () => {
    byId("smoothed").textContent = byId("smoothing").value;
    redraw();
  });
  ["trains", "whole"].forEach((id) => byId(id)?.addEventListener("change", redraw));
})();
