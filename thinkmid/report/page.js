"use strict";
// Samples come from models: they reach the page through textContent alone.
(() => {
  const find = (id) => document.getElementById(id);
  if (!find("controls")) return;
  const groups = JSON.parse(find("samples").textContent);
  const BATCH = 8, MOST_WORDS = 400;
  let chosen = [], drawn = 0, timer = 0;

  function make(tag, name, text) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function box(label, text, name) {
    const part = document.createDocumentFragment();
    if (label) part.append(make("div", "name", label));
    const inner = make("div", name || "text");
    inner.dir = "auto";
    if (typeof text === "string") inner.textContent = text || " ";
    else inner.append(text);
    part.append(inner);
    return part;
  }

  // Longest common subsequence of words; what a has beyond it is struck, what b has is marked.
  function difference(a, b) {
    const x = a.match(/\S+/g) || [], y = b.match(/\S+/g) || [], out = document.createDocumentFragment();
    if (x.length > MOST_WORDS || y.length > MOST_WORDS) return document.createTextNode(b);
    const width = y.length + 1, best = new Uint16Array((x.length + 1) * width);
    for (let i = x.length - 1; i >= 0; i--)
      for (let j = y.length - 1; j >= 0; j--)
        best[i * width + j] = x[i] === y[j] ? best[(i + 1) * width + j + 1] + 1
          : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
    for (let i = 0, j = 0; i < x.length || j < y.length;) {
      if (i < x.length && j < y.length && x[i] === y[j]) out.append(y[j++] + " "), i++;
      else if (i < x.length && (j === y.length || best[(i + 1) * width + j] >= best[i * width + j + 1]))
        out.append(make("del", "", x[i++]), " ");
      else out.append(make("ins", "", y[j++]), " ");
    }
    return out;
  }

  const verdict = (s) => s.reward === null ? "no verdict" : "reward " + +s.reward.toFixed(4);

  function column(group, s, n) {
    const kind = s.reward === 1 ? " right" : s.reward === 0 ? " wrong" : "";
    const node = make("div", "column sample" + kind), head = make("div", "head");
    head.append(make("span", "", "sample " + n), make("span", "verdict", verdict(s)));
    if (s.tokens !== null) head.append(make("span", "", s.tokens + " tokens, " + (s.thinking ?? "?") + " thinking"));
    node.append(head);
    const thought = make("details");
    thought.append(make("summary", "", "thought"), box("", s.thought));
    node.append(thought);
    const compare = find("diff").checked && group.reference !== null;
    node.append(box(group.reference === null ? "answer" : "continuation",
      compare ? difference(group.reference, s.text) : s.text));
    node.append(box("how it ended, and why this verdict", s.finish + ": " + s.why, "text short"));
    return node;
  }

  function card(group, shown) {
    const node = make("article", "group"), head = make("div", "head");
    const known = group.samples.filter((s) => s.reward !== null);
    const mean = known.reduce((sum, s) => sum + s.reward, 0) / known.length;
    head.append(make("span", "", known.length ? "mean reward " + mean.toFixed(2) : "no verdict"));
    head.append(make("span", "", shown.length + " of " + group.samples.length + " samples"));
    node.append(head, box("", group.run + "   " + group.where + "   " + group.id, "text short"));
    if (group.prompt) node.append(box("prompt", group.prompt, "text short"));
    const columns = make("div", "columns");
    if (group.reference !== null || group.gold !== null) {
      const own = make("div", "column");
      own.append(make("div", "head", group.reference !== null ? "reference" : "gold answer"));
      own.append(box("", group.reference !== null ? group.reference : group.gold));
      columns.append(own);
    }
    for (const n of shown) columns.append(column(group, group.samples[n], n));
    node.append(columns);
    return node;
  }

  function fits(group, s) {
    const reward = find("by-reward").value, finish = find("by-finish").value;
    const kind = s.reward === null ? "none" : s.reward === 1 ? "1" : s.reward === 0 ? "0" : "between";
    if (reward && reward !== kind || finish && finish !== "=" + s.finish) return false;
    const words = find("by-text").value.toLowerCase();
    return !words || [group.id, group.prompt, group.reference, group.gold, s.thought, s.text, s.why]
      .some((text) => text && text.toLowerCase().includes(words));
  }

  function more() {
    const next = chosen.slice(drawn, drawn + BATCH);
    find("groups").append(...next.map(([group, shown]) => card(group, shown)));
    drawn += next.length;
    find("more").hidden = drawn >= chosen.length;
  }

  function filter() {
    const run = find("by-run").value, where = find("by-where").value;
    chosen = [];
    let count = 0;
    for (const group of groups) {
      if (run && run !== "=" + group.run || where && where !== "=" + group.where) continue;
      const shown = [...group.samples.keys()].filter((n) => fits(group, group.samples[n]));
      if (shown.length) chosen.push([group, shown]);
      count += shown.length;
    }
    find("count").textContent = count + " samples in " + chosen.length + " groups";
    find("groups").replaceChildren();
    drawn = 0;
    more();
  }

  function options(id, values) {
    const before = find(id).value, any = make("option", "", "any");
    any.value = "";
    find(id).replaceChildren(any, ...[...new Set(values)].map((value) => {
      const node = make("option", "", value);
      node.value = "=" + value;  // so that a value of "" is not "any"
      return node;
    }));
    find(id).value = before;
    if (find(id).selectedIndex < 0) find(id).value = "";
  }

  function places() {
    const run = find("by-run").value;
    options("by-where", groups.filter((g) => !run || run === "=" + g.run).map((g) => g.where));
  }

  options("by-run", groups.map((g) => g.run));
  options("by-finish", groups.flatMap((g) => g.samples.map((s) => s.finish)));
  places();
  find("by-run").addEventListener("change", () => { places(); filter(); });
  for (const id of ["by-where", "by-reward", "by-finish", "diff"]) find(id).addEventListener("change", filter);
  find("by-text").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 150); });
  find("more").addEventListener("click", more);
  find("controls").hidden = false;
  filter();
})();
