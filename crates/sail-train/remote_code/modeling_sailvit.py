"""SAILViT: AIMv2's vision transformer under its original weight names.

Written from the descriptions in the papers of AIMv2 (Fini et al. 2024, arXiv 2411.14402) and SAILViT
(Yin et al. 2025, arXiv 2507.01643): patches -> RMSNorm -> + learned positions; pre-norm blocks of
bidirectional attention and SwiGLU; final RMSNorm. There is no class token and no pooling head.
Computes what transformers' `Aimv2VisionModel` computes, and other resolutions too.

Dimension letters: n images, t tokens, d width, h and w the grid of patches.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_sailvit import SAILViTConfig


class SAILViTRMSNorm(nn.Module):
    """Divides by the root mean square in fp32, then multiplies by the weight in the input's type."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class SAILViTPatchifier(nn.Module):
    def __init__(self, config):
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.norm = SAILViTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, pixels_nchw):
        """`[n, c, h * patch, w * patch]` -> `[n, h * w, d]`, rows of the grid first."""
        return self.norm(self.proj(pixels_nchw).flatten(2).transpose(1, 2))


class SAILViTPreprocessor(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.side = config.image_size // config.patch_size
        self.patchifier = SAILViTPatchifier(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, config.hidden_size))

    def forward(self, pixels_nchw):
        height, width = pixels_nchw.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"pixels of {height} x {width} do not divide into patches of {self.patch_size}")
        return self.patchifier(pixels_nchw) + self.positions(height // self.patch_size, width // self.patch_size)

    def positions(self, h, w):
        """The position table, resampled in fp32 to a grid other than its own: `[1, h * w, d]`."""
        if (h, w) == (self.side, self.side):
            return self.pos_embed
        table = self.pos_embed.float().reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(h, w), mode="bicubic", align_corners=False, antialias=False)
        return table.permute(0, 2, 3, 1).reshape(1, h * w, -1).to(self.pos_embed.dtype)


class SAILViTAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width, bias=config.use_bias)
        self.proj_drop = nn.Dropout(config.projection_dropout)

    def forward(self, x_ntd):
        n, t, d = x_ntd.shape
        q, k, v = self.qkv(x_ntd).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(n, t, d)))


class SAILViTMLP(nn.Module):
    """SwiGLU: fc1 is the gate, fc3 the value, fc2 the way back."""

    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.fc1 = nn.Linear(width, inner, bias=config.use_bias)
        self.fc2 = nn.Linear(inner, width, bias=config.use_bias)
        self.fc3 = nn.Linear(width, inner, bias=config.use_bias)

    def forward(self, x_ntd):
        return self.fc2(F.silu(self.fc1(x_ntd)) * self.fc3(x_ntd))


class SAILViTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = SAILViTAttention(config)
        self.norm_1 = SAILViTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SAILViTMLP(config)
        self.norm_2 = SAILViTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_ntd):
        x_ntd = x_ntd + self.attn(self.norm_1(x_ntd))
        return x_ntd + self.mlp(self.norm_2(x_ntd))


class SAILViTTrunk(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(SAILViTBlock(config) for _ in range(config.num_hidden_layers))
        self.post_trunk_norm = SAILViTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_ntd):
        for block in self.blocks:
            x_ntd = block(x_ntd)
        return self.post_trunk_norm(x_ntd)


class SAILViTModel(PreTrainedModel):
    """Normalised pixels in, one feature per patch out."""

    config_class = SAILViTConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["SAILViTBlock"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.preprocessor = SAILViTPreprocessor(config)
        self.trunk = SAILViTTrunk(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.preprocessor.patchifier.proj

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SAILViTPreprocessor):
            nn.init.trunc_normal_(module.pos_embed, std=0.02)

    def forward(self, pixel_values):
        """`[n, 3, h * patch, w * patch]`, of any float type -> `last_hidden_state` `[n, h * w, d]`, rows
        of the grid first, after the final norm."""
        x_ntd = self.preprocessor(pixel_values.to(self.dtype))
        return BaseModelOutput(last_hidden_state=self.trunk(x_ntd))
