// What comes and goes: the sheets over the desk, a zip that is ready, and a PNG dropped anywhere on the page.
const desk = (window.niwaki ??= new EventTarget());
const FIRST = "#search textarea, #search input, [role=tab]"; // what has the focus in a sheet that opens
const opened = () => document.querySelector(".sheet.open");
const turn = (name) => { // to this sheet; none: back to the desk
  const before = opened();
  if ((before?.id ?? "") === name) return;
  const sheet = document.getElementById(name);
  before?.classList.remove("open");
  sheet?.classList.add("open");
  for (const below of document.querySelectorAll("#desk, #strip")) below.inert = Boolean(sheet);
  desk.dispatchEvent(new CustomEvent("sheet", { detail: name }));
  (sheet ? sheet.querySelector(FIRST) : document.getElementById(`open-${before.id}`))?.focus();
};
document.addEventListener("click", (event) => {
  const [, does, name] = event.target.closest("button")?.id.match(/^(open|close)-(library|workshop)$/) ?? [];
  if (name) turn(does === "open" && opened()?.id !== name ? name : "");
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented) turn("");
});
desk.addEventListener("back", () => turn(""));

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
