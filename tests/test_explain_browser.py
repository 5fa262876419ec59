"""The page of explanations in a browser, at the widths of a phone and of a desktop."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from toy_explain import strange

from rankfold.classify.page import explain_page

# A page of our own around it, whose policy lets nothing run: an iframe is a window as wide as asked.
AROUND = """<!DOCTYPE html><meta charset="utf-8"><body>
<iframe width="390" height="800"></iframe><iframe width="1280" height="800"></iframe><pre></pre><script>
const frames = [...document.querySelectorAll("iframe")], found = [];
const look = frame => {
  const page = frame.contentDocument, root = page.documentElement;
  page.querySelectorAll("details").forEach(d => { d.open = true; });
  const words = [...page.querySelectorAll(".t i")].slice(0, 12);
  const shades = () => words.map(w => frame.contentWindow.getComputedStyle(w).backgroundImage).join();
  const mean = shades();
  page.getElementById("c-h1").checked = true;
  const picked = shades();
  const pick = page.querySelector(".pick");
  page.getElementById("c-wrong").checked = true;
  const left = [...page.querySelectorAll("article")].filter(a => a.offsetHeight).length;
  page.getElementById("c-wrong").checked = false;
  const rtl = [...page.querySelectorAll(".t")].map(p => frame.contentWindow.getComputedStyle(p).direction);
  found.push({
    width: frame.contentWindow.innerWidth, scroll: root.scrollWidth, client: root.clientWidth,
    overflowing: [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, .t, .hide") &&
      e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.outerHTML.slice(0, 80)),
    changes: mean !== picked, sticky: frame.contentWindow.getComputedStyle(pick).position, left,
    rtl: rtl.filter(d => d === "rtl").length, articles: page.querySelectorAll("article").length,
    touch: Math.min(...[...page.querySelectorAll(".pick label")].map(l => l.getBoundingClientRect().height)),
  });
};
let waiting = frames.length;
frames.forEach(frame => {
  frame.onload = () => {
    look(frame);
    if (--waiting === 0) document.querySelector("pre").textContent = JSON.stringify(found);
  };
  frame.srcdoc = PAGE;
});
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium on the PATH")
def test_nothing_overflows_a_phone_or_a_desktop(tmp_path: Path) -> None:
    items = strange(heads=8)
    source = explain_page(items, title="superlong" * 30, facts={"key" * 30: "value" * 100})
    file = tmp_path / "around.html"
    text = json.dumps(source).replace("</", "<\\/").replace("<!--", "<\\!--")
    file.write_text(AROUND.replace("PAGE", text), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1800,900", "--dump-dom"]
    run = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120)
    dumped = re.search(r"<pre>(.+?)</pre>", run.stdout, re.S)
    assert dumped is not None, run.stderr[-2000:]
    found = sorted(json.loads(html.unescape(dumped[1])), key=lambda one: one["width"])
    assert [one["width"] for one in found] == [390, 1280]
    for one in found:
        assert one["scroll"] <= one["width"] and one["overflowing"] == [], one
        assert one["changes"], "the choice of a head colours the words"
        assert one["sticky"] == "sticky" and one["touch"] >= 24
        assert one["rtl"] == 1 and one["articles"] == len(items)
        assert one["left"] == sum(item.truth != item.label for item in items)
