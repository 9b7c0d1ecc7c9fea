"Steps that would spoil a run, disks that fill up, files that are damaged: what a long run does about them"
import errno, shutil, time
from collections import namedtuple
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.training import GradientAccumulation
from tifffile import imwrite

from cellmae import checkpoint as room
from cellmae.checkpoint import Checkpoint, Guard
from cellmae.data import screen_dls
from cellmae.files import locked
from cellmae.learner import mae_learner
from cellmae.train import fit_mae
from cellmae.wsl import fit_wsl
from cellmae.zoo import create_model, load_model
from test_border_training import files, fit, make_screen, rows, same, tiny, weights, wsl

nan,inf = float('nan'),float('inf')
last = 2*4-1 # 7 sites to train on in batches of 4 make 2 steps an epoch, with epochs=4 8 steps
fit = partial(fit, epochs=4)
classify = partial(fit_wsl, **dict(wsl, epochs=4, bf16=False))

@pytest.fixture(scope='module')
def screen(tmp_path_factory): return make_screen(tmp_path_factory.mktemp('screen'))

@pytest.fixture(scope='module')
def whole(screen, tmp_path_factory): return fit(screen, tmp_path_factory.mktemp('whole')/'run')

class Spoil(Callback):
    "Multiply the loss, or a number of the gradient, at some steps"
    order,run_valid = 4,False
    def __init__(self, what, value, *steps): self.what,self.value,self.steps = what,value,steps
    def now(self, what): return self.what==what and self.train_iter in self.steps
    def after_loss(self):
        if self.now('loss'): self.learn.loss = self.loss*self.value
        if self.now('both'): self.learn.loss_grad = self.loss_grad*self.value
    def after_backward(self):
        if self.now('gradient'): [*self.model.parameters()][-1].grad.view(-1)[0] = self.value

class Without(Callback):
    "Train without the batch of a step"
    order,run_valid = 6,False
    def __init__(self, *steps): self.steps = steps
    def before_batch(self):
        if self.train_iter in self.steps: self.learn.yb = (); raise CancelBatchException

class Stop(Callback):
    order,run_valid = 99,False
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.train_iter==self.at: raise KeyboardInterrupt

def skipped(learn): return [o['step'] for o in learn.guard.skipped]
def curves(learn):
    rec = learn.recorder
    return [float(o) for o in rec.losses],rec.lrs,rec.iters,[list(r) for r in rec.values]

# A step that is not taken

@pytest.mark.parametrize('step', [0, 3, last])
def test_a_spoilt_batch_is_as_if_it_were_not_there(screen, tmp_path, capsys, step):
    without = fit(screen, tmp_path/'without', cbs=Without(step))
    # the last checkpoint is one step back, or an epoch
    for what,value,every in (('loss',inf,0), ('gradient',nan,1000), ('both',nan,1000), ('gradient',-inf,0)):
        out = tmp_path/f'{what}{value}{every}'
        learn = fit(screen, out, cbs=Spoil(what, value, step), save_every=every)
        assert same(weights(learn), weights(without)) and curves(learn)==curves(without)
        assert (out/'history.csv').read_bytes()==(without.path/'history.csv').read_bytes()
        said = capsys.readouterr().out
        assert f'at step {step} on plate P' in said and '.tif' in said and 'left out' in said
        noted = load_model(out/'model').provenance
        assert [o['step'] for o in noted['skipped']]==skipped(learn)==[step] and noted['steps']==last

def test_running_statistics_of_batch_norm_do_not_see_it(tmp_path):
    s = make_screen(tmp_path/'s')
    without = classify(s, out=tmp_path/'a', cbs=Without(2))
    learn = classify(s, out=tmp_path/'b', cbs=Spoil('both', nan, 2), save_every=1000)
    assert skipped(learn)==[2] and same(weights(learn), weights(without))

@pytest.mark.parametrize('more', [dict(accumulate=2), dict(ema=.9), dict(bf16=True), dict(cbs=GradientAccumulation(6))], ids=str)
def test_it_goes_with(screen, tmp_path, more):
    cbs = [more.pop('cbs')] if 'cbs' in more else []
    a = fit(screen, tmp_path/'a', cbs=[*cbs, Spoil('gradient', nan, 3)], save_every=0, **more)
    b = fit(screen, tmp_path/'b', cbs=[*cbs, Spoil('gradient', nan, 3)], save_every=1000, **more)
    assert skipped(a)==skipped(b)==[3] and same(weights(a), weights(b)) and curves(a)==curves(b)
    assert all(w.isfinite().all() for w in weights(a))

