// Draws the charts when they come into view, in the page's colours. Plotly and the charts' data are in the page; plotly
// runs once the page can be read, because it is large.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts-data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  const drawn = new Map();

  function themed(layout) {
    const own = structuredClone(layout);
    const ink = colour("--ink"), line = colour("--line");
    own.paper_bgcolor = own.plot_bgcolor = "rgba(0, 0, 0, 0)";
    own.font = { ...own.font, color: ink, family: getComputedStyle(document.body).fontFamily, size: narrow.matches ? 11 : 13 };
    own.hoverlabel = { bgcolor: colour("--card"), bordercolor: line, font: { color: ink }, align: "left" };
    own.autosize = true;
    delete own.width;
    for (const key of new Set([...Object.keys(own), "xaxis", "yaxis"])) {
      if (/^[xy]axis\d*$/.test(key)) {
        own[key] = { ...own[key], gridcolor: line, zerolinecolor: line, linecolor: line };
      }
    }
    if (narrow.matches) own.dragmode = false; // dragging scrolls the page
    return own;
  }

  function broughtOut(data, method) {
    if (!method) return data;
    const others = data.filter((trace) => trace.legendgroup !== method).map((trace) => {
      const quiet = { ...trace, hoverinfo: "skip", hovertemplate: undefined };
      if (trace.fill || trace.mode === "markers") return { ...quiet, visible: false };
      return { ...quiet, line: { color: colour("--grey"), width: 0.7 }, opacity: 0.6 };
    });
    return [...others, ...data.filter((trace) => trace.legendgroup === method)]; // on top
  }

  function draw(figure) {
    const chart = charts[figure.dataset.chart];
    const choice = figure.querySelector("select.view"), method = figure.querySelector("select.method");
    const view = chart.views[choice ? choice.value : Object.keys(chart.views)[0]];
    const plot = figure.querySelector(".plot");
    drawn.set(figure, true);
    Plotly.react(plot, broughtOut(view.data, method ? method.value : ""), themed(view.layout), {
      displaylogo: false,
      responsive: true,
      showSendToCloud: false, // plotly's button that uploads a chart, and where it would go
      plotlyServerURL: "",
      modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
    });
  }

  function runPlotly() {
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
    }
  }, { rootMargin: "300px" });

  function start() {
    runPlotly();
    for (const figure of document.querySelectorAll("figure.chart")) {
      for (const select of figure.querySelectorAll("select")) select.addEventListener("change", () => draw(figure));
      seen.observe(figure);
    }
    for (const query of [dark, narrow]) {
      query.addEventListener("change", () => { for (const figure of drawn.keys()) draw(figure); });
    }
  }

  addEventListener("load", () => requestAnimationFrame(() => setTimeout(start)));
})();
