// The page as a whole: sorting, filtering, folding, the theme, and the list of the worst tokens.
const SORTS = {
  after: (row) => -row.means.after,
  before: (row) => -row.means.before,
  worst: (row) => -Math.max(0, ...row.after),
  gain: (row) => row.means.after - row.means.before,
  loss: (row) => row.means.before - row.means.after,
  index: (row) => row.index,
};
const filterInput = document.getElementById("filter");
const sortSelect = document.getElementById("sort");
const themeButton = document.getElementById("theme");

function sortRows() {
  const key = SORTS[sortSelect.value];
  const sorted = [...ROWS].sort((one, other) => key(one) - key(other) || one.index - other.index);
  rowsElement.append(...sorted.map((row) => row.element));
}

function filterRows() {
  const wanted = filterInput.value.trim().toLowerCase();
  for (const row of ROWS) row.element.hidden = !row.search.includes(wanted);
  const shown = ROWS.filter((row) => !row.element.hidden).length;
  const count = shown === ROWS.length ? `${shown} rows` : `${shown} of ${ROWS.length} rows`;
  document.getElementById("count").textContent = count;
  document.getElementById("nothing").hidden = shown > 0;
}

function goTo(row, place) {
  if (row.element.hidden) {
    filterInput.value = "";
    filterRows();
  }
  row.element.querySelector(".body").open = true;
  if (row.element.querySelector(".table")) row.element.querySelector(".as-table").click();
  focusToken(row.elements.after[place]);
  row.elements.after[place].scrollIntoView({ block: "center" });
}

function listWorst() {
  const all = ROWS.flatMap((row) => row.after.map((kl, place) => ({ row, place, kl })));
  for (const { row, place, kl } of all.sort((one, other) => other.kl - one.kl).slice(0, 12)) {
    const lead = join(row.tokens.slice(Math.max(0, place - 8), place)).replace(/\s+/g, " ");
    const mark = make(`mark.k${colorClass(kl)}`, showToken(row.tokens[place]));
    const note = `row ${row.index}, KL ${formatKl(row.before[place])} → ${formatKl(kl)}`;
    const snippet = make("span.snippet", { dir: "auto" }, ...showPieces(spell(lead)), mark);
    const button = make("button", { type: "button" }, snippet, make("span.note", note));
    button.addEventListener("click", () => goTo(row, place));
    document.getElementById("worst").append(make("li", button));
  }
}

function setTheme(isDark) {
  document.documentElement.style.colorScheme = isDark ? "dark" : "light";
  themeButton.setAttribute("aria-pressed", String(isDark));
}

const systemTheme = window.matchMedia("(prefers-color-scheme: dark)");
const followSystem = () => setTheme(systemTheme.matches);
systemTheme.addEventListener("change", followSystem);
themeButton.addEventListener("click", () => {
  systemTheme.removeEventListener("change", followSystem); // the reader has chosen
  setTheme(document.documentElement.style.colorScheme !== "dark");
});
document.getElementById("fold").addEventListener("click", (event) => {
  const isFolded = event.currentTarget.getAttribute("aria-pressed") === "false";
  event.currentTarget.setAttribute("aria-pressed", String(isFolded));
  for (const row of ROWS) row.element.querySelector(".body").open = !isFolded;
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  hideTip();
  panel.classList.remove("open");
});
sortSelect.addEventListener("change", sortRows);
filterInput.addEventListener("input", filterRows);

followSystem();
rowsElement.append(...ROWS.map(rowElement));
sortRows();
filterRows();
listWorst();
