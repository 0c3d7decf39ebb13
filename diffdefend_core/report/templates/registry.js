(function () {
  "use strict";
  var table = document.querySelector("table.versions");
  var body = table.tBodies[0];
  var rows = Array.prototype.slice.call(body.rows);
  var words = new Intl.Collator(undefined, {numeric: true});
  var heads = Array.prototype.slice.call(table.tHead.rows[0].cells);

  function key(row, column) {
    var cell = row.cells[column];
    return cell.hasAttribute("data-sort") ? cell.getAttribute("data-sort") : cell.textContent;
  }

  function sort(head) {
    var column = heads.indexOf(head);
    var down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    rows.sort(function (a, b) { return (down ? -1 : 1) * words.compare(key(a, column), key(b, column)); });
    rows.forEach(function (row) { body.appendChild(row); });
  }

  heads.forEach(function (head) {
    head.querySelector("button").addEventListener("click", function () { sort(head); });
  });

  var filter = document.querySelector("#filter");
  var shown = document.querySelector("#shown");
  filter.addEventListener("input", function () {
    var text = filter.value.toLowerCase();
    var left = 0;
    rows.forEach(function (row) {
      row.hidden = row.textContent.toLowerCase().indexOf(text) < 0;
      left += row.hidden ? 0 : 1;
    });
    shown.textContent = text ? left + " of " + rows.length + " shown" : "";
  });
})();
