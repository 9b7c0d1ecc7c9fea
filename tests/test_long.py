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
from cellmae import train, wsl
from cellmae.train import fit_mae, mae_learner
from cellmae.wsl import fit_wsl
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

def test_steps_and_history_in_parts(screen, tmp_path):
    one,some = fit(screen, tmp_path/'one'),fit(screen, tmp_path/'some', accumulate=4)
    assert losses(one)==pytest.approx(losses(some), rel=1e-3)
    a,b = (pd.read_csv(tmp_path/k/'history.csv') for k in ('one','some'))
    assert a.shape==b.shape and abs(a/b-1).max().max()<1e-3
    assert load_model(tmp_path/'some/model').provenance['accumulate']==4

everything = dict(accumulate=3, ema=.9, bf16=True, clip=.1)

@pytest.mark.parametrize('at', [1, 2, 3])
def test_all_together_goes_on_exactly(screen, tmp_path, at):
    def model(): torch.manual_seed(0); return kinds['shared']()
    straight = fit(screen, tmp_path/'a', model(), **everything)
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'b', model(), cbs=Stop(at), **everything)
    again = fit(screen, tmp_path/'b', model(), **everything)
    for k in ('model','last'):
        a,b = (load_model(tmp_path/n/'model', average=k=='model') for n in 'ab')
        assert same(a.state_dict().values(), b.state_dict().values())
    assert losses(straight)==losses(again)

def test_another_number_of_parts_goes_on(screen, tmp_path):
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'a', cbs=Stop(1), accumulate=2)
    parts = losses(fit(screen, tmp_path/'a', accumulate=3))
    assert parts==pytest.approx(losses(fit(screen, tmp_path/'b')), rel=1e-3)

ready = dict(log=lambda: CSVLogger('log.csv'), best=lambda: SaveModelCallback(fname='best'), graph=lambda: ShowGraphCallback(),
             stop=lambda: EarlyStoppingCallback(patience=1, min_delta=9), add=lambda: GradientAccumulation(9))

@pytest.mark.parametrize('name', ready)
def test_callbacks_of_fastai_in_parts(screen, tmp_path, name, monkeypatch):
    monkeypatch.setattr('cellmae.learner.watched', lambda: name=='graph') # which draws beside a bar
    one,some = (fit(screen, tmp_path/str(k), cbs=ready[name](), accumulate=k, ema=.9) for k in (1,3))
    assert losses(one)==pytest.approx(losses(some), rel=1e-3)
    assert len(one.recorder.values)==len(some.recorder.values)

def test_sweep_in_parts(screen, tmp_path):
    learn = mae_learner(screen_dls(screen, 32, 6, device='cpu'), tiny(), tmp_path/'run', dict(seed=0), cbs=Average(.9))
    before,learn.accumulate = weights(learn),3
    learn.lr_find(num_it=6, show_plot=False)
    assert same(weights(learn), before) and not learn.path.exists() and learn.averaged_model is None

# An average

class Mean(Callback):
    "The average by hand"
    order,run_valid = -4,False
    def before_fit(self): self.ema = ModelEmaV3(self.model, .9, use_warmup=True); self.n = 0
    def after_step(self): self.n += 1; self.ema.update(self.model, self.n)

def test_the_average_is_timms(screen, tmp_path):
    learn = fit(screen, tmp_path/'a', ema=.9, cbs=(own := Mean()))
    plain = fit(screen, tmp_path/'b')
    assert same(weights(learn), own.ema.module.state_dict().values()) and not same(weights(learn), weights(plain))
    bundle = lambda **k: load_model(tmp_path/'a/model', **k).state_dict().values()
    assert same(bundle(), weights(learn)) and same(bundle(average=False), weights(plain))
    assert load_model(tmp_path/'a/model').provenance['ema']==.9
    assert same(weights(fit(screen, tmp_path/'a', ema=.9)), weights(learn)), 'the cell run again'
    with pytest.raises(ValueError, match='ema=.9 there and .99 now'.replace('.9','0.9')): fit(screen, tmp_path/'a', ema=.99)

def test_what_is_measured_is_the_average(screen, tmp_path):
    class Seen(Callback):
        def before_validate(self): self.learn.seen = self.learn.model
        def before_epoch(self): self.own = self.learn.model
        def after_epoch(self): assert self.learn.model is self.own
    learn = fit(screen, tmp_path/'a', ema=.9, cbs=Seen())
    assert learn.seen is not learn.model
    last = learn.recorder.values[-1][1]
    assert learn.validate()[0]==pytest.approx(last, rel=1e-6)

def test_a_step_that_is_not_taken_does_not_count(screen, tmp_path):
    from fastai.callback.core import CancelStepException
    class Skip(Callback):
        order,run_valid = 30,False
        def before_step(self):
            if self.train_iter%2: raise CancelStepException
    learn = fit(screen, tmp_path/'a', ema=.9, cbs=Skip())
    assert learn.average.steps==(len(losses(learn))+1)//2

