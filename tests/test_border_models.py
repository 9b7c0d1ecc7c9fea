"What may be done to a model or asked of a picture: done, or refused in words, and nothing is left behind"
import copy, warnings

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from anndata import AnnData
from matplotlib.text import Text
from torch import nn
from torch.export import Dim, export

from cellmae.cavit import CAMAE
from cellmae.classifier import Classifier, batch_norms
from cellmae.imagenet import ImageNetEncoder, start_from
from cellmae.munet import MUNet
from cellmae.overview import plot_plate
from cellmae.plots import *
from cellmae.scale import plot_scaling
from cellmae.vit import MAE

sizes = dict(img_size=16, patch_size=4, in_chans=3, embed_dim=32, depth=2, num_heads=2)
decoder = dict(embed_dim=32, depth=1, num_heads=4)
models = dict(
    mae=lambda: MAE(**sizes, decoder=decoder),
    plain=lambda: MAE(**sizes, decoder=decoder, parallel=False, slowest=20, local=True),
    multi=lambda: CAMAE(**sizes, decoder=decoder),
    shared=lambda: CAMAE(**sizes, decoder=dict(decoder, kind='shared')),
    munet=lambda: MUNet(img_size=16, patch_size=4, in_chans=3, widths=(8,16), depth=1))

def make(kind):
    torch.manual_seed(0)
    return models[kind]().eval()

def images(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

# Positions are no weights: they are right whatever was done to these, in whatever order

def ghost(kind):
    with torch.device('meta'): return models[kind]().eval()

def by_parent(kind, state):
    box = nn.Sequential(ghost(kind)).to_empty(device='cpu')
    box.load_state_dict({f'0.{k}': v for k,v in state.items()})
    return box[0]

def load(model, state, **kwargs):
    model.load_state_dict(state, **kwargs)
    return model

births = dict(
    emptied=lambda k,s: load(ghost(k).to_empty(device='cpu'), s),
    assigned=lambda k,s: load(ghost(k), s, assign=True),
    assigned_and_moved=lambda k,s: load(ghost(k), s, assign=True).to('cpu'),
    emptied_twice=lambda k,s: load(load(ghost(k).to_empty(device='cpu'), s).to_empty(device='cpu'), s),
    copied=lambda k,s: load(copy.deepcopy(ghost(k)).to_empty(device='cpu'), s),
    sent_away=lambda k,s: load(make(k).to('meta').to_empty(device='cpu'), s),
    sent_away_and_assigned=lambda k,s: load(make(k).to('meta'), s, assign=True),
    through_half=lambda k,s: load(make(k).half().float(), s),
    within_another=by_parent)

@pytest.mark.parametrize('birth', births)
@pytest.mark.parametrize('kind', models)
@torch.no_grad()
def test_positions_follow_the_weights(kind, birth):
    model,x = make(kind),images(2,3,16,16)
    twin,noise = births[birth](kind, model.state_dict()).eval(),torch.rand(model.tokens(x).shape[:2])
    assert torch.equal(twin.encode(x), model.encode(x))
    assert torch.equal(twin(x, noise).pred, model(x, noise).pred)
    assert set(twin.state_dict()) == set(model.state_dict())

@pytest.mark.parametrize('kind', ['mae','multi','shared'])
def test_half_precision_of_positions(kind):
    assert {b.dtype for b in make(kind).bfloat16().buffers()} == {torch.bfloat16}

@torch.no_grad()
def test_positions_of_a_backbone():
    "A classifier throws the decoder of its backbone away"
    net,x = Classifier(make('mae'), 3).eval(),images(2,3,16,16)
    about = dict(model='MAE', args=net.backbone.config)
    with torch.device('meta'): twin = Classifier(about, 3).eval()
    twin.to_empty(device='cpu').load_state_dict(net.state_dict())
    assert torch.equal(twin.encode(x), net.encode(x))

def test_buffers_of_others_are_left_alone():
    class Mine(MAE):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.register_buffer('mine', torch.arange(5.), persistent=False)
    model = Mine(**sizes, decoder=decoder).half().float()
    assert torch.equal(model.mine, torch.arange(5.))

# Programs of a model

class Embedder(nn.Module):
    def __init__(self, model, **kwargs):
        super().__init__()
        self.model,self.kwargs = model,kwargs
    def forward(self, x): return self.model.encode(x, **self.kwargs)

class Drawer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x, noise): return self.model(x, noise).pred

