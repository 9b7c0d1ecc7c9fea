"What happens at the border of training: stops, errors, other data in the folder, damage, fastai's habits"
import shutil, subprocess, sys, time, warnings
from contextlib import redirect_stdout
from functools import partial
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from tifffile import imwrite

from cellmae.data import screen_dls
from cellmae.device import _keeping
from cellmae.files import locked
from cellmae.screen import Screen
from cellmae.train import fit_mae, mae_learner
from cellmae.vit import MAE
from cellmae.wsl import fit_wsl
from cellmae.zoo import create_model, load_model

stains = ['DNA', 'ER']
kw = dict(epochs=2, bs=4, crop=32, n_pictures=0, save_every=0, device='cpu', bf16=False)

wsl = dict(arch='densenet_t', epochs=1, bs=4, crop=32, crops=2, device='cpu', apart=None)

def make_screen(root, seed=0, n=8, channels=stains, sizes=(), **columns):
    "`n` wells of noise, some of another size"
    g = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        x = g.integers(100, 4000, (2, *dict(sizes).get(i, (40, 40)))).astype('u2')
        imwrite(root/f'{i}.tif', x, photometric='minisblack')
    table = dict(plate=[f'P{i%2}' for i in range(n)], well=[f'A{i+1:02d}' for i in range(n)],
                 perturbation=['DMSO', 'TP53']*(n//2)+['KIF11']*(n%2), file=[f'{i}.tif' for i in range(n)])
    return Screen(pd.DataFrame({**table, **columns}), channels, root)

@pytest.fixture(scope='module')
def screen(tmp_path_factory): return make_screen(tmp_path_factory.mktemp('screen'))

def tiny(seed=0, cls=None):
    "A model small enough for tests, with weights of its own"
    torch.manual_seed(seed)
    m = create_model('mae_vitt8', in_chans=2, img_size=32, depth=1, embed_dim=48)
    if cls: m = cls(**m.config)
    return m

def fit(screen, out, model=None, **more): return fit_mae(screen, model or tiny(), out, **{**kw, **more})
def weights(learn): return [p.detach().clone() for p in learn.model.state_dict().values()]
def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b, strict=True))
def rows(learn): return [list(r) for r in learn.recorder.values]
def files(out): return {f.relative_to(out).as_posix():f.read_bytes() for f in out.rglob('*') if f.is_file()}

@pytest.fixture(scope='module')
def whole(screen, tmp_path_factory):
    "A run from start to end without interruption"
    return fit(screen, tmp_path_factory.mktemp('whole')/'run')

@pytest.fixture
def run(whole, tmp_path):
    "A copy of the folder of the finished run"
    return shutil.copytree(whole.path, tmp_path/'run')

# State that outlives an error

class Raises(Callback):
    "An error in the middle of the second epoch"
    order = 100
    def __init__(self, error, event): self.error,self.event = error,event
    def __getattr__(self, k):
        if k==self.__dict__.get('event'): return self.at
        return super().__getattr__(k)
    def at(self):
        if self.epoch==1 and (self.event=='after_epoch' or self.iter==0): raise self.error

errors = [KeyboardInterrupt(), torch.OutOfMemoryError('out of memory'), ValueError('of the model')]
events = ['before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'after_batch',
          'after_epoch']

@pytest.mark.parametrize('bf16', [False, True])
def test_after_an_error_the_kernel_is_as_fresh(screen, tmp_path, bf16):
    fresh = weights(fit(screen, tmp_path/'fresh', bf16=bf16))
    for i,event in enumerate(events):
        model,error = tiny(),errors[i%3]
        model.eval()
        with pytest.raises(type(error)):
            fit(screen, tmp_path/event, model, bf16=bf16, cbs=Raises(error, event))
        assert not torch.is_autocast_enabled('cpu') and not _keeping and not model.training
        assert torch.is_grad_enabled() and all(p.grad is None and p.requires_grad for p in model.parameters())
        assert same(weights(fit(screen, tmp_path/f'{event} after', bf16=bf16)), fresh)
        assert same(weights(fit(screen, tmp_path/event, model, bf16=bf16)), fresh), 'the same cell goes on exactly'

