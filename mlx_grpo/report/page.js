"use strict";
// Sorts and filters the tables of answers; without it they are there all the same.
const boxes = [...document.querySelectorAll(".answers")];

for (const box of boxes) {
  const body = box.querySelector("tbody"), rows = [...body.rows];
  const find = box.querySelector("input[type=search]"), cut = box.querySelector("input[type=checkbox]");
  const count = box.querySelector(".count"), heads = [...box.querySelectorAll("thead th")];
  const text = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));

  const filter = () => {
    const wanted = find.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !text.get(row).includes(wanted) || (cut.checked && !("cut" in row.dataset));
    count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
  };
  const value = (row, i) => {
    const cell = row.cells[i];
    return cell.className === "n" ? Number(cell.textContent) : cell.textContent;
  };
  const sort = (head, i) => {
    const numbers = head.className === "n";
    const down = head.ariaSort ? head.ariaSort === "ascending" : numbers;
    for (const other of heads) other.ariaSort = other === head ? (down ? "descending" : "ascending") : null;
    rows.sort((a, b) => {
      const [x, y] = [value(a, i), value(b, i)];
      return (down ? -1 : 1) * (numbers ? x - y : x.localeCompare(y));
    });
    body.append(...rows);
  };

  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(head, i));
    head.append(button);
  });
  find.addEventListener("input", filter);
  cut.addEventListener("change", filter);
  box.querySelector(".tools").hidden = false;
  filter();
}

const seconds = Number(document.body.dataset.reload);
if (seconds) setInterval(() => boxes.some(box => box.open) || location.reload(), 1000 * seconds);
