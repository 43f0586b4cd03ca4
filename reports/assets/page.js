"use strict";
(function () {
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, attributes) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    Object.entries(attributes || {}).forEach(([name, value]) => element.setAttribute(name, value));
    return element;
  };
  // Numbers as a person reads them; the server writes the tables, the same way.
  const show = (value, digits) => {
    if (!Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    const text = digits !== undefined ? value.toFixed(digits)
      : size === 0 || Number.isInteger(value) && size < 1e6 ? String(value)
      : size < 0.01 || size >= 1e5 ? value.toPrecision(3)
      : size < 10 ? value.toFixed(3) : value.toFixed(1);
    return text.replace("-", "−");
  };

  // Theme, help, tables: of every page.

  document.querySelectorAll(".tools, .filter").forEach((element) => { element.hidden = false; });
  const theme = $("theme-button");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (name) => {
    if (name) document.documentElement.dataset.theme = name;
    const dark = (name || (prefersDark.matches ? "dark" : "light")) === "dark";
    theme.textContent = dark ? "Light" : "Dark";
    theme.setAttribute("aria-pressed", String(dark));
  };
  setTheme("");
  prefersDark.addEventListener("change", () => setTheme(document.documentElement.dataset.theme));
  theme.addEventListener("click", () => setTheme(theme.getAttribute("aria-pressed") === "true" ? "light" : "dark"));
  $("help-button").addEventListener("click", () => $("help").showModal());

  const compareCells = (one, other) => {
    if (one === "" || other === "") return one === other ? 0 : NaN;
    const numbers = [Number(one), Number(other)];
    return numbers.some(Number.isNaN) ? one.localeCompare(other, undefined, { numeric: true }) : numbers[0] - numbers[1];
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    const headings = Array.from(table.tHead.rows[0].cells);
    headings.forEach((heading, column) => {
      if (heading.classList.contains("picture")) return;
      const button = make("button", heading.textContent, { type: "button" });
      heading.replaceChildren(button);
      button.addEventListener("click", () => {
        const body = table.tBodies[0];
        const isNumber = Array.from(body.rows).some((row) => row.cells[column].classList.contains("number"));
        const before = heading.getAttribute("aria-sort");
        const order = before ? (before === "ascending" ? "descending" : "ascending") : isNumber ? "descending" : "ascending";
        headings.forEach((one) => one.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const rows = Array.from(body.rows).map((row) => [row.cells[column].dataset.value || "", row]);
        rows.sort(([one], [other]) => {
          const difference = compareCells(one, other);
          return Number.isNaN(difference) ? (one === "" ? 1 : -1) : sign * difference; // what is missing comes last
        });
        body.append(...rows.map(([, row]) => row));
      });
    });
  });

  const list = $("scan-list");
  if (list) document.body.classList.add("has-list");
  if (list && !$("viewer")) {
    document.body.classList.remove("has-list");
    list.tBodies[0].addEventListener("click", (event) => {
      if (!event.target.closest("a")) event.target.closest("tr").querySelector("a").click();
    });
  }
  if ($("filter")) {
    $("filter").addEventListener("input", () => {
      const wanted = $("filter").value.trim().toLowerCase();
      Array.from(list.tBodies[0].rows).forEach((row) => {
        row.hidden = !row.cells[1].textContent.toLowerCase().includes(wanted);
      });
    });
  }

  const busy = () => $("help").open || /^(input|select|textarea)$/i.test(document.activeElement.tagName)
    && !/^(range|checkbox)$/.test(document.activeElement.type);
  const keys = { "?": () => $("help").showModal() };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || busy()) return;
    const isSlider = document.activeElement.type === "range" && event.key.startsWith("Arrow");
    if (keys[event.key] && !isSlider) {
      event.preventDefault();
      keys[event.key]();
    }
    if (document.activeElement.tagName === "CANVAS") event.stopPropagation(); // the viewer has keys of its own
  }, true);

  if (!$("viewer")) return;

  // The viewer.

  const scans = JSON.parse($("data").textContent);
  const articles = Array.from(document.querySelectorAll("article.scan"));
  const SLICES = { all: 3, axial: 0, coronal: 1, sagittal: 2 };
  const MAPS = {
    map: { R: [90, 120, 190, 249, 252], G: [20, 20, 55, 142, 240], B: [130, 120, 84, 9, 140], A: [0, 255, 255, 255, 255], I: [0, 64, 128, 192, 255] },
    probability: { R: [68, 59, 33, 94, 253], G: [1, 82, 145, 201, 231], B: [84, 139, 140, 98, 37], A: [0, 255, 255, 255, 255], I: [0, 64, 128, 192, 255] },
    mask: { R: [0, 42], G: [0, 208], B: [0, 235], A: [0, 255], I: [0, 255] },
    reference: { R: [0, 150], G: [0, 224], B: [0, 70], A: [0, 255], I: [0, 255] },
    members: { R: [0, 240], G: [0, 130], B: [0, 220], A: [0, 255], I: [0, 255] },
    memberOutlines: { R: [255, 255, 255], G: [120, 120, 200], B: [215, 215, 245], A: [0, 150, 255], I: [0, 1, 255] },
    referenceOutlines: { R: [130, 130, 225], G: [230, 230, 255], B: [40, 40, 180], A: [0, 150, 255], I: [0, 1, 255] },
  };
  const OPACITY = { scan: 1, reconstruction: 1, members: 0.45, reference: 0.45, mask: 0.4, memberOutlines: 1, referenceOutlines: 1 }; // of maps: the slider
  const RANK = ["scan", "reconstruction", "map", "probability", "members", "reference", "mask", "memberOutlines", "referenceOutlines"];
  const isMap = (layer) => (layer.colours || layer.kind) === "map" || layer.kind === "probability";
  const colours = (kind) => {
    const map = MAPS[kind];
    return map ? map.R.map((red, i) => `rgb(${red} ${map.G[i]} ${map.B[i]})`) : ["#000", "#777", "#fff"];
  };
  let main = null, beside = null, niivue = null, loading = 0;
  let state = null; // of the scan that is shown
  const view = { plane: "all", beside: false, opacity: 0.5, ensemble: { members: "outlines", reference: "outlines" }, frame: { members: 0, reference: 0 }, hidden: new Set(["reconstruction", "members", "other"]) };

  const unpack = async (id) => {
    const text = atob($(id).textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  };
  const voxelOf = (layer, mm) => {
    const [a, b, c] = layer.affine;
    const m = [a, b, c].map((row) => row.slice(0, 3));
    const cross = (u, v) => [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]];
    const columns = [0, 1, 2].map((i) => m.map((row) => row[i]));
    const offset = [mm[0] - a[3], mm[1] - b[3], mm[2] - c[3]];
    const dot = (u, v) => u[0] * v[0] + u[1] * v[1] + u[2] * v[2];
    const determinant = dot(columns[0], cross(columns[1], columns[2]));
    return [cross(columns[1], columns[2]), cross(columns[2], columns[0]), cross(columns[0], columns[1])]
      .map((normal, i) => Math.min(Math.max(Math.round(dot(normal, offset) / determinant), 0), layer.shape[i] - 1));
  };
  const placeOf = (affine, voxel) => affine.slice(0, 3).map((row) => row[0] * voxel[0] + row[1] * voxel[1] + row[2] * voxel[2] + row[3]);
  const indexOf = (layer, voxel) => voxel[0] + layer.shape[0] * (voxel[1] + layer.shape[1] * voxel[2]);
  const valueAt = (layer, voxel) => layer.levels[indexOf(layer, voxel)] * layer.slope + layer.offset;

  async function start() {
    const canvas = $("canvas");
    if (!document.createElement("canvas").getContext("webgl2") || typeof DecompressionStream === "undefined") {
      articles.forEach((article) => { article.querySelector(".no-viewer").hidden = false; });
      return;
    }
    document.body.classList.add("live");
    $("viewer").hidden = false;
    const script = make("script", new TextDecoder().decode(await unpack("niivue")));
    document.head.append(script);
    script.remove();
    niivue = window.niivue;
    main = await viewerOn(canvas);
    main.onLocationChange = (place) => { moved(place.mm); follow(); };
    $("layers").addEventListener("change", layersChanged);
    $("opacity").addEventListener("input", () => { view.opacity = $("opacity").value / 100; showLayers(); });
    $("threshold").addEventListener("input", () => setCut(Math.round(state.top * ($("threshold").value / 1000) ** 2)));
    $("threshold-number").addEventListener("change", typed);
    $("reset").addEventListener("click", () => setCut(state.cut.mark));
    $("compare").addEventListener("click", () => setBeside(!view.beside));
    $("planes").addEventListener("click", (event) => { if (event.target.dataset.plane) setPlane(event.target.dataset.plane); });
    $("ensemble").addEventListener("click", (event) => { if (event.target.dataset.show) setEnsemble(event.target.dataset.show); });
    $("ensemble").addEventListener("input", (event) => { if (event.target.dataset.of) chooseMember(state.layers[event.target.dataset.of], Number(event.target.value) - 1); });
    articles.forEach((article) => curveOf(article));
    if (list) list.addEventListener("click", (event) => {
      const row = event.target.closest("tr[data-scan]");
      if (row) { event.preventDefault(); choose(Number(row.dataset.scan)); }
    });
    ["previous", "next"].forEach((id, i) => $(id).addEventListener("click", (event) => {
      if (scans.length > 1) { event.preventDefault(); step(i ? 1 : -1); }
    }));
    Object.assign(keys, {
      ArrowUp: () => slice(1), ArrowRight: () => slice(1), ArrowDown: () => slice(-1), ArrowLeft: () => slice(-1),
      "[": () => nudge(-1), "]": () => nudge(1),
      m: () => toggle(["mask"]), o: () => toggle(["map", "probability"]),
      r: () => { if (!$("compare").hidden) setBeside(!view.beside); },
      1: () => setPlane("all"), 2: () => setPlane("axial"), 3: () => setPlane("coronal"), 4: () => setPlane("sagittal"),
      j: () => step(1), k: () => step(-1),
      n: () => toggle(["members"]), ",": () => nextMember(-1), ".": () => nextMember(1),
    });
    if (matchMedia("(max-width: 600px)").matches) setPlane(scans[0].plane);
    addEventListener("resize", () => { if (state) fit(); });
    const wanted = /^#scan-(\d+)$/.exec(location.hash);
    await choose(wanted && scans[wanted[1]] ? Number(wanted[1]) : 0);
  }

  async function viewerOn(canvas) {
    const viewer = new niivue.Niivue({
      backColor: [0, 0, 0, 1], crosshairColor: [0.95, 0.65, 0.25, 0.75], crosshairWidth: 0.35, crosshairGap: 4,
      crosshairWidthUnit: "percent",
      dragAndDropEnabled: false, isRadiologicalConvention: true, multiplanarShowRender: 0, multiplanarLayout: 0,
      multiplanarPadPixels: 4, loadingText: "", logLevel: "error", viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "",
      isNearestInterpolation: true, isColorbar: false, fontColor: [0.7, 0.7, 0.7, 1], scrollRequiresFocus: false,
    });
    Object.entries(MAPS).forEach(([name, map]) => viewer.addColormap("anodiff " + name, map));
    await viewer.attachToCanvas(canvas);
    return viewer;
  }

  async function imageOf(layer) {
    const colormap = MAPS[layer.kind] ? "anodiff " + (layer.colours || layer.kind) : "gray";
    const image = await niivue.NVImage.new(layer.fine || layer.buffer, "layer.nii", colormap, 1, null, layer.low, layer.top || layer.high);
    if (isMap(layer)) {
      // The lower a score, the more transparent: (score / cal_min) ** 2.
      image.colormapType = 1;
      image.cal_min = 0.7 * (layer.top || layer.high);
    }
    return image;
  }

  async function choose(number) {
    const mine = ++loading;
    const scan = scans[number];
    $("wait").hidden = false;
    const layers = scan.layers.map((layer) => ({ ...layer }));
    for (let i = 0; i < layers.length; i++) {
      const layer = layers[i];
      layer.buffer = await unpack(`layer-${number}-${i}`);
      layer.levels = layer.bytes === 2 ? new Uint16Array(layer.buffer, 352) : new Uint8Array(layer.buffer, 352);
    }
    if (mine !== loading) return;
    // Scores that a threshold cuts: the mask that it gives is made here.
    const cut = layers.find(isMap);
    let mask = layers.find((layer) => layer.kind === "mask");
    const count = cut ? cut.shape[0] * cut.shape[1] * cut.shape[2] : 0;
    const same = (one) => String(one.shape) === String(cut.shape) && String(one.affine) === String(cut.affine);
    if (cut && (!mask || same(mask))) {
      const stored = mask ? mask.levels : null;
      const buffer = new ArrayBuffer(352 + count);
      new Uint8Array(buffer).set(new Uint8Array(cut.buffer, 0, 352));
      const header = new DataView(buffer);
      header.setInt16(70, 2, true); header.setInt16(72, 8, true); header.setFloat32(112, 1, true); header.setFloat32(116, 0, true);
      header.setInt16(40, 3, true); header.setInt16(48, 1, true);
      const made = { ...(mask || { name: "Mask", kind: "mask" }), low: 0, high: 1, slope: 1, offset: 0, shape: cut.shape.slice(0, 3), affine: cut.affine, buffer, stored, levels: new Uint8Array(buffer, 352), isCut: true };
      if (mask) layers[layers.indexOf(mask)] = made; else layers.push(made);
      mask = made;
    }
    layers.filter((layer) => layer.shape.length > 3).forEach((layer) => layers.push(...splitEnsemble(layer, layers, scan)));
    layers.sort((one, other) => RANK.indexOf(one.kind) - RANK.indexOf(other.kind));
    const seen = new Set();
    layers.forEach((layer) => {
      // Of several scans or masks the first one shows, and of maps and probabilities the one that the threshold cuts.
      const isOther = isMap(layer) && !layer.frames ? layer !== cut : ["scan", "mask"].includes(layer.kind) && seen.has(layer.kind);
      layer.group = isOther ? "other" : layer.of ? layer.of.kind : layer.kind;
      seen.add(layer.kind);
      layer.visible = !view.hidden.has(layer.group);
    });
    state = { number, scan, layers, cut, mask: mask && mask.isCut ? mask : null, mm: null };
    if (cut) {
      const sums = new Uint32Array(65537);
      for (let i = 0; i < count; i++) sums[cut.levels[i]]++;
      for (let level = 65535; level >= 0; level--) sums[level] += sums[level + 1];
      state.above = sums; // voxels of this level and all higher ones
      state.top = 65535;
      while (state.top > 0 && !sums[state.top]) state.top--;
    }
    $("compare").hidden = !layers.some((layer) => layer.kind === "reconstruction");
    $("strength").hidden = $("cut").hidden = !cut;
    main.opts.isOrientationTextVisible = !scan.is_picture;
    main.opts.isRadiologicalConvention = true;
    listLayers();
    listMembers();
    articles.forEach((article, i) => article.classList.toggle("shown", i === number));
    if (list) Array.from(list.tBodies[0].rows).forEach((row) => {
      if (Number(row.dataset.scan) === number) row.setAttribute("aria-current", "true"); else row.removeAttribute("aria-current");
    });
    $("planes").hidden = scan.shape[2] === 1 || scan.is_picture;
    main.opts.sliceType = SLICES[$("planes").hidden ? scan.plane : view.plane];
    if (cut) {
      $("high").textContent = show(cut.high);
      $("ramp").style.background = `linear-gradient(90deg, ${colours(cut.kind).join(", ")})`;
      $("reset").hidden = $("stored").hidden = cut.mark === null;
      if (cut.mark !== null) $("stored").style.left = `calc(8px + (100% - 16px) * ${Math.min(Math.sqrt(cut.mark / Math.max(state.top, 1)), 1)})`;
      setCut(cut.mark !== null ? cut.mark : state.top);
    }
    links();
    await showLayers();
    if (mine !== loading) return;
    await setBeside(view.beside);
    if (mine !== loading) return;
    goTo(placeOf(scan.affine, scan.start));
    $("wait").hidden = true;
    document.body.dataset.shown = String(number);
  }

  const order = () => list ? Array.from(list.tBodies[0].rows).filter((row) => !row.hidden).map((row) => Number(row.dataset.scan)) : [0];
  function neighbour(by) {
    const shown = order();
    const place = shown.indexOf(state.number);
    return place < 0 ? shown[0] : shown[place + by];
  }
  function links() {
    const scan = state.scan;
    ["previous", "next"].forEach((id, i) => {
      const there = scans.length > 1 ? neighbour(i ? 1 : -1) : undefined;
      const target = scans.length > 1 ? (there === undefined ? "" : "#scan-" + there) : scan[id] || "";
      if (target) $(id).href = target; else $(id).removeAttribute("href");
      $(id).hidden = scans.length === 1 && !scan.previous && !scan.next;
    });
  }
  function step(by) {
    if (scans.length > 1) {
      const there = state ? neighbour(by) : 0;
      if (there !== undefined) {
        choose(there);
        const row = list.querySelector(`tr[data-scan="${there}"]`);
        row.scrollIntoView({ block: "nearest" });
      }
    } else {
      const target = scans[0][by > 0 ? "next" : "previous"];
      if (target) location.href = target;
    }
  }

  function listLayers() {
    const box = $("layers");
    box.replaceChildren(box.firstElementChild);
    state.layers.slice(1).forEach((layer, i) => {
      if (layer.of) return;
      const label = make("label");
      const input = make("input", undefined, { type: "checkbox", "data-layer": i + 1 });
      input.checked = layer.visible;
      const swatch = make("i");
      swatch.style.background = colours(layer.colours || layer.kind).length > 2
        ? `linear-gradient(90deg, ${colours(layer.colours || layer.kind).join(", ")})` : colours(layer.kind)[1];
      label.append(input, swatch, make("span", layer.name));
      box.append(label);
    });
    box.hidden = state.layers.length < 2;
  }
  function layersChanged(event) {
    const { layer } = event.target.dataset;
    if (layer) {
      const changed = state.layers[layer];
      changed.visible = event.target.checked;
      if (changed.visible) view.hidden.delete(changed.group); else view.hidden.add(changed.group);
    }
    showLayers();
  }
  function toggle(kinds) {
    const boxes = Array.from($("layers").querySelectorAll("[data-layer]")).filter((box) => kinds.includes(state.layers[box.dataset.layer].group));
    boxes.forEach((box) => { box.checked = !box.checked; layersChanged({ target: box }); });
  }
  // The viewer gets what is visible, as every volume that it has costs time, and an empty layer where nothing is.
  async function showLayers() {
    const { layers, number } = state;
    const shown = layers.filter((layer, i) => i === 0 || isShown(layer));
    if (shown.length === 1 && layers.length > 1) shown.push(layers[layers.length - 1]);
    for (const layer of shown) {
      layer.image = layer.image || await imageOf(layer);
      if (layer.isCut) layer.image.img = layer.levels; // what the slider fills
    }
    if (!state || state.number !== number) return;
    shown.forEach((layer, i) => {
      layer.image.opacity = i > 0 && !isShown(layer) ? 0 : isMap(layer) ? view.opacity : OPACITY[layer.kind];
    });
    main.volumes = shown.map((layer) => layer.image);
    main.setVolume(main.volumes[0], 0);
  }

  // Ensembles: layers of several masks or maps, members or annotations. The viewer gets one of them, or how many
  // disagree, in `levels`; the outlines of masks are a layer of their own.

  function splitEnsemble(layer, layers, scan) {
    const size = layer.shape[0] * layer.shape[1] * layer.shape[2];
    Object.assign(layer, { all: layer.levels, frames: layer.shape[3], shape: layer.shape.slice(0, 3), frame: 0 });
    layer.buffer = layer.buffer.slice(0, 352 + layer.bytes * size);
    layer.levels = layer.bytes === 2 ? new Uint16Array(layer.buffer, 352) : new Uint8Array(layer.buffer, 352);
    const header = new DataView(layer.buffer);
    header.setInt16(40, 3, true); header.setInt16(48, 1, true);
    if (layer.bytes === 2 || layer.slope !== 1 || layer.offset !== 0) { // maps
      layer.colours = "map";
      return [];
    }
    layer.counts = members.countMarks(layer.all, layer.frames);
    // The viewer draws every layer on the grid of the scan: that of a picture gets finer, for thin outlines.
    const factor = scan.is_picture ? Math.max(1, Math.floor(640 / Math.max(layer.shape[0], layer.shape[1]))) : 1;
    const shape = [layer.shape[0] * factor, layer.shape[1] * factor, layer.shape[2]];
    const affine = members.refine(layer.affine, factor);
    const below = layers.find((one) => one.kind === "scan");
    if (factor > 1 && String(below.shape) === String(layer.shape)) below.fine = below.fine || members.refineFile(below.buffer, below.levels, below.shape, affine, factor);
    const kind = layer.kind === "reference" ? "referenceOutlines" : "memberOutlines";
    layer.lines = { name: layer.name, kind, of: layer, low: 0, high: layer.frames, shape, affine, factor };
    return [layer.lines];
  }
  const modeOf = (layer) => layer.lines ? view.ensemble[layer.kind] : "one";
  const isShown = (layer) => layer.of ? layer.of.visible && modeOf(layer.of) === "outlines" : layer.visible && (!layer.frames || modeOf(layer) !== "outlines");
  const ensembles = () => state.layers.filter((layer) => layer.frames);

  function fillEnsemble(layer) {
    const { levels, all, counts, frames, lines } = layer;
    const size = levels.length;
    const axis = state.scan.axes[currentPlane()][0];
    if (lines && modeOf(layer) === "outlines" && lines.axis !== axis) {
      lines.buffer = members.emptyFile(layer.buffer, lines.shape, lines.affine);
      new Uint8Array(lines.buffer, 352).set(members.drawOutlines(all, layer.shape, frames, axis, lines.factor));
      Object.assign(lines, { axis, image: null });
    }
    const disagree = modeOf(layer) === "disagreement";
    if (disagree) for (let i = 0; i < size; i++) levels[i] = Math.min(counts[i], frames - counts[i]);
    else levels.set(all.subarray(layer.frame * size, (layer.frame + 1) * size));
    if (lines) Object.assign(layer, { colours: disagree ? "map" : null, top: disagree ? Math.max(1, Math.floor(frames / 2)) : null });
    layer.image = null;
  }
  function describeMember(layer) {
    const size = layer.levels.length;
    let text = `${layer.frame + 1} of ${layer.frames}`;
    if (layer.lines) {
      let marked = 0;
      for (let i = layer.frame * size; i < (layer.frame + 1) * size; i++) marked += layer.all[i];
      text += state.scan.is_picture ? `, ${marked} pixels` : `, ${show(marked * layer.voxel_ml, 2)} ml`;
    }
    return text;
  }
  function listMembers() {
    const shown = ensembles();
    $("ensemble").hidden = !shown.length;
    $("ensemble-show").hidden = !shown.some((layer) => layer.lines);
    $("ensemble-rows").replaceChildren(...shown.map((layer) => {
      layer.frame = Math.min(view.frame[layer.kind], layer.frames - 1);
      const label = make("label", layer.name);
      label.append(
        make("input", undefined, { type: "range", min: 1, max: layer.frames, value: layer.frame + 1, "data-of": state.layers.indexOf(layer) }),
        make("output", describeMember(layer)));
      return label;
    }));
    $("ensemble-show").querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.show === view.ensemble.members)));
    shown.forEach(fillEnsemble);
  }
  function showEnsembles(revealed) {
    ensembles().forEach((layer) => {
      if (revealed === layer) {
        layer.visible = true;
        view.hidden.delete(layer.group);
        $("layers").querySelector(`[data-layer="${state.layers.indexOf(layer)}"]`).checked = true;
      }
    });
    listMembers();
    showLayers();
    moved(state.mm);
  }
  function setEnsemble(name) {
    view.ensemble = { members: name, reference: "outlines" };
    showEnsembles(ensembles().find((layer) => layer.kind === "members"));
  }
  function chooseMember(layer, frame) {
    view.frame[layer.kind] = frame;
    view.ensemble[layer.kind] = "one";
    showEnsembles(layer);
    $("ensemble-rows").querySelector(`[data-of="${state.layers.indexOf(layer)}"]`).focus();
  }
  function nextMember(by) {
    const layer = ensembles().find((one) => one.kind === "members") || ensembles()[0];
    if (layer) chooseMember(layer, Math.min(Math.max(layer.frame + by, 0), layer.frames - 1));
  }

  function fillMask() {
    const { cut, mask, level, isStored } = state;
    if (isStored) mask.levels.set(mask.stored);
    else for (let i = 0; i < mask.levels.length; i++) mask.levels[i] = cut.levels[i] > level ? 1 : 0;
  }
  let drawing = 0;
  function setCut(level) {
    const { cut, mask, above, top } = state;
    level = Math.min(Math.max(level, 0), Math.max(top, cut.mark || 0)); // a stored threshold may be above all scores
    state.level = level;
    state.isStored = level === cut.mark && mask && mask.stored;
    let count = above[level + 1];
    if (state.isStored) { count = 0; for (const one of mask.stored) count += one; }
    const bound = cut.mark === level && state.scan.threshold !== null ? state.scan.threshold : cut.offset + (level + 0.5) * cut.slope;
    $("threshold").value = 1000 * Math.sqrt(level / Math.max(top, 1));
    $("threshold").setAttribute("aria-valuetext", show(bound));
    $("threshold-number").value = show(bound);
    $("reset").disabled = level === cut.mark;
    const share = state.scan.is_picture ? `${count} pixels` : `${show(count * cut.voxel_ml, 2)} ml`;
    $("volume").value = share;
    $("volume").title = `${count} voxels above the threshold`;
    if (!mask) return;
    if (!mask.image) return fillMask();
    cancelAnimationFrame(drawing);
    drawing = requestAnimationFrame(() => {
      fillMask();
      main.volumes.slice(1).forEach((volume, i) => main.refreshLayers(volume, i + 1));
      main.drawScene();
      moved(state.mm);
    });
  }
  function nudge(by) {
    if (!state.cut) return;
    const place = Math.round(200 * Math.sqrt(state.level / Math.max(state.top, 1))) + by;
    const level = Math.round(state.top * (Math.min(Math.max(place, 0), 200) / 200) ** 2);
    setCut(level === state.level ? level + by : level);
  }
  function typed() {
    const value = Number($("threshold-number").value.replace("−", "-").replace(",", "."));
    setCut(Number.isFinite(value) ? Math.round((value - state.cut.offset) / state.cut.slope - 0.5) : state.level);
  }

  function setPlane(plane) {
    view.plane = plane;
    $("planes").querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.plane === plane)));
    if (!state || $("planes").hidden) return;
    fit();
    if (ensembles().length) showEnsembles();
    [main, beside].forEach((viewer) => { if (viewer) { viewer.setSliceType(SLICES[plane]); viewer.resizeListener(); } });
  }
  // Three planes in a row need less height than one.
  function fit() {
    const { scan } = state;
    const sizes = [0, 1, 2].map((axis) => scan.shape[axis] * Math.hypot(...scan.affine.slice(0, 3).map((row) => row[axis])));
    const [x, y, z] = ["sagittal", "coronal", "axial"].map((plane) => sizes[scan.axes[plane][0]]);
    const planes = { all: [2 * x + y, Math.max(y, z)], axial: [x, y], coronal: [x, z], sagittal: [y, z] };
    const [width, height] = planes[$("planes").hidden ? scan.plane : view.plane];
    const room = $("canvas").parentElement.clientWidth;
    const narrow = view.plane === "all" && room < 560; // then they lie two by two
    $("canvases").style.setProperty("--height", `${Math.round(room * (narrow ? (y + z) / (x + y) : height / width)) + 12}px`);
  }
  async function setBeside(wanted) {
    view.beside = wanted;
    const layer = state.layers.find((one) => one.kind === "reconstruction");
    const on = wanted && Boolean(layer);
    $("beside").hidden = !on;
    $("canvases").classList.toggle("two", on);
    fit();
    $("compare").setAttribute("aria-pressed", String(on));
    if (on) {
      if (!beside) {
        beside = await viewerOn($("canvas-beside"));
        beside.onLocationChange = (place) => goTo(place.mm);
      }
      const image = await imageOf(layer);
      image.cal_min = state.layers[0].low;
      image.cal_max = state.layers[0].high;
      beside.opts.isOrientationTextVisible = !state.scan.is_picture;
      beside.opts.sliceType = main.opts.sliceType;
      beside.volumes = [image];
      beside.setVolume(image, 0);
      beside.resizeListener();
    }
    main.resizeListener();
    if (state.mm) follow();
  }

  const currentPlane = () => view.plane === "all" || $("planes").hidden ? state.scan.plane : view.plane;
  function goTo(mm) {
    main.scene.crosshairPos = main.mm2frac(Array.from(mm).slice(0, 3), 0, true);
    main.drawScene();
    moved(mm);
    follow();
  }
  function follow() {
    if (!view.beside || !beside || !beside.volumes.length) return;
    beside.scene.crosshairPos = beside.mm2frac(state.mm, 0, true);
    beside.drawScene();
  }
  function slice(by) {
    const [axis, sign] = state.scan.axes[currentPlane()];
    const voxel = voxelOf(state.scan, state.mm);
    voxel[axis] = Math.min(Math.max(voxel[axis] + by * sign, 0), state.scan.shape[axis] - 1);
    goTo(placeOf(state.scan.affine, voxel));
  }
  function moved(mm) {
    if (!state || !mm) return;
    state.mm = Array.from(mm).slice(0, 3);
    const voxel = voxelOf(state.scan, state.mm);
    const parts = [state.scan.is_picture ? ["Pixel", voxel.slice(0, 2).join(", ")] : ["Voxel", voxel.join(", ")]];
    state.layers.forEach((layer) => {
      const there = voxelOf(layer, state.mm);
      if (layer.counts) parts.push([layer.name, `${layer.counts[indexOf(layer, there)]} of ${layer.frames}`]);
      else if (!layer.of) parts.push([layer.name, show(valueAt(layer, there))]);
    });
    $("values").replaceChildren(...parts.flatMap(([name, value], i) => [document.createTextNode(`${i ? "  ·  " : ""}${name} `), make("b", value)]));
    const scores = state.scan.slice_scores;
    const svg = articles[state.number].querySelector(".curve svg");
    if (!svg) return;
    const place = voxel[state.scan.axes[state.scan.plane][0]];
    const line = svg.querySelector(".cursor");
    line.setAttribute("x1", 1000 * place / (scores.length - 1));
    line.setAttribute("x2", 1000 * place / (scores.length - 1));
    svg.setAttribute("aria-valuenow", place);
    articles[state.number].querySelector(".at").textContent = ` · slice ${place}: ${show(scores[place])}`;
  }
  function curveOf(article) {
    const svg = article.querySelector(".curve svg");
    if (!svg) return;
    const jump = (place) => {
      const { scan } = state;
      const axis = scan.axes[scan.plane][0];
      const voxel = voxelOf(scan, state.mm);
      voxel[axis] = Math.min(Math.max(place, 0), scan.shape[axis] - 1);
      goTo(placeOf(scan.affine, voxel));
    };
    const drag = (event) => {
      const box = svg.getBoundingClientRect();
      jump(Math.round((event.clientX - box.left) / box.width * (state.scan.slice_scores.length - 1)));
    };
    svg.addEventListener("pointerdown", (event) => { svg.setPointerCapture(event.pointerId); drag(event); });
    svg.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
  }

  start().catch((error) => {
    document.body.classList.remove("live");
    $("viewer").hidden = true;
    articles.forEach((article) => {
      const note = article.querySelector(".no-viewer");
      note.textContent = `The viewer cannot start (${error.message}): one slice is shown instead.`;
      note.hidden = false;
    });
  });
})();
