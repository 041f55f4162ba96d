
const FIGURES = JSON.parse(document.getElementById("figures")?.textContent ?? "{}");

// A place shows one figure of several: which one, its control decides.
function show(place) {
  const figure = FIGURES[place.dataset.figure];
  place.nextElementSibling.hidden = !!figure;
  place.hidden = !figure;
  place.dataset.label ??= place.getAttribute("aria-label");
  const chosen = document.querySelector(`[data-plot="${place.id}"]`)?.selectedOptions[0].text
    ?? place.dataset.figure.replace(`${place.dataset.stem}-`, "") + " images per class";
  place.setAttribute("aria-label", `${place.dataset.label}: ${chosen}`);
  if (figure) Plotly.react(place, ...themed(figure), { displayModeBar: false, responsive: true });
  tell(place, figure);
}

// The numbers of a figure as text, for who cannot see the marks or hover over them.
function tell(place, figure) {
  const numbers = place.closest("figure").querySelector("details");
  numbers.hidden = !figure;
  const rows = (figure?.traces ?? []).flatMap((trace) => (trace.x ?? []).map((x, number) => {
    const row = document.createElement("li");
    const said = trace.text?.[number] ?? `${x}: ${(+trace.y[number]).toFixed(1)}`;
    row.innerHTML = `${trace.name}: ${said}`; // escaped where the figure was made
    return row;
  }));
  numbers.querySelector("ul").replaceChildren(...rows);
}

function showAll() {
  document.querySelectorAll(".plot[data-figure]").forEach(show);
}

for (const select of document.querySelectorAll("select[data-plot]")) {
  select.addEventListener("change", () => {
    const place = document.getElementById(select.dataset.plot);
    place.dataset.figure = select.value;
    show(place);
  });
}

// Buttons of a group show the parts that carry their value, and hide the others.
for (const group of document.querySelectorAll(".choices[data-group]")) {
  const buttons = [...group.querySelectorAll("button")];
  const choose = (chosen) => {
    buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === chosen)));
    for (const part of document.querySelectorAll(`[data-part="${group.dataset.group}"]`)) {
      part.hidden = part.dataset.value !== chosen.dataset.value;
    }
    for (const place of document.querySelectorAll(`.plot[data-follows="${group.dataset.group}"]`)) {
      place.dataset.figure = `${place.dataset.stem}-${chosen.dataset.value}`;
      show(place);
    }
  };
  buttons.forEach((button) => button.addEventListener("click", () => choose(button)));
}

function sortBy(head) {
  const table = head.closest("table");
  const column = [...head.parentElement.children].indexOf(head);
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.children[column].dataset.value ?? row.children[column].textContent;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return down ? -order : order;
  });
  table.tBodies[0].append(...rows);
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

const large = document.getElementById("sheet-large");
for (const button of document.querySelectorAll(".thumbs button")) {
  button.addEventListener("click", () => {
    const small = button.querySelector("img");
    const image = new Image(small.naturalWidth * (small.naturalWidth < innerWidth / 2 ? 2 : 1));
    Object.assign(image, { src: small.src, alt: small.alt });
    large.querySelector(".scroll").replaceChildren(image);
    large.showModal();
  });
}
large?.addEventListener("click", (event) => {
  if (event.target === event.currentTarget) event.currentTarget.close();
});

showAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showAll);
