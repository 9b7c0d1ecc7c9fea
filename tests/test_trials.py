"Trials that are stopped, and the commands that pages show"
import inspect, re
from pathlib import Path

import nbformat, pandas as pd, pytest
from fastai.callback.core import Callback

from cellmae import cli
from cellmae.synth import synth_screen
from cellmae.trials import finished_trials, trial_table, trials

root = Path(__file__).resolve().parents[1]
size = dict(n_pathways=5, genes_per_pathway=4, n_inactive=0, n_batches=2, controls_per_batch=4, size=64)
tiny = dict(model='mae_vitt8', net=dict(depth=1, embed_dim=48, num_heads=3), crop=32, epochs=2, n_pictures=0, save_every=0)

class Shot(Callback):
    "Stop the process, as it were, at the second epoch of a recipe"
    def after_batch(self):
        if self.training and self.epoch==1: raise KeyboardInterrupt

@pytest.mark.filterwarnings('ignore')
def test_a_stopped_trial_goes_on_exactly(tmp_path):
    "What was finished stays, what was begun goes on, and the numbers are those of a run that nobody stopped"
    screen = synth_screen(tmp_path/'screen', n_workers=0, **size)
    known,how = tmp_path/'screen/relationships.csv',dict(seeds=[3], **tiny)
    shot = {'first': {}, 'second': dict(mask_ratio=.5, cbs=[Shot()])}
    with pytest.raises(KeyboardInterrupt): trials(screen, shot, known, out=tmp_path/'a', **how)
    assert [o.recipe for o in finished_trials(tmp_path/'a')] == ['first']
    kept = (tmp_path/'a/first/seed_3/trial.json').stat().st_mtime_ns
    recipes = {'first': {}, 'second': dict(mask_ratio=.5)}
    a,b = (trials(screen, recipes, known, out=tmp_path/k, **how) for k in 'ab')
    timed = ['seconds','cpu_s']
    pd.testing.assert_frame_equal(a.drop(columns=timed), b.drop(columns=timed))
    assert kept == (tmp_path/'a/first/seed_3/trial.json').stat().st_mtime_ns
    assert (a[timed]>0).all(axis=None) and len(trial_table(tmp_path/'a')) == 2

COMMANDS = {k: o for k,o in vars(cli).items() if re.fullmatch('cellmae_[a-z]+', k)}

def calls(text):
    "Commands of ours in a text, each with its options"
    text = text.replace('\\\n', ' ')
    for name,rest in re.findall(r'\b(cellmae_[a-z]+)\)?((?:[ \t]+[^\s|;&`"\']+)*)', text):
        if name in COMMANDS: yield name,re.findall(r'(?<!\S)--(\w+)', re.split(r'\scellmae_', rest)[0])

def test_commands_that_pages_show_have_these_options():
    pages = {f: '\n'.join(c.source for c in nbformat.read(f, as_version=4).cells if c.cell_type=='markdown')
             for f in (root/'nbs').rglob('*.ipynb')}
    shown = [(f.name,*o) for f,s in {**pages, root/'README.md': (root/'README.md').read_text()}.items() for o in calls(s)]
    known = {k: inspect.signature(o).parameters for k,o in COMMANDS.items()}
    wrong = [f'{f}: {k} has no --{o}' for f,k,options in shown for o in options if o not in known[k]]
    assert not wrong, '\n'.join(wrong)
    assert {k for _,k,_ in shown} == set(COMMANDS) and sum(len(o) for *_,o in shown) > 40

def test_calls():
    text = 'torchrun --nproc_per_node 8 $(which cellmae_fit) store --bs 2048 --out run\nand `cellmae_check plates` or --none'
    assert [*calls(text)] == [('cellmae_fit',['bs','out']),('cellmae_check',[])]
