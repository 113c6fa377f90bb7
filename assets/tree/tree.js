// The tree at the right: a click opens a picture on the stage. Like the strip it paints its marks at once.
const desk = (window.niwaki ??= new EventTarget());
const say = (name, detail) => desk.dispatchEvent(new CustomEvent(name, { detail }));
let shown = 0;
const row = (id) => element.querySelector(`[data-id="${id}"]`);
const mark = () => {
  element.querySelector("[aria-current]")?.removeAttribute("aria-current");
  const current = row(shown);
  current?.setAttribute("aria-current", "true");
  const list = element.querySelector("ul");
  if (current) list.scrollTop = current.offsetTop - list.clientHeight / 2;
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-id]");
  if (button) say("open", Number(button.dataset.id));
});
desk.addEventListener("shown", (event) => {
  shown = event.detail.a;
  mark();
});
desk.addEventListener("rated", ({ detail }) => {
  const button = row(detail.id);
  if (button) button.className = `branch ${detail.rating}`;
});
watch("value", mark);
