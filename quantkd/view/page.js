// The page as a whole: sorting, filtering, folding, the theme, and the list of the worst tokens.
const SORTS = {
  after: (row) => -row.means.after,
  before: (row) => -row.means.before,
  worst: (row) => -(row.after[row.worst] ?? 0),
  gain: (row) => row.means.after - row.means.before,
  loss: (row) => row.means.before - row.means.after,
  index: (row) => row.index,
};
const WORST_TOKENS = 12;
const filterInput = document.getElementById("filter");
const sortSelect = document.getElementById("sort");

function sortRows() {
  const key = SORTS[sortSelect.value];
  const sorted = [...ROWS].sort((one, other) => key(one) - key(other) || one.index - other.index);
  rowsElement.append(...sorted.map((row) => row.element));
}

function filterRows() {
  const wanted = filterInput.value.trim().toLowerCase();
  let shown = 0;
  for (const row of ROWS) {
    row.element.hidden = !row.search.includes(wanted);
    shown += row.element.hidden ? 0 : 1;
  }
  const every = shown === ROWS.length ? `${shown} rows` : `${shown} of ${ROWS.length} rows`;
  document.getElementById("count").textContent = every;
  document.getElementById("nothing").hidden = shown > 0;
}

function goTo(row, place) {
  if (row.element.hidden) {
    filterInput.value = "";
    filterRows();
  }
  row.element.querySelector(".body").open = true;
  const button = row.element.querySelector(".as-table");
  if (button.getAttribute("aria-pressed") === "true") button.click();
  const element = row.elements.after[place];
  focusToken(element);
  element.scrollIntoView({ block: "center" });
}

function listWorst() {
  const all = ROWS.flatMap((row) => row.after.map((kl, place) => ({ row, place, kl })));
  const worst = all.sort((one, other) => other.kl - one.kl).slice(0, WORST_TOKENS);
  for (const { row, place } of worst) {
    const lead = join(row.tokens.slice(Math.max(0, place - 8), place)).replace(/\s+/g, " ");
    const button = make(
      "button",
      { type: "button" },
      make("span", { class: "snippet", dir: "auto" }, lead, make("mark", { class: `k${colourClass(row.after[place])}` }, ...showToken(row.tokens[place]))),
      make("span", { class: "note" }, `row ${row.index}, KL ${formatKl(row.before[place])} → ${formatKl(row.after[place])}`),
    );
    button.addEventListener("click", () => goTo(row, place));
    document.getElementById("worst").append(make("li", {}, button));
  }
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  document.getElementById("theme").setAttribute("aria-pressed", String(name === "dark"));
}

const systemTheme = window.matchMedia("(prefers-color-scheme: dark)");
let themeChosen = false;
systemTheme.addEventListener("change", () => {
  if (!themeChosen) setTheme(systemTheme.matches ? "dark" : "light");
});
document.getElementById("theme").addEventListener("click", () => {
  themeChosen = true;
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
});
document.getElementById("fold").addEventListener("click", (event) => {
  const folded = event.currentTarget.getAttribute("aria-pressed") === "false";
  event.currentTarget.setAttribute("aria-pressed", String(folded));
  for (const row of ROWS) row.element.querySelector(".body").open = !folded;
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  hideTip();
  closePanel();
});
sortSelect.addEventListener("change", sortRows);
filterInput.addEventListener("input", filterRows);

setTheme(systemTheme.matches ? "dark" : "light");
rowsElement.append(...ROWS.map(rowElement));
sortRows();
filterRows();
listWorst();
