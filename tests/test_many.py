"One model trained in many processes is that of one: its steps, its validation, its end"
import os, re, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
from shutil import which
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.torch_core import num_distrib, rank_distrib
from tifffile import imwrite
import cellmae.learner, cellmae.train
from cellmae.imagenet import ImageNetEncoder
from cellmae.learner import NumbersOnly, whole
from cellmae.many_gpus import know_slurm
from cellmae.screen import Screen
from cellmae.train import fit_mae
from cellmae.wsl import fit_wsl
from cellmae.zoo import create_model, load_model
from processes import all_well, ended, in_processes

N = 22 # wells, of which 17 are trained on: batches of 6, 6 and 5
kw = dict(epochs=2, bs=6, crop=32, valid=.25, device='cpu', bf16=False, num_workers=0)

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

def tiny():
    torch.manual_seed(0)
    return create_model('mae_vitt8', in_chans=2, img_size=32, depth=1, embed_dim=48)

class Plain(Callback):
    "Steps along the gradient, so that weights differ as little as gradients do"
    def after_create(self): self.learn.opt_func,self.learn.lr = partial(NumbersOnly, opt=torch.optim.SGD, weight_decay=0.),.5

class Keep(Callback):
    "Losses and gradients of steps, and the images of each"
    order = 95
    def before_fit(self): self.losses,self.sites,self.grads = [],[],[]
    def before_step(self):
        if self.learn.training: self.grads.append(torch.cat([whole(p.grad).flatten() for p in self.model.parameters() if p.requires_grad]))
    def after_batch(self):
        if not self.training or not len(self.yb): return
        self.losses.append(float(self.loss)); self.sites.append(self.yb[0].tolist())

def left(learn, keep, out, rank):
    state = {k:v.clone() for k,v in learn.model.state_dict().items()}
    torch.save(dict(weights=state, losses=keep.losses, images=keep.sites, grads=torch.stack(keep.grads), 
                    skipped=learn.guard.skipped), out/f'{rank}.pth')

def train(screen, out, how, rank=0):
    "A run, and what it leaves in this process"
    cbs = [*([Plain()] if how.get('plain', True) else []), keep:=Keep(), *[o() for o in how.get('cbs', [])]]
    torch.manual_seed(rank) # what a process draws by itself is its own
    learn = how.get('fit', partial(fit_mae, n_pictures=0))(screen, how.get('model', tiny)(), out/'run', cbs=cbs, **{**kw, **how.get('kw', {})})
    left(learn, keep, out, rank)

def trained(screen, out, n, **how):
    "What a run of `n` processes leaves in each"
    out.mkdir(parents=True, exist_ok=True)
    all_well(n, train, screen, out, how)
    return [torch.load(out/f'{r}.pth') for r in range(n)]

@pytest.fixture(scope='module', autouse=True)
def alone(screen, tmp_path_factory):
    "In this process, so that those to come are warm"
    out = tmp_path_factory.mktemp('alone')
    train(screen, out, {})
    return torch.load(out/'0.pth'),out/'run'

def close(a, b, tol=2e-6): return all(torch.allclose(a[k].double(), b[k].double(), rtol=0, atol=tol) for k in a)
def history(out): return pd.read_csv(out/'history.csv')
def alike(a, b): return a['losses']==b['losses'] and all((a['weights'][k]==b['weights'][k]).all() for k in a['weights'])

@pytest.mark.parametrize('n,parts', [(1,4), (2,2), (3,1), (7,1)])
def test_steps_are_those_of_one_process(screen, alone, tmp_path, n, parts):
    "Also with fewer images in a batch than processes, and as many images as there are in each step"
    want,folder = alone
    got = trained(screen, tmp_path, n, kw=dict(accumulate=parts))
    moved = max((v-tiny().state_dict()[k]).abs().max() for k,v in want['weights'].items())
    assert moved>1e-2 and all(close(want['weights'], o['weights']) for o in got)
    np.testing.assert_allclose(got[0]['losses'], want['losses'], rtol=1e-5)
    np.testing.assert_allclose(got[0]['grads'], want['grads'], atol=1e-5)
    assert all(alike(got[0], o) for o in got), 'to the last bit in all'
    for step,whole in enumerate(want['images']):
        assert sum([o['images'][step] for o in got if len(whole)>=n], [])==(whole if len(whole)>=n else [])
    np.testing.assert_allclose(history(tmp_path/'run'), history(folder), rtol=1e-5)

