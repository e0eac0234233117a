"use strict";
(() => {
  const root = document.documentElement;
  const json = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = json("figures");
  const heads = json("head-data");
  const toggle = document.getElementById("theme");
  const chooser = document.getElementById("head");
  const config = { displayModeBar: false, responsive: true };

  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  /** Mixes a color from three, for lines that have an order. */
  const ramp = (share) => {
    const stops = ["--ramp-a", "--ramp-b", "--ramp-c"].map(color);
    const place = share * 2;
    const left = Math.min(1, Math.floor(place));
    const channel = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
    const mixed = [0, 1, 2].map((i) => {
      const [a, b] = [channel(stops[left], i), channel(stops[left + 1], i)];
      return Math.round(a + (b - a) * (place - left));
    });
    return `rgb(${mixed.join(",")})`;
  };

  /** Replaces the names of CSS variables in the data by the theme's colors. */
  const themed = (value) => {
    if (typeof value === "string" && value.startsWith("--")) {
      return value.startsWith("--ramp:") ? ramp(Number(value.slice(7))) : color(value);
    }
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object" && !ArrayBuffer.isView(value)) {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v)]));
    }
    return value;
  };

  const axis = (own) => ({
    automargin: true,
    gridcolor: color("--rule"),
    linecolor: color("--rule"),
    zerolinecolor: color("--rule"),
    fixedrange: true,
    ...own,
    title: { standoff: 10, font: { size: 13, color: color("--soft") }, ...own.title },
  });

  const draw = (id, data, layout) => {
    const font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: color("--ink") };
    const whole = {
      font,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 8, r: 8, t: 28, b: 8 },
      dragmode: false,
      hoverlabel: { bgcolor: color("--paper"), bordercolor: color("--rule"), font },
      ...themed(layout),
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", ...layout.legend },
      xaxis: axis(themed(layout.xaxis)),
      yaxis: axis(themed(layout.yaxis)),
    };
    return Plotly.react(id, themed(data), whole, config);
  };

  /** Decodes a square matrix of bytes in base64 into rows, each byte through a function. */
  const matrix = (text, size, value) => {
    const bytes = atob(text);
    return Array.from({ length: size }, (_, row) =>
      Array.from({ length: size }, (_, column) => value(bytes.charCodeAt(row * size + column))));
  };

  const plain = { showgrid: false, zeroline: false, constrain: "domain" };
  const square = {
    margin: { l: 8, r: 8, t: 8, b: 8 },
    xaxis: plain,
    yaxis: { ...plain, autorange: "reversed", scaleanchor: "x" },
  };
  const bar = { thickness: 10, outlinewidth: 0, len: 1 };
  const ticks = [0, 0.05, 0.2, 0.5, 1];

  const showHead = () => {
    const head = heads[Number(chooser.value)];
    const trace = (z, own) => ({
      type: "heatmap", z, hoverongaps: false,
      hovertemplate: "query %{y}, key %{x}: %{customdata:.4f}<extra></extra>", ...own,
    });
    for (const kind of ["dense", "pruned"]) {
      draw(`head-${kind}`, [trace(matrix(head[kind], head.tokens, (b) => b / 255), {
        customdata: matrix(head[kind], head.tokens, (b) => (b / 255) ** 2),
        zmin: 0, zmax: 1, colorscale: [[0, "--map-low"], [1, "--map-high"]],
        colorbar: { ...bar, tickvals: ticks.map(Math.sqrt), ticktext: ticks.map(String) },
      })], square);
    }
    const change = matrix(head.difference, head.tokens, (b) => ((b - 128) / 127) * head.largest);
    const most = head.largest || 1;
    draw("head-difference", [trace(change, {
      customdata: change, zmin: -most, zmax: most,
      colorscale: [[0, "--fell"], [0.5, "--map-low"], [1, "--rose"]],
      colorbar: { ...bar, nticks: 5, tickformat: "~g" },
    })], square);
    document.getElementById("head-says").textContent = head.says;
    for (const [kind, name] of [["dense", "Dense"], ["pruned", "Pruned"], ["difference", "Pruned minus dense"]]) {
      document.getElementById(`head-${kind}`).setAttribute("aria-label", `${name}: ${head.says}`);
    }
  };

  const drawAll = () => {
    for (const [id, figure] of Object.entries(figures)) draw(id, figure.data, figure.layout);
    if (chooser) showHead();
  };

  const system = matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    toggle.setAttribute("aria-pressed", String(dark));
    drawAll();
  };
  toggle.addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));
  system.addEventListener("change", (event) => setTheme(event.matches));
  if (chooser) chooser.addEventListener("change", showHead);
  setTheme(system.matches);
})();
