"What no reader wants to see of the models: copies, compilation, odd shapes and types"
import copy, pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
import pytest, torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch._dynamo.utils import counters
from cellmae.blocks import compile_blocks, set_recompute
from cellmae.classifier import Classifier, batch_norms
from cellmae.imagenet import ImageNetEncoder
from cellmae.images import standardise
from cellmae.masking import part_of
from cellmae.patching import PatchEmbed, from_conv, patchify
from cellmae.vit import MAE
from cellmae.zoo import cost, create_model, list_models, load_model, save_model
from processes import all_well

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

# Random numbers by place, blocks computed twice, compiled blocks, some channels at a time

def with_masks(model, x, seed=0, part=None):
    "Output of a model with the random numbers of a seed, as part `(n,first)` of a batch or as all of it"
    torch.manual_seed(seed)
    with part_of(*(part or (len(x),0))): return model(x)

def step(model, x, cuts=(), bf16=False):
    "Loss and gradients of a batch that is computed in parts"
    model.zero_grad()
    ends,total = [0,*cuts,len(x)],0.
    for a,b in zip(ends, ends[1:]):
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16): loss = with_masks(model, x[a:b], part=(len(x),a)).loss*(b-a)/len(x)
        loss.backward()
        total += loss.item()
    return total,[p.grad.clone() for p in model.parameters()]

shapes = [dict(name=n, parallel=p, drop_path=.5) for n in names for p in (True,False)]

@pytest.mark.parametrize('kw', shapes)
@pytest.mark.parametrize('cuts', [(4,), (1,), (2,3,6)])
def test_parts_are_the_batch(kw, cuts):
    "Masks and skipped blocks of an image do not depend on how a batch is cut"
    model,x = make(**kw),images(7,3,16,16)
    (a,ga),(b,gb) = step(model, x),step(model, x, cuts)
    assert abs(a-b) < 1e-5
    for p,q in zip(ga, gb): torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('parallel', [True,False])
def test_drop_path_skips_and_keeps_the_mean(parallel):
    model = make(names[0], depth=4, drop_path=.6, parallel=parallel)
    [scales] = model.encoder.blocks.scales(torch.zeros(20_000,1))
    assert torch.allclose((scales==0).float().mean((1,2,3,4)), torch.tensor([0.,.2,.4,.6]), atol=.01)
    assert torch.allclose(scales.mean((1,2,3,4)), torch.ones(4), atol=.03)
    assert not torch.equal(scales[3,0], scales[3,1]) # each branch by itself
    assert model.eval().encoder.blocks.scales(torch.zeros(2,1)) == () == make(names[0], drop_path=0.).encoder.blocks.scales(torch.zeros(2,1))

def test_nothing_is_drawn_in_evaluation():
    model,x = make(names[0], drop_path=.9).eval(),images(2,3,16,16)
    before = torch.random.get_rng_state()
    with torch.no_grad(): assert torch.equal(model.encode(x), model.encode(x))
    assert torch.equal(before, torch.random.get_rng_state())

@pytest.mark.parametrize('kw,bf16', [*zip(shapes, cycle([False,True,True]))])
def test_recomputed_to_the_bit(kw, bf16):
    model,x = make(**kw),images(5,3,16,16)
    (a,ga) = step(model, x, (3,), bf16)
    set_recompute(model)
    (b,gb) = step(model, x, (3,), bf16)
    assert a == b and all(map(torch.equal, ga, gb))
    assert 'recompute' not in model.config and not [m for m in model.trim(1).modules() if getattr(m, 'recompute', False)]

def kept(model, x):
    "Bytes that a step keeps for its backward pass"
    sizes = {}
    def keep(t): sizes[t.untyped_storage()._cdata] = t.untyped_storage().nbytes(); return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): out = model(x)
    return sum(sizes.values())

@pytest.mark.parametrize('make_it', [lambda: make(names[0], depth=6), lambda: create_model('munet_m', in_chans=3, img_size=32, widths=(8,16), depth=4),
    lambda: Classifier(make(names[0], depth=6), 4, 8)])
def test_recompute_keeps_less_and_rests_in_evaluation(make_it):
    model,x = make_it(),images(4,3,32,32)
    whole = kept(model, x)
    set_recompute(model)
    assert kept(model, x) < .5*whole
    set_recompute(model, False)
    assert kept(model, x) == whole

def test_munet_recomputed_to_the_bit():
    model,x = create_model('munet_m', in_chans=2, img_size=32, widths=(8,16), depth=2),images(3,2,32,32)
    a,ga = step(model, x)
    set_recompute(model)
    b,gb = step(model, x)
    assert a == b and all(map(torch.equal, ga, gb))

@pytest.mark.parametrize('arch,kw', [('densenet121', dict(block_config=(2,2), growth_rate=8)), ('resnet18', dict(layers=(1,1,1,1), channels=(8,8,8,8))),
    ('vit_tiny_patch16_224', dict(depth=2, embed_dim=48, num_heads=2)), ('convnext_atto', dict(depths=(1,1,1,1), dims=(8,8,8,8)))])
