// Talk to the model that this server has: a conversation with a dialogue model, a sheet to go on writing with a base
// model.  What a model or a user wrote is only ever set as text.

const WORDS = {
  tr: {
    new: "Yeni", settings: "Ayarlar", language: "Dil", theme: "Açık / koyu görünüm", send: "Gönder", go: "Devam et",
    stop: "Durdur", retry: "Yeniden", undo: "Geri al", copy: "Kopyala", copied: "Kopyalandı", close: "Tamam",
    defaults: "Varsayılanlar", message: "Bir şey yazın…", hello: "Merhaba!",
    helloMore: "Bu model kendi bilgisayarınızda çalışıyor, internet gerekmez. Ne konuşalım?",
    baseHint: "Bu model sohbet etmez, metni sürdürür: bir başlangıç yazın, gerisini o getirsin. Modelin yazdığı renklidir.",
    sheet: "Metin", sheetPlaceholder: "Bir varmış, bir yokmuş…", system: "Sistem mesajı", temperature: "Sıcaklık",
    max_tokens: "En çok belirteç", top_p: "top-p", top_k: "top-k (0: hepsi)", min_p: "min-p",
    repetition_penalty: "Tekrar cezası", seed: "Tohum", seedNone: "rastgele",
    keyTitle: "Anahtar gerekli", keyMore: "Bu sunucu bir API anahtarı istiyor. Sekme kapanınca unutulur.",
    key: "API anahtarı", enter: "Gir", wrongKey: "Bu anahtar tutmadı.", tokens: "belirteç", second: "sn",
    full: "sınıra ulaştı", ended: "Metin burada bitti.", lost: "Sunucuya ulaşılamıyor.",
    queue_full: "Sunucu şu anda dolu. Biraz sonra yeniden deneyin.",
    not_serving: "Sunucu duruyor ya da modeli yanıt veremiyor.",
    context_length_exceeded: "Metin, modelin bağlamına sığmayacak kadar uzun. Kısaltın.",
    keysTalk: "Enter gönderir · Shift+Enter yeni satır · Esc durdurur", keysWrite: "Ctrl+Enter sürdürür · Esc durdurur",
  },
  en: {
    new: "New", settings: "Settings", language: "Language", theme: "Light / dark", send: "Send", go: "Continue",
    stop: "Stop", retry: "Again", undo: "Undo", copy: "Copy", copied: "Copied", close: "Done",
    defaults: "Defaults", message: "Write something…", hello: "Hello!",
    helloMore: "This model runs on your own computer, no internet needed. What shall we talk about?",
    baseHint: "This model does not chat, it continues a text: write a beginning and let it go on. What the model wrote is coloured.",
    sheet: "Text", sheetPlaceholder: "Once upon a time…", system: "System message", temperature: "Temperature",
    max_tokens: "Most tokens", top_p: "top-p", top_k: "top-k (0: all)", min_p: "min-p",
    repetition_penalty: "Repetition penalty", seed: "Seed", seedNone: "random",
    keyTitle: "A key is needed", keyMore: "This server asks for an API key. It is forgotten when the tab is closed.",
    key: "API key", enter: "Enter", wrongKey: "That key is not the right one.", tokens: "tokens", second: "s",
    full: "limit reached", ended: "The text ended here.", lost: "The server cannot be reached.",
    queue_full: "The server is busy right now. Try again in a moment.",
    not_serving: "The server is stopping, or its model cannot answer.",
    context_length_exceeded: "The text is too long for the model's context. Shorten it.",
    keysTalk: "Enter sends · Shift+Enter a new line · Esc stops", keysWrite: "Ctrl+Enter continues · Esc stops",
  },
};
// The same as `lowvram chat`.
const DEFAULTS = { system: "", temperature: 0.8, max_tokens: 256, top_p: 0.95, top_k: 50, min_p: 0, repetition_penalty: 1.1, seed: "" };
const $ = (id) => document.getElementById(id);
const state = { lang: "en", speaks: true, turns: [], stopping: null, before: [], limit: 0, sheet: "", written: [] };

