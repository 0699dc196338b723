"""Configuration of SAIL-VL: a vision encoder, a projector and a language model.

The keys are those of the published SAIL-VL `config.json`. Added to them are the image tokens, the id of
the one that stands for a visual token, and the system message, which other models fix in their code.
"""

from transformers import AutoConfig, PretrainedConfig

from .configuration_sailvit import SAILViTConfig

# The text between `<|im_end|>` and the next turn, and the system message where none is configured.
TEMPLATES = {
    "chatml": ("\n", ""),
    "smollm": ("\n", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "sail": ("", ""),
    "univl-chat": ("", ""),
}


class SAILVLConfig(PretrainedConfig):
    """`downsample_ratio` 1 / m merges m x m patches into one visual token.

    `force_image_size` is the side in pixels of a tile. `min_dynamic_patch` to `max_dynamic_patch` tiles,
    and a tile of the whole image where `use_thumbnail` is set, stand for an image if `dynamic_image_size`
    is set, one tile otherwise.
    """

    model_type = "sailvl"
    sub_configs = {"vision_config": AutoConfig, "llm_config": AutoConfig}

    def __init__(
        self,
        vision_config=None,
        llm_config=None,
        downsample_ratio=0.5,
        ps_version="v2",
        select_layer=-1,
        template="univl-chat",
        system_message="",
        image_start_token="<img>",
        image_context_token="<IMG_CONTEXT>",
        image_end_token="</img>",
        image_context_token_id=None,
        force_image_size=448,
        dynamic_image_size=True,
        min_dynamic_patch=1,
        max_dynamic_patch=12,
        use_thumbnail=True,
        **kwargs,
    ):
        if template not in TEMPLATES:
            raise ValueError(f"template {template!r} is not known, these are: {', '.join(TEMPLATES)}")
        if ps_version != "v2":
            raise ValueError(f"ps_version {ps_version!r} is not supported, only 'v2' is")
        if select_layer != -1:
            raise ValueError(f"select_layer {select_layer} is not supported, only -1, the last one, is")
        merge = round(1 / downsample_ratio) if downsample_ratio > 0 else 0
        if merge < 1 or abs(merge * downsample_ratio - 1) > 1e-3:
            raise ValueError(f"downsample_ratio {downsample_ratio} is not one divided by a whole number")
        self.vision_config = sub_config({"model_type": "sailvit"} if vision_config is None else vision_config)
        self.llm_config = sub_config({"model_type": "qwen2"} if llm_config is None else llm_config)
        self.downsample_ratio = downsample_ratio
        self.ps_version = ps_version
        self.select_layer = select_layer
        self.template = template
        self.system_message = system_message
        self.image_start_token = image_start_token
        self.image_context_token = image_context_token
        self.image_end_token = image_end_token
        self.image_context_token_id = image_context_token_id
        self.force_image_size = force_image_size
        self.dynamic_image_size = dynamic_image_size
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.use_thumbnail = use_thumbnail
        kwargs["tie_word_embeddings"] = getattr(self.llm_config, "tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def merge(self):
        """Patches along each side of a square that become one visual token."""
        return round(1 / self.downsample_ratio)

    @property
    def turn_separator(self):
        """The text between `<|im_end|>` and the next turn."""
        return TEMPLATES[self.template][0]

    @property
    def system_prompt(self):
        """What the system says before the first question; empty for a prompt without a system turn."""
        return self.system_message or TEMPLATES[self.template][1]


def sub_config(keys):
    """A configuration from its keys; one that is already built is returned as it is."""
    if not isinstance(keys, dict):
        return keys
    if "model_type" not in keys:
        raise ValueError("vision_config and llm_config must have a model_type")
    if keys["model_type"] == SAILViTConfig.model_type:
        return SAILViTConfig(**{key: value for key, value in keys.items() if key != "model_type"})
    return AutoConfig.for_model(**keys)
