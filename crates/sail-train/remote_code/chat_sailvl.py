"""The chat format of SAIL-VL: a conversation with images as token ids.

A turn is `<|im_start|>role`, a new line, the text, `<|im_end|>` and the separator of the template. In the
place of an `<image>` mark stands the image's start token, its context token once per visual token of all its
tiles, and its end token. Every message is tokenised on its own, as in training.
"""

IMAGE_MARK = "<image>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"


def place_marks(turns, images):
    """The (question, answer) pairs with as many `<image>` marks in their questions as there are images."""
    marks = sum(question.count(IMAGE_MARK) for question, _ in turns)
    if marks == images:
        return turns
    if marks > 0:
        raise ValueError(f"{marks} {IMAGE_MARK} marks, but {images} images")
    (question, answer), *later = turns
    return [(f"{IMAGE_MARK}\n" * images + question, answer), *later]


def token_id(tokenizer, token):
    """The id of a token that the tokenizer must have."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or tokenizer.convert_ids_to_tokens(found) != token:
        raise ValueError(f"the tokenizer has no token {token!r}")
    return found


class PromptBuilder:
    """Token ids of a conversation, up to the place of the next answer.

    Every message is tokenised on its own. Structure tokens are written by id, and no text can produce one.
    """

    def __init__(self, config, tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        image_tokens = [config.image_start_token, config.image_context_token, config.image_end_token]
        self.structure = [token_id(tokenizer, token) for token in [TURN_START, TURN_END, *image_tokens]]
        self.separator = self.plain(config.turn_separator)

    def build(self, turns, blocks):
        """`turns` are (question, answer) pairs, the last answer None; `blocks` the visual tokens of each image."""
        start, end = self.structure[:2]
        blocks = iter(blocks)
        ids = []
        if system := self.config.system_prompt:
            ids += [start, *self.plain(f"system\n{system}"), end, *self.separator]
        for question, answer in turns:
            ids += [start, *self.user(question, blocks), end, *self.separator]
            ids += [start, *self.plain("assistant\n")]
            if answer is not None:
                ids += [*self.plain(answer), end, *self.separator]
        return ids

    def user(self, question, blocks):
        """A question, each `<image>` replaced by the next block of visual tokens."""
        _, _, image_start, image_context, image_end = self.structure
        first, *others = f"user\n{question}".split(IMAGE_MARK)
        ids = self.plain(first)
        for piece in others:
            ids += [image_start, *[image_context] * next(blocks), image_end, *self.plain(piece)]
        return ids

    def plain(self, text):
        """Ids of plain text, in which no special token is recognised."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for found in self.structure:
            if found in ids:
                raise ValueError(f"the text contains the structure token {found}: {text!r}")
        return ids
