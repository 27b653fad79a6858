"use strict";
(function () {
  function all(selector, within) { return Array.prototype.slice.call((within || document).querySelectorAll(selector)); }
  function one(selector, within) { return (within || document).querySelector(selector); }
  function data(id) { return JSON.parse(document.getElementById(id).textContent); }
  // Text goes in as text and never as markup, whatever it says.
  function make(tag, text, name) {
    var node = document.createElement(tag);
    if (text !== undefined && text !== null) { node.textContent = text; }
    if (name) { node.className = name; }
    return node;
  }
  function short(value) {
    if (value === null || value === undefined) { return "–"; }
    return typeof value === "number" ? String(Number(value.toPrecision(3))) : String(value);
  }

  // --- light and dark
  var root = document.documentElement, themes = ["system", "light", "dark"], button = document.getElementById("theme");
  function kept() { try { return localStorage.getItem("greatctl-theme"); } catch (_) { return null; } }
  function keep(theme) { try { localStorage.setItem("greatctl-theme", theme); } catch (_) { /* a page from file:// may not */ } }
  function dress(theme) {
    if (theme === "system") { root.removeAttribute("data-theme"); } else { root.setAttribute("data-theme", theme); }
    button.textContent = "Theme: " + theme;
    recolour();
  }
  button.hidden = false;
  button.addEventListener("click", function () {
    var theme = themes[(themes.indexOf(root.getAttribute("data-theme") || "system") + 1) % 3];
    keep(theme);
    dress(theme);
  });

  // --- charts: drawn when they come into view, all of them before printing; plotly is run before the first of them,
  // since it takes longer than everything else
  var figures = data("figures"), charts = all(".chart");
  function ink() { return getComputedStyle(document.body).color; }
  function plotly() {
    var code = document.getElementById("plotly");
    if (typeof Plotly === "undefined" && code && code.textContent) { document.head.appendChild(make("script", code.textContent)); }
    return typeof Plotly !== "undefined";
  }
  function draw(node) {
    if (node.dataset.drawn || !plotly()) { return; }
    node.dataset.drawn = "1";
    var figure = figures[Number(node.dataset.chart)];
    var layout = Object.assign({}, figure.layout, { font: Object.assign({}, figure.layout.font, { color: ink() }) });
    Plotly.newPlot(node, figure.data.map(function (trace) { return Object.assign({}, trace); }), layout,
      { displayModeBar: false, responsive: true });
    mask(node);
  }
  function recolour(colour) {
    charts.forEach(function (node) {
      if (node.dataset.drawn) { Plotly.relayout(node, { "font.color": colour || ink() }); }
    });
  }
  window.addEventListener("load", function () {
    if (typeof IntersectionObserver === "undefined") { charts.forEach(draw); return; }
    var seen = new IntersectionObserver(function (entries) {
      entries.forEach(function (entry) { if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); } });
    }, { rootMargin: "400px" });
    charts.forEach(function (node) { seen.observe(node); });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", function () { recolour(); });
  var folded = [];
  window.addEventListener("beforeprint", function () {
    folded = all("details.card:not([open]):not(.record)");
    folded.forEach(function (node) { node.open = true; });
    charts.forEach(draw);
    recolour("#000");
  });
  window.addEventListener("afterprint", function () {
    folded.forEach(function (node) { node.open = false; });
    recolour();
  });

  // --- maps: which of them, and which of their cells
  function mask(node) {
    var section = node.closest("section"), form = section && one("form.filter[data-maps]", section);
    var trace = figures[Number(node.dataset.chart)].data[0];
    if (!form || !trace || trace.type !== "heatmap" || !node.dataset.drawn) { return; }
    var least = Number(form.elements.least.value), sure = form.elements.sure.checked, p = trace.customdata;
    var z = trace.z.map(function (row, i) {
      return row.map(function (value, j) {
        if (value === null || Math.abs(value) < least) { return null; }
        return sure && !(p && p[i][j] !== null && p[i][j] <= 0.05) ? null : value;
      });
    });
    Plotly.restyle(node, { z: [z] }, [0]);
  }
  all("section > form.filter:not(#seek)").forEach(function (form) {
    form.hidden = false;
    form.dataset.maps = "1";
    var selects = all("select", form), section = form.closest("section");
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    form.addEventListener("input", function () {
      one("output", form).textContent = form.elements.least.value;
      all("figure[data-tag-0]", section).forEach(function (figure) {
        figure.hidden = selects.some(function (select, n) {
          return select.value && select.value !== figure.getAttribute("data-tag-" + n);
        });
        if (!figure.hidden) { all(".chart", figure).forEach(mask); }
      });
    });
  });

  // --- tables that stand on the page
  function compare(x, y) {
    if (x === y) { return 0; }
    if (x === null || x === undefined) { return 1; }
    if (y === null || y === undefined) { return -1; }
    return x < y ? -1 : 1;
  }
  function mark(head, up) {
    all("th", head.parentNode).forEach(function (th) { th.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  }
  function value(row, index) {
    var cell = row.cells[index];
    if (cell.dataset.value === undefined) { return cell.textContent; }
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  }
  all("table.sortable").forEach(function (table) {
    all("thead button", table).forEach(function (press, index) {
      press.addEventListener("click", function () {
        var head = press.parentNode, up = head.getAttribute("aria-sort") !== "ascending", body = table.tBodies[0];
        mark(head, up);
        Array.prototype.slice.call(body.rows).sort(function (a, b) {
          var x = value(a, index), y = value(b, index);
          return x === null || y === null ? compare(x, y) : compare(x, y) * (up ? 1 : -1);
        }).forEach(function (row) { body.appendChild(row); });
      });
    });
  });

  // --- the list of latents
  var index = data("index"), seek = document.getElementById("seek");
  if (index && seek) { search(index, seek, document.getElementById("found")); }

  function search(index, form, table) {
    var SIZE = 50, pager = one(".pages"), columns = index.columns, order = [], start = 0, sorted = null, up = true;
    var heads = [["latent", "latent"], ["name", "its label, or tokens"], ["effect", "effect, sd"], ["auroc", "AUROC"],
      ["heldout_auroc", "held out"], ["q_value", "q"], ["verdict", "verdict"], ["density", "fires on"], ["max", "largest"],
      ["token_share", "by token"], ["up", "makes likelier"]];
    var text = /^(name|verdict|up|latent)$/;
    var tasks = ["detection", "fuzzing"].filter(function (task) { return columns[task]; });
    tasks.forEach(function (task, at) { heads.splice(2 + at, 0, [task, task]); });
    var names = columns.latent.map(function (_, n) {
      return columns.label[n] || columns.tokens[n].map(function (t) { return t.trim() || JSON.stringify(t); }).join(" · ");
    });
    function get(n, key) {
      if (key === "name") { return names[n]; }
      if (key === "up") { return columns.up[n].join(" "); }
      if (tasks.indexOf(key) >= 0) { return columns[key][n] && columns[key][n][0]; }
      if (columns[key]) { return columns[key][n]; }
      var judged = index.judged[form.elements.concept.value];
      return judged && judged[key] ? judged[key][n] : null;
    }
    var hay = columns.latent.map(function (latent, n) {
      var label = index.labels[latent], words = label ? [label.name, label.description] : [];
      return [latent].concat(words, columns.tokens[n], columns.up[n], columns.down[n]).join(" ").toLowerCase();
    });
    function verdicts() {
      var select = form.elements.verdict, judged = index.judged[form.elements.concept.value], seen = {};
      ((judged && judged.verdict) || []).forEach(function (v) { if (v) { seen[v] = 1; } });
      select.length = 1;
      Object.keys(seen).sort().forEach(function (v) { select.add(new Option(v, v)); });
    }
    function refresh() {
      var words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean), verdict = form.elements.verdict.value;
      order = columns.latent.map(function (_, n) { return n; }).filter(function (n) {
        if (verdict && get(n, "verdict") !== verdict) { return false; }
        return words.every(function (word) {
          return hay[n].indexOf(word) >= 0 || String(get(n, "verdict") || "").indexOf(word) >= 0;
        });
      });
      if (sorted) {
        order.sort(function (a, b) {
          var x = get(a, sorted), y = get(b, sorted);
          return (x === null || y === null ? compare(x, y) : compare(x, y) * (up ? 1 : -1)) || a - b;
        });
      }
      start = 0;
      fill();
    }
    function fill() {
      var body = table.tBodies[0];
      body.textContent = "";
      order.slice(start, start + SIZE).forEach(function (n) {
        var row = body.insertRow();
        heads.forEach(function (head) {
          var cell = row.insertCell(), value = get(n, head[0]);
          if (head[0] === "latent") {
            var press = make("button", String(value));
            press.type = "button";
            press.setAttribute("aria-expanded", "false");
            press.addEventListener("click", function () { toggle(row, n, press); });
            cell.appendChild(press);
          } else {
            cell.textContent = short(value) + beside(n, head[0]);
            cell.className = head[0] === "verdict" ? "whole" : text.test(head[0]) ? "" : "num";
          }
        });
      });
      form.querySelector("output").textContent = order.length + " of " + columns.latent.length;
      pager.hidden = order.length <= SIZE;
      one("span", pager).textContent = (start + 1) + " to " + Math.min(start + SIZE, order.length);
      all("button", pager).forEach(function (press) {
        var to = start + SIZE * Number(press.dataset.step);
        press.disabled = to < 0 || to >= order.length;
      });
    }
    function beside(n, key) {
      var other = tasks.indexOf(key) >= 0 && columns[key][n] ? columns[key][n][1] : null;
      return other === null ? "" : " (" + short(other) + ")";
    }
    function toggle(row, n, press) {
      var open = press.getAttribute("aria-expanded") === "true", body = row.parentNode;
      press.setAttribute("aria-expanded", String(!open));
      if (open) { body.removeChild(row.nextSibling); return; }
      var next = body.insertRow(row.sectionRowIndex + 1), cell = next.insertCell();
      cell.colSpan = heads.length;
      cell.appendChild(page(n));
    }
    function page(n) {
      var box = make("div", null, "page"), found = index.pages[n], card = document.getElementById("latent-" + columns.latent[n]);
      if (card) {
        var link = make("a", "Its page above has more.");
        link.href = "#latent-" + columns.latent[n];
        box.appendChild(link);
      }
      said(box, index.labels[columns.latent[n]]);
      tokens(box, "Makes likelier", columns.up[n]);
      tokens(box, "Makes less likely", columns.down[n]);
      if (!found) {
        box.appendChild(make("p", "There was no room for its passages on this page: greatctl interpret --latent " + columns.latent[n], "quiet"));
        return box;
      }
      found.p.forEach(function (passage) { box.appendChild(quote(passage)); });
      var top = Math.max.apply(null, found.u.map(function (u) { return u[1] || 0; }).concat(0)), bars = make("table", null, "units");
      found.u.forEach(function (u) {
        var row = bars.insertRow(), bar = make("span"), name = index.units[u[0]];
        row.appendChild(make("th", name[0]));
        row.insertCell().textContent = name[1];
        var cell = row.insertCell();
        cell.className = "bar";
        bar.style.setProperty("--share", top > 0 ? u[1] / top : 0);
        cell.appendChild(bar);
        row.insertCell().textContent = short(u[1]);
      });
      box.appendChild(bars);
      return box;
    }
    function said(box, label) {
      if (!label) { return; }
      if (label.name) {
        var line = make("p"), name = make("bdi", "\u201c" + label.name + "\u201d");
        line.append(make("b", "Label, no part of any verdict: "), name, " ", make("bdi", label.description), " ");
        line.appendChild(make("span", "by " + label.by, "quiet"));
        box.appendChild(line);
      }
      if (label.doubt) { box.appendChild(make("p", label.doubt, "doubt")); }
    }
    function tokens(box, name, list) {
      if (!list.length) { return; }
      var line = make("p", null, "tokens");
      line.appendChild(make("b", name));
      list.forEach(function (token) { line.append(" ", make("code", token)); });
      box.appendChild(line);
    }
    function quote(passage) {
      var block = make("blockquote"), text = make("p");
      passage[0].forEach(function (token, at) {
        var heat = Number(passage[1][at]) / 9, shown = token.replace(/\n/g, "\u21b5");
        if (!heat) { text.append(shown); return; }
        var piece = make("mark", shown);
        piece.style.setProperty("--heat", heat.toFixed(2));
        text.appendChild(piece);
      });
      block.append(text, make("footer", short(passage[2]) + " · " + index.places[passage[3]]));
      return block;
    }
    heads.forEach(function (head) {
      var th = make("th", null, text.test(head[0]) ? "" : "num"), press = make("button", head[1]);
      press.type = "button";
      th.scope = "col";
      press.addEventListener("click", function () {
        up = sorted === head[0] ? !up : head[0] === "latent" || head[0] === "name" || head[0] === "verdict" || head[0] === "q_value";
        sorted = head[0];
        mark(th, up);
        refresh();
      });
      th.appendChild(press);
      (table.tHead.rows[0] || table.tHead.insertRow()).appendChild(th);
    });
    all("button", pager).forEach(function (press) {
      press.addEventListener("click", function () { start += SIZE * Number(press.dataset.step); fill(); });
    });
    table.addEventListener("keydown", function (event) {
      var step = { ArrowDown: 1, ArrowUp: -1 }[event.key], presses = all("tbody button", table), at = presses.indexOf(event.target);
      if (step && at >= 0 && presses[at + step]) { event.preventDefault(); presses[at + step].focus(); }
    });
    document.addEventListener("keydown", function (event) {
      if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
        event.preventDefault();
        form.elements.words.focus();
      }
    });
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    form.elements.concept.addEventListener("change", verdicts);
    form.addEventListener("input", refresh);
    form.hidden = table.hidden = false;
    if (form.elements.concept.length < 2) { form.elements.concept.parentNode.hidden = true; }
    verdicts();
    refresh();
    find = function (latent) {
      form.elements.words.value = latent;
      sorted = null;
      refresh();
      var press = all("tbody button", table).filter(function (b) { return b.textContent === latent; })[0];
      if (press) { press.click(); press.focus(); }
    };
  }

  // --- links into folded parts
  var find;
  function follow() {
    var id = decodeURIComponent(location.hash.slice(1)), node = id && document.getElementById(id), seeked = /^find-(\d+)$/.exec(id);
    if (seeked) {
      node = document.getElementById("latent-" + seeked[1]) || document.getElementById("find");
      if (node && node.id === "find" && find) { find(seeked[1]); }
    }
    for (var at = node; at; at = at.parentElement) { if (at.tagName === "DETAILS") { at.open = true; } }
    if (node) { node.scrollIntoView(); }
  }
  window.addEventListener("hashchange", follow);
  if (location.hash) { window.addEventListener("load", follow); }
  dress(themes.indexOf(kept()) > 0 ? kept() : "system");
  performance.mark("ready");
})();
