"What a bundle may say and a model that is saved must be: kinds of bad input, each with other members than the notebook shows"
import json, os, pickle, stat
from pathlib import Path

import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from cellmae.cavit import CAMAE
from cellmae.classifier import Classifier
from cellmae.imagenet import ImageNetEncoder
from cellmae.released import load_released
from cellmae.vit import MAE
from cellmae.zoo import check_savable, create_model, list_models, load_model, pull_model, push_model, save_model

stains = ['DNA','ER']

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_model('camae_vitt8', in_chans=2, embed_dim=16, depth=1, num_heads=2,
                        decoder=dict(embed_dim=16, depth=1, num_heads=2)).eval()

@pytest.fixture
def plain(): return create_model('mae_vitt8', in_chans=2, embed_dim=16, depth=1, num_heads=2,
                                 decoder=dict(embed_dim=16, depth=1, num_heads=2)).eval()

@pytest.fixture
def bundle(model, tmp_path): return save_model(model, tmp_path/'model', stains)

def rewrite(bundle, **changes):
    "Change what `config.json` says"
    f = bundle/'config.json'
    f.write_text(json.dumps({**json.loads(f.read_text()), **changes}))

def reargue(bundle, **changes): rewrite(bundle, args=json.loads((bundle/'config.json').read_text())['args'] | changes)

def reweigh(bundle, change):
    "Change the weights as someone would who knows of the checksum"
    f = bundle/'model.safetensors'
    save_file(change(load_file(f)), f)
    about = json.loads((bundle/'config.json').read_text())
    (bundle/'config.json').write_text(json.dumps({k: v for k,v in about.items() if k!='sha256'}))

@pytest.fixture
def no_network(monkeypatch):
    def refuse(*a, **kw): raise AssertionError('asked the network')
    monkeypatch.setattr('socket.socket.connect', refuse)
    monkeypatch.setattr('socket.create_connection', refuse)

# what a bundle may say

@pytest.mark.parametrize('change', [
    dict(depth=2.), dict(depth='2'), dict(depth=True), dict(depth=-1), dict(depth=10**9), dict(depth=None), dict(embed_dim=10**12),
    dict(mask_ratio=float('nan')), dict(alpha=float('inf')), dict(slowest=[20]), dict(final_norm='yes'), dict(final_norm=1),
    dict(masking='a/b'), dict(masking=None), dict(fourier={}), dict(decoder=[1]), dict(decoder='shared'), dict(decoder=dict(kind='x')),
    dict(decoder=dict(path='x')), dict(decoder=dict(depth=1e9)), dict(max_chans=float('inf')), dict(checkpoint='x.pth'), dict(self=1)])
def test_arguments_that_describe_no_architecture(bundle, change):
    reargue(bundle, **change)
    with pytest.raises(ValueError, match='config.json'): load_model(bundle)

@pytest.mark.filterwarnings('ignore:Initializing zero-element')
def test_arguments_that_fit_each_other_badly(bundle):
    for change in (dict(num_heads=3), dict(num_heads=0), dict(patch_size=0), dict(embed_dim=18)):
        reargue(bundle, **{**dict(num_heads=2, patch_size=8, embed_dim=16), **change})
        with pytest.raises(ValueError, match='config.json'): load_model(bundle)

def test_a_small_file_does_not_take_all_memory(bundle):
    reargue(bundle, img_size=65536, patch_size=1)
    with pytest.raises(ValueError): load_model(bundle)
    reargue(bundle, img_size=64, patch_size=8, embed_dim=65536, depth=200)
    with pytest.raises(ValueError, match='shape|missing'): load_model(bundle)

eyes = dict(arch='vit_tiny_patch16_224', in_chans=2, img_size=32, rgb='tile', depth=1, embed_dim=24, num_heads=2)

@pytest.mark.parametrize('change', [
    dict(pretrained=True), dict(pretrained=False), dict(checkpoint_path='x.pth'), dict(pretrained_cfg=dict(url='http://x')),
    dict(pretrained_cfg_overlay=dict(file='x.pth')), dict(cache_dir='.'), dict(features_only=True), dict(act_layer='relu'),
    dict(norm_layer='x'), dict(arch='hf-hub:timm/resnet18'), dict(arch='hf_hub:timm/resnet18'), dict(arch='local-dir:.'),
    dict(arch='timm/resnet18'), dict(arch='../resnet18'), dict(arch='no_such_net'), dict(arch=''), dict(arch=None), dict(arch=['resnet18']),
    dict(weight_init='jax'), dict(drop_rate=float('nan')), dict(depth='1')])
