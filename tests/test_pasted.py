"What the README and the pages show can be pasted: Python in a clean namespace, commands with options that exist"
import inspect, re
from pathlib import Path

import matplotlib.pyplot as plt, nbformat, pytest
from cellmae import cli

root = Path(__file__).resolve().parents[1]
block = re.compile(r'^```(\w+)\n(.*?)^```', re.M|re.S)
command = re.compile(r'\b(cellmae_[a-z]+)\b([^\n|;&]*)')
pages = [root/'README.md', *sorted(root.glob('nbs/**/*.ipynb'))]

def text_of(path):
    "The Markdown of a page"
    if path.suffix == '.md': return path.read_text()
    return '\n'.join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'markdown')

def blocks(path, *kinds): return [s for kind,s in block.findall(text_of(path)) if kind in kinds]

def unknown(shell):
    "Commands and options of lines for a shell that do not exist"
    for name,rest in command.findall(shell.replace('\\\n', ' ')):
        f = getattr(cli, name, None)
        if f is None: yield name; continue
        known = set(inspect.signature(f).parameters) | {'help','debug'}
        yield from (f'{name} --{o}' for o in re.findall(r'(?<!\S)--([\w-]+)', rest) if o not in known)


def test_unknown_options_are_found():
    assert list(unknown('cellmae_fit store --epochs 3 \\\n  --modle x && cellmae_mend y')) == ['cellmae_fit --modle', 'cellmae_mend']

@pytest.mark.parametrize('path', pages, ids=[o.stem for o in pages])
def test_commands_have_their_options(path):
    assert not [o for s in blocks(path, 'sh', 'bash', 'console') for o in unknown(s)]

def test_readme_runs_as_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python,space = blocks(root/'README.md', 'python'), {'__name__':'__main__'}
    assert len(python) > 2
    for s in python: exec(compile(s, 'block of the README', 'exec'), space)
    assert plt.get_fignums() and (tmp_path/'tiny/run/model').is_dir() # something to be seen, and a model
    assert space['found'].recall.iloc[0] > .2 # twice what chance finds
    plt.close('all')
