// The language switch keeps the place on the page, and the choice is remembered for the entrance page.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a.language-switch");
  if (!link) return;
  try { localStorage.setItem("book-language", link.dataset.language); } catch (error) { /* closed to file pages */ }
  link.hash = location.hash;
});

// From a file the browser may not fetch other pages, so search results come without a summary there.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// A figure wider than the screen scrolls in its own box; the keyboard must reach the box.
function reachWideFigures() {
  for (const box of document.querySelectorAll(".book-figure-box"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
}
addEventListener("load", reachWideFigures);
addEventListener("resize", reachWideFigures);

// sphinx-togglebutton writes this tooltip in English whatever the page's language.
addEventListener("load", () => {
  if (!document.documentElement.lang.startsWith("zh")) return;
  for (const button of document.querySelectorAll(".toggle-button"))
    for (const { name, value } of [...button.attributes])
      if (value === "Toggle hidden content") button.setAttribute(name, "展开或收起");
});