def test_split_weights_learn_the_same(screen, alone, tmp_path):
    "With parts, pictures and validation; the bundle is whole"
    want,folder = alone
    got = trained(screen, tmp_path, 2, kw=dict(shard=True, accumulate=2, n_pictures=1))
    assert all(close(want['weights'], o['weights'], 1e-5) for o in got) and alike(*got)
    np.testing.assert_allclose(got[0]['losses'], want['losses'], rtol=1e-5)
    np.testing.assert_allclose(history(tmp_path/'run'), history(folder), rtol=1e-5)
    assert close(load_model(tmp_path/'run/model').state_dict(), want['weights'], 1e-5)
    assert (tmp_path/'run/reconstructions/epoch_002.png').exists()

# --- options together

class Poison(Callback):
    "Spoil the loss of a step in the last part of the last process"
    def after_loss(self):
        last = rank_distrib()==max(1, num_distrib())-1
        if not (self.training and last and self.part.last and self.train_iter==3): return
        self.learn.loss_grad,self.learn.loss = (o*float('nan') for o in (self.loss_grad,self.loss))

def dense():
    torch.manual_seed(0)
    return ImageNetEncoder('densenet121', in_chans=2, img_size=32, pretrained=False, growth_rate=4, block_config=(1,1))

long = dict(ema=.9, watch=True, n_watch=1, num_workers=2)
in_all = dict(mae=dict(kw=long), wsl=dict(fit=fit_wsl, model=dense, plain=False, kw=dict(long, bs=9, lr=1e-3, apart=None)), shard=dict(kw=dict(shard=True)))

@pytest.mark.parametrize('kind', in_all)
def test_a_batch_that_spoils_one_process_is_left_out_in_all(screen, tmp_path, kind):
    "With an average, wells that are watched, parts, threads that read"
    how,out = in_all[kind],tmp_path/'two'
    options = dict(how, cbs=[Poison])
    train(screen, tmp_path, dict(options, kw=dict(how['kw'], accumulate=4, shard=False)))
    one = torch.load(tmp_path/'0.pth')
    out.mkdir()
    said = all_well(2, train, screen, out, dict(options, kw=dict(how['kw'], accumulate=2)))
    two = [torch.load(out/f'{r}.pth') for r in range(2)]
    assert [o.count('This batch is left out') for o in said]==[1,0], said
    assert alike(*two) and all([s['step'] for s in o['skipped']]==[3] for o in (one,*two))
    assert close(one['weights'], two[0]['weights'], 2e-4 if kind=='wsl' else 1e-5)
    np.testing.assert_allclose(history(out/'run'), history(tmp_path/'run'), rtol=5e-3)

def hurried(screen, out, how, rank):
    "The second process has a clock that runs far ahead"
    fast = SimpleNamespace(monotonic=lambda: (1+99*rank)*time.monotonic(), time=time.time)
    cellmae.learner.time = fast
    train(screen, out, how, rank)

def test_the_clock_of_the_first_counts(screen, tmp_path):
    start = time.monotonic()
    all_well(2, hurried, screen, tmp_path, dict(kw=dict(epochs=None, seconds=1.5)))
    got = [torch.load(tmp_path/f'{r}.pth') for r in range(2)]
    assert alike(*got) and len(got[0]['losses']) and time.monotonic()-start>1.5

# --- stopped

def quits(step):
    "End all processes before a step of training"
    def before_batch(self):
        if self.training and self.train_iter==step: raise KeyboardInterrupt
    return type('Quits', (Callback,), dict(before_batch=before_batch, order=99))

def leave(screen, out, how, rank):
    try: train(screen, out, how, rank)
    except KeyboardInterrupt: os._exit(0)

