"use strict";
// A query is {text, file, like: {id, name}, filters}; filters are pairs like ["mime=", "image/png"], as in the facets
// form. The browser's history keeps the queries, so that Back returns to the previous search; as it cannot hold files,
// it has their keys in this map.
const files = new Map();
const PAGE_SIZE = 30;
const byId = id => document.getElementById(id);
let query, hits = [], facets = [], opened = -1, apiKey = "", unlocking = null;
let searching = new AbortController(), looking = new AbortController();

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function show(id, text) {
  byId(id).textContent = text;
  byId(id).hidden = !text;
}

function fail(error) {
  if (error.name === "AbortError") return;
  byId("error").hidden = false;
  byId("error").firstElementChild.textContent = error.message;
  byId("retry").hidden = !error.isTemporary;
}

const failure = (message, isTemporary) => Object.assign(new Error(message), {isTemporary});

async function call(path, options = {}) {
  for (;;) {
    const key = apiKey, headers = key ? {Authorization: `Bearer ${key}`} : {};
    const response = await fetch(path, {...options, headers}).catch(error => {
      throw error.name === "AbortError" ? error : failure("The server does not answer. Is it still running?", true);
    });
    if (response.ok) return response;
    const status = `The server answered with status ${response.status}.`;
    const message = await response.json().then(body => body.error.message, () => status);
    if (response.status !== 401) throw failure(message, response.status >= 429);
    if (key === apiKey) await (unlocking ??= askForKey(key && "The server refused this key."));
  }
}

function askForKey(message) {
  show("unlock-error", message);
  byId("unlock").showModal();
  return new Promise((resolve, reject) => {
    byId("unlock").onclose = () => {
      const bytes = new TextEncoder().encode(byId("key").value.trim());  // a header has one character per byte
      if (byId("unlock").returnValue) resolve(apiKey = String.fromCharCode(...bytes));
      else reject(failure("The server needs its API key.", true));
      byId("key").value = byId("unlock").returnValue = "";
      unlocking = null;
    };
  });
}

// Pictures are fetched, not linked: an <img> sends no key, and gives no reason to show when it fails.
const showPicture = async (image, path, signal) => showBlob(image, await (await call(path, {signal})).blob(), signal);

async function showBlob(image, blob, signal) {
  if (signal.aborted) return;
  image.src = URL.createObjectURL(blob);
  signal.addEventListener("abort", URL.revokeObjectURL.bind(URL, image.src));
  await image.decode().catch(() => { throw failure("This picture cannot be shown."); });
}

const nameOf = hit => hit.caption || hit.path.split(/[/\\]/).pop();
const breakable = text => text.split(/(?<=[/\\_])/).flatMap(part => [part, element("wbr")]);
const pictures = count => `${count.toLocaleString("en")} picture${count === 1 ? "" : "s"}`;
const plainKey = key => key.replace(/^"(.*)"$/s, "$1");
const facetName = key => key === "mtime" ? "modified" : plainKey(key).replaceAll("_", " ");
const facetValue = (key, value) => key === "mtime" ? new Date(value * 1000).toISOString().slice(0, 10) : value;

// The values of one key form one filter: any of them will do. A plain word is not quoted, as it may be a boolean.
function filterTexts() {
  const choices = new Map(), others = [];
  for (const [name, value] of query.filters) {
    const quoted = /^[\w.-]+$/.test(value) ? value : JSON.stringify(value);
    if (/[<>]=$/.test(name)) others.push(name + value);
    else if (name.endsWith("~")) others.push(name + JSON.stringify(value));
    else choices.set(name, [...(choices.get(name) ?? []), quoted]);
  }
  return [...[...choices].map(([name, values]) => name + values.join("|")), ...others];
}

function facetControls({key, kind, values, min, max}) {
  const given = name => query.filters.filter(each => each[0] === name).map(each => each[1]);
  const input = (operator, label, properties) => element("input", {
    name: key + operator, value: given(key + operator)[0] ?? "", ariaLabel: `${facetName(key)} ${label}`, ...properties,
  });
  if (kind === "keyword") {
    return element("div", {className: "values-of"}, ...values.map(([value, count]) => element("label", {},
      element("input", {type: "checkbox", name: `${key}=`, value, checked: given(`${key}=`).includes(value)}),
      element("span", {textContent: value}), element("small", {textContent: count.toLocaleString("en")}))));
  }
  if (kind === "text") return input("~", "contains the words", {type: "search", placeholder: "contains words"});
  const type = key === "mtime" ? {type: "date"} : {type: "number", step: "any"};
  return element("div", {className: "range"},
    input(">=", "at least", {...type, placeholder: min}), input("<=", "at most", {...type, placeholder: max}));
}

