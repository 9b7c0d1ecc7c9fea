"What the README and the pages show can be pasted: Python in a clean namespace, commands with options that exist"
import inspect, re
from pathlib import Path

import matplotlib.pyplot as plt, nbformat
from cellmae import cli

root = Path(__file__).resolve().parents[1]
readme = (root/'README.md').read_text()

def test_readme_runs_as_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python,space = re.findall(r'^```python\n(.*?)^```', readme, re.M|re.S),{'__name__':'__main__'}
    assert len(python) > 2
    for s in python: exec(compile(s, 'block of the README', 'exec'), space)
    assert plt.get_fignums() and (tmp_path/'tiny/run/model').is_dir() # something to be seen, and a model
    assert space['found'].recall.iloc[0] > .2 # twice what chance finds
    plt.close('all')

COMMANDS = {k: o for k,o in vars(cli).items() if re.fullmatch('cellmae_[a-z]+', k)}

def calls(text):
    "Commands of ours in a text, each with its options"
    text = text.replace('\\\n', ' ')
    for name,rest in re.findall(r'\b(cellmae_[a-z]+)\)?((?:[ \t]+[^\s|;&`"\']+)*)', text):
        if name in COMMANDS: yield name,re.findall(r'(?<!\S)--(\w+)', re.split(r'\scellmae_', rest)[0])

def test_commands_that_pages_show_have_these_options():
    pages = {f: '\n'.join(c.source for c in nbformat.read(f, as_version=4).cells if c.cell_type=='markdown')
             for f in (root/'nbs').rglob('*.ipynb')}
    shown = [(f.name,*o) for f,s in {**pages, root/'README.md': readme}.items() for o in calls(s)]
    known = {k: inspect.signature(o).parameters for k,o in COMMANDS.items()}
    wrong = [f'{f}: {k} has no --{o}' for f,k,options in shown for o in options if o not in known[k]]
    assert not wrong, '\n'.join(wrong)
    assert {k for _,k,_ in shown} == set(COMMANDS) and sum(len(o) for *_,o in shown) > 40

def test_calls():
    text = 'torchrun --nproc_per_node 8 $(which cellmae_fit) store --bs 2048 --out run\nand `cellmae_check plates` or --none'
    assert [*calls(text)] == [('cellmae_fit',['bs','out']),('cellmae_check',[])]
