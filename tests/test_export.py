"ONNX files of all kinds of encoders, opened by onnxruntime, against their models; bundles of an average and the last step"
import json, shutil
from functools import partial

import numpy as np, pytest, torch
from torch import nn

from cellmae import export as room
from cellmae.blocks import set_attention
from cellmae.cavit import CAMAE
from cellmae.classifier import Classifier
from cellmae.encoders import as_encoder
from cellmae.export import open_onnx, to_onnx
from cellmae.imagenet import ImageNetEncoder
from cellmae.munet import MUNet
from cellmae.vit import MAE
from cellmae.zoo import create_model, load_model, pull_model, push_model, save_model

packages = 'onnx','onnxscript','onnxruntime'
needs_onnx = pytest.mark.skipif(not all(map(room.find_spec, packages)), reason='pip install onnx onnxscript onnxruntime')

sizes = dict(img_size=16, patch_size=4, in_chans=2, embed_dim=32, depth=1, num_heads=2, decoder=dict(embed_dim=32, depth=1, num_heads=4))
dense = dict(arch='densenet121', in_chans=2, img_size=32, pretrained=False, growth_rate=4, block_config=(1,1,1))
kinds = dict(
    mae=lambda: MAE(**sizes, parallel=False),
    trimmed=lambda: MAE(**dict(sizes, depth=2)).trim(1),
    munet=lambda: MUNet(img_size=16, patch_size=4, in_chans=2, widths=(8,8), depth=1),
    vit=lambda: ImageNetEncoder('vit_tiny_patch16_224', in_chans=2, img_size=32, pretrained=False, depth=1, embed_dim=24, num_heads=2),
    neck=lambda: Classifier(ImageNetEncoder(**dense), 3, 8),
    agnostic_neck=lambda: Classifier(CAMAE(**sizes, max_chans=5), 3, 8))

def make(kind):
    torch.manual_seed(0)
    model = kinds[kind]()
    for m in model.modules(): # as if it had seen images
        if hasattr(m, 'running_var'): m.running_mean.normal_(); m.running_var.uniform_(.5, 2)
    return model

def images(*shape): return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))

@torch.no_grad()
def differ(encoder, model, x, **how):
    z,want = encoder.encode(x),model.eval().encode(x, **how)
    assert z.shape == want.shape and z.dtype == torch.float32
    return float((z-want).abs().max()/want.abs().max())

pools = dict(mae='cls', munet='meanstd')

@needs_onnx
@pytest.mark.parametrize('kind', [k for k in kinds if k!='trimmed'])
def test_a_file_embeds_as_its_model(kind, tmp_path):
    model,pool = make(kind).train(),pools.get(kind)
    encoder = open_onnx(to_onnx(model, tmp_path/'encoder.onnx', pool=pool))
    assert model.training and [o.name for o in tmp_path.iterdir()] == ['encoder.onnx'], 'the model is as it was, and nothing lies around'
    how = dict(pool=pool) if pool else {}
    step = 16 if kind in ('vit','neck') else 4
    chans = (1,3,5) if kind=='agnostic_neck' else (2,2,2)
    for b,c,(h,w) in zip((1,2,7), chans, ((2,3),(4,2),(2,5))):
        assert differ(encoder, model, images(b, c, h*step, w*step), **how) < 1e-5, (b,c,h,w)
    face = as_encoder(model)
    assert (encoder.name,encoder.weights,encoder.size,encoder.channels) == (face.name,face.weights,face.size,face.channels)

@needs_onnx
def test_wrapped_models_and_bundles(tmp_path):
    model = CAMAE(**sizes).eval()
    model.name,model.channels = 'mine',['DNA','ER']
    for m in model.encoder.blocks: m.compile()
    set_attention(model, False)
    wrapped = torch.compile(nn.DataParallel(model))
    encoder = open_onnx(to_onnx(wrapped, tmp_path/'a.onnx', channelwise=True))
    set_attention(model, True)
    for m in model.encoder.blocks: m._compiled_call_impl = None
    assert encoder.channelwise and differ(encoder, model, images(3,3,16,8), channelwise=True) < 1e-5

