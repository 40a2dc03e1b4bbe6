"use strict";
(() => {
  const tip = document.getElementById("tip");
  const place = (x, y) => {
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(4, x + 12), window.innerWidth - box.width - 4);
    const top = y + 16 + box.height > window.innerHeight ? y - box.height - 8 : y + 16;
    tip.style.transform = `translate(${left}px,${top}px)`;
  };
  const show = (target, x, y) => {
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    place(x, y);
  };
  const hide = () => { tip.hidden = true; };
  // The browser's own tooltip would come on top of this one.
  document.querySelectorAll("[data-tip] > title").forEach((title) => title.remove());
  document.addEventListener("pointermove", (event) => {
    const target = event.target.closest("[data-tip]");
    if (target) show(target, event.clientX, event.clientY); else hide();
  });
  document.addEventListener("focusin", (event) => {
    const target = event.target.closest("[data-tip]");
    if (!target) return;
    const box = target.getBoundingClientRect();
    show(target, box.right, box.bottom);
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  const sections = [...document.querySelectorAll("main details")];
  const button = document.getElementById("all");
  button.hidden = false;
  button.addEventListener("click", () => {
    const open = sections.some((section) => !section.open);
    sections.forEach((section) => { section.open = open; });
    button.textContent = open ? "Close all details" : "Open all details";
  });
  let before = [];
  window.addEventListener("beforeprint", () => {
    before = sections.map((section) => section.open);
    sections.forEach((section) => { section.open = true; });
  });
  window.addEventListener("afterprint", () => sections.forEach((section, index) => { section.open = before[index]; }));
  const reveal = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target && target.closest("details")) target.closest("details").open = true;
  };
  window.addEventListener("hashchange", reveal);
  reveal();
})();