function showFacets() {
  const useful = ["keyword", "text", "number"].flatMap(kind =>
    facets.filter(facet => facet.kind === kind && (kind !== "number" || facet.min < facet.max)));
  byId("filters").hidden = !useful.length;
  byId("facets").replaceChildren(...useful.map(facet =>
    element("fieldset", {}, element("legend", {textContent: facetName(facet.key)}), facetControls(facet))));
}

function queryOfHistory() {
  if (history.state) return {...history.state, file: files.get(history.state.file) ?? null};
  const given = [...new URLSearchParams(location.search)], first = name => given.find(each => each[0] === name)?.[1];
  const like = first("like") ? {id: first("like"), name: ""} : null;
  return {text: first("text") ?? "", file: null, like, filters: given.filter(([name]) => /[=~]$/.test(name))};
}

function change(changes) {
  query = {...query, text: byId("text").value, ...changes};
  const parts = [...query.filters, ["text", query.text], ["like", query.like?.id ?? ""]].filter(([, value]) => value);
  const file = query.file && Date.now() + Math.random();
  files.set(file, query.file);
  history.pushState({...query, file}, "", `?${new URLSearchParams(parts)}`);
  search();
}

function showQuery({signal}) {
  const {file, like, filters, text} = query, image = byId("example-image");
  byId("text").value = text;
  byId("file").value = "";
  byId("clear").hidden = !filters.length;
  byId("chosen").textContent = filters.length ? `(${filters.length})` : "";
  byId("drop").hidden = Boolean(file || like);
  byId("example").hidden = image.hidden = !(file || like);
  byId("example-name").textContent = like ? `Like ${like.name || "this picture"}` : file?.name;
  image.alt = like ? "The picture to find more like" : "The picture to search with";
  image.removeAttribute("src");
  const shown = like ? showPicture(image, `thumbnail/${encodeURIComponent(like.id)}?size=160`, signal)
    : file && showBlob(image, file, signal);
  shown?.catch(() => { image.hidden ||= !signal.aborted; });  // a format that only the server reads, or a broken one
}

async function search() {
  searching.abort();
  searching = new AbortController();
  hits = [];
  opened = -1;
  byId("full").close();
  showQuery(searching);
  if (query.text.trim() || query.file || query.like) return fetchHits();
  byId("hits").replaceChildren();
  show("status", "Describe a picture, drop one here, or both.");
  byId("error").hidden = byId("more").hidden = true;
  document.querySelector("main").ariaBusy = "false";
}

async function fetchHits() {
  const {signal} = searching, body = new FormData(), offset = hits.length;
  const fields = {text: query.text.trim(), image: query.file, like: query.like?.id, limit: PAGE_SIZE, offset};
  for (const [name, value] of Object.entries(fields)) if (value || value === 0) body.append(name, value);
  for (const text of filterTexts()) body.append("filters", text);
  document.querySelector("main").ariaBusy = "true";
  byId("error").hidden = byId("more").disabled = true;
  show("status", "Searching …");
  let found = {hits: []}, status = "";
  try {
    found = await (await call("search", {method: "POST", body, signal})).json();
    const hint = query.filters.length ? "No picture passes all filters." : "The collection has no pictures.";
    const count = offset + found.hits.length;
    status = count ? `${pictures(count)}, nearest first (${found.seconds.toFixed(2)} s)` : `Nothing found. ${hint}`;
  } catch (error) {
    fail(error);
  }
  if (signal.aborted) return;
  if (!offset) byId("hits").replaceChildren();
  byId("hits").append(...found.hits.map((hit, index) => card(hit, offset + index, signal)));
  hits.push(...found.hits);
  const isLost = !offset && document.activeElement === document.body;  // the focus was on one of the previous hits
  if (isLost) byId("hits").querySelector("button")?.focus({preventScroll: true});
  show("status", status);
  byId("more").hidden = found.hits.length < PAGE_SIZE;
  byId("more").disabled = false;
  document.querySelector("main").ariaBusy = "false";
}

function card(hit, index, signal) {
  const image = element("img", {alt: nameOf(hit), draggable: false}), score = hit.score.toFixed(3);
  showPicture(image, `thumbnail/${encodeURIComponent(hit.id)}?size=320`, signal).catch(error => {
    if (!signal.aborted) image.replaceWith(element("span", {className: "broken", textContent: error.message}));
  });
  return element("li", {}, element("button",
    {type: "button", ariaLabel: `${nameOf(hit)}, score ${score}`, onclick: () => look(index)}, image,
    element("span", {className: hit.caption ? "caption" : "path", textContent: nameOf(hit)}),
    element("span", {className: "score", textContent: score})));
}

