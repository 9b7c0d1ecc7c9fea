"The same models by others, and plain readings of how such models are usually written"
import copy, warnings

import torch
import torch.nn.functional as F
from torch import nn
from timm.models.vision_transformer import Block, ParallelScalingBlock

from cellmae.images import standardise
from cellmae.patching import patchify, patchify_channels


def shuffle(noise, ratio):
    "The usual bookkeeping of masks: two sorts, and a mask to multiply with"
    b,l = noise.shape
    keep = int(l*(1-ratio))
    ids = noise.argsort(1)
    back = ids.argsort(1)
    mask = torch.ones_like(noise)
    mask[:,:keep] = 0
    return ids[:,:keep], back, mask.gather(1, back)

def eager(model):
    "Attention as plain products that keep all scores, as in facebookresearch/mae"
    for m in model.modules():
        if hasattr(m, 'fused_attn'): m.fused_attn = False
    return model

def released_fourier(pred, target, mask, c):
    "Fourier loss the released way: all tokens, full spectra, then times the mask"
    b,l,p = target.shape
    s = round((l//c)**.5)
    amplitudes = lambda t: torch.fft.fft2(t.reshape(b, p*c, s, s)).abs()
    return (amplitudes(pred)-amplitudes(target)).abs().view(b,l,p).mean(-1).mul(mask).sum()/mask.sum()

def pick(x, ids): return x.gather(1, ids[...,None].expand(-1,-1,x.shape[-1]))


class Plain(nn.Module):
    "What both plain readings share: a strided convolution, all tokens embedded, then three quarters dropped"
    def __init__(self, ours, block, in_chans):
        super().__init__()
        c = ours.config
        d,p = c['embed_dim'],c['patch_size']
        self.p,self.ratio = p,c['mask_ratio']
        self.conv = nn.Conv2d(in_chans, d, p, p)
        self.cls = nn.Parameter(torch.zeros(1,1,d))
        self.blocks = nn.Sequential(*[block(d, c['num_heads']) for _ in range(c['depth'])])
        self.norm,self.proj = nn.LayerNorm(d, eps=1e-6) if c['final_norm'] else nn.Identity(),nn.Linear(d, ours.decoder.embed.out_features)
        self.mask_token = nn.Parameter(torch.zeros(1,1,ours.decoder.embed.out_features))
        self.register_buffer('pos', ours.enc_pos.clone()); self.register_buffer('dec_pos', ours.dec_pos.clone())

    def load(self, ours):
        "The weights of our model"
        e,d = ours.encoder,ours.decoder
        self.conv.weight.data = e.embed.weight.data.view(len(e.embed.weight), self.p, self.p, -1).permute(0,3,1,2).contiguous()
        self.conv.bias.data,self.cls.data,self.mask_token.data = e.embed.bias.data.clone(),e.cls_token.data.clone(),d.mask_token.data.clone()
        self.blocks.load_state_dict(e.blocks.state_dict()); self.norm.load_state_dict(e.norm.state_dict()); self.proj.load_state_dict(d.embed.state_dict())
        return self

    def encode(self, x):
        t = self.embed(standardise(x))
        z = self.norm(self.blocks(torch.cat([self.cls.expand(len(t),-1,-1), t], 1)))
        return z[:,1:].float().mean(1)

    def encode_visible(self, x, noise):
        t = self.embed(x)
        ids,back,mask = shuffle(noise, self.ratio)
        z = self.norm(self.blocks(torch.cat([self.cls.expand(len(t),-1,-1), pick(t, ids)], 1)))
        z = self.proj(z)
        gaps = self.mask_token.expand(len(z), back.shape[1]-ids.shape[1], -1).to(z.dtype)
        return z[:,:1],pick(torch.cat([z[:,1:], gaps], 1), back),mask


def parallel_block(d, heads): return ParallelScalingBlock(d, heads, qk_norm=True, init_values=1e-4)

class PlainMAE(Plain):
    "A MAE as it is usually written: timm's blocks, fused attention, a loss over all tokens times the mask"
    def __init__(self, ours):
        super().__init__(ours, parallel_block if ours.config['parallel'] else lambda d,h: Block(d, h, qkv_bias=True), ours.in_chans)
        d = ours.config['decoder']
        self.decoder = nn.Sequential(*[Block(d['embed_dim'], d['num_heads'], qkv_bias=True) for _ in range(d['depth'])])
        self.dec_norm,self.head = nn.LayerNorm(d['embed_dim'], eps=1e-6),nn.Linear(d['embed_dim'], ours.n_pixels)

    def load(self, ours):
        self.decoder.load_state_dict(ours.decoder.blocks.state_dict()); self.dec_norm.load_state_dict(ours.decoder.norm.state_dict()); self.head.load_state_dict(ours.decoder.head.state_dict())
        return super().load(ours)

    def embed(self, x): return self.conv(x).flatten(2).transpose(1,2) + self.pos
    def forward(self, x, noise):
        x = standardise(x)
        cls,t,mask = self.encode_visible(x, noise)
        pred = self.head(self.dec_norm(self.decoder(torch.cat([cls, t+self.dec_pos], 1))))[:,1:]
        return ((pred-patchify(x, self.p))**2).mean(-1).mul(mask).sum()/mask.sum()


class PlainCAMAE(Plain):
    "A plain reading of the released CA-MAE: channel after channel in the embedding and in the decoder"
    def __init__(self, ours):
        super().__init__(ours, parallel_block, 1)
        d = ours.config['decoder']['embed_dim']
        self.c,self.alpha = ours.in_chans,ours.alpha
        dec = ours.decoder
        for name in ('query_norm','context_norm','out_norm','cross','mlp','stacks','head'): setattr(self, name, copy.deepcopy(getattr(dec, name)))
        self.stacks = nn.ModuleList([nn.Sequential(*s) for s in self.stacks]) # timm's own choice of kernel
        self.channel_tokens = nn.Parameter(dec.channel_tokens.data.clone())

    def load(self, ours):
        for name in ('query_norm','context_norm','out_norm','cross','mlp','stacks','head'): getattr(self, name).load_state_dict(getattr(ours.decoder, name).state_dict())
        self.channel_tokens.data = ours.decoder.channel_tokens.data.clone()
        return super().load(ours)

    def embed(self, x): return torch.cat([self.conv(x[:,i:i+1]).flatten(2).transpose(1,2)+self.pos for i in range(x.shape[1])], 1)
    def attend(self, q, ctx):
        heads = lambda t: t.unflatten(-1, (self.cross.num_heads,-1)).transpose(1,2)
        k,v = self.cross.kv(ctx).chunk(2, -1)
        return self.cross.proj(F.scaled_dot_product_attention(heads(self.cross.q(q)), heads(k), heads(v)).transpose(1,2).flatten(2))

    def forward(self, x, noise):
        _,t,mask = self.encode_visible(standardise(x), noise)
        t = t + self.dec_pos.repeat(self.c, 1) + self.channel_tokens.repeat_interleave(len(self.dec_pos), 0)
        out = []
        for q,stack in zip(t.chunk(self.c, 1), self.stacks):
            z = self.attend(self.query_norm(q), self.context_norm(t))
            z = z + self.mlp(self.out_norm(z))
            out.append(stack(z))
        pred,target = self.head(torch.cat(out, 1)).float(),patchify_channels(standardise(x), self.p)
        mse = ((pred-target)**2).mean(-1).mul(mask).sum()/mask.sum()
        return (1-self.alpha)*mse + self.alpha*released_fourier(pred, target, mask, self.c)


class HFMAE(nn.Module):
    "transformers' ViTMAE at the sizes of our model"
    def __init__(self, ours):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
        c,d = ours.config,ours.config['decoder']
        self.net = ViTMAEForPreTraining(ViTMAEConfig(image_size=c['img_size'], patch_size=c['patch_size'], num_channels=ours.in_chans, hidden_size=c['embed_dim'], num_hidden_layers=c['depth'],
            num_attention_heads=c['num_heads'], intermediate_size=4*c['embed_dim'], decoder_hidden_size=d['embed_dim'], decoder_num_hidden_layers=d['depth'], decoder_num_attention_heads=d['num_heads'],
            decoder_intermediate_size=4*d['embed_dim'], mask_ratio=c['mask_ratio'], norm_pix_loss=False, hidden_dropout_prob=0., attention_probs_dropout_prob=0., layer_norm_eps=1e-6, attn_implementation='sdpa'))

    @torch.no_grad()
    def load(self, ours):
        "The weights of our model, standard blocks"
        plain,state = PlainMAE(ours).load(ours),self.net.state_dict()
        theirs = {'conv': 'vit.embeddings.patch_embeddings.projection', 'norm': 'vit.layernorm', 'proj': 'decoder.decoder_embed', 'dec_norm': 'decoder.decoder_norm', 'head': 'decoder.decoder_pred'}
        inner = {'norm1': 'layernorm_before', 'norm2': 'layernorm_after', 'attn.proj': 'attention.o_proj', 'mlp.fc1': 'mlp.fc1', 'mlp.fc2': 'mlp.fc2'}
        def copy_(a, b):
            for k in ('weight','bias'): state[f'{b}.{k}'].copy_(getattr(a, k))
        for k,v in theirs.items(): copy_(getattr(plain, k), v)
        for stack,name in ((plain.blocks, 'vit.layers'), (plain.decoder, 'decoder.decoder_layers')):
            for i,block in enumerate(stack):
                for k,v in inner.items(): copy_(block.get_submodule(k), f'{name}.{i}.{v}')
                for k in ('weight','bias'):
                    for n,w in zip('qkv', getattr(block.attn.qkv, k).chunk(3)): state[f'{name}.{i}.attention.{n}_proj.{k}'].copy_(w)
        for k,v in {'vit.embeddings.cls_token': plain.cls, 'decoder.mask_token': plain.mask_token}.items(): state[k].copy_(v)
        for k,v in {'vit.embeddings.position_embeddings': plain.pos, 'decoder.decoder_pos_embed': plain.dec_pos}.items(): state[k].zero_()[0,1:].copy_(v)
        return self

    def forward(self, x, noise): return self.net(standardise(x), noise=noise).loss
    def encode(self, x):
        self.net.vit.embeddings.config.mask_ratio = 0.
        return self.net.vit(standardise(x)).last_hidden_state[:,1:].float().mean(1)


class LightlyMAE(nn.Module):
    "lightly's MAE modules at the sizes of our model"
    def __init__(self, ours):
        super().__init__()
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer
        c,d = ours.config,ours.config['decoder']
        self.p,self.n,self.ratio = c['patch_size'],(c['img_size']//c['patch_size'])**2,c['mask_ratio']
        vit = VisionTransformer(img_size=c['img_size'], patch_size=self.p, in_chans=ours.in_chans, embed_dim=c['embed_dim'], depth=c['depth'], num_heads=c['num_heads'], num_classes=0)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        warnings.filterwarnings('ignore', 'MAEDecoderTIMM is deprecated')
        self.decoder = MAEDecoderTIMM(in_chans=ours.in_chans, num_patches=self.n, patch_size=self.p, embed_dim=c['embed_dim'], decoder_embed_dim=d['embed_dim'], decoder_depth=d['depth'], decoder_num_heads=d['num_heads'])

    @torch.no_grad()
    def load(self, ours):
        "The weights of our model, standard blocks"
        plain,vit = PlainMAE(ours).load(ours),self.backbone.vit
        for a,b in [('conv',vit.patch_embed.proj), ('blocks',vit.blocks), ('norm',vit.norm), ('proj',self.decoder.decoder_embed), ('decoder',self.decoder.decoder_blocks),
                    ('dec_norm',self.decoder.decoder_norm), ('head',self.decoder.decoder_pred)]: b.load_state_dict(getattr(plain, a).state_dict())
        vit.cls_token.copy_(plain.cls); self.decoder.mask_token.copy_(plain.mask_token)
        for pos,v in ((vit.pos_embed, plain.pos), (self.decoder.decoder_pos_embed, plain.dec_pos)): pos.requires_grad_(False).zero_()[0,1:].copy_(v)
        return self

    def forward(self, x, noise):
        from lightly.models import utils
        x = standardise(x)
        ids,_,mask = shuffle(noise, self.ratio)
        keep = torch.cat([torch.zeros_like(ids[:,:1]), ids+1], 1) # the class token is token 0
        hidden = noise.argsort(1)[:,ids.shape[1]:]
        z = self.decoder.embed(self.backbone.encode(images=x, idx_keep=keep))
        t = utils.set_at_index(utils.repeat_token(self.decoder.mask_token, (len(x), self.n+1)), keep, z.type_as(self.decoder.mask_token))
        pred = self.decoder.predict(utils.get_at_index(self.decoder.decode(t), hidden+1))
        return F.mse_loss(pred.float(), utils.get_at_index(utils.patchify(x, self.p), hidden))

    def encode(self, x): return self.backbone.encode(images=standardise(x))[:,1:].float().mean(1)
