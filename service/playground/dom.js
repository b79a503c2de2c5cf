// Finding and making elements, writing numbers, copying text.

export const at = (id) => document.getElementById(id);

export function make(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

export function button(className, label, act) {
  const made = make("button", className, label);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

export const number = (value, digits = 3) => value.toFixed(digits).replace("-", "\u2212");

export const percent = (share) => `${Math.round(100 * share)}\u202f%`;

const labels = new WeakMap(); // of buttons that copy: they may be pressed again while they say that they have

export async function copy(text, from) {
  if (!labels.has(from)) labels.set(from, from.textContent);
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copyBySelection(text); // plain http from another machine: browsers keep the clipboard to themselves
    from.textContent = "Copied";
  } catch {
    from.textContent = "Not allowed";
  }
  setTimeout(() => (from.textContent = labels.get(from)), 1200);
}

function copyBySelection(text) {
  const field = make("textarea", "unseen");
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  if (!copied) throw new Error("the browser does not let this page copy");
}