@pytest.mark.parametrize('inside', [False, True])
def test_nothing_in_a_bundle_reaches_a_file_or_the_network(tmp_path, no_network, change, inside):
    net = ImageNetEncoder(**eyes, pretrained=False)
    folder = save_model(Classifier(net, 3, 8) if inside else net, tmp_path/'model', stains)
    load_model(folder)
    if inside: reargue(folder, backbone=dict(model='ImageNetEncoder', args={**eyes, **change}))
    else: reargue(folder, **change)
    with pytest.raises(ValueError, match='config.json'): load_model(folder)

@pytest.mark.parametrize('backbone', [None, 'MAE', {}, dict(model='Classifier', args={}), dict(model='os.system', args={}),
                                      dict(model=['MAE'], args={}), dict(model='MAE', args=None), dict(model='MAE', args={}, path='x')])
def test_a_backbone_is_a_model_of_ours(tmp_path, backbone):
    folder = save_model(Classifier(ImageNetEncoder(**eyes, pretrained=False), 3, 8), tmp_path/'model', stains)
    reargue(folder, backbone=backbone)
    with pytest.raises(ValueError, match='config.json'): load_model(folder)

@pytest.mark.parametrize('change,words', [
    (dict(format='cellmae model 2'), 'newer cellmae'), (dict(format='cellmae model 10'), 'newer'), (dict(format='other 1'), 'no model of cellmae'),
    (dict(format=None), 'no model of cellmae'), (dict(format=1), 'no model of cellmae'), (dict(model='Linear'), "'Linear'"),
    (dict(model='torch.nn.Linear'), 'Linear'), (dict(model='partial'), 'partial'), (dict(model=None), "'model'"), (dict(model=['MAE']), "'model'"),
    (dict(args=None), "'args'"), (dict(args=[1]), "'args'"), (dict(channels=5), "'channels'"), (dict(channels='DNA'), "'channels'"),
    (dict(channels=[1,2]), 'list of names'), (dict(channels=['DNA',' ']), 'list of names'), (dict(channels=['DNA',None]), 'list of names'),
    (dict(channels=['DNA','DNA']), 'twice'), (dict(provenance=[1]), "'provenance'"), (dict(name=3), "'name'"), (dict(name=['a']), "'name'"),
    (dict(sha256='0'*64), 'checksum'), (dict(sha256=None), 'checksum'), (dict(sha256=5), 'checksum')])
def test_fields_of_the_description(bundle, change, words):
    rewrite(bundle, **change)
    with pytest.raises(ValueError, match=words): load_model(bundle)

@pytest.mark.parametrize('channels', [['DNA'], ['DNA','ER','mito']])
def test_as_many_names_as_channels(plain, tmp_path, channels):
    folder = save_model(plain, tmp_path/'model', stains)
    rewrite(folder, channels=channels)
    with pytest.raises(ValueError, match='config.json.*for a model with 2'): load_model(folder)

@pytest.mark.parametrize('key', ['format','model','args','channels','provenance'])
def test_a_field_is_missing(bundle, key):
    about = json.loads((bundle/'config.json').read_text())
    (bundle/'config.json').write_text(json.dumps({k: v for k,v in about.items() if k!=key}))
    with pytest.raises(ValueError, match=key): load_model(bundle)

