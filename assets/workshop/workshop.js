// What comes and goes: the workshop's sheet, a zip that is ready, and a PNG dropped anywhere on the page.
const sheet = document.getElementById("workshop");
const opener = document.getElementById("open-workshop");
const toggle = (open) => {
  if (sheet.classList.contains("open") === open) return;
  sheet.classList.toggle("open", open);
  for (const below of document.querySelectorAll("#desk, #strip")) below.inert = Boolean(document.querySelector(".sheet.open"));
  (open ? sheet.querySelector("[role=tab]") : opener)?.focus();
};
document.addEventListener("click", (event) => {
  const button = event.target.closest("#open-workshop, #close-workshop, #open-library");
  if (button) toggle(button.id === "open-workshop" && !sheet.classList.contains("open"));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && sheet.classList.contains("open")) toggle(false);
});

watch("value", () => {
  if (props.value.url) requestAnimationFrame(() => element.querySelector("a").click());
});

const carries = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
document.addEventListener("dragover", (event) => {
  if (carries(event)) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  const input = document.querySelector("#drop input[type=file]");
  if (!carries(event) || !input || event.target.closest("#workshop")) return;
  event.preventDefault();
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});