@pytest.mark.parametrize('at', [3, 4, 6])
def test_killed_after_it(screen, tmp_path, at):
    bad = partial(Spoil, 'gradient', nan, 2, 5)
    straight = fit(screen, tmp_path/'a', cbs=bad())
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'b', cbs=[bad(), Stop(at)])
    again = fit(screen, tmp_path/'b', cbs=bad())
    assert skipped(straight)==skipped(again)==[2,5]
    assert same(weights(again), weights(straight)) and curves(again)==curves(straight)
    assert load_model(tmp_path/'b/model').provenance==load_model(tmp_path/'a/model').provenance

def test_the_third_ends_the_run(screen, tmp_path):
    bad,out = partial(Spoil, 'gradient', nan, 1, 3, 5),tmp_path/'run'
    fit(screen, tmp_path/'good', cbs=Without(1, 3))
    words = []
    for _ in range(3):
        with pytest.raises(FloatingPointError) as e: fit(screen, out, cbs=bad(), save_every=1000)
        words.append(str(e.value))
    assert len(set(words))==1 and 'after steps 1 and 3' in words[0]
    assert all(o in words[0] for o in ('at step 5', 'plate P', '.tif', 'lower `lr`', 'screen.check()', 'resume=False'))
    state = torch.load(out/'checkpoint.pth')
    assert state['at']==(2,0) and not (out/'model').exists()
    assert all(o.isfinite().all() for o in state['model'].values())
    assert fit(screen, out, resume=False).path==out

def test_nan_in_validation_is_said(screen, tmp_path, capsys):
    class Bad(Callback):
        run_train,order = False,1
        def after_loss(self): self.learn.loss = self.loss*nan
    learn = fit(screen, tmp_path/'run', cbs=Bad())
    assert capsys.readouterr().out.count('The validation loss became nan on plate')==4
    assert not skipped(learn) and all(w.isfinite().all() for w in weights(learn))

# A loss that jumps

def test_a_jump_is_left_out(screen, tmp_path):
    learn = fit(screen, tmp_path/'a', cbs=Spoil('loss', 10., 4))
    assert skipped(learn)==[4] and 'after' in learn.guard.skipped[0]['why']
    with pytest.raises(FloatingPointError, match='became .* after .*third'):
        fit(screen, tmp_path/'b', lr=.5, epochs=12)

@pytest.mark.parametrize('lr,bs', [(1e-4,1), (2e-3,4)])
def test_sound_runs_of_autoencoders(screen, tmp_path, lr, bs):
    assert not skipped(fit(screen, tmp_path/'run', lr=lr, bs=bs, epochs=6))

def dark(f, light=100):
    x = np.full((2,40,40), 100, 'u2')
    x[:,3,5] = light
    imwrite(f, x, photometric='minisblack')

def test_a_sound_run_on_empty_wells(tmp_path):
    s = make_screen(tmp_path/'s', n=24)
    for i in {*range(24)}-{5}: dark(s.root/f'{i}.tif') # which comes in step 4
    assert not skipped(fit(s, tmp_path/'run', bs=1, valid=0, epochs=2))

def test_a_sound_run_of_two_panels(screen, tmp_path):
    other = make_screen(tmp_path/'s', n=4, channels=['mito','ER']) # rare, and almost black
    for f in other.root.glob('*.tif'): dark(f, 60000)
    camae = create_model('camae_vitt8_shared', in_chans=3, img_size=32, depth=1, embed_dim=48)
    assert not skipped(fit([screen,other], tmp_path/'run', camae, bs=1))

@pytest.mark.parametrize('cutmix', [0, 1.])
def test_sound_runs_of_classifiers(tmp_path, cutmix):
    s = make_screen(tmp_path/'s')
    assert not skipped(classify(s, out=tmp_path/'run', epochs=8, cutmix=cutmix, lr=3e-2, bs=2))

# A Learner without a folder

@pytest.fixture
def learn(screen, tmp_path): return mae_learner(screen_dls(screen, 32, 4), tiny(), tmp_path/'run', dict(seed=0))

def test_a_bare_fit_leaves_the_batch_out(learn, capsys):
    learn.model.register_buffer('seen', torch.zeros(()))
    learn.model.register_forward_hook(lambda m, *a: (m.seen.add_(1.*m.training), None)[1])
    learn.add_cb(Spoil('gradient', nan, 1, 2))
    learn.fit(2)
    assert skipped(learn)==[1,2] and learn.model.seen==2 and len(learn.recorder.losses)==2
    assert capsys.readouterr().out.count('This batch is left out.')==2 and not learn.path.exists()

def test_the_third_ends_a_bare_fit(learn):
    learn.add_cb(Spoil('gradient', nan, *range(9)))
    before = weights(learn)
    with pytest.raises(FloatingPointError, match='third'): learn.fit(4)
    assert same(weights(learn), before)

def test_a_sweep_may_diverge(learn):
    before = weights(learn)
    learn.add_cb(Spoil('both', nan, 30))
    learn.lr_find(num_it=40, show_plot=False)
    assert same(weights(learn), before) and not skipped(learn)

