"""The style sheet and the script of the report page; without the script all but hovering and choosing maps works."""

CSS = """
:root{--paper:#fdfdfc;--ink:#1d2329;--soft:#5c6670;--line:#dfe3e6;--panel:#f5f6f6;--accent:#0a5fa5;
--c0:#0a5fa5;--c1:#c2500a;--c2:#0b7f62;--c3:#8a4a94;--hatch:#e9ecee;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--paper:#14181c;--ink:#e3e7ea;--soft:#9aa5ae;--line:#2c343b;--panel:#1b2126;
--accent:#62b0ea;--c0:#62b0ea;--c1:#f0985a;--c2:#4cc9a3;--c3:#c99ad2;--hatch:#20272d}
.map{filter:invert(.94) hue-rotate(180deg) brightness(1.3)}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:44px 24px 72px}
h1{font-size:31px;line-height:1.2;margin:0 0 6px;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:21px;line-height:1.3;margin:56px 0 4px;letter-spacing:-.01em}
h3{font-size:15px;margin:0 0 6px;font-weight:600}
p{margin:6px 0 14px;max-width:88ch}.lead,.note{color:var(--soft)}.note{font-size:14px}
code,pre,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:14px 28px;margin:26px 0 0;
padding:18px 0;border-block:1px solid var(--line)}
dl.facts dt{font-size:12.5px;color:var(--soft)}
dl.facts dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:15px}
th{font-weight:600;text-align:left;font-size:13px;color:var(--soft);border-bottom:1px solid var(--line)}
th,td{padding:7px 14px 7px 0;white-space:nowrap}td{border-bottom:1px solid var(--line)}
th.n,td.n{text-align:right;padding-right:22px}tr.own td{font-weight:650}
td.bar{width:48%;min-width:120px}td.bar i{display:block;height:11px;background:var(--soft);opacity:.45}
tr.own td.bar i{background:var(--c0);opacity:1}
table.cells{width:auto;font-size:12.5px}table.cells td,table.cells th{padding:2px 5px;text-align:right;border:0}
table.cells td{min-width:26px}td.small svg{width:150px}figure.one{max-width:480px;margin:18px 0}
table.sortable{font-size:13.5px}table.sortable th{cursor:pointer;user-select:none}
.grid3{display:grid;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:28px 30px;margin-top:18px}
figure{margin:0;min-width:0}svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
svg .axis{fill:var(--ink)}svg .label{font-weight:600}svg .label.muted{font-weight:400}
.grid{stroke:var(--line);fill:none}.base{stroke:var(--soft);fill:none}.cursor{stroke:var(--soft);stroke-dasharray:2 3}
.reference{stroke:var(--soft);stroke-dasharray:5 4;fill:none}.line{fill:none;stroke-width:1.9;stroke-linejoin:round}
.line.faint{stroke-width:1;opacity:.28}.dot{fill-opacity:.55}.dot:hover{fill-opacity:1}.share{fill:var(--c0)}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}
circle.c0,svg .label.c0{fill:var(--c0)}circle.c1,svg .label.c1{fill:var(--c1)}
circle.c2,svg .label.c2{fill:var(--c2)}circle.c3,svg .label.c3{fill:var(--c3)}
.narrow{display:none}@media (max-width:700px){.wide{display:none}.narrow{display:block}main{padding:28px 16px 56px}
h1{font-size:26px}dl.facts{grid-template-columns:1fr 1fr;gap:12px 18px}}
.thumbs{display:grid;gap:12px 12px;margin:18px 0 8px;grid-template-columns:repeat(var(--heads),minmax(0,1fr))}
@media (max-width:700px){.thumbs{grid-template-columns:repeat(auto-fill,minmax(96px,1fr))}}
.thumb{all:unset;cursor:pointer;display:block;min-width:0}.thumb img{width:100%;aspect-ratio:1;display:block}
img.map,image.map{image-rendering:pixelated}.thumb .hatch,.swatch{background:repeating-linear-gradient(135deg,
var(--hatch) 0 3px,transparent 3px 6px)}.thumb .hatch{outline:1px solid var(--line)}
.thumb span{font-size:12.5px;color:var(--soft);display:block;margin-top:3px}
.thumb[aria-pressed=true] .hatch{outline:2px solid var(--accent)}.thumb[aria-pressed=true] span{color:var(--ink)}
.thumb:focus-visible .hatch{outline:2px solid var(--accent)}
.masked{fill:var(--hatch)}.cell{fill:none;stroke:var(--c1);stroke-width:1.5}
.tokens text{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:inherit;fill:var(--ink)}
.detail{max-width:900px;min-width:560px}.profile{min-width:420px}
.legend{display:flex;flex-wrap:wrap;align-items:center;gap:6px 10px;font-size:13px;color:var(--soft);margin:8px 0 18px}
.legend img{width:190px;height:12px}.swatch{width:26px;height:12px;display:inline-block;outline:1px solid var(--line)}
.text{font-size:14px;line-height:1.75;background:var(--panel);padding:14px 16px;margin:12px 0;overflow-wrap:anywhere}
.text b{font-weight:400;border-radius:2px;cursor:default}.text b.q{outline:2px solid var(--c1);outline-offset:-1px}
.text b.dim{color:var(--soft)}
pre{background:var(--panel);padding:16px 18px;font-size:13.5px;line-height:1.5;white-space:pre-wrap;
overflow-wrap:anywhere;margin:10px 0 22px}pre .prompt{color:var(--soft)}pre .new{color:var(--ink)}
pre .new::before{content:"";border-left:2px solid var(--c1);margin-right:1px}
details{margin:14px 0}summary{cursor:pointer;color:var(--accent)}
#tip{position:fixed;pointer-events:none;background:var(--ink);color:var(--paper);font-size:13px;line-height:1.4;
padding:5px 9px;border-radius:4px;max-width:300px;z-index:9;white-space:pre-line;font-variant-numeric:tabular-nums}
footer{margin-top:60px;color:var(--soft);font-size:13px;border-top:1px solid var(--line);padding-top:14px}
@media print{.thumb,figure,pre{break-inside:avoid}}
"""

