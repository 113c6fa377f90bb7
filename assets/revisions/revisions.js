// The revision list: a click puts a revision's prompt back into the prompt box.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-id]");
  if (button) trigger("restore", { id: Number(button.dataset.id) });
});
