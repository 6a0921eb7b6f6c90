// The page: loads the checker, hands it what the user drops, shows what it answers.

import { Refused, arranged, ofDrop, ofInput } from "./files.js";
import { clear, show } from "./results.js";

const at = (id) => document.getElementById(id);
const RUNTIME = ["pyodide.asm.wasm", "python_stdlib.zip"];

let parts = null; // what the worker is started with; kept, so that a second start loads no megabytes
let address = ""; // of the worker's text
let worker = null;
let dropped = null; // what was dropped last: other options judge it again
let number = 0;

follow();
await load();

/** The colors that were chosen on the other pages of the site. */
function follow() {
  try {
    document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "auto";
  } catch {
    // Storage is blocked: the colors of the system hold.
  }
}

async function load() {
  at("retry").hidden = true;
  say("");
  state("loading");
  try {
    if (!parts) parts = await fetched();
    start();
  } catch (error) {
    broken(`The checker could not be loaded: ${error.message}.`);
  }
}

/** Everything that the checker needs, with progress in megabytes; afterwards this page may connect to nobody. */
async function fetched() {
  if (!globalThis.WebAssembly || !globalThis.Worker) throw new Error("this browser has no WebAssembly");
  const list = await (await asked("parts.json")).json();
  const wanted = [...RUNTIME, list.core, "pyodide-lock.json", "worker.js"];
  const all = wanted.reduce((sum, name) => sum + list.sizes[name], 0);
  let done = 0;
  const bytes = {};
  await Promise.all(
    wanted.map(async (name) => {
      const reader = (await asked(name)).body.getReader();
      const pieces = [];
      for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
        pieces.push(piece.value);
        done += piece.value.length;
        progress(done, all);
      }
      bytes[name] = await new Blob(pieces).arrayBuffer();
      if (bytes[name].byteLength !== list.sizes[name]) throw new Error(`${name} is incomplete`);
    }),
  );
  address = local(bytes["worker.js"]);
  const lock = new TextDecoder().decode(bytes["pyodide-lock.json"]);
  const rule = document.createElement("meta");
  rule.httpEquiv = "Content-Security-Policy";
  rule.content = "connect-src 'none'";
  document.head.append(rule);
  return { runtime: new URL(".", import.meta.url).href, names: { core: list.core }, bytes, lock };
}

async function asked(name) {
  const answer = await fetch(name).catch(() => {
    throw new Error(location.protocol === "file:" ? "open this page over http, not as a file" : `${name} did not come`);
  });
  if (!answer.ok) throw new Error(`${name} is not there (${answer.status})`);
  return answer;
}

/** The address of a script that is here: unlike one from a server, it is bound by the rules of this page. */
function local(script) {
  const made = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  const policy = globalThis.trustedTypes?.createPolicy("loraformat", { createScriptURL: (url) => url });
  return policy ? policy.createScriptURL(made) : made;
}

function start() {
  state("starting");
  at("progress-text").textContent = "Starting Python";
  at("progress").removeAttribute("value");
  worker?.terminate();
  const own = new Worker(address, { type: "module" });
  own.onmessage = ({ data }) => {
    if (own === worker) heard(data);
  };
  own.onerror = (event) => {
    if (own === worker) broken(`The checker could not be started: ${event.message || "no module worker"}.`);
  };
  own.postMessage({ kind: "start", ...parts });
  worker = own;
}

function heard(answer) {
  if (answer.kind === "ready") return ready(JSON.parse(answer.about), JSON.parse(answer.formats));
  if (at("stop").hidden && answer.kind === "failed") return broken(`The checker could not be started: ${answer.text}.`);
  if (answer.number !== number) return undefined;
  at("stop").hidden = true;
  if (answer.kind === "failed") {
    say(`The checker failed on these files: ${answer.text}. Nothing is known about them; use the command line.`);
    at("status").textContent = "Failed";
    return start();
  }
  state("ready");
  at("status").textContent = "Done";
  show(JSON.parse(answer.answer), dropped.verb);
  // Who changed an option goes on there, and hears the verdict.
  if (dropped.isNew) at("verdict").focus();
  else at("heard").textContent = at("verdict").textContent;
  dropped.isNew = false;
  return undefined;
}

function ready({ version, targets }, formats) {
  at("version").textContent = `loraformat ${version}`;
  if (at("target").length === 1) {
    for (const [name, title] of targets) at("target").add(new Option(title, name));
    at("formats-text").textContent = formats.text;
    at("formats").hidden = false;
  }
  at("retry").hidden = true;
  state("ready");
  if (dropped?.isWaiting) judge();
  else if (!at("status").textContent) at("status").textContent = "Ready";
}

/** Judge what was dropped last, as the options are now; while the checker is loading it waits. */
function judge() {
  if (!dropped) return;
  say("");
  clear();
  at("heard").textContent = "";
  number += 1;
  const isBusy = !at("stop").hidden;
  dropped.isWaiting = document.documentElement.dataset.state !== "ready" || isBusy;
  dropped.verb = at("options").elements.verb.value;
  at("status").textContent = dropped.isWaiting ? "Waiting for the checker" : `Judging ${dropped.files.length} files`;
  if (isBusy) {
    at("stop").hidden = true;
    start();
  }
  if (dropped.isWaiting) return;
  const options = {};
  if (dropped.verb === "validate" && at("target").value) options.target = at("target").value;
  if (at("alpha").value.trim()) options.alpha = at("alpha").value.trim();
  at("stop").hidden = false;
  state("judging");
  worker.postMessage({ kind: "judge", number, options, ...dropped });
}

async function take(files) {
  try {
    dropped = { ...arranged(await files), isNew: true };
    judge();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    dropped = null;
    clear();
    at("status").textContent = "";
    say(error.message);
  }
}

function broken(text) {
  state("failed");
  at("status").textContent = "";
  at("retry").hidden = false;
  say(text);
}

function say(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function state(name) {
  document.documentElement.dataset.state = name;
}

function progress(done, all) {
  at("progress").value = done / all;
  at("progress-text").textContent = `${(done / 1e6).toFixed(1)} of ${(all / 1e6).toFixed(1)} MB`;
}

at("retry").addEventListener("click", load);
at("stop").addEventListener("click", () => {
  number += 1;
  at("stop").hidden = true;
  at("status").textContent = "Stopped";
  start();
});
for (const [button, input] of [["choose-folder", "folder"], ["choose-files", "files"]]) {
  at(button).addEventListener("click", () => at(input).click());
  at(input).addEventListener("change", () => {
    const { files } = at(input);
    if (files.length) take(Promise.resolve().then(() => ofInput(files)).finally(() => { at(input).value = ""; }));
  });
}
at("options").addEventListener("change", judge);
at("options").addEventListener("submit", (event) => {
  event.preventDefault();
  judge();
});
// A file that misses the frame must not be opened instead of the page.
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
    at("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take(ofDrop(event.dataTransfer));
});
