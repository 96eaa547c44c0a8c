"use strict";
// Captions of photos, as they are found. Photos are sent one by one, a few at a time.
const AT_ONCE = 3, RETRIES = 20;
const $ = (id) => document.getElementById(id);
const waiting = [];
let running = 0, done = 0, total = 0, stream = null, megabytes = 20;

function element(name, content, kind) {
  const made = document.createElement(name);
  if (content) made.textContent = content;
  if (kind) made.className = kind;
  return made;
}

function show() {
  $("state").textContent = !total ? "" : done < total ? `${done} of ${total} photos` : `${total} photo${total > 1 ? "s" : ""} done`;
}

function add(files) {
  const photos = [...files].filter((file) => file.size && (file.type.startsWith("image/") || !file.type));
  if (!photos.length && [...files].length) $("state").textContent = "These are not photos.";
  for (const file of photos) {
    const card = element("figure", "", "card");
    const photo = element("div", "", "photo"), picture = element("img"), text = element("figcaption");
    picture.src = URL.createObjectURL(file);
    picture.alt = "";
    picture.onerror = () => { photo.hidden = true; };
    text.append(element("p", "waiting …", "note"));
    photo.append(picture);
    card.append(photo, text);
    $("cards").prepend(card);
    waiting.push({ file, card, photo, picture, text });
    total += 1;
  }
  show();
  next();
}

function next() {
  while (running < AT_ONCE && waiting.length) {
    running += 1;
    caption(waiting.shift()).finally(() => { running -= 1; done += 1; show(); next(); });
  }
}

async function caption(job, style) {
  const { file, text } = job;
  text.replaceChildren(element("p", "looking …", "note"));
  try {
    if (file.size > megabytes * 1e6) throw new Error(`The file has more than ${megabytes} MB.`);
    const url = `api/caption?style=${encodeURIComponent(style || $("style").value)}`;
    for (let attempt = 0; ; attempt += 1) {
      const response = await fetch(url, { method: "POST", body: file });
      if (response.status === 503 && attempt < RETRIES) {
        await new Promise((resolve) => setTimeout(resolve, 1000 * (Number(response.headers.get("Retry-After")) || 2)));
        continue;
      }
      const found = await response.json().catch(() => ({}));
      if (!response.ok) throw new Error(typeof found.detail === "string" ? found.detail : `Error ${response.status}`);
      return fill(job, found);
    }
  } catch (error) {
    const why = error instanceof TypeError ? "The server can't be reached." : error.message;
    const again = element("button", "Try again");
    again.onclick = () => caption(job, style);
    const row = element("div", "", "row");
    row.append(again);
    text.replaceChildren(element("p", `${file.name}: ${why}`, "error"), row);
  }
}

function fill(job, found) {
  const { file, picture, text, photo } = job;
  const line = element("p", "", "caption");
  const plain = found.words.join(" ") === found.caption;
  const maps = found.attention && Uint8Array.from(atob(found.attention.maps), (letter) => letter.charCodeAt(0));
  photo.querySelector("canvas")?.remove();
  if (plain) {
    found.words.forEach((word, place) => {
      const span = element("span", word);
      if (maps) listen(span, () => draw(job, found.attention, maps, place), () => photo.querySelector("canvas")?.remove(), place);
      line.append(span, " ");
    });
  } else line.textContent = found.caption;
  picture.alt = found.caption;
  const sure = found.confidence === null ? "" : `confidence ${Math.round(100 * found.confidence)} %, `;
  const parts = [line, element("p", `${sure}${found.seconds.toFixed(2)} s, ${file.name}`, "note")];
  if (found.alternatives.length) {
    const list = element("ol");
    list.start = 2;
    list.setAttribute("aria-label", "alternatives");
    for (const other of found.alternatives) list.append(element("li", other.caption));
    parts.push(list);
  }
  const copy = element("button", "Copy"), again = element("button", "Search again"), row = element("div", "", "row");
  copy.onclick = async () => {
    try { await navigator.clipboard.writeText(found.caption); copy.textContent = "Copied"; }
    catch { copy.textContent = "Not allowed"; }
  };
  again.onclick = () => caption(job);
  row.append(copy, again);
  text.replaceChildren(...parts, row);
}

function listen(span, on, off, place) {
  span.tabIndex = place ? -1 : 0;
  span.setAttribute("role", "button");
  for (const kind of ["pointerenter", "focus"]) span.addEventListener(kind, on);
  for (const kind of ["pointerleave", "blur"]) span.addEventListener(kind, off);
  span.addEventListener("click", on);
  span.addEventListener("keydown", (event) => {
    const all = [...span.parentElement.querySelectorAll("span")];
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { all[(all.indexOf(span) + step + all.length) % all.length].focus(); event.preventDefault(); }
  });
}

function draw({ photo, picture }, { side, part }, maps, place) {
  photo.querySelector("canvas")?.remove();
  const canvas = element("canvas"), grid = element("canvas");
  canvas.width = picture.clientWidth;
  canvas.height = picture.clientHeight;
  grid.width = grid.height = side;
  const cells = grid.getContext("2d"), image = cells.createImageData(side, side);
  for (let cell = 0; cell < side * side; cell += 1) {
    image.data[4 * cell + 3] = Math.round(0.75 * (255 - maps[place * side * side + cell]));
  }
  cells.putImageData(image, 0, 0);
  const square = part === "centre" ? Math.min(canvas.width, canvas.height) : 0;
  const width = square || canvas.width, height = square || canvas.height;
  const left = (canvas.width - width) / 2, top = (canvas.height - height) / 2;
  const context = canvas.getContext("2d");
  context.fillStyle = "rgba(0, 0, 0, 0.75)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.clearRect(left, top, width, height);
  context.drawImage(grid, left, top, width, height);
  photo.append(canvas);
}

async function open() {
  try { stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } }); }
  catch { $("state").textContent = "There is no camera, or the browser does not allow its use."; return; }
  $("video").srcObject = stream;
  $("capture").showModal();
  await $("video").play();
}

function close() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  $("capture").close();
}

function shoot() {
  const video = $("video"), canvas = element("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => { if (blob) add([new File([blob], "camera.jpg", { type: "image/jpeg" })]); }, "image/jpeg", 0.92);
  close();
}

fetch("api/info").then((response) => response.json()).then((info) => {
  megabytes = info.megabytes;
  for (const [name, meaning] of Object.entries(info.styles)) $("style").append(new Option(`${name}: ${meaning}`, name));
  $("about").textContent = `Model: ${info.model.join(", ")}. Photos stay on the machine of the server and are not kept.`;
}).catch(() => { $("state").textContent = "The server can't be reached."; });
$("files").onchange = (event) => { add(event.target.files); event.target.value = ""; };
$("camera").onclick = open;
$("shoot").onclick = shoot;
$("stop").onclick = close;
$("capture").addEventListener("cancel", close);
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    if (kind === "drop" || !event.relatedTarget) $("drop").classList.remove("over");
    if (kind === "drop") add(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => add(event.clipboardData.files));
