"use strict";
// The front: a point, a row of the table or the budget chooses a network, which the panel describes.
const front = JSON.parse(document.getElementById("front-data").textContent);
const chosenNow = { cost: front && front.cost, network: front && front.chosen, budget: null };
const STEPS = 200; // of the slider

function make(tag, text, properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, properties);
}

function short(number) {
  return number.toLocaleString("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
}

function range() {
  const { front: members, x } = front.costs[chosenNow.cost];
  return [x[members[0]], x[members[members.length - 1]]];
}

// The traces of the chosen cost, a ring around the chosen network, and the budget as a line.
function frontFigure(chart) {
  const { unit, x } = front.costs[chosenNow.cost];
  const network = front.networks[chosenNow.network];
  const ring = {
    type: "scatter", mode: "markers", x: [x[chosenNow.network]], y: [network.accuracy], hoverinfo: "skip",
    marker: { symbol: "circle-open", size: 24, color: "var(--ink)", line: { width: 2, color: "var(--ink)" } },
  };
  const line = {
    type: "line", xref: "x", yref: "paper", x0: chosenNow.budget, x1: chosenNow.budget, y0: 0, y1: 1,
    line: { color: "var(--soft)", width: 1, dash: "dot" },
  };
  return {
    ...chart,
    data: [...chart.data.filter((trace) => trace.meta === chosenNow.cost), ring],
    layout: { ...chart.layout, xaxis: { ...chart.layout.xaxis, title: { text: unit } }, shapes: [line] },
  };
}

// The most accurate network of the front within a budget.
function bestWithin(budget) {
  const { front: members, x } = front.costs[chosenNow.cost];
  return members.filter((place) => x[place] <= budget * (1 + 1e-9)).pop();
}

function moveSlider() {
  const [least, most] = range();
  const slider = document.getElementById("budget");
  const share = most > least ? (chosenNow.budget - least) / (most - least) : 1;
  slider.value = Math.ceil(Math.min(1, Math.max(0, share)) * STEPS - 1e-6);
  slider.disabled = most === least;
}

function showBudget() {
  const slider = document.getElementById("budget");
  const text = `at most ${short(chosenNow.budget)} ${front.costs[chosenNow.cost].unit}`;
  document.getElementById("budget-text").textContent = text;
  slider.setAttribute("aria-valuetext", `${text}: ${front.networks[chosenNow.network].architecture}`);
}

function showNetwork() {
  const network = front.networks[chosenNow.network];
  const panel = document.getElementById("network");
  const facts = make("dl", "", { className: "facts" });
  for (const [name, value] of network.facts) {
    const pair = facts.appendChild(make("div", ""));
    pair.append(make("dt", name), make("dd", value));
  }
  panel.replaceChildren(
    make("p", network.title, { className: "over" }),
    make("p", network.architecture, { className: "architecture" }),
    make("div", "", { className: "picture", innerHTML: network.drawing }), // our own drawing, escaped by draw()
    facts,
    make("p", front.costs[chosenNow.cost].standing[chosenNow.network]),
    make("p", network.note),
    make("p", network.how, { className: "how" }),
  );
  if (network.command) {
    const box = panel.appendChild(make("div", "", { className: "command" }));
    const button = make("button", "Copy", { type: "button", id: "copy" });
    button.setAttribute("aria-label", "Copy the command that exports this network");
    button.addEventListener("click", () => copy(button, box.firstChild));
    // A line breaks between words: elsewhere only in a word that is longer than the line.
    const words = network.command.split(" ").flatMap((word) => [" ", make("span", word)]).slice(1);
    box.append(make("code", ""), button);
    box.firstChild.append(...words);
  }
}

// Some browsers have no clipboard in a page from a file; there the selection is copied, or left selected.
async function copy(button, code) {
  let done = true;
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code);
    done = document.execCommand("copy");
  }
  button.textContent = done ? "Copied" : "Selected";
  setTimeout(() => { button.textContent = "Copy"; }, 1600);
}

function showMembers() {
  const { unit, front: members, x } = front.costs[chosenNow.cost];
  const table = document.querySelector(".members");
  const row = (cells, tag) => {
    const line = make("tr", "");
    line.append(...cells.map((cell) => {
      const entry = make(tag, typeof cell === "string" ? cell : "");
      if (typeof cell !== "string") entry.append(cell);
      return entry;
    }));
    return line;
  };
  table.tHead.replaceChildren(row(["network", "validation, %", unit], "th"));
  table.tBodies[0].replaceChildren(...members.map((place) => {
    const network = front.networks[place];
    const button = make("button", network.architecture, { type: "button" });
    button.addEventListener("click", () => choose(place));
    button.setAttribute("aria-pressed", place === chosenNow.network);
    return row([button, `${network.accuracy.toFixed(2)} ± ${network.error.toFixed(2)}`, short(x[place])], "td");
  }));
}

function markMember() {
  const { front: members } = front.costs[chosenNow.cost];
  document.querySelectorAll(".members button").forEach((button, row) => {
    button.setAttribute("aria-pressed", members[row] === chosenNow.network);
  });
}

function update() {
  showNetwork();
  showBudget();
  markMember();
  drawFront();
}

function choose(place) {
  const { x, front: members } = front.costs[chosenNow.cost];
  if (x[place] === null) place = members[members.length - 1];
  chosenNow.network = place;
  chosenNow.budget = x[place];
  moveSlider();
  update();
}

function setUpFront() {
  if (!front) return;
  document.querySelectorAll("input[name=cost]").forEach((button) => {
    button.checked = button.value === chosenNow.cost;
    button.addEventListener("change", () => {
      chosenNow.cost = button.value;
      showMembers();
      choose(chosenNow.network);
    });
  });
  document.getElementById("budget").addEventListener("input", (event) => {
    const [least, most] = range();
    chosenNow.budget = least + (most - least) * event.target.value / STEPS;
    chosenNow.network = bestWithin(chosenNow.budget);
    update();
  });
  showMembers();
  choose(chosenNow.network);
  document.getElementById("front").on("plotly_click", (event) => {
    const place = event.points[0].customdata;
    if (place !== undefined) choose(place);
  });
}
