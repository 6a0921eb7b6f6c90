"use strict";
(() => {
  const page = JSON.parse(document.getElementById("loraformat-data").textContent);
  const shown = 60;
  const number = (value) => {
    if (value === null || value === undefined) return "";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-4 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };

  // One adapter: its table, heat map and spectra, in the elements whose names end in its suffix.
  const draw = (data, suffix) => {
    const byId = (id) => document.getElementById(id + suffix);
    // Rows of the table, names spelled out.
    const columns = ["weight", ...data.columns];
    const rows = data.weights.map((packed, index) => {
      const numbers = packed[1] === "" ? [] : packed[1].split(".");
      const name = data.names[packed[0]].split("{}").reduce((done, part, at) => done + numbers[at - 1] + part);
      let at = 2;
      const figures = data.columns.map((column) => column in data.constants ? data.constants[column] : packed[at++]);
      return { index, cells: [name, ...figures] };
    });
    const used = columns.map((name, at) => name === "weight" ||
      (name === "weights" ? rows.some((row) => row.cells[at] > 1)
        : name !== "is_outlier" && rows.some((row) => row.cells[at] !== null)));
    const labels = { weights: "weights", parameters: "parameters", norm: "‖ΔW‖", spectral_norm: "σ₁", stable_rank: "stable",
      effective_rank: "eff. rank", rank_90: "rank 90 %", base_norm: "‖W‖", relative_norm: "‖ΔW‖/‖W‖",
      retained_bf16: "kept bf16", retained_fp16: "kept fp16", rank_before: "rank before", optimum: "least error",
      energy: "energy kept", conflicts: "opposite signs", cross_terms: "off Σ w·ΔW", floor: "noise", retained: "kept if merged back" };
    const outlier = columns.indexOf("is_outlier");
    const order = { column: "weight", down: false };
    let wanted = "";
    let all = false;

    const compare = (one, other) => {
      if (one === null || other === null) return (one === null) - (other === null);
      const apart = typeof one === "number" ? one - other : one.localeCompare(other, "en", { numeric: true });
      return order.down ? -apart : apart;
    };

    const chosenRows = () => {
      const at = columns.indexOf(order.column);
      return rows.filter((row) => row.cells[0].includes(wanted)).sort((a, b) => compare(a.cells[at], b.cells[at]));
    };

    // All rows that the filter keeps, in the order of the table, every digit. RFC 4180; what a spreadsheet would take for
    // a formula begins with an apostrophe, as names come from files of strangers.
    const asCsv = () => {
      const cell = (value) => {
        if (value === null || value === undefined) return "";
        if (typeof value !== "string") return String(value);
        const safe = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
        return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
      };
      const line = (cells) => cells.filter((_, at) => used[at] || at === outlier).map(cell).join(",");
      return [line(columns), ...chosenRows().map((row) => line(row.cells))].join("\r\n") + "\r\n";
    };

    const drawTable = () => {
      const kept = chosenRows();
      const body = byId("weights").tBodies[0];
      const some = all ? kept : kept.slice(0, shown);
      body.replaceChildren(...some.map((row) => {
        const line = element("tr", undefined, row.cells[outlier] ? { class: "out" } : {});
        row.cells.forEach((cell, column) => {
          if (used[column]) line.append(element("td", typeof cell === "string" ? cell : number(cell)));
        });
        return line;
      }));
      byId("count").textContent = `${some.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
      byId("more").hidden = all || kept.length <= shown;
      for (const head of byId("weights").tHead.rows[0].cells) {
        const is = head.dataset.column === order.column;
        head.setAttribute("aria-sort", is ? (order.down ? "descending" : "ascending") : "none");
      }
    };

    const sortBy = (column, down) => {
      order.column = column;
      order.down = down;
      drawTable();
    };

    const drawHead = () => {
      const line = element("tr");
      columns.forEach((name, at) => {
        if (!used[at]) return;
        const head = element("th", undefined, { "data-column": name, scope: "col" });
        const button = element("button", labels[name] || name, { type: "button" });
        button.addEventListener("click", () => {
          sortBy(name, order.column === name ? !order.down : typeof rows[0].cells[at] !== "string");
        });
        head.append(button);
        line.append(head);
      });
      byId("weights").tHead.replaceChildren(line);
    };

    // The heat map: another figure gives other classes, signs, titles and margins.
    const cells = byId("heat") ? [...byId("heat").querySelectorAll("g.c")] : [];
    const titles = cells.map((cell) => cell.querySelector("title").textContent);
    const drawHeat = (name) => {
      const metric = data.cells.metrics.find((each) => each.name === name);
      const values = data.cells.values[name];
      const signs = [...data.cells.steps[name]];
      const [low, high, least, largest] = data.cells.scales[name];
      const outliers = cells.map((cell) => cell.classList.contains("out") || cell.dataset.out === "1");
      cells.forEach((cell, at) => {
        const value = values[at];
        const sign = signs[at];
        const step = sign === "?" || sign === "∅" ? null : sign;
        if (outliers[at]) cell.dataset.out = "1";
        cell.setAttribute("class", `c ${value === null ? "none" : step === null ? "zero" : `q${step}`}${outliers[at] && step !== null ? " out" : ""}`);
        const drawn = cell.querySelector("text");
        if (drawn) drawn.textContent = step !== null && outliers[at] ? "!" : sign;
        const several = data.cells.weights[at] > 1 ? `, ${metric.word} of ${data.cells.weights[at]} weights` : "";
        const where = titles[at].slice(0, titles[at].lastIndexOf(": "));
        const figure = value === null ? "unknown" : number(value);
        const mark = value !== null && step === null ? ", untrained: the update is zero" : "";
        const title = `${where}: ${metric.label} ${figure}${several}${mark}`;
        cell.querySelector("title").textContent = title;
        cell.setAttribute("aria-label", title);
      });
      for (const margin of byId("heat").querySelectorAll(".margin")) {
        const own = data.cells.margins[name][Number(margin.dataset.row)];
        margin.textContent = own;
      }
      byId("legend").textContent = [
        ...(high > 0 ? [`0 is ${number(low)}${least < low ? ` and less, down to ${number(least)}` : ""}, 9 is ${number(high)}`
          + `${largest > high ? ` and more, up to ${number(largest)}` : ""}, ${metric.scale} scale`] : []),
        ...(metric.scale === "log" && values.includes(0) ? ["∅ untrained: the update is zero"] : []),
      ].join("; ");
      byId("metric").value = name;
    };

    // Bars of singular values, from a millionth of the largest on, log scale.
    const drawSpectrum = (values) => {
      const space = "http://www.w3.org/2000/svg";
      const width = Math.max(3, Math.min(18, Math.floor(560 / values.length)));
      const drawing = document.createElementNS(space, "svg");
      const size = { width: width * values.length + 2, height: 90, role: "img", "aria-label": "singular values" };
      for (const [key, value] of Object.entries(size)) drawing.setAttribute(key, value);
      values.forEach((value, at) => {
        const share = Math.max(0.02, 1 + Math.log10(Math.max(values[0] > 0 ? value / values[0] : 0, 1e-6)) / 6);
        const bar = document.createElementNS(space, "rect");
        const place = { class: "bar", x: at * width + 1, y: 88 - 86 * share, width: Math.max(1, width - 2), height: 86 * share };
        for (const [key, each] of Object.entries(place)) bar.setAttribute(key, each);
        const title = document.createElementNS(space, "title");
        title.textContent = `σ${at + 1} = ${number(value)}`;
        bar.append(title);
        drawing.append(bar);
      });
      return drawing;
    };

    const drawDetail = (at) => {
      cells.forEach((cell, other) => cell.classList.toggle("chosen", other === at));
      const row = data.cells.first[at];
      const values = data.spectra[row] || [];
      const lines = [element("strong", rows[row].cells[0])];
      columns.forEach((name, column) => {
        if (used[column] && column > 0 && rows[row].cells[column] !== null) {
          const cell = rows[row].cells[column];
          lines.push(element("div", `${labels[name] || name}: ${typeof cell === "string" ? cell : number(cell)}`));
        }
      });
      byId("detail").replaceChildren(...lines);
      if (values.length) byId("detail").append(drawSpectrum(values));
    };

    // One cell at a time is in the order of Tab; arrow keys go to the nearest cell of a row or column.
    const keepFocusable = (at) => cells.forEach((cell, other) => cell.setAttribute("tabindex", other === at ? "0" : "-1"));
    const spot = (at) => { const box = cells[at].querySelector("rect"); return [Number(box.getAttribute("x")), Number(box.getAttribute("y"))]; };
    const neighbor = (at, along, way) => {
      const from = spot(at);
      let best = at;
      let least = Infinity;
      cells.forEach((_, other) => {
        const to = spot(other);
        const far = (to[along] - from[along]) * way;
        if (to[1 - along] === from[1 - along] && far > 0 && far < least) [best, least] = [other, far];
      });
      return best;
    };
    const ways = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 1], ArrowUp: [1, -1] };
    const onKey = (event, at) => {
      if (event.key === "Enter" || event.key === " ") drawDetail(at);
      else if (event.key in ways) {
        const next = neighbor(at, ...ways[event.key]);
        keepFocusable(next);
        cells[next].focus();
      } else return;
      event.preventDefault();
    };

    drawHead();
    byId("filter").addEventListener("input", (event) => { wanted = event.target.value; drawTable(); });
    byId("more").addEventListener("click", () => { all = true; drawTable(); });
    const say = (text) => { byId("said").textContent = text; };
    byId("copy").addEventListener("click", async () => {
      const text = asCsv();
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        const field = element("textarea", text);
        document.body.append(field);
        field.select();
        const done = document.execCommand("copy");
        field.remove();
        if (!done) { say("the browser does not allow copying: use the download"); return; }
      }
      say("copied");
    });
    byId("csv").addEventListener("click", () => {
      const address = URL.createObjectURL(new Blob([asCsv()], { type: "text/csv" }));
      element("a", undefined, { href: address, download: `${document.title.split(" · ")[0].replace(/[^\w.-]+/g, "_")}.csv` }).click();
      URL.revokeObjectURL(address);
      say("saved");
    });
    if (cells.length) {
      byId("metric").addEventListener("change", (event) => drawHeat(event.target.value));
      byId("heat").querySelector("svg").setAttribute("role", "group");
      cells.forEach((cell, at) => {
        cell.setAttribute("role", "button");
        cell.addEventListener("click", () => { keepFocusable(at); drawDetail(at); });
        cell.addEventListener("keydown", (event) => onKey(event, at));
      });
      keepFocusable(0);
    }
    // An address may end in #sort=norm&metric=effective_rank&cell=3&filter=q_proj: a view that can be sent on.
    const asked = new URLSearchParams(location.hash.slice(1));
    if (asked.has("filter")) { wanted = asked.get("filter"); byId("filter").value = wanted; }
    const sort = columns.includes(asked.get("sort")) ? asked.get("sort") : "weight";
    sortBy(sort, sort !== "weight" && asked.get("order") !== "up");
    const metric = asked.get("metric");
    if (cells.length) drawHeat(metric in data.cells.values ? metric : data.cells.metrics[0].name);
    if (cells[asked.get("cell")] && asked.has("cell")) drawDetail(Number(asked.get("cell")));
    return cells.length;
  };

  const cells = draw(page, "");
  page.others.forEach((other, at) => draw(other, `-${page.others.length - at}`));
  document.documentElement.dataset.ok = String(cells);
})();