SCRIPT = """
'use strict';
(() => {
const tip = document.getElementById('tip'), one = s => document.querySelector(s);
const all = s => [...document.querySelectorAll(s)];
const show = (e, text) => { tip.textContent = text; tip.hidden = false;
  const w = tip.offsetWidth, h = tip.offsetHeight;
  tip.style.left = Math.max(4, Math.min(e.clientX + 14, innerWidth - w - 8)) + 'px';
  tip.style.top = (e.clientY + 18 + h > innerHeight ? e.clientY - h - 10 : e.clientY + 18) + 'px'; };
const hide = () => { tip.hidden = true; };
const short = v => v === 0 ? '0' : Math.abs(v) < 0.001 || Math.abs(v) >= 1e6 ? v.toExponential(2)
  : v >= 1000 ? Math.round(v).toLocaleString('en') : v.toPrecision(3);
document.addEventListener('pointermove', e => {
  const marked = e.target.closest && e.target.closest('[data-tip]'); if (marked) show(e, marked.dataset.tip); });
all('[data-tip]').forEach(x => x.addEventListener('pointerleave', hide));

all('svg[data-lines]').forEach(svg => {
  const meta = JSON.parse(svg.dataset.lines), [left, right] = meta.box, [x0, x1] = meta.x;
  const cursor = svg.querySelector('.cursor');
  svg.addEventListener('pointermove', e => {
    const p = new DOMPoint(e.clientX, e.clientY).matrixTransform(svg.getScreenCTM().inverse());
    if (p.x < left - 4 || p.x > right + 4) { hide(); cursor.setAttribute('visibility', 'hidden'); return; }
    const step = x0 + (p.x - left) / (right - left) * (x1 - x0);
    const closer = (a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a;
    const near = meta.lines.map(l => [l.name, l.points.reduce(closer)]);
    cursor.setAttribute('visibility', 'visible');
    cursor.setAttribute('transform', 'translate(' + Math.min(Math.max(p.x, left), right) + ')');
    const text = ([n, q]) => n + ' ' + short(q[1]) + '  (step ' + Math.round(q[0]).toLocaleString('en') + ')';
    show(e, near.map(text).join('\\n')); });
  svg.addEventListener('pointerleave', () => { hide(); cursor.setAttribute('visibility', 'hidden'); }); });

all('table.sortable').forEach(table => [...table.tHead.rows[0].cells].forEach((cell, column) => { let up = false;
  cell.addEventListener('click', () => { up = !up; const body = table.tBodies[0];
    const key = r => { const t = r.cells[column].dataset.v ?? r.cells[column].textContent; return isNaN(t) ? t : +t; };
    const order = (a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (up ? 1 : -1);
    [...body.rows].sort(order).forEach(r => body.append(r)); }); }));

const store = one('#maps-data'); if (!store) return;
const { tokens, maximum } = JSON.parse(store.textContent), size = tokens.length;
const image = one('#detail-image'), svg = one('svg.detail'), box = one('#detail-cell'), letters = all('.text b');
// the page's own PNGs hold one palette entry per cell, unfiltered: inflate IDAT and the values are there
const entries = async uri => {
  const bytes = Uint8Array.from(atob(uri.split(',')[1]), c => c.charCodeAt(0)), view = new DataView(bytes.buffer);
  for (let at = 8; at < bytes.length; at += 12 + view.getUint32(at)) {
    if (view.getUint32(at + 4) !== 0x49444154) continue;
    const data = new Blob([bytes.subarray(at + 8, at + 8 + view.getUint32(at))]).stream();
    return new Uint8Array(await new Response(data.pipeThrough(new DecompressionStream('deflate'))).arrayBuffer()); } };
let map = null;
const value = (t, s) => { if (!map) return NaN; const e = map[t * (size + 1) + 1 + s];
  return e ? maximum * ((e - 1) / 254) ** 2 : NaN; };
const row = t => { letters.forEach((b, s) => { const v = value(t, s);
  b.className = s === t ? 'q' : v >= 0 ? '' : 'dim';
  const part = (Math.sqrt(v / maximum) * 70).toFixed(1);
  b.style.background = v > 0 ? 'color-mix(in srgb, var(--accent) ' + part + '%, transparent)' : ''; }); };
let query = size - 1;
const pick = async thumb => { all('.thumb').forEach(x => x.setAttribute('aria-pressed', x === thumb));
  const uri = thumb.querySelector('img').src; image.setAttribute('href', uri);
  one('#detail-title').textContent = thumb.dataset.title; map = null;
  if (self.DecompressionStream) { map = await entries(uri); row(query); } };
all('.thumb').forEach(x => x.addEventListener('click', () => pick(x)));
const margin = +svg.dataset.margin, cell = +svg.dataset.cell;
svg.addEventListener('pointermove', e => {
  const p = new DOMPoint(e.clientX, e.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const s = Math.floor((p.x - margin) / cell), t = Math.floor(p.y / cell), v = value(t, s);
  const outside = s < 0 || t < 0 || s >= size || t >= size || isNaN(v);
  if (outside) { hide(); box.setAttribute('visibility', 'hidden'); return; }
  box.setAttribute('visibility', 'visible'); box.setAttribute('x', margin + s * cell); box.setAttribute('y', t * cell);
  if (t !== query) { query = t; row(t); }
  const weight = v < 5e-5 ? '< 0.0001' : short(v);
  show(e, 'query “' + tokens[t] + '” at ' + t + '\\nkey “' + tokens[s] + '” at ' + s + ': ' + weight); });
svg.addEventListener('pointerleave', () => { hide(); box.setAttribute('visibility', 'hidden'); });
letters.forEach((b, t) => b.addEventListener('pointerenter', () => { query = t; row(t); }));
pick(one('.thumb'));
})();
"""
