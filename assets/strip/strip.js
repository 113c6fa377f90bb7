// The strip at the bottom: this project's pictures in order. It holds the records of all of them; the stage, the tree
// and the keys ask it by id. Marks (which is shown, which is kept) are painted here at once, without a new template.
const desk = (window.niwaki ??= new EventTarget());
const say = (name, detail) => desk.dispatchEvent(new CustomEvent(name, { detail }));
let shown = { a: 0, b: 0 };
const record = (id) => props.value.pictures.find((picture) => picture.id === id);
const thumb = (id) => element.querySelector(`[data-id="${id}"]`);

const mark = () => {
  for (const old of element.querySelectorAll("[aria-current], .other")) {
    old.removeAttribute("aria-current");
    old.classList.remove("other");
  }
  thumb(shown.b)?.classList.add("other");
  const current = thumb(shown.a);
  current?.setAttribute("aria-current", "true");
  const list = element.querySelector("ol");
  if (current) list.scrollLeft = current.offsetLeft - list.clientWidth / 2 + current.clientWidth / 2;
};

const open = (id) => {
  const picture = record(id);
  if (picture) say("show", picture);
  else trigger("open", { id }); // older than what the strip holds
};

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.id) open(Number(button.dataset.id));
  else if (button?.dataset.do === "png") document.querySelector("#drop input[type=file]").click();
  else if (button) trigger("export");
});
desk.addEventListener("open", (event) => open(event.detail));
desk.addEventListener("shown", (event) => {
  shown = event.detail;
  mark();
});
desk.addEventListener("rated", ({ detail }) => {
  const picture = record(detail.id);
  if (!picture) return;
  thumb(detail.id).className = `thumb ${detail.rating}`;
  Object.assign(picture, { rating: detail.rating, is_kept: `${detail.rating === "kept"}`, is_rejected: `${detail.rating === "rejected"}` });
});
desk.addEventListener("choose", () => (thumb(shown.b || shown.a) ?? element.querySelector(".thumb"))?.focus());
desk.addEventListener("move", (event) => {
  const all = props.value.pictures.map((picture) => picture.id);
  const from = desk.choosing ? Number(document.activeElement?.dataset.id) || shown.a : shown.a;
  const to = all[all.indexOf(from) + event.detail];
  if (to === undefined) return;
  if (desk.choosing) thumb(to).focus();
  else open(to);
});
desk.addEventListener("pick", (event) => {
  const batch = props.value.batch ?? [];
  if (batch[event.detail]) open(batch[event.detail]);
});
const remember = () => {
  const address = new URL(location);
  if (!props.value.project || address.searchParams.get("project") === `${props.value.project}`) return;
  address.searchParams.set("project", props.value.project); // a reload and a copied address open the same project
  history.replaceState(null, "", address);
};
watch("value", () => {
  mark();
  remember();
});
