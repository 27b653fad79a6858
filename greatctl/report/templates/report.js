"use strict";
(function () {
  var figures = JSON.parse(document.getElementById("figures").textContent);
  function ink() { return getComputedStyle(document.body).color; }
  function draw(node) {
    if (typeof Plotly === "undefined" || node.dataset.drawn) { return; }
    node.dataset.drawn = "1";
    var figure = figures[Number(node.dataset.chart)];
    var layout = Object.assign({}, figure.layout, { font: Object.assign({}, figure.layout.font, { color: ink() }) });
    Plotly.newPlot(node, figure.data, layout, { displayModeBar: false, responsive: true });
  }
  var charts = Array.prototype.slice.call(document.querySelectorAll(".chart"));
  // One after the other, so that the page can be read and scrolled while they are drawn.
  function next(index) {
    if (index < charts.length) { draw(charts[index]); setTimeout(function () { next(index + 1); }, 0); }
  }
  next(0);
  window.addEventListener("beforeprint", function () { charts.forEach(draw); });

  function value(row, index) {
    var cell = row.cells[index];
    if (cell.dataset.value !== undefined) {
      return cell.dataset.value === "" ? -Infinity : Number(cell.dataset.value);
    }
    return cell.textContent;
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    table.querySelectorAll("thead button").forEach(function (button, index) {
      button.addEventListener("click", function () {
        var head = button.parentNode, up = head.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("thead th").forEach(function (th) { th.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        var rows = Array.prototype.slice.call(table.tBodies[0].rows);
        rows.sort(function (a, b) {
          var x = value(a, index), y = value(b, index);
          return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
        });
        rows.forEach(function (row) { table.tBodies[0].appendChild(row); });
      });
    });
  });
})();