def free(kind):
    "Which sides of the images may vary"
    own = {1: Dim('channels', max=16)} if kind in ('multi','shared') else {}
    return {0: Dim('batch'), 2: 4*Dim('rows'), 3: 4*Dim('columns'), **own}

def shapes(kind):
    channels = (3,6,1) if kind in ('multi','shared') else (3,3,3)
    return [(b,c,h,w) for b,c,(h,w) in zip((1,2,5), channels, ((16,16),(24,8),(8,24)))]

ways = [(k,False,torch.uint8) for k in models] + [('mae',False,torch.float32), ('shared',True,torch.float32)]

@pytest.mark.parametrize('kind,strict,dtype', ways)
@torch.no_grad()
def test_exported_encoder(kind, strict, dtype):
    model = Embedder(make(kind))
    program = export(model, (images(2,3,16,24).to(dtype),), dynamic_shapes=[free(kind)], strict=strict).module()
    for shape in shapes(kind):
        x = images(*shape).to(dtype)
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=0)

@pytest.mark.parametrize('kwargs', [dict(pool='meanstd'), dict(pool='cls'), dict(blocks=1)])
def test_exported_with_gradients_on(kwargs):
    "As a user does it, who does not think of no_grad"
    model = Embedder(make('shared'), **kwargs)
    program = export(model, (images(2,3,16,24),), dynamic_shapes=[free('shared')]).module()
    for shape in shapes('shared'):
        torch.testing.assert_close(program(images(*shape)), model(images(*shape)), atol=1e-5, rtol=0)

@pytest.mark.parametrize('kind', models)
@torch.no_grad()
def test_exported_drawing(kind):
    model,batch = Drawer(make(kind)),Dim('batch')
    example = images(2,3,16,16),torch.rand(model.model.tokens(images(2,3,16,16)).shape[:2])
    program = export(model, example, dynamic_shapes=[{0: batch},{0: batch}]).module()
    for b in (1,2,5):
        x = images(b,3,16,16)
        noise = torch.rand(model.model.tokens(x).shape[:2])
        torch.testing.assert_close(program(x, noise), model(x, noise), atol=1e-5, rtol=0)

@pytest.mark.parametrize('bad,words', [(torch.rand(2,3,16,16), 'in 0..1'), (torch.full((2,3,16,16), torch.nan), 'NaN')])
def test_compiled_models_still_look_at_pixels(bad, words):
    encode = torch.compile(Embedder(make('mae')), backend='eager')
    with pytest.raises(ValueError, match=words): encode(bad)

# Options outside their range

@pytest.mark.parametrize('kw', [
    dict(img_size=0), dict(patch_size=0), dict(patch_size=32), dict(patch_size=4.5), dict(in_chans=0), dict(depth=0), dict(depth='2'), dict(num_heads=0), dict(embed_dim=30),
    dict(embed_dim=36, num_heads=8), dict(mask_ratio=0), dict(mask_ratio=1), dict(mask_ratio=75), dict(mask_ratio='.75'), dict(mask_ratio=None), dict(mask_ratio=float('nan')),
    dict(alpha=-.1), dict(alpha=1), dict(drop_path=1), dict(masking='rows'), dict(masking=None), dict(fourier='wavelet')])
@pytest.mark.parametrize('cls', [MAE,CAMAE])
def test_options_outside_their_range(cls, kw):
    with pytest.raises(ValueError, match=f'^{next(iter(kw))} must be .*got'): cls(**{**sizes, **kw})

@pytest.mark.parametrize('kw', [dict(widths=(8,12)), dict(widths=8), dict(depth=0), dict(mask_ratio=2)])
def test_options_of_a_unet(kw):
    with pytest.raises(ValueError, match=next(iter(kw))): MUNet(**kw)

@pytest.mark.parametrize('kw', [dict(embed_dim=33), dict(embed_dim=30, num_heads=4)])
def test_options_of_a_decoder(kw):
    with pytest.raises(ValueError, match='embed_dim=3'): MAE(**sizes, decoder=kw)

# What fails leaves things as they were

