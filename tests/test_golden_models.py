"""Agreement of the models with the released code: check values of small weights, and of the full-size architecture with computed weights."""
import json, os, pickle
from pathlib import Path
import numpy as np, pytest, torch
from safetensors.torch import load_file
from cellmae.fourier import fourier_loss, masked_mean, pixel_loss
from cellmae.masking import random_mask
from cellmae.cavit import MultiDecoder
from cellmae.released import _released_keys, load_released

def golden_folder():
    "Folder of check values: CELLMAE_GOLDEN, or `golden` beside CELLMAE_DATA"
    if 'CELLMAE_GOLDEN' in os.environ: return Path(os.environ['CELLMAE_GOLDEN'])
    return Path(os.environ['CELLMAE_DATA']).parent/'golden' if 'CELLMAE_DATA' in os.environ else None

golden = golden_folder()
needs_golden = pytest.mark.skipif(golden is None or not golden.is_dir(), reason='set CELLMAE_GOLDEN to the folder of check values')
close = lambda a,b: torch.testing.assert_close(a, b, atol=1e-4, rtol=0, check_dtype=False)

@pytest.fixture(params=['camae_p16','mae_p8'])
def case(request):
    cfg,io = json.loads((golden/f'{request.param}.json').read_text()),load_file(golden/f'{request.param}.io.safetensors')
    cfg['decoder']['norm_eps'] = 1e-6
    return load_released(golden/f'{request.param}.weights.safetensors', cfg, bias='fixed'),cfg,io

@needs_golden
@torch.no_grad()
def test_training_forward(case):
    model,cfg,io = case
    out = model(io['images'], io['noise'])
    for ours,theirs in [(out.target,'target'), (out.mask,'mask'), (out.ids_restore,'ids_restore'), (out.latent,'latent'), (out.pred,'reconstruction')]: close(ours, io[theirs])
    mse,fourier = pixel_loss(out.pred, out.target),fourier_loss(out.pred, out.target, model.patch_size)
    close(mse, io['mse_per_token']); close(fourier, io['fourier_per_token'])
    for ours,theirs in [(masked_mean(mse, out.mask),'loss_l2'), (out.parts['mse'],'loss_l2'), (masked_mean(fourier, out.mask),'loss_fourier'),
                        (out.parts['fourier'],'loss_fourier'), (out.loss,'loss_total')]: assert abs(ours.item()-cfg[theirs]) < 1e-4

@needs_golden
@torch.no_grad()
def test_embedding(case):
    model,cfg,io = case
    close(model.features(io['images']), io['features'])
    close(model.encode(io['images']), io['pooled'])
    close(model.encode(io['images'], pool='cls'), io['features'][:,0])
    close(model.latent(io['images'], random_mask(io['noise']).ids_keep), io['latent'])
    if 'channelwise' in io: close(model.encode(io['images'], channelwise=True), io['channelwise'])
    for k in [k for k in io if k.startswith('pooled_channels_')]:
        close(model.encode(io['images'][:,[int(i) for i in k.split('_')[2:]]]), io[k])

@needs_golden
def test_any_container(tmp_path):
    "The released file calls itself safetensors and is a pickle around {'state_dict': ...}"
    state,x = load_file(golden/'camae_p16.weights.safetensors'),load_file(golden/'camae_p16.io.safetensors')['images']
    cfg = json.loads((golden/'camae_p16.json').read_text())
    torch.save({'state_dict': state}, tmp_path/'model.safetensors')
    a,b = [load_released(w, cfg, bias='fixed').encode(x) for w in (tmp_path/'model.safetensors', state)]
    assert torch.equal(a, b)

# Weights computed from integers, so that the full-size architecture can be checked without a file

def computed(k, shape, offset=0., scale=1.):
    "Tensor number `k` of the portable recipe: `offset + scale*v`, `v` in `[-.5,.5)`"
    i = np.arange(int(np.prod(shape)), dtype=np.int64)
    v = ((7919*i + 104729*k) % 2003)/2003 - .5
    return torch.from_numpy((offset+scale*v).astype(np.float32)).view(*shape)

def computed_state(shapes):
    "Weights by the recipe for `{key: shape}`; keys with shape None only count"
    out = {}
    for k,key in enumerate(sorted(shapes)):
        if shapes[key] is None: continue
        offset,scale = (1,.2) if 'norm' in key and key.endswith('weight') else (.5,.2) if key.endswith('ls.gamma') else (0,.1)
        out[key] = computed(k, shapes[key], offset, scale)
    return out

def block_shapes(prefix, d):
    "Keys and shapes of a standard block"
    return {prefix+k: s for k,s in {'norm1.weight':(d,), 'norm1.bias':(d,), 'norm2.weight':(d,), 'norm2.bias':(d,), 'attn.qkv.weight':(3*d,d), 'attn.qkv.bias':(3*d,),
            'attn.proj.weight':(d,d), 'attn.proj.bias':(d,), 'mlp.fc1.weight':(4*d,d), 'mlp.fc1.bias':(4*d,), 'mlp.fc2.weight':(d,4*d), 'mlp.fc2.bias':(d,)}.items()}

