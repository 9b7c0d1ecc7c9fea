"ONNX files of all kinds of encoders, opened by onnxruntime, against their models; bundles of an average and the last step"
import json, shutil
from functools import partial
from types import SimpleNamespace

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
net = dict(in_chans=2, img_size=32, pretrained=False)
kinds = dict(
    munet=lambda: MUNet(img_size=16, patch_size=4, in_chans=2, widths=(8,8), depth=1),
    vit=lambda: ImageNetEncoder('vit_tiny_patch16_224', **net, depth=1, embed_dim=24, num_heads=2),
    neck=lambda: Classifier(ImageNetEncoder('densenet121', **net, growth_rate=4, block_config=(1,1)), 3, 8))

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

hows = dict(munet=dict(pool='meanstd'), vit=dict(pool='cls'), neck={})

@needs_onnx
@pytest.mark.parametrize('kind', kinds)
def test_a_file_embeds_as_its_model(kind, tmp_path):
    model,how = make(kind).train(),hows[kind]
    encoder = open_onnx(to_onnx(model, tmp_path/'encoder.onnx', **how))
    assert model.training and [o.name for o in tmp_path.iterdir()] == ['encoder.onnx'], 'the model is as it was, and nothing lies around'
    step = 4 if kind=='munet' else 16
    for b,h,w in ((1,2,3), (2,4,2), (7,2,5)): assert differ(encoder, model, images(b, 2, h*step, w*step), **how) < 1e-5, (b,h,w)
    face = as_encoder(model)
    assert (encoder.name,encoder.weights,encoder.size,encoder.channels) == (face.name,face.weights,face.size,face.channels)

@needs_onnx
def test_what_any_program_reads(tmp_path, monkeypatch):
    "Of a wrapped model with a decoder, whose weights do not fit into a file"
    import onnx, onnx_ir, onnxruntime
    monkeypatch.setattr(room, 'LARGEST', 1000)
    save_model(CAMAE(**dict(sizes, depth=2), max_chans=5).trim(1), tmp_path/'run', z='max')
    model = load_model(tmp_path/'run')
    model.set_objective(energy=.5) # of which nothing is to be seen
    for m in model.encoder.blocks: m.compile()
    set_attention(model, False)
    path = to_onnx(torch.compile(nn.DataParallel(model)), tmp_path/'a.onnx', channelwise=True)
    set_attention(model, True)
    for m in model.encoder.blocks: m._compiled_call_impl = None
    session = onnxruntime.InferenceSession(path)
    about = session.get_modelmeta().custom_metadata_map
    assert about['channels'] == 'null' and about['pool'] == 'mean' and about['weights'] == as_encoder(model).weights
    takes,gives = session.get_inputs()[0],session.get_outputs()[0]
    assert (takes.name,takes.type,takes.shape) == ('images','tensor(uint8)',['batch','channels','4*rows','4*columns'])
    assert (gives.name,gives.type,gives.shape[0]) == ('embeddings','tensor(float)','batch')
    onnx.checker.check_model(path, full_check=True)
    opened = onnx.load(path)
    assert opened.opset_import[0].version == room.OPSET and not any('decoder' in o.name for o in opened.graph.initializer)
    # the file travels with its weights
    moved = tmp_path/'moved'; moved.mkdir()
    beside = f'a.onnx.{as_encoder(model).weights}'
    assert sorted(o.name for o in tmp_path.iterdir()) == ['a.onnx',beside,'moved','run']
    for o in ('a.onnx',beside): (tmp_path/o).rename(moved/o)
    encoder = open_onnx(moved/'a.onnx')
    assert encoder.about == dict(z='max') and encoder.channelwise and encoder.channels is None
    for b,c in ((1,1), (3,3), (2,5)): assert differ(encoder, model, images(b,c,16,8), channelwise=True) < 1e-5
    # a program that differs from its model gets no name
    program,other = SimpleNamespace(model=onnx_ir.load(moved/'a.onnx')),room._Embedding(model, pool='meanstd')
    path.write_text('the old one')
    with pytest.raises(RuntimeError, match='differs from the model by'):
        room._write(program, path, 'f00', partial(room._check_file, embedding=other, x=images(1,2,16,16)))
    assert path.read_text() == 'the old one' and sorted(o.name for o in tmp_path.iterdir()) == ['a.onnx','moved','run']
    (moved/beside).unlink()
    with pytest.raises(ValueError, match='a.onnx is damaged'): open_onnx(moved/'a.onnx')

@needs_onnx
def test_a_network_of_one_size(tmp_path):
    model = ImageNetEncoder('swin_tiny_patch4_window7_224', **net, embed_dim=16, depths=(1,), num_heads=(2,))
    with pytest.warns(UserWarning, match='32x32 pixels only'): file = to_onnx(model, tmp_path/'a.onnx')
    encoder = open_onnx(file)
    assert differ(encoder, model, images(3,2,32,32)) < 1e-5
    with pytest.raises(ValueError, match=r'\(batch,2,32,32\), not \(1, 2, 64, 64\)'): encoder.encode(images(1,2,64,64))

@needs_onnx
@pytest.mark.parametrize('content,words', [(b'', 'damaged'), (b'no file of ours'*9, 'damaged'), (None, 'does not exist')])
def test_files_that_are_none(content, words, tmp_path):
    if content is not None: (tmp_path/'a.onnx').write_bytes(content)
    with pytest.raises((ValueError,FileNotFoundError), match=words): open_onnx(tmp_path/'a.onnx')

def test_without_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(room, 'find_spec', lambda name: name=='onnx' or None)
    with pytest.raises(ImportError, match='pip install onnxscript onnxruntime$'): to_onnx(MAE(**sizes), tmp_path/'a.onnx')
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