class Stop(BaseException): pass # as the Stop button, which is no Exception

@pytest.fixture
def net():
    torch.manual_seed(0)
    backbone = ImageNetEncoder('densenet121', in_chans=3, img_size=32, pretrained=False, growth_rate=8, block_config=(2,2,2))
    net = Classifier(backbone, 3, embed_dim=8).train()
    net.backbone.eval() # frozen
    batch_norms(net)[0].momentum = .2
    return net

def state(net):
    "All that a model is"
    return {k: v.clone() for k,v in net.state_dict().items()},[m.training for m in net.modules()],[m.momentum for m in batch_norms(net)]

def batches(error):
    yield images(4,3,32,32)
    raise error

@pytest.mark.parametrize('given', [batches(Stop()), batches(MemoryError()), [], [images(4,4,32,32)], [images(1,3,32,32)], [images(4,3,32,32),'x'], None],
                         ids=['stopped','no memory','no batch','another channel','one image','a word','nothing'])
def test_adapting_in_vain(net, given):
    before = state(net)
    with pytest.raises(BaseException): net.adapt(given)
    after = state(net)
    assert all(torch.equal(after[0][k], v) for k,v in before[0].items()) and after[1:] == before[1:]

def test_adapting_keeps_modes(net):
    before = state(net)
    assert state(net.adapt([images(4,3,32,32)]))[1:] == before[1:]
    assert not torch.equal(batch_norms(net)[0].running_mean, before[0][next(k for k in before[0] if k.endswith('running_mean'))])

@pytest.mark.parametrize('kw', [dict(embed_dim=64), dict(patch_size=8), dict(depth=3), dict(mlp_ratio=2.)])
def test_weights_that_do_not_fit_change_nothing(kw):
    theirs = ImageNetEncoder('vit_tiny_patch16_224', in_chans=3, pretrained=False, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2).net.state_dict()
    model = MAE(**{**sizes, **kw}, parallel=False, decoder=decoder)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='among these weights'): start_from(model, theirs)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    with pytest.raises(ValueError, match='pos_embed'): start_from(MAE(**sizes, parallel=False), {k: v for k,v in theirs.items() if k!='pos_embed'})

@pytest.mark.parametrize('x', [images(2,3,16,16), images(2,5,16,16), images(2,3,17,16), torch.rand(2,3,16,16)])
def test_looking_leaves_modes(x):
    model = make('mae').train()
    model.encoder.blocks.eval() # frozen
    before = [m.training for m in model.modules()]
    try: reconstruct(model, x)
    except ValueError: pass
    assert [m.training for m in model.modules()] == before

# Names in pictures

def written(fig):
    "All texts of a figure as they are drawn"
    fig.canvas.draw()
    texts = [t.get_text() for t in fig.findobj(Text) if t.get_visible()]
    plt.close('all')
    return [t.replace(r'\$', '$').strip() for t in texts for t in t.splitlines() if t.replace(r'\$', '').count('$') == 0]

def profiles(name):
    X = np.random.default_rng(0).normal(size=(6,4))
    return AnnData(X, obs=pd.DataFrame(dict(batch=[name]*3+['B']*3), index=[name,*'abcde']))

def recalls(name, k):
    t = pd.DataFrame(dict(encoder=['a','b'], correction=['c','d'], source=['e','f'], low=.05, chance=.1, recall=.2, ci_low=.1, ci_high=.3, null_low=0., null_high=.1))
    t.loc[0,k] = name
    return plot_recall(t)

pictures = dict(
    channels=lambda s: show_channels(np.random.rand(2,8,8), [s,'b']),
    reconstruction=lambda s: show_reconstruction(make('mae'), images(1,3,16,16), [s,'b','c']),
    history=lambda s: plot_history(pd.DataFrame({'epoch': [0,1], 'loss': [1.,2.], s: [1.,2.]})),
    plate=lambda s: plot_plate(pd.DataFrame(dict(plate=[s], well=['A01'])), [1.]),
    batch=lambda s: plot_plate(pd.DataFrame(dict(batch=['x',s], plate='x', well='A01')), [1.,2.]),
    value=lambda s: plot_plate(pd.DataFrame({'plate': ['p'], 'well': ['A01'], s: [1.]}), s),
    pca=lambda s: plot_pca(profiles(s)), by=lambda s: plot_pca(AnnData(np.random.rand(4,3), obs={s: list('aabb')}), by=s),
    map=lambda s: plot_map(profiles(s)),
    encoder=lambda s: recalls(s, 'encoder'), correction=lambda s: recalls(s, 'correction'), source=lambda s: recalls(s, 'source'),
    family=lambda s: plot_scaling(pd.DataFrame(dict(family=[s,'b'], flops=[1e3,1e5], recall=[.1,.2]))),
    point=lambda s: plot_scaling(pd.DataFrame(dict(family=['a','b'], flops=[1e3,1e5], recall=[.1,.2], model=[s,'b'])), label='model'))

