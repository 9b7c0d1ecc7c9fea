"What a step needs, how a batch is cut to fit, and what is said when memory runs out"
import math, pytest, torch
from torch import distributed as dist
from dataclasses import replace
from torch import nn
from fastai.callback.core import Callback
from fastcore.test import expect_fail
from cellmae.blocks import compile_blocks
from cellmae.classifier import Classifier
from cellmae.data import screen_dls
from cellmae.device import MemoryRanOut
from cellmae.embed import embed
from cellmae.imagenet import ImageNetEncoder
from cellmae.learner import mae_learner
from cellmae.scale import _how, fit_parts, needs, plan
from cellmae.wsl import fit_wsl
from cellmae.zoo import cost, create_model
import cellmae.scale as scale
from processes import all_well
from test_border_training import Stop, fit, make_screen, same, tiny, weights, wsl

def out_of_memory(): return torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')

@pytest.fixture(scope='module')
def screen(tmp_path_factory): return make_screen(tmp_path_factory.mktemp('screen'))

def light():
    "A model whose images weigh more than its weights"
    torch.manual_seed(0)
    return create_model('mae_vitt8', in_chans=2, img_size=32, depth=2, embed_dim=24, decoder=dict(embed_dim=16, depth=1))

def made(screen, out, model=None, bs=8, **kwargs):
    dls = screen_dls(screen, 32, bs, valid=0., device='cpu', **kwargs)
    return mae_learner(dls, model or light(), out/'run', {}, n_pictures=0)

def room_for(learn, n, devices=1):
    "Free memory, in GB, that a part of `n` images asks for"
    need = needs(learn.model, 32, replace(_how(learn), devices=devices), in_chans=2)
    return (need.gb(n)-need.weights/2**30)/.65+1e-9

def room(monkeypatch, gb): monkeypatch.setattr(scale, 'free_memory', lambda device: gb)

# Parts

@pytest.mark.parametrize('n,parts', [(1000,1), (8,1), (4,2)])
def test_as_many_parts_as_memory_asks_for(screen, tmp_path, capsys, n, parts):
    learn = made(screen, tmp_path)
    assert fit_parts(learn, room_for(learn, n)) == parts
    said = capsys.readouterr().out
    assert (f'in {parts} parts of {math.ceil(8/parts)}, as' in said) if parts>1 else not said

def test_one_image_too_many_is_refused_with_the_cure(screen, tmp_path):
    with expect_fail(MemoryError, contains='recompute=True'): fit_parts(made(screen, tmp_path), 1e-6)

@pytest.mark.parametrize('most', [8,3,1,0])
def test_a_trial_doubles_the_parts_until_a_step_runs_through(screen, tmp_path, monkeypatch, most):
    learn = made(screen, tmp_path)
    forward = learn.model.forward
    def tight(x, *args):
        if len(x)>most: raise out_of_memory()
        return forward(x, *args)
    monkeypatch.setattr(learn.model, 'forward', tight)
    parts = scale._tried(learn, 1)
    assert parts is None if most==0 else math.ceil(8/parts)<=most and (parts==1 or math.ceil(16/parts)>most)
    assert [p.grad for p in learn.model.parameters() if p.grad is not None] == []

