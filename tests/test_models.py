"What no reader wants to see of the models: copies, compilation, odd shapes and types"
import copy, pickle
import pytest, torch
from cellmae.images import standardise
from cellmae.patching import PatchEmbed, from_conv, patchify
from cellmae.vit import MAE
from cellmae.zoo import create_model, list_models

names = [n for n in list_models() if 'vitt8' in n]
small = dict(img_size=16, in_chans=3, embed_dim=32, depth=2, num_heads=2, patch_size=4, decoder=dict(embed_dim=32, depth=1, num_heads=4))

def make(name, **kw):
    torch.manual_seed(0)
    return create_model(name, **{**small, **kw})

def images(*shape, seed=0): return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

@pytest.fixture(params=names)
def name(request): return request.param

def test_every_weight_learns(name):
    model = make(name)
    model(images(4,3,16,16)).loss.backward()
    assert not [k for k,p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]

def test_same_loss_in_float_and_bytes(name):
    model,x = make(name),images(2,3,16,16)
    noise = torch.rand(model.tokens(x).shape[:2])
    assert torch.equal(model(x, noise).loss, model(x.float(), noise).loss)

@pytest.mark.parametrize('h,w', [(16,24), (8,16), (32,4)])
def test_other_sizes_than_in_training(name, h, w):
    model,x = make(name),images(2,3,h,w)
    out = model(x)
    torch.testing.assert_close(model.images(out.target, h, w), standardise(x))
    assert model.encode(x).shape == (2,32) and torch.isfinite(out.loss)

def test_size_of_training_is_a_label(name):
    "Weights trained at one crop size give the same embedding in a model made for another"
    a,b = make(name).eval(),make(name, img_size=24).eval()
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        for x in (images(2,3,16,16), images(2,3,24,24)): torch.testing.assert_close(a.encode(x), b.encode(x), atol=1e-6, rtol=0)

def test_copies_are_equal_and_apart(name):
    model = make(name).eval()
    x = images(2,3,16,16)
    noise = torch.rand(model.tokens(x).shape[:2])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad(): assert torch.equal(model(x, noise).pred, twin(x, noise).pred)
        assert twin.encoder.cls_token.data_ptr() != model.encoder.cls_token.data_ptr()

def test_inference_mode_leaves_no_trace(name):
    model = make(name)
    with torch.inference_mode(): model(images(2,3,16,24)); model.encode(images(2,3,24,24))
    model(images(2,3,16,24)).loss.backward()

def test_no_breaks_in_the_graph(name):
    "torch.compile sees one graph: no prints, no values read back, no data-dependent branches"
    model,x = make(name, local=False),images(2,3,16,16)
    noise = torch.rand(model.tokens(x).shape[:2])
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x, noise).loss, model(x, noise).loss)

def test_low_precision_stays_close(name):
    model,x = make(name),images(4,3,16,16)
    noise = torch.rand(model.tokens(x).shape[:2])
    ref = model(x, noise)
    with torch.autocast('cpu', dtype=torch.bfloat16): low = model(x, noise)
    low.loss.backward()
    assert low.loss.dtype == torch.float32 and abs(low.loss-ref.loss) < .02
    half = copy.deepcopy(model).bfloat16().eval()
    with torch.no_grad(): assert torch.cosine_similarity(half.encode(x), model.eval().encode(x)).min() > .999

@pytest.mark.parametrize('c,p', [(1,16), (3,16), (4,16), (6,16), (8,8), (12,24)])
def test_patches_in_bfloat16(c, p):
    "The matrix product is right where a strided convolution may be off by more than its own size (CPUs with AMX)"
    conv,x = torch.nn.Conv2d(c, 64, p, p),torch.randn(2,c,2*p,3*p)
    emb = PatchEmbed(p*p*c, 64)
    with torch.no_grad(): emb.weight.copy_(from_conv(conv.weight)); emb.bias.copy_(conv.bias)
    exact = conv(x).flatten(2).transpose(1,2)
    with torch.autocast('cpu', dtype=torch.bfloat16): ours,theirs = emb(patchify(x, p)),conv(x).flatten(2).transpose(1,2)
    error = lambda low: ((low.float()-exact).norm()/exact.norm()).item()
    assert error(ours) < .01
    if error(theirs) < .01: pytest.skip('this CPU gets the convolution right')
    assert error(theirs) > .5

