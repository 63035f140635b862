// What one token shows: the table of alternatives, in the tooltip beside it and in the panel.
const tip = document.getElementById("tip");
const panel = document.getElementById("panel");
const isDocked = window.matchMedia("(max-width: 1099px)"); // where the panel is at the foot of the window
let tipTimer = 0;
let tipOwner = null; // the token that the tooltip belongs to

/** An element, its attributes if the first argument is an object, and its children. Text stays text. */
function make(selector, ...children) {
  const [name, ...classes] = selector.split(".");
  const element = document.createElement(name);
  element.classList.add(...classes);
  const attributes = children[0]?.constructor === Object ? children.shift() : {};
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function showPieces(pieces) {
  return pieces.map((piece) => piece.text ?? make("span.sign", piece.sign));
}

/** A token by itself, with signs for what would be invisible. */
function showToken(token) {
  return make("bdi", ...showPieces(spell(token, true)));
}

function showKl(kl) {
  return make(`span.chip.k${colorClass(kl)}`, formatKl(kl));
}

function tokenHead(row, place) {
  const whole = wholeCharacter(row.tokens, place);
  const part = whole ? `, part of ${quote(whole.text)}` : "";
  const kls = STUDENTS.flatMap((student) => [make("span.label", `${student} `), showKl(row[student][place]), " "]);
  return make(
    "div",
    make("p.token-name", showToken(row.tokens[place])),
    make("p.note", `row ${row.index}, token ${place + 1} of ${row.tokens.length}${part}`),
    make("p.token-kl", "KL ", ...kls),
  );
}

/** The cell of a probability, with a bar behind the number. */
function shareCell(model, share, isFirst) {
  const dot = isFirst ? make("span.first", { "aria-label": "first choice" }, "●") : null;
  const cell = make(`td.share.${model}`, formatShare(share), dot);
  cell.style.setProperty("--share", `${100 * (share ?? 0)}%`);
  return cell;
}

function headRow(titles) {
  return make("thead", make("tr", ...titles.map((title) => make("th", { scope: "col" }, title))));
}

function alternativesTable(row, place, limit) {
  const models = Object.keys(TITLES);
  const all = alternativesAt(row, place);
  const shown = all.filter((entry, at) => at < limit || entry.inText || entry.first.before || entry.first.after);
  const lines = shown.map((entry) => {
    const tag = entry.inText ? make("span.tag", "in the text") : null;
    const shares = models.map((model) => shareCell(model, entry[model], entry.first[model]));
    return make("tr", make("th", { scope: "row" }, showToken(entry.token), tag), ...shares);
  });
  const left = models.map((model) => {
    const share = 1 - shown.reduce((sum, entry) => sum + (entry[model] ?? 0), 0);
    return shareCell(model, share < 5e-4 ? 0 : share, false);
  });
  lines.push(make("tr.left", make("th", { scope: "row" }, "all others"), ...left));
  const key = make("caption.note", "Probabilities at this place; ● first choice, – not stored");
  return make("table.alternatives", key, headRow(["Token", ...Object.values(TITLES)]), make("tbody", ...lines));
}

/** The main figures in a sentence, which screen readers speak when a token is reached. */
function sentence(row, place) {
  const top = alternativesAt(row, place)[0];
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

function showTip(element, row, place) {
  clearTimeout(tipTimer);
  tipOwner = element;
  tip.replaceChildren(tokenHead(row, place), alternativesTable(row, place, 5));
  tip.hidden = false;
  placeTip();
}

function hideTip(delay = 0) {
  clearTimeout(tipTimer);
  tipTimer = setTimeout(() => (tip.hidden = true), delay);
}

/** The tooltip is above its token, or below it if there is no space above; it never covers the panel. */
function placeTip() {
  if (tip.hidden) return;
  const anchor = tipOwner.getClientRects()[0] ?? tipOwner.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const edge = isDocked.matches ? document.documentElement.clientWidth - 8 : rowsElement.getBoundingClientRect().right;
  const above = anchor.top - height - 8;
  tip.style.left = `${Math.max(8, Math.min(anchor.left - 12, edge - width))}px`;
  tip.style.top = `${above >= 8 ? above : Math.min(anchor.bottom + 8, window.innerHeight - height - 8)}px`;
}

window.addEventListener("scroll", placeTip, { passive: true });
tip.addEventListener("pointerenter", () => clearTimeout(tipTimer));
tip.addEventListener("pointerleave", () => hideTip(100));
document.getElementById("close").addEventListener("click", () => {
  lastFocused?.focus({ preventScroll: true }); // which opens it again
  panel.classList.remove("open");
});
