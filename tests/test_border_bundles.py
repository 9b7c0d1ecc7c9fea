"What a bundle may say, and what a model that is saved must be: kinds of bad input"
import copy, json, os, pickle, stat
from pathlib import Path

import numpy as np, pytest, torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from cellmae.cavit import CAMAE
from cellmae.classifier import Classifier
from cellmae.imagenet import ImageNetEncoder
from cellmae.released import load_released
from cellmae.vit import MAE
from cellmae.zoo import (check_savable, create_model, list_models, load_model, pull_model,
                         push_model, save_model)

stains,nan,inf = ['DNA','ER'],float('nan'),float('inf')
small = dict(img_size=32, patch_size=8, in_chans=2, embed_dim=16, depth=1, num_heads=2,
             decoder=dict(embed_dim=16, depth=1, num_heads=2))
eyes = dict(arch='vit_tiny_patch16_224', in_chans=2, img_size=32, rgb='tile', depth=1,
            embed_dim=24, num_heads=2)

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_model('camae_vitt8', **small).eval()

@pytest.fixture
def bundle(model, tmp_path): return save_model(model, tmp_path/'model', stains)

def about(bundle): return json.loads((bundle/'config.json').read_text())

def rewrite(bundle, **changes):
    "Change what `config.json` says"
    (bundle/'config.json').write_text(json.dumps({**about(bundle), **changes}))

def forget(bundle, *keys):
    "Leave fields of `config.json` out"
    kept = {k: v for k,v in about(bundle).items() if k not in keys}
    (bundle/'config.json').write_text(json.dumps(kept))

def reargue(bundle, **changes): rewrite(bundle, args={**about(bundle)['args'], **changes})

def reweigh(bundle, change):
    "Change the weights as someone would who knows of the checksum"
    f = bundle/'model.safetensors'
    save_file(change(load_file(f)), f)
    forget(bundle, 'sha256')

@pytest.fixture
def no_network(monkeypatch):
    def refuse(*a, **kw): raise AssertionError('asked the network')
    monkeypatch.setattr('socket.socket.connect', refuse)
    monkeypatch.setattr('socket.create_connection', refuse)


# What a bundle may say

@pytest.mark.parametrize('change', [
    dict(depth=2.), dict(depth='2'), dict(depth=True), dict(depth=-1), dict(depth=10**9),
    dict(depth=None), dict(depth=60_000), dict(in_chans=60_000), dict(embed_dim=10**12),
    dict(mask_ratio=nan), dict(alpha=inf),
    dict(slowest=[20]), dict(final_norm='yes'), dict(final_norm=1), dict(masking='a/b'),
    dict(masking='rows'), dict(masking=None), dict(fourier={}), dict(decoder=[1]),
    dict(decoder='shared'), dict(decoder=dict(kind='x')), dict(decoder=dict(path='x')),
    dict(decoder=dict(depth=1e9)), dict(max_chans=inf), dict(checkpoint='x.pth'), dict(self=1)])
def test_arguments_that_describe_no_architecture(bundle, change):
    reargue(bundle, **change)
    with pytest.raises(ValueError, match='config.json'): load_model(bundle)

@pytest.mark.filterwarnings('ignore:Initializing zero-element')
@pytest.mark.parametrize('change', [dict(num_heads=3), dict(num_heads=0), dict(patch_size=0),
                                    dict(embed_dim=18)])
def test_arguments_that_do_not_fit_each_other(bundle, change):
    reargue(bundle, **change)
    with pytest.raises(ValueError, match='config.json'): load_model(bundle)

@pytest.mark.parametrize('change', [dict(img_size=65536, patch_size=1),
                                    dict(embed_dim=65536, depth=200)])
def test_a_small_file_does_not_take_all_memory(bundle, change):
    reargue(bundle, **change)
    with pytest.raises(ValueError): load_model(bundle)

@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('change', [
    dict(pretrained=True), dict(pretrained=False), dict(checkpoint_path='x.pth'),
    dict(pretrained_cfg=dict(url='http://x')), dict(pretrained_cfg_overlay=dict(file='x.pth')),
    dict(cache_dir='.'), dict(features_only=True), dict(act_layer='relu'), dict(norm_layer='x'),
    dict(weight_init='jax'), dict(mlp_ratio=nan), dict(depth='1'), dict(arch=''),
    dict(arch=None), dict(arch=['resnet18']), dict(arch='no_such_net'), dict(arch='../resnet18'),
    dict(arch='timm/resnet18'), dict(arch='hf-hub:timm/resnet18'),
    dict(arch='hf_hub:timm/resnet18'), dict(arch='local-dir:.')])
