"""The report's style sheet: inline, light and dark."""

STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #ffffff; --text: #1d2126; --quiet: #667079; --line: #e3e5e8;
  --accent: #2f62c9; --good: #1d7f55; --bad: #b3432f; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --card: #1c2024; --text: #e4e7ea; --quiet: #929ca6;
  --line: #2d3339; --accent: #82aaff; --good: #5cc596; --bad: #ee8a75; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 10px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 8px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.verdict { font-size: 17px; font-weight: 600; overflow-wrap: anywhere; }
.quiet, small, footer { color: var(--quiet); }
small { font-size: 12px; font-weight: 400; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px; margin-top: 18px; }
img { max-width: 100%; height: auto; display: block; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 14px; }
.tiles div { border: 1px solid var(--line); border-radius: 8px; padding: 12px 18px; min-width: 130px; }
.tiles b { display: block; font-size: 28px; line-height: 1.15; font-variant-numeric: tabular-nums; }
.tiles div:last-child:not(:first-child) b { color: var(--accent); }
.tiles span, .tiles small { display: block; }
.wide, .picture { overflow-x: auto; }
.picture img { max-width: none; min-width: 720px; width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { text-align: right; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--quiet); }
tbody th { color: var(--text); white-space: normal; min-width: 14ch; }
tbody th small { display: block; max-width: 46ch; }
td.clear { color: var(--accent); }
.grid, .plots { display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); margin-bottom: 16px; }
article { min-width: 0; }
article + article { margin-top: 16px; } .grid article { margin-top: 0; }
.strip { display: flex; gap: 10px; overflow-x: auto; }
.strip figure { flex: 0 0 150px; }
.pair { display: flex; gap: 10px; }
figure { margin: 0; flex: 1 1 0; min-width: 0; }
video { width: 100%; border-radius: 6px; display: block; image-rendering: pixelated; background: var(--line); }
figcaption { font-size: 13px; margin-top: 4px; overflow-wrap: anywhere; }
figcaption small { display: block; }
i.good, i.bad { font-style: normal; }
i.good { color: var(--good); } i.bad { color: var(--bad); }
details { margin-top: 12px; } details > :not(summary) { margin-top: 10px; }
* + h3 { margin-top: 18px; } article > h3 { margin-top: 0; }
summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; margin: 10px 0 0; }
footer { margin-top: 24px; font-size: 13px; }
@media (max-width: 600px) {
  main { padding: 20px 10px 40px; } section { padding: 14px 12px; }
  .tiles div { flex: 1 1 130px; padding: 10px 12px; min-width: 0; } .tiles b { font-size: 24px; }
  th, td { padding-right: 10px; } tbody th { min-width: 17ch; max-width: 45vw; overflow-wrap: anywhere; }
  td small { display: block; }
}
"""
