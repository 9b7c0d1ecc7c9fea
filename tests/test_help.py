"`help` tells what each argument of each public name is, and commands say what they can before anything heavy is imported"
import inspect, pkgutil, re, subprocess, sys
from importlib import import_module

import pytest
from fastcore.docments import MarkdownRenderer

import cellmae
from cellmae.docstrings import KINDS, inner
from conftest import root

rooms = [import_module(f'cellmae.{m.name}') for m in pkgutil.iter_modules(cellmae.__path__) if m.name not in ('_modidx','all')]

# What only their own room calls, or fastai does: steps of a run, which nobody uses by themselves
steps = '''Averages Average Batch BatchStats Budget Checkpoint CropLoader Each FixedMasks Guard Images Job Lines Means MultiDecoder Packing Rows
           SafeLearner Shards Sites Stopwatch Team Together WSLLoss Watch'''.split()


def told(o):
    "What `help` says of each argument"
    return dict(re.findall(r'^\*{0,2}(\w+)(?: : .*)?\n    (\S.*)$', inspect.getdoc(o) or '', re.M))


def is_ours(o): return (getattr(o, '__module__', None) or '').startswith('cellmae.')


def methods(cls):
    "What a class offers beyond its bases from elsewhere: a `forward` is explained by torch"
    foreign = [b for b in cls.__mro__[1:] if not is_ours(b)]
    return {k: inner(o) for k,o in vars(cls).items() if k[0]!='_' and type(o) in KINDS and is_ours(inner(o))
            and not any(hasattr(b, k) for b in foreign)}


def public(room):
    "Functions, classes and their methods that a room defines for others, by name"
    for name in room.__all__:
        o = getattr(room, name)
        if not is_ours(o) or not callable(o): continue
        yield f'{room.__name__}.{name}',o
        if inspect.isclass(o) and name not in steps: yield from ((f'{room.__name__}.{name}.{k}',m) for k,m in methods(o).items())


def unexplained(o):
    "Arguments of which nothing is said, but for `*args` and `**kwargs` that a class hands on to its base"
    record = hasattr(o, '_fields') or hasattr(o, '__dataclass_fields__')
    if inspect.isclass(o) and not record and not is_ours(o.__init__): return []
    given = [p for p in inspect.signature(o).parameters.values() if not (inspect.isclass(o) and p.kind in (p.VAR_POSITIONAL,p.VAR_KEYWORD))]
    return [p.name for p in given if p.name not in ('self','cls',*told(o))]


@pytest.mark.parametrize('room', rooms, ids=lambda o: o.__name__[8:])
def test_every_argument_is_explained(room):
    bad = [f'{at}: {k}' for at,o in public(room) for k in unexplained(o)]
    assert not bad, '\n'.join(['', *bad])


def test_steps_are_classes_that_there_are():
    assert set(steps) <= {name for room in rooms for name in room.__all__}


def test_arguments_that_are_handed_on_are_explained():
    from cellmae.train import fit_mae
    said = told(fit_mae)
    assert said['crops'].startswith('Crops from each site') and said['accumulate'].startswith('Parts of a batch') and 'kwargs' not in said


def test_callbacks_are_shown_without_their_events():
    from cellmae.device import BF16
    from cellmae.checkpoint import Guard
    assert str(inspect.signature(BF16)) == str(inspect.signature(Guard)) == '()'
    assert BF16(before_fit=lambda self: None)   # they may still be given


def test_pages_say_nothing_twice():
    from cellmae.all import CAMAE, Screen, fit_mae, recall
    for o in (fit_mae, recall, CAMAE, Screen.subset):
        page = MarkdownRenderer(o)._repr_markdown_()
        assert 'Parameters' not in page and all(page.count(s) == 1 for s in told(o).values() if len(s) > 30), page


LIGHT = """
import sys
from cellmae import cli
sys.argv = ['x','--help']
code = compile('command()', 'command', 'exec')
for command in (cli.cellmae_demo, cli.cellmae_check, cli.cellmae_pack, cli.cellmae_fit, cli.cellmae_embed, cli.cellmae_recall):
    try: exec(code, dict(command=command, __name__='__main__', __file__='command'))
    except SystemExit: pass
print({'torch','torchvision','timm','fastai','matplotlib','bokeh','scipy.stats','sklearn','anndata','zarr'} & set(sys.modules) or 'light')
"""

def python(*args): return subprocess.run([sys.executable, *args], cwd=root, capture_output=True, text=True)

def test_help_of_commands_imports_nothing_heavy():
    res = python('-c', LIGHT)
    assert res.returncode == 0 and not res.stderr, res.stderr
    assert res.stdout.count('usage:') == 6 and res.stdout.split()[-1] == 'light', res.stdout[-300:]


def test_without_docstrings_nothing_is_explained():
    res = python('-OO', '-c', 'import cellmae.cli, cellmae.screen; print(cellmae.screen.open_screen.__doc__)')   # anndata does not import
    assert (res.stdout.strip(), res.stderr) == ('None','')


def test_llms_txt_names_every_page():
    from llms import llms
    from nbdev.doclinks import nbglob
    said = re.findall(r'^- \[(.+)\]\(http\S+/(\S+)\.html\): \S.*$', llms(), re.M)
    assert len(said) == len({page for _,page in said}) == len(nbglob(root/'nbs'))
