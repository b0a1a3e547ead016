// The page: a camera or clip goes to /v1/stream, the moving portrait comes back. The protocol is docs/protocol.md.

const MAX_BUFFERED_BYTES = 1_000_000;
const MAX_PORTRAIT_BYTES = 4_000_000;
const MAX_PORTRAIT_PIXELS = 40_000_000;
const PORTRAIT_PX = 1024;
const JPEG_QUALITY = 0.9;
const PING_MS = 2000;
const MAX_UNANSWERED = 6; // pings, before a connection counts as dead: wireless ones may go without a word
const OPEN_TIMEOUT_MS = 20_000;
const RECONNECT_MS = 30_000; // so long after the last sign of life a new connection is tried
const SIGNS_OF_LIFE = ["frame", "pong", "queued"];
const FIRST_PAUSE_MS = 100; // before a try; it doubles up to the next
const MAX_PAUSE_MS = 2000;
const FIGURES_MS = 3000; // what the shown rates and delays look back over

const byId = (id) => document.getElementById(id);
const video = byId("driving");
const output = byId("output");
const picture = output.getContext("2d");

let portrait = null; // {name} of a bundled one, or {file}
let session = null; // the newest one
let wanted = 0; // number of the start that the person waits for or watches; 0: none
let numStarts = 0;

// Messages: a JSON header, with a payload in one binary envelope.

function pack(header, payload) {
  const head = new TextEncoder().encode(JSON.stringify(header));
  const message = new Uint8Array(4 + head.length + payload.byteLength);
  new DataView(message.buffer).setUint32(0, head.length);
  message.set(head, 4);
  message.set(new Uint8Array(payload), 4 + head.length);
  return message;
}

function unpack(data) {
  if (typeof data === "string") return [JSON.parse(data), null];
  const length = new DataView(data).getUint32(0);
  return [JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length))), data.slice(4 + length)];
}

// One connection, from hello to its close. It tells its session what comes, and once that it has ended.

class Line {
  constructor(session) {
    this.session = session;
    this.ready = null;
    this.closed = false;
    this.isAlive = false; // whether there was a sign of life
    this.shown = 0;
    this.dropped = {};
    this.unanswered = 0;
    this.rttMs = null;
    this.socket = new WebSocket(new URL("v1/stream", document.baseURI.replace(/^http/, "ws")));
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.hello();
    this.socket.onmessage = (event) => this.closed || this.receive(...unpack(event.data));
    this.socket.onclose = () => this.end("The server closed the connection.");
    this.opening = setTimeout(() => this.isOpen || this.end("The server does not answer."), OPEN_TIMEOUT_MS);
    this.pinging = setInterval(() => this.ping(), PING_MS);
  }

  get isOpen() {
    return this.socket.readyState === WebSocket.OPEN;
  }

  async hello() {
    const { portrait, token } = this.session;
    const header = { type: "hello", protocol: 1, mode: "live", codec: "jpeg", resume: token };
    if (portrait.name) this.say({ ...header, portrait: portrait.name });
    else this.send(header, await portrait.file.arrayBuffer());
  }

  say(header) {
    if (this.isOpen) this.socket.send(JSON.stringify(header));
  }

  send(header, payload) {
    if (this.isOpen) this.socket.send(pack(header, payload));
    return this.isOpen;
  }

  ping() {
    if (!this.isOpen) return;
    if (this.unanswered === MAX_UNANSWERED) return this.end("The server does not answer.");
    this.unanswered += 1;
    this.say({ type: "ping", client_ms: performance.now(), rtt_ms: this.rttMs });
  }

  receive(header, payload) {
    if (header.type === "error" && header.fatal) return this.end(header.message, header);
    if (header.type === "ready") this.ready = header;
    if (SIGNS_OF_LIFE.includes(header.type)) {
      this.isAlive = true;
      this.session.aliveMs = performance.now();
    }
    if (header.type === "pong") {
      this.unanswered = 0;
      this.rttMs = Math.max(0, performance.now() - header.client_ms);
    }
    this.session.receive(this, header, payload);
  }

  end(reason, error = null) {
    if (this.closed) return;
    this.close();
    this.session.goOn(this, reason, error);
  }

  close() {
    this.closed = true;
    clearTimeout(this.opening);
    clearInterval(this.pinging);
    this.socket.close();
  }
}

// One session: a portrait that moves, over one line after another.

