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
    ...(trace.error_x && { error_x: { thickness: 2, ...trace.error_x, color: css("--" + arm) } }),
    ...(trace.error_y && { error_y: { ...trace.error_y, color: css("--" + arm), thickness: 1.5 } }),
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
