"""The CSS of the page of samples; its lines differ in form, not only in colour."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #63686f; --page: #fbfbfa;
  --card: #fff; --edge: #dddfe3; --good: #1a7f4b; --bad: #c02f3a; --mark: #6d4bc4;
  --n1: #fdebd6; --n2: #f9c98d; --n3: #ee9a3a; --p1: #e1eefb; --p2: #a9cff5; --p3: #5fa6ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --soft: #9aa0a8;
  --page: #16181b; --card: #1e2125; --edge: #363a40; --good: #4fc98a; --bad: #ff7b83;
  --mark: #b59cf5; --n1: #40301b; --n2: #6e4a14; --n3: #a8660c; --p1: #1c3047; --p2: #1d4c7d;
  --p3: #2272bd; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 1rem; } h2 { font-size: 1.05rem; margin: 1.4rem 0 .2rem; }
summary { font-size: 1.15rem; font-weight: 600; cursor: pointer; padding: .4rem 0; }
details { border-top: 1px solid var(--edge); margin-top: 1rem; }
.note, .legend { color: var(--soft); font-size: .9rem; } .note { margin: .2rem 0 .6rem; }
.legend p { margin: .3rem 0; line-height: 1.8; }
.legend ul { display: grid; margin: .2rem 0; padding: 0; grid-template-columns: 1fr 2fr;
  list-style: none; } .legend li { line-height: 1.9; }
.scale { line-height: 2; } .legend .t { font-size: 12.5px; }
.legend b { color: var(--ink); }
article { background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  margin: .7rem 0; padding: .7rem 1rem; }
header { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .85rem;
  color: var(--soft); }
.right { color: var(--good); } .wrong { color: var(--bad); }
.right::before { content: "✓ "; } .wrong::before { content: "✗ "; }
.prompt, .completion, .t { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, monospace;
  font-size: 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: var(--soft); margin: .4rem 0; max-height: 14rem; overflow: auto; }
.completion { line-height: 2.1; }
.t { position: relative; padding: 3px 1px; border: solid transparent; border-width: 2px 0 3px;
  margin-right: 1px; border-radius: 2px; color: var(--ink); }
.joined { margin-left: -2px; border-left: 1px dotted var(--soft); border-radius: 0; }
.n1 { background: var(--n1); } .n2 { background: var(--n2); } .n3 { background: var(--n3); }
.p1 { background: var(--p1); } .p2 { background: var(--p2); } .p3 { background: var(--p3); }
.rewarded { border-bottom: 3px solid var(--good); }
.punished { border-bottom: 3px dotted var(--bad); }
.dead { border-bottom: 3px dashed var(--soft); }
.protected { border-bottom: 3px double var(--good); }
.imitated { border-top: 2px solid var(--mark); } .unused { color: var(--soft); opacity: .7; }
.t[data-n]:hover { outline: 2px solid var(--ink); }
.t[data-n]:hover::after { content: attr(data-n); position: absolute; left: 0; top: 125%;
  z-index: 1; white-space: pre; font-size: 12px; line-height: 1.5; padding: .4rem .6rem;
  color: var(--page); background: var(--ink); border-radius: 6px; pointer-events: none; }
"""
