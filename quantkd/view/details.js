// What one token shows: the table of alternatives, in the tooltip beside it and in the panel.
const tip = document.getElementById("tip");
const panel = document.getElementById("panel");
const isDocked = window.matchMedia("(max-width: 1099px)"); // where the panel lies at the foot of the window

/** An element with attributes and children; text stays text, whatever it holds. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function showPieces(pieces) {
  return pieces.map((piece) => piece.text ?? make("span", { class: "sign" }, piece.sign));
}

/** A token as nodes, by itself, with signs for what would not be seen. */
function showToken(token) {
  return showPieces(spell(token, true));
}

function showKl(kl) {
  return make("span", { class: `chip k${colourClass(kl)}` }, formatKl(kl));
}

function tokenHead(row, place) {
  const whole = wholeCharacter(row.tokens, place);
  return make(
    "div",
    { class: "token-head" },
    make("p", { class: "token-name" }, make("bdi", {}, ...showToken(row.tokens[place]))),
    make(
      "p",
      { class: "note" },
      `row ${row.index}, token ${place + 1} of ${row.tokens.length}${whole ? `, part of “${spell(whole.text).map((piece) => piece.text ?? piece.sign).join("")}”` : ""}`,
    ),
    make(
      "p",
      { class: "token-kl" },
      "KL ",
      ...STUDENTS.flatMap((student) => [make("span", { class: "label" }, `${student} `), showKl(row[student][place]), " "]),
    ),
  );
}

/** The cell of a probability, with a bar behind the number. */
function shareCell(model, share, isFirst) {
  const cell = make("td", { class: `share ${model}` }, formatShare(share));
  if (isFirst) cell.append(make("span", { class: "first", "aria-label": "first choice" }, "●"));
  cell.style.setProperty("--share", `${100 * (share ?? 0)}%`);
  return cell;
}

function alternativesTable(row, place, limit) {
  const all = row.alternativesAt(place);
  const shown = all.filter((entry, at) => at < limit || entry.inText || entry.first.before || entry.first.after);
  const body = make("tbody");
  for (const entry of shown) {
    const name = make("th", { scope: "row" }, make("bdi", {}, ...showToken(entry.token)));
    if (entry.inText) name.append(make("span", { class: "tag" }, "in the text"));
    const cells = Object.keys(TITLES).map((model) => shareCell(model, entry[model], entry.first[model]));
    body.append(make("tr", {}, name, ...cells));
  }
  const left = Object.keys(TITLES).map((model) => {
    const share = Math.max(0, 1 - shown.reduce((sum, entry) => sum + (entry[model] ?? 0), 0));
    return shareCell(model, share < 5e-4 ? 0 : share, false);
  });
  body.append(make("tr", { class: "left" }, make("th", { scope: "row" }, "all others"), ...left));
  const heads = ["Token", ...Object.values(TITLES)].map((title) => make("th", { scope: "col" }, title));
  const key = make("caption", { class: "note" }, "Probabilities at this place; ● first choice, – not stored");
  return make("table", { class: "alternatives" }, key, make("thead", {}, make("tr", {}, ...heads)), body);
}

/** The heart of it as a sentence, which screen readers speak when a token is reached. */
function sentence(row, place) {
  const top = row.alternativesAt(place)[0];
  return (
    `${quote(row.tokens[place])}: KL ${formatKl(row.before[place])} before, ${formatKl(row.after[place])} after. ` +
    `The teacher's first choice is ${quote(top.token)} at ${formatShare(top.teacher)}; ` +
    `before ${formatShare(top.before)}, after ${formatShare(top.after)}.`
  );
}

function showPanel(row, place) {
  document.getElementById("hint").hidden = true;
  document.getElementById("sentence").textContent = sentence(row, place);
  document.getElementById("details").replaceChildren(tokenHead(row, place), alternativesTable(row, place, Infinity));
  panel.classList.add("open");
}

let tipTimer = 0;
let tipOwner = null; // the token that the tooltip belongs to

function hideTip(delay = 0) {
  clearTimeout(tipTimer);
  tipTimer = setTimeout(() => {
    tip.hidden = true;
  }, delay);
}

function showTip(element, row, place) {
  clearTimeout(tipTimer);
  tipOwner = element;
  tip.replaceChildren(tokenHead(row, place), alternativesTable(row, place, 5));
  tip.hidden = false;
  placeTip();
}

/** The tooltip stands above its token, so that the line below can be read on, or below it; never over the panel. */
function placeTip() {
  if (tip.hidden) return;
  const element = tipOwner;
  const anchor = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const edge = isDocked.matches ? document.documentElement.clientWidth - 8 : rowsElement.getBoundingClientRect().right;
  const room = edge - width;
  const above = anchor.top - height - 8;
  tip.style.left = `${Math.max(8, Math.min(anchor.left - 12, room))}px`;
  tip.style.top = `${above >= 8 ? above : Math.min(anchor.bottom + 8, window.innerHeight - height - 8)}px`;
}

window.addEventListener("scroll", placeTip, { passive: true });
tip.addEventListener("pointerenter", () => clearTimeout(tipTimer));
tip.addEventListener("pointerleave", () => hideTip(100));

function closePanel() {
  panel.classList.remove("open");
}

document.getElementById("close").addEventListener("click", () => {
  lastFocused?.focus({ preventScroll: true }); // which opens it again
  closePanel();
});
