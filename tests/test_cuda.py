"The same on a GPU as on a CPU: each check runs on both, against float64, bytes or an undisturbed run; `cuda:` lines say how close it came"
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.core import Callback

from cellmae.data import screen_dls
from cellmae.device import has_bf16
from cellmae.embed import embed
from cellmae.fourier import fourier_loss
from cellmae.synth import synth_screen
from cellmae.train import fit_mae
from cellmae.zoo import create_model

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
devices = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=no_gpu)])
MODELS = ['mae_vits16','camae_vits16','camae_vits16_shared']
named = pytest.mark.parametrize('name', MODELS)


@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    kw = dict(n_pathways=2, genes_per_pathway=2, n_inactive=1, n_batches=2, controls_per_batch=3, size=64)
    return synth_screen(tmp_path_factory.mktemp('cuda')/'screen', **kw, n_workers=0)

def say(device, text): print(f'\n{device}: {text}') # shown by `pytest -s`

def small(name, dtype=torch.float32, **kwargs):
    "A small model of fixed weights, and images and noise for it"
    torch.manual_seed(0)
    model = create_model(name, img_size=32, depth=2, drop_path=0., decoder=dict(embed_dim=64, depth=1, num_heads=4), **kwargs).to(dtype)
    x = torch.randint(0, 256, (4,6,32,32), dtype=torch.uint8)
    return model,x,torch.rand(4, model.tokens(x).shape[1])

def step(model, x, noise, bf16=False):
    "Loss and all gradients of a step, on the CPU in float64"
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): loss = model(x, noise).loss
    loss.backward()
    return loss.item(),torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])

def moved(device, model, *tensors): return model.to(device),*[t.to(device) for t in tensors]

def apart(a, b): return ((a-b).norm()/b.norm()).item()

def exact(name, alpha): return step(*small(name, torch.float64, alpha=alpha))

@devices
@named
@pytest.mark.parametrize('alpha', [0.,.01])
def test_step_is_that_of_float64(name, alpha, device):
    loss,grad = step(*moved(device, *small(name, alpha=alpha)))
    want,true = exact(name, alpha)
    say(device, f'{name} alpha {alpha}: loss {loss:.6f}, float64 {want:.6f}, gradients apart by {apart(grad, true):.1e}')
    assert loss==pytest.approx(want, rel=1e-5), f'loss {loss}, in float64 {want}'
    assert apart(grad, true)<1e-4, f'gradients are {apart(grad, true):.1e} apart from those in float64'

@devices
@named
def test_bf16_loss_is_near(name, device):
    loss,grad = step(*moved(device, *small(name, alpha=.01)), True)
    want,true = exact(name, .01)
    say(device, f'{name} bf16: loss off by {abs(loss/want-1):.1e}, gradients by {apart(grad, true):.1e}')
    assert loss==pytest.approx(want, rel=5e-3), f'bf16 loss {loss}, in float64 {want}'
    assert 0<apart(grad, true)<.05, f'bf16 gradients are {apart(grad, true):.1e} apart from those in float64'

@devices
@pytest.mark.parametrize('channels', [1,6])
def test_fourier_loss_is_that_of_numpy(channels, device):
    a,b = torch.randn(2, 3, 5, 64*channels)
    planes = [t.double().numpy().reshape(3, 5, 8, 8, channels) for t in (a,b)]
    x,y = [np.abs(np.fft.fft2(t, axes=(2,3))) for t in planes]
    want = np.abs(x-y).mean((2,3,4))
    np.testing.assert_allclose(fourier_loss(a.to(device), b.to(device), 8).cpu(), want, rtol=1e-4)

