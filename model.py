"""The network: what every rank holds a copy of, and DDP keeps identical."""

import torch
from torch import nn


class ConvNet(nn.Module):
    """A small CNN for 28x28 grey digits.

    There is no batch norm on purpose: its statistics are those of one rank's batch, so
    N ranks x B images would not compute what one rank x N*B images computes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(  #                                      output
            nn.Conv2d(1, 16, kernel_size=4, stride=2, padding=1),  # 16 x 14 x 14
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3),  #                     32 x 12 x 12
            nn.MaxPool2d(2),  #                                      32 x  6 x  6
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3),  #                     64 x  4 x  4
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify digits.

        Args:
            images: raw pixels 0..255, uint8, shape [B, 28, 28]. Normalising in here means
                that training, evaluation and your own digits cannot disagree about it.

        Returns:
            Logits, float32, shape [B, 10].
        """
        pixels = images.unsqueeze(1).float()
        return self.layers(
            (pixels - 33.3) / 78.6
        )  # mean and deviation of MNIST's pixels


def create_model(seed: int) -> ConvNet:
    """Build the network with weights that follow from `seed` alone, on every rank."""
    torch.manual_seed(seed)
    # channels_last is the layout in which the CPU (and tensor core) convolutions are fastest.
    return ConvNet().to(memory_format=torch.channels_last)
