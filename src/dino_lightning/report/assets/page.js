/* The slider over the epochs of a picture selects, for each run, its latest sheet up to that epoch. */
const end = text => text === "" ? Infinity : Number(text);

for (const slider of document.querySelectorAll(".epochs input")) {
  const figure = slider.closest("figure"), stops = slider.dataset.stops.split(" ");
  const columns = [...figure.querySelectorAll(".column")].map(column => [...column.querySelectorAll(".frame")]);
  slider.addEventListener("input", () => {
    const stop = stops[slider.value], shown = stop === "" ? "the end" : `epoch ${stop}`;
    slider.previousElementSibling.textContent = shown;
    slider.setAttribute("aria-valuetext", shown);
    for (const frames of columns) {
      const before = frames.filter(frame => end(frame.dataset.epoch) <= end(stop));
      const now = before.length ? before[before.length - 1] : frames[0];
      for (const frame of frames) frame.classList.toggle("now", frame === now);
    }
  });
}

for (const button of document.querySelectorAll(".sheet button")) button.addEventListener("click", () => {
  button.setAttribute("aria-pressed", button.classList.toggle("large"));
});