@pytest.mark.parametrize('text', ['', '{', '[]', '5', 'null', '"a"', '{"a": 1} x', b'\xff\xfe\x00', b'\0'*100, '['*200000])
def test_a_damaged_description(bundle, text):
    (bundle/'config.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match='config.json'): load_model(bundle)

def test_a_bundle_of_before_checksums(bundle, model):
    about = json.loads((bundle/'config.json').read_text())
    for k in ('sha256','name','versions','input','pool'): about.pop(k)
    (bundle/'config.json').write_text(json.dumps(about))
    assert load_model(bundle).channels == stains

# what the weights may be

first = 'encoder.cls_token'

@pytest.mark.parametrize('change', [
    lambda s: {**s, first: s[first]*float('nan')}, lambda s: {**s, first: s[first]+float('inf')}, lambda s: {k: v.long() for k,v in s.items()},
    lambda s: {**s, first: s[first].bool()}, lambda s: {**s, first: s[first].double()+1e300}, lambda s: {**s, first: s[first][...,:-1].contiguous()},
    lambda s: {**s, first: s[first][0]}, lambda s: {k: v for k,v in s.items() if k!=first}, lambda s: s | dict(more=torch.zeros(1)), lambda s: {}])
@pytest.mark.filterwarnings('ignore:.*taken up as float32')
def test_weights_that_are_not_the_model(bundle, change):
    reweigh(bundle, change)
    with pytest.raises(ValueError, match='model'): load_model(bundle)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precision_is_taken_up_and_said(bundle, model, dtype):
    reweigh(bundle, lambda s: {k: v.to(dtype) for k,v in s.items()})
    with pytest.warns(UserWarning, match='taken up as float32'): again = load_model(bundle)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    want = model.state_dict()[first].to(dtype).float()
    assert torch.equal(again.state_dict()[first], want)

def test_every_flipped_bit_is_found(bundle):
    f = bundle/'model.safetensors'
    raw = f.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(raw), 12):
        f.write_bytes(raw[:at] + bytes([raw[at]^(1<<int(at%8))]) + raw[at+1:])
        with pytest.raises(ValueError, match='model.safetensors'): load_model(bundle)