@pytest.fixture(scope='module')
def followed():
    "A model, and its program"
    if not all(map(room.find_spec, packages)): pytest.skip('no ONNX')
    model = make('mae')
    embedding = room._Embedding(model, pool='mean')
    return model,embedding,room._program(embedding, model)[0]

@needs_onnx
def test_what_any_program_reads(tmp_path):
    import onnx, onnxruntime
    model = make('trimmed')
    model.channels,model.name = ['DNA, blue','ER'],'mine'
    save_model(model, tmp_path/'run', z='max')
    to_onnx(tmp_path/'run', tmp_path/'a.onnx', pool='cls')
    encoder = open_onnx(tmp_path/'a.onnx')
    assert encoder.about == dict(z='max') and encoder.name == 'mine' and encoder.channels == model.channels
    assert differ(encoder, model, images(1,2,16,16), pool='cls') < 1e-5
    session = onnxruntime.InferenceSession(tmp_path/'a.onnx')
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about['channels']) == ['DNA, blue','ER'] and about['pool'] == 'cls' and about['weights'] == as_encoder(model).weights
    takes,gives = session.get_inputs()[0],session.get_outputs()[0]
    assert (takes.name,takes.type,takes.shape) == ('images','tensor(uint8)',['batch',2,'4*rows','4*columns'])
    assert (gives.name,gives.type,gives.shape) == ('embeddings','tensor(float)',['batch',32])
    opened = onnx.load(tmp_path/'a.onnx')
    onnx.checker.check_model(opened, full_check=True)
    assert opened.opset_import[0].version == room.OPSET
    assert not any('decoder' in o.name for o in opened.graph.initializer)

@needs_onnx
def test_a_network_of_one_size(tmp_path):
    net = ImageNetEncoder('mixer_s32_224', in_chans=2, img_size=224, pretrained=False)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match='224x224 pixels only'): file = to_onnx(net, tmp_path/'a.onnx')
    encoder = open_onnx(file)
    assert differ(encoder, net, images(3,2,224,224)) < 1e-5
    with pytest.raises(ValueError, match=r'\(batch,2,224,224\), not \(1, 2, 32, 32\)'): encoder.encode(images(1,2,32,32))

def test_weights_that_do_not_fit_into_a_file(followed, tmp_path, monkeypatch):
    monkeypatch.setattr(room, 'LARGEST', 1000)
    model,embedding,program = followed
    program.model.metadata_props.update(room._about(as_encoder(model), 'mean'))
    path,seen = tmp_path/'a.onnx',[]
    room._write(program, path, 'f00', lambda f: seen.append(room._difference(f, embedding, images(1,2,8,8))))
    assert seen[0] < 1e-5 and sorted(o.name for o in tmp_path.iterdir()) == ['a.onnx','a.onnx.f00'] and path.stat().st_size < (tmp_path/'a.onnx.f00').stat().st_size
    moved = tmp_path/'moved'; moved.mkdir()
    for o in ('a.onnx','a.onnx.f00'): (tmp_path/o).rename(moved/o)
    assert differ(open_onnx(moved/'a.onnx'), model, images(1,2,8,8)) < 1e-5
    (moved/'a.onnx.f00').unlink()
    with pytest.raises(ValueError, match='a.onnx is damaged'): open_onnx(moved/'a.onnx')

def test_a_wrong_program_gets_no_name(followed, tmp_path):
    model,embedding,program = followed
    other,path = room._Embedding(make('mae'), pool='cls'),tmp_path/'a.onnx'
    path.write_text('the old one')
    with pytest.raises(RuntimeError, match='differs from the model by'):
        room._write(program, path, '', partial(room._check_file, embedding=other, x=images(1,2,16,16)))
    assert path.read_text() == 'the old one' and len(list(tmp_path.iterdir())) == 1

