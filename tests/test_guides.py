"What the guides name is there: functions, options, models; and their tables are those of the code and the files"
import ast, builtins, importlib, inspect, re
from pathlib import Path

import nbformat, pytest
from execnb.shell import CaptureShell

import cellmae.all
from cellmae.zoo import list_models

root = Path(__file__).resolve().parents[1]
guides = sorted((root/'nbs/guide').glob('*.ipynb'))
def each(paths): return pytest.mark.parametrize('path', paths, ids=[o.stem for o in paths])
pages,tables = each(guides),each([o for o in guides if o.stem != 'gallery']) # which has pictures, and trains
fence = re.compile(r'^```python\n(.*?)^```', re.M|re.S)


def shown(c):
    "The Markdown that a cell shows: its text, or its tables"
    if c.cell_type == 'markdown': return c.source
    return tables_of(c.get('outputs', []))

def tables_of(outs):
    "The Markdown among outputs, whatever else there is"
    return '\n'.join(filter(None, (''.join(o.get('data', {}).get('text/markdown', '')) for o in outs)))

def cells(path): return nbformat.read(path, as_version=4).cells

def snippets(path):
    "Python on a page: its blocks, and what stands in backticks"
    text = '\n'.join(map(shown, cells(path)))
    return fence.findall(text) + re.findall(r'(?<!`)`([^`\n]+)`(?!`)', fence.sub('', text))

def parsed(s):
    "The tree of `s`; an empty one if it is no Python but a command, a path, a pattern"
    try: return ast.parse(s)
    except SyntaxError: return ast.Module([], [])


def found(f):
    "What the expression `f` means: (is it to be found here?, the object)"
    if isinstance(f, ast.Name): return True, getattr(cellmae.all, f.id, getattr(builtins, f.id, None))
    if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name):
        owner = getattr(cellmae.all, f.value.id, None)
        if owner is not None: return True, getattr(owner, f.attr, None)
    return False, None   # a method of what a snippet made

def wrong_options(f, call):
    "Options in `call` that `f` does not take"
    if f.__module__ == 'builtins': return []
    ps = inspect.signature(f).parameters
    if any(p.kind is p.VAR_KEYWORD for p in ps.values()): return []
    return [k.arg for k in call.keywords if k.arg and k.arg not in ps]

def mistakes(s):
    "What a snippet calls or imports and is not there"
    nodes = list(ast.walk(parsed(s)))
    for o in (n for n in nodes if isinstance(n, ast.Call)):
        here,f = found(o.func)
        if here and f is None: yield f'{ast.unparse(o.func)} is not in cellmae.all'
        if f is not None: yield from (f'{ast.unparse(o)}: no option {k}' for k in wrong_options(f, o))
    for o in (n for n in nodes if isinstance(n, ast.ImportFrom)):
        there = vars(importlib.import_module(o.module))
        yield from (f'{o.module} has no {a.name}' for a in o.names if a.name!='*' and a.name not in there)


def test_mistakes_are_found():
    for s in ("fit_mea(screen)", "fit_mae(screen, epoch=3)", "Screen.opn('plates')", "Screen.check(s, sites=3)",
              "from cellmae.embed import embbed", "TVN(well=.2).fit(x)"): assert list(mistakes(s)), s
    for s in ("fit_mae(screen, epochs=3)", "Screen.open('x', meta='m.csv')", "pip install cellmae", "wells[wells.obs.control]",
              "from cellmae.all import *", "print(len(x))", "learn.show_results()"): assert not list(mistakes(s)), s

@pages
def test_what_is_called_is_there(path):
    bad = [o for s in snippets(path) for o in mistakes(s)]
    assert not bad, '\n'.join(['', *bad])

@pages
def test_models_are_in_the_zoo(path):
    named = {o for s in snippets(path) for o in re.findall(r'\b(?:mae|camae|munet|imagenet)_\w*\w\b(?!\*|\.)', s)}
    assert not named - set(list_models()), named - set(list_models())

@tables
def test_tables_are_those_of_today(path, monkeypatch):
    "Code and files tell what is stored, but for cells that take long"
    monkeypatch.chdir(path.parent)
    shell = CaptureShell()
    for c in cells(path):
        if c.cell_type != 'code' or '#| slow' in c.source: continue
        outs = nbformat.from_dict(shell.run(c.source))
        assert not shell.exc, shell.exc
        assert tables_of(outs) == shown(c), f'run tools/run_nbs.py nbs/guide/{path.name}: cell {c.id} shows other things today'

@pages
def test_files_of_the_repository_are_there(path):
    named = {o for s in map(shown, cells(path)) for o in re.findall(r'benchmarks/[\w./]*\w', s)}
    assert all((root/o).exists() for o in named), [o for o in named if not (root/o).exists()]