@pytest.mark.parametrize('damage', [lambda r: b'', lambda r: r[:7], lambda r: r[:-1], lambda r: r[:len(r)//2], lambda r: r+b'x', lambda r: b'PK'+r[2:],
                                    lambda r: b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n', lambda r: b'<html>404</html>'])
@pytest.mark.parametrize('checksum', [True, False])
def test_damaged_weights(bundle, damage, checksum):
    f = bundle/'model.safetensors'
    if not checksum: reweigh(bundle, dict)
    f.write_bytes(damage(f.read_bytes()))
    with pytest.raises(ValueError, match='model.safetensors.*(again|lfs pull)'): load_model(bundle)

def test_a_pickle_is_not_opened(bundle, tmp_path):
    class Evil:
        def __reduce__(self): return exec, (f"open({str(tmp_path/'ran')!r}, 'w')",)
    reweigh(bundle, dict)
    torch.save(dict(x=Evil()), bundle/'model.safetensors')
    with pytest.raises(ValueError, match='no safetensors'): load_model(bundle)
    assert not (tmp_path/'ran').exists()

# what can be saved

class Tempered(CAMAE):
    "A class of one's own, with an argument of its own"
    def __init__(self, temperature=1., **kwargs):
        super().__init__(**kwargs)
        self.config['temperature'] = temperature

class Other(CAMAE): pass

small = dict(img_size=32, patch_size=8, in_chans=2, embed_dim=16, depth=1, num_heads=2,
             decoder=dict(embed_dim=16, depth=1, num_heads=2))

def test_a_class_of_ones_own(tmp_path):
    mine = Tempered(temperature=.5, **small).eval()
    check_savable(mine)
    folder = save_model(mine, tmp_path/'lab', stains)
    again = load_model(folder, cls=Tempered)
    assert type(again) is Tempered and again.config['temperature']==.5
    with pytest.raises(ValueError, match="'Tempered'.*cls"): load_model(folder)
    with pytest.raises(ValueError, match="'Tempered', not a Other"): load_model(folder, cls=Other)
    push_model(folder, 'lab/mine', endpoint=tmp_path, cls=Tempered)
    assert type(pull_model('lab/mine', endpoint=tmp_path, cls=Tempered)) is Tempered
    for bad in ('a/b', 'hf-hub:x', dict(a=1), float('nan'), ['..']):
        reargue(folder, temperature=bad)
        with pytest.raises(ValueError, match='temperature'): load_model(folder, cls=Tempered)

def hidden(**kw):
    class MAE(CAMAE): pass
    return MAE(**kw)

class Fixed(MAE):
    def __init__(self): super().__init__(**small)

class Wider(MAE):
    def __init__(self, more=8, **kw):
        super().__init__(**kw)
        self.more = nn.Linear(more, more)

def widened(more):
    net = Wider(more, **small)
    return net

def operated():
    net = MAE(**small)
    net.encoder.norm = nn.BatchNorm1d(5)
    return net

@pytest.mark.parametrize('make', [lambda: nn.Linear(2,2), lambda: hidden(**small), Fixed, lambda: widened(9), operated,
                                  lambda: ImageNetEncoder(**eyes, pretrained=False, act_layer='relu'),
                                  lambda: Classifier(Other(**small), 3, 8)])
def test_what_could_not_be_read_again_is_refused_before_training(make, tmp_path):
    net = make()
    for f in (check_savable, lambda m: save_model(m, tmp_path/'model')):
        with pytest.raises(ValueError): f(net)
    assert not list(tmp_path.iterdir())

def test_every_name_can_be_saved():
    with torch.device('meta'):
        for n in list_models():
            if '8' in n and 't8' not in n: continue # sizes of others
            check_savable(create_model(n, **(dict(pretrained=False) if 'imagenet' in n else {})))

def test_the_check_leaves_model_and_random_numbers_alone(model):
    before,state = {k: v.clone() for k,v in model.state_dict().items()},torch.get_rng_state()
    check_savable(model)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())

def test_a_compiled_or_wrapped_model_is_saved_as_itself(model, tmp_path):
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        assert type(load_model(save_model(wrapped, tmp_path/'model', stains))) is CAMAE

@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_weights_that_are_no_numbers_are_not_saved(model, bundle, value):
    sick = load_model(bundle)
    with torch.no_grad(): sick.encoder.cls_token[0,0,3] = value
    with pytest.raises(ValueError, match='not finite'): save_model(sick, bundle)
    load_model(bundle)

@pytest.mark.parametrize('channels', ['DNA', 'ab', [1,2], ['DNA',''], ['DNA','DNA'], [None,None], ['DNA']])
def test_names_that_are_none(plain, tmp_path, channels):
    with pytest.raises(ValueError): save_model(plain, tmp_path/'model', channels)

def test_half_precision_is_saved_as_float32(model, tmp_path):
    import copy
    folder = save_model(copy.deepcopy(model).bfloat16(), tmp_path/'model', stains)
    assert {v.dtype for v in load_file(folder/'model.safetensors').values()} == {torch.float32}

def test_tied_weights_are_saved(tmp_path):
    net = MAE(**small)
    net.encoder.blocks[0].q_norm.weight = net.encoder.blocks[0].k_norm.weight
    load_model(save_model(net, tmp_path/'model'))

@pytest.mark.parametrize('value', [np.float32(.5), np.array([1,2]), torch.ones(2), Path('a'), {1,2}, None, float('nan')])
def test_any_provenance(model, tmp_path, value):
    assert load_model(save_model(model, tmp_path/'model', stains, data=value)).provenance.keys() == {'data'}

@pytest.mark.parametrize('licence', ['cc0-1.0', 'mine\nmodel-index: [x]', 'x\n---\n# hi', 'a: b', '"', "it's", '{x}', '[a', '#', 'null', 'CC BY 4.0', 5])
def test_a_licence_adds_no_keys_to_the_card(model, tmp_path, licence):
    from huggingface_hub import ModelCard
    folder = save_model(model, tmp_path/'model', stains, licence=licence, data='a|b\n<script>', metrics={'x|y': '{z}'})
    card = ModelCard((folder/'README.md').read_text())
    assert set(card.data.to_dict()) <= {'license','license_name','library_name','pipeline_tag','tags'}
    assert ' '.join(str(licence).split()) in (card.data.license, card.data.get('license_name'))
    assert '<script>' not in card.text and '| data | a\\|b &lt;script&gt; |' in card.text

# where it is written

def test_a_new_file_is_read_by_colleagues(model, tmp_path):
    was = os.umask(0o022)
    try:
        folder = save_model(model, tmp_path/'model', stains)
        (folder/'config.json').chmod(0o600)
        push_model(folder, 'lab/cells', endpoint=tmp_path/'share')
    finally: os.umask(was)
    for top in (folder, tmp_path/'share/lab/cells'):
        assert stat.S_IMODE(top.stat().st_mode)==0o755
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path/'share/lab/cells').iterdir()}=={0o644}

@pytest.mark.parametrize('write', [lambda m, f, share: save_model(m, share/'lab/cells', ['new','names']),
                                   lambda m, f, share: push_model(f, 'lab/cells', endpoint=share)])
