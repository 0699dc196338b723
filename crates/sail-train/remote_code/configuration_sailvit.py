"""Configuration of SAILViT, a vision transformer refined inside a multimodal language model.

SAILViT (Yin et al. 2025, arXiv 2507.01643) keeps the architecture of AIMv2 (Fini et al. 2024), whose
original names its weights have. The keys are those of the published SAILViT `config.json`.
"""

from transformers import PretrainedConfig


class SAILViTConfig(PretrainedConfig):
    """Defaults are SAILViT-Huge at 448 x 448 pixels.

    `image_size` is the side in pixels of the square images that the position table was made for.
    `qkv_bias` is the bias of the attention's input projection; `use_bias` that of its output projection
    and of the MLP. `projection_dropout` follows the attention's output projection, in training only.
    """

    model_type = "sailvit"

    def __init__(
        self,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=12,
        num_channels=3,
        image_size=448,
        patch_size=14,
        rms_norm_eps=1e-5,
        attention_dropout=0.0,
        projection_dropout=0.0,
        qkv_bias=False,
        use_bias=False,
        **kwargs,
    ):
        if hidden_size % num_attention_heads != 0:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}")
        if image_size % patch_size != 0:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.rms_norm_eps = rms_norm_eps
        self.attention_dropout = attention_dropout
        self.projection_dropout = projection_dropout
        self.qkv_bias = qkv_bias
        self.use_bias = use_bias
        super().__init__(**kwargs)
