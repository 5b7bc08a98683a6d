// What the page's scripts share. Texts come from models and environments: they are only ever set as textContent.
"use strict";

// A custom property of the style sheet, in the page's present scheme.
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function channels(hex) {
  return [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
}

function luminance(rgb) {
  const [r, g, b] = rgb.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function paint(target, rgb) {
  target.style.backgroundColor = `rgb(${rgb.map(Math.round).join(" ")})`;
  target.style.color = luminance(rgb) > 0.179 ? "#000" : "#fff"; // the better of the two, at least 4.5 : 1
}

function shown(value) {
  return value === null || value === undefined ? "–" : String(value).replace("-", "−");
}

function vector(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : noun.endsWith("ch") ? "es" : "s"}`;
}
