"use strict";
const root = document.documentElement;
const stage = document.querySelector(".stage");
const sheet = document.querySelector(".sheet");
const range = document.querySelector("#cut");
const [under, over] = stage.querySelectorAll("img");
const chosen = { sample: 0, budget: null };

const value = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;
const cell = (sample, policy, budget) =>
  sheet.querySelector(`button[data-sample="${sample}"][data-policy="${CSS.escape(policy)}"][data-budget="${budget}"]`);

function show() {
  const policy = value("policy");
  const differs = value("view") === "difference";
  const picked = cell(chosen.sample, policy, chosen.budget);
  const uncached = cell(chosen.sample, "", sheet.dataset.steps);
  const source = (button) => (differs && button.dataset.difference) || button.dataset.source;
  stage.dataset.view = differs ? "difference" : "slide";
  range.hidden = differs;
  under.src = uncached.dataset.source;
  over.src = source(picked);
  under.alt = `uncached: ${picked.dataset.prompt}`;
  over.alt = `k = ${chosen.budget}: ${picked.dataset.prompt}`;
  stage.querySelector(".right").textContent = `k = ${chosen.budget}`;
  document.querySelector("#prompt").textContent = picked.dataset.prompt;
  document.querySelector("#facts").textContent = `${policy}, k = ${chosen.budget}: ${picked.dataset.facts} · seed ${picked.dataset.seed}`;
  for (const button of sheet.querySelectorAll("button")) {
    button.querySelector("img").src = source(button);
    button.setAttribute("aria-pressed", String(button === picked));
    button.parentElement.hidden = button.dataset.policy !== "" && button.dataset.policy !== policy;
  }
}

for (const button of sheet.querySelectorAll("button")) button.dataset.source = button.querySelector("img").src;
for (const input of document.querySelectorAll('input[name="policy"], input[name="view"]')) input.addEventListener("change", show);
for (const input of document.querySelectorAll('input[name="budget"]'))
  input.addEventListener("change", () => { chosen.budget = input.value; show(); });
sheet.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  chosen.sample = button.dataset.sample;
  if (button.dataset.policy !== "") {
    chosen.budget = button.dataset.budget;
    document.querySelector(`input[name="budget"][value="${chosen.budget}"]`).checked = true;
  }
  show();
});
range.addEventListener("input", () => stage.style.setProperty("--cut", `${range.value}%`));
function drag(event) {
  if (!stage.hasPointerCapture(event.pointerId)) return;
  const box = stage.getBoundingClientRect();
  range.value = (100 * (event.clientX - box.left)) / box.width;
  range.dispatchEvent(new Event("input"));
}
stage.addEventListener("pointerdown", (event) => {
  if (stage.dataset.view === "difference") return;
  stage.setPointerCapture(event.pointerId);
  drag(event);
});
stage.addEventListener("pointermove", drag);
document.querySelector("#theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
chosen.budget = value("budget");
show();
