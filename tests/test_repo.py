"The house rules of CONTRIBUTING.md"
import ast, builtins, dis, importlib, re, subprocess, sys
from collections import Counter
from pathlib import Path
from types import CodeType

import nbformat, yaml
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives
from run_nbs import complaints

root = Path(__file__).resolve().parents[1]
cfg = get_config(path=root)
flags = set(cfg.tst_flags.split())
known = flags | {'default_exp', 'export', 'exports', 'exporti', 'hide', 'hide_line', 'exec_doc',
                 'eval:', 'echo:', 'output:', 'include:', 'code-fold:', 'code-summary:', 'fig-alt:', 'fig-cap:'}
files = sorted(nbglob(cfg.nbs_path, as_path=True))
nbs = {f.relative_to(cfg.nbs_path).as_posix(): nbformat.read(f, as_version=4) for f in files}
modules = sorted(f for f in cfg.lib_path.glob('*.py') if f.name[0] != '_')
cells = [(f'{name} cell {c.get("id")}', c) for name,nb in nbs.items() for c in nb.cells]
code = [(at, c, extract_directives(c, remove=False)) for at,c in cells if c.cell_type == 'code']


def check(bad): assert not (bad := list(bad)), '\n'.join(['', *bad])


def tree(cell):
    "The syntax tree of `cell`, without magics"
    return ast.parse(re.sub(r'^\s*[%!].*$', '', cell.source, flags=re.M))


def imports(t, walk=False):
    return [o for o in (ast.walk(t) if walk else t.body) if isinstance(o, (ast.Import, ast.ImportFrom))]


def number(name): return int(m[1]) if (m := re.match(r"(\d+)_", name)) else 99


def test_notebooks_are_valid():
    for nb in nbs.values(): nbformat.validate(nb)
    check(f'{name}: metadata {" ".join(nb.metadata)}' for name,nb in nbs.items() if set(nb.metadata) - {'kernelspec'})

def test_cell_ids_are_unique():
    counts = Counter(c.get('id') for _,c in cells)
    check(f'cell id {k} occurs {n} times' for k,n in counts.items() if n > 1 or k is None)

def test_title_and_subtitle():
    head = re.compile(r'# \S[^\n]*\n\n> (\S[^\n]{0,69})(\n|$)')
    check(f'{name}: the first cell is not a title and a subtitle' for name,nb in nbs.items()
          if nb.cells[0].cell_type != 'markdown' or not head.match(nb.cells[0].source))

def test_outputs_are_fit_to_read(): check(f'{at}: {s}' for at,c in cells for s in complaints(c))

def test_notebooks_are_small():
    sizes = {name: (cfg.nbs_path/name).stat().st_size/1e3 for name in nbs}
    check(f'{name}: {kb:.0f} KB' for name,kb in sizes.items() if kb > 400)

def test_known_directives_come_first():
    check(f'{at}: #| {d} is no directive' for at,_,ds in code for d in ds if d not in known)
    late = re.compile(r'^[^#\s%].*\n(?:.*\n)*?#\|', re.M)
    check(f'{at}: a directive below code is ignored' for at,c,_ in code if late.search(c.source))

def test_imports_have_their_own_cells():
    "Docs builds execute every cell that imports, so it must do nothing else; a flagged cell must not import at all"
    def mixed(c, ds):
        if ds.get('eval:', [''])[0] == 'false' or 'nbdev_export()' in c.source: return False
        t = tree(c)
        found = imports(t, walk=not any(o.startswith('export') for o in ds))
        return found and (len(imports(t)) < len(t.body) or flags & set(ds))
    check(f'{at}: imports belong into a cell of their own, without flags' for at,c,ds in code if mixed(c, ds))

def test_last_cell_exports():
    check(f'{name}: the last cell is not a hidden nbdev_export()' for name,nb in nbs.items()
          if any('default_exp' in c.source for c in nb.cells)
          and not re.match(r'#\| *hide\nimport nbdev; nbdev.nbdev_export\(\)$', nb.cells[-1].source))

def test_exported_cells_are_short():
    check(f'{at}: {n} lines' for at,c,ds in code if any(o.startswith('export') for o in ds)
          and (n := len(c.source.splitlines()) - 1) > 40)

