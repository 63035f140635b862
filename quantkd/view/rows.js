// The rows: their tokens before and after side by side, the strips above them, their tables, and the keyboard.
const rowsElement = document.getElementById("rows");
const PLACES = new WeakMap(); // token element -> { row, student, place }
let lastFocused = null;

/** The KL of a row from left to right as a band of colors; of a long row the highest of each step. */
function strip(row, student) {
  const count = row.tokens.length;
  const steps = Math.min(count, 240);
  const parts = Array.from({ length: steps }, (_, step) => {
    const part = row[student].slice(Math.floor((step * count) / steps), Math.floor(((step + 1) * count) / steps));
    return make(`i.k${colorClass(Math.max(...part))}`);
  });
  return make("span.strip", make("span.label", student), make("span.band", ...parts));
}

/** A token in running text. Of a character that is split over tokens, the first shows all of it. */
function showInText(row, place) {
  const whole = wholeCharacter(row.tokens, place);
  if (whole === null) return showPieces(spell(row.tokens[place]));
  return showPieces(whole.begins ? spell(whole.text) : [{ sign: "‥" }]);
}

function tokenElement(row, student, place) {
  const token = row.tokens[place];
  const attributes = { role: "option", tabindex: place ? "-1" : "0", dir: "auto" };
  const element = make(`span.token.k${colorClass(row[student][place])}`, attributes, ...showInText(row, place));
  element.classList.toggle("other", row[`first_${student}`][place] !== 0);
  element.classList.toggle("spaces", typeof token === "string" && / {2}|\s$/.test(token));
  PLACES.set(element, { row, student, place });
  return element;
}

function studentView(row, student) {
  const contexts = new Map(row.contexts.filter(([place]) => place > 0 && place < row.tokens.length));
  const label = `Tokens of row ${row.index}, ${student}`;
  const list = make("div.tokens", { role: "listbox", "aria-orientation": "horizontal", "aria-label": label });
  row.elements[student] = row.tokens.map((token, place) => {
    if (contexts.has(place)) list.append(make("span.between", { role: "presentation" }, contexts.get(place)));
    const element = tokenElement(row, student, place);
    const breaks = typeof token === "string" ? Math.min(2, token.split("\n").length - 1) : 0;
    list.append(element, ...Array.from({ length: breaks }, () => make("br")));
    return element;
  });
  const title = make("h3", TITLES[student], " ", make("span.note", `mean ${formatKl(row.means[student])}`));
  return make(`section.view.${student}`, { "aria-label": `Row ${row.index}, ${student}` }, title, list);
}

/** The row as a table of numbers, one line per token. */
function rowTable(row) {
  const titles = ["#", "Token", "KL before", "KL after", "Teacher's first choice", "Teacher", "Before", "After"];
  const lines = row.tokens.map((token, place) => {
    const top = alternativesAt(row, place)[0];
    return make(
      "tr",
      make("td", String(place + 1)),
      make("th", { scope: "row" }, showToken(token)),
      ...STUDENTS.map((student) => make("td", showKl(row[student][place]))),
      make("td.name", showToken(top.token)),
      ...Object.keys(TITLES).map((model) => make("td", formatShare(top[model]))),
    );
  });
  const region = { role: "region", tabindex: "0", "aria-label": `Row ${row.index} as a table` };
  return make("div.table", region, make("table", headRow(titles), make("tbody", ...lines)));
}

function promptElement(row) {
  if (row.contexts[0]?.[0] !== 0) return null;
  const text = row.contexts[0][1];
  const end = text.replace(/\s+/g, " ").trim();
  const preview = end.length > 160 ? `… ${end.slice(-158).replace(/^\S{0,20}\s/, "")}` : end;
  const summary = make("summary", make("span.label", "Prompt"), " ", make("bdi.preview", preview));
  return make("details.prompt", summary, make("p.text", { dir: "auto" }, text));
}

function changeText({ before, after }) {
  if (!(before > 0)) return "";
  if (after > 10 * before) return "over 10 times";
  const change = Math.round(100 * (after / before - 1));
  return change <= 0 ? `−${-change}%` : `+${change}%`;
}