def damage(f):
    with open(f, 'r+b') as o: o.seek(f.stat().st_size//2); o.write(b'damaged')

def test_a_run_goes_on_in_other_processes(screen, tmp_path):
    "Step by step, split or not; once from the checkpoint before"
    how = lambda split=False, **more: dict(plain=False, kw=dict(save_every=0, lr=1e-4, shard=split), **more)
    want, = trained(screen, tmp_path/'whole', 1, **how())
    (tmp_path/'o').mkdir()
    for step,(n,split) in enumerate([(1,False), (3,False), (2,True), (2,True), (2,False)], 1):
        said = all_well(n, leave, screen, tmp_path/'o', how(split, cbs=[quits(step)]))
        assert not (tmp_path/'o/run/model').exists() and not any('damaged' in o for o in said)
    damage(tmp_path/'o/run/checkpoint.pth')
    said = all_well(2, train, screen, tmp_path/'o', how())
    got = [torch.load(tmp_path/f'o/{r}.pth') for r in range(2)]
    assert alike(*got) and ['damaged' in o for o in said]==[True,False]
    np.testing.assert_allclose(got[0]['losses'], want['losses'][4:], rtol=1e-4)
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
    "What was said by processes all of which ended by themselves, and soon"
    start = time.monotonic()
    codes,said = ended(*in_processes(n, f, *args), 40)
    assert all(codes) and time.monotonic()-start<30, (codes,said)
    return said

@pytest.mark.parametrize('n,who,how,where', [(2,0,'kill','after_backward'), (3,1,'kill','before_validate'), (3,2,'raise','before_step'),
                                             (2,1,'exit','before_batch'), (2,0,'raise','after_epoch')])
def test_one_that_ends_ends_all_and_is_named(screen, alone, tmp_path, n, who, how, where):
    said = left_in_seconds(n, train, screen, tmp_path, dict(cbs=[dying(where, how, who)]))
    for k,o in enumerate(said):
        if k!=who: assert f'Process {who} of {n} ended' in o, o
    assert not (tmp_path/'run/model').exists()
    train(screen, tmp_path, {})
    assert close(load_model(tmp_path/'run/model').state_dict(), alone[0]['weights'], 1e-5)

def cannot_open(screen, out, rank):
    "A process that does not find its images"
    fit_mae(out/'nowhere' if rank==1 else screen, tiny(), out/'run', **kw)

def cannot_write(screen, out, rank):
    "The first one fails to write the model"
    def fails(*args, **kwargs): raise OSError(28, 'No space left on device')
    cellmae.train.save_model = fails
    train(screen, out, {}, rank)

class Ruins(Poison):
    "Spoil a step, and the way back"
    def after_loss(self):
        if self.training and self.train_iter==3 and not rank_distrib():
            for f in (self.learn.checkpoint.file,self.learn.checkpoint.old): damage(f)
        super().after_loss()

def cannot_go_back(screen, out, rank):
    train(screen, out, dict(cbs=[Ruins], kw=dict(save_every=0)), rank)

@pytest.mark.parametrize('n,f,who,says', [(3,cannot_open,1,''), (2,cannot_write,0,'OSError.*No space left'),
                                          (2,cannot_go_back,0,'ValueError.*checkpoint.pth is damaged.*resume=False')])
def test_one_that_fails_ends_all_in_words(screen, tmp_path, n, f, who, says):
    said = left_in_seconds(n, f, screen, tmp_path)
    for k,o in enumerate(said):
        if k!=who: assert re.search(f'Process {who} of {n} ended.*{says}', o), o

# --- started by a launcher

def test_torchrun_trains_one_model(screen, tmp_path):
    screen.save(screen.root)
    how = '--model mae_vitt8 --crop 32 --bs 6 --epochs 1 --workers 0'
    command = f'torchrun --standalone --nproc_per_node 2 {which("cellmae_fit")} {screen.root} {how} --out {tmp_path}/run'
    o = subprocess.run(command.split(), text=True, capture_output=True, env={**os.environ, 'PYTHONPATH':os.getcwd(), 'OMP_NUM_THREADS':'1'}, timeout=300)
    assert o.returncode==0, o.stderr
    assert [o.stdout.count(k) for k in ('epoch 1 of 1', 'Model: ')]==[1,1] and len(history(tmp_path/'run'))==1
    assert load_model(tmp_path/'run/model').provenance['steps']==4

slurm = dict(SLURM_JOB_ID='7', SLURM_STEP_ID='1', SLURM_STEP_NUM_TASKS='16', SLURM_STEP_NODELIST='gpu[03-05,9],b1', SLURM_PROCID='9', SLURM_LOCALID='1')

@pytest.mark.parametrize('nodes,first', [('gpu[03-05,9],b1','gpu03'), ('n1','n1'), ('n1,n2','n1'), ('rack-2-node[7,9]','rack-2-node7'), ('a[1-2].cluster.org','a1.cluster.org')])
def test_srun_is_understood(monkeypatch, nodes, first):
    monkeypatch.setattr(os, 'environ', {**slurm, 'SLURM_STEP_NODELIST':nodes})
    know_slurm()
    assert {k:os.environ[k] for k in ('WORLD_SIZE','RANK','LOCAL_RANK','MASTER_ADDR','MASTER_PORT')}==dict(
        WORLD_SIZE='16', RANK='9', LOCAL_RANK='1', MASTER_ADDR=first, MASTER_PORT='15708')

@pytest.mark.parametrize('other', [dict(SLURM_STEP_NUM_TASKS='1'), dict(SLURM_STEP_ID='4294967294'), dict(SLURM_PTY_PORT='4000'), dict(WORLD_SIZE='2', RANK='0')])
def test_a_shell_of_slurm_is_no_run_of_many(monkeypatch, other):
    monkeypatch.setattr(os, 'environ', env := {**slurm, **other})
    know_slurm()
    assert env=={**slurm, **other}