def test_nothing_in_a_bundle_reaches_a_file_or_the_network(tmp_path, no_network, change, inside):
    net = ImageNetEncoder(**eyes, pretrained=False)
    folder = save_model(Classifier(net, 3, 8) if inside else net, tmp_path/'model', stains)
    load_model(folder)
    args = {**eyes, **change}
    if inside: args = dict(backbone=dict(model='ImageNetEncoder', args=args))
    reargue(folder, **args)
    with pytest.raises(ValueError, match='config.json'): load_model(folder)

@pytest.mark.parametrize('inside', [False, True])
def test_dice_of_old_bundles_are_left_out(tmp_path, inside):
    "Networks of timm could have drop path once, which was for training only"
    net = ImageNetEncoder(**eyes, pretrained=False)
    folder = save_model(Classifier(net, 3, 8) if inside else net, tmp_path/'model', stains)
    args = {**eyes, 'drop_path_rate': .1, 'drop_rate': .2}
    if inside: args = dict(backbone=dict(model='ImageNetEncoder', args=args))
    reargue(folder, **args)
    again = load_model(folder)
    assert 'drop' not in str(again.config)
    assert load_model(save_model(again, tmp_path/'again')).config == again.config

@pytest.mark.parametrize('backbone', [
    None, 'MAE', {}, dict(model='Classifier', args={}), dict(model='os.system', args={}),
    dict(model=['MAE'], args={}), dict(model='MAE', args=None),
    dict(model='MAE', args={}, path='x')])
def test_a_backbone_is_a_model_of_ours(tmp_path, backbone):
    net = Classifier(ImageNetEncoder(**eyes, pretrained=False), 3, 8)
    folder = save_model(net, tmp_path/'model', stains)
    reargue(folder, backbone=backbone)
    with pytest.raises(ValueError, match='config.json'): load_model(folder)

@pytest.mark.parametrize('key,value,words', [
    ('format', 'cellmae model 2', 'newer cellmae'), ('format', 'cellmae model 10', 'newer'),
    ('format', 'other 1', 'no model of cellmae'), ('format', None, 'no model of cellmae'),
    ('format', 1, 'no model of cellmae'), ('model', 'Linear', "'Linear'"),
    ('model', 'torch.nn.Linear', 'Linear'), ('model', 'partial', 'partial'),
    ('model', None, "'model'"), ('model', ['MAE'], "'model'"), ('args', None, "'args'"),
    ('args', [1], "'args'"), ('channels', 5, "'channels'"), ('channels', 'DNA', "'channels'"),
    ('channels', [1,2], 'list of names'), ('channels', ['DNA',' '], 'list of names'),
    ('channels', ['DNA',None], 'list of names'), ('channels', ['DNA','DNA'], 'twice'),
    ('provenance', [1], "'provenance'"), ('name', 3, "'name'"), ('name', ['a'], "'name'"),
    ('sha256', '0'*64, 'checksum'), ('sha256', None, 'checksum'), ('sha256', 5, 'checksum')])
def test_fields_of_the_description(bundle, key, value, words):
    rewrite(bundle, **{key: value})
    with pytest.raises(ValueError, match=words): load_model(bundle)

@pytest.mark.parametrize('key', ['format','model','args','channels','provenance'])
def test_a_field_is_missing(bundle, key):
    forget(bundle, key)
    with pytest.raises(ValueError, match=key): load_model(bundle)

@pytest.mark.parametrize('channels', [['DNA'], ['DNA','ER','mito']])
def test_as_many_names_as_channels(tmp_path, channels):
    folder = save_model(MAE(**small), tmp_path/'model', stains)
    rewrite(folder, channels=channels)
    with pytest.raises(ValueError, match='config.json.*for a model with 2'): load_model(folder)

@pytest.mark.parametrize('raw', [b'', b'{', b'[]', b'5', b'null', b'"a"', b'{"a": 1} x',
                                 b'\xff\xfe\x00', b'\0'*100, b'['*200000])
def test_a_damaged_description(bundle, raw):
    (bundle/'config.json').write_bytes(raw)
    with pytest.raises(ValueError, match='config.json'): load_model(bundle)

def test_a_bundle_of_before_checksums(bundle):
    forget(bundle, 'sha256', 'name', 'versions', 'input', 'pool')
    assert load_model(bundle).channels == stains


# What weights may be

