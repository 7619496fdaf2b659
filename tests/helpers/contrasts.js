/* The contrast (WCAG 2) of all visible texts, lines and swatches with their background. */
() => {
  const numbers = color => {
    const channels = color.match(/[\d.]+/g).map(Number);
    return channels.length === 3 ? [...channels, 1] : channels;
  };
  const luminance = rgb => rgb.slice(0, 3).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    for (let node = element; node; node = node.parentElement) {
      const color = numbers(getComputedStyle(node).backgroundColor);
      if (color[3] === 1) return color;
    }
    return [255, 255, 255, 1];
  };
  const contrast = (element, color) => {
    const [a, b] = [luminance(numbers(color)), luminance(behind(element))].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), element.outerHTML.slice(0, 80)];
  };
  const all = selector => [...document.querySelectorAll(selector)].filter(node => node.getClientRects().length > 0);
  const isText = node => [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
  const ofText = node => getComputedStyle(node)[node instanceof SVGElement ? "fill" : "color"];
  const ofLine = node => getComputedStyle(node)[node instanceof SVGElement ? "stroke" : "borderTopColor"];
  return {
    text: all("body *").filter(isText).map(node => contrast(node, ofText(node))),
    drawn: all("path.line:not(.thin), .key i, .swatch").map(node => contrast(node, ofLine(node))),
    page: getComputedStyle(document.body).backgroundColor,
  };
}
