"""The style of a page of explanations, on top of that of a report.

A word carries one number from -100 to 100 for the mean (--m), for where all heads agree (--a) and for each
head (--h0, --h1, …): log2(ratio) / 3 in percent. The checked choice says which of them colours the words, so
that one copy of a text serves all heads, without a script. Both colours keep the contrast of the text above
4.5 at full strength. Browsers without :has() show the mean.
"""

from __future__ import annotations

CSS = """
:root{--more:66 146 246;--less:238 165 60}
@media (prefers-color-scheme:dark){:root{--more:38 98 196;--less:140 82 6}}
.pick{position:sticky;top:0;z-index:2;background:var(--bg);border:0;border-bottom:1px solid var(--line);
margin:1rem 0 0;
padding:.5rem 0;display:flex;flex-wrap:wrap;gap:.35rem;align-items:center;min-width:0;max-height:40vh;
overflow-y:auto}
.pick>span{font-size:.875rem;color:var(--muted);margin-right:.2rem}
.pick label{position:relative;border:1px solid var(--line);border-radius:1rem;padding:.1rem .6rem;
min-width:2.2rem;
text-align:center;font-size:.875rem;line-height:1.6rem;cursor:pointer;font-variant-numeric:tabular-nums}
.pick input{position:absolute;inset:0;opacity:0;margin:0;width:100%;height:100%;cursor:pointer}
.pick label:has(:checked){background:var(--accent);border-color:var(--accent);color:var(--bg);font-weight:600}
.pick label:has(:focus-visible){outline:2px solid var(--text);outline-offset:2px}
.pick label small{opacity:.8}
.pick .wrong{margin-left:auto}
.t{white-space:pre-wrap;overflow-wrap:anywhere;overflow:clip;max-width:none;unicode-bidi:plaintext;
text-align:start;
font-size:1.0625rem;line-height:1.9;margin:.6rem -.15rem;padding:.1rem .15rem}
.t i,.grid i{--w:var(--m);font-style:normal;border-radius:.15rem;-webkit-box-decoration-break:clone;
box-decoration-break:clone;
padding-block:.12rem;background:linear-gradient(rgb(var(--more)/calc(var(--w)/100)) 0 0),
linear-gradient(rgb(var(--less)/calc(var(--w)/-100)) 0 0)}
.t .unread{color:var(--muted)}
.cut{font-size:.75rem;color:var(--text);background:var(--warn);border:1px solid var(--warnline);
border-radius:.25rem;
padding:.05rem .4rem;margin:0 .3rem;white-space:nowrap;unicode-bidi:isolate}
.unseen{font-size:.7rem;color:var(--muted);border:1px dashed var(--muted);border-radius:.2rem;
padding:0 .15rem}
body:has(#c-wrong:checked) article:not(.wrong){display:none}
article{border-top:1px solid var(--line);padding:1rem 0 .6rem;min-width:0}
article h2{border:0;margin:0 0 .5rem;padding:0;font-size:1.05rem;overflow-wrap:anywhere}
article h2 .n{color:var(--muted);font-weight:400;margin-right:.4rem}
article h2 small{font-size:.875rem;font-weight:400;margin-left:.4rem}
article .bars{gap:.35rem}article .track{height:.5rem}article .track i{min-width:0}
.heads td.left,.heads th.left{white-space:normal;min-width:11rem}
.heads tbody th{min-width:4.6rem;white-space:nowrap}.heads td,.heads th{padding:.32rem .5rem}
.heads th:first-child{padding-left:0}
.grid td{padding:.1rem .15rem}.grid td i{display:block;padding:.1rem .35rem}
.grid tbody th{min-width:6rem;max-width:9rem}
.chip{display:inline-block;max-width:100%;margin:0 .9rem .1rem 0;overflow-wrap:anywhere}
.chip small{color:var(--muted);white-space:nowrap}
.scale{max-width:34rem;margin:.6rem 0 1rem;font-size:.8125rem;font-variant-numeric:tabular-nums}
.scale .ramp{width:100%;height:1.1rem;border:1px solid var(--line);border-radius:.2rem;
background:linear-gradient(90deg,
rgb(var(--less)),rgb(var(--less)/0) 50%),linear-gradient(270deg,rgb(var(--more)),rgb(var(--more)/0) 50%)}
.scale .ticks{display:flex;justify-content:space-between;color:var(--muted)}
.scale .ticks span{width:2.6rem;text-align:center}
.scale .ticks span:first-child{text-align:left}.scale .ticks span:last-child{text-align:right}
.scale .span{position:relative;height:.55rem;margin-top:.15rem}
.scale .span i{position:absolute;top:.1rem;height:.35rem;background:var(--text);border-radius:.1rem;
min-width:2px}
.scale .span.may i{background:none;border:1px solid var(--muted)}
.scale .key{height:.35rem;margin-right:.4rem;vertical-align:.1rem;background:var(--text);border-radius:.1rem}
.scale .key.may{background:none;border:1px solid var(--muted)}
.scale p{margin:.25rem 0}
@media print{:root{--more:66 146 246;--less:238 165 60}.pick,.pick+.note{display:none}
.t{font-size:1rem;line-height:1.6}article h2,.bars{break-after:avoid}}
"""


def choices(heads: int) -> str:
    """The rules by which the checked choice of a page with `heads` heads colours the words."""
    names = {"a": "a", **{f"h{i}": f"h{i}" for i in range(heads)}}
    return "".join(f"body:has(#c-{key}:checked) .t i{{--w:var(--{name})}}\n" for key, name in names.items())
