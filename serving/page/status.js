// The status page: asks v1/status once a second and shows the answer. Everything in it is put in as text, never as HTML.

const POLL_MS = 1000;
const PATIENCE_MS = 4000;
const KEPT = 60; // answers that the lines look back over
const RATE_OVER = 5; // answers that a rate is taken over
const MAX_ROWS = 100;
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
const answers = []; // {at_s, counts}, the newest last
const house = { fps: [], delay: [] };
const histories = new Map(); // session id -> {fps, delay}

// Pieces of the page. Strings that are appended become text.

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

function spark(values, what) {
  const known = values.filter((value) => value !== null);
  const top = Math.max(...known, 1e-9);
  const line = document.createElementNS(SVG, "polyline");
  const points = values.map((value, n) => [KEPT - values.length + n, value]).filter(([, value]) => value !== null);
  line.setAttribute("points", points.map(([x, value]) => `${x},${(20 - 18 * value / top).toFixed(1)}`).join(" "));
  const svg = document.createElementNS(SVG, "svg");
  const named = { class: "spark", viewBox: `0 0 ${KEPT - 1} 21`, preserveAspectRatio: "none", role: "img", "aria-label": what };
  for (const [name, value] of Object.entries(named)) svg.setAttribute(name, value);
  svg.append(line);
  return svg;
}

function pair(name, ...value) {
  return element("div", "", element("dt", "", name), element("dd", "", ...value));
}

function figure(name, value, unit, note, ...below) {
  return pair(name, element("strong", "", value), ` ${unit}`, element("small", "", note), ...below);
}

// Figures as text; what is not known is a dash.

const round = (value, digits = 0) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const memory = (mb) => (mb >= 1000 ? `${round(mb / 1024, 1)} GiB` : `${round(mb)} MiB`);
const plural = (num, word) => `${round(num)} ${word}${num === 1 ? "" : "s"}`;
const sum = (values) => values.reduce((total, value) => total + (value ?? 0), 0);

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

// What is remembered from answer to answer.

function remember(values, value) {
  values.push(value ?? null);
  if (values.length > KEPT) values.shift();
}

function rate(count) {
  const oldest = answers.at(-1 - RATE_OVER) ?? answers[0];
  const newest = answers.at(-1);
  if (oldest === newest) return null;
  // A replica that has been replaced takes its counts with it.
  return Math.max(0, (count(newest.counts) ?? 0) - (count(oldest.counts) ?? 0)) / (newest.at_s - oldest.at_s);
}

function remembered(status) {
  answers.push({ at_s: performance.now() / 1000, counts: status.counts });
  if (answers.length > RATE_OVER + 1) answers.shift();
  remember(house.fps, rate((counts) => counts.frames_out));
  remember(house.delay, worstDelay(status));
  for (const session of status.sessions) {
    const history = histories.get(session.id) ?? { fps: [], delay: [] };
    histories.set(session.id, history);
    remember(history.fps, session.fps);
    remember(history.delay, session.delay_ms?.p95);
  }
  const present = new Set(status.sessions.map((session) => session.id));
  for (const id of histories.keys()) if (!present.has(id)) histories.delete(id);
}

function worstDelay(status) {
  const known = status.sessions.map((session) => session.delay_ms?.p95 ?? null).filter((delay) => delay !== null);
  return known.length ? Math.max(...known) : null;
}

// The parts of the page.

function showState(status) {
  const down = status.members.filter((member) => !member.up);
  const message = !status.ready ? status.reason ?? "Not ready."
    : down.length ? `Ready, while ${down.map((member) => member.name).join(", ")} starts again.`
    : "Ready.";
  tell(!status.ready || down.length ? "warn" : "live", message);
}

function showFigures(status) {
  const processes = [...status.members, ...status.replicas, status.manager ?? {}];
  const dropped = rate((counts) => sum(Object.values(counts.dropped)));
  const idle = status.num_idle ? `, ${status.num_idle} idle` : "";
  const [size, unit] = memory(sum(processes.map((process) => process.rss_mb))).split(" ");
  byId("figures").replaceChildren(
    figure("Sessions", round(status.num_sessions), "", `of ${round(status.places)} places${idle}`, bar(status.num_sessions / status.places)),
    figure("Waiting", round(status.num_queued), "", "for a place"),
    figure("Pictures", round(house.fps.at(-1), 1), "fps", `the aim is ${round(status.target_fps)} each`, spark(house.fps, "pictures a second over the last minute")),
    figure("Longest delay", round(house.delay.at(-1)), "ms", "95th percentile", spark(house.delay, "longest delay over the last minute")),
    figure("Dropped", round(dropped, 1), "fps", `of ${round(rate((counts) => counts.frames_in), 1)} that came`),
    figure("Memory", size, unit, "without Ray's own"),
  );
}