def test_batch_norms_measure_once(arch, kw):
    "Weights, gradients and running statistics after two steps are those without recomputation"
    out = []
    for again in (False,True):
        torch.manual_seed(0)
        model,x = Classifier(ImageNetEncoder(arch, 3, 64, pretrained=False, **kw), 4, 8),images(6,3,64,64)
        if again: set_recompute(model); model = copy.deepcopy(model)
        for _ in range(2): torch.nn.functional.cross_entropy(model(x).logits, torch.arange(6)%4).backward()
        out.append([*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert all(m.track_running_stats for m in batch_norms(model))
    assert len(out[0]) == len(out[1]) and all(map(torch.equal, *out))

timms = dict(
    swin=('swin_tiny_patch4_window7_224', dict(embed_dim=8, depths=(1,1), num_heads=(1,2)), lambda z: z.mean((1,2)), None),
    mambaout=('mambaout_femto', dict(depths=(1,1,1,1), dims=(8,8,16,16)), lambda z: z.mean((1,2)), None),
    convnext=('convnext_atto', dict(depths=(1,1,1,1), dims=(8,8,8,16)), lambda z: z.mean((2,3)), None),
    resnet=('resnet18', dict(layers=(1,1,1,1), channels=(8,8,8,16)), lambda z: z.mean((2,3)), None),
    vit=('vit_tiny_patch16_224', dict(depth=1, embed_dim=16, num_heads=2), lambda z: z[:,1:].mean(1), lambda z: z[:,0]),
    registers=('vit_medium_patch16_reg4_gap_256', dict(depth=1, embed_dim=16, num_heads=2), lambda z: z[:,4:].mean(1), None),
    distilled=('deit_tiny_distilled_patch16_224', dict(depth=1, embed_dim=16, num_heads=2), lambda z: z[:,2:].mean(1), lambda z: z[:,0]),
    no_class=('vit_relpos_small_patch16_224', dict(depth=1, embed_dim=16, num_heads=2), lambda z: z.mean(1), None))

@pytest.mark.parametrize('arch,kw,mean,cls', timms.values(), ids=timms)
def test_places_of_networks_of_timm(arch, kw, mean, cls, tmp_path):
    "Maps with channels first or last, tokens behind none, one or some that stand for no place; for images of another size than timm's"
    torch.manual_seed(0)
    net,x = ImageNetEncoder(arch, 2, 64, pretrained=False, **kw).eval(),images(3,2,64,64)
    with torch.no_grad(): z,ours,both = net.net.forward_features(standardise(x)),net.encode(x),net.encode(x, 'meanstd')
    assert ours.shape == (3,16) and net.embed_dim == 16 and both.shape == (3,32)
    torch.testing.assert_close(ours, mean(z))
    torch.testing.assert_close(both[:,:16], mean(z))
    if cls: torch.testing.assert_close(net.encode(x, 'cls'), cls(z))
    else:
        with pytest.raises(ValueError, match='no class token'): net.encode(x, 'cls')
    again = load_model(save_model(net, tmp_path/'bundle'))
    with torch.no_grad(): assert torch.equal(again.encode(x), ours)

@pytest.mark.parametrize('arch,size', [('pit_ti_224',64), ('crossvit_tiny_240',240)])
def test_networks_without_places_are_refused(arch, size):
    net = ImageNetEncoder(arch, 3, size, pretrained=False).eval()
    with pytest.raises(ValueError, match='no features of single places.*another'), torch.no_grad(): net.encode(images(1,3,size,size))

def test_networks_of_timm_throw_no_dice():
    with pytest.raises(ValueError, match='drop_path_rate=0.1.*Leave it out'): ImageNetEncoder('vit_tiny_patch16_224', pretrained=False, drop_path_rate=.1)
    with pytest.raises(ValueError, match='feature maps'): ImageNetEncoder('resnet18', pretrained=False, features_only=True)
    net = ImageNetEncoder('mobilevitv2_050', 3, 64, pretrained=False).train() # a network whose makers left dice in it
    before = torch.random.get_rng_state()
    net.encode(images(2,3,64,64))
    assert torch.equal(before, torch.random.get_rng_state())

@pytest.fixture
def quick(monkeypatch):
    "Compile without making machine code: what is traced, how often and why is the same"
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='eager'))
    torch._dynamo.reset(); counters.clear()
    yield
    torch._dynamo.reset()