def test_an_error_inside_the_model_leaves_autocast(screen, tmp_path):
    model = tiny()
    model.decoder.register_forward_hook(lambda *a: (_ for _ in ()).throw(ValueError('inside')))
    with pytest.raises(ValueError, match='inside'): fit(screen, tmp_path/'run', model, bf16=True)
    assert not torch.is_autocast_enabled('cpu')

def test_an_error_in_validation_leaves_batch_norm(tmp_path):
    class Bad(Callback):
        run_train = False
        def after_pred(self): raise KeyboardInterrupt
    s = make_screen(tmp_path/'s')
    held = []
    class Keep(Callback):
        def before_fit(self): held.append(self.learn.model)
    with pytest.raises(KeyboardInterrupt):
        fit_wsl(s, out=tmp_path/'run', **wsl, cbs=[Bad(), Keep()])
    norms = [m for m in held[0].modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.track_running_stats for m in norms)

# What makes a run the same run

def others(screen, tmp_path):
    yield 'other images', make_screen(tmp_path/'b', seed=1), {}
    yield 'channels DNA, ER there and ER, DNA now', Screen(screen.table, stains[::-1], screen.root), {}
    yield 'ranges of intensity', Screen(screen.table, stains, screen.root, ranges=[[0,5000]]*2), {}
    yield 'other sites for validation', screen, dict(by='plate')
    yield 'other sites for validation', screen, dict(valid=.5)
    yield 'other starting weights', screen, dict(model=tiny(1))
    yield 'bf16=False there and True now', screen, dict(bf16=True)
    yield 'crops=1 there and 2 now', screen, dict(crops=2)
    yield 'lr=', screen, dict(lr=1e-5)

def test_another_run_in_the_folder_is_refused(screen, run, tmp_path):
    before = files(run)
    for says,other,options in others(screen, tmp_path):
        with pytest.raises(ValueError) as e: fit(other, run, **options)
        assert says in str(e.value) and 'resume=False' in str(e.value)
        assert files(run)==before

def test_the_same_run_is_taken_up(screen, whole, run):
    for options in ({}, dict(num_workers=0), dict(num_workers=3)):
        assert same(weights(fit(screen, run, **options)), weights(whole))

def test_start_over(screen, whole, run):
    (run/'checkpoint.pth').write_bytes(b'')
    assert same(weights(fit(screen, run, resume=False)), weights(whole))

def test_named_model_of_other_channels(tmp_path):
    a,b = make_screen(tmp_path/'a'),make_screen(tmp_path/'b', seed=1, channels=['mito', 'AGP'])
    fit_mae(a, 'mae_vitt8', tmp_path/'run', **kw)
    with pytest.raises(ValueError, match='channels DNA, ER there and mito, AGP now'):
        fit_mae(b, 'mae_vitt8', tmp_path/'run', **kw)

def test_classifier_of_other_labels(tmp_path):
    s,out = make_screen(tmp_path/'s', guide=['a','b','c','d']*2),tmp_path/'run'
    fit_wsl(s, out=out, **wsl)
    with pytest.raises(ValueError, match='other labels'): fit_wsl(s, out=out, label='guide', **wsl)
    swapped = Screen(s.table.assign(perturbation=s.table.perturbation.to_numpy()[::-1]), stains, s.root)
    with pytest.raises(ValueError, match='other images'): fit_wsl(swapped, out=out, **wsl)

def test_classifier_of_another_backbone(tmp_path):
    s,out = make_screen(tmp_path/'s'),tmp_path/'run'
    w = dict(wsl, out=out)
    first = fit_wsl(s, **dict(w, arch=tiny()))
    assert same(weights(fit_wsl(s, **dict(w, arch=tiny()))), weights(first))
    with pytest.raises(ValueError, match='other starting weights'): fit_wsl(s, **dict(w, arch=tiny(1)))