function bar(share) {
  const filled = element("span", "");
  filled.style.width = `${100 * Math.min(1, Math.max(0, share || 0))}%`;
  return element("span", "bar", filled);
}

function memberCard(member) {
  const standsBy = member.is_spare && !member.num_sessions;
  const state = !member.up ? "down" : standsBy ? "spare" : "up";
  const calls = Object.entries(member.call_ms ?? {}).map(([stage, byBatch]) => {
    const batches = Object.entries(byBatch).map(([size, ms]) => (size === "1" ? `${round(ms)} ms` : `${round(ms)} ms for ${size}`));
    return element("p", "", `${stage} `, element("span", "faint", batches.join(", ")));
  });
  const facts = [plural(member.num_sessions, "session")];
  if (member.up) facts.push(memory(member.rss_mb), `process ${member.pid ?? "–"}`);
  if (member.num_restarts) facts.push(plural(member.num_restarts, "restart"));
  const percent = round(member.busy === null ? null : 100 * member.busy);
  const busy = { up: `${percent} % busy`, spare: "stands by", down: "starts again" }[state];
  const title = element("p", "title", element("span", `state ${state}`, member.name), element("span", "faint", busy));
  title.title = `${member.stages.join(" + ")} on ${member.node}`;
  return element("div", "card", title, bar(member.up ? member.busy : 0), ...calls, element("p", "faint", facts.join(" · ")));
}

function sessionRow(session) {
  const history = histories.get(session.id);
  const name = element("code", `state ${session.state}`, session.id);
  const told = session.state === "live" ? [] : [" ", element("span", "faint", session.state)];
  const delay = session.delay_ms ?? {};
  const places = [session.replica, ...new Set(Object.values(session.members ?? {}))].filter(Boolean);
  return element("tr", "",
    element("td", "", name, ...told),
    element("td", "", spark(history.fps, "frames a second over the last minute"), `${round(session.fps, 1)} fps`),
    element("td", "", spark(history.delay, "delay over the last minute"), `${round(delay.p50)} ms `, element("span", "faint", `p95 ${round(delay.p95)}`)),
    element("td", "extra faint", places.join(" · ")),
    element("td", "extra number", round(session.num_recoveries)),
  );
}

function showSessions(sessions) {
  const nobody = element("td", "none", "Nobody is here.");
  nobody.colSpan = 5;
  byId("sessions").replaceChildren(...(sessions.length ? sessions.slice(0, MAX_ROWS).map(sessionRow) : [nobody]));
  byId("more-sessions").textContent = sessions.length > MAX_ROWS ? `… and ${sessions.length - MAX_ROWS} more.` : "";
}

function showProcesses(status) {
  const replicas = status.replicas.map((replica) => pair(`Replica ${replica.id}`, `${plural(replica.num_sessions, "session")}, ${memory(replica.rss_mb)}`));
  const manager = status.manager ? [pair("Manager", `up ${duration(status.manager.up_s)}, ${memory(status.manager.rss_mb)}`)] : [];
  byId("processes").replaceChildren(...replicas, ...manager);
}

function showCounts(counts) {
  const people = ["admitted", "queued", "refused", "resumed", "recovered"].map((name) => pair(name, round(counts[name])));
  const frames = [pair("frames received", round(counts.frames_in)), pair("frames sent", round(counts.frames_out))];
  const dropped = Object.entries(counts.dropped).map(([reason, num]) => pair(`dropped: ${reason.replaceAll("_", " ")}`, round(num)));
  byId("counts").replaceChildren(...people, ...frames, ...dropped);
}

function show(answer) {
  const status = { ...answer, members: answer.members ?? [], replicas: answer.replicas ?? [], sessions: answer.sessions ?? [] };
  status.counts = { ...answer.counts, dropped: answer.counts?.dropped ?? {} };
  remembered(status);
  showState(status);
  showFigures(status);
  byId("members").replaceChildren(...status.members.map(memberCard));
  showSessions(status.sessions);
  showProcesses(status);
  showCounts(status.counts);
}

function tell(state, message) {
  byId("status").dataset.state = state;
  byId("status").textContent = message;
}

async function ask() {
  const answer = await fetch("v1/status", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(told.reason ?? `it says ${answer.status}`);
  return told;
}

// The next question is asked a second after the last answer, so that a slow server is not asked more than it can say.
async function poll() {
  if (!document.hidden) {
    try {
      show(await ask());
      document.body.classList.remove("stale");
    } catch (error) {
      document.body.classList.add("stale");
      tell("error", `The server does not tell its state: ${error.message}`);
    }
  }
  setTimeout(poll, POLL_MS);
}

poll();
