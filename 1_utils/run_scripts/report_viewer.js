// The report's script: tables sort by a click on a heading, and the pair viewer shows one prompt in all its forms.
// What a model or a file wrote reaches the page as text nodes and never as HTML.
"use strict";
(() => {
  const MISSING = 255; // a byte that stands for no number
  const COLOURS = ["#1f5fa8", "#b35806", "#5b6673"]; // clean, style, control
  const [ORANGE, PURPLE] = [[224, 130, 20], [128, 115, 172]];

  const byId = (name) => document.getElementById(`viewer-${name}`);

  function make(tag, attributes = {}, ...children) {
    const svg = ["svg", "path", "line", "text"].includes(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function tableOf(headings, rows) {
    const line = (cells, tag) => make("tr", {}, ...cells.map((cell) => make(tag, {}, cell)));
    const head = headings ? [make("thead", {}, line(headings, "th"))] : [];
    return make("table", {}, ...head, make("tbody", {}, ...rows.map((cells) => line(cells, "td"))));
  }

  function fill(select, options) {
    select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  }

  function shown(value, digits = 3, signed = false) {
    if (Number.isNaN(value)) return "–";
    return (signed && value > 0 ? "+" : "") + value.toFixed(digits).replace("-", "\u2212");
  }

  // Bytes are made by `share_bytes` and `cosine_bytes` in report_viewer.py.
  const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const shareOf = (byte) => (byte === MISSING ? NaN : (byte / 254) ** 2);
  const cosineOf = (byte) => (byte === MISSING ? NaN : byte / 127 - 1);
  const known = (values) => values.filter((value) => !Number.isNaN(value));

  // White at 0, orange at `most`, purple at -most.
  function colourOf(value, most) {
    if (Number.isNaN(value)) return "transparent";
    const part = Math.min(1, Math.abs(value) / most);
    return `rgb(${(value < 0 ? PURPLE : ORANGE).map((level) => Math.round(255 - part * (255 - level))).join(" ")})`;
  }

  // --- tables that sort

  function numberIn(text) {
    const found = /^[<>+]?\s*(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)/i.exec(text.replaceAll("\u2212", "-").replaceAll(",", ""));
    return Number(found?.[1]); // NaN if there is none
  }

  // Numbers come before texts; a cell without a value stays at the end in both directions.
  function compareCells(a, b, sign) {
    const empty = (text) => text === "" || text === "–";
    if (empty(a) || empty(b)) return empty(a) - empty(b);
    const [x, y] = [a, b].map(numberIn);
    if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
    return sign * (Number.isNaN(x) ? a.localeCompare(b, undefined, { numeric: true }) : x - y);
  }

  function makeSortable(table) {
    const [head, body] = [table.tHead?.rows[0], table.tBodies[0]];
    if (!head || !body || body.rows.length < 2 || body.rows[0].cells.length !== head.cells.length) return;
    const textAt = (row, column) => row.cells[column]?.textContent.trim() ?? "";
    [...head.cells].forEach((heading, column) => {
      if (!textAt(head, column) || [...body.rows].every((row) => !textAt(row, column))) return;
      const button = make("button", { type: "button", class: "sort" }, ...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const descending = heading.getAttribute("aria-sort") === "ascending";
        for (const other of head.cells) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const sign = descending ? -1 : 1;
        body.append(...[...body.rows].sort((a, b) => compareCells(textAt(a, column), textAt(b, column), sign)));
      });
    });
  }

  // --- what is chosen, and the numbers of it

  let runs = [];
  const chosen = { run: null, style: null, row: null, layer: 0, head: 0, map: { form: 1, minus: null } };

  const forms = () => [chosen.run.clean, chosen.style.name, chosen.style.control].filter((name) => name !== null);
  const tokenText = (number) => chosen.run.tokens[number] ?? "–";
  const tokenBox = (number) => make("bdi", { class: "token" }, tokenText(number));
  const answerOf = (form, row) => chosen.run.answers[form]?.[row.row];
  const verdictsOf = (row) => forms().slice(0, 2).map((form) => answerOf(form, row)?.verdict ?? "");
  const placeOf = (form) => chosen.style.rows.indexOf(chosen.row) * forms().length + form;

  // Attention from the last token to the edited words in one form of the chosen row.
  function massOf(form, layer, head) {
    const { layers, heads } = chosen.run;
    return shareOf(chosen.mass[(placeOf(form) * layers + layer) * heads + head]);
  }

  function mapValue({ dataset: { layer, head } }) {
    const { form, minus } = chosen.map;
    return massOf(form, +layer, +head) - (minus === null ? 0 : massOf(minus, +layer, +head));
  }

  function formTitle(tag, attributes, name, form) {
    const role = make("span", { class: "role" }, ["\n(clean)", "", "\n(control)"][form]);
    return make(tag, { ...attributes, style: `color: ${COLOURS[form]}` }, name, role);
  }

  // --- the choice of run, style and row

  const FILTERS = {
    all: () => true,
    wrong: (row) => verdictsOf(row).join() === "right,wrong",
    right: (row) => verdictsOf(row).join() === "wrong,right",
    kl: (row) => row.kl !== null,
  };

  function chooseRun(number) {
    chosen.run = runs[number];
    fill(byId("style"), chosen.run.styles.map((style, place) => [place, style.name]));
    byId("note").textContent = chosen.run.note;
    drawGrid();
    chooseStyle(0);
  }

  function chooseStyle(number) {
    chosen.style = chosen.run.styles[number];
    chosen.mass = bytesOf(chosen.style.mass);
    const names = forms();
    const others = names.flatMap((name, form) => (form === 1 ? [] : [[`1,${form}`, `${names[1]} \u2212 ${name}`]]));
    fill(byId("map"), [...names.map((name, form) => [form, name]), ...others]);
    byId("map").value = 1;
    chosen.map = { form: 1, minus: null };
    for (const option of byId("filter").options) {
      const count = chosen.style.rows.filter(FILTERS[option.value]).length;
      option.textContent = `${option.dataset.name} (${count})`;
      option.disabled = count === 0;
    }
    byId("filter").value = "all";
    chooseFilter("all");
    const values = gridCells().map(mapValue); // begin with the head that gives the edited words most
    chooseCell(gridCells()[Math.max(0, values.indexOf(Math.max(...known(values))))]);
  }

  function chooseFilter(name) {
    const rows = chosen.style.rows.filter(FILTERS[name]);
    if (name === "kl") rows.sort((a, b) => b.kl - a.kl);
    fill(byId("row"), rows.map((row) => [chosen.style.rows.indexOf(row), rowTitle(row)]));
    chooseRow(byId("row").value);
  }

  function rowTitle(row) {
    const edited = row.columns.find(Array.isArray) ?? [[], []];
    const words = edited.slice(0, 2).map((tokens) => tokens.map(tokenText).join("").trim().slice(0, 40) || "–");
    const verdicts = verdictsOf(row);
    const verdict = verdicts[0] === verdicts[1] ? `${verdicts[0]} in both` : verdicts.join(" → ");
    const kl = row.kl === null ? "" : `KL ${shown(row.kl, 2)}`;
    return `${row.element}: ${[words.join(" → "), verdicts.every(Boolean) && verdict, kl].filter(Boolean).join(", ")}`;
  }

  function chooseRow(number) {
    chosen.row = chosen.style.rows[number];
    const { selectedIndex, options } = byId("row");
    byId("back").disabled = selectedIndex <= 0;
    byId("on").disabled = selectedIndex >= options.length - 1;
    colourGrid();
    drawAnswers();
    drawCurves();
  }

  // --- the head map

  const chooseCell = ({ dataset: { layer, head } }) => chooseHead(Number(layer), Number(head));
  const gridCells = () => [...byId("grid").querySelectorAll("td")];

  function drawGrid() {
    const { layers, heads } = chosen.run;
    const every = [...Array(layers).keys()];
    const rows = [...Array(heads).keys()].reverse().map((head) => { // upward, as in the pictures
      const cells = every.map((layer) => make("td", { role: "gridcell", "data-layer": layer, "data-head": head }));
      return make("tr", { role: "row" }, make("th", { "aria-hidden": "true" }, String(head)), ...cells);
    });
    const by = layers > 12 ? 5 : 1;
    const named = every.filter((layer) => layer % by === 0);
    const numbers = named.map((layer) => make("th", { colspan: Math.min(by, layers - layer) }, String(layer)));
    byId("grid").className = heads > 24 ? "many" : "";
    byId("grid").replaceChildren(...rows, make("tr", { "aria-hidden": "true" }, make("th"), ...numbers));
    Object.assign(chosen, { layer: 0, head: 0 });
  }

  function colourGrid() {
    const values = gridCells().map(mapValue);
    const most = Math.max(1e-6, ...known(values).map(Math.abs));
    const difference = chosen.map.minus !== null;
    gridCells().forEach((cell, place) => {
      cell.style.backgroundColor = colourOf(values[place], most);
      cell.title = `layer ${cell.dataset.layer}, head ${cell.dataset.head}: ${shown(values[place], 3, difference)}`;
      cell.setAttribute("aria-label", cell.title);
    });
    byId("low").textContent = difference ? shown(-most, 2) : "0";
    byId("high").textContent = shown(most, 2, difference);
    byId("scale").className = difference ? "scale both" : "scale";
    chooseHead(chosen.layer, chosen.head);
  }

  function chooseHead(layer, head, focus = false) {
    const before = byId("grid").querySelector("[aria-selected]");
    for (const name of ["aria-selected", "tabindex"]) before?.removeAttribute(name);
    Object.assign(chosen, { layer, head });
    const cell = byId("grid").rows[chosen.run.heads - 1 - head].cells[layer + 1];
    cell.setAttribute("aria-selected", "true");
    cell.setAttribute("tabindex", 0);
    if (focus) cell.focus();
    const parts = forms().map((name, form) => `${name} ${shown(massOf(form, layer, head))}`);
    byId("said").textContent = `Layer ${layer}, head ${head}: ${parts.join(", ")}`;
    drawStrips();
  }

  function moveInGrid(event) {
    const moves = { Left: [-1, 0], Right: [1, 0], Up: [0, 1], Down: [0, -1], Home: [-Infinity, 0], End: [Infinity, 0] };
    const by = moves[event.key.replace("Arrow", "")];
    if (!by) return;
    event.preventDefault();
    const within = (value, size) => Math.max(0, Math.min(size - 1, value));
    chooseHead(within(chosen.layer + by[0], chosen.run.layers), within(chosen.head + by[1], chosen.run.heads), true);
  }

  // --- the prompts as strips of tokens

  // Attention of the last token to every token shown, if the run holds the map of the chosen layer; else null.
  function tokenAttention(form) {
    const place = chosen.run.rawLayers.indexOf(chosen.layer);
    const maps = chosen.row.attention?.[form];
    if (place < 0 || !maps) return null;
    const bytes = bytesOf(maps[place]);
    const size = bytes.length / chosen.run.heads;
    return Array.from(bytes.subarray(chosen.head * size, (chosen.head + 1) * size), shareOf);
  }

  // The columns in lines that are no wider than the page, so that the strips stay above each other.
  function linesOf(columns, letters) {
    const lines = [[]];
    let used = 0;
    for (const column of columns) {
      const parts = Array.isArray(column) ? column : column.gap ? [] : [[column]];
      const widths = parts.map((tokens) => tokens.reduce((sum, token) => sum + tokenText(token).length + 0.6, 0));
      const wide = column.gap ? 12 : Math.max(...widths) + (Array.isArray(column) ? 4 : 0); // 4: the number behind it
      if (used && used + wide > letters) {
        lines.push([]);
        used = 0;
      }
      lines.at(-1).push(column);
      used += wide;
    }
    return lines;
  }

  function stripCell(column, form, mass, each) {
    if (column.gap) return make("td", { class: "gap" }, `… ${column.gap} tokens …`);
    const edited = Array.isArray(column);
    const cell = make("td", edited ? { class: "edited" } : {});
    for (const token of edited ? column[form] : [column]) {
      const value = each ? each.shift() : edited ? mass : NaN;
      const box = tokenBox(token);
      box.style.backgroundColor = colourOf(value, 1);
      if (!Number.isNaN(value)) box.title = shown(value);
      cell.append(box);
    }
    if (edited && cell.hasChildNodes()) cell.append(make("small", {}, shown(mass, 2)));
    return cell;
  }

  function drawStrips() {
    const names = forms();
    const mass = names.map((_, form) => massOf(form, chosen.layer, chosen.head));
    const each = names.map((_, form) => tokenAttention(form));
    byId("every").hidden = !each[1];
    const letters = Math.max(16, Math.floor((byId("strips").clientWidth - 110) / 9.2));
    const tables = linesOf(chosen.row.columns, letters).map((line) => {
      const rows = names.map((name, form) => {
        const cells = line.map((column) => stripCell(column, form, mass[form], each[form]));
        return make("tr", {}, formTitle("th", { scope: "row" }, name, form), ...cells);
      });
      return make("table", { class: "strip" }, make("tbody", {}, ...rows));
    });
    byId("strips").replaceChildren(...tables);
  }

  function drawAnswers() {
    const columns = forms().map((name, form) => {
      const [found, title] = [answerOf(name, chosen.row), formTitle("h4", {}, name, form)];
      if (!found) return make("div", {}, title, make("p", {}, "not run"));
      const verdict = found.verdict ? make("span", { class: `verdict ${found.verdict}` }, found.verdict) : "";
      const answer = make("p", { class: "answer" }, make("bdi", {}, found.answer || "(empty)"), " ", verdict);
      const lines = (found.next ?? []).map(([token, probability]) => {
        const style = `width: ${100 * probability}%; background: ${COLOURS[form]}`;
        return [tokenBox(token), make("span", { class: "bar", style }), shown(probability)];
      });
      return make("div", {}, title, answer, tableOf(null, lines));
    });
    byId("answers").replaceChildren(...columns);
    byId("gold").textContent = chosen.row.gold ? `Right answer: ${chosen.row.gold}` : "";
  }

  // --- curves by layer

  function drawCurves() {
    const size = chosen.run.layers + 1;
    const figures = Object.entries(chosen.style.curves).map(([kind, text]) => {
      const [title, decode] = [byId("titles").dataset[kind], kind === "lens" ? shareOf : cosineOf];
      const of = (form) => Array.from(bytesOf(text).subarray(placeOf(form) * size, (placeOf(form) + 1) * size), decode);
      const lines = forms().map((name, form) => ({ name, form, values: of(form) }));
      const some = lines.filter((line) => known(line.values).length);
      return some.length ? figureOf(title, some) : "";
    });
    byId("curves").replaceChildren(...figures);
    const { lens } = chosen.row;
    byId("lens").hidden = !lens;
    const layers = [...Array(lens ? size : 0).keys()];
    const tokens = layers.map((layer) => [layer, ...lens.map((of) => tokenBox(of?.[layer]))]);
    byId("lens-table").replaceChildren(tableOf(["layer", ...forms()], tokens));
  }

  function figureOf(title, lines) {
    const [width, height, left, right, top, bottom] = [430, 184, 34, 90, 10, 32];
    const last = chosen.run.layers;
    const least = Math.min(...lines.flatMap((line) => known(line.values)));
    const low = least < -0.5 ? -1 : least < 0 ? -0.5 : 0;
    const x = (layer) => left + ((width - left - right) * layer) / last;
    const y = (value) => height - bottom - ((height - top - bottom) * (value - low)) / (1 - low);
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
    const write = (px, py, text, attributes) => svg.append(make("text", { x: px, y: py, ...attributes }, text));
    for (const value of new Set([low, 0, 0.5, 1])) {
      svg.append(make("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: "#dfe3e8" }));
      write(left - 5, y(value) + 4, shown(value, value % 1 ? 1 : 0), { "text-anchor": "end" });
    }
    for (let layer = 0; layer <= last; layer += Math.max(1, Math.round(last / 6))) {
      write(x(layer), height - 18, String(layer), { "text-anchor": "middle" });
    }
    write((left + width - right) / 2, height - 4, "layer (0: embeddings)", { "text-anchor": "middle" });
    const ends = lines.map(({ name, form, values }) => {
      const points = values.map((value, layer) => [x(layer), y(value)]).filter(([, py]) => !Number.isNaN(py));
      const path = points.map((point) => point.map((at) => at.toFixed(1)).join(" ")).join("L");
      const dash = form === 2 ? "5 3" : "none"; // a control that equals the style lies on it
      svg.append(make("path", { d: `M${path}`, class: "curve", stroke: COLOURS[form], "stroke-dasharray": dash }));
      return { name, form, at: points.at(-1)[1] + 4 };
    });
    ends.sort((a, b) => a.at - b.at).forEach((end, place) => {
      if (place) end.at = Math.max(end.at, ends[place - 1].at + 13); // labels never lie on each other
      write(width - right + 5, end.at, end.name.slice(0, 14), { fill: COLOURS[end.form] });
    });
    const rows = lines[0].values.map((_, layer) => [layer, ...lines.map((line) => shown(line.values[layer], 2))]);
    const table = tableOf(["layer", ...lines.map((line) => line.name)], rows);
    const numbers = make("details", {}, make("summary", {}, "Numbers"), table);
    return make("figure", {}, make("figcaption", {}, title), svg, numbers);
  }

  function openViewer(data) {
    runs = JSON.parse(data.textContent);
    const actions = { run: chooseRun, style: chooseStyle, filter: chooseFilter, row: chooseRow };
    const act = (name) => actions[name](byId(name).value);
    for (const name of Object.keys(actions)) byId(name).addEventListener("change", () => act(name));
    // A link in the findings opens its style and the head that it names.
    const openAt = ({ dataset }) => {
      for (const name of ["run", "style"]) {
        byId(name).value = [...byId(name).options].find(({ text }) => text === dataset[name])?.value ?? 0;
        act(name);
      }
      chooseHead(...dataset.head.split(".").map(Number));
    };
    document.querySelectorAll("a[data-head]").forEach((link) => link.addEventListener("click", () => openAt(link)));
    byId("map").addEventListener("change", () => {
      const [form, minus = null] = byId("map").value.split(",").map(Number);
      chosen.map = { form, minus };
      colourGrid();
    });
    const step = (by) => {
      byId("row").selectedIndex += by;
      chooseRow(byId("row").value);
    };
    byId("back").addEventListener("click", () => step(-1));
    byId("on").addEventListener("click", () => step(1));
    byId("grid").addEventListener("keydown", moveInGrid);
    byId("grid").addEventListener("click", ({ target }) => target.dataset.layer && chooseCell(target));
    window.addEventListener("resize", drawStrips);
    byId("body").hidden = false;
    fill(byId("run"), runs.map((run, place) => [place, run.name]));
    byId("run").parentElement.hidden = runs.length < 2;
    chooseRun(0);
  }

  function start() {
    document.querySelectorAll("main table").forEach(makeSortable);
    if (byId("data")) openViewer(byId("data"));
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
