// The queue chip and its rows: every button names one job by id, so a cancel can't hit another.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button) trigger("job", { id: Number(button.dataset.id), what: button.dataset.do });
});
