"Pages as tools/docs.py draws them, from a notebook of a few cells and without MkDocs"
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest, yaml
from nbformat import v4, write

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))
import docs
from nbdev.process import NBProcessor
from pages import Page, few_losses, fields_shown, last_sentence, numbered, options, own_imports, re_losses

png = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
fm = '---\ndescription: What it is for\ntitle: Masking\n---'


def picture(**meta): return v4.new_output('display_data', data={'image/png': png}, metadata=meta)

def code(src, *outputs): return v4.new_code_cell(src, outputs=[*outputs])

def documented(name):
    return code(f'show_doc({name})', v4.new_output('display_data', data={'text/markdown': f'### {name}\n'}))

@pytest.fixture
def page(tmp_path):
    def drawn(*cells, site=True, src='21_masking.ipynb'):
        write(v4.new_notebook(cells=[v4.new_raw_cell(fm), *cells]), path := tmp_path/'a.ipynb')
        book = SimpleNamespace(home='https://here/', srcs={}, rooms={'21_masking.ipynb':'masking'},
                               drawn_by=lambda s: 'Bars' if 'plot_bars' in s else '',
                               titles={'other.ipynb': ('Other', 'About it')},
                               section={'Tutorials': ['other.ipynb']}.__getitem__)
        page = Page(path, src, book, site)
        book.pages = {'other.ipynb': SimpleNamespace(name='other.md', thumbnail=lambda: 'figures/o.png'), src: page}
        return page.markdown()
    return drawn

setup = '#| code-fold: true\n#| code-summary: Set up\n'

def test_setups_that_follow_each_other_are_one_closed_fold(page):
    s = page(code(setup+'import os'), code(setup+'x = 1'), code('x'))
    assert s.count('<summary>Set up</summary>') == 1
    assert '```python\nimport os\n\nx = 1\n```\n\n</details>\n\n```python\nx\n```' in s
    assert 'open>' not in s
    assert '<details>\n<summary>Set up</summary>' in page(code(setup+'x'), site=False)

def test_asides_are_folded_to_the_next_heading_of_their_rank(page):
    md = v4.new_markdown_cell
    s = page(md('## Bad input\n\nNever NaN.'), md('### Deeper'), code('f(None)'), md('## Next'))
    inside,after = s.split('<summary>Bad input</summary>')[1].split('</details>')
    assert all(o in inside for o in ('Never NaN.', '### Deeper', 'f(None)')) and '## Next' in after
    assert 'id="bad-input"' in s
    assert page(md('## Bad input'), code('f()')).rstrip().endswith('</details>')

def test_the_top_says_what_is_here_and_where(page):
    s = page(documented('keep'), documented('Mask.take'))
    [line] = [l for l in s.splitlines() if '`cellmae.masking`' in l]
    assert '[`keep`](#keep)' in line and 'Mask.take' not in line
    assert '/nbs/21_masking.ipynb)' in line and '/cellmae/masking.py)' in line
    assert '`cellmae.' not in page(src='tutorials/a.ipynb')

def test_pictures_say_what_they_show(page):
    md = v4.new_markdown_cell
    text = '## Depth\n\nFirst words. The left half of `x` is [dark](a.png):'
    s = page(md(text), code('show(x)', picture()), code('show(x)', picture()))
    assert '![Depth: The left half of x is dark](' in s and '![Depth: The left half of x is dark (2)](' in s
    assert '![Masking: Bars (loss against step)](' in page(code("plot_bars(x, xlabel='step', ylabel='loss')", picture()))
    s = page(code('#| fig-cap: "Two cells"\nshow(x)', picture(**{'image/png': dict(width=300)})))
    assert '![Two cells](' in s and ' width="300"' in s and '<figcaption aria-hidden="true">Two cells</figcaption>' in s