const t = (word) => WORDS[state.lang][word];
const remembered = (name, otherwise) => localStorage.getItem(`lowvram.${name}`) ?? otherwise;
const remember = (name, value) => localStorage.setItem(`lowvram.${name}`, value);

function speak(lang) {
  state.lang = lang;
  document.documentElement.lang = lang;
  for (const one of document.querySelectorAll("[data-t]")) one.textContent = t(one.dataset.t);
  for (const one of document.querySelectorAll("[data-label]")) one.setAttribute("aria-label", t(one.dataset.label));
  for (const one of document.querySelectorAll("[data-placeholder]")) one.placeholder = t(one.dataset.placeholder);
  for (const one of document.querySelectorAll("[data-lang]")) one.setAttribute("aria-pressed", one.dataset.lang === lang);
  $("send").textContent = t(state.speaks ? "send" : "go");
  $("keys").textContent = t(state.speaks ? "keysTalk" : "keysWrite");
}

function paint(theme) {
  document.documentElement.dataset.theme = theme;
}

// --- the server

function headers() {
  const key = sessionStorage.getItem("lowvram.key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { headers: headers(), credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(t("lost"));
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw problem(body?.error ?? { message: `HTTP ${answer.status}` }, answer.status);
}

// The server's own words are English; what happens to everybody is said in the reader's language.
function problem(error, status) {
  return Object.assign(new Error(WORDS[state.lang][error.code] ?? error.message), { status });
}

// Give each event of a stream to `take`; returns when the server says that it is done.
async function follow(path, body, signal, take) {
  const answer = await ask(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error(t("lost"));
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw problem(found.error, 200);
      take(found);
    }
  }
}

function sampling() {
  const body = { stream: true, stream_options: { include_usage: true }, truncation: "auto" };
  for (const name of Object.keys(DEFAULTS)) {
    const value = $(name).value.trim();
    if (name !== "system" && value !== "" && Number.isFinite(Number(value))) body[name] = Number(value);
  }
  body.max_tokens = Math.min(body.max_tokens ?? DEFAULTS.max_tokens, state.limit);
  return body;
}

// Run one answer; `say` gets each piece of text.  Returns how it ended: { reason, written, isExact, seconds }.
async function answer(path, body, say) {
  const stopping = new AbortController();
  const end = { reason: "stopped", written: 0, isExact: false, seconds: 0 };
  let first = 0;
  state.stopping = stopping;
  notice("");
  show();
  try {
    await follow(path, body, stopping.signal, (event) => {
      first ||= performance.now();
      if (event.usage) Object.assign(end, { written: event.usage.completion_tokens, isExact: true });
      const choice = event.choices[0];
      if (!choice) return;
      const piece = choice.delta ? choice.delta.content ?? "" : choice.text;
      // The counts come at the end; an answer that is stopped before has had about a token in each piece.
      if (piece !== "") end.written += 1;
      say(piece);
      end.reason = choice.finish_reason ?? end.reason;
    });
  } catch (error) {
    if (error.name !== "AbortError") {
      notice(error.message);
      end.reason = "error";
    }
    if (error.status === 401) enter();
  } finally {
    if (first) end.seconds = (performance.now() - first) / 1000;
    state.stopping = null;
    show();
  }
  return end;
}

// How many tokens an answer had and how fast they came; "" where there was none.
function tell(end) {
  if (!end.written || !(end.seconds > 0)) return "";
  const speed = (end.written / end.seconds).toFixed(end.written < 10 * end.seconds ? 1 : 0);
  const full = end.reason === "length" ? ` · ${t("full")}` : "";
  return `${end.isExact ? "" : "≈ "}${end.written} ${t("tokens")} · ${speed} ${t("tokens")}/${t("second")}${full}`;
}

// --- the page

function notice(text) {
  $("notice").textContent = text;
}

function show() {
  const busy = state.stopping !== null;
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  $("undo").hidden = state.speaks || busy || state.before.length === 0;
  $("retry").hidden = $("undo").hidden;
  $("sheet").readOnly = busy;
  $("new").disabled = busy;
}