def test_a_rename_that_fails_loses_nothing(model, bundle, tmp_path, monkeypatch, write):
    share = tmp_path/'share'
    push_model(bundle, 'lab/cells', endpoint=share)
    rename,calls = os.rename,[]
    def second_fails(a, b):
        calls.append(a)
        if len(calls)==2: raise OSError('no more')
        return rename(a, b)
    monkeypatch.setattr(os, 'rename', second_fails)
    with pytest.raises(OSError): write(model, bundle, share)
    monkeypatch.undo()
    assert len(calls)>=2 and pull_model('lab/cells', endpoint=share).channels==stains
    assert (share/'lab/cells').is_dir() and load_model(bundle)

@pytest.mark.parametrize('inside', ['data.csv', 'sub/x', '.git/config', 'config.json', 'model.safetensors', 'README.md'])
def test_what_is_no_bundle_is_left_alone(model, bundle, tmp_path, inside):
    f = tmp_path/'share/lab/data'/inside
    f.parent.mkdir(parents=True)
    f.write_text('{"format": "mine"}')
    for write in (lambda: push_model(bundle, 'lab/data', endpoint=tmp_path/'share'), lambda: save_model(model, tmp_path/'share/lab/data', stains),
                  lambda: check_savable(model, tmp_path/'share/lab/data')):
        with pytest.raises(FileExistsError, match='left as it is'): write()
    assert f.read_text()=='{"format": "mine"}'

def test_notes_beside_a_bundle_are_left_alone(model, bundle):
    (bundle/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='notes.txt'): save_model(model, bundle, stains)
    (bundle/'notes.txt').rename(bundle/'.DS_Store')
    save_model(model, bundle, stains)

def test_only_the_bundle_is_pushed(bundle, tmp_path):
    (bundle/'secret.txt').write_text('x')
    push_model(bundle, 'lab/cells', endpoint=tmp_path/'share')
    assert {f.name for f in (tmp_path/'share/lab/cells').iterdir()}=={'README.md','config.json','model.safetensors'}

@pytest.mark.parametrize('repo', ['../x', 'lab/..', '..', '.', 'lab/../x', '/abs', 'lab//x', 'lab/', '/lab', '', ' ', 'lab/x/', 'lab\\x', '..\\x', 'C:\\x', 'C:x',
                                  'a/b/c', 'lab/x y', 'lab/.git', '.git/x', 'lab/x.', 'lab/x\n', 'lab/a..b', 'lab/a--b', '-x/y', 'lab/x\0', '~/x', 'http://x/y'])
def test_names_that_lead_elsewhere(bundle, tmp_path, repo):
    share = tmp_path/'deep/share'
    share.mkdir(parents=True)
    for f in (lambda: push_model(bundle, repo, endpoint=share), lambda: pull_model(repo, endpoint=share),
              lambda: push_model(bundle, repo, endpoint='http://127.0.0.1:9'), lambda: pull_model(repo, endpoint='http://127.0.0.1:9')):
        with pytest.raises(ValueError, match='name of a model'): f()
    assert not list(share.iterdir())

def test_a_bundle_through_a_link_stays_where_it_is(model, bundle, tmp_path):
    "A folder that is a link, as to a larger disk, is replaced behind the link"
    (tmp_path/'link').symlink_to(bundle, target_is_directory=True)
    save_model(model, tmp_path/'link', ['a','b'])
    assert (tmp_path/'link').is_symlink() and load_model(bundle).channels==['a','b']

# names

@pytest.mark.parametrize('name,near', [('camae_vit_s16','camae_vits16'), ('mae-vitt8','mae_vitt8'), ('imagenet_densenet','imagenet_densenet161')])
def test_the_nearest_name(name, near):
    for f in (create_model, load_model):
        with pytest.raises((ValueError,FileNotFoundError), match=f'Did you mean.*{near}'): f(name)

def test_patterns():
    assert list_models() == list_models('*') and list_models('nothing*') == []
    assert set(list_models('*_shared')) == {n for n in list_models() if n.endswith('_shared')}

# weights in the released layout

vit = 'encoder.vit_backbone.'

