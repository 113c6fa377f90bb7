// The stage: picture A, and B under, beside or instead of it. Knows ids and addresses and no text: whatever a person
// wrote stays in the template, where Python has made it harmless. Clicks paint here first and tell Python afterwards.
const desk = (window.niwaki ??= new EventTarget());
const say = (name, detail) => desk.dispatchEvent(new CustomEvent(name, { detail }));
const now = () => props.value;
const id = (picture) => (picture ? picture.id : 0);
let zoom = { scale: 1, x: 0, y: 0 };
let pinned = false; // B was chosen by hand, so it stays while A moves

const PAN = { "pan left": [0.1, 0], "pan right": [-0.1, 0], "pan up": [0, 0.1], "pan down": [0, -0.1] }; // the picture moves the other way

const magnify = (scale, x = zoom.x, y = zoom.y) => {
  scale = Math.min(8, Math.max(1, scale));
  const room = (scale - 1) / 2; // in widths of the picture
  const inside = (value) => Math.min(room, Math.max(-room, value));
  zoom = { scale, x: inside(x), y: inside(y) };
  element.style.setProperty("--zoom", scale);
  element.style.setProperty("--pan-x", `${zoom.x * 100}%`);
  element.style.setProperty("--pan-y", `${zoom.y * 100}%`);
  element.toggleAttribute("data-zoomed", scale > 1);
};

const settle = () => {
  const frame = element.querySelector(".frame");
  if (frame) element.style.setProperty("--ratio", frame.dataset.ratio);
  const range = element.querySelector(".split");
  if (range) element.style.setProperty("--split", `${range.value}%`);
  for (const button of element.querySelectorAll("[data-mode]")) {
    button.setAttribute("aria-pressed", button.dataset.mode === now().mode);
  }
  say("shown", { a: id(now().a), b: now().mode === "one" ? 0 : id(now().b) });
};

const put = (change, tell = true) => {
  delete element.dataset.flick;
  props.value = { ...now(), ...change };
  queueMicrotask(() => queueMicrotask(settle)); // after the template, which waits for one
  if (tell) trigger("pair", { a: id(now().a), b: id(now().b) });
};

const show = (picture) => {
  if (!picture || (picture.id === id(now().a) && !desk.choosing)) return;
  if (desk.choosing) {
    desk.choosing = false;
    delete document.body.dataset.choosing;
    pinned = true;
    put({ b: picture, mode: now().mode === "one" ? "slider" : now().mode });
  } else if (pinned && now().b && picture.id !== id(now().b)) {
    put({ a: picture });
  } else {
    pinned = false;
    magnify(1, 0, 0);
    put({ a: picture, b: now().a, mode: "one" });
  }
};

// Marks first, without the template; it and Python hear of it after the frame that shows them.
const rate = (wanted) => {
  const a = now().a;
  const rating = a.rating === wanted ? "" : wanted;
  Object.assign(a, { rating, is_kept: `${rating === "kept"}`, is_rejected: `${rating === "rejected"}` });
  element.querySelector(".keep").setAttribute("aria-pressed", a.is_kept);
  element.querySelector(".reject").setAttribute("aria-pressed", a.is_rejected);
  say("rated", { id: a.id, rating });
  requestAnimationFrame(() => setTimeout(() => {
    put({ a: { ...now().a } }, false);
    trigger("rate", { id: a.id, rating });
  }));
};

const copy = async () => {
  const blob = fetch(now().a.url).then((answer) => answer.blob());
  try {
    await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
    trigger("copied", { ok: true });
  } catch {
    trigger("copied", { ok: false });
  }
};

const actions = {
  keep: () => rate("kept"),
  reject: () => rate("rejected"),
  vary: () => trigger("vary", { id: id(now().a) }),
  refine: () => trigger("refine", { id: id(now().a) }),
  other: () => trigger("other", { id: id(now().a) }),
  reuse: () => trigger("reuse", { id: id(now().a) }),
  bin: () => trigger("bin", { id: id(now().a) }),
  act: (button) => trigger("act", { id: id(now().a), name: button.dataset.act }),
  example: (button) => trigger("example", { index: Number(button.dataset.index) }),
  copy,
  full: () => element.querySelector(".frame").requestFullscreen(),
  single: () => { pinned = false; put({ mode: "one" }); },
  compare: () => {
    desk.choosing = !desk.choosing;
    document.body.toggleAttribute("data-choosing", desk.choosing);
    if (desk.choosing) say("choose");
  },
  flick: () => {
    if (now().b) element.dataset.flick = element.dataset.flick ? "" : "b";
    if (!element.dataset.flick) delete element.dataset.flick;
  },
};

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.mode) put({ mode: button.dataset.mode }, false);
  const action = actions[button.dataset.do];
  if (!action) return;
  const menu = button.closest("[popover]");
  if (menu) menu.hidePopover();
  action(button);
});
element.addEventListener("input", (event) => {
  if (event.target.matches(".split")) element.style.setProperty("--split", `${event.target.value}%`);
});
element.addEventListener("change", (event) => {
  if (event.target.matches(".tags")) trigger("tags", { id: id(now().a), text: event.target.value });
});
element.addEventListener("wheel", (event) => {
  if (!event.target.closest(".view") || !event.ctrlKey && !event.target.closest("[data-zoomed]") && event.deltaY > 0) return;
  event.preventDefault();
  magnify(zoom.scale * (event.deltaY < 0 ? 1.2 : 1 / 1.2));
}, { passive: false });
element.addEventListener("pointermove", (event) => {
  const view = event.target.closest(".view");
  if (!view || event.buttons !== 1 || zoom.scale === 1 || event.target.matches(".split")) return;
  magnify(zoom.scale, zoom.x + event.movementX / view.clientWidth, zoom.y + event.movementY / view.clientHeight);
});
element.addEventListener("dblclick", (event) => {
  if (event.target.closest(".view")) magnify(zoom.scale > 1 ? 1 : 2.5, 0, 0);
});
desk.addEventListener("show", (event) => show(event.detail));
desk.addEventListener("do", (event) => {
  if (event.detail === "zoom in") magnify(zoom.scale * 1.5);
  else if (event.detail === "zoom out") magnify(zoom.scale / 1.5);
  else if (PAN[event.detail]) magnify(zoom.scale, zoom.x + PAN[event.detail][0], zoom.y + PAN[event.detail][1]);
  else if (now().a && actions[event.detail]) actions[event.detail]();
});
watch("value", () => {
  delete element.dataset.flick;
  pinned = pinned && Boolean(now().b);
  settle();
});
settle();