first = 'encoder.cls_token'

@pytest.mark.filterwarnings('ignore:.*taken up as float32')
@pytest.mark.parametrize('change', [
    lambda s: {**s, first: s[first]*nan}, lambda s: {**s, first: s[first]+inf},
    lambda s: {k: v.long() for k,v in s.items()}, lambda s: {**s, first: s[first].bool()},
    lambda s: {**s, first: s[first].double()+1e300}, lambda s: {**s, first: s[first][0]},
    lambda s: {**s, first: s[first][...,:-1].contiguous()}, lambda s: {},
    lambda s: {k: v for k,v in s.items() if k!=first}, lambda s: {**s, 'more': torch.zeros(1)}])
def test_weights_that_are_not_the_model(bundle, change):
    reweigh(bundle, change)
    with pytest.raises(ValueError, match='model.safetensors'): load_model(bundle)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precision_is_taken_up_and_said(bundle, model, dtype):
    reweigh(bundle, lambda s: {k: v.to(dtype) for k,v in s.items()})
    with pytest.warns(UserWarning, match='taken up as float32'): again = load_model(bundle)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.state_dict()[first], model.state_dict()[first].to(dtype).float())

def test_every_flipped_bit_is_found(bundle):
    f = bundle/'model.safetensors'
    raw = f.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(raw), 12):
        f.write_bytes(raw[:at] + bytes([raw[at]^(1<<int(at%8))]) + raw[at+1:])
        with pytest.raises(ValueError, match='model.safetensors'): load_model(bundle)

pointer = b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n'

@pytest.mark.parametrize('checksum', [True, False])
@pytest.mark.parametrize('damage', [
    lambda r: b'', lambda r: r[:7], lambda r: r[:-1], lambda r: r[:len(r)//2], lambda r: r+b'x',
    lambda r: b'PK'+r[2:], lambda r: pointer, lambda r: b'<html>404</html>'])
def test_damaged_weights(bundle, damage, checksum):
    f = bundle/'model.safetensors'
    if not checksum: forget(bundle, 'sha256')
    f.write_bytes(damage(f.read_bytes()))
    with pytest.raises(ValueError, match='model.safetensors.*(again|lfs pull)'): load_model(bundle)

class Evil:
    "An object that writes a file when it is read"
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return exec, (f"open({str(self.mark)!r}, 'w')",)

def test_a_pickle_is_not_opened(bundle, tmp_path):
    forget(bundle, 'sha256')
    torch.save(dict(x=Evil(tmp_path/'ran')), bundle/'model.safetensors')
    with pytest.raises(ValueError, match='no safetensors'): load_model(bundle)
    assert not (tmp_path/'ran').exists()


# What can be saved

class Tempered(CAMAE):
    "A class of one's own, with an argument of its own"
    def __init__(self, temperature=1., **kwargs):
        super().__init__(**kwargs)
        self.config['temperature'] = temperature

class Other(CAMAE): "Another one"

def test_a_class_of_ones_own(tmp_path):
    folder = save_model(Tempered(temperature=.5, **small), tmp_path/'lab', stains)
    again = load_model(folder, cls=Tempered)
    assert type(again) is Tempered and again.config['temperature']==.5
    with pytest.raises(ValueError, match="'Tempered'.*cls"): load_model(folder)
    with pytest.raises(ValueError, match="'Tempered', not a Other"): load_model(folder, cls=Other)
    push_model(folder, 'lab/mine', endpoint=tmp_path, cls=Tempered)
    assert type(pull_model('lab/mine', endpoint=tmp_path, cls=Tempered)) is Tempered

@pytest.mark.parametrize('value', ['a/b', 'hf-hub:x', dict(a=1), nan, ['..']])
def test_arguments_of_ones_own_name_no_path_either(tmp_path, value):
    folder = save_model(Tempered(**small), tmp_path/'lab', stains)
    reargue(folder, temperature=value)
    with pytest.raises(ValueError, match='temperature'): load_model(folder, cls=Tempered)

def namesake():
    "A model of another class that is called MAE"
    return type('MAE', (CAMAE,), {})(**small)

class Fixed(MAE):
    "A class that takes no arguments"
    def __init__(self): super().__init__(**small)

class Wider(MAE):
    "A class that does not write its argument down"
    def __init__(self, more=8, **kw):
        super().__init__(**kw)
        self.more = nn.Linear(more, more)

def operated():
    "A model with another layer in it"
    net = MAE(**small)
    net.encoder.norm = nn.BatchNorm1d(5)
    return net

@pytest.mark.parametrize('make', [
    namesake, Fixed, operated, lambda: Wider(9, **small), lambda: nn.Linear(2, 2),
    lambda: Classifier(Other(**small), 3, 8),
    lambda: ImageNetEncoder(**eyes, pretrained=False, act_layer='relu')])
def test_what_could_not_be_read_again_is_refused_before_training(make, tmp_path):
    net = make()
    for f in (check_savable, lambda m: save_model(m, tmp_path/'model')):
        with pytest.raises(ValueError): f(net)
    assert not list(tmp_path.iterdir())

def test_every_name_can_be_saved():
    with torch.device('meta'):
        for name in list_models('*vitt*')+list_models('*s16*')+list_models('munet*'):
            check_savable(create_model(name, **dict(pretrained=False) if 'imag' in name else {}))

def test_the_check_leaves_model_and_random_numbers_alone(model):
    before,state = copy.deepcopy(model.state_dict()),torch.get_rng_state()
    check_savable(model)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())