def test_a_run_of_an_earlier_version(screen, whole, run, capsys):
    def begun_by(n):
        state = torch.load(run/'checkpoint.pth')
        state['settings']['processes'] = n
        state.pop('version', None)
        torch.save(state, run/'checkpoint.pth')
    begun_by(2)
    with pytest.raises(ValueError, match='several processes in an earlier version.*resume=False'): fit(screen, run)
    begun_by(1)
    assert same(weights(fit(screen, run)), weights(whole))
    assert 'begun by an earlier version' in capsys.readouterr().out

# The Learner as fastai's users use it

@pytest.fixture
def learn(screen, tmp_path): return mae_learner(screen_dls(screen, 32, 4), tiny(), tmp_path/'run', dict(seed=0))

def test_sweep_and_validation_leave_no_trace(learn):
    before,mode = weights(learn),learn.model.training
    a = learn.validate()
    learn.lr_find(num_it=6, show_plot=False)
    assert list(learn.validate())==list(a)
    assert same(weights(learn), before) and not learn.path.exists()
    assert learn.opt is None and learn.seed_steps.trained==0

def test_sweep_changes_nothing_of_the_fit_after_it(learn, screen, tmp_path):
    other = mae_learner(screen_dls(screen, 32, 4), tiny(), tmp_path/'b', dict(seed=0))
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit(2); other.fit(2)
    assert same(weights(learn), weights(other))

def test_fit_after_a_run_trains_n_more_epochs(screen, run):
    before,learn = files(run),fit(screen, run)
    for epochs,go in [(1, lambda: learn.fit(1)), (2, lambda: learn.fit_one_cycle(2)),
                      (2, lambda: learn.fine_tune(1)),
                      (1, lambda: learn.fit_one_cycle(1, slice(1e-5, 1e-4)))]:
        w,done = weights(learn),learn.seed_steps.trained
        go()
        assert learn.seed_steps.trained==done+epochs and not same(weights(learn), w)
    assert files(run)==before
    assert same(weights(fit(screen, run)), [*load_model(run/'model').state_dict().values()])

def test_weights_set_by_hand_are_trained_from(learn):
    w = learn.model.encoder.cls_token
    with torch.no_grad(): w.fill_(3.)
    learn.fit(1, 1e-6)
    assert 0<(w-3).abs().max()<.01

def test_checkpoint_holds_plain_numbers(screen, tmp_path):
    class Rates(Callback):
        order = 70 # after the schedule
        def before_batch(self): self.opt.set_hypers(lr=[np.float64(1e-4)]) if self.training else None
    fit(screen, tmp_path/'run', cbs=Rates())
    assert fit(screen, tmp_path/'run', cbs=Rates()).recorder.lrs[-1]==1e-4

class Stop(Callback):
    order,run_valid = 99,False
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.train_iter==self.at: raise KeyboardInterrupt

stateful = dict(save=lambda: SaveModelCallback(fname='best'),
                early=lambda: EarlyStoppingCallback(patience=1, min_delta=9),
                accumulate=lambda: GradientAccumulation(6))

class Average(Callback):
    "Mean of weights, with a `state_dict` of its own"
    order = 30
    def before_fit(self): self.mean = [p.detach().clone() for p in self.model.parameters()]
    def after_step(self):
        for m,p in zip(self.mean, self.model.parameters()): m.lerp_(p.detach(), .1)
    def state_dict(self): return dict(mean=self.mean)
    def load_state_dict(self, state): self.mean = state['mean']

@pytest.mark.parametrize('event', ['before_validate', 'after_loss'])
def test_stopped_in_validation(screen, whole, tmp_path, event):
    class StopThere(Callback):
        run_train,order = False,99
    def stop(self):
        if not self.training: raise KeyboardInterrupt
    setattr(StopThere, event, stop)
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'run', cbs=StopThere())
    again = fit(screen, tmp_path/'run')
    assert same(weights(again), weights(whole)) and rows(again)==rows(whole)