function rowElement(row) {
  row.elements = {};
  const views = make("div.views", ...STUDENTS.map((student) => studentView(row, student)));
  const toggle = make("button.as-table", { type: "button", "aria-pressed": "false" }, "As a table");
  toggle.addEventListener("click", () => {
    views.hidden = !views.hidden;
    toggle.setAttribute("aria-pressed", String(views.hidden));
    if (views.hidden) views.after(rowTable(row));
    else row.element.querySelector(".table").remove();
  });
  const count = row.tokens.length;
  const direction = row.means.after > row.means.before ? "up" : "down";
  const means = [
    make("span.label", "KL "),
    make("span.was", formatKl(row.means.before)),
    " → ",
    make("b", formatKl(row.means.after)),
    make(`span.change.${direction}`, changeText(row.means)),
  ];
  const summary = make(
    "summary",
    make("h2", { id: `row-${row.index}` }, `Row ${row.index}`),
    make("span.means", ...means),
    make("span.facts", `${count} ${count === 1 ? "token" : "tokens"}${row.cut ? ", cut short" : ""}`),
    make("span.strips", { "aria-hidden": "true" }, ...STUDENTS.map((student) => strip(row, student))),
  );
  const body = make("details.body", { open: "" }, summary, promptElement(row), views, make("p.actions", toggle));
  row.element = make("article.row", { "aria-labelledby": `row-${row.index}` }, body);
  return row.element;
}

function markTwins({ row, place }, name, on) {
  for (const student of STUDENTS) row.elements[student][place].classList.toggle(name, on);
}

function focusToken(element) {
  const { row, student } = PLACES.get(element);
  for (const sibling of row.elements[student]) sibling.tabIndex = -1;
  element.tabIndex = 0;
  element.focus({ preventScroll: true });
  element.scrollIntoView({ block: "nearest", inline: "nearest" });
}

/** The nearest token in the line above (-1) or below (1). */
function inNextLine(elements, place, direction) {
  const boxes = elements.map((element) => element.getBoundingClientRect());
  const from = boxes[place];
  const distances = boxes.map((box) => {
    const lines = Math.round((direction * (box.top - from.top)) / from.height);
    return lines > 0 ? 1e5 * lines + Math.abs(box.left + box.width / 2 - from.left - from.width / 2) : Infinity;
  });
  const nearest = Math.min(...distances);
  return nearest < Infinity ? distances.indexOf(nearest) : place;
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

/** Call `handle(element, its place, event)` for events of this type on a token. */
function onToken(type, handle) {
  rowsElement.addEventListener(type, (event) => {
    const element = event.target instanceof Element ? event.target.closest(".token") : null;
    if (PLACES.has(element)) handle(element, PLACES.get(element), event);
  });
}

onToken("pointerover", (element, at, event) => {
  if (event.pointerType === "touch") return;
  markTwins(at, "twin", true);
  showTip(element, at.row, at.place);
});
onToken("pointerout", (element, at) => {
  markTwins(at, "twin", false);
  hideTip(150);
});
onToken("click", focusToken);
onToken("focusin", (element, at) => {
  lastFocused = element;
  element.setAttribute("aria-label", `${quote(at.row.tokens[at.place])}, KL ${formatKl(at.row[at.student][at.place])}`);
  element.setAttribute("aria-selected", "true");
  element.setAttribute("aria-describedby", "sentence");
  markTwins(at, "here", true);
  showPanel(at.row, at.place);
  if (isDocked.matches) hideTip();
  else showTip(element, at.row, at.place);
});
onToken("focusout", (element, at) => {
  element.removeAttribute("aria-selected");
  element.removeAttribute("aria-describedby");
  markTwins(at, "here", false);
  hideTip(50);
});
onToken("keydown", (element, at, event) => {
  const target = event.ctrlKey || event.metaKey || event.altKey ? null : targetOf(event.key, at);
  if (target === null) return;
  event.preventDefault();
  focusToken(target);
});
