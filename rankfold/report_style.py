"""The style and the one script of a report page. Both stand inline in the page; nothing is loaded.

Narrow screens come first; from 60rem on there is room for the wide heat map. Paper gets light colours and
every folded part open. The script only adds sorting to tables: the page is complete without it.
"""

CSS = """
:root{color-scheme:light dark;--bg:#fff;--panel:#f5f7fa;--line:#d9dfe7;--text:#1a2029;--muted:#55606e;
--accent:#1f5fbf;--soft:#c9d6e8;--good:#11703d;--bad:#b3261e;--warn:#fff6dd;--warnline:#d9a400}
@media (prefers-color-scheme:dark){:root{--bg:#12161c;--panel:#1b2129;--line:#343d49;--text:#e7ebf0;
--muted:#a5b0bd;
--accent:#7fb0f5;--soft:#3c4a5c;--good:#6fd39b;--bad:#ff958c;--warn:#332b12;--warnline:#d9a400}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;max-width:76rem;padding:1rem 1rem 3rem;background:var(--bg);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Helvetica Neue",Arial,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.2rem 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.4rem 0 .3rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:.95rem;margin:0 0 .2rem;overflow-wrap:anywhere}
p{margin:.3rem 0 .8rem;max-width:46rem;overflow-wrap:anywhere}
.lead{font-size:1.05rem;color:var(--muted)}
.note,figcaption,caption,.legend{font-size:.875rem;color:var(--muted)}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.875em}
code{overflow-wrap:anywhere}
pre{margin:0;padding:.7rem .9rem;background:var(--panel);border-radius:.4rem;white-space:pre-wrap;
overflow-wrap:anywhere}
.good{color:var(--good)}.bad{color:var(--bad)}
.tiles{display:grid;gap:.7rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));
margin:1rem 0}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}
.tile b{display:block;font-size:1.55rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{display:block;font-size:.875rem;color:var(--muted)}
.tile .what{color:var(--text);font-weight:600}
.warnings{background:var(--warn);border-left:4px solid var(--warnline);border-radius:.3rem;
padding:.5rem .9rem;margin:1rem 0}
.warnings ul{margin:.2rem 0;padding-left:1.1rem}.warnings li{overflow-wrap:anywhere}
.scroll{overflow-x:auto;max-width:100%;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.3rem 0}
th,td{padding:.32rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;
vertical-align:top}
th{font-weight:600}thead th{border-bottom:2px solid var(--line)}
th:first-child,td:first-child,.left{text-align:left}
th:first-child,td:first-child{padding-left:0}
tbody th{font-weight:400;hyphens:none;white-space:normal;overflow-wrap:anywhere;min-width:8rem}
td.wrap{white-space:normal;min-width:14rem;overflow-wrap:anywhere}
.facts tbody th{min-width:0}.facts th,.facts td{padding:.32rem .35rem}
@media (min-width:30rem){.facts th,.facts td{padding:.32rem .7rem}.facts tbody th{white-space:nowrap}}
.facts th:first-child{padding-left:0}
.layers tbody th{min-width:8.5rem}
.layers tbody th,.layers thead th:first-child{position:sticky;left:0;background:var(--bg);max-width:12rem}
.layers thead th:first-child{z-index:1}
@media (min-width:60rem){.layers tbody th{max-width:24rem}}
.sort{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:0;cursor:pointer;
text-align:inherit}
.sort:hover,.sort:focus-visible{color:var(--accent);text-decoration:underline}
[aria-sort=ascending] .sort::after{content:" ▲"}[aria-sort=descending] .sort::after{content:" ▼"}
summary{cursor:pointer;font-weight:600;padding:.4rem 0}
figure{margin:.8rem 0 0}
.bars{display:grid;gap:.7rem;max-width:46rem}
.bar p{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1rem;margin:0;font-size:.9rem;
max-width:none}
.bar p span:first-child{overflow-wrap:anywhere;min-width:0}
.bar p span:last-child{color:var(--muted);font-variant-numeric:tabular-nums}
.track{height:.95rem;border-radius:.2rem}
.track i,.track u{display:block;height:100%;border-radius:.2rem;text-decoration:none}
.track u{background:var(--soft);min-width:1px}.track i{background:var(--accent);min-width:1px}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.2rem 0 .7rem;align-items:center}
.legend span{display:inline-flex;align-items:center;gap:.4rem}.legend b{font-weight:400;white-space:nowrap}
.key{display:inline-block;width:1rem;height:.8rem;border-radius:.15rem;flex:none}
.ramp{width:5rem}
.heat{display:grid;gap:2px;grid-template-columns:minmax(2.2rem,auto) repeat(var(--types),minmax(1.9rem,1fr));
font-size:.75rem;line-height:1.45rem;text-align:center;font-variant-numeric:tabular-nums;max-width:40rem}
.heat>*{border-radius:.15rem;min-width:0;white-space:nowrap;overflow:hidden}
.heat .head{line-height:1.2;max-height:9rem;align-self:end;text-overflow:ellipsis}
.heat .head b{writing-mode:vertical-rl;transform:rotate(180deg);font-weight:600;max-height:9rem;
overflow:hidden}
.heat .block,.heat .corner{color:var(--muted);text-align:right;padding-right:.3rem}
.full{background:repeating-linear-gradient(135deg,#8793a3 0 2px,#dfe4ea 2px 6px)}
.gone{background:var(--panel)}
.hide{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
@media screen and (min-width:60rem){
.heat.wide{grid-auto-flow:column;grid-template-rows:repeat(calc(var(--types) + 1),auto);
grid-template-columns:minmax(5rem,auto);grid-auto-columns:minmax(1.5rem,1fr);max-width:none}
.heat.wide .head{align-self:auto;line-height:1.7rem;text-align:right;padding-right:.5rem;max-width:14rem}
.heat.wide .head b{writing-mode:horizontal-tb;transform:none}
.heat.wide>*{line-height:1.7rem}.heat.wide .block{text-align:center;padding:0}}
.small{display:grid;gap:1.2rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
.small figure{margin:0;min-width:0}
svg{display:block;width:100%;height:auto;max-width:26rem}
svg text{font-size:11.5px;fill:var(--muted)}
svg .cut{fill:var(--text);font-weight:600}
svg .kept{fill:var(--accent);fill-opacity:.28}svg .lost{fill:var(--soft);fill-opacity:.55}
svg .curve{fill:none;stroke:var(--accent);stroke-width:1.6}
svg .axis{stroke:var(--line);stroke-width:1}svg .mark{stroke:var(--text);stroke-width:1.4}
svg .even{stroke:var(--muted);stroke-width:1.2;stroke-dasharray:2 3}
.two{display:grid;gap:0 2.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr))}
.two>*{min-width:0}
.pair{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
.pair>*{min-width:0}
footer{margin-top:2.5rem;font-size:.875rem;color:var(--muted)}
@page{margin:13mm}
@media print{
:root{color-scheme:light;--bg:#fff;--panel:#f5f7fa;--line:#c9d0d9;--text:#111;--muted:#444d58;
--accent:#1f5fbf;
--soft:#c9d6e8;--good:#11703d;--bad:#b3261e;--warn:#fff6dd}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
html{font-size:12px}body{font-size:1rem;padding:0;max-width:none}
h2{margin-top:1.4rem}h2,h3,.legend,summary{break-after:avoid}.note{break-inside:avoid}
figure,.tile,.bar,tr,pre,.warnings{break-inside:avoid}
thead{display:table-header-group;break-inside:avoid}.layers thead tr{break-inside:avoid}
.scroll{overflow:visible}
.tiles{grid-template-columns:repeat(auto-fit,minmax(9rem,1fr))}.tile b{font-size:1.2rem}
.two{grid-template-columns:1fr 1fr;gap:0 1.5rem}
.facts th,.facts td{padding:.25rem .3rem}.facts th:first-child{padding-left:0}
.small{grid-template-columns:repeat(3,1fr)}
.layers{font-size:.75rem;width:100%}.layers th,.layers td{padding:.12rem .25rem}
.layers tbody th,.layers thead th:first-child{position:static;min-width:11rem;padding-left:0}
.layers td.wrap{min-width:9rem}
.heat{line-height:1.15rem;break-inside:avoid;max-width:36rem}
details::details-content{content-visibility:visible;display:block;height:auto}
}
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button"; button.className = "sort"; button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => { const c = row.cells[column]; return c.dataset.v ?? c.textContent; };
      const order = (a, b) => {
        const x = key(a), y = key(b), p = parseFloat(x), q = parseFloat(y);
        return isNaN(p) || isNaN(q) ? x.localeCompare(y, undefined, {numeric: true}) : p - q;
      };
      body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
    });
  });
}
const folded = [...document.querySelectorAll("details.print:not([open])")];
addEventListener("beforeprint", () => folded.forEach(d => { d.open = true; }));
addEventListener("afterprint", () => folded.forEach(d => { d.open = false; }));
"""
