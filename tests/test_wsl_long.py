"A classifier trained in parts: who computes them does not matter, and what batch norm and CutMix see is a part"
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from tifffile import imwrite
from torch import distributed as dist

from cellmae.classifier import batch_norms
from cellmae.imagenet import ImageNetEncoder
from cellmae.screen import Screen
from cellmae.wsl import fit_wsl
from cellmae.zoo import create_model, load_model
from processes import all_well

kw = dict(epochs=2, bs=8, crop=32, valid=.3, apart=None, lr=1e-3, device='cpu', bf16=False, num_workers=0)

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    root,g = tmp_path_factory.mktemp('wsl'),np.random.default_rng(0)
    for i in range(32): imwrite(root/f'{i}.tif', g.integers(100, 500+100*i, (2,40,40)).astype('u2'), photometric='minisblack')
    t = pd.DataFrame(dict(plate='P', well=[f'A{i+1:02d}' for i in range(32)], perturbation=['DMSO','TP53']*16, file=[f'{i}.tif' for i in range(32)]))
    s = Screen(t, ['DNA','ER'], root)
    s.fit_ranges()
    return s

def dense():
    torch.manual_seed(0)
    return ImageNetEncoder('densenet121', in_chans=2, img_size=32, pretrained=False, growth_rate=4, block_config=(1,1))

def mae():
    torch.manual_seed(0)
    return create_model('mae_vitt8', in_chans=2, img_size=32, depth=1, embed_dim=48)

class Seen(Callback):
    "What the network is shown in training, part by part"
    order = 50
    def before_fit(self): self.parts = []
    def after_pred(self):
        if self.training: self.parts.append((self.iter,self.learn.part,self.xb[0][self.learn.part.rows].clone(),self.learn.pred.logits.detach()))

def fit(screen, out, arch=dense, **more): return fit_wsl(screen, arch(), out, **{**kw, **more})

def left(learn):
    "Weights, what batch norm knows, losses, rows of history, and the average"
    losses = torch.stack([o.cpu() for o in learn.recorder.losses])
    return dict({f'model.{k}': v.clone() for k,v in learn.model.state_dict().items()}, losses=losses, rows=torch.tensor([list(map(float, r)) for r in learn.recorder.values]))

def together(n, screen, out, **more):
    "A run of `n` processes, and what it leaves in each"
    def process(rank):
        torch.save(left(fit(screen, out, **more)), out.with_suffix(f'.{rank}'))
        dist.barrier()
    all_well(n, process)
    return [torch.load(out.with_suffix(f'.{r}')) for r in range(n)]

def same(a, b, tol=0):
    "The largest difference is at most `tol`, where numbers of pieces of history may be nan"
    assert a.keys()==b.keys()
    for k in a: np.testing.assert_allclose(a[k].float(), b[k].float(), rtol=0, atol=tol, err_msg=k)
    return True

def differs(a, b): return max(float((a[k].float()-b[k].float()).abs().max()) for k in a if k.startswith('model'))

def test_processes_are_parts(screen, tmp_path):
    "Two processes with two parts each, and four, are one with four; one part is the batch"
    more = dict(bs=12, epochs=1)
    alone = left(fit(screen, tmp_path/'alone', accumulate=4, **more))
    many = together(2, screen, tmp_path/'many', accumulate=2, **more)+together(4, screen, tmp_path/'more', **more)
    assert same(many[0], many[1]) and same(many[2], many[5]) and same(many[0], alone, 2e-4) and same(many[2], alone, 2e-4)
    whole = left(fit(screen, tmp_path/'whole', **more))
    assert same(left(fit(screen, tmp_path/'one', accumulate=1, **more)), whole)
    assert differs(alone, whole) > 10*differs(alone, many[0]), 'batch norm sees parts, so the number of parts matters'
    assert all(torch.equal(v, alone[f'model.{k}']) for k,v in load_model(tmp_path/'alone/model').state_dict().items())

def test_parts_are_mixed_within(screen, tmp_path):
    plain,mixed = Seen(),Seen()
    fit(screen, tmp_path/'plain', cutmix=0., cbs=plain, accumulate=2, crops=2, epochs=1)
    fit(screen, tmp_path/'mixed', cbs=mixed, accumulate=2, crops=2, epochs=1)
    boxes = {}
    for (i,part,x,_),(_,_,y,_) in zip(plain.parts, mixed.parts, strict=True):
        changed = (x!=y).any(1) # (B,H,W)
        for image,where in zip(y, changed): # each is made of itself and of one image of its part
            assert any((image==torch.where(where, other, own)).all() for own in x for other in x)
        boxes.setdefault((i,len(y)), []).append(changed.any(0))
    boxes = {k:v for k,v in boxes.items() if len(v)==2}
    assert sum(bool(a.any()) for a,_ in boxes.values())>len(boxes)/2
    assert all((a|b).sum()<=1.3*max(a.sum(), b.sum()) for a,b in boxes.values()), 'the same rectangle in all parts of a step'