@pytest.mark.parametrize('name', [*stateful, 'average'])
def test_what_callbacks_remember_is_resumed(screen, tmp_path, name):
    make = stateful.get(name, Average)
    straight = fit(screen, tmp_path/'a', cbs=(a := make()), epochs=4)
    for at in (1, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            fit(screen, tmp_path/f'b{at}', cbs=[make(), Stop(at)], epochs=4)
        again = fit(screen, tmp_path/f'b{at}', cbs=(b := make()), epochs=4)
        assert same(weights(again), weights(straight))
        if name=='average': assert same(a.mean, b.mean)
    assert same(weights(fit(screen, tmp_path/'a', cbs=make(), epochs=4)), weights(straight)), 'the cell run again'

def test_curves_right_after_resume(screen, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'run', cbs=Stop(3), n_pictures=2)
    picture = tmp_path/'run/reconstructions/epoch_001.png'
    painted = picture.stat().st_mtime_ns
    rec = (learn := fit(screen, tmp_path/'run', n_pictures=2)).recorder
    assert rec.iters==whole.recorder.iters and rows(learn)==rows(whole)
    rec.plot_loss(skip_start=0)
    assert picture.stat().st_mtime_ns==painted and len(pd.read_csv(tmp_path/'run/history.csv'))==2

def test_loaders_without_device(screen, tmp_path):
    dls = screen_dls(screen, 32, 4)
    assert fit_mae(dls, 'mae_vitt8', tmp_path/'a', epochs=1, n_pictures=0).dls is dls
    assert fit_wsl(screen_dls(screen, 32, 4, crops=2), 'densenet_t', tmp_path/'b', epochs=1, apart=None).path
    with pytest.raises(ValueError, match='crop is settled by the loaders'):
        fit_mae(dls, 'mae_vitt8', tmp_path/'c', crop=64)
    with pytest.raises(ValueError, match='valid is settled by the loaders'):
        fit_mae(dls, 'mae_vitt8', tmp_path/'c', valid=.5)

def test_one_callback_and_hypers_without_none(screen, tmp_path):
    learn = fit(screen, tmp_path/'run', cbs=CSVLogger('log.csv'))
    assert len(pd.read_csv(tmp_path/'run/log.csv'))==2
    assert all(isinstance(v, (int, float)) for h in learn.opt.hypers for v in h.values())

def test_fastai_rebuilds_loaders(screen, whole):
    dls = whole.dls
    assert dls.train.new().train and not dls.train.new(shuffle=False).train
    assert len(dls.test_dl(screen.subset([0,1])).ids)==2 and not dls.new_empty().train.n
    dls.show_batch(); whole.show_results()
    assert 'encoder' in whole.summary()
    for f in (whole.get_preds, whole.tta, lambda: whole.predict(0)):
        with pytest.raises(NotImplementedError, match='embed'): f()

def test_callbacks_as_classes(screen, tmp_path):
    a,b = (weights(fit(screen, tmp_path/'run', cbs=SaveModelCallback)) for _ in range(2))
    assert same(a, b)

def test_export(screen, whole, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        whole.export(tmp_path/'export.pkl')
        again = load_learner(tmp_path/'export.pkl')
    assert same(weights(again), weights(whole))
    assert again.validate(dl=again.dls.test_dl(screen))[0]>0

# What is broken, or in the way

def flip(b, at): return b[:at]+bytes([b[at]^64])+b[at+1:]
damage = dict(
    empty=lambda b: b'', half=lambda b: b[:len(b)//2], last=lambda b: b[:-1],
    garbage=lambda b: b'\x07'*999, text=lambda b: b'<html>404</html>',
    flipped=lambda b: flip(b, len(b)//2), early=lambda b: flip(b, len(b)//5))

@pytest.mark.parametrize('kind', damage)
def test_damaged_checkpoint(screen, whole, run, kind):
    f = run/'checkpoint.pth'
    f.write_bytes(damage[kind](f.read_bytes()))
    old = (run/'checkpoint.old.pth').read_bytes()
    with pytest.warns(UserWarning, match='checkpoint.pth is damaged'):
        assert same(weights(fit(screen, run)), weights(whole))
    assert (run/'checkpoint.old.pth').read_bytes()==old, 'what was whole is kept'
    for g in (f, run/'checkpoint.old.pth'): g.write_bytes(damage[kind](g.read_bytes()))
    with pytest.raises(ValueError, match='checkpoint.pth is damaged .*resume=False'):
        fit(screen, run)

def test_checkpoint_of_another_version(screen, run):
    state = torch.load(run/'checkpoint.pth'); del state['memory']
    for f in ('checkpoint.pth','checkpoint.old.pth'): torch.save(state, run/f)
    with pytest.raises(ValueError, match='of another version'): fit(screen, run)

def test_kill_between_two_checkpoints(screen, whole, run):
    (run/'checkpoint.pth').unlink()
    assert same(weights(fit(screen, run)), weights(whole))

@pytest.mark.parametrize('name', ['checkpoint.pth', 'history.csv', 'model', 'reconstructions'])
def test_other_things_in_the_way_are_found_at_once(screen, tmp_path, name):
    out = tmp_path/'run'
    mine = out/name if name=='reconstructions' else out/name/'mine.txt'
    mine.parent.mkdir(parents=True)
    mine.write_text('x')
    before = files(out)
    for resume in (True, False):
        with pytest.raises(FileExistsError, match=f'{name} is something else.*choose another `out`'):
            fit(screen, out, resume=resume)
    assert files(out)==before

def test_out_cannot_be_written(screen, tmp_path):
    (tmp_path/'file').write_text('x')
    with pytest.raises(OSError, match='cannot be written .*choose another `out`'):
        fit(screen, tmp_path/'file/run')

def test_two_processes_in_one_folder(screen, tmp_path):
    with locked(tmp_path/'run', 'training'):
        with pytest.raises(BlockingIOError, match='in use by'): fit(screen, tmp_path/'run')

def test_clock_set_back(screen, tmp_path, monkeypatch):
    monkeypatch.setattr(time, 'time', lambda: -1e9)
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'run', cbs=Stop(1))
    assert torch.load(tmp_path/'run/checkpoint.pth')['at']==(0,1)

@pytest.mark.parametrize('name,value', [
    ('epochs',0), ('epochs',-1), ('epochs',1.5), ('bs',0), ('bs',-4), ('bs',2.5), ('bs',True),
    ('alpha',2), ('alpha',-.1), ('clip',0), ('clip',-1), ('valid',-1), ('valid',1), ('resume','no'),
    ('lr',1e9), ('lr',0), ('lr',float('nan')),
    ('lr','fast'), ('mask_ratio',0), ('mask_ratio',1), ('crops',0), ('n_pictures',-1), ('n_pictures',1.5),
    ('save_every',-1), ('seed',-1), ('crop',0), ('wd',-1), ('num_workers',-1), ('bf16','yes')])
def test_values_out_of_range_are_refused_by_name(screen, tmp_path, name, value):
    with pytest.raises(ValueError, match=f'^{name}={value!r}: it must be'):
        fit(screen, tmp_path/'run', **{name:value})
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('name,value', [('share',2), ('cutmix',-1), ('embed_dim',0)])
def test_values_of_a_classifier(screen, tmp_path, name, value):
    with pytest.raises(ValueError, match=f'^{name}='):
        fit_wsl(screen, 'densenet_t', tmp_path, crop=32, **{name:value})

@pytest.mark.parametrize('wrong,right', [('epoch','epochs'), ('crop_size',None), ('num_worker','num_workers'), ('cache_gb',None),
                                         ('batch_size',None), ('masked_ratio','mask_ratio')])
def test_misspelt_options(screen, wrong, right):
    for f in (fit_mae, fit_wsl):
        with pytest.raises(TypeError, match=f"{f.__name__} has no option '{wrong}'"):
            f(screen, **{wrong:3})
    if right:
        with pytest.raises(TypeError, match=f'Did you mean {right}'): fit_mae(screen, **{wrong:3})

# Screens and models of all kinds

def test_two_screens_of_one_panel(tmp_path):
    two = [make_screen(tmp_path/k, seed=i) for i,k in enumerate('ab')]
    learn = fit(two, tmp_path/'run')
    assert len(learn.dls.train.sites.panels)==1

class Mine(MAE): pass

class Silent(MAE):
    "A class that does not write down its argument"
    def __init__(self, extra=0, **kw):
        super().__init__(**kw)
        self.more = torch.nn.Linear(8, extra+1)

def test_a_class_of_ones_own(screen, tmp_path):
    fit(screen, tmp_path/'run', tiny(cls=Mine))
    assert type(load_model(tmp_path/'run/model', cls=Mine)) is Mine
    silent = tiny(cls=partial(Silent, 2))
    with pytest.raises(ValueError, match='another model'): fit(screen, tmp_path/'no', silent)
    assert not (tmp_path/'no').exists()

def test_a_nameless_model_gets_its_own_size(screen, tmp_path):
    size = dict(embed_dim=32, depth=1, num_heads=2)
    model = MAE(img_size=16, patch_size=8, in_chans=2, **size, decoder=size)
    learn = fit_mae(screen, model, tmp_path/'run', epochs=1, bs=4, n_pictures=0, device='cpu')
    assert learn.dls.train.size==16

def test_nothing_to_validate_on(screen, tmp_path):
    learn = fit(screen, tmp_path/'all', valid=0, n_pictures=2)
    assert len(learn.dls.train.ids)==8 and len(pd.read_csv(tmp_path/'all/history.csv'))==2
    one = make_screen(tmp_path/'one', well='A01', plate='P', site=[str(i) for i in range(8)])
    with pytest.warns(UserWarning, match='Nothing is left to validate on'): fit(one, tmp_path/'run')
    assert load_model(tmp_path/'run/model')

def test_small_sites_are_counted_before_training(tmp_path):
    s = make_screen(tmp_path/'s', sizes={3:(40,20), 5:(24,40)})
    with pytest.raises(ValueError, match='plate P1, well A04, site 1, which is 40x20 and 1 more of 8 sites'):
        fit(s, tmp_path/'run')

def test_unlabelled_wells_are_no_class(tmp_path):
    s = make_screen(tmp_path/'s', perturbation=['DMSO','TP53','',None]*2)
    with pytest.warns(UserWarning, match='4 of 8 sites have no perturbation'):
        fit_wsl(s, out=tmp_path/'run', **wsl)
    assert load_model(tmp_path/'run/model').provenance['names']==['DMSO','TP53']

def test_a_log_has_lines(screen, tmp_path):
    with redirect_stdout(StringIO()) as log: fit(screen, tmp_path/'run')
    lines = log.getvalue().splitlines()
    assert len(lines)==2 and lines[0].startswith('epoch 1 of 2: train_loss ') and '\r' not in log.getvalue()

faults = '''
import resource, torch
from cellmae.device import memory_kept

def faults(n=3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n): torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt-before

usual = faults()
try:
    with memory_kept():
        faults(20); kept = faults()
        raise KeyboardInterrupt
except KeyboardInterrupt: print(usual, kept, faults())
'''

@pytest.mark.skipif(sys.platform!='linux', reason='glibc')
def test_memory_is_given_back_after_an_error():
    "In a fresh process, since a heap full of other things answers otherwise"
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', faults], capture_output=True, text=True, check=True).stdout
    usual,kept,after = map(int, out.split())
    if usual > 3*2**26/2**12/2: assert kept < usual/10 and after > usual/4

def test_errors_of_callbacks_in_their_own_words(screen, tmp_path):
    class Bad(Callback):
        def __init__(self, error): self.error = error
        def before_batch(self): raise self.error
    for error,says in ((ValueError('of its own'), '^of its own$'), (OSError(28, 'full'), r'^\[Errno 28\] full$')):
        with pytest.raises(type(error), match=says): fit(screen, tmp_path/'run', cbs=Bad(error))
