// Describes the pages in the frames of a document, as JSON in its element "seen".
const brokenWords = cell => {
  const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), broken = [], range = document.createRange();
  while (texts.nextNode()) {
    for (const word of texts.currentNode.data.matchAll(/[\p{L}\p{N}.]+/gu)) {
      range.setStart(texts.currentNode, word.index);
      range.setEnd(texts.currentNode, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map(line => line.top)).size > 1) broken.push(word[0]);
    }
  }
  return broken;
};
onload = () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument;
    return [frame.id, {
      width: page.documentElement.scrollWidth,
      sections: [...page.querySelectorAll("section")].filter(each => each.offsetHeight > 0).map(each => each.id),
      images: page.images.length,
      decoded: [...page.images].filter(each => each.complete && each.naturalWidth > 0).length,
      scrolled: [...page.querySelectorAll(".scroll")].filter(each => each.scrollWidth > each.clientWidth).length,
      broken: [...page.querySelectorAll("td, th")].flatMap(brokenWords),
    }];
  });
  document.getElementById("seen").textContent = JSON.stringify(Object.fromEntries(seen));
}