def test_nothing_stays_of_a_trial(screen, tmp_path):
    learn = made(screen, tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    for p in learn.model.parameters(): p.grad = torch.ones_like(p)
    state = lambda: [*learn.model.state_dict().values(), *(p.grad for p in learn.model.parameters()), torch.get_rng_state(),
                     *(v for s in learn.opt.state_dict()['state'].values() for v in s.values() if torch.is_tensor(v))]
    before = [t.clone() for t in state()]
    scale._trial(learn, 3)
    assert all(torch.equal(a, b) for a,b in zip(before, state(), strict=True))

def test_a_trial_takes_all_channels(screen, tmp_path, monkeypatch):
    learn = made(screen, tmp_path, create_model('camae_vitt8_shared', in_chans=2, img_size=32, depth=1, embed_dim=48, few_channels=1))
    monkeypatch.setattr(type(learn.model), 'some_channels', lambda *_: pytest.fail('channels were drawn'))
    scale._trial(learn, 2)
    assert learn.model.few_channels==1

def test_batch_norm_has_two_images_in_every_part_that_is_tried(screen, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(scale, '_trial', lambda learn, n: tried.append(n) or (_ for _ in ()).throw(out_of_memory()))
    for model,crops,sizes in [(Own(),1,[8,4,2]), (Own(),2,[8,4,2]), (tiny(),1,[8,4,2,1]), (tiny(),2,[8,4,2,1])]:
        assert scale._tried(made(screen, tmp_path, model, crops=crops), 1) is None
        assert tried==sizes; tried.clear()

# A run that goes on

def test_a_run_goes_on_in_the_parts_it_had(screen, tmp_path, monkeypatch):
    learn = made(screen, tmp_path)
    tight,free = room_for(learn, 2),room_for(learn, 1000)
    go = lambda out, **more: fit(screen, tmp_path/out, light(), valid=0., bs=8, **more)
    room(monkeypatch, tight)
    whole = go('whole')
    with pytest.raises(KeyboardInterrupt): go('a', cbs=Stop(1))
    room(monkeypatch, free)
    again = go('a')
    assert again.accumulate==whole.accumulate==4 and same(weights(again), weights(whole))
    assert go('b').accumulate==1
    with pytest.raises(KeyboardInterrupt): go('c', cbs=Stop(1))
    room(monkeypatch, tight)
    assert go('c').accumulate==4, 'what fitted no longer does'
    with pytest.raises(KeyboardInterrupt): go('d', cbs=Stop(1))
    assert go('d', accumulate=2).accumulate==2, 'as asked for'

def agree_in(rooms, rank):
    "What two processes of different room make of a learner that was there before"
    dist.init_process_group('gloo', rank=rank, world_size=2)
    print('parts', fit_parts(agree_in.learn, rooms[rank]))

def test_processes_agree_on_the_parts_of_the_one_that_needs_most(screen, tmp_path):
    learn = made(screen, tmp_path)
    wide,tight = room_for(learn, 1000, 2),room_for(learn, 2, 2)
    agree_in.learn = learn
    said = all_well(2, agree_in, (wide,tight))
    assert 'in 2 parts of 2 by each of 2 processes' in said[0], said
    assert all('parts 2' in s for s in said) and 'in 2 parts' not in said[1]

# Running out

@pytest.mark.parametrize('error', [out_of_memory(), RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED'),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError()])
def test_running_out_in_the_run_says_where_and_what_to_do(screen, tmp_path, monkeypatch, error):
    learn = made(screen, tmp_path)
    def fail(x, *args): raise error
    monkeypatch.setattr(learn.model, 'forward', fail)
    with pytest.raises(MemoryRanOut) as e:
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    for words in ('epoch 1, step 1', 'of 2 x 32 x 32', 'accumulate=2', 'recompute=True', 'crop'): assert words in str(e.value)

class Full(Callback):
    def before_batch(self): raise out_of_memory()

def test_running_out_in_a_classifier_says_so_too(screen, tmp_path):
    with pytest.raises(MemoryRanOut) as e: fit_wsl(screen, out=tmp_path/'run', cbs=Full(), **wsl)
    for words in ('training, epoch 1, step 1', 'of 2 x 32 x 32', 'accumulate=2'): assert words in str(e.value)

@pytest.mark.parametrize('bs,cure', [(4,'`bs=2`'), (1,'a smaller `size`')])
def test_running_out_in_embedding_says_what_to_change(screen, bs, cure):
    def encoder(x): raise out_of_memory()
    with pytest.raises(MemoryRanOut) as e: embed(encoder, screen, size=32, bs=bs, progress=False)
    for words in (f'embedding, a batch of {bs} images of 2 x 32 x 32', cure): assert words in str(e.value)

# Plans

def test_options_change_memory_as_they_should():
    at = dict(bs=256, crop=32, depth=1, memory_gb=100)
    gb = lambda **kw: plan('mae_vitt8', 1000, **at, **kw).memory_gb.iloc[0]
    assert gb(recompute=True)<.8*gb()<gb()<gb(ema=.9)
    assert gb(bf16=False)>gb()
    two = plan('mae_vitt8', 1000, **at, devices=2).iloc[0]
    assert (two.bs, two.steps, two.accumulate) == (128, 4, 1)

def test_what_does_not_fit_is_told_what_to_change():
    advice = lambda **kw: plan('mae_vitl16', 1000, depth=1, crop=32, **kw).advice.iloc[0]
    assert 'shard=True' in advice(memory_gb=.4, devices=8)
    assert 'larger card' in advice(memory_gb=.05)
    assert advice(memory_gb=80, devices=8) == ''

class Own(nn.Module):
    "A user's network"
    in_chans = 2
    def __init__(self):
        super().__init__()
        self.conv,self.norm = nn.Conv2d(2, 4, 3),nn.BatchNorm2d(4)
    def forward(self, x): return self.norm(self.conv(x.float()/255)).mean((1,2,3))

size = dict(in_chans=2, img_size=32)
def backbone(): return ImageNetEncoder('densenet121', **size, pretrained=False, growth_rate=4, block_config=(1,1))
kinds = dict(mae=tiny, camae=lambda: create_model('camae_vitt8_shared', **size, depth=1, embed_dim=48, few_channels=1),
             munet=lambda: create_model('munet_m', **size, widths=(8,16), depth=1), own=Own, imagenet=backbone,
             classifier=lambda: Classifier(backbone(), 3))

def trained(m):
    "After a step"
    opt,out = torch.optim.AdamW(m.parameters()),m.train()(torch.randint(0, 256, (4,2,32,32), dtype=torch.uint8))
    scale._loss(out).backward()
    opt.step()

@pytest.mark.parametrize('kind', kinds)
def test_a_module_costs_the_same_whatever_was_done_with_it(kind):
    model = kinds[kind]()
    new,state = cost(model, 32),{k: v.clone() for k,v in model.state_dict().items()}
    assert new['encoder']>0 and (new['embed']>0 if kind!='own' else new['train']>0)
    assert all(torch.equal(v, state[k]) for k,v in model.state_dict().items()), 'the model itself is as it was'
    if kind!='imagenet': trained(model)
    assert str(cost(model, 32))==str(new)
    if kind in ('mae','camae'):
        compile_blocks(model); assert str(cost(model, 32))==str(new)
        model.bfloat16(); assert cost(model, 32)['train']==new['train']
    assert str(cost(model.to('meta'), 32)['encoder'])==str(new['encoder'])