def test_options_of_pictures_are_those_of_quarto(page):
    two = code('#| fig-cap: ["One: a < b", "Two"]\nx', picture(), picture())
    s = page(two)
    assert '![One: a b](' in s and '>One: a &lt; b</figcaption>' in s and '>Two</figcaption>' in s
    s = page(code('#| fig-cap: Above\n#| fig-alt: "Two bars, \\"a\\" and b"\nx', picture()))
    assert '![Two bars, a and b](' in s and '<figcaption>Above</figcaption>' in s
    s = page(code('#| fig-cap: "Two cells"\nx', picture()), site=False)
    assert s.count('Two cells') == 2 and '\n\n*Two cells*' in s

def pictures():
    "Where each picture of the notebooks is, and what is said of it: below, or in the README in its place"
    for f in docs.notebooks():
        cap = 'fig-alt' if f == docs.get_config().readme_nb else 'fig-cap'
        for c in docs.read_nb(root/'nbs'/f).cells:
            n = sum('image/png' in o.get('data', {}) for o in c.get('outputs', []))
            yield from ((f'{f} cell {c.id}', numbered(options(c), i)[cap]) for i in range(n))

def test_every_picture_has_a_caption_of_its_own():
    found = [*pictures()]
    said = Counter(o for _,o in found)
    bad = [f'{at}: {o!r}' for at,o in found if not 15 <= len(o) <= 200 or said[o] > 1]
    assert len(found) > 100 and not bad, '\n'.join(['', *bad])

def test_no_picture_of_the_notebooks_is_nameless(page):
    assert last_sentence('```\ncode\n```') == ''
    assert page(code('x', picture())).count('![Masking: What it is for](') == 1

def test_long_tables_of_losses_say_how_it_ended():
    def table(n):
        rows = ''.join(f'<tr><td>{i}</td><td>{1/(i+1):.2f}</td><td></td></tr>' for i in range(n))
        head = '<table class="fastprogress"><thead><tr><th>epoch</th><th>loss</th><th>time</th></tr></thead>'
        return f'{head}<tbody>{rows}</tbody></table>'
    fold = lambda n: re_losses.sub(few_losses, table(n))
    assert fold(5) == table(5)
    assert '<summary>8 epochs, at the end loss 0.12</summary>' in fold(8) and table(8) in fold(8)

def test_cards_show_a_section_of_the_sidebar(page):
    cell = v4.new_markdown_cell('<!-- cards: Tutorials -->')
    assert '-   [![](figures/o.png)](other.md)\n\n    **[Other](other.md)**\n\n    About it' in page(cell)
    assert '- [Other](nbs/other.ipynb): about it' in page(cell, site=False)

def test_set_ups_show_imports_of_the_library_and_what_star_leaves_out():
    raw = docs.read_nb(root/'nbs'/'17_stats.ipynb')
    proc = NBProcessor(nb=raw, procs=[own_imports])
    proc.process()
    [s] = [c.source for c in raw.cells if 'import *' in c.source and 'cellmae.stats' in c.source]
    assert 'import math, torch' in s and s.endswith('from cellmae.stats import _rings')
    assert s.startswith(setup)

def test_quarto_gets_the_same_look():
    web = yaml.safe_load((root/'_quarto.yml').read_text())
    html,files = web['format']['html'],[web['website']['favicon'], web['website']['navbar']['logo']]
    assert set(html['theme']) == {'light', 'dark'}
    assert all((root/'nbs'/f).exists() for f in [html['css'], *files])
    assert [docs.theme['logo'], docs.theme['favicon']] == files[::-1]


def test_records_show_their_fields():
    said = '[source](https://a.b/cellmae/{}.py#L9)\n\n### {}\n\n```python\ndef {}(\n    *args, **kwargs\n):\n```\n\n*What it is*'
    section = fields_shown(said.format('story', *['Section']*2))
    assert 'def Section(\n    title, # Its heading\n' in section and '*args' not in section and '*What it is*' in section
    assert fields_shown(said.format('story', *['write_story']*2)) == said.format('story', *['write_story']*2)
