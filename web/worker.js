// Python beside the page, so that the page never freezes. It is started after the page gave up every connection:
// whatever it asks for is served from the bytes that the page loaded before.

let python = null;

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === "start") await start(data);
    else judge(data);
  } catch (error) {
    self.postMessage({ kind: "failed", number: data.number ?? 0, text: firstLine(error) });
  }
};

async function start({ runtime, names, bytes, lock }) {
  self.fetch = async (address) => {
    const name = new URL(address, runtime).pathname.split("/").pop();
    const type = name.endsWith(".wasm") ? "application/wasm" : "application/octet-stream";
    if (!(name in bytes)) return new Response(null, { status: 404 });
    return new Response(bytes[name], { headers: { "Content-Type": type } });
  };
  // Pyodide asks in this way whether it runs in a worker of the old kind; here the browser would log that it blocked it.
  self.importScripts = () => {
    throw new TypeError("a module worker");
  };
  const { loadPyodide } = await import(`${runtime}pyodide.mjs`);
  python = await loadPyodide({ indexURL: runtime, lockFileContents: lock, stdout: () => {}, stderr: () => {} });
  python.unpackArchive(bytes[names.core], "zip", { extractDir: "/core" });
  bytes = {};
  python.runPython("import sys; sys.path.insert(0, '/core'); import judge");
  const about = python.runPython("judge.about()");
  const formats = python.runPython("judge.judge('formats', [], '/', {})");
  self.postMessage({ kind: "ready", about, formats });
}

/** Files are read in the slices that Python asks for; none is copied into memory as a whole. */
function judge({ number, verb, files, names, options }) {
  const { FS } = python;
  FS.mkdirTree("/drop");
  const blobs = files.map(({ path, file }) => ({ name: `here/${path}`, data: file }));
  FS.mount(FS.filesystems.WORKERFS, { blobs }, "/drop");
  const call = python.globals.get("judge").judge;
  const given = [python.toPy(names), python.toPy(options)];
  try {
    self.postMessage({ kind: "result", number, answer: call(verb, given[0], "/drop/here", given[1]) });
  } finally {
    for (const each of given) each.destroy();
    FS.unmount("/drop");
  }
}

/** An error in a line: what Python raised stands last in its message, the way to it before. */
function firstLine(error) {
  const lines = String(error?.message ?? error).trim().split("\n");
  return (error?.constructor?.name === "PythonError" ? lines[lines.length - 1] : lines[0]).slice(0, 300);
}