@pytest.mark.parametrize('name', ['$x_$', 'US$', '_late', r'\$x', r'$\frac$'])
@pytest.mark.parametrize('picture', pictures)
def test_names_are_written_as_they_are(picture, name):
    shown = [t.replace(' ', '_') if picture == 'history' else t for t in written(pictures[picture](name))]
    wanted = name.strip('_') if picture == 'history' else name
    assert any(wanted in t for t in shown)

# Plates

def plates(**columns):
    return pd.DataFrame({**dict(batch=['1','1','2','2'], plate='P', well=['A01','B02']*2, v=[1.,2.,3.,4.]), **columns})

def grids(fig):
    found = [(ax.get_title(), ax.images[0].get_array().filled(np.nan)) for ax in fig.axes if ax.images and ax.get_title()]
    plt.close('all')
    return found

def test_plates_of_the_same_name():
    (a,one),(b,two) = grids(plot_plate(plates(), 'v'))
    assert (a,b) == ('1 P','2 P') and (one[0,0],one[1,1],two[0,0],two[1,1]) == (1,2,3,4)
    assert [k for k,_ in grids(plot_plate(plates(plate=['P','P','Q','Q']), 'v'))] == ['P','Q']
    (_,mean), = grids(plot_plate(plates().drop(columns='batch'), 'v'))
    assert mean[0,0] == 2

def test_spellings_of_a_well_are_one():
    (_,g), = grids(plot_plate(plates(batch='1', well=['A01','a1','A-01','A001']), 'v'))
    assert g[0,0] == 2.5

@pytest.mark.parametrize('nowhere', ['', None, np.nan, 'blank', 'POS2', 'A00', 7])
def test_wells_without_a_place_are_counted(nowhere):
    with pytest.warns(UserWarning, match='1 of 4 wells have no place'): found = grids(plot_plate(plates(well=['A01','B02','A01',nowhere]), 'v'))
    assert np.isfinite(found[1][1]).sum() == 1
    with pytest.raises(ValueError, match='name of a well'): plot_plate(plates(well=nowhere), 'v')

@pytest.mark.parametrize('control,dots', [(['yes','no','no','no'], 1), ([1,0,0,1], 2), (['True','False','FALSE','no'], 1), (['DMSO','trt','trt','trt'], 1)])
def test_controls_are_yes_or_no(control, dots):
    fig = plot_plate(plates(control=control), 'v')
    assert sum(len(ax.lines[0].get_xdata()) for ax in fig.axes if ax.lines) == dots
    plt.close('all')

@pytest.mark.parametrize('kw,value,words', [
    (dict(), 'count', "no column 'count'"), (dict(), 'plate', 'plate is no number'), (dict(v=np.nan), 'v', 'finite'), (dict(v=['a','b','c','d']), 'v', 'no number'),
    (dict(control=['yes',None,'no','no']), 'v', 'control'), (dict(), [1.,2.], '(?i)length')])
def test_plates_that_cannot_be_drawn(kw, value, words):
    with pytest.raises(ValueError, match=words): plot_plate(plates(**kw), value)

def test_infinite_values_are_blank():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = grids(plot_plate(plates(v=[1.,np.inf,3.,np.nan]), 'v'))
    assert [np.isfinite(g).sum() for _,g in found] == [1,1]

def test_no_batch_is_no_batch_called_nan():
    ad = profiles('A'); ad.obs['batch'] = [None,np.nan,'',*'BBB']
    shown = written(plot_pca(ad))
    assert '(none)' in shown and 'nan' not in shown
