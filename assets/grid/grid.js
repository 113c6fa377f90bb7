// The library's page of pictures: every button names one by id.
const desk = (window.niwaki ??= new EventTarget());
desk.addEventListener("sheet", ({ detail }) => {
  if (detail === "library") trigger("opened");
});
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (!button) return;
  trigger("pick", { id: Number(button.dataset.id), what: button.dataset.do });
  if (button.dataset.do === "open") desk.dispatchEvent(new Event("back"));
});