class Session {
  constructor() {
    this.portrait = portrait;
    this.token = null;
    this.fps = null; // known with the first ready
    this.line = null; // the one that frames go to
    this.next = null; // the one that waits for its ready
    this.retrying = null; // the timer of the next try
    this.pauseMs = FIRST_PAUSE_MS;
    this.aliveMs = -Infinity; // the last sign of life
    this.waitingMs = Infinity; // since when the person is told to wait
    this.closed = false;
    this.seq = 0;
    this.encoding = false;
    this.lastSentMs = -Infinity;
    this.drawing = Promise.resolve(); // decodes and draws in the order of arrival
    this.sentAt = [];
    this.shownAt = []; // [time, delay or null]
    this.skipped = 0;
    this.canvas = document.createElement("canvas");
    this.open();
  }

  open() {
    this.retrying = null;
    this.next = new Line(this);
  }

  receive(line, header, payload) {
    if (header.type === "ready") this.moveTo(line);
    else if (header.type === "frame") this.show(line, header, payload);
    else if (header.type === "queued") this.wait(`You are number ${header.position} in line, ${about(header.estimate_s)}.`);
    else if (header.type === "recovered") this.isLive();
    else if (header.type === "error") tell("live", header.message);
    else if (header.type === "notice") this.takeNotice(header);
  }

  takeNotice({ code, message }) {
    if (code === "draining") this.seek();
    else if (code === "recovering") this.wait("A part of the server restarts, your picture goes on in a moment.");
    else this.wait(message);
  }

  // Until here the picture went on over the line before, which is left now.
  moveTo(line) {
    const { size_px, fps, token, resumed } = line.ready;
    if (!resumed) this.line?.say({ type: "bye" }); // or its place would be kept
    this.leave();
    [this.line, this.next, this.token, this.fps] = [line, null, token, fps];
    this.pauseMs = FIRST_PAUSE_MS;
    this.canvas.width = this.canvas.height = size_px;
    // A canvas that gets a size is cleared, but the last picture is to stand until the next one comes.
    if (output.width !== size_px) output.width = output.height = size_px;
    this.isLive();
  }

  leave() {
    if (!this.line) return;
    this.skipped += sum(this.line.dropped);
    this.line.close();
    this.line = null;
  }

  // A line has ended. The session goes on, over the other one or a new one; what the server refuses for good it ends.
  goOn(line, reason, error) {
    if (line === this.next) this.next = null;
    if (line === this.line) this.leave();
    // A connection may have been dead for long before that was noticed.
    if (line.isAlive) this.aliveMs = performance.now();
    if (error && error.retry_s == null) {
      if (!this.line && !this.isSeeking) this.fail(reason);
      return;
    }
    this.seek(withRetry(reason, error), error?.retry_s);
    if (!this.line && !this.closed) this.wait(error ? withRetry(reason, error) : "Reconnecting …");
  }

  get isSeeking() {
    return this.next !== null || this.retrying !== null;
  }

  seek(reason, retryS = 0) {
    if (this.isSeeking) return;
    const pauseMs = Math.max(this.pauseMs, 1000 * retryS);
    if (performance.now() + pauseMs < this.aliveMs + RECONNECT_MS) {
      this.retrying = setTimeout(() => this.open(), pauseMs);
      this.pauseMs = Math.min(2 * this.pauseMs, MAX_PAUSE_MS);
    } else if (!this.line) {
      this.fail(reason);
    }
  }

  wait(message) {
    this.waitingMs = performance.now();
    tell("waiting", message);
  }

  isLive() {
    this.waitingMs = Infinity;
    tell("live", "Live.");
  }

  // One encode at a time, and nothing that would only wait in a buffer: a camera picture is worth most when it is new.
  async capture(captureMs) {
    if (!this.fps || this.closed) return;
    const tooSoon = captureMs - this.lastSentMs < 900 / this.fps;
    if (tooSoon) return;
    if (this.encoding || !this.line || this.line.socket.bufferedAmount > MAX_BUFFERED_BYTES) {
      this.skipped += 1;
      return;
    }
    this.encoding = true;
    this.lastSentMs = captureMs;
    try {
      drawSquare(this.canvas, video, video.videoWidth, video.videoHeight, video.classList.contains("mirrored"));
      const blob = await new Promise((done) => this.canvas.toBlob(done, "image/jpeg", JPEG_QUALITY));
      const payload = await blob.arrayBuffer();
      if (this.line?.send({ type: "frame", seq: this.seq++, capture_ms: captureMs }, payload)) this.sentAt.push(performance.now());
      else this.skipped += 1;
    } finally {
      this.encoding = false;
    }
  }

  show(line, header, payload) {
    const decoding = createImageBitmap(new Blob([payload], { type: "image/jpeg" }));
    this.drawing = this.drawing.then(async () => {
      const bitmap = await decoding;
      if (!this.closed) this.draw(line, header, bitmap);
      bitmap.close();
    }).catch(() => this.fail("A picture from the server could not be decoded."));
  }