def test_an_error_in_validation_gives_the_model_back(screen, tmp_path):
    class Bad(Callback):
        run_train = False
        def after_pred(self): raise ValueError('in validation')
    model = tiny()
    learn = mae_learner(screen_dls(screen, 32, 6, device='cpu'), model, tmp_path, dict(seed=0), cbs=[Bad(), Average(.9)])
    with pytest.raises(ValueError, match='in validation'): learn.fit(1)
    assert learn.model is model and learn.averaged_model is None

# A given time

class Clock:
    "Time that passes by steps and by itself never"
    def __init__(self, monkeypatch, step=1.):
        self.now,self.step = 100.,step
        monkeypatch.setattr('cellmae.learner.time', self)
    def monotonic(self): return self.now
    def time(self): return self.now

class Step(Callback):
    run_valid,order = False,65
    def __init__(self, clock): self.clock = clock
    def after_batch(self): self.clock.now += self.clock.step

timed = dict(epochs=None, seconds=10)

def test_a_run_ends_when_its_time_is_over(screen, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    learn = fit(screen, tmp_path/'a', cbs=Step(clock), **timed)
    steps = learn.recorder.lrs
    assert len(steps)==10 and max(steps)==steps[1] and steps[-1]<.05*max(steps)
    about = load_model(tmp_path/'a/model').provenance
    assert (about['seconds'],about['steps'],about['epochs'])==(10, 10, len(pd.read_csv(tmp_path/'a/history.csv')))

def test_a_killed_run_has_what_is_left_of_its_time(screen, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    straight = fit(screen, tmp_path/'a', cbs=Step(clock), **timed)
    for at in (1, 3, 8):
        with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/f'b{at}', cbs=[Step(clock), Stop(at)], **timed)
        clock.now += 1e6 # dead meanwhile
        again = fit(screen, tmp_path/f'b{at}', cbs=Step(clock), **timed)
        assert same(weights(again), weights(straight)) and losses(again)==losses(straight)
    clock.now += 1e6
    assert same(weights(fit(screen, tmp_path/'a', cbs=Step(clock), **timed)), weights(straight)), 'the cell run again'

@pytest.mark.parametrize('seconds,steps', [(1e-9, 1), (1, 1), (2.5, 3)])
def test_times_that_are_short(screen, tmp_path, monkeypatch, seconds, steps):
    learn = fit(screen, tmp_path, cbs=Step(Clock(monkeypatch)), epochs=None, seconds=seconds)
    assert len(losses(learn))==steps and load_model(tmp_path/'model')

def test_pictures_are_spread_over_the_time(screen, tmp_path, monkeypatch):
    fit(screen, tmp_path, cbs=Step(Clock(monkeypatch, .6)), n_pictures=3, **timed)
    epochs = len(pd.read_csv(tmp_path/'history.csv'))
    drawn = sorted(int(f.stem[-3:]) for f in (tmp_path/'reconstructions').iterdir())
    assert len(drawn)==3 and drawn[-1]==epochs and abs(drawn[0]-epochs/3)<=1.5

def test_how_long_is_said_once(screen, tmp_path):
    for wrong in (dict(epochs=2, seconds=5), dict(seconds=float('inf'), epochs=None), dict(seconds=0, epochs=None), dict(seconds='1h', epochs=None)):
        with pytest.raises(ValueError, match='seconds'): fit(screen, tmp_path/'no', **wrong)
    assert not (tmp_path/'no').exists()

@pytest.mark.parametrize('wrong', [dict(accumulate=0), dict(accumulate=1.5), dict(ema=1), dict(ema=0), dict(n_watch=0), dict(recompute=1), dict(valid=2),
                                   dict(compile='yes'), dict(n_pictures=-1), dict(save_every=-1), dict(crops=0)])
def test_options_are_checked_before_images_are_read(screen, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(Screen, '__getitem__', lambda *a: pytest.fail('an image was read'))
    monkeypatch.setattr('cellmae.train.screen_dls', lambda *a, **k: pytest.fail('loaders were made'))
    with pytest.raises(ValueError, match=f'{next(iter(wrong))}='): fit(screen, tmp_path/'no', **wrong)

@pytest.mark.parametrize('f', [fit_mae, fit_wsl])
def test_what_watches_is_there_before_images_are_read(screen, tmp_path, monkeypatch, f):
    monkeypatch.setattr('cellmae.watch.find_spec', lambda name: None)
    for room in (train,wsl): monkeypatch.setattr(room, 'make_loaders', lambda *a, **k: pytest.fail('loaders were made'))
    pd.DataFrame(dict(gene=['TP53'])).to_csv(tmp_path/'one.csv', index=False)
    for error,says,wrong in [(ValueError, 'tracker=.mlflow.', dict(tracker='mlflow')), (ImportError, 'pip install wandb', dict(tracker='wandb')),
                             (ValueError, "tracker=''", dict(tracker='')), (FileNotFoundError, 'no.csv', dict(watch=tmp_path/'no.csv')),
                             (ValueError, 'one.csv', dict(watch=tmp_path/'one.csv')), (TypeError, 'not int', dict(watch=3)),
                             (ValueError, '', dict(watch=pd.DataFrame())), (ValueError, 'n_watch=0', dict(watch=True, n_watch=0))]:
        with pytest.raises(error, match=says): f(screen, out=tmp_path/'no', **wrong)
    assert not (tmp_path/'no').exists()
