// Every key of the page, in one place. Keys press the same buttons that a mouse would, so nothing is done twice.
const desk = (window.niwaki ??= new EventTarget());
const say = (name, detail) => desk.dispatchEvent(new CustomEvent(name, { detail }));
const find = (selector) => document.querySelector(selector);
const dialog = element.querySelector("dialog");
const letters = element.querySelector(".letters");
letters.checked = localStorage.getItem("niwaki-letters") !== "off";
letters.addEventListener("change", () => localStorage.setItem("niwaki-letters", letters.checked ? "on" : "off"));

const press = (selector) => () => find(selector)?.click();
const act = (name) => () => say("do", name);
const SINGLE = {
  k: act("keep"), x: act("reject"), v: act("vary"), f: act("refine"), c: act("compare"), r: act("reuse"),
  l: press("#lock input"), "/": () => (find("#library.open #search textarea, #library.open #search input") ?? find("#prompt textarea")).focus(),
  "?": () => dialog.showModal(), "+": act("zoom in"), "=": act("zoom in"), "-": act("zoom out"),
  1: () => say("pick", 0), 2: () => say("pick", 1), 3: () => say("pick", 2), 4: () => say("pick", 3),
};
const OTHERS = {
  ArrowLeft: () => say("move", -1), ArrowRight: () => say("move", 1), ArrowUp: () => say("move", -1), ArrowDown: () => say("move", 1),
  Delete: act("bin"), Enter: press("#generate"), " ": act("flick"),
};

// In the library a letter means the picture that has the focus, not the one on the stage below.
const IN_LIBRARY = { k: "keep", x: "reject", Delete: "bin" };
const PAN = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down" };

const inPrompt = (event) => {
  if (event.isComposing || event.keyCode === 229) return event.stopPropagation(); // Enter ends a word in Hindi and Tamil
  if (event.key !== "Enter" || (!event.shiftKey && !event.altKey)) return;
  event.preventDefault();
  if (event.shiftKey) return find("#four")?.click();
  const box = event.target;
  box.setRangeText("\n", box.selectionStart, box.selectionEnd, "end");
  box.dispatchEvent(new Event("input", { bubbles: true }));
};

const escape = () => {
  if (find(".sheet.open")) return; // it closes, and a picture that is being made goes on
  if (desk.choosing) return say("do", "compare");
  const sheet = find("#right.open, #revisions.open");
  if (sheet) return sheet.classList.remove("open");
  if (find("#progress .busy")) return find("#stop").click();
  (find("#stage .view") ?? document.activeElement)?.focus();
};

document.addEventListener("keydown", (event) => {
  const target = event.target;
  if (target.matches("#prompt textarea") && event.key !== "Escape") return inPrompt(event);
  if (event.ctrlKey || event.metaKey || event.altKey || find(":popover-open, dialog[open]")) return;
  if (event.key === "Escape" && !event.isComposing) return escape();
  if (target.matches("input, textarea, select, [contenteditable=true], [role=listbox], [role=option]")) return;
  const own = target === document.body || target.closest("#stage, #strip, #tree");
  const listed = target.closest("#grid li");
  if (listed && letters.checked && IN_LIBRARY[event.key]) return listed.querySelector(`[data-do="${IN_LIBRARY[event.key]}"]`)?.click();
  const button = target.closest("button, a, summary");
  if (!own || (button && ["Enter", " "].includes(event.key) && (event.key === "Enter" || button.matches(":focus-visible")))) return;
  if (event.shiftKey && PAN[event.key]) return say("do", `pan ${PAN[event.key]}`);
  const action = OTHERS[event.key] ?? (letters.checked ? SINGLE[event.key.toLowerCase()] : undefined);
  if (!action || (event.shiftKey && event.key !== "?")) return;
  event.preventDefault();
  action();
}, true);

document.addEventListener("input", (event) => {
  if (event.target.matches("#prompt textarea") && find("#live input").checked) trigger("typed");
});

element.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
// On a phone, revisions and tree are sheets: their buttons open them, the next click outside closes them.
document.addEventListener("click", (event) => {
  const name = event.target.closest("#open-keys") ? "keys" : event.target.closest("[data-opens]")?.dataset.opens;
  if (name === "keys") return dialog.showModal();
  for (const sheet of document.querySelectorAll("#right, #revisions")) {
    if (!sheet.contains(event.target)) sheet.classList.toggle("open", sheet.id === name);
  }
});
find("#prompt textarea")?.focus();

// gradio leaves a list open when Tab leads out of it; told a second time that the focus is gone, it closes.
document.addEventListener("focusout", ({ target }) => setTimeout(() => {
  if (target.ariaExpanded === "true" && target !== document.activeElement) target.dispatchEvent(new FocusEvent("blur"));
}, 50));
