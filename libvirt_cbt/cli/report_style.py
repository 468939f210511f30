"""How a report looks: light and dark, from 320 pixels up, on paper, and without colour."""

from __future__ import annotations

from typing import Final

LIGHT: Final = """
  --page:#f6f7f9; --card:#fff; --text:#1a1e24; --soft:#545d69; --line:#d4d9e0; --link:#0b4fb3; --alarm:#9a1b12;
  --alarm-back:#fdecea; --good:#14622c; --bar:#3b6fb6; --ice:#7a5195; --track:#eef1f5;
  --h1:#74a9d8; --h2:#4f90c9; --h3:#2f75b5; --h4:#1d5a97; --h5:#114277; --h6:#082a52;
"""
DARK: Final = """
  --page:#111418; --card:#191e24; --text:#e7eaee; --soft:#a3adb9; --line:#343c47; --link:#8ab8ff; --alarm:#ffa198;
  --alarm-back:#3a1b1b; --good:#7ddc97; --bar:#6ea8ec; --ice:#c39ae0; --track:#222932;
  --h1:#2f6395; --h2:#3d7cb5; --h3:#5597d3; --h4:#7db4e6; --h5:#abd1f5; --h6:#e4f1ff;
"""
CSS: Final = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }}
h1, h2, h3, p, li, dd {{ overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 .25rem; }}
h2 {{ font-size: 1.3rem; line-height: 1.25; margin: 0; }}
h3 {{ font-size: 1.05rem; margin: 1.75rem 0 .4rem; }}
p {{ margin: .3rem 0; max-width: 46rem; }}
a {{ color: var(--link); }}
a:focus-visible, .wide:focus-visible {{ outline: 2px solid var(--link); outline-offset: 2px; }}
section {{ background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem;
  margin: 1rem 0; }}
.soft {{ color: var(--soft); font-size: .875rem; }}
.good {{ color: var(--good); }}
.alarm {{ color: var(--alarm); font-weight: 600; }}
ul.alarms {{ margin: .75rem 0 0; padding: .6rem .75rem .6rem 1.9rem; background: var(--alarm-back);
  border-left: 4px solid var(--alarm); border-radius: .25rem; }}
dl.facts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: .75rem 1rem;
  margin: 1rem 0 0; }}
dl.facts dt {{ color: var(--soft); font-size: .875rem; }}
dl.facts dd {{ margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }}
dl.facts small {{ display: block; font-weight: 400; color: var(--soft); font-size: .8125rem; }}
dl.facts small.alarm {{ font-weight: 600; color: var(--alarm); }}
.wide {{ overflow-x: auto; --shade: 1.1rem; background:
  linear-gradient(to right, var(--card) 35%, transparent) local 0 0 / calc(2 * var(--shade)) 100% no-repeat,
  linear-gradient(to left, var(--card) 35%, transparent) local 100% 0 / calc(2 * var(--shade)) 100% no-repeat,
  linear-gradient(to right, var(--line), transparent) scroll 0 0 / var(--shade) 100% no-repeat,
  linear-gradient(to left, var(--line), transparent) scroll 100% 0 / var(--shade) 100% no-repeat; }}
table {{ border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; color: var(--soft); padding-bottom: .4rem; font-size: .875rem; }}
th, td {{ text-align: left; padding: .3rem 1rem .3rem 0; white-space: nowrap; border-bottom: 1px solid var(--line); vertical-align: top; }}
tr > :last-child {{ padding-right: 0; }}
thead th {{ color: var(--soft); font-weight: 600; vertical-align: bottom; }}
tbody th {{ font-weight: 600; }}
.number {{ text-align: right; }}
.words {{ white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }}
td ul {{ margin: 0; padding-left: 1.1rem; min-width: 18rem; }}
table.drawn {{ table-layout: fixed; }}
table.drawn th, table.drawn td {{ border: 0; padding: 1px .4rem 1px 0; vertical-align: middle; line-height: 1.2; }}
table.drawn col.label {{ width: 6.5rem; }}
table.drawn col.value {{ width: 6rem; }}
table.drawn td.number {{ padding-left: .2rem; padding-right: 0; color: var(--soft); }}
table.drawn tfoot td {{ white-space: normal; }}
caption span {{ display: block; white-space: normal; position: sticky; left: 0; max-width: min(46rem, 100vw - 3.5rem); }}
table.drawn tbody th {{ font-weight: 400; }}
table.drawn tfoot th, table.drawn tfoot td {{ padding-top: .4rem; font-weight: 400; }}
svg {{ display: block; width: 100%; background: var(--track); border-radius: 2px; }}
svg.bars {{ height: 2.6rem; }}
svg.row {{ height: .95rem; }}
.ends {{ display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; color: var(--soft); }}
.ends > * {{ white-space: nowrap; }}
.ends > :last-child {{ margin-left: auto; }}
.kind {{ fill: var(--text); }} .bar {{ fill: var(--bar); }} .ice {{ fill: var(--ice); }} .fault {{ fill: var(--alarm); }}
.h1 {{ fill: var(--h1); }} .h2 {{ fill: var(--h2); }} .h3 {{ fill: var(--h3); }}
.h4 {{ fill: var(--h4); }} .h5 {{ fill: var(--h5); }} .h6 {{ fill: var(--h6); }}
.legend {{ display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; margin: .5rem 0 0; padding: 0;
  color: var(--soft); font-size: .8125rem; }}
.legend li {{ display: flex; align-items: center; gap: .4rem; }}
.legend svg {{ width: 1.1rem; height: .95rem; }}
table.month {{ width: auto; table-layout: fixed; border-collapse: separate; border-spacing: 3px; }}
table.month th, table.month td {{ border: 0; padding: 0 .1rem; text-align: center; width: 2.4rem; height: 1.7rem;
  vertical-align: middle; }}
table.month tbody th {{ width: 4.2rem; text-align: left; font-weight: 400; color: var(--soft); white-space: nowrap; }}
table.month td {{ background: var(--track); border-radius: 3px; }}
table.month td.has {{ outline: 2px solid var(--bar); outline-offset: -2px; font-weight: 600; }}
table.month td.out {{ background: none; }}
.pair {{ display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem 3rem; }}
.pair > * {{ flex: 0 1 auto; min-width: 0; }}
@media (max-width: 34rem) {{
  body {{ padding: .5rem; }}
  section {{ padding: .75rem; }}
  dl.facts {{ grid-template-columns: repeat(2, minmax(0, 1fr)); }}
  table.drawn col.label {{ width: 4.3rem; }}
  table.drawn col.value {{ width: 4.5rem; }}
  table.drawn {{ font-size: .8125rem; }}
  td ul {{ min-width: 26rem; }}
  table.month {{ border-spacing: 2px; }}
}}
@media print {{
  :root {{ color-scheme: light; {LIGHT} --page:#fff; }}
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  section {{ border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: .75rem 0; }}
  .wide {{ overflow: visible; background: none; }}
  tr, ul.alarms, dl.facts, table.drawn, table.month {{ break-inside: avoid; }}
  h2, h3, caption {{ break-after: avoid; }}
  svg, table.month td, ul.alarms {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
}}
"""
