// The one tooltip: beside what it describes, within the window, and read out when the keyboard went there.

export class Tip {
  constructor(element, status) {
    this.element = element;
    this.status = status;
  }

  show({ name, lines, rows }, anchor, isRead) {
    const title = document.createElement("b");
    title.textContent = name;
    const parts = lines.map((line) => Object.assign(document.createElement("div"), { textContent: line }));
    this.element.replaceChildren(title, ...parts);
    if (rows.length) this.element.append("Besides:", table(rows));
    this.element.hidden = false;
    this.follow(anchor);
    if (isRead) this.status.textContent = [name, ...lines].join(". ");
  }

  hide() {
    this.element.hidden = true;
  }

  /** Goes where the anchor is by now. */
  follow(anchor) {
    const { left, top, bottom } = anchor.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height, style } = this.element;
    const below = bottom + 6;
    style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
    style.top = `${below + height < innerHeight ? below : Math.max(8, top - height - 6)}px`;
  }
}

function table(rows) {
  const element = document.createElement("table");
  for (const row of rows) for (const [index, text] of row.entries()) {
    const cells = index ? element.rows[element.rows.length - 1] : element.insertRow();
    cells.insertCell().textContent = text;
  }
  return element;
}