  draw(line, header, bitmap) {
    picture.drawImage(bitmap, 0, 0);
    document.body.classList.add("live");
    line.dropped = header.dropped;
    this.stageMs = header.stage_ms;
    this.noFace = header.no_face;
    const now = performance.now();
    this.shownAt.push([now, header.capture_ms === null ? null : now - header.capture_ms]);
    line.shown += 1;
    line.say({ type: "shown", count: line.shown, shown_ms: now });
    // What was captured before the trouble may still come out while it lasts.
    if (header.capture_ms > this.waitingMs) this.isLive();
  }

  stop() {
    for (const line of [this.line, this.next]) line?.say({ type: "bye" });
    this.close();
  }

  fail(message) {
    if (this.closed) return;
    this.close();
    giveUp(message);
    byId("reconnect").hidden = false;
  }

  close() {
    this.closed = true;
    clearTimeout(this.retrying);
    this.leave();
    this.next?.close();
    document.body.classList.remove("live");
  }

  figures() {
    const since = performance.now() - FIGURES_MS;
    this.sentAt = this.sentAt.filter((time) => time >= since);
    this.shownAt = this.shownAt.filter(([time]) => time >= since);
    const delays = this.shownAt.map(([, delay]) => delay).filter((delay) => delay !== null).sort((a, b) => a - b);
    return {
      delay: delays.length ? Math.round(delays[delays.length >> 1]) : "–",
      "fps-in": rate(this.sentAt),
      "fps-out": rate(this.shownAt.map(([time]) => time)),
      dropped: this.skipped + sum(this.line?.dropped ?? {}),
    };
  }
}

function sum(counts) {
  return Object.values(counts).reduce((total, count) => total + count, 0);
}

function about(seconds) {
  return seconds < 90 ? `about ${Math.max(1, Math.round(seconds))} s` : `about ${Math.round(seconds / 60)} min`;
}

function withRetry(reason, error) {
  return error ? `${reason}. Worth another try in ${about(error.retry_s)}.` : reason;
}

function rate(times) {
  if (times.length < 2) return "–";
  return ((times.length - 1) * 1000 / (times.at(-1) - times[0])).toFixed(1);
}

function drawSquare(canvas, image, width, height, mirrored) {
  const side = Math.min(width, height);
  const context = canvas.getContext("2d");
  context.setTransform(mirrored ? -1 : 1, 0, 0, 1, mirrored ? canvas.width : 0, 0);
  context.drawImage(image, (width - side) / 2, (height - side) / 2, side, side, 0, 0, canvas.width, canvas.height);
}

// The source: a camera or the bundled clip.

async function startSource(number) {
  stopSource();
  const source = byId("source").value;
  video.classList.toggle("mirrored", source !== "clip");
  if (source === "clip") {
    video.src = "v1/clip.mp4";
  } else {
    if (!navigator.mediaDevices) throw new Error("Cameras work only on https or localhost: open the page there.");
    const which = source === "camera" ? {} : { deviceId: { exact: source } };
    const wishes = { ...which, width: { ideal: 640 }, height: { ideal: 480 }, frameRate: { ideal: 30 } };
    const camera = await navigator.mediaDevices.getUserMedia({ video: wishes, audio: false });
    if (number !== wanted) return stopTracks(camera); // stopped before the permission came
    camera.getVideoTracks()[0].onended = () => video.srcObject === camera && loseCamera();
    video.srcObject = camera;
    listSources(); // now with names, for the list alone
  }
  await video.play();
}

function stopSource() {
  stopTracks(video.srcObject);
  video.srcObject = null;
  video.removeAttribute("src");
  video.load();
}

function stopTracks(camera) {
  camera?.getTracks().forEach((track) => track.stop());
}

async function listSources() {
  const devices = (await navigator.mediaDevices?.enumerateDevices().catch(() => [])) ?? [];
  const cameras = devices.filter((device) => device.kind === "videoinput" && device.deviceId);
  const options = [new Option("Bundled clip", "clip")];
  // Before the first permission browsers name no cameras: one entry then stands for whichever there is.
  if (cameras.length) options.push(...cameras.map((camera, n) => new Option(camera.label || `Camera ${n + 1}`, camera.deviceId)));
  else options.push(new Option("Camera", "camera"));
  const select = byId("source");
  const chosen = select.value;
  select.replaceChildren(...options);
  select.value = options.some((option) => option.value === chosen) ? chosen : options[chosen === "camera" ? 1 : 0].value;
}

