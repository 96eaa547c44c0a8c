"use strict";
// Values of charts, sorted tables, attention of words, search. Without it the page shows everything else.

const NAMESPACE = "http://www.w3.org/2000/svg";
const DARKEST = 0.15; // brightness of pixels without attention, as in report/attention.py

// One tooltip for the whole page; screen readers get its text.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
const spoken = document.createElement("div");
spoken.className = "hidden-text";
spoken.setAttribute("aria-live", "polite");
document.body.append(tip, spoken);

function showTip(rows, x, y) {
  tip.replaceChildren(...rows.flatMap(([text, look], place) => {
    const line = document.createElement("div");
    if (look) {
      const key = document.createElement("i");
      key.className = look;
      line.append(key);
    }
    line.append(text);
    return [line];
  }));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const right = document.documentElement.clientWidth;
  const left = x + 14 + box.width > right ? Math.max(4, x - 14 - box.width) : x + 14;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${Math.max(4, y - box.height - 10) + scrollY}px`;
}

function hideTip() {
  tip.hidden = true;
}

// Line charts.
for (const svg of document.querySelectorAll("svg.plot")) {
  const plot = JSON.parse(svg.dataset.plot);
  const [x0, xf] = plot.sx;
  const [y0, yf] = plot.sy;
  const all = [...new Set(plot.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const reach = all.length > 1 ? (all[all.length - 1] - all[0]) * 0.03 : 1;
  let at = null;
  const layer = document.createElementNS(NAMESPACE, "g");
  layer.setAttribute("class", "cursor");
  svg.append(layer);

  const groups = [...svg.querySelectorAll("g[data-line]")]; // in the order of the lines
  const visible = (place) => !groups[place].classList.contains("off");
  const nearest = (values, x) => {
    let low = 0;
    let high = values.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (values[middle] < x) low = middle;
      else high = middle;
    }
    return Math.abs(values[low] - x) <= Math.abs(values[high] - x) ? low : high;
  };

  function show(x, say) {
    at = x;
    layer.replaceChildren();
    const cross = document.createElementNS(NAMESPACE, "path");
    cross.setAttribute("class", "cross");
    cross.setAttribute("d", `M${x0 + xf * x} 12V${svg.viewBox.baseVal.height - 34}`);
    layer.append(cross);
    const rows = [];
    plot.lines.forEach((line, place) => {
      const near = nearest(line.x, x);
      if (!visible(place) || Math.abs(line.x[near] - x) > reach) return;
      const dot = document.createElementNS(NAMESPACE, "circle");
      dot.setAttribute("class", `mark ${line.look}`);
      dot.setAttribute("cx", x0 + xf * line.x[near]);
      dot.setAttribute("cy", y0 + yf * line.y[near]);
      dot.setAttribute("r", 4);
      layer.append(dot);
      const spread = line.e.length ? ` ± ${format(line.e[near])}` : "";
      const name = plot.lines.length > 1 ? `${line.name}: ` : "";
      rows.push([`${name}${format(line.y[near])}${spread}`, line.look, line.y[near]]);
    });
    rows.sort((a, b) => b[2] - a[2]);
    const more = rows.length > 12 ? [[`and ${rows.length - 12} more`, ""]] : [];
    const shown = [[`${plot.x} ${Number(x.toPrecision(4))}`, ""], ...rows.slice(0, 12), ...more];
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const top = rows.length ? Math.min(...rows.map((row) => y0 + yf * row[2])) : 20;
    showTip(shown, box.left + scale * (x0 + xf * x), box.top + scale * top);
    if (say) spoken.textContent = shown.map((row) => row[0]).join("; ");
  }

  function format(value) {
    const size = Math.abs(value);
    if (size && size < 10 ** -plot.digits) return value.toPrecision(2);
    return value.toLocaleString("en", { minimumFractionDigits: plot.digits, maximumFractionDigits: plot.digits });
  }

  function leave() {
    at = null;
    layer.replaceChildren();
    hideTip();
  }

  const follow = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) * svg.viewBox.baseVal.width / box.width - x0) / xf;
    show(all[nearest(all, x)], false);
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const last = all.length - 1;
    const place = at === null ? -1 : nearest(all, at);
    const next = { ArrowRight: Math.min(place + 1, last), ArrowLeft: at === null ? last : Math.max(place - 1, 0),
      Home: 0, End: last }[event.key];
    if (event.key === "Escape") leave();
    if (next === undefined) return;
    event.preventDefault();
    show(all[next], true);
  });
}

// A button of a legend hides a line, or shows it again, in all charts of training.
for (const button of document.querySelectorAll("button[data-line]")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") === "true";
    const charts = button.closest("#curves, #rewards") ? document.querySelectorAll("#curves, #rewards") : [button.closest(".chart")];
    for (const chart of charts) {
      for (const element of chart.querySelectorAll("[data-line]")) {
        if (element.dataset.line !== button.dataset.line) continue;
        if (element.matches("button")) element.setAttribute("aria-pressed", String(!on));
        else element.classList.toggle("off", on);
      }
    }
  });
}

// Bars.
for (const bar of document.querySelectorAll("g[data-tip]")) {
  const show = () => {
    const box = bar.getBoundingClientRect();
    showTip(bar.dataset.tip.split("\n").map((line) => [line, ""]), box.left + box.width / 2, box.top + box.height / 2);
  };
  bar.addEventListener("pointerenter", show);
  bar.addEventListener("pointerdown", show);
  bar.addEventListener("pointerleave", hideTip);
}

// Tables: a click or a key on a heading sorts.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const numeric = head.classList.contains("n");
      const before = head.getAttribute("aria-sort");
      const order = before === "none" ? (numeric ? "descending" : "ascending")
        : before === "ascending" ? "descending" : "ascending";
      for (const other of heads) other.setAttribute("aria-sort", other === head ? order : "none");
      const sign = order === "ascending" ? 1 : -1;
      // [kind, value]: numbers, then texts; cells without a value are last in both directions.
      const key = (row) => {
        const { dataset, textContent } = row.cells[column];
        return dataset.v === undefined ? [1, textContent] : dataset.v === "" ? [2, 0] : [0, Number(dataset.v)];
      };
      const compare = ([kindA, a], [kindB, b]) => {
        if (kindA === 2 || kindB === 2) return kindA - kindB;
        if (kindA !== kindB) return sign * (kindA - kindB);
        return sign * (kindA === 0 ? a - b : a.localeCompare(b, undefined, { numeric: true }));
      };
      const keyed = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      keyed.sort(([a], [b]) => compare(a, b));
      table.tBodies[0].append(...keyed.map(([, row]) => row));
    });
  });
}

// Attention: the photo stays bright where the weights of the word are high.
function bytes(figure) {
  figure.weights ??= Uint8Array.from(atob(figure.dataset.attention), (letter) => letter.charCodeAt(0));
  return figure.weights;
}

function drawAttention(figure, word) {
  const photo = figure.querySelector(".photo");
  const image = photo && photo.querySelector("img");
  if (!image) return;
  const side = Number(figure.dataset.grid);
  const words = [...figure.querySelectorAll(".word")];
  const first = words.indexOf(word) * side * side;
  const grid = document.createElement("canvas");
  grid.width = grid.height = side;
  const pixels = new ImageData(side, side);
  const weights = bytes(figure);
  for (let place = 0; place < side * side; place++) {
    pixels.data[4 * place + 3] = Math.round(255 * (1 - DARKEST) * (1 - weights[first + place] / 255));
  }
  grid.getContext("2d").putImageData(pixels, 0, 0);
  let canvas = photo.querySelector("canvas");
  if (!canvas) {
    canvas = document.createElement("canvas");
    const ratio = Number(image.getAttribute("width")) / Number(image.getAttribute("height"));
    canvas.width = Math.round(ratio >= 1 ? 256 : 256 * ratio);
    canvas.height = Math.round(ratio >= 1 ? 256 / ratio : 256);
    photo.append(canvas);
  }
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(grid, 0, 0, canvas.width, canvas.height);
}

// The attention of a word in words: the ninth of the image with the largest share.
function describeAttention(word) {
  const figure = word.closest("figure");
  const side = Number(figure.dataset.grid);
  const first = [...figure.querySelectorAll(".word")].indexOf(word) * side * side;
  const parts = new Array(9).fill(0);
  const third = (place) => Math.floor(3 * (place + 0.5) / side);
  for (let place = 0; place < side * side; place++) {
    parts[3 * third(Math.floor(place / side)) + third(place % side)] += bytes(figure)[first + place];
  }
  const largest = Math.max(...parts);
  const share = Math.round(100 * largest / parts.reduce((a, b) => a + b, 0));
  const names = ["top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"];
  const of = word.dataset.share ? ` ${onTheImage(word)}.` : "";
  return `${word.textContent}: ${share} % of the attention on the image is at the ${names[parts.indexOf(largest)]}.${of}`;
}

const onTheImage = (word) => `${word.dataset.share} % of the attention is on the image`;

function showAttention(figure, pointed) {
  const word = pointed ?? (figure.contains(document.activeElement) ? document.activeElement.closest(".word") : null);
  hideTip();
  if (!word) {
    figure.querySelector("canvas")?.remove();
    return;
  }
  drawAttention(figure, word);
  if (word.dataset.share) {
    const box = word.getBoundingClientRect();
    showTip([[onTheImage(word), ""]], box.left, box.bottom + 42);
  }
}

const wordOf = (event) => event.target.closest?.(".word");
document.addEventListener("pointerover", (event) => {
  const word = wordOf(event);
  if (word) showAttention(word.closest("figure"), word);
});
document.addEventListener("pointerout", (event) => {
  const word = wordOf(event);
  if (word) showAttention(word.closest("figure"), null);
});
document.addEventListener("focusin", (event) => {
  const word = wordOf(event);
  if (!word) return;
  showAttention(word.closest("figure"), word);
  spoken.textContent = describeAttention(word);
});
document.addEventListener("focusout", (event) => {
  const word = wordOf(event);
  if (!word) return;
  hideTip();
  word.closest("figure").querySelector("canvas")?.remove();
});
document.addEventListener("click", (event) => wordOf(event)?.focus()); // Safari gives it no focus
document.addEventListener("keydown", (event) => {
  const word = wordOf(event);
  if (!word) return;
  const words = [...word.closest("figure").querySelectorAll(".word")];
  const place = words.indexOf(word);
  const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: words.length - 1 }[event.key];
  if (event.key === "Escape") word.blur();
  if (event.key === "Enter" || event.key === " ") { // said again
    event.preventDefault();
    spoken.textContent = "";
    setTimeout(() => { spoken.textContent = describeAttention(word); }, 50);
  }
  if (next === undefined || !words[next]) return;
  event.preventDefault();
  word.tabIndex = -1;
  words[next].tabIndex = 0;
  words[next].focus();
});

// Search in the captions.
for (const search of document.querySelectorAll(".search")) {
  const input = search.querySelector("input");
  const output = search.querySelector("output");
  const figures = [...search.parentElement.querySelectorAll("figure.shot")];
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const figure of figures) {
      const text = figure.querySelector("figcaption").textContent.toLowerCase();
      figure.hidden = !wanted.every((word) => text.includes(word));
      found += !figure.hidden;
    }
    for (const group of search.parentElement.querySelectorAll(".group")) {
      group.hidden = !group.querySelector("figure.shot:not([hidden])");
    }
    output.textContent = wanted.length ? `${found} of ${figures.length} images` : "";
  });
}

// On paper, everything is open, except the values of charts.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = !details.closest(".chart");
  for (const image of document.images) image.loading = "eager";
});