def test_running_statistics_are_the_mean_of_the_parts(screen, tmp_path):
    class Keeps(Callback):
        order = 49
        def before_batch(self):
            if self.training: self.learn.starts = getattr(self.learn, 'starts', [])+[self.now()]
        def now(self): return [(m.running_mean.clone(),m.running_var.clone()) for m in batch_norms(self.model)]
        def after_batch(self):
            if self.training: self.learn.ends = getattr(self.learn, 'ends', [])+[self.now()]
    inputs = []
    class Inputs(Callback):
        def before_fit(self): batch_norms(self.model)[0].register_forward_pre_hook(lambda m,x: inputs.append(x[0].detach()) if m.training and m.track_running_stats else None)
    learn = fit(screen, tmp_path/'run', cbs=[Keeps(),Inputs()], accumulate=3, epochs=1)
    m,k = batch_norms(learn.model)[0].momentum,0
    for (start,*_),(end,*_) in zip(learn.starts, learn.ends):
        some,k = inputs[k:k+3],k+3
        n = sum(map(len, some))
        mean = sum(len(x)/n*x.mean((0,2,3)) for x in some)
        var = sum(len(x)/n*x.var((0,2,3)) for x in some)
        torch.testing.assert_close(end[0], (1-m)*start[0]+m*mean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(end[1], (1-m)*start[1]+m*var, atol=1e-6, rtol=1e-5)
    assert k==len(inputs) and {int(m.num_batches_tracked) for m in batch_norms(learn.model)}=={len(learn.ends)}

class Stop(Callback):
    "An end in the middle of the second epoch"
    order,run_valid = 100,False
    def after_batch(self):
        if self.train_iter==len(self.dls.train)+1: raise KeyboardInterrupt

def test_a_stopped_run_goes_on_exactly(screen, tmp_path):
    more = dict(accumulate=2, ema=.9, save_every=0)
    learn = fit(screen, tmp_path/'whole', **more)
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'run', cbs=[Stop()], **more)
    again = fit(screen, tmp_path/'run', **more)
    assert same(left(learn), left(again))
    for name in ('model','last'):
        f = f'model/{name}.safetensors'
        assert (tmp_path/'whole'/f).read_bytes()==(tmp_path/'run'/f).read_bytes()
    average,last = (load_model(tmp_path/'run/model', average=o).state_dict() for o in (True,False))
    assert any((average[k]!=last[k]).any() for k in last)
    assert (tmp_path/'run/history.csv').read_text()==(tmp_path/'whole/history.csv').read_text()

def test_a_learner_that_was_stopped_can_go_on(screen, tmp_path):
    kept = []
    class Keep(Stop):
        def after_create(self): kept.append(self.learn)
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'run', cbs=[Keep()])
    learn, = kept
    learn.remove_cbs([o for o in learn.cbs if isinstance(o, Stop)])
    learn.fit(1)
    scores,classes = learn.get_preds()
    assert scores.shape==(len(learn.dls.valid.ids),2) and torch.isfinite(scores).all() and len(classes)==len(scores)

@pytest.mark.parametrize('more,says', [
    (dict(accumulate=5), r'[78] training images in 5 parts \(accumulate=5, processes=1\).*larger `bs`, or fewer parts'),
    (dict(bs=1), r'The batch of .* has 1 training images: one would be alone.*leave this site out'),
    (dict(bs=8, crops=2, accumulate=8), 'in 8 parts')])
def test_an_image_alone_is_refused_before_the_run(more, says, screen, tmp_path):
    with pytest.raises(ValueError, match=says): fit(screen, tmp_path/'run', **more)
    assert not (tmp_path/'run/checkpoint.pth').exists()

def test_watched_for_a_time_and_recomputed(screen, tmp_path):
    "Options of long runs together"
    learn = fit(screen, tmp_path/'run', mae, epochs=None, seconds=2, accumulate=2, recompute=True, watch=True, n_watch=1, tracker='tensorboard', ema=.9)
    history = pd.read_csv(tmp_path/'run/history.csv')
    assert len(history) and 'effective_rank' in history and list(tmp_path.glob('run/**/events*'))
    assert load_model(tmp_path/'run/model').provenance['ema']==.9
