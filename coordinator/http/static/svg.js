// A few SVG elements, made without markup: the page's policy allows no inline style, and needs none.

const NAMESPACE = "http://www.w3.org/2000/svg";

/** An element with these attributes and children (elements or text). */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A picture of that size in pixels; `label` is what is read out instead of it. */
export function picture(width, height, label, children) {
  const size = { width, height, viewBox: `0 0 ${width} ${height}` };
  return svg("svg", { ...size, role: "img", "aria-label": label }, ...children);
}

export const box = (kind, x, y, width, height, title) =>
  svg("rect", { class: kind, x, y, width: Math.max(width, 0.5), height }, ...(title ? [svg("title", {}, title)] : []));

export const label = (x, y, text, kind = "") => svg("text", { x, y, class: kind }, text);

export const rule = (x1, y1, x2, y2) => svg("line", { x1, y1, x2, y2 });

/** Shows a picture in a box that scrolls, and its end if that was shown before. */
export function replacePicture(chart, drawn) {
  const atEnd = chart.scrollWidth - chart.scrollLeft - chart.clientWidth < 60;
  chart.replaceChildren(drawn);
  if (atEnd) chart.scrollLeft = chart.scrollWidth;
}
