// The rows: their tokens before and after side by side, the strips above them, their tables, and the keyboard.
const rowsElement = document.getElementById("rows");
const PLACES = new WeakMap(); // token element -> { row, student, place }
let lastFocused = null;

/** The KL of a row from left to right as a band of colours; of a long row the highest of each step. */
function strip(row, student) {
  const steps = Math.min(row.tokens.length, 240);
  const stops = [];
  for (let step = 0; step < steps; step += 1) {
    const from = Math.floor((step * row.tokens.length) / steps);
    const to = Math.floor(((step + 1) * row.tokens.length) / steps);
    const kl = Math.max(...row[student].slice(from, to));
    stops.push(`var(--s${colourClass(kl)}) ${(100 * step) / steps}% ${(100 * (step + 1)) / steps}%`);
  }
  const band = make("span", { class: "band" });
  if (stops.length) band.style.setProperty("background-image", `linear-gradient(to right, ${stops.join(",")})`);
  return make("span", { class: "strip" }, make("span", { class: "label" }, student), band);
}

/** A token in running text. Of a character that is split over tokens, the first shows all of it. */
function showInText(row, place) {
  const whole = wholeCharacter(row.tokens, place);
  if (whole === null) return showPieces(spell(row.tokens[place]));
  return whole.begins ? showPieces(spell(whole.text)) : showPieces([{ sign: "‥" }]);
}

function tokenElement(row, student, place) {
  const kl = row[student][place];
  const other = row.firsts[student][place] === 0 ? "" : " other";
  const token = row.tokens[place];
  const spaces = typeof token === "string" && / {2}|\s$/.test(token) ? " spaces" : "";
  const element = make("span", { class: `token k${colourClass(kl)}${other}${spaces}`, role: "option", tabindex: "-1" }, ...showInText(row, place));
  element.dir = "auto";
  PLACES.set(element, { row, student, place });
  return element;
}

function tokenList(row, student) {
  const list = make("div", { class: "tokens", role: "listbox", "aria-orientation": "horizontal", "aria-label": `Tokens of row ${row.index}, ${student}` });
  const contexts = new Map(row.contexts.filter(([place]) => place > 0 && place < row.tokens.length));
  row.elements[student] = row.tokens.map((token, place) => {
    if (contexts.has(place)) list.append(make("span", { class: "between", role: "presentation" }, contexts.get(place)));
    const element = tokenElement(row, student, place);
    list.append(element);
    const breaks = typeof token === "string" ? Math.min(2, token.split("\n").length - 1) : 0;
    for (let line = 0; line < breaks; line += 1) list.append(make("br"));
    return element;
  });
  row.elements[student][0]?.setAttribute("tabindex", "0");
  return list;
}

function studentView(row, student) {
  const title = make("h3", {}, TITLES[student], " ", make("span", { class: "note" }, `mean ${formatKl(row.means[student])}`));
  return make("section", { class: `view ${student}`, "aria-label": `Row ${row.index}, ${student}` }, title, tokenList(row, student));
}

/** The row as a table of numbers, a line a token. */
function rowTable(row) {
  const titles = ["#", "Token", "KL before", "KL after", "Teacher's first choice", "Teacher", "Before", "After"];
  const body = make("tbody");
  row.tokens.forEach((token, place) => {
    const top = row.alternativesAt(place)[0];
    body.append(
      make(
        "tr",
        {},
        make("td", {}, String(place + 1)),
        make("th", { scope: "row" }, make("bdi", {}, ...showToken(token))),
        make("td", {}, showKl(row.before[place])),
        make("td", {}, showKl(row.after[place])),
        make("td", { class: "name" }, make("bdi", {}, ...showToken(top.token))),
        ...Object.keys(TITLES).map((model) => make("td", {}, formatShare(top[model]))),
      ),
    );
  });
  const head = make("thead", {}, make("tr", {}, ...titles.map((title) => make("th", { scope: "col" }, title))));
  const name = `Row ${row.index} as a table`;
  return make("div", { class: "table", role: "region", tabindex: "0", "aria-label": name }, make("table", {}, head, body));
}

function promptElement(row) {
  const text = row.contexts.filter(([place]) => place === 0).map(([, prompt]) => prompt)[0];
  if (text === undefined) return null;
  const end = text.replace(/\s+/g, " ").trim();
  const preview = end.length > 160 ? `… ${end.slice(-158).replace(/^\S{0,20}\s/, "")}` : end;
  return make(
    "details",
    { class: "prompt" },
    make("summary", {}, make("span", { class: "label" }, "Prompt"), " ", make("bdi", { class: "preview" }, preview)),
    make("p", { class: "text", dir: "auto" }, text),
  );
}

function changeText({ before, after }) {
  if (!(before > 0)) return "";
  if (after > 10 * before) return "over 10 times";
  const change = Math.round(100 * (after / before - 1));
  return change <= 0 ? `−${-change}%` : `+${change}%`;
}