def test_no_quadratic_memory(name):
    "On long sequences no tensor of all pairs of tokens is kept for the backward pass"
    model,x = make(name, embed_dim=16, depth=1, decoder=dict(embed_dim=16, depth=1, num_heads=4)),images(1,3,128,128)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t): model(x)
    l = model.tokens(x).shape[1]
    assert l >= 1024 and max(kept) < l*l/8

def test_blank_channel_is_no_nan(name):
    x = images(2,3,16,16)
    x[:,1] = 7
    model = make(name)
    out = model(x)
    out.loss.backward()
    assert torch.isfinite(out.loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.isfinite(model.encode(x, pool='meanstd')).all()

def test_shared_decoder_in_any_channel_order():
    "Training itself does not depend on the order of channels"
    model,x,perm = make('camae_vitt8_shared'),images(2,4,16,16),[2,0,3,1]
    noise = torch.rand(2,4,16)
    a,b = model(x, noise.flatten(1)),model(x[:,perm], noise[:,perm].flatten(1))
    torch.testing.assert_close(a.loss, b.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.pred.unflatten(1, (4,16))[:,perm], b.pred.unflatten(1, (4,16)), atol=1e-5, rtol=0)

def test_shared_decoder_with_a_hidden_channel():
    from cellmae.masking import hide_channels
    model = make('camae_vitt8_shared')
    out = model(images(2,3,16,16), hide_channels(torch.rand(2,48), [1], 3))
    out.loss.backward()
    assert out.mask.view(2,3,16)[:,1].all() and torch.isfinite(out.loss)

@pytest.mark.parametrize('masking', ['joint', 'same', 'channel', 'block'])
def test_every_mask_trains(masking):
    model = make('camae_vitt8_shared', masking=masking)
    out = model(images(4,3,16,16))
    out.loss.backward()
    assert (out.mask.sum(1)==36).all() and torch.isfinite(out.loss)
    if masking == 'same': assert (out.mask.view(4,3,16) == out.mask.view(4,3,16)[:,:1]).all()

def test_unknown_mask_is_refused():
    with pytest.raises(ValueError, match='joint, same, channel, block'): MAE(masking='rows')
    with pytest.raises(ValueError, match='channel-agnostic'): make('mae_vitt8', masking='channel')(images(1,3,16,16))

@pytest.mark.parametrize('kw', [dict(masking='block'), dict(norm_pix=True), dict(fourier='image', alpha=.1), dict(parallel=False)])
def test_options_have_no_breaks_in_the_graph(kw):
    model,x = make('mae_vitt8', local=False, **kw),images(2,3,16,16)
    noise = torch.rand(model.tokens(x).shape[:2])
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x, noise).loss, model(x, noise).loss)

@pytest.mark.parametrize('c,h,w', [(3,16,16), (2,32,16)])
def test_munet_any_size(c, h, w):
    model,x = create_model('munet_m', in_chans=c, widths=(8,16,32), depth=1, patch_size=4, img_size=16),images(2,c,h,w)
    out = model(x)
    out.loss.backward()
    torch.testing.assert_close(model.images(out.target, h, w), standardise(x))
    assert not [k for k,p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert model.encode(x).shape == (2,32)

def test_every_name_builds_without_memory():
    "On the meta device, ViT-G/8 too"
    with torch.device('meta'):
        for n in list_models():
            kw = dict(pretrained=False) if 'imagenet' in n else {}
            assert all(p.is_meta for p in create_model(n, **kw).parameters())
