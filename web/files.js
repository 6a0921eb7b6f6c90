// Dropped or chosen files, each with the path that a terminal would show. Nothing is read here.

export const MOST_FILES = 2000;
const MOST_FOLDERS = 2000;
const DEEPEST = 16;
const LONGEST_NAME = 255;
// Where files that were chosen one by one stand together, because one describes the others.
const TOGETHER = "files";

/** What cannot be judged, in words for the user. */
export class Refused extends Error {}

/** The files of a drop; folders are walked. The entries must be taken before anything is awaited. */
export async function ofDrop(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) throw new Refused("That was not a file. Drop a folder or files from your file manager.");
  const found = [];
  const folders = { left: MOST_FOLDERS };
  for (const entry of entries) await walk(entry, "", 0, found, folders);
  if (!found.length) throw new Refused(`The folder ${shown(entries[0].name)} has no files.`);
  return found;
}

/** The files of an <input>; those of a folder have their path in it. */
export function ofInput(list) {
  const files = [...list];
  if (files.length > MOST_FILES) throw tooMany();
  return files.map((file) => ({ path: file.webkitRelativePath || file.name, file }));
}

/**
 * What is handed to the checker: files by path, and the names to judge. Loose files are one adapter where a .json or
 * .yaml among them says so, and else one adapter each.
 */
export function arranged(files) {
  const loose = files.filter(({ path }) => !path.includes("/"));
  const isOne = loose.length > 1 && loose.some(({ path }) => /\.(json|ya?ml)$/i.test(path));
  const placed = files.map(({ path, file }) => ({
    path: isOne && !path.includes("/") ? `${TOGETHER}/${path}` : path,
    file,
  }));
  const seen = new Set();
  for (const { path } of placed) {
    check(path);
    if (seen.has(path)) throw new Refused(`Two files are named ${shown(path)}. Drop their folders instead.`);
    seen.add(path);
  }
  const names = [...new Set(placed.map(({ path }) => path.split("/")[0]))];
  return { files: placed, names };
}

/** A name as text: without the characters that hide or turn what stands beside them. */
export function shown(name) {
  const plain = name.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, "\ufffd");
  return plain.length > 120 ? `${plain.slice(0, 117)}…` : plain;
}

async function walk(entry, before, depth, found, folders) {
  const path = before + entry.name;
  if (entry.isFile) {
    if (found.length >= MOST_FILES) throw tooMany();
    const file = await new Promise((resolve, reject) => {
      entry.file(resolve, () => reject(new Refused(`The browser cannot open ${shown(path)}.`)));
    });
    found.push({ path, file });
    return;
  }
  if (depth >= DEEPEST) throw new Refused(`Folders are nested more than ${DEEPEST} deep at ${shown(path)}.`);
  if (folders.left-- <= 0) throw new Refused(`There are more than ${MOST_FOLDERS} folders.`);
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((resolve, reject) => {
      reader.readEntries(resolve, () => reject(new Refused(`The browser cannot list ${shown(path)}.`)));
    });
    if (!some.length) return;
    for (const each of some) await walk(each, `${path}/`, depth + 1, found, folders);
  }
}

/** Names that the file system of the checker would change or lose. */
function check(path) {
  for (const name of path.split("/")) {
    const isPlain = name && name !== "." && name !== ".." && name !== "__proto__" && !name.includes("\0");
    const isText = name.isWellFormed?.() ?? !/[\ud800-\udfff]/u.test(name);
    if (!isPlain || !isText || new TextEncoder().encode(name).length > LONGEST_NAME) {
      throw new Refused(`The name ${shown(path)} cannot be used in a browser. Rename it, or use the command line.`);
    }
  }
}

function tooMany() {
  return new Refused(`More than ${MOST_FILES} files. Drop the folder of the adapter itself.`);
}