def released(model):
    "Weights of one of our models under released names, without tables of positions"
    p,out = model.patch_size,{}
    names = {'encoder.embed.': vit+'patch_embed.proj.', 'decoder.embed.': 'encoder_decoder_proj.',
             'decoder.head.': 'decoder_pred.', 'decoder.cross.': 'decoder.cross_attention.',
             'decoder.stacks.': 'decoder.decoders.', 'encoder.': vit}
    for k,v in model.state_dict().items():
        new = next((n for n in names if k.startswith(n)), None)
        if new: k = names[new]+k[len(new):]
        if k.endswith('proj.weight') and 'patch_embed' in k: v = v.view(len(v), p, p, -1).permute(0,3,1,2)
        if k != 'decoder.channel_tokens': out[k] = v.contiguous()
        else: out |= {f'decoder.modality_tokens.{i}': t[None,None] for i,t in enumerate(v)}
    return out

@pytest.fixture(params=['mae_vitt8','camae_vitt8'])
def state(request):
    return released(create_model(request.param, in_chans=2, embed_dim=16, depth=1, num_heads=2, img_size=256,
                                 final_norm=False, decoder=dict(embed_dim=16, depth=1, num_heads=2)))

heads = dict(decoder=dict(num_heads=2))
token,bias,head = vit+'cls_token',vit+'blocks.0.mlp_bias','decoder_pred.weight'

@pytest.mark.parametrize('change', [
    lambda s: {}, lambda s: {'state_dict': {}}, lambda s: {k: v for k,v in s.items() if k!=head},
    lambda s: {k: v for k,v in s.items() if k!=token}, lambda s: s | {'more.weight': torch.zeros(1)},
    lambda s: s | {head: s[head][0]}, lambda s: s | {head: s[head].T}, lambda s: s | {bias: s[bias][:-4]},
    lambda s: s | {token: s[token]*float('inf')}, lambda s: s | {token: s[token].long()},
    lambda s: s | {token: s[token].flatten()}, lambda s: s | {token: [1]}, lambda s: s | {token: None},
    lambda s: s | {'decoder.pos_embeddings': torch.zeros(1,1025,16)},
    lambda s: s | {'decoder.pos_embeddings': torch.zeros(1025,16)},
    lambda s: s | {'decoder.pos_embeddings': torch.zeros(1,1025,16, dtype=int)},
    lambda s: s | {vit+'pos_embed': torch.zeros(1,3,16)}, lambda s: s | {vit+'blocks.0.q_norm.weight': torch.ones(0)},
    lambda s: s | {'decoder.modality_tokens.7': torch.zeros(1,1,16)}, lambda s: s | {'decoder.modality_tokens.0': torch.zeros(())}])
def test_weights_that_are_not_in_the_released_layout(state, change, tmp_path):
    load_released(state, heads)
    state = change(state)
    torch.save(state, tmp_path/'w.pth')
    for given in (state, tmp_path/'w.pth'):
        with pytest.raises(ValueError): load_released(given, heads)

@pytest.mark.parametrize('save', [save_file, torch.save, lambda s, f: torch.save({'state_dict': s}, f),
                                  lambda s, f: torch.save(s, f, _use_new_zipfile_serialization=False)])
@pytest.mark.parametrize('name', ['model.safetensors', 'weights.pth', 'w'])
def test_any_file_under_any_name(state, tmp_path, save, name):
    save(state, tmp_path/name)
    x = torch.randint(0, 256, (1,2,64,64), dtype=torch.uint8)
    want = load_released(state, heads).encode(x)
    assert torch.equal(load_released(str(tmp_path/name), heads).encode(x), want)

@pytest.mark.parametrize('raw', [b'', b'PK', b'PK\x03\x04'+b'\0'*99, b'\x80\x02junk', b'<html>404</html>', b'version https://git-lfs'])
def test_files_that_hold_no_weights(tmp_path, raw):
    (tmp_path/'model.safetensors').write_bytes(raw)
    for given in (tmp_path, tmp_path/'model.safetensors'):
        with pytest.raises((ValueError,pickle.UnpicklingError), match='model.safetensors'): load_released(given)
    for missing in (tmp_path/'none', tmp_path/'none.pth'):
        with pytest.raises(FileNotFoundError, match='snapshot_download'): load_released(missing)

def test_released_weights_in_half_precision(state):
    with pytest.warns(UserWarning, match='float32'): model = load_released({k: v.half() for k,v in state.items()}, heads)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