function rowElement(row) {
  row.elements = {};
  const views = make("div", { class: "views" }, ...STUDENTS.map((student) => studentView(row, student)));
  const toggle = make("button", { type: "button", class: "as-table", "aria-pressed": "false" }, "As a table");
  toggle.addEventListener("click", () => {
    const asTable = toggle.getAttribute("aria-pressed") === "false";
    toggle.setAttribute("aria-pressed", String(asTable));
    views.hidden = asTable;
    if (asTable) views.after(rowTable(row));
    else row.element.querySelector(".table").remove();
  });
  const facts = [`${row.tokens.length} ${row.tokens.length === 1 ? "token" : "tokens"}`, ...(row.cut ? ["cut short"] : [])].join(", ");
  const summary = make(
    "summary",
    {},
    make("h2", { id: `row-${row.index}` }, `Row ${row.index}`),
    make(
      "span",
      { class: "means" },
      make("span", { class: "label" }, "KL "),
      make("span", { class: "was" }, formatKl(row.means.before)),
      " → ",
      make("b", {}, formatKl(row.means.after)),
      make("span", { class: `change ${row.means.after > row.means.before ? "up" : "down"}` }, changeText(row.means)),
    ),
    make("span", { class: "facts" }, facts),
    make("span", { class: "strips", "aria-hidden": "true" }, ...STUDENTS.map((student) => strip(row, student))),
  );
  const body = make("details", { class: "body", open: true }, summary, promptElement(row), views, make("p", { class: "actions" }, toggle));
  row.element = make("article", { class: "row", "aria-labelledby": `row-${row.index}` }, body);
  return row.element;
}

function twins({ row, place }) {
  return STUDENTS.map((student) => row.elements[student][place]);
}

function focusToken(element) {
  const { row, student } = PLACES.get(element);
  for (const sibling of row.elements[student]) sibling.tabIndex = -1;
  element.tabIndex = 0;
  element.focus({ preventScroll: true });
  element.scrollIntoView({ block: "nearest", inline: "nearest" });
}

/** The token in the line above (-1) or below (1) that lies nearest. */
function inNextLine(elements, place, direction) {
  const start = elements[place].getBoundingClientRect();
  const centre = start.left + start.width / 2;
  let best = null;
  let line = null;
  for (let at = place + direction; elements[at]; at += direction) {
    const box = elements[at].getBoundingClientRect();
    if (direction * (box.top - start.top) < start.height / 2) continue;
    if (line !== null && Math.abs(box.top - line) > start.height / 2) break;
    line = box.top;
    const distance = Math.abs(box.left + box.width / 2 - centre);
    if (best === null || distance < best.distance) best = { at, distance };
  }
  return best?.at ?? place;
}

function nextHigh(kls, place, direction) {
  for (let at = place + direction; at >= 0 && at < kls.length; at += direction) if (kls[at] >= HIGH_KL) return at;
  return place;
}

function targetOf(key, { row, student, place }) {
  const elements = row.elements[student];
  switch (key) {
    case "ArrowLeft": return elements[Math.max(0, place - 1)];
    case "ArrowRight": return elements[Math.min(elements.length - 1, place + 1)];
    case "ArrowUp": return elements[inNextLine(elements, place, -1)];
    case "ArrowDown": return elements[inNextLine(elements, place, 1)];
    case "Home": return elements[0];
    case "End": return elements.at(-1);
    case "n": case "N": return elements[nextHigh(row[student], place, 1)];
    case "p": case "P": return elements[nextHigh(row[student], place, -1)];
    case "Enter": case " ": return row.elements[student === "before" ? "after" : "before"][place];
    default: return null;
  }
}

function tokenOf(event) {
  const element = event.target instanceof Element ? event.target.closest(".token") : null;
  return element !== null && PLACES.has(element) ? element : null;
}

rowsElement.addEventListener("pointerover", (event) => {
  const element = tokenOf(event);
  if (element === null || event.pointerType === "touch") return;
  const at = PLACES.get(element);
  for (const twin of twins(at)) twin.classList.add("twin");
  showTip(element, at.row, at.place);
});
rowsElement.addEventListener("pointerout", (event) => {
  const element = tokenOf(event);
  if (element === null) return;
  for (const twin of twins(PLACES.get(element))) twin.classList.remove("twin");
  hideTip(150);
});
rowsElement.addEventListener("click", (event) => {
  const element = tokenOf(event);
  if (element !== null) focusToken(element);
});
rowsElement.addEventListener("focusin", (event) => {
  const element = tokenOf(event);
  if (element === null) return;
  const at = PLACES.get(element);
  lastFocused = element;
  element.setAttribute("aria-label", `${quote(at.row.tokens[at.place])}, KL ${formatKl(at.row[at.student][at.place])}`);
  element.setAttribute("aria-selected", "true");
  element.setAttribute("aria-describedby", "sentence");
  for (const twin of twins(at)) twin.classList.add("here");
  showPanel(at.row, at.place);
  if (isDocked.matches) hideTip();
  else showTip(element, at.row, at.place);
});
rowsElement.addEventListener("focusout", (event) => {
  const element = tokenOf(event);
  if (element === null) return;
  element.removeAttribute("aria-selected");
  element.removeAttribute("aria-describedby");
  for (const twin of twins(PLACES.get(element))) twin.classList.remove("here");
  hideTip(50);
});
rowsElement.addEventListener("keydown", (event) => {
  const element = tokenOf(event);
  if (element === null || event.ctrlKey || event.metaKey || event.altKey) return;
  const target = targetOf(event.key, PLACES.get(element));
  if (target === null) return;
  event.preventDefault();
  focusToken(target);
});
