"""SAIL-VL: vision encoder, pixel shuffle and MLP, language model.

The weights have the names of the published SAIL-VL models: `vision_model.`, `mlp1.{0,1,3}.` and
`language_model.`. The vision encoder is SAILViT (arXiv 2507.01643) or any of transformers' own that
gives patch features; the pixel shuffle is version 2 of InternVL's (arXiv 2404.16821); the language
model is any of transformers'. Written from these descriptions.

Dimension letters: n tiles, v visual tokens of a tile, b sequences, t positions, d width, h and w the grid
of patches.
"""

import inspect

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .chat_sailvl import TURN_END, PromptBuilder, place_marks, token_id
from .configuration_sailvit import SAILViTConfig
from .configuration_sailvl import SAILVLConfig
from .modeling_sailvit import SAILViTModel


class SAILVLModel(PreTrainedModel, GenerationMixin):
    """Pixels and token ids in, text out."""

    config_class = SAILVLConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config, load_in_8bit=False):
        if load_in_8bit:
            raise ValueError("load_in_8bit is gone from transformers; pass a quantization_config")
        super().__init__(config)
        vision, llm = config.vision_config, config.llm_config
        # By its name: transformers may have loaded the class of a configuration from another copy.
        is_sailvit = vision.model_type == SAILViTConfig.model_type
        self.vision_model = SAILViTModel(vision) if is_sailvit else AutoModel.from_config(vision)
        merged = vision.hidden_size * config.merge**2
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(merged, eps=1e-5),
            nn.Linear(merged, llm.hidden_size),
            nn.GELU(),
            nn.Linear(llm.hidden_size, llm.hidden_size),
        )
        self.language_model = AutoModelForCausalLM.from_config(llm)
        # The id that stands for a visual token. `chat` takes it from the tokenizer.
        self.img_context_token_id = config.image_context_token_id
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    def tokens_per_tile(self, pixel_values):
        """Visual tokens that one tile of `pixel_values` `[n, 3, height, width]` becomes."""
        h, w = self.grid(pixel_values)
        return h * w // self.config.merge**2

    def grid(self, pixel_values):
        """Rows and columns of patches, checked: whole patches, and squares of them to merge."""
        height, width = pixel_values.shape[-2:]
        patch = self.config.vision_config.patch_size
        patch = patch if isinstance(patch, int) else patch[0]
        # Of an image of the encoder's own size the rest after whole patches is left out, as by its convolution.
        own = self.config.vision_config.image_size
        whole = all(side % patch == 0 or side == own for side in (height, width))
        h, w = height // patch, width // patch
        merge = self.config.merge
        if not whole or h < merge or w < merge or h % merge or w % merge:
            step = patch * merge
            raise ValueError(f"tiles of {height} x {width} pixels do not divide into squares of {step} pixels")
        return h, w

    def extract_feature(self, pixel_values):
        """Normalised tiles `[n, 3, height, width]` -> visual tokens `[n, v, d]`, rows of the grid first."""
        h, w = self.grid(pixel_values)
        options = {}
        # SigLIP resamples its positions only when told to.
        if "interpolate_pos_encoding" in inspect.signature(self.vision_model.forward).parameters:
            options["interpolate_pos_encoding"] = True
        pixel_values = pixel_values.to(self.vision_model.device, self.vision_model.dtype)
        features = self.vision_model(pixel_values=pixel_values, **options).last_hidden_state
        prefix = features.shape[1] - h * w  # class and register tokens
        if prefix < 0:
            raise ValueError(f"the vision model gave {features.shape[1]} features for {h} x {w} patches")
        return self.mlp1(pixel_shuffle(features[:, prefix:], h, w, self.config.merge))

    def embed(self, input_ids, pixel_values):
        """Embeddings `[b, t, d]`, visual tokens in the places of the image context tokens, in their order."""
        embeds_btd = self.get_input_embeddings()(input_ids)
        if self.img_context_token_id is None:
            raise ValueError("set `model.img_context_token_id`: config.json has no image_context_token_id")
        places_bt = input_ids == self.img_context_token_id
        places = int(places_bt.sum())
        features = None
        if pixel_values is not None and pixel_values.shape[0] > 0:
            features = self.extract_feature(pixel_values).flatten(0, 1)
        found = 0 if features is None else features.shape[0]
        if places != found:
            raise ValueError(f"{places} image context tokens, but {found} visual features")
        if features is None:
            return embeds_btd
        return embeds_btd.masked_scatter(places_bt.unsqueeze(-1), features.to(embeds_btd.device, embeds_btd.dtype))

    def forward(self, pixel_values=None, input_ids=None, attention_mask=None, labels=None, inputs_embeds=None, **kwargs):
        """Logits `[b, t, vocabulary]` and, with `labels` (-100 where nothing is learnt), the mean loss: the
        output of the language model. `inputs_embeds` takes the place of `pixel_values` and `input_ids`."""
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values)
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs
        )

    @torch.no_grad()
    def generate(self, pixel_values=None, input_ids=None, attention_mask=None, **kwargs):
        """Continues `input_ids` `[b, t]`: the new ids alone. `kwargs` are those of transformers' `generate`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # The folder's generation_config.json belongs to the whole model.
        self.language_model.generation_config = self.generation_config
        embeds = self.embed(input_ids, pixel_values)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    def place_images(self, question, pixel_values, history=None, num_patches_list=None):
        """The conversation, as (question, answer) pairs, and the visual tokens of each of its images."""
        tiles = 0 if pixel_values is None else pixel_values.shape[0]
        if num_patches_list is None:
            num_patches_list = [tiles] if tiles else []
        if sum(num_patches_list) != tiles:
            raise ValueError(f"num_patches_list has {sum(num_patches_list)} tiles, pixel_values {tiles}")
        turns = place_marks([*(history or []), (question, None)], len(num_patches_list))
        tokens_per_tile = self.tokens_per_tile(pixel_values) if tiles else 0
        return turns, [count * tokens_per_tile for count in num_patches_list]

    def prompt_ids(self, tokenizer, question, pixel_values, history=None, num_patches_list=None):
        """The token ids that `chat` continues for the same arguments."""
        turns, blocks = self.place_images(question, pixel_values, history, num_patches_list)
        return PromptBuilder(self.config, tokenizer).build(turns, blocks)

    @torch.no_grad()
    def chat(
        self,
        tokenizer,
        pixel_values,
        question,
        generation_config,
        history=None,
        return_history=False,
        num_patches_list=None,
        verbose=False,
    ):
        """The answer to `question`; with `return_history` also the list of (question, answer) so far.

        `pixel_values` are the tiles of all images, those of `history` included, in the order of their
        `<image>` marks, and `num_patches_list` the tiles of each; None means that they are one image.
        Without any mark there is put one per image at the head of the first question.
        `generation_config` holds arguments of transformers' `generate`.
        """
        turns, blocks = self.place_images(question, pixel_values, history, num_patches_list)
        ids = PromptBuilder(self.config, tokenizer).build(turns, blocks)
        self.img_context_token_id = token_id(tokenizer, self.config.image_context_token)
        stops = sorted({token_id(tokenizer, TURN_END), tokenizer.eos_token_id} - {None})
        pad = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        options = {"eos_token_id": stops, "pad_token_id": pad, **generation_config}
        input_ids = torch.tensor([ids], device=self.get_input_embeddings().weight.device)
        new_ids = self.generate(pixel_values, input_ids, **options)
        answer = tokenizer.decode(new_ids[0], skip_special_tokens=True).strip()
        question = turns[-1][0]
        if verbose:
            print(f"{question}\n{answer}")
        return (answer, [*turns[:-1], (question, answer)]) if return_history else answer


def pixel_shuffle(x, h, w, merge):
    """`[n, h * w, d]` -> `[n, h * w / merge^2, merge^2 * d]`. A token holds, in order of their rows and then
    columns, the features of the `merge` x `merge` patches that it stands for."""
    n, _, d = x.shape
    x = x.reshape(n, h // merge, merge, w // merge, merge, d).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h * w // merge**2, merge**2 * d)