def test_every_notebook_is_in_the_sidebar():
    def leaves(o): return [f for c in o['contents'] for f in leaves(c)] if isinstance(o, dict) else [o]
    listed = leaves(yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar'])
    assert sorted(listed) == sorted(nbs)

def test_imports_go_down_in_number():
    rank = {re.sub(r'^\d+_', '', Path(name).stem): number(name) for name in nbs if '/' not in name}
    pat = re.compile(r'^\s*from (?:cellmae)?\.(\w+) import', re.M)
    check(f'{at}: imports {m}' for at,c,_ in code for m in pat.findall(c.source)
          if number(at) < 99 and rank.get(m, 0) > number(at))

def test_public_names_have_one_line_docstrings():
    def doc(o): return ast.get_docstring(o) or ''
    defs = [(f.name, o) for f in modules for o in ast.parse(f.read_text()).body
            if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and o.name[0] != '_']
    check(f'{f}: {o.name} has no docstring' for f,o in defs if not doc(o))
    check(f'{f}: the docstring of {o.name} has {len(doc(o).splitlines())} lines' for f,o in defs if '\n' in doc(o))

def test_ascii():
    pats = '*.md', '*.ini', '*.py', '*.yml', '*/*.py', 'tools/*', 'nbs/*.css', '.ci/*'
    texts = {str(f.relative_to(root)): f.read_text() for pat in pats for f in root.glob(pat) if f.is_file()}
    texts |= {at: c.source for at,c in cells}
    check(f'{at}: {m[0]!r}' for at,s in texts.items() if (m := re.search(r'[^\x00-\x7F].{0,20}', s)))

def test_evaluation_imports_stay_light():
    "Someone with embeddings from any model needs neither torch nor fastai"
    prog = "import sys, cellmae.tvn, cellmae.recall, cellmae.choose, cellmae.neighbours; print({'torch', 'torchvision', 'timm', 'fastai'} & set(sys.modules) or '')"
    res = subprocess.run([sys.executable, '-c', prog], cwd=root, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    assert not res.stdout.strip(), f'tvn, recall, choose or neighbours imports {res.stdout}'

def test_rooms_keep_what_is_private():
    pat = re.compile(r'^from \.\w+ import (.*)$', re.M)
    check(f'{f.name}: imports {name}' for f in modules for m in pat.findall(f.read_text())
          for name in re.split(r'[, ()]+', m) if name.startswith('_'))

def test_code_fits_the_page():
    "Exported and shown code has lines of at most 100 columns, but for captions, which are not shown as code"
    check(f'{at} line {i}: {len(l)} columns' for at,c,ds in code if 'hide' not in ds
          for i,l in enumerate(c.source.splitlines(), 1) if len(l) > 100 and not l.startswith('#| fig-'))

def shown(ds): return not any(o.startswith('export') or o == 'hide' for o in ds) and ds.get('echo:') != ['false']

def names(code):
    "Names that the cell `code` sets, and those it reads from cells before: functions look when all of it has run"
    gets,puts,sets,reads = ('LOAD_NAME', 'LOAD_GLOBAL'),('STORE_NAME', 'STORE_GLOBAL'),set(),set()
    for o in dis.get_instructions(code):
        if o.opname in puts: sets.add(o.argval)
        if o.opname in gets and o.argval not in sets: reads.add(o.argval)
    for c in filter(lambda o: isinstance(o, CodeType), code.co_consts): reads |= names(c)[1] - sets
    return sets,reads - set(dir(builtins))

def star_names(t):
    "Names that `from ... import *` brings"
    mods = (importlib.import_module(o.module) for o in imports(t) if o.names[0].name == '*')
    return {k for m in mods for k in getattr(m, '__all__', vars(m))}

def hidden_names(nb):
    "Cells of `nb` that a reader sees, with a name they read that was last set where he does not see it"
    at = {}
    for c in nb.cells:
        if c.cell_type != 'code': continue
        t,ds = tree(c),extract_directives(c, remove=False)
        sets,reads = names(compile(t, c.id, 'exec'))
        if shown(ds): yield from ((c, k, at[k]) for k in reads if at.get(k))
        seen = shown(ds) or any(o.startswith('export') for o in ds)
        at |= dict.fromkeys(sets | star_names(t), not seen and c.id)

def test_code_that_is_shown_uses_what_is_shown():
    "What a page shows can be pasted: names of hidden cells belong into a folded one (CONTRIBUTING.md)"
    check(f'{name} cell {c.id} uses {k} of the hidden cell {at}' for name,nb in nbs.items() for c,k,at in hidden_names(nb))

def test_hidden_names_are_found():
    cell = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(cells=[
        cell('#| hide\nfrom fastcore.test import *'), cell('#| hide\nx = y = z = 1'), cell('x = 2'),
        cell('def f(a): return a+y+[o for o in z][0]'), cell('#| hide\nq = z'), cell('test_eq(x, f(2))')])
    found = [(c.source[:3], k) for c,k,_ in hidden_names(nb)]
    assert sorted(found) == [('def','y'), ('def','z'), ('tes','test_eq')]