@devices
@named
def test_embed_is_that_of_float64(name, device, screen):
    model = small(name)[0].to(device)
    got = embed(model, screen, size=32, progress=False, level='tile')
    twin = small(name, torch.float64)[0].eval()
    tiles = np.concatenate([screen[i].reshape(6, 2, 32, 2, 32).transpose(1,3,0,2,4).reshape(-1, 6, 32, 32) for i in range(len(screen))])
    with torch.inference_mode(): want = twin.encode(torch.from_numpy(tiles)).double()
    cos = torch.cosine_similarity(torch.from_numpy(got.X).double(), want).min().item()
    say(device, f'{name} embed: smallest cosine to float64 {cos:.6f}')
    assert got.X.dtype==np.float32 and cos>1-1e-3, f'smallest cosine to float64 is {cos}'

class Killed(Callback):
    "Stop before a step, as a signal would"
    order = 100
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.train_iter==self.at: raise KeyboardInterrupt

def fit(screen, out, device, **kw):
    "A run of some steps; weights and losses"
    learn = fit_mae(screen, small('mae_vits16')[0], out, epochs=2, bs=8, crop=32, device=device, save_every=0, n_pictures=0, **kw)
    return torch.cat([p.detach().flatten().double().cpu() for p in learn.model.parameters()]),learn

@devices
@pytest.mark.parametrize('bf16', [False,True])
def test_resumed_run_is_the_undisturbed_one(bf16, device, screen, tmp_path):
    "To the last bit on a CPU, and on a GPU where its sums are of one order; to 1e-3 of what was learned otherwise"
    start = torch.cat([p.detach().flatten().double() for p in small('mae_vits16')[0].parameters()])
    want,_ = fit(screen, tmp_path/'whole', device, bf16=bf16)
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'run', device, bf16=bf16, cbs=Killed(2))
    assert (tmp_path/'run/checkpoint.pth').exists()
    got,learn = fit(screen, tmp_path/'run', device, bf16=bf16)
    again,_ = fit(screen, tmp_path/'again', device, bf16=bf16)
    off,noise = ((o-want).norm()/(want-start).norm() for o in (got,again))
    say(device, f'resume, bf16 {bf16}: off by {off:.1e}, a second undisturbed run by {noise:.1e}')
    assert device=='cuda' or torch.equal(got, want), f'resumed weights are {off:.1e} apart'
    assert off<=max(1e-3, 10*noise), f'resumed weights are {off:.1e} apart, a second run {noise:.1e}'

@devices
def test_bf16_callback_computes_low_and_keeps_high(device, screen, tmp_path):
    seen = []
    class Look(Callback):
        def after_pred(self): seen.append((self.pred.pred.dtype, self.pred.latent.dtype, self.loss_func(self.pred, None).dtype))
    _,learn = fit(screen, tmp_path/'run', device, bf16=True, cbs=Look())
    assert seen[0][0]==torch.bfloat16 and seen[0][2]==torch.float32, f'prediction, latent and loss are {seen[0]}'
    assert {p.dtype for p in learn.model.parameters()}=={torch.float32}
    assert next(learn.model.parameters()).device.type==device

@devices
@pytest.mark.parametrize('num_workers', [0,2])
def test_batches_are_the_same_bytes(num_workers, device, screen):
    here,there = [list(screen_dls(screen, 32, 4, num_workers=n, device=d).train) for n,d in ((0,'cpu'),(num_workers,device))]
    assert len(here)==len(there)>2
    for (x,ids),(y,ids2) in zip(here, there):
        assert y.device.type==device and y.dtype==torch.uint8
        assert torch.equal(x, y.cpu()) and torch.equal(ids, ids2.cpu())

@devices
def test_pinned_batches_are_the_same_bytes(device, screen):
    plain,pinned = [screen_dls(screen, 32, 4, device=d).train for d in ('cpu',device)]
    pinned.fake_l.pin_memory = device=='cuda'
    for (x,_),(y,_) in zip(plain, pinned): assert torch.equal(x, y.cpu())

@devices
def test_bf16_is_chosen_where_it_is_built_in(device):
    flags = set(Path('/proc/cpuinfo').read_text().split())
    assert has_bf16(torch.device(device))==(device=='cuda' or bool(flags & {'amx_tile','avx512_bf16','bf16'}))
