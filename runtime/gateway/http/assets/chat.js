"use strict";
(() => {
  const { element, milliseconds } = draw;
  const by = (id) => document.getElementById(id);
  const messages = []; // the conversation, as the server gets it
  let answering = null; // the AbortController of the answer that is being streamed

  const bubble = (role, text) => {
    const content = document.createTextNode(text);
    const root = element("div", { class: `message ${role}` }, element("b", {}, role === "user" ? "You" : "Model"), content);
    by("chat-log").append(root);
    return { root, content };
  };
  const toEnd = (log) => { log.scrollTop = log.scrollHeight; };
  const working = (on) => {
    by("chat-send").disabled = by("chat-clear").disabled = on;
    by("chat-stop").disabled = !on;
  };

  const problem = async (response) => { // a proxy's error need not be JSON
    try {
      return (await response.json()).error.message;
    } catch { return `the server answered with the status ${response.status}`; }
  };

  // ---- the models that complete texts: the names that the endpoint knows
  let known = "";
  const refresh = async (names) => {
    if (names === known) return;
    known = names;
    let models = [];
    try {
      const response = await fetch("v1/models");
      if (!response.ok) throw new Error(await problem(response));
      models = (await response.json()).data.map((model) => model.id);
    } catch {
      known = null; // it is asked again with the next figures; the chat stays as it is until then
      return;
    }
    const select = by("chat-model"), chosen = select.value;
    by("chat").hidden = !models.length;
    select.replaceChildren(...models.map((name) => element("option", { value: name }, name)));
    if (models.includes(chosen)) select.value = chosen;
    by("chat-model-label").hidden = models.length < 2;
  };
  window.chatModels = (models) => refresh(models.filter((model) => model.text && model.ready).map((model) => model.name).join("\n"));

  // ---- one answer
  const number = (id) => (by(id).value === "" ? undefined : Number(by(id).value));
  const asked = () => ({
    model: by("chat-model").value, messages, stream: true, stream_options: { include_usage: true },
    temperature: number("chat-temperature"), max_tokens: number("chat-tokens"),
  });
  const events = async function* (body) { // the data of server-sent events
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  };
  const inFrames = (content) => { // a layout for each chunk would block the page when chunks come fast
    const log = by("chat-log");
    let held = "", frame = 0;
    const append = () => {
      frame = 0;
      if (!held) return;
      const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      content.appendData(held);
      held = "";
      if (follows) toEnd(log);
    };
    return {
      add: (text) => { held += text; frame ||= requestAnimationFrame(append); },
      end: () => { cancelAnimationFrame(frame); append(); },
    };
  };
  const answer = async (shown, signal) => {
    const begun = performance.now();
    const response = await fetch("v1/chat/completions", {
      method: "POST", signal, body: JSON.stringify(asked()), headers: { "content-type": "application/json" } });
    if (!response.ok) throw new Error(await problem(response));
    let first = 0, last = 0, tokens = 0, reason = "", ended = false;
    const show = inFrames(shown.content);
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") { ended = true; break; }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        const choice = chunk.choices[0], text = choice?.delta?.content;
        if (chunk.usage) tokens = chunk.usage.completion_tokens;
        if (choice?.finish_reason) reason = choice.finish_reason;
        if (!text) continue;
        last = performance.now();
        first ||= last;
        show.add(text);
      }
    } finally { show.end(); }
    if (!ended) throw new Error("the connection ended before the answer did");
    const rate = tokens > 1 && last > first ? `, ${((tokens - 1) / (last - first) * 1000).toFixed(1)} tokens/s` : "";
    const wait = first ? `, the first after ${milliseconds((first - begun) * 1e6)}` : "";
    return `${tokens} tokens${wait}${rate}${reason === "length" ? "; cut at the most tokens" : ""}.`;
  };
  const send = async () => {
    const text = by("chat-message").value.trim();
    if (!text || answering || by("chat").hidden) return;
    const log = by("chat-log");
    messages.push({ role: "user", content: text });
    const question = bubble("user", text), shown = bubble("assistant", "");
    shown.root.setAttribute("aria-busy", "true"); // it is read out when it is complete
    by("chat-message").value = "";
    by("chat-state").textContent = "answering";
    toEnd(log);
    answering = new AbortController();
    working(true);
    try {
      by("chat-state").textContent = await answer(shown, answering.signal);
    } catch (error) {
      by("chat-state").textContent = error.name === "AbortError" ? "Stopped." : `No answer: ${error.message}`;
    } finally {
      answering = null;
      working(false);
      shown.root.removeAttribute("aria-busy");
      if (shown.content.data) {
        messages.push({ role: "assistant", content: shown.content.data });
      } else { // the question can be sent again
        messages.pop();
        question.root.remove();
        shown.root.remove();
        if (!by("chat-message").value) by("chat-message").value = text;
      }
    }
  };
  const stop = () => { answering?.abort(); };

  by("chat-form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  by("chat-message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  by("chat").addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
  by("chat-stop").addEventListener("click", stop);
  by("chat-clear").addEventListener("click", () => {
    messages.length = 0;
    by("chat-log").replaceChildren();
    by("chat-state").textContent = "";
    by("chat-message").focus();
  });
})();
