"""AlexNet (Krizhevsky, Sutskever and Hinton 2012) in plain PyTorch; needs nothing but torch.

    network = load("weights.pt")                  # or .safetensors, with the package safetensors
    logits = network(network.prepare(images))     # images uint8 [N, 256, 256, 3], RGB

Images are rescaled so that the shorter side is 256 and cut to the central square. The two towers are the halves of
every layer's maps and neurons; what reads its own tower only is a grouped convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG: dict = {}


class AlexNet(nn.Module):
    def __init__(self, config: dict = CONFIG):
        super().__init__()
        c = self.config = config
        maps, towers = 3, c["towers"]
        self.convolutions = [f"conv{n}" for n in range(1, 6) if f"conv{n}" not in c["left_out"]]
        geometry = {"conv1": (11, 4, 0), "conv2": (5, 1, 2)}
        for name in self.convolutions:
            kernels, groups = c["kernels"][int(name[-1]) - 1], 1 if name in ("conv1", *c["joined"]) else towers
            self.add_module(name, nn.Conv2d(maps, kernels, *geometry.get(name, (3, 1, 1)), groups=groups))
            maps = kernels
        self.fc6 = nn.Linear(maps * 6 * 6, c["neurons"][0])
        self.fc7 = nn.Linear(*c["neurons"])
        self.fc8 = nn.Linear(c["neurons"][1], c["classes"])
        self.register_buffer("mean", torch.zeros(256, 256, 3))  # of the training images, RGB in 0-255

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [N, 3, crop, crop], as `prepare` makes them -> logits [N, classes]."""
        c = self.config
        activate = torch.tanh if c["activation"] == "tanh" else F.relu
        x = F.pad(pixels, (0, 227 - c["crop"], 0, 227 - c["crop"]))
        x = self.conv1(x)
        x = activate(self.pool(self.norm(x))) if c["lrn_before_relu"] else self.pool(self.norm(activate(x)))
        x = self.pool(self.map_norm(self.norm(activate(self.conv2(x)))))
        for name in self.convolutions[2:]:
            x = activate(self.get_submodule(name)(x))
        x = self.pool(x).flatten(1)
        for layer in (self.fc6, self.fc7):
            x = activate(layer(x))
            if self.training:  # not scaled: at test outputs are times 1 - dropout, as in the paper
                x = x * torch.bernoulli(torch.full_like(x, 1 - c["dropout"]))
            else:
                x = x * (1 - c["dropout"])
        return self.fc8(x)

    def pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.config["pool_size"], 2)

    def norm(self, x: Tensor) -> Tensor:
        c = self.config
        if not c["lrn_n"]:
            return x
        parts = x.chunk(1 if c["lrn_across_towers"] else c["towers"], 1)  # torch divides alpha by the window's size
        n, alpha, beta, k = c["lrn_n"], c["lrn_alpha"], c["lrn_beta"], c["lrn_k"]
        return torch.cat([F.local_response_norm(part, n, alpha * n, beta, k) for part in parts], 1)

    def map_norm(self, x: Tensor) -> Tensor:
        m = self.config["map_norm"]
        if m is None:
            return x
        squares = F.avg_pool2d(x * x, m["n"], 1, m["n"] // 2) * m["n"] ** 2
        return x / (m["k"] + m["alpha"] * squares) ** m["beta"]

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 [N, 256, 256, 3] RGB -> what the network sees of the centre, float32 [N, 3, crop, crop]."""
        c = self.config
        first = (256 - c["crop"]) // 2
        centre = slice(first, first + c["crop"])
        pixels = (images.float() - self.mean)[:, centre, centre] * c["pixel_scale"]
        return pixels.permute(0, 3, 1, 2)


def load(path: str) -> AlexNet:
    """Return the network with the weights of an export, in evaluation mode."""
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        weights = torch.load(path, weights_only=True)
    network = AlexNet()
    network.load_state_dict(weights)
    return network.eval()