@needs_onnx
@pytest.mark.parametrize('content,words', [(b'', 'damaged'), (b'no file of ours'*9, 'damaged'), (None, 'does not exist')])
def test_files_that_are_none(content, words, tmp_path):
    if content is not None: (tmp_path/'a.onnx').write_bytes(content)
    with pytest.raises((ValueError,FileNotFoundError), match=words): open_onnx(tmp_path/'a.onnx')

def test_without_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(room, 'find_spec', lambda name: name=='onnx' or None)
    with pytest.raises(ImportError, match='pip install onnxscript onnxruntime$'): to_onnx(make('mae'), tmp_path/'a.onnx')
    with pytest.raises(ImportError, match='pip install onnxruntime$'): open_onnx(tmp_path/'a.onnx')

# A bundle with an average

@pytest.fixture
def both(tmp_path):
    torch.manual_seed(0)
    average,last = create_model('mae_vitt8', in_chans=2, depth=1),create_model('mae_vitt8', in_chans=2, depth=1)
    save_model(average, tmp_path/'model', ['DNA','ER'], last=last.state_dict(), ema=.99, epochs=3)
    return average,last,tmp_path/'model'

def same(a, b): return all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

def test_both_travel(both, tmp_path):
    average,last,folder = both
    share = tmp_path/'share'
    push_model(folder, 'lab/cells', endpoint=share)
    for load in (partial(load_model, folder), partial(pull_model, 'lab/cells', endpoint=share)):
        assert same(load(), average) and same(load(average=False), last) and not same(average, last)
    assert as_encoder(folder).weights == as_encoder(average).weights
    about = json.loads((folder/'config.json').read_text())
    assert about['ema'] == .99 and 'average=False' in (folder/'README.md').read_text()
    save_model(average, folder, ['DNA','ER'])
    assert not (folder/'last.safetensors').exists() and json.loads((folder/'config.json').read_text())['ema'] is False

@pytest.mark.parametrize('harm', ['byte','half','gone','swapped'])
def test_damage_of_the_last_step(both, harm, tmp_path):
    average,_,folder = both
    f = folder/'last.safetensors'
    data = bytearray(f.read_bytes())
    if harm=='byte': data[-100] ^= 1; f.write_bytes(data)
    if harm=='half': f.write_bytes(data[:len(data)//2])
    if harm=='gone': f.unlink()
    if harm=='swapped': shutil.copyfile(folder/'model.safetensors', f)
    with pytest.raises((ValueError,FileNotFoundError), match='last.safetensors.*opy the bundle again'): load_model(folder, average=False)
    with pytest.raises((ValueError,FileNotFoundError), match='last.safetensors'): push_model(folder, 'lab/cells', endpoint=tmp_path/'share')
    assert same(load_model(folder), average), 'the average is whole'

def test_last_weights_that_are_none(both):
    average,last,folder = both
    state = {k: v.clone() for k,v in last.state_dict().items()}
    state['encoder.cls_token'][:] = torch.nan
    with pytest.raises(ValueError, match='not finite'): save_model(average, folder, last=state)
    state.pop('encoder.cls_token')
    with pytest.raises(ValueError, match="last: 'encoder.cls_token' is missing"): save_model(average, folder, last=state)
    assert same(load_model(folder, average=False), last), 'the bundle before is still there'

def test_bundles_from_before(both):
    average,_,folder = both
    (folder/'last.safetensors').unlink()
    about = json.loads((folder/'config.json').read_text())
    for k in ('ema','sha256_last'): del about[k]
    (folder/'config.json').write_text(json.dumps(about))
    assert same(load_model(folder), average)
    with pytest.raises(ValueError, match='one set of weights'): load_model(folder, average=False)

def test_compiled_models_have_the_face_of_models():
    model = CAMAE(**sizes)
    face = as_encoder(torch.compile(nn.DataParallel(model)), channelwise=True)
    assert face.model is model and face.channels is None
