const charts = JSON.parse(document.getElementById("charts").textContent);
const style = getComputedStyle(document.documentElement);

// Colours are written as var(--name): the page has a light and a dark set.
function themed(value) {
  if (typeof value === "string") {
    return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
  }
  if (Array.isArray(value)) return value.map(themed);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, themed(entry)]));
}

function layout(chart) {
  const axis = { automargin: true, gridcolor: "var(--rule)", linecolor: "var(--rule)", zeroline: false };
  const axes = Object.entries(chart.layout).filter(([key]) => /^[xy]axis/.test(key));
  const menus = (chart.layout.updatemenus || []).map((menu) => ({
    ...menu, bgcolor: "var(--card)", bordercolor: "var(--rule)", font: { size: 12 }, pad: { b: 6 },
  }));
  return themed({
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: "var(--soft)" },
    hoverlabel: { bgcolor: "var(--card)", bordercolor: "var(--rule)", font: { color: "var(--ink)" }, align: "left" },
    margin: { l: 52, r: 14, t: 34, b: 44 },
    height: chart.height,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    // On a phone, a finger on a chart scrolls the page.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...chart.layout,
    ...Object.fromEntries(axes.map(([key, own]) => [key, { ...axis, ...own }])),
    updatemenus: menus,
  });
}

function drawOne(chart) {
  const shown = chart.name === "front" ? frontFigure(chart) : chart;
  const config = { responsive: true, displayModeBar: false };
  return Plotly.react(chart.name, themed(shown.data), layout(shown), config);
}

function drawFront() {
  drawOne(charts.find((chart) => chart.name === "front"));
}

function draw() {
  return Promise.all(charts.map(drawOne));
}

setUpFront();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw().then(() => { document.body.dataset.drawn = charts.length; });
