"use strict";
// Draws each chart of the page in the colours of its style sheet, again when these change with the light or dark mode.
const charts = [...document.querySelectorAll(".chart")].map((place) => {
  const figure = JSON.parse(place.nextElementSibling.textContent);
  for (const trace of figure.data) {
    // The label of each cell from the names of its row and column: written out, a page would hold them n × m times.
    if (trace.meta && trace.meta.rows) {
      trace.text = trace.meta.rows.map((row) => trace.meta.columns.map((column) => row + "<br>" + column));
    }
  }
  return { place, figure };
});
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const narrow = matchMedia("(max-width: 640px)");
const dark = matchMedia("(prefers-color-scheme: dark)");

function draw() {
  for (const { place, figure } of charts) {
    const layout = structuredClone(figure.layout);
    Object.assign(layout, { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" });
    layout.font = { ...layout.font, color: colour("text"), size: narrow.matches ? 11 : 13 };
    layout.hoverlabel = {
      align: "left", bgcolor: colour("surface"), bordercolor: colour("muted"), font: { color: colour("text"), size: 13 },
    };
    for (const [name, axis] of Object.entries(layout)) {
      if (/^[xy]axis\d*$/.test(name)) {
        Object.assign(axis, { gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("line") });
        axis.title = { ...axis.title, font: { color: colour("muted"), size: narrow.matches ? 11 : 13 } };
      }
    }
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("text") };
    if (narrow.matches && figure.data.some((trace) => trace.type === "heatmap")) {
      layout.yaxis.showticklabels = false; // no room for names; a touch shows them
    }
    for (const trace of figure.data) {
      if (trace.meta && trace.meta.colour) trace.line.color = colour(trace.meta.colour);
    }
    for (const shape of layout.shapes || []) {
      shape.line.color = colour("surface");
    }
    Plotly.react(place, structuredClone(figure.data), layout, {
      responsive: true, displaylogo: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
    });
  }
}
draw();
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
