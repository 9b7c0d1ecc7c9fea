"One model trained in two processes, alone, and by small batches that add up"
import subprocess, sys
import pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from cellmae.data import screen_dls
from cellmae.many_gpus import Together
from cellmae.synth import synth_screen
from cellmae.train import fit_mae, mae_learner, run_whole
from cellmae.zoo import create_model

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    return synth_screen(tmp_path_factory.mktemp('processes')/'screen', n_pathways=2, genes_per_pathway=4, n_inactive=0, n_batches=2, controls_per_batch=4, size=64, n_workers=0)

program = '''
import sys, torch
from pathlib import Path
from fastai.callback.core import Callback
from fastai.torch_core import rank_distrib
from cellmae.data import screen_dls
from cellmae.many_gpus import Together, join_processes
from cellmae.train import mae_learner, run_whole
from cellmae.zoo import create_model

class Seen(Callback):
    run_valid = False
    def __init__(self): self.ids = []
    def before_batch(self): self.ids += self.yb[0].tolist()

screen,out = sys.argv[1:]
device,rank = join_processes(),rank_distrib()
torch.set_num_threads(1); torch.manual_seed(0)
dls = screen_dls(screen, 64, 4, device=device)
seen = Seen()
settings = dict(seed=0, epochs=2)
learn = mae_learner(dls, create_model('mae_vitt8', depth=1), Path(out)/'run', settings, n_pictures=1, cbs=[Together(), seen])
learn.model.channels = dls.train.sites.screens[0].channels
run_whole(learn, settings)
torch.save(dict(weights=learn.model.state_dict(), ids=seen.ids, losses=[float(o) for o in learn.recorder.losses]), Path(out)/f'{rank}.pth')
'''

def test_processes_agree(screen, tmp_path):
    (tmp_path/'train.py').write_text(program)
    cmd = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', tmp_path/'train.py', screen.root, tmp_path]
    p = subprocess.run(cmd, capture_output=True, text=True, timeout=300)
    assert p.returncode==0, p.stderr[-3000:]
    a,b = (torch.load(tmp_path/f'{rank}.pth') for rank in (0,1))
    assert all((a['weights'][k]==b['weights'][k]).all() for k in a['weights'])
    assert a['losses']==b['losses'] and a['losses'][-1]<a['losses'][0]
    n = len(a['ids'])//2
    assert not set(a['ids'][:n]) & set(b['ids'][:n]), 'both processes saw the same images in the first epoch'
    assert len(pd.read_csv(tmp_path/'run/history.csv'))==2
    assert torch.load(tmp_path/'run/checkpoint.pth')['settings']['processes']==2
    alone = mae_learner(screen_dls(screen, 64, 4), create_model('mae_vitt8', depth=1), tmp_path/'run', dict(seed=0, epochs=2))
    with pytest.raises(ValueError, match='processes=2 there'): run_whole(alone, alone.settings)

def train(screen, out, **kw):
    torch.manual_seed(0)
    return fit_mae(screen, create_model('mae_vitt8', depth=1), out, epochs=2, bs=2, device='cpu', n_pictures=1, **kw)

def test_alone_nothing_changes(screen, tmp_path):
    a,b = (train(screen, tmp_path/str(len(cbs)), cbs=cbs).model.state_dict() for cbs in ([], [Together()]))
    assert all((a[k]==b[k]).all() for k in a)

def test_small_batches_add_up(screen, tmp_path):
    class Steps(Callback):
        n = 0
        def after_step(self): self.n += 1
    learn = train(screen, tmp_path, cbs=[GradientAccumulation(4), steps:=Steps()])
    images = 2*len(learn.dls.train.ids)
    assert images/5 <= steps.n <= images/4
