"Energies of texture as a target: what they measure, and that they leave all else alone"
from functools import partial

import numpy as np
import pytest
import torch

from cellmae.blocks import set_recompute
from cellmae.cavit import CAMAE
from cellmae.fourier import band_energies, _bank
from cellmae.masking import part_of
from cellmae.munet import MUNet
from cellmae.scale import plan
from cellmae.train import fit_mae
from cellmae.vit import MAE
from cellmae.zoo import create_model, load_model, save_model
from processes import all_well
from test_border_training import kw, make_screen
from test_many import Plain

small = dict(img_size=32, patch_size=8, in_chans=3, embed_dim=48, depth=1, num_heads=2, init_values=.1, drop_path=0.)
decoders = dict(plain={}, multi=dict(kind='multi'), shared=dict(kind='shared'))

def make(kind, seed=0, **more):
    torch.manual_seed(seed)
    decoder = dict(embed_dim=32, depth=1, num_heads=4, **decoders[kind])
    return (MAE if kind=='plain' else CAMAE)(**small, decoder=decoder, **more)

def images(n=6, c=3, h=32, w=48): return torch.randint(0, 256, (n,c,h,w), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

every = pytest.mark.parametrize('kind,energies', [(k,e) for k in decoders for e in ('crop','patch')])

@pytest.mark.parametrize('p', [1, 2, 4, 7, 8, 16, 20])
def test_a_wave_lies_in_its_ring_wherever_it_runs(p):
    w = max(16, 2*p)
    at = torch.arange(8*w)*2*torch.pi/w
    rows,cols = torch.meshgrid(at, at, indexing='ij')
    for a,b in [(1,0), (0,2), (2,2), (3,4), (w//2,0), (w//2,w//2)]:
        x = torch.cos(a*rows+b*cols+(0 if w//2 in (a,b) else .7))[None,None]
        e = band_energies(x, p)[0,0].unflatten(0, (8*w//p,-1))
        inner = e[e.shape[0]//3:-e.shape[0]//3,e.shape[1]//3:-e.shape[1]//3].mean((0,1))
        assert inner.argmax()==min(6, int(7*np.log2(a*a+b*b)/np.log2(w*w/2)+1e-9)), (a,b)

def test_no_ring_is_empty_and_each_wave_is_in_one():
    for w in (16, 18, 32, 64):
        waves,rings = _bank(w, 7)
        assert ((rings>0).sum(0)==np.r_[0, np.ones(w*w-1)]).all() and np.allclose(rings.sum(1), 1)
    with pytest.raises(ValueError, match='16 rings are too many'): _bank(16, 16)

def test_one_image_is_measured_as_in_a_batch():
    x = torch.randn(5,3,40,64)
    torch.testing.assert_close(band_energies(x[2:3,1:2], 8), band_energies(x, 8)[2:3,1:2], rtol=0, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16): torch.testing.assert_close(band_energies(x, 8), band_energies(x.clone(), 8), rtol=0, atol=0)
    assert band_energies(x.bfloat16(), 8).dtype==torch.float32

@every
def test_without_a_share_nothing_changes_and_with_one_no_die_falls_otherwise(kind, energies):
    x,plain,asked = images(),make(kind),make(kind, energy=.4, energies=energies)
    after = [torch.manual_seed(1) and m(x) for m in (plain, asked)]
    assert all(torch.equal(w, asked.state_dict()[k]) for k,w in plain.state_dict().items())
    assert torch.equal(after[0].mask, after[1].mask) and torch.equal(after[0].pred, after[1].pred)
    assert torch.equal(after[0].parts['mse'], after[1].parts['mse']) and 'energy' not in after[0].parts
    torch.testing.assert_close(after[1].loss, .6*after[0].loss+.4*after[1].parts['energy'])
    asked.set_objective(energy=0.)
    assert asked.state_dict().keys()==plain.state_dict().keys() and torch.equal(asked(x, torch.ones(after[0].mask.shape)).loss, plain(x, torch.ones(after[0].mask.shape)).loss)

@every
@pytest.mark.parametrize('energy', [.3, 1.])
def test_parts_are_the_batch_and_the_encoder_learns(kind, energies, energy):
    x,whole,parts = images(7),*[make(kind, energy=energy, energies=energies) for _ in range(2)]
    torch.manual_seed(3); whole(x).loss.backward()
    for a,b in ((0,2), (2,3), (3,7)):
        torch.manual_seed(3)
        with part_of(7, a): (parts(x[a:b]).loss*(b-a)/7).backward()
    for (name,p),q in zip(whole.named_parameters(), parts.parameters()):
        assert (p.grad is None)==(q.grad is None), name
        if p.grad is not None: torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)
        if name.startswith('encoder') or 'energies' in name: assert p.grad.abs().sum()>0, name

@every
def test_with_other_options(kind, energies):
    "Masks, normalised pixels, half precision, a stain without signal, blocks computed twice, some channels"
    x = images()
    x[:,1] = 7
    own = dict(few_channels=1, masking='same') if kind!='plain' else dict(masking='block')
    m = make(kind, energy=.5, energies=energies, norm_pix=True, alpha=.1, **own)
    set_recompute(m)
    for _ in range(4):
        with torch.autocast('cpu', torch.bfloat16): out = m(x)
        out.loss.backward()
        assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in m.parameters())
    if kind=='shared': m.loss_mixed([*images(2), *images(2, 5)]).backward()

@every
def test_bundles_and_what_is_cut_off(kind, energies, tmp_path):
    m,x = make(kind, energy=.5, energies=energies).eval(),images(2)
    save_model(m, tmp_path/'m', channels=['a','b','c'])
    again = load_model(tmp_path/'m')
    noise = torch.rand(m.tokens(x).shape[:2])
    with torch.no_grad(): assert torch.equal(again(x, noise).loss, m(x, noise).loss)
    short = m.trim(1)
    assert short.config['energy']==0 and not [k for k in short.state_dict() if 'energies' in k]

def test_a_bundle_of_before_has_no_share():
    config = {k:v for k,v in make('plain').config.items() if k not in ('energy','energies')}
    assert MAE(**config).energy==0

def test_the_kind_can_be_changed_later():
    m = make('plain', energy=.5)
    m.set_objective(energies='patch')
    assert m.state_dict().keys()==make('plain', energy=.5, energies='patch').state_dict().keys()
    assert m(images()).loss.isfinite()

def test_refused():
    for wrong in (dict(energy=-.1), dict(energy=1.1), dict(energy='half'), dict(energies='site')):
        with pytest.raises(ValueError, match=f'{next(iter(wrong))} must be'): make('plain', **wrong)
    unet = MUNet(patch_size=8, in_chans=3, widths=(8,16), depth=1)
    with pytest.raises(ValueError, match='a U-Net has none'): unet.set_objective(energy=.5)
    assert unet(images()).loss.isfinite()
    with pytest.raises(TypeError, match="no argument 'energy'"): create_model('munet_m', energy=.5)

def test_planned():
    "A step is played with them, and without a decoder it needs less"
    need = [plan('mae_vitt8', 1000, memory_gb=8, in_chans=2, depth=1, energy=e).iloc[0] for e in (.5, 1.)]
    assert need[1].image_mb<need[0].image_mb

def tiny():
    torch.manual_seed(0)
    return create_model('mae_vitt8', in_chans=2, img_size=32, depth=1, embed_dim=48, energy=1.)

def trained(screen, out, rank=0, **more):
    learn = fit_mae(screen, tiny(), out, cbs=[Plain()], **{**kw, 'epochs':1, 'num_workers':0, **more})
    if not rank: torch.save(dict(learn.model.state_dict()), out/'weights.pth')
    return learn

def test_a_run_in_processes_and_parts_without_a_drawing(tmp_path):
    "Weights that nothing is learnt with do not keep processes waiting, and the history tells of energies"
    screen = make_screen(tmp_path/'s')
    screen.fit_ranges()
    learn = trained(screen, tmp_path/'one')
    assert learn.recorder.metric_names[-2]=='energy' and 0<learn.recorder.values[-1][-1]<9
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in tiny().state_dict().items() if k.startswith('decoder.blocks'))
    all_well(2, partial(trained, accumulate=2), screen, tmp_path/'two')
    one,two = (torch.load(tmp_path/d/'weights.pth') for d in ('one','two'))
    moved = max((v-tiny().state_dict()[k]).abs().max() for k,v in one.items())
    assert moved>1e-3 and all(torch.allclose(one[k], two[k], rtol=0, atol=1e-5) for k in one)
