// The library's sheet and its page of pictures: every button names one picture by id.
const sheet = document.getElementById("library");
const toggle = (open) => {
  if (sheet.classList.contains("open") === open) return;
  sheet.classList.toggle("open", open);
  for (const below of document.querySelectorAll("#desk, #strip")) below.inert = Boolean(document.querySelector(".sheet.open"));
  if (open) trigger("opened");
  (open ? sheet.querySelector("#search textarea, #search input") : document.querySelector("#open-library"))?.focus();
};
document.addEventListener("click", (event) => {
  const button = event.target.closest("#open-library, #close-library, #open-workshop");
  if (button) toggle(button.id === "open-library" && !sheet.classList.contains("open"));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && sheet.classList.contains("open") && !event.defaultPrevented) toggle(false);
});
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (!button) return;
  trigger("pick", { id: Number(button.dataset.id), what: button.dataset.do });
  if (button.dataset.do === "open") toggle(false);
});