def embedded_in_threads(model, twin, x):
    "As `embed` calls a model"
    with torch.inference_mode(): whole = twin.encode(x)
    def some(i):
        with torch.inference_mode(): return model.encode(x[i:i+2+i%3])
    with ThreadPoolExecutor(2) as pool: out = list(pool.map(some, range(5)))
    for i,o in enumerate(out): torch.testing.assert_close(o, whole[i:i+2+i%3], atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('kw,bf16,again', [(shapes[0],False,False), (dict(shapes[1], energy=.5),True,True)])
def test_compiled_blocks(quick, kw, bf16, again):
    "Same losses; everything is compiled in the first steps, whatever the sizes of parts; no breaks"
    model,x = make(**kw),images(7,3,16,16)
    twin = copy.deepcopy(model)
    compile_blocks(model); set_recompute(model, again)
    graphs = []
    for cuts in [(3,), (2,)] if again else [(1,), (2,)]:
        (a,ga),(b,gb) = step(model, x, cuts, bf16),step(twin, x, cuts, bf16)
        assert abs(a-b) < (1e-3 if bf16 else 1e-5)
        if not bf16: [torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-3) for p,q in zip(ga, gb)]
        model.eval(); twin.eval()
        with torch.no_grad(): assert abs(with_masks(model, x[:4]).loss-with_masks(twin, x[:4]).loss) < 1e-5
        if not again: embedded_in_threads(model, twin, x)
        model.train(); twin.train()
        graphs.append(counters['stats']['unique_graphs'])
    assert not counters['graph_break'] and graphs[0] == graphs[-1] <= 12
    assert model.state_dict().keys() == twin.state_dict().keys()
    for o in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))): assert abs(with_masks(o, x).loss-with_masks(twin, x).loss) < 1e-5
    compile_blocks(model, False)
    assert with_masks(model, x).loss == with_masks(twin, x).loss

def test_what_cannot_be_compiled_says_so(monkeypatch):
    with pytest.raises(ValueError, match='no transformer blocks'): compile_blocks(create_model('munet_m', in_chans=2, img_size=32, widths=(8,16), depth=1))
    with pytest.raises(ValueError, match='no transformer blocks'): compile_blocks(ImageNetEncoder('resnet18', pretrained=False))
    def fails(*a, **k): raise RuntimeError('No working C++ compiler found')
    monkeypatch.setattr(torch, 'compile', lambda f, **kw: fails)
    with pytest.raises(RuntimeError, match=r'No working.*g\+\+.*leave out `compile`'): compile_blocks(make(names[0]))
    with pytest.raises(ValueError, match='nothing|no blocks'): set_recompute(torch.nn.Linear(2,2))

@pytest.mark.parametrize('name', ['camae_vitt8','camae_vitt8_shared'])
def test_some_channels_at_a_time(name):
    "Each step has channels of its own, the same in all parts; every weight has a gradient in each, and learns over some"
    model,x = make(name, few_channels=1, drop_path=.3),images(4,3,16,16)
    moved,sizes = [0]*len(list(model.parameters())),set()
    for seed in range(8):
        out = with_masks(model, x, seed)
        sizes.add(out.pred.shape[1])
        out.loss.backward()
        with torch.no_grad(): a,b = [with_masks(model, x[s], seed, (4,s.start)) for s in (slice(0,1),slice(1,4))]
        assert torch.equal(torch.cat([a.mask, b.mask]), out.mask) and abs(a.loss/4+b.loss*3/4-out.loss) < 1e-5
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        moved = [m+p.grad.abs().sum() for m,p in zip(moved, model.parameters())]
        model.zero_grad()
    assert sizes == {16,32,48} and all(m > 0 for m in moved)
    model.eval()
    for c in (1,2,5): assert model.encode(images(2,c,16,16)).isfinite().all()
    assert cost(model, 16)['tokens'] == 48
    assert type(model)(**model.config).few_channels == 1

def share(out, rank):
    "Gradients of steps of two processes, each with half of the images"
    dist.init_process_group('gloo')
    model,x,grads = DistributedDataParallel(make('camae_vitt8', few_channels=2)),images(4,3,16,16),[]
    for seed in range(4):
        model.zero_grad()
        with_masks(model, x[2*rank:2*rank+2], seed, (4,2*rank)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.save(grads, out/f'{rank}.pth')
    dist.destroy_process_group()

def test_some_channels_in_two_processes(tmp_path):
    "Decoders of channels that rest in a step keep no process waiting, and all have the channels of one"
    all_well(2, share, tmp_path)
    model,x,resting = make('camae_vitt8', few_channels=2),images(4,3,16,16),0
    for seed,*both in zip(range(4), *(torch.load(tmp_path/f'{r}.pth') for r in range(2))):
        model.zero_grad()
        with_masks(model, x, seed).loss.backward()
        for p,a,b in zip(model.parameters(), *both):
            torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)
            assert torch.equal(a, b)
        resting += any(not p.grad.any() for p in model.decoder.stacks.parameters())
    assert 0 < resting < 4, 'steps with two channels, and with all'

def test_habits_of_timm():
    for word,answer in dict(pretrained='pull_model', features_only='features', num_classes='Classifier', drop_path_rate='drop_path').items():
        with pytest.raises(TypeError, match=answer): create_model('mae_vitt8', **{word: True})
    assert list_models('camae*') and all(n.startswith('camae') for n in list_models('camae*'))
