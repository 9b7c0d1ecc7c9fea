"Runs in parts, with an average, and of a given time"
import time
from itertools import product

import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from timm.utils import ModelEmaV3

from cellmae.data import Place, screen_dls
from cellmae.learner import Average, parts_of
from cellmae.screen import Screen
from cellmae.train import fit_mae, mae_learner
from cellmae.zoo import create_model, load_model
from test_border_training import Stop, make_screen, same, stains, tiny, weights

kw = dict(epochs=2, bs=6, crop=32, n_pictures=0, save_every=0, device='cpu', bf16=False)
def fit(screen, out, model=None, **more): return fit_mae(screen, model or tiny(), out, **{**kw, **more})
def losses(learn): return [float(o) for o in learn.recorder.losses]
def close(a, b, rtol=1e-3, atol=2e-5): return all(torch.allclose(x, y, rtol, atol) for x,y in zip(a, b, strict=True))

@pytest.fixture(scope='module')
def screen(tmp_path_factory): return make_screen(tmp_path_factory.mktemp('screen'), n=10)

# Parts

@pytest.mark.parametrize('ranks', [1, 2, 3])
def test_parts_make_up_the_batch(ranks):
    for sites,n,unit in product((1, 2, 5, 7, 12), (1, 2, 3, 7), (1, 2, 3)):
        whole,every = sites*unit,[]
        for r in range(ranks):
            a,b = (k*sites//ranks*unit for k in (r, r+1))
            parts = parts_of(Place(whole, a, b-a), n, ranks, unit)
            assert [p.last for p in parts]==[False]*(len(parts)-1)+[True]
            assert len(parts)==n if ranks>1 else len(parts)<=n, 'all processes compute as often'
            assert all(p.first-a==p.rows.start for p in parts if p.weight)
            every += [p for p in parts if p.weight]
        size = [p.rows.stop-p.rows.start for p in every]
        assert sum(size)==whole and sum(p.weight for p in every)==pytest.approx(1)
        assert [p.first for p in every]==[sum(size[:i]) for i in range(len(size))]
        alone = parts_of(Place(whole, 0, whole), n*ranks, 1, unit)
        if sites>=n*ranks: assert [p.first for p in every]==[p.first for p in alone]

class Gradients(Callback):
    "Gradients and losses of all steps; no step is taken, so that they do not add up"
    run_valid,order = False,10
    def before_fit(self): self.grads,self.masks = [],[]
    def after_pred(self): self.masks.append(getattr(self.pred, 'mask', torch.zeros(1)).detach().clone())
    def before_step(self): self.grads.append(torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).clone())

size = dict(img_size=32, depth=2, embed_dim=48, drop_path=.3)
kinds = dict(mae=lambda: create_model('mae_vitt8', in_chans=2, **size), multi=lambda: create_model('camae_vitt8', in_chans=2, **size),
             shared=lambda: create_model('camae_vitt8_shared', in_chans=2, **size),
             munet=lambda: create_model('munet_m', in_chans=2, img_size=32, widths=(8,16), depth=1))

def gradients(dls, kind, out, k, bf16=False):
    torch.manual_seed(0)
    learn = mae_learner(dls, kinds[kind](), out, dict(seed=0), lr=1e-9, bf16=bf16, cbs=(g := Gradients()))
    learn.accumulate = k
    learn.fit(1)
    return g,learn

@pytest.mark.parametrize('kind,k,bs,crops', [('mae',2,6,1), ('mae',3,7,2), ('mae',9,4,1), ('multi',3,6,2), ('shared',2,5,1), ('munet',2,6,1)])
def test_a_step_in_parts_is_the_step(screen, tmp_path, kind, k, bs, crops):
    dls = screen_dls(screen, 32, bs, crops, device='cpu')
    (a,one),(b,some) = (gradients(dls, kind, tmp_path/str(n), n) for n in (1,k))
    assert len(a.grads)==len(b.grads)
    for x,y in zip(a.grads, b.grads): assert (x-y).norm()<1e-3*x.norm()
    assert losses(one)==pytest.approx(losses(some), rel=1e-4)
    assert torch.equal(torch.cat(a.masks), torch.cat(b.masks))