function element(kind, name, text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

function isAtEnd(box) {
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}

function addTurn(role, text) {
  const turn = element("div", `turn ${role}`);
  const words = element("div", "text", text);
  words.dir = "auto";
  turn.append(words);
  $("turns").append(turn);
  $("talk").scrollTop = $("talk").scrollHeight;
  return { turn, words };
}

function addBelow(turn, text, end) {
  const below = element("div", "below");
  const copy = element("button", "quiet", t("copy"));
  copy.type = "button";
  copy.hidden = !navigator.clipboard; // browsers give it to safe origins alone
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = t("copied");
  });
  const again = element("button", "quiet", t("retry"));
  again.type = "button";
  again.dataset.t = "retry";
  again.addEventListener("click", retryTurn);
  below.append(copy, again);
  if (tell(end)) below.append(element("span", "count", tell(end)));
  turn.append(below);
}

async function say(text) {
  state.turns.push({ role: "user", content: text });
  addTurn("user", text);
  await reply();
}

async function reply() {
  for (const one of document.querySelectorAll(".below button + button")) one.remove();
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...state.turns];
  const { turn, words } = addTurn("assistant", "");
  turn.classList.add("busy");
  let text = "";
  const end = await answer("/v1/chat/completions", { ...sampling(), messages }, (piece) => {
    const follows = isAtEnd($("talk"));
    // A model may begin with a space, as it learnt to part words; it is kept for the model and not shown.
    const shown = text.trimStart().length;
    text += piece;
    words.append(text.trimStart().slice(shown));
    if (follows) $("talk").scrollTop = $("talk").scrollHeight;
  });
  turn.classList.remove("busy");
  if (text === "" && (end.reason === "error" || end.reason === "stopped")) {
    // Nothing came: the question goes back to where it can be mended.
    turn.remove();
    const asked = state.turns.pop();
    $("turns").lastElementChild?.remove();
    if ($("input").value === "") $("input").value = asked.content;
  } else {
    state.turns.push({ role: "assistant", content: text });
    addBelow(turn, text.trimStart(), end);
    if (text === "") notice(t("ended"));
  }
  fitInput();
  $("talk").scrollTop = $("talk").scrollHeight;
}

async function retryTurn() {
  if (state.stopping || state.turns.at(-1)?.role !== "assistant") return;
  state.turns.pop();
  $("turns").lastElementChild.remove();
  $("input").focus();
  await reply();
}

async function goOn() {
  const sheet = $("sheet");
  state.before.push({ text: sheet.value, written: state.written });
  const range = [sheet.value.length, sheet.value.length];
  state.written = [...state.written, range];
  $("count").textContent = "";
  const end = await answer("/v1/completions", { ...sampling(), prompt: sheet.value }, (piece) => {
    const follows = isAtEnd(sheet);
    sheet.value += piece;
    range[1] = sheet.value.length;
    markWritten();
    if (follows) sheet.scrollTop = sheet.scrollHeight;
  });
  $("count").textContent = tell(end);
  if (range[0] === range[1]) {
    state.written = state.before.pop().written;
    if (end.reason === "stop") notice(t("ended"));
  }
  show();
  sheet.focus();
}

// Lay the marks of what the model wrote behind the text of the sheet.
function markWritten() {
  const sheet = $("sheet");
  state.sheet = sheet.value;
  const parts = [];
  let end = 0;
  for (const [from, to] of state.written) {
    parts.push(state.sheet.slice(end, from), element("mark", "", state.sheet.slice(from, to)));
    end = to;
  }
  // A last line break has a line of its own in a text field alone.
  $("marks").replaceChildren(...parts, `${state.sheet.slice(end)}\n`);
  $("marks").scrollTop = sheet.scrollTop;
}