# Disks

Usage = namedtuple('Usage', 'total used free')

def fail(monkeypatch, when, error):
    "Let checkpoints fail while `when` of their number is true"
    save,n = torch.save,[]
    def full(state, f):
        n.append(f)
        if when(len(n)): raise error
        save(state, f)
    monkeypatch.setattr(torch, 'save', full)
    return n

def test_too_small_a_disk_is_refused_at_once(screen, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda d: Usage(0, 0, 10))
    with pytest.raises(OSError, match=r'needs up to \d+ MB .*0 MB are free.*choose another `out`'):
        fit(screen, tmp_path/'run', cbs=Stop(0))
    run = shutil.copytree(whole.path, tmp_path/'again')
    with pytest.raises(OSError, match='MB are free'): fit(screen, run)

def test_room_that_is_asked_for_is_enough_and_not_much_more(screen, whole):
    keep = Checkpoint(whole.path/'nothing/checkpoint.pth')
    state = torch.load(whole.path/'checkpoint.pth')
    need = 3*room._size(state)+room._size(state['model'])
    used = sum((whole.path/f).stat().st_size for f in ('checkpoint.pth', 'checkpoint.old.pth', 'model/model.safetensors'))
    assert .9*used<need<2*used
    keep.check_room(state)

def test_the_first_checkpoint_must_be_written(screen, tmp_path, monkeypatch):
    fail(monkeypatch, lambda n: True, RuntimeError('[enforce fail at inline_container.cc:603]'))
    with pytest.raises(OSError, match=r'could not be written \(nothing more can be written\).*MB are free.*make room'):
        fit(screen, tmp_path/'run')

@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), OSError(errno.EROFS, 'Read-only file system'),
                                   RuntimeError('[enforce fail at inline_container.cc:603]')], ids=str)
def test_a_disk_that_is_full_for_an_hour(screen, whole, tmp_path, monkeypatch, capsys, error):
    fail(monkeypatch, lambda n: 3<n<8, error)
    learn = fit(screen, tmp_path/'run')
    said = capsys.readouterr().out
    assert same(weights(learn), weights(whole))
    assert said.count('could not be written')==1 and said.count('is written again')==1 and 'MB are free' in said
    assert torch.load(tmp_path/'run/checkpoint.pth')['at']==(4,0)
    assert not [f for f in files(tmp_path/'run') if '.part' in f]

def test_killed_while_the_disk_is_full(screen, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        fail(m, lambda n: n>2, OSError(errno.ENOSPC, 'No space left on device'))
        with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'run', cbs=Stop(5))
    assert torch.load(tmp_path/'run/checkpoint.pth')['at']==(0,1)
    assert same(weights(fit(screen, tmp_path/'run')), weights(whole))

def test_a_spoilt_batch_while_the_disk_is_full(screen, tmp_path, monkeypatch):
    fail(monkeypatch, lambda n: 2<n<12, OSError(errno.ENOSPC, 'No space left on device'))
    a = fit(screen, tmp_path/'a', cbs=Spoil('gradient', nan, 5))
    assert same(weights(a), weights(fit(screen, tmp_path/'b', cbs=Without(5)))) and len(rows(a))==4

def test_the_folder_is_taken_away(screen, whole, tmp_path, capsys):
    out = tmp_path/'run'
    class Away(Callback):
        order,run_valid = 98,False
        def after_batch(self):
            if self.train_iter==2: shutil.move(out, tmp_path/'gone'); out.write_text('x')
            if self.train_iter==6: out.unlink(); shutil.move(tmp_path/'gone', out)
    learn = fit(screen, out, cbs=Away())
    assert same(weights(learn), weights(whole)) and 'could not be written' in capsys.readouterr().out
    assert same(load_model(out/'model').state_dict().values(), weights(whole)) and len(pd.read_csv(out/'history.csv'))==4

def test_the_bundle_takes_the_place_of_the_checkpoint_before(screen, whole, tmp_path, monkeypatch):
    from cellmae import train
    save,out = train.save_model,tmp_path/'run'
    def tight(*args, **kwargs):
        if (out/'checkpoint.old.pth').exists(): raise OSError(errno.ENOSPC, 'No space left on device')
        save(*args, **kwargs)
    monkeypatch.setattr(train, 'save_model', tight)
    fit(screen, out)
    assert same(load_model(out/'model').state_dict().values(), weights(whole))

def test_no_bundle_without_room(screen, whole, tmp_path, monkeypatch):
    from cellmae import train
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(train, 'save_model', full)
        with pytest.raises(OSError, match='All that was learnt is in .*checkpoint.pth.*start again'): fit(screen, tmp_path/'run')
    assert same(weights(fit(screen, tmp_path/'run')), weights(whole)) and (tmp_path/'run/model').is_dir()

