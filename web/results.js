// What the checker answered, as elements. Texts come from files of strangers: they are set as text, never as HTML.

import { shown } from "./files.js";

const at = (id) => document.getElementById(id);
const WORDS = { error: ["error", "errors"], warning: ["warning", "warnings"], info: ["note", "notes"] };
// Exit codes of the command line where there is no verdict.
const REFUSED = {
  2: "Not judged",
  3: "Could not be read",
  70: "A bug in loraformat: please report it",
};

export function clear() {
  at("result").hidden = true;
}

/** Show an answer of `judge.py` to a verb. */
export function show(answer, verb) {
  const counts = Object.keys(WORDS).map((severity) => [
    severity,
    answer.findings.filter((finding) => finding.severity === severity).length,
  ]);
  const found = counts
    .filter(([, count]) => count)
    .map(([severity, count]) => `${count} ${WORDS[severity][count === 1 ? 0 : 1]}`)
    .join(", ");
  at("verdict").textContent = verdict(answer, verb, found);
  at("verdict").dataset.verdict = answer.exit === 0 ? "ok" : "bad";
  at("judged").textContent = `${verb}, exit code ${answer.exit}`;
  at("findings").replaceChildren(...(answer.findings.length ? [table(answer)] : []));
  if (answer.left_out) at("findings").append(paragraph(`${answer.left_out} more findings are not shown here.`));
  at("text").textContent = answer.text;
  at("cut").textContent = `${answer.cut} more characters are not shown here.`;
  at("cut").hidden = !answer.cut;
  at("result").hidden = false;
}

function verdict(answer, verb, found) {
  const isOne = new Set(answer.findings.map((finding) => finding.subject)).size < 2;
  if (answer.exit === 3 && !isOne) return `Not all could be read: ${found}`;
  if (answer.exit in REFUSED) return REFUSED[answer.exit];
  if (answer.exit !== 0) return `Not OK: ${found || "refused"}`;
  const word = verb === "inspect" ? "Inspected" : "OK";
  return found ? `${word}, with ${found}` : word;
}

function table({ findings }) {
  const subjects = new Set(findings.map((finding) => finding.subject));
  const heads = [...(subjects.size > 1 ? ["Adapter"] : []), "Severity", "Code", "Place", "Finding"];
  const made = document.createElement("table");
  const caption = made.createCaption();
  caption.textContent = "Findings";
  const head = made.createTHead().insertRow();
  for (const name of heads) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = name;
    head.append(cell);
  }
  const body = made.createTBody();
  for (const finding of findings) {
    const row = body.insertRow();
    row.dataset.severity = finding.severity;
    if (subjects.size > 1) cell(row, "Adapter", shown(finding.subject));
    cell(row, "Severity", WORDS[finding.severity]?.[0] ?? finding.severity);
    cell(row, "Code", "").append(codeLink(finding));
    cell(row, "Place", finding.where || "-");
    const said = cell(row, "Finding", finding.message);
    if (finding.hint) said.append(paragraph(`Hint: ${finding.hint}`));
  }
  return made;
}

/** The page of a code; a new tab, since this one holds the files. */
function codeLink({ code, name }) {
  const link = document.createElement("a");
  link.textContent = code;
  link.title = name;
  if (/^LF\d{3}$/.test(code)) link.href = `../rules/${code}.html`;
  link.target = "_blank";
  link.rel = "noopener";
  return link;
}

function cell(row, head, text) {
  const made = row.insertCell();
  made.dataset.head = head;
  made.textContent = text;
  return made;
}

function paragraph(text) {
  const made = document.createElement("p");
  made.textContent = text;
  return made;
}