async function look(index) {
  opened = index;
  const hit = hits[index], image = byId("full-image"), small = byId("hits").children[index].querySelector("img");
  looking.abort();
  looking = new AbortController();
  const {signal} = looking;
  byId("full-name").textContent = image.alt = nameOf(hit);
  byId("previous").disabled = index === 0;
  byId("next").disabled = index === hits.length - 1;
  const values = facets.filter(({key}) => key !== "caption").map(({key}) => {
    const isColumn = key.startsWith("metadata."), name = isColumn ? key.slice("metadata.".length) : plainKey(key);
    const value = (isColumn ? undefined : hit.payload[name]) ?? hit.payload.metadata?.[name];
    return [facetName(key), [value ?? []].flat().map(each => facetValue(key, each)).join(", ")];
  });
  const facts = [["file", hit.path], ["score", hit.score.toFixed(4)], ...values].filter(([, value]) => value !== "");
  byId("facts").replaceChildren(...facts.map(([name, value]) =>
    element("div", {}, element("dt", {textContent: name}), element("dd", {}, ...breakable(value)))));
  show("full-error", "");
  image.hidden = !small;
  if (small) image.src = small.src;
  if (!byId("full").open) byId("full").showModal();
  const full = element("img"), address = `image/${encodeURIComponent(hit.id)}`;
  const reason = await showPicture(full, address, signal).then(() => "", error => error.message);
  if (signal.aborted) return;
  show("full-error", reason);
  if (!reason) Object.assign(image, {src: full.src, hidden: false});
}

byId("full").onclose = () => { looking.abort(); byId("hits").children[opened]?.firstElementChild.focus(); };
byId("full").onclick = event => { if (event.target === byId("full")) byId("full").close(); };
byId("close").onclick = () => byId("full").close();
byId("previous").onclick = () => look(opened - 1);
byId("next").onclick = () => look(opened + 1);
byId("like").onclick = () => {
  scrollTo(0, 0);
  change({text: "", file: null, like: {id: hits[opened].id, name: nameOf(hits[opened])}});
};
byId("query").onsubmit = event => { event.preventDefault(); change({}); };
byId("remove").onclick = () => { change({file: null, like: null}); byId("text").focus(); };
byId("more").onclick = fetchHits;
byId("retry").onclick = start;
byId("clear").onclick = () => { change({filters: []}); showFacets(); };
byId("facets").onsubmit = event => event.preventDefault();
byId("facets").onchange = () => change({filters: [...new FormData(byId("facets"))].filter(each => each[1].trim())});
byId("file").onchange = () => take([...byId("file").files]);

function take(given) {
  const file = given.find(each => each.type.startsWith("image/")) ?? given[0];
  if (!file) return fail(failure("That is not a file. Drop or paste a picture."));
  if (file.type && !file.type.startsWith("image/")) return fail(failure(`${file.name} is not a picture.`));
  change({file, like: null});
}

document.addEventListener("paste", event => {
  const pasted = [...event.clipboardData.files];
  if (pasted.length) { event.preventDefault(); take(pasted); }
});
document.addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("dragging"); });
document.addEventListener("dragleave", event => document.body.classList.toggle("dragging", !!event.relatedTarget));
document.addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take([...event.dataTransfer.files]);
});

document.addEventListener("keydown", event => {
  const {key} = event, active = document.activeElement;
  if (event.ctrlKey || event.metaKey || event.altKey || byId("unlock").open) return;
  if (byId("full").open) return byId({ArrowLeft: "previous", ArrowRight: "next"}[key])?.click();
  const buttons = [...byId("hits").querySelectorAll("button")], at = buttons.indexOf(active);
  const columns = buttons.filter(each => each.offsetTop === buttons[0].offsetTop).length;
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[key];
  let target = null;
  if (key === "/" ? !active.matches("input:not([type=checkbox])") : key === "Escape" && at >= 0) target = byId("text");
  else if (key === "ArrowDown" && active === byId("text")) target = buttons[0];
  else if (step && at >= 0) target = at + step < 0 ? byId("text") : buttons[Math.min(at + step, buttons.length - 1)];
  if (!target) return;
  event.preventDefault();
  target.focus();
});

addEventListener("popstate", () => {
  query = queryOfHistory();
  showFacets();
  search();
});

async function start() {
  search();
  try {
    const info = await (await call("info")).json();
    facets = info.facets;
    byId("collection").textContent = document.title = info.collection;
    byId("about").textContent = `${pictures(info.points)}, searched with ${info.model}`;
    showFacets();
  } catch (error) {
    fail(error);
  }
}

byId("filters").open = matchMedia("(min-width: 761px)").matches;
query = queryOfHistory();
start();
