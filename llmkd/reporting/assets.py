"""The report's style and its script: plotly unpacked in the browser, drawn in the page's own colours."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#f7f9fc;--ink:#1c2430;--faint:#5b6675;--line:#e3e7ee;
--accent:#0b3f8f;
--bad:#b3400b}
@media (prefers-color-scheme:dark){:root{--paper:#12171e;--card:#1a212b;--ink:#e6eaf0;--faint:#98a3b3;
--line:#2a323d;
--accent:#7fb6ff;--bad:#f98b4c}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:960px;margin:0 auto;padding:40px 20px 80px}
header p.run{margin:0;color:var(--faint);font-size:14px;overflow-wrap:anywhere}
h1{margin:.2em 0 .7em;font-size:clamp(20px,2.9vw,26px);line-height:1.32;font-weight:650;
letter-spacing:-.012em;
text-wrap:pretty;overflow-wrap:anywhere}
section{margin-top:56px}
p.says{text-wrap:pretty}
h2{margin:0 0 4px;font-size:20px;letter-spacing:-.01em;line-height:1.3}
h3{margin:28px 0 4px;font-size:16px}
p{margin:6px 0 14px;max-width:72ch;overflow-wrap:anywhere}
p.says,figcaption,ul.notes{color:var(--faint);font-size:15px}
ul.notes{padding-left:1.1em;max-width:76ch}
ul.notes li{margin:5px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:22px 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px;min-width:0}
.tile b{display:block;font-size:25px;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums;
letter-spacing:-.01em}
.tile span{color:var(--faint);font-size:13.5px;overflow-wrap:anywhere;line-height:1.35;display:block}
.scroll{overflow-x:auto;margin:10px 0 18px;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:14.5px;min-width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;
vertical-align:top}
th{color:var(--faint);font-weight:550;font-size:13.5px}
th.over{text-align:center;color:var(--ink)}
th:first-child,td:first-child{text-align:left;padding-left:2px}
td.word,th.word{text-align:left}
tr.shipped td{font-weight:650}
td .dot{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:9px}
td .dot.ring{background:none!important;border:2.5px solid}
td .dot.turned{border-radius:1px;transform:rotate(45deg) scale(.85)}
td.said{white-space:normal;text-align:left;min-width:230px;overflow-wrap:anywhere}
figure{margin:12px 0 24px}
figcaption{margin-top:6px}
.plot{width:100%;overflow:hidden}
figure .scroll{margin:0}
label.term{display:block;margin:12px 0 0;font-size:15px;color:var(--faint)}
select{font:inherit;font-size:15px;color:var(--ink);background:var(--card);border:1px solid var(--line);
border-radius:8px;
padding:7px 10px;max-width:100%;margin-left:6px}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.missing{border-left:3px solid var(--bad);padding:2px 0 2px 12px;color:var(--faint)}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;overflow:auto;
max-height:560px;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
summary{cursor:pointer;font-weight:600;padding:6px 0}
blockquote{margin:8px 0;padding:8px 14px;background:var(--card);border-radius:8px;overflow-wrap:anywhere}
@media (max-width:600px){main{padding:24px 16px 56px}section{margin-top:44px}.tiles{
grid-template-columns:1fr 1fr}
th,td{padding:6px 9px}}
@media print{.plot,table,figure{break-inside:avoid}}
"""

SCRIPT = """
const read = id => document.getElementById(id).textContent;
const dark = matchMedia('(prefers-color-scheme: dark)');
const swaps = JSON.parse(read('dark'));
const wanted = {};
async function unpack() {
  const bytes = Uint8Array.from(atob(read('plotly')), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  const script = document.createElement('script');
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}
function draw() {
  const figures = JSON.parse(read('figures'), (key, value) => 
    dark.matches && typeof value === 'string' && Object.hasOwn(swaps, value) ? swaps[value] : value);
  for (const [id, figure] of Object.entries(figures)) {
    if (id in wanted) for (const trace of figure.data) trace.visible = trace.meta === wanted[id];
    Plotly.react(id, figure.data, figure.layout, {responsive: true, displayModeBar: false});
  }
}
for (const select of document.querySelectorAll('select[data-plot]'))
  select.addEventListener('change', () => { wanted[select.dataset.plot] = select.value; draw(); });
dark.addEventListener('change', draw);
unpack().then(draw).then(() => document.documentElement.dataset.drawn = 'yes').catch(error => {
  for (const plot of document.querySelectorAll('.plot')) plot.textContent = 'This plot cannot be drawn here.';
  throw error;
});
"""
