"use strict";
// Plots take their colors from the page's own variables, so that both color schemes fit.
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function themed(figure) {
  const axis = (given) => ({
    gridcolor: css("--rule"), linecolor: css("--rule"), zeroline: false, automargin: true,
    fixedrange: true, ...given,
  });
  const traces = figure.traces.map(({ arm, ...trace }) => ({
    type: "scatter", ...trace,
    marker: { ...trace.marker, color: css("--" + arm) },
    line: { ...trace.line, color: css("--" + arm) },
    ...(trace.error_x && { error_x: { ...trace.error_x, color: css("--" + arm), thickness: 2 } }),
  }));
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
    font: { family: "system-ui, sans-serif", size: 13, color: css("--ink") },
    margin: { l: 10, r: 16, t: figure.layout.showlegend === false ? 8 : 34, b: 10 }, hovermode: "closest",
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    ...figure.layout, xaxis: axis(figure.layout.xaxis), yaxis: axis(figure.layout.yaxis),
  };
  return [traces, layout];
}

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
