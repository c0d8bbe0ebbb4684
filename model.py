"""The network and its optimizers: what DDP keeps the same on every rank."""

import torch
from torch import nn

MUON_RATE = 2.0  # Muon's learning rate, as a multiple of AdamW's
PIXEL_MEAN, PIXEL_STD = 33.3, 78.6  # of MNIST's training images, 0 to 255


class ConvNet(nn.Module):
    """A small CNN for 28x28 grey digits.

    It has no batch norm on purpose: its statistics would be those of one rank's batch, and
    N ranks x B images would no longer compute what one rank x N*B images computes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=5, stride=2),  # 28x28 -> 12x12
            nn.ReLU(),
            nn.Conv2d(16, 48, kernel_size=3),  # 12x12 -> 10x10
            nn.MaxPool2d(2),  # 10x10 -> 5x5
            nn.ReLU(),
            nn.Conv2d(48, 128, kernel_size=3),  # 5x5 -> 3x3
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128 * 3 * 3, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map raw pixels, uint8 [B, 28, 28], to logits, float32 [B, 10].

        Normalising the pixels in here means that training, evaluation and your own digits
        cannot disagree about it.
        """
        return self.layers((images.unsqueeze(1).float() - PIXEL_MEAN) / PIXEL_STD)


def create_model(seed: int) -> ConvNet:
    """Build the network with the same weights for the same `seed`, on every rank."""
    torch.manual_seed(seed)
    # In this layout convolutions are fastest, and each kernel lies in memory as a matrix.
    return ConvNet().to(memory_format=torch.channels_last)


def hidden_kernels(model: nn.Module) -> list[nn.Parameter]:
    """List the weights [out, in, height, width] of convolutions to train after the first."""
    return [w for w in model.parameters() if w.ndim == 4 and w.requires_grad][1:]


def as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """View a channels_last kernel as the matrix [out, height * width * in]; never a copy."""
    return kernel.permute(0, 2, 3, 1).view(len(kernel), -1)


def create_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Create AdamW and, for the hidden kernels, which it takes as matrices, Muon.

    First and last layer go to AdamW, as Muon's author advises (github.com/KellerJordan/Muon).
    """
    kernels = hidden_kernels(model)
    rest = [w for w in model.parameters() if all(w is not kernel for kernel in kernels)]
    adamw = torch.optim.AdamW(rest, betas=(0.8, 0.95), fused=True)
    if not kernels:  # a model of your own may have none
        return [adamw]
    matrices = [as_matrix(kernel.detach()) for kernel in kernels]
    # Three Newton-Schulz iterations train this network as well as the usual five.
    muon = torch.optim.Muon(matrices, weight_decay=0.1, momentum=0.9, ns_steps=3)
    return [adamw, muon]


def optimizer_step(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], lr: float
) -> None:
    """Step with AdamW at the rate `lr` and Muon at MUON_RATE times that; clear gradients."""
    groups = [optimizer.param_groups[0] for optimizer in optimizers]
    for group, rate in zip(groups, [lr, MUON_RATE * lr]):
        group["lr"] = rate
    for matrix, kernel in zip(groups[-1]["params"], hidden_kernels(model)):
        matrix.grad = as_matrix(kernel.grad)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