function onEveryFrame(callback) {
  if (video.requestVideoFrameCallback) {
    const next = (now, metadata) => {
      callback(metadata.captureTime ?? now);
      video.requestVideoFrameCallback(next);
    };
    video.requestVideoFrameCallback(next);
    return;
  }
  let lastTime = -1;
  const next = (now) => {
    if (video.currentTime !== lastTime) callback(now);
    lastTime = video.currentTime;
    requestAnimationFrame(next);
  };
  requestAnimationFrame(next);
}

// The portrait: bundled or uploaded.

async function listPortraits() {
  const bundled = await (await fetch("v1/portraits")).json();
  for (const { name, url } of bundled) addPortrait(name, url, { name });
  const upload = document.createElement("label");
  upload.className = "portrait upload";
  upload.innerHTML = '<input id="upload" type="file" accept="image/*"><span class="plus">+</span><span>Yours</span>';
  upload.querySelector("input").onchange = (event) => event.target.files[0] && usePicture(event.target.files[0]);
  byId("portraits").append(upload);
  byId("portraits").querySelector("input[type=radio]")?.click();
}

function addPortrait(label, url, value) {
  const choice = byId("portrait-choice").content.cloneNode(true);
  choice.querySelector("img").src = url;
  choice.querySelector("span").textContent = label;
  const radio = choice.querySelector("input");
  radio.onchange = () => choosePortrait(value, url);
  byId("portraits").insertBefore(choice, byId("portraits").querySelector(".upload"));
  return radio;
}

async function usePicture(file) {
  try {
    const small = await fitPicture(file);
    addPortrait(file.name.slice(0, 10), URL.createObjectURL(small), { file: small }).click();
  } catch {
    tell("error", "This file is not a picture that the browser can read: choose a JPEG or PNG.");
  }
}

// The server takes JPEG, PNG and WebP up to 4 MiB and 40 megapixels; everything else that the browser can show becomes a JPEG here.
async function fitPicture(file) {
  const bitmap = await createImageBitmap(file);
  const isKnown = ["image/jpeg", "image/png", "image/webp"].includes(file.type);
  const isSmall = file.size < MAX_PORTRAIT_BYTES && bitmap.width * bitmap.height <= MAX_PORTRAIT_PIXELS;
  if (isKnown && isSmall) return file;
  const scale = Math.min(1, PORTRAIT_PX / Math.min(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // behind transparent parts, as the server does it
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.95));
}

function choosePortrait(value, url) {
  portrait = value;
  byId("portrait").src = url;
  if (wanted) start();
}

// Controls.

function tell(state, message) {
  const status = byId("status");
  status.dataset.state = state;
  if (status.textContent !== message) status.textContent = message; // what is said again would be read out again
}

// Opening a camera and fetching portraits take time: only the newest start goes on after each of them.
async function start() {
  const number = wanted = ++numStarts;
  session?.stop();
  byId("reconnect").hidden = true;
  byId("start").textContent = "Stop";
  tell("connecting", "Connecting …");
  try {
    await portraitsListed;
    if (number !== wanted) return;
    if (!portrait) return giveUp("There are no portraits to choose from: reload the page.");
    if (video.paused || !video.currentSrc && !video.srcObject) await startSource(number);
  } catch (error) {
    if (number === wanted) giveUp(`The source cannot be opened: ${error.message || error.name}`);
    return;
  }
  if (number === wanted) session = new Session();
}

function stop() {
  session?.stop();
  rest();
  tell("idle", "Stopped.");
}

function loseCamera() {
  session?.stop();
  giveUp("The camera has gone: choose a source and press Start.");
}

function giveUp(message) {
  rest();
  tell("error", message);
}

function rest() {
  wanted = 0;
  stopSource();
  byId("start").textContent = "Start";
}

function showFigures() {
  if (!session || session.closed) return;
  for (const [id, value] of Object.entries(session.figures())) byId(id).textContent = value;
  const stages = Object.entries(session.stageMs ?? {}).map(([stage, ms]) => `${stage.replace("_", " ")} ${Math.round(ms)} ms`);
  byId("detail").textContent = (session.noFace ? "No face in view. " : "") + stages.join(" · ");
}

byId("start").onclick = () => (wanted ? stop() : start());
byId("reconnect").onclick = start;
byId("source").onchange = () => {
  stopSource();
  if (wanted) start();
};
// A closed page would keep its place for a while: it may be coming back.
addEventListener("pagehide", () => wanted && stop());
onEveryFrame((captureMs) => session?.capture(captureMs));
setInterval(showFigures, 500);
navigator.mediaDevices?.addEventListener("devicechange", listSources);
listSources();
const portraitsListed = listPortraits().catch(() => tell("error", "The server does not answer: reload the page."));