@pytest.mark.parametrize('wrap', [torch.compile, nn.DataParallel])
def test_a_wrapped_model_is_saved_as_itself(model, tmp_path, wrap):
    assert type(load_model(save_model(wrap(model), tmp_path/'model', stains))) is CAMAE

@pytest.mark.parametrize('value', [nan, inf, -inf])
def test_weights_that_are_no_numbers_are_not_saved(bundle, value):
    sick = load_model(bundle)
    with torch.no_grad(): sick.encoder.cls_token[0,0,3] = value
    with pytest.raises(ValueError, match='not finite'): save_model(sick, bundle)
    load_model(bundle)

@pytest.mark.parametrize('channels', ['DNA', 'ab', [1,2], ['DNA',''], ['DNA','DNA'], ['DNA'],
                                      [None,None]])
def test_names_that_are_none(tmp_path, channels):
    with pytest.raises(ValueError): save_model(MAE(**small), tmp_path/'model', channels)

def test_half_precision_is_saved_as_float32(model, tmp_path):
    folder = save_model(copy.deepcopy(model).bfloat16(), tmp_path/'model', stains)
    dtypes = {v.dtype for v in load_file(folder/'model.safetensors').values()}
    assert dtypes == {torch.float32}

def test_tied_weights_are_saved(tmp_path):
    net = MAE(**small)
    net.encoder.blocks[0].q_norm.weight = net.encoder.blocks[0].k_norm.weight
    load_model(save_model(net, tmp_path/'model'))

@pytest.mark.parametrize('value', [np.float32(.5), np.array([1,2]), torch.ones(2), Path('a'),
                                   {1,2}, None, nan])
def test_any_provenance(model, tmp_path, value):
    folder = save_model(model, tmp_path/'model', stains, data=value)
    assert load_model(folder).provenance.keys() == {'data'}

@pytest.mark.parametrize('licence', [
    'cc0-1.0', 'mine\nmodel-index: [x]', 'x\n---\n# hi', 'a: b', '"', "it's", '{x}', '[a', '#',
    'null', 'CC BY 4.0', 5])
def test_a_licence_adds_no_keys_to_the_card(model, tmp_path, licence):
    folder = save_model(model, tmp_path/'model', stains, licence=licence)
    card = ModelCard((folder/'README.md').read_text()).data
    ours = {'license','license_name','library_name','pipeline_tag','tags'}
    assert set(card.to_dict()) <= ours
    assert ' '.join(str(licence).split()) in (card.license, card.get('license_name'))

def test_no_markup_gets_into_the_card(model, tmp_path):
    given = dict(data='a|b\n<script>', metrics={'x|y': '{z}'})
    text = (save_model(model, tmp_path/'model', ['<b>','ER'], **given)/'README.md').read_text()
    assert '| data | a\\|b &lt;script&gt; |' in text and '| x\\|y | {z} |' in text
    assert '<script>' not in text and '<b>' not in text


# Where a bundle is written

def mode(f): return stat.S_IMODE(f.stat().st_mode)

def test_colleagues_can_read_it(model, tmp_path):
    was = os.umask(0o022)
    try:
        folder = save_model(model, tmp_path/'model', stains)
        (folder/'config.json').chmod(0o600)
        push_model(folder, 'lab/cells', endpoint=tmp_path/'share')
    finally: os.umask(was)
    shared = tmp_path/'share/lab/cells'
    assert {mode(folder), mode(shared)}=={0o755}
    assert {mode(f) for f in shared.iterdir()}=={0o644}

