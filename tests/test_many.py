"One model trained in many processes is that of one: its steps, its validation, its end"
import os, signal, sys, time, warnings
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from tifffile import imwrite
from cellmae.learner import NumbersOnly, whole
from cellmae.many_gpus import Together
from cellmae.screen import Screen
from cellmae.train import fit_mae
from cellmae.wsl import fit_wsl
from cellmae.zoo import create_model, load_model
from processes import all_well, ended, in_processes

N = 22 # wells, of which 17 are trained on: batches of 6, 6 and 5
kw = dict(epochs=2, bs=6, crop=32, valid=.25, n_pictures=1, device='cpu', bf16=False, num_workers=0)

def make_screen(root, n=N):
    g = np.random.default_rng(0)
    root.mkdir(parents=True)
    for i in range(n):
        imwrite(root/f'{i}.tif', g.integers(100, 500+150*i, (2,40,40)).astype('u2'), photometric='minisblack')
    t = pd.DataFrame(dict(plate=[f'P{i%2}' for i in range(n)], well=[f'A{i+1:02d}' for i in range(n)],
                          perturbation=['DMSO','TP53']*(n//2), file=[f'{i}.tif' for i in range(n)]))
    s = Screen(t, ['DNA','ER'], root)
    s.fit_ranges()
    return s

@pytest.fixture(scope='module')
def screen(tmp_path_factory): return make_screen(tmp_path_factory.mktemp('many')/'s')

def tiny(seed=0):
    torch.manual_seed(seed)
    return create_model('mae_vitt8', in_chans=2, img_size=32, depth=1, embed_dim=48)

class Plain(Callback):
    "Steps along the gradient, so that weights differ as little as gradients do"
    def after_create(self): self.learn.opt_func,self.learn.lr = partial(NumbersOnly, opt=torch.optim.SGD, weight_decay=0.),.5

class Keep(Callback):
    "Losses, rates and gradients of steps, and the images of each"
    order = 95
    def before_fit(self): self.losses,self.sites,self.grads = [],[],[]
    def before_step(self):
        if self.learn.training: self.grads.append(torch.cat([whole(p.grad).flatten() for p in self.model.parameters() if p.requires_grad]))
    def after_batch(self):
        if not self.training: return
        self.losses.append(float(self.loss)); self.sites.append(self.yb[0].tolist())

def left(learn, keep, out, rank):
    state = {k:v.clone() for k,v in learn.model.state_dict().items()}
    torch.save(dict(weights=state, losses=keep.losses, images=keep.sites, grads=torch.stack(keep.grads), 
                    values=[list(r) for r in learn.recorder.values]), out/f'{rank}.pth')

def train(screen, out, how, rank=0):
    "A run, and what it leaves in this process"
    cbs = [*([Plain()] if how.get('plain', True) else []), keep:=Keep(), *[o() for o in how.get('cbs', [])]]
    fit = how.get('fit', fit_mae)
    torch.manual_seed(rank) # what a process draws by itself is its own
    learn = fit(screen, how['model']() if 'model' in how else tiny(), out/'run', cbs=cbs, **{**kw, **how.get('kw', {})})
    left(learn, keep, out, rank)

def trained(screen, out, n, **how):
    "What a run of `n` processes leaves in each"
    out.mkdir(parents=True, exist_ok=True)
    all_well(n, train, screen, out, how)
    return [torch.load(out/f'{r}.pth') for r in range(n)]

@pytest.fixture(scope='module')
def alone(screen, tmp_path_factory):
    out = tmp_path_factory.mktemp('alone')
    train(screen, out, {})
    return torch.load(out/'0.pth'),out/'run'

def close(a, b, tol=2e-6): return all(torch.allclose(a[k].double(), b[k].double(), rtol=0, atol=tol) for k in a)
def history(out): return pd.read_csv(out/'history.csv')
def alike(a, b): return all((a['weights'][k]==b['weights'][k]).all() for k in a['weights'])

@pytest.mark.parametrize('n,parts', [(1,2), (1,4), (2,1), (2,2), (3,1), (4,1), (7,2)])
def test_steps_are_those_of_one_process(screen, alone, tmp_path, n, parts):
    "Also with fewer images in a batch than processes, and as many images as there are in each step"
    want,folder = alone
    got = trained(screen, tmp_path, n, kw=dict(accumulate=parts))
    moved = max((v-tiny().state_dict()[k]).abs().max() for k,v in want['weights'].items())
    assert moved>1e-2 and all(close(want['weights'], o['weights']) for o in got)
    np.testing.assert_allclose(got[0]['losses'], want['losses'], rtol=1e-5)
    np.testing.assert_allclose(got[0]['grads'], want['grads'], atol=1e-5)
    assert all(alike(got[0], o) and o['losses']==got[0]['losses'] for o in got), 'to the last bit in all'
    for step,whole in enumerate(want['images']):
        assert sum([o['images'][step] for o in got if len(whole)>=n], [])==(whole if len(whole)>=n else [])
    np.testing.assert_allclose(history(tmp_path/'run'), history(folder), rtol=1e-5)
    assert (tmp_path/'run/reconstructions/epoch_002.png').exists()

def test_lion_goes_the_same_way(screen, tmp_path):
    "Signs of gradients that are nearly nothing may differ"
    one,two = (trained(screen, tmp_path/str(n), n, plain=False, kw=dict(lr=1e-4))[0] for n in (1,2))
    np.testing.assert_allclose(one['losses'], two['losses'], rtol=1e-4)
    a,b = (torch.cat([v.flatten() for v in o['weights'].values()]) for o in (one,two))
    assert ((a-b).abs()>1e-6).float().mean()<.01

# --- weights that are split

def test_split_weights_learn_the_same(screen, alone, tmp_path):
    "With parts, pictures and validation; the bundle is whole"
    want,folder = alone
    got = trained(screen, tmp_path, 2, kw=dict(shard=True, accumulate=2))
    assert all(close(want['weights'], o['weights'], 1e-5) for o in got) and alike(*got)
    np.testing.assert_allclose(got[0]['losses'], want['losses'], rtol=1e-5)
    np.testing.assert_allclose(history(tmp_path/'run'), history(folder), rtol=1e-5)
    assert close(load_model(tmp_path/'run/model').state_dict(), want['weights'], 1e-5)
    assert (tmp_path/'run/reconstructions/epoch_002.png').exists()

class Quits(Callback):
    "End all processes before a step of training"
    at,order = 4,99
    def before_batch(self):
        if self.training and self.train_iter==self.at: raise KeyboardInterrupt

def leave(screen, out, how, rank):
    try: train(screen, out, {**how, 'cbs':[Quits]}, rank)
    except KeyboardInterrupt: os._exit(0)

@pytest.mark.parametrize('before,after', [((2,False),(1,False)), ((1,False),(3,False)), ((3,False),(2,False)), ((2,True),(1,False)), ((1,False),(2,True))])
def test_a_run_goes_on_in_other_processes(screen, tmp_path, before, after):
    "In the middle of an epoch, also if weights are split no more, or now"
    how = lambda n, shard: dict(plain=False, kw=dict(save_every=0, lr=1e-4, shard=shard))
    whole = trained(screen, tmp_path/'whole', 1, **how(1, False))[0]
    (tmp_path/'o').mkdir()
    all_well(before[0], leave, screen, tmp_path/'o', how(*before))
    assert not (tmp_path/'o/run/model').exists()
    got = trained(screen, tmp_path/'o', after[0], **how(*after))[0]
    assert len(got['losses'])==2, 'only the steps that were left'
    np.testing.assert_allclose(got['losses'], whole['losses'][4:], rtol=1e-4)
    np.testing.assert_allclose(history(tmp_path/'o/run'), history(tmp_path/'whole/run'), rtol=1e-4)

# --- one that ends

def dying(where, how, who):
    "A callback that ends process `who` at some moment"
    def end(self):
        if int(os.environ['RANK'])!=who or where!='after_epoch' and self.learn.train_iter<2: return
        if how=='kill': os.kill(os.getpid(), signal.SIGKILL)
        if how=='exit': sys.exit(3)
        raise ValueError('no such luck')
    return type('Dies', (Callback,), {where:end, 'order':99})

def left_in_seconds(n, f, *args):
    "Exit codes, and what was said; none may take long"
    start = time.monotonic()
    codes,said = ended(*in_processes(n, f, *args), 40)
    return codes,said,time.monotonic()-start

@pytest.mark.parametrize('n,who,how,where', [(2,1,'kill','before_batch'), (2,0,'kill','after_backward'), (3,2,'raise','before_step'), (3,1,'kill','before_validate'),
                                             (2,1,'exit','before_batch'), (2,0,'raise','after_epoch'), (3,0,'kill','before_validate')])
def test_one_that_ends_ends_all_and_is_named(screen, tmp_path, n, who, how, where):
    codes,said,took = left_in_seconds(n, train, screen, tmp_path, dict(cbs=[dying(where, how, who)]))
    assert all(codes) and took<30, (codes, took)
    for k,o in enumerate(said):
        if k!=who: assert f'Process {who} of {n} ended' in o, o
    assert not (tmp_path/'run/model').exists()
    got = trained(screen, tmp_path, 2)
    assert (tmp_path/'run/model').exists() and alike(*got)

def fails_early(screen, out, rank):
    "A process that cannot open its images"
    if rank==1: screen = out/'nowhere'
    fit_mae(screen, tiny(), out/'run', **kw)

def test_a_process_that_fails_before_the_first_step_ends_all(screen, tmp_path):
    codes,said,took = left_in_seconds(3, fails_early, screen, tmp_path)
    assert all(codes) and took<20 and 'Process 1 of 3 ended' in said[0]

def full_disk(screen, out, rank):
    "The first one cannot write the model"
    import cellmae.train
    def fails(*args, **kwargs): raise OSError(28, 'No space left on device')
    cellmae.train.save_model = fails
    train(screen, out, {}, rank)

def test_the_first_fails_to_write_and_all_end(screen, tmp_path):
    codes,said,took = left_in_seconds(2, full_disk, screen, tmp_path)
    assert all(codes) and took<20 and 'Process 0 of 2 ended: OSError' in said[1] and 'No space left' in said[0]
