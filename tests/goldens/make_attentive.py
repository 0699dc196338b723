"""Makes `metrics/attentive.json` with PyTorch: `.venv/bin/python tests/goldens/make_attentive.py`.

The attentive probe of AIM (El-Nouby et al. 2024, arXiv 2401.08541), written with PyTorch's own attention and layers: one
learned query, keys and values of all patches, a linear map to the classes. Patches of images of two sizes, the weights
before training, and scores and loss after some epochs, in fp64. Adam is in the form at the end of section 2 of its paper
(Kingma and Ba 2014), as in scikit-learn: PyTorch's adds epsilon to a root that is corrected already.
"""

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

HEADS, WIDTH, CLASSES = 2, 6, 3
EPOCHS, BATCH, LR = 5, 8, 0.02


class Probe(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.5)
        self.key, self.value = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x_td):
        heads = lambda x: x.view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2)  # noqa: E731
        seen = functional.scaled_dot_product_attention(heads(self.query), heads(self.key(x_td)), heads(self.value(x_td)))
        return self.head(seen.transpose(1, 2).reshape(WIDTH))


class Adam:
    def __init__(self, params):
        self.params = [(param, torch.zeros_like(param), torch.zeros_like(param)) for param in params]
        self.steps = 0

    def step(self):
        self.steps += 1
        rate = LR * (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        with torch.no_grad():
            for param, first, second in self.params:
                first.lerp_(param.grad, 0.1)
                second.lerp_(param.grad**2, 0.001)
                param -= rate * first / (second.sqrt() + 1e-8)
                param.grad = None


torch.manual_seed(11)
torch.set_default_dtype(torch.float64)
labels = torch.randint(0, CLASSES, (20,))
centres = torch.randn(CLASSES, WIDTH)
# A patch of an image shows what it is, all others are noise.
images = []
for number, label in enumerate(labels):
    image = torch.randn(5 if number % 3 else 8, WIDTH)
    image[number % 4] += 3 * centres[label]
    images.append(image)
probe = Probe()
before = {name: value.tolist() for name, value in probe.state_dict().items()}
adam = Adam(probe.parameters())
scores = lambda numbers: torch.stack([probe(images[number]) for number in numbers])  # noqa: E731
for _ in range(EPOCHS):
    losses = 0.0
    for numbers in torch.arange(len(images)).split(BATCH):
        loss = functional.cross_entropy(scores(numbers), labels[numbers])
        loss.backward()
        adam.step()
        losses += loss.item() * len(numbers)
golden = {
    "heads": HEADS,
    "images": [image.tolist() for image in images],
    "classes": labels.tolist(),
    "weights": before,
    "epochs": EPOCHS,
    "batch": BATCH,
    "lr": LR,
    "scores": scores(range(len(images))).tolist(),
    "loss": losses / len(images),
}
path = Path(__file__).parent / "metrics/attentive.json"
path.write_text(json.dumps(golden) + "\n", encoding="utf-8")