def save(model, bundle, share): save_model(model, share/'lab/cells', ['new','names'])
def push(model, bundle, share): push_model(bundle, 'lab/cells', endpoint=share)

@pytest.mark.parametrize('write', [save, push])
def test_a_rename_that_fails_loses_nothing(model, bundle, tmp_path, monkeypatch, write):
    share,rename,calls = tmp_path/'share',os.rename,[]
    push_model(bundle, 'lab/cells', endpoint=share)
    def second_fails(a, b):
        calls.append(a)
        if len(calls)==2: raise OSError('no more')
        return rename(a, b)
    monkeypatch.setattr(os, 'rename', second_fails)
    with pytest.raises(OSError): write(model, bundle, share)
    monkeypatch.undo()
    assert len(calls)>=2 and pull_model('lab/cells', endpoint=share).channels==stains
    assert (share/'lab/cells').is_dir() and load_model(bundle)

@pytest.mark.parametrize('inside', ['data.csv', 'sub/x', '.git/config', 'config.json',
                                    'model.safetensors', 'README.md'])
def test_what_is_no_bundle_is_left_alone(model, bundle, tmp_path, inside):
    share = tmp_path/'share'
    f = share/'lab/cells'/inside
    f.parent.mkdir(parents=True)
    f.write_text('{"format": "mine"}')
    for write in (save, push, lambda m, b, s: check_savable(m, s/'lab/cells')):
        with pytest.raises(FileExistsError, match='left as it is'): write(model, bundle, share)
    assert f.read_text()=='{"format": "mine"}'

def test_notes_in_a_bundle_are_left_alone(model, bundle):
    (bundle/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='notes.txt'): save_model(model, bundle, stains)
    (bundle/'notes.txt').rename(bundle/'.DS_Store')
    save_model(model, bundle, stains)

def test_only_the_bundle_is_pushed(bundle, tmp_path):
    (bundle/'secret.txt').write_text('x')
    push_model(bundle, 'lab/cells', endpoint=tmp_path)
    sent = {f.name for f in (tmp_path/'lab/cells').iterdir()}
    assert sent=={'README.md','config.json','model.safetensors'}

@pytest.mark.parametrize('repo', [
    '../x', 'lab/..', '..', '.', 'lab/../x', '/abs', 'lab//x', 'lab/', '/lab', '', ' ', 'lab/x/',
    'lab\\x', '..\\x', 'C:\\x', 'C:x', 'a/b/c', 'lab/x y', 'lab/.git', '.git/x', 'lab/x.',
    'lab/x\n', 'lab/a..b', 'lab/a--b', '-x/y', 'lab/x\0', '~/x', 'http://x/y'])
@pytest.mark.parametrize('hub', [False, True])
def test_names_that_lead_elsewhere(bundle, tmp_path, repo, hub):
    share = tmp_path/'deep/share'
    share.mkdir(parents=True)
    end = 'http://127.0.0.1:9' if hub else share
    with pytest.raises(ValueError, match='name of a model'): push_model(bundle, repo, endpoint=end)
    with pytest.raises(ValueError, match='name of a model'): pull_model(repo, endpoint=end)
    assert not list(share.iterdir())

def test_a_link_to_a_bundle_stays_a_link(model, bundle, tmp_path):
    "A folder on a larger disk is replaced where it is"
    (tmp_path/'link').symlink_to(bundle, target_is_directory=True)
    save_model(model, tmp_path/'link', ['a','b'])
    assert (tmp_path/'link').is_symlink() and load_model(bundle).channels==['a','b']


# Names of models

@pytest.mark.parametrize('name,near', [('camae_vit_s16','camae_vits16'), ('mae-vitt8','mae_vitt8'),
                                       ('imagenet_densenet','imagenet_densenet161')])
def test_the_nearest_name(name, near):
    for f in (create_model, load_model):
        with pytest.raises((ValueError,OSError), match=f'Did you mean.*{near}'): f(name)

def test_patterns():
    assert list_models() == list_models('*') and list_models('nothing*') == []
    assert set(list_models('*_shared')) == {n for n in list_models() if n.endswith('_shared')}


# Weights in the released layout

vit = 'encoder.vit_backbone.'
names = {'encoder.embed.': vit+'patch_embed.proj.', 'decoder.embed.': 'encoder_decoder_proj.',
         'decoder.head.': 'decoder_pred.', 'decoder.cross.': 'decoder.cross_attention.',
         'decoder.stacks.': 'decoder.decoders.', 'encoder.': vit}