def camae_decoder_shapes(d, chans, depth, prefix=''):
    shapes = {'mask_token':(1,1,d), 'placeholder':None, 'pos_embeddings':None, 'cross_attention.q.weight':(d,d), 'cross_attention.kv.weight':(2*d,d),
              'cross_attention.proj.weight':(d,d), 'cross_attention.proj.bias':(d,), 'mlp.fc1.weight':(4*d,d), 'mlp.fc1.bias':(4*d,), 'mlp.fc2.weight':(d,4*d), 'mlp.fc2.bias':(d,)}
    for n in ('context_norm','query_norm','out_norm'): shapes |= {f'{n}.weight':(d,), f'{n}.bias':(d,)}
    for c in range(chans):
        shapes[f'modality_tokens.{c}'] = (1,1,d)
        for i in range(depth): shapes |= block_shapes(f'decoders.{c}.{i}.', d)
    return {prefix+k: s for k,s in shapes.items()}

def openphenom_shapes(d=384, depth=12, dec=512, dec_depth=8, chans=6):
    v = 'encoder.vit_backbone.'
    shapes = {v+'cls_token':(1,1,d), v+'pos_embed':None, v+'patch_embed.proj.weight':(d,1,16,16), v+'patch_embed.proj.bias':(d,), v+'fc_norm.weight':(d,), v+'fc_norm.bias':(d,),
              'encoder_decoder_proj.weight':(dec,d), 'encoder_decoder_proj.bias':(dec,), 'decoder_pred.weight':(256,dec), 'decoder_pred.bias':(256,)}
    for i in range(depth):
        shapes |= {f'{v}blocks.{i}.{k}': s for k,s in {'in_norm.weight':(d,), 'in_norm.bias':(d,), 'in_proj.weight':(7*d,d), 'mlp_bias':(4*d,), 'q_norm.weight':(64,), 'q_norm.bias':(64,),
                   'k_norm.weight':(64,), 'k_norm.bias':(64,), 'attn_out_proj.weight':(d,d), 'attn_out_proj.bias':(d,), 'mlp_out_proj.weight':(d,4*d), 'mlp_out_proj.bias':(d,), 'ls.gamma':(d,)}.items()}
    return shapes | camae_decoder_shapes(dec, chans, dec_depth, 'decoder.')

def test_layout_of_openphenom():
    shapes = openphenom_shapes()
    assert len(shapes) == 765
    positions = 2817*384 + 1537*512
    assert sum(int(np.prod(s)) for s in shapes.values() if s) + positions + 512 == 178_045_568

def computed_image():
    b,c,h,w = np.ogrid[:2,:6,:256,:256]
    x = (31*b + 57*c + 13*h + 7*w + (h*w)%17) % 256
    assert x.sum() == 100_264_960
    return torch.from_numpy(x.astype(np.uint8))

def computed_noise(): return torch.from_numpy(((7919*np.arange(1536)[None] + 101*np.arange(2)[:,None]) % 1543)/1543)

expected = dict(legacy=dict(features=(.429129,1.157902), pooled=(-.39827,-.75475,-.43111,2.16097,.62877), channelwise=(-.39262,-.74455,-.42701,2.16119,.6302), five=(-.40195,-.75305,-.42793,2.16186,.62713), latent=.429283),
                fixed=dict(features=(.435540,1.850193), pooled=(-1.69446,-.66645,2.3385,-1.47987,-.88664), channelwise=(-1.68911,-.65502,2.34108,-1.48041,-.8843), five=(-1.69797,-.66503,2.34102,-1.47819,-.88867), latent=.435299))

@pytest.mark.parametrize('bias', ['legacy','fixed'])
@torch.no_grad()
def test_full_size_encoder(bias):
    "The encoder of OpenPhenom in both bias layouts; its decoder is cut to one block to save time"
    shapes = openphenom_shapes()
    state = computed_state({k: s if not k.startswith('decoder.') else None for k,s in shapes.items()})
    state |= {k: torch.zeros(s) for k,s in openphenom_shapes(dec_depth=1).items() if s and k.startswith('decoder.')}
    model = load_released(state, bias=bias)
    x,want = computed_image(),expected[bias]
    z = model.features(x)
    approx = lambda v,w,eps=2e-4: np.testing.assert_allclose(v, w, atol=eps)
    approx([z.mean(), z.std()], want['features'])
    approx(z[:,1:].mean(1)[0,:5], want['pooled'])
    approx(z[0,1:257].mean(0)[:5], want['channelwise'])
    approx(model.encode(x[:1,:5])[0,:5], want['five'])
    latent = model.latent(x, random_mask(computed_noise()).ids_keep)
    assert latent.shape == (2,385,384)
    approx(latent.mean(), want['latent'])

