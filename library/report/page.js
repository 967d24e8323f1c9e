// Sliders over strips of pictures; the reload of a page that something still writes. Everything works without it but these two.
(() => {
  const kept = (key, value) => {
    try {
      if (value === undefined) return sessionStorage.getItem(key);
      sessionStorage.setItem(key, value);
    } catch { /* a browser that keeps nothing */ }
    return null;
  };
  let touched = 0;
  for (const kind of ["pointerdown", "input", "keydown"]) addEventListener(kind, () => { touched = Date.now(); });

  for (const strip of document.querySelectorAll(".strip")) {
    const frames = [...strip.querySelectorAll(".frames figure")];
    if (frames.length < 2) continue;
    const key = `${location.pathname} ${strip.dataset.name}`, last = frames.length - 1;
    const view = document.createElement("figure"), image = document.createElement("img");
    const words = document.createElement("figcaption"), slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 0, max: last });
    slider.setAttribute("aria-label", "picture");
    view.className = "view";
    view.append(image, slider, words);
    strip.prepend(view);
    const show = (place) => {
      image.src = frames[place].querySelector("img").src;
      image.alt = words.textContent = frames[place].querySelector("figcaption").textContent;
      slider.value = place;
      frames.forEach((frame, other) => frame.classList.toggle("shown", other === place));
    };
    const choose = (place) => { show(place); kept(key, place === last ? "" : words.textContent); };
    slider.addEventListener("input", () => choose(Number(slider.value)));
    frames.forEach((frame, place) => frame.addEventListener("click", () => choose(place)));
    const before = kept(key);  // by its words: places move when pictures are added; "" is the newest, whichever that is
    const found = before ? frames.findIndex((frame) => frame.querySelector("figcaption").textContent === before) : -1;
    show(found < 0 ? last : found);
    const row = strip.querySelector(".frames");
    row.scrollLeft = row.scrollWidth;
    row.scrollTop = row.scrollHeight;
  }

  const live = document.querySelector("[data-reload]");
  if (live) {
    const seconds = Number(live.dataset.reload), age = () => Date.now() / 1000 - Number(live.dataset.written);
    const again = () => (Date.now() - touched < 5000 ? setTimeout(again, 5000) : location.reload());
    setTimeout(again, 1000 * seconds);
    if (age() > 600) live.textContent += ` Nothing was written for ${Math.round(age() / 60)} minutes: it may have ended.`;
  }
})();