def released(model):
    "Weights of one of our models under released names, without tables of positions"
    p,out = model.patch_size,{}
    for k,v in model.state_dict().items():
        new = next((n for n in names if k.startswith(n)), None)
        if new: k = names[new]+k[len(new):]
        if 'patch_embed.proj.weight' in k: v = v.view(len(v), p, p, -1).permute(0,3,1,2)
        if k != 'decoder.channel_tokens': out[k] = v.contiguous()
        else: out |= {f'decoder.modality_tokens.{i}': t[None,None] for i,t in enumerate(v)}
    return out

@pytest.fixture(params=['mae_vitt8','camae_vitt8'])
def state(request):
    return released(create_model(request.param, **{**small, 'img_size': 256}, final_norm=False))

heads = dict(decoder=dict(num_heads=2))
token,bias = vit+'cls_token',vit+'blocks.0.mlp_bias'
head,drawn,stain = 'decoder_pred.weight','decoder.pos_embeddings','decoder.modality_tokens.'

@pytest.mark.parametrize('change', [
    lambda s: {}, lambda s: {'state_dict': {}}, lambda s: {**s, 'more.weight': torch.zeros(1)},
    lambda s: {k: v for k,v in s.items() if k!=head},
    lambda s: {k: v for k,v in s.items() if k!=token},
    lambda s: {**s, head: s[head][0]}, lambda s: {**s, head: s[head].T},
    lambda s: {**s, bias: s[bias][:-4]}, lambda s: {**s, token: s[token]*inf},
    lambda s: {**s, token: s[token].long()}, lambda s: {**s, token: s[token].flatten()},
    lambda s: {**s, token: [1]}, lambda s: {**s, token: None},
    lambda s: {**s, drawn: torch.zeros(1,1025,16)}, lambda s: {**s, drawn: torch.zeros(1025,16)},
    lambda s: {**s, drawn: torch.zeros(1,1025,16, dtype=int)},
    lambda s: {**s, vit+'pos_embed': torch.zeros(1,3,16)},
    lambda s: {**s, vit+'blocks.0.q_norm.weight': torch.ones(0)},
    lambda s: {**s, stain+'7': torch.zeros(1,1,16)}, lambda s: {**s, stain+'0': torch.zeros(())}])
def test_weights_that_are_not_in_the_released_layout(state, change, tmp_path):
    load_released(state, heads)
    torch.save(change(state), tmp_path/'w.pth')
    for given in (change(state), tmp_path/'w.pth'):
        with pytest.raises(ValueError): load_released(given, heads)

def save_old(state, f): torch.save(state, f, _use_new_zipfile_serialization=False)
def save_wrapped(state, f): torch.save({'state_dict': state}, f)

@pytest.mark.parametrize('write', [save_file, torch.save, save_wrapped, save_old])
@pytest.mark.parametrize('name', ['model.safetensors', 'weights.pth', 'w'])
def test_any_file_under_any_name(state, tmp_path, write, name):
    write(state, tmp_path/name)
    x = torch.randint(0, 256, (1,2,64,64), dtype=torch.uint8)
    want = load_released(state, heads).encode(x)
    assert torch.equal(load_released(str(tmp_path/name), heads).encode(x), want)

@pytest.mark.parametrize('raw', [b'', b'PK', b'PK\x03\x04'+b'\0'*99, b'\x80\x02junk', pointer,
                                 b'<html>404</html>'])
def test_files_that_hold_no_weights(tmp_path, raw):
    (tmp_path/'model.safetensors').write_bytes(raw)
    wrong = pytest.raises((ValueError,pickle.UnpicklingError), match='model.safetensors')
    for given in (tmp_path, tmp_path/'model.safetensors'):
        with wrong: load_released(given)
    for missing in (tmp_path/'none', tmp_path/'none.pth'):
        with pytest.raises(FileNotFoundError, match='snapshot_download'): load_released(missing)

@pytest.mark.parametrize('write', [torch.save, save_old])
def test_a_released_pickle_runs_nothing(tmp_path, write):
    write(dict(x=Evil(tmp_path/'ran')), tmp_path/'w')
    refused = pytest.raises(pickle.UnpicklingError, match='more than weights')
    with refused: load_released(tmp_path/'w')
    assert not (tmp_path/'ran').exists()

def test_released_weights_in_half_precision(state):
    half = {k: v.half() for k,v in state.items()}
    with pytest.warns(UserWarning, match='float32'): model = load_released(half, heads)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
