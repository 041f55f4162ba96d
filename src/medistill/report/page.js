
function drawAll() {
  const source = document.getElementById("figures");
  if (!source) return;
  for (const [name, figure] of Object.entries(JSON.parse(source.textContent))) {
    const place = document.getElementById("plot-" + name);
    if (place) {
      Plotly.react(place, ...themed(figure), { displayModeBar: false, responsive: true });
    }
  }
}

function openSheet() {
  const dialog = document.getElementById("sheet-large");
  const small = document.getElementById("sheet");
  const large = new Image(small.naturalWidth * (small.naturalWidth < innerWidth / 2 ? 2 : 1));
  Object.assign(large, { src: small.src, alt: small.alt });
  dialog.querySelector(".scroll").replaceChildren(large);
  dialog.showModal();
}

async function copyCommands() {
  const block = document.getElementById("commands");
  let done = true;
  try {
    await navigator.clipboard.writeText(block.textContent);
  } catch {
    // A page opened from a file may not reach the clipboard: select, and copy the old way.
    getSelection().selectAllChildren(block);
    done = document.execCommand("copy");
  }
  document.getElementById("copied").textContent = done ? "Copied." : "Selected: press Ctrl+C.";
}

drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
document.getElementById("sheet-open")?.addEventListener("click", openSheet);
document.getElementById("sheet-large")?.addEventListener("click", (event) => {
  if (event.target === event.currentTarget) event.currentTarget.close();
});
document.getElementById("copy").addEventListener("click", copyCommands);