@pytest.mark.skipif('CELLMAE_SLOW' not in os.environ, reason='set CELLMAE_SLOW=1 for the full-size decoder (0.7 GB of weights)')
@pytest.mark.parametrize('bias,recon,loss,fourier,mix', [('legacy',(-.007240,1.771621),4.146305,14.776690,4.252609), ('fixed',(-.007368,1.771766),4.147543,14.779103,4.253859)])
@torch.no_grad()
def test_full_size_loss(bias, recon, loss, fourier, mix):
    model = load_released(computed_state(openphenom_shapes()), bias=bias)
    out = model(computed_image(), computed_noise())
    np.testing.assert_allclose([out.pred.mean(), out.pred.std()], recon, atol=1e-4)
    assert out.mask.sum() == 2304 and ''.join(str(int(m)) for m in out.mask[0,:16]) == '0011111100111111'
    assert out.ids_restore[0,:8].tolist() == [0,203,406,609,812,1015,1218,1421]
    np.testing.assert_allclose([out.parts['mse'], out.parts['fourier'], out.loss], [loss,fourier,mix], atol=5e-4)

def test_parallel_block():
    "A tiny encoder block in both bias layouts"
    from timm.models.vision_transformer import ParallelScalingBlock
    shapes = {k: tuple(v.shape) for k,v in ParallelScalingBlock(8, 2, qk_norm=True, init_values=1.).state_dict().items()}
    state,x = computed_state(shapes),computed(5, (1,3,8), scale=4.)
    legacy = dict(state, **{'in_proj.bias': torch.cat([torch.zeros(24), state['mlp_bias']])})
    del legacy['mlp_bias']
    for weights,want in [(legacy, [-.29261,-.435119,-.626165,-.798385,-1.009408,-1.198395,-1.391851,-1.584641]),
                         (state, [-.294874,-.43181,-.62726,-.806495,-1.010495,-1.198189,-1.396291,-1.584098])]:
        block = ParallelScalingBlock(8, 2, qk_norm=True, init_values=1., qkv_bias='mlp_bias' not in weights)
        block.load_state_dict(weights)
        np.testing.assert_allclose(block(x)[0,0].detach(), want, atol=1e-4)

def test_channel_decoder():
    "A tiny decoder of two channels with four tokens each"
    from cellmae.masking import Mask
    from cellmae.patching import sincos_positions
    state = {'decoder.'+k: v for k,v in computed_state(camae_decoder_shapes(16, 2, 1)).items()}
    dec = MultiDecoder(16, 4, 2, embed_dim=16, depth=1, num_heads=4)
    dec.embed,dec.head = torch.nn.Identity(),torch.nn.Identity()
    dec.load_state_dict({k[len('decoder.'):]: v for k,v in _released_keys(state, 'fixed').items()})
    x,restore = computed(9, (1,3,16), scale=4.),torch.tensor([[4,0,7,2,5,1,6,3]])
    mask = Mask(None, restore, (restore>=2).float(), None)
    out = dec(x, mask, sincos_positions(16,2,2), 2)
    assert abs((out.sum()+x[:,0].sum()).item()+3.374258) < 1e-3 # the released one carries the class token along untouched
    np.testing.assert_allclose(out[0,0,:4].detach(), [.01485,.06538,.02911,.04147], atol=1e-4)
    np.testing.assert_allclose(out[0,7,:4].detach(), [.0068,.03091,.03088,.05774], atol=1e-4)

def test_plain_decoder():
    "A tiny decoder of all channels with four tokens"
    from cellmae.masking import Mask
    from cellmae.patching import sincos_positions
    from cellmae.vit import Decoder
    state = computed_state({'mask_token':(1,1,16), 'pos_embeddings':None, 'norm.weight':(16,), 'norm.bias':(16,)} | block_shapes('blocks.0.', 16))
    dec = Decoder(16, 4, embed_dim=16, depth=1, num_heads=4)
    dec.embed,dec.head = torch.nn.Identity(),torch.nn.Identity()
    dec.load_state_dict(state)
    x,restore = computed(9, (1,3,16), scale=4.),torch.tensor([[2,0,3,1]])
    rows = []
    dec.blocks.register_forward_hook(lambda m,i,o: rows.append(dec.norm(o))) # with the class token, which the decoder drops
    out = dec(x, Mask(None, restore, (restore>=2).float(), None), sincos_positions(16,2,2), 2)
    assert abs(rows[0].sum().item()+.881615) < 1e-3
    np.testing.assert_allclose(out[0,0,:4].detach(), [-.97775,-.99399,-.98604,-.93701], atol=1e-4)

def test_pickled_code_is_refused(tmp_path):
    "A file of weights may hold tensors and nothing that runs"
    class Evil:
        def __reduce__(self): return exec, (f"open({str(tmp_path/'ran')!r}, 'w')",)
    torch.save({'state_dict': {'x': Evil()}}, tmp_path/'model.safetensors')
    with pytest.raises(pickle.UnpicklingError): load_released(tmp_path/'model.safetensors')
    assert not (tmp_path/'ran').exists()