// Move the marks with the text around a place where somebody has typed.
function moveMarks() {
  const old = state.sheet, now = $("sheet").value;
  let same = 0, behind = 0;
  while (same < Math.min(old.length, now.length) && old[same] === now[same]) same += 1;
  while (behind < Math.min(old.length, now.length) - same && old.at(-1 - behind) === now.at(-1 - behind)) behind += 1;
  const tail = old.length - behind, grown = now.length - old.length;
  // What was typed is nobody's but the writer's: a range around it falls into two.
  const pieces = state.written.flatMap(([from, to]) => [
    [from, Math.min(to, same)],
    [Math.max(from, tail) + grown, to + grown],
  ]);
  state.written = pieces.filter(([from, to]) => from < to);
  markWritten();
}

function undo() {
  const { text, written } = state.before.pop();
  $("sheet").value = text;
  state.written = written;
  markWritten();
  $("count").textContent = "";
  notice("");
  show();
  $("sheet").focus();
}

function startAnew() {
  state.turns = [];
  state.before = [];
  $("turns").replaceChildren();
  $("sheet").value = $("count").textContent = "";
  state.written = [];
  markWritten();
  notice("");
  show();
  $(state.speaks ? "input" : "sheet").focus();
}

function fitInput() {
  const input = $("input");
  input.rows = Math.min(8, Math.max(1, input.value.split("\n").length));
  if (input.scrollHeight > input.clientHeight + 4) input.rows = Math.min(8, input.rows + 1);
}

function submit() {
  if (state.stopping) return;
  if (!state.speaks) return void goOn();
  const text = $("input").value.trim();
  if (text === "") return;
  $("input").value = "";
  fitInput();
  say(text);
}

function fillSettings(from) {
  for (const [name, value] of Object.entries(DEFAULTS)) $(name).value = from(name, value);
}

function enter() {
  $("wrong-key").textContent = sessionStorage.getItem("lowvram.key") ? t("wrongKey") : "";
  $("key").value = "";
  if (!$("door").open) $("door").showModal();
}

// Ask what model is there; the key is asked for where the server wants one.
async function arrive() {
  try {
    const found = (await (await ask("/v1/models")).json()).data[0];
    state.speaks = found.speaks;
    state.limit = found.max_output_tokens;
    $("model").textContent = document.title = found.id;
    notice("");
  } catch (error) {
    if (error.status === 401) return enter();
    return notice(error.message);
  }
  document.body.classList.toggle("is-base", !state.speaks);
  $("talk").hidden = !state.speaks;
  $("write").hidden = state.speaks;
  $("system-row").hidden = !state.speaks;
  speak(state.lang);
  show();
  $(state.speaks ? "input" : "sheet").focus();
}

function listen() {
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  $("input").addEventListener("input", fitInput);
  $("input").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") state.stopping?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !state.speaks) submit();
  });
  $("sheet").addEventListener("input", () => { state.before = []; moveMarks(); show(); });
  $("sheet").addEventListener("scroll", () => { $("marks").scrollTop = $("sheet").scrollTop; });
  for (const box of [$("sheet"), $("marks"), $("talk")]) {
    box.addEventListener("scroll", () => box.classList.toggle("is-scrolled", box.scrollTop > 0));
  }
  $("stop").addEventListener("click", () => { state.stopping?.abort(); $(state.speaks ? "input" : "sheet").focus(); });
  $("undo").addEventListener("click", undo);
  $("retry").addEventListener("click", () => { undo(); goOn(); });
  $("new").addEventListener("click", startAnew);
  $("open-settings").addEventListener("click", () => $("settings").showModal());
  $("settings").addEventListener("close", () => { for (const name of Object.keys(DEFAULTS)) remember(name, $(name).value); });
  $("defaults").addEventListener("click", () => fillSettings((_, value) => value));
  $("door").addEventListener("close", () => { sessionStorage.setItem("lowvram.key", $("key").value.trim()); arrive(); });
  $("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    remember("theme", theme);
    paint(theme);
  });
  for (const one of document.querySelectorAll("[data-lang]")) {
    one.addEventListener("click", () => { remember("lang", one.dataset.lang); speak(one.dataset.lang); });
  }
}

paint(remembered("theme", matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
fillSettings(remembered);
listen();
speak(remembered("lang", navigator.language.toLowerCase().startsWith("tr") ? "tr" : "en"));
show();
arrive();