# Checkpoints

def test_there_is_one_before_the_first_step(screen, tmp_path):
    class Look(Callback):
        order,run_valid = -20,False
        def before_batch(self):
            if not self.train_iter: seen.append(torch.load(tmp_path/'run/checkpoint.pth')['at'])
    seen = []
    fit(screen, tmp_path/'run', cbs=Look())
    assert seen==[(0,0)]

def folder(f): f.unlink(); f.mkdir()
damage = dict(garbage=lambda f: f.write_bytes(b'\7'*999),
    keys=lambda f: torch.save({'model':{}}, f), newer=lambda f: torch.save(dict(torch.load(f), version=99), f))

@pytest.mark.parametrize('kind', damage)
def test_the_way_back_may_be_damaged(screen, tmp_path, kind):
    out,done = tmp_path/'run',[]
    class Damage(Callback):
        order,run_valid = 98,False
        def after_batch(self):
            if self.train_iter==3 and not done: done.append(damage[kind](out/'checkpoint.pth'))
    with pytest.warns(UserWarning, match='checkpoint.pth is damaged .*from the one before'):
        learn = fit(screen, out, cbs=[Spoil('gradient', nan, 3), Damage()])
    assert same(weights(learn), weights(fit(screen, tmp_path/'b', cbs=Without(3))))

def test_both_are_gone(screen, tmp_path):
    class Lose(Callback):
        order,run_valid = 3,False
        def before_batch(self):
            if self.train_iter==3: [f.unlink() for f in (tmp_path/'run').glob('checkpoint*')]
    with pytest.raises(FileNotFoundError, match='checkpoint.pth is gone'):
        fit(screen, tmp_path/'run', cbs=[Spoil('gradient', nan, 3), Lose()])

def test_writing_takes_a_fiftieth_of_the_time(learn):
    learn.add_cb(keep := Checkpoint(learn.path/'checkpoint.pth', .001))
    keep.took,keep.saved_at = 10.,time.monotonic()-499
    assert not keep.due()
    keep.saved_at -= 2
    assert keep.due()
    keep.seconds = 0
    keep.saved_at = time.monotonic()-1e-3
    assert keep.due(), 'always, where one asks for it'

def test_the_computer_is_no_part_of_the_settings(whole):
    of_how = {'processes', 'accumulate', 'recompute', 'compile', 'device', 'save_every', 'num_workers'}
    assert not of_how & set(torch.load(whole.path/'checkpoint.pth')['settings'])

# What callbacks know

class Sum(Callback):
    "Tensor and numbers that change in training"
    run_valid = False
    def before_fit(self): self.total,self.most = torch.zeros(2),0.
    def after_batch(self): self.total += self.loss.detach(); self.most = max(self.most, self.loss.item())

class Offer(Sum):
    def state_dict(self): return dict(total=self.total, most=self.most)
    def load_state_dict(self, o): self.total,self.most = o['total'],o['most']

@pytest.mark.parametrize('kind', [Sum, Offer])
def test_two_callbacks_of_one_class(screen, tmp_path, kind):
    def two(): return [kind(), kind()]
    def more(cbs): cbs[1].after_batch = lambda: setattr(cbs[1], 'most', cbs[1].most+1); return cbs
    a,b = more(two()),more(two())
    fit(screen, tmp_path/'a', cbs=a)
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'b', cbs=[*more(two()), Stop(3)])
    fit(screen, tmp_path/'b', cbs=b)
    for x,y in zip(a, b): assert torch.equal(x.total, y.total) and x.most==y.most
    assert a[1].most==8 and a[0].most<8

def test_what_callbacks_know_goes_back(screen, tmp_path):
    a,b = Sum(),Sum()
    fit(screen, tmp_path/'a', cbs=[a, Spoil('gradient', nan, 3)], save_every=1000)
    fit(screen, tmp_path/'b', cbs=[b, Spoil('gradient', nan, 3)], save_every=0)
    assert torch.equal(a.total, b.total) and a.most==b.most

def test_what_cannot_be_kept_is_said(screen, tmp_path, capsys):
    class Teacher(Callback):
        def __init__(self): self.net = torch.nn.Linear(2, 2)
    fit(screen, tmp_path/'run', cbs=Teacher())
    said = capsys.readouterr().out
    assert 'teacher.net' in said and 'state_dict' in said

# One process at a time

def test_a_second_process_hears_who_has_the_folder(screen, tmp_path):
    with locked(tmp_path/'run', 'training'):
        before = files(tmp_path/'run')
        with pytest.raises(BlockingIOError, match=r'in use by process \d+ on .*training'): fit(screen, tmp_path/'run', resume=False)
    assert files(tmp_path/'run').keys()==before.keys()
