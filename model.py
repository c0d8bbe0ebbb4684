"""The network: nothing here knows of DDP."""

import torch
from torch import nn

# The mean and the standard deviation of MNIST's training images, with pixels from 0 to 255.
PIXEL_MEAN = 33.3
PIXEL_STD = 78.6


class ConvNet(nn.Module):
    """A small CNN for grey images of 28x28 pixels in ten classes.

    It has no batch norm on purpose. A batch norm uses the statistics of one rank's batch, so
    that two ranks with 32 images each would no longer compute what one rank computes with 64.
    Use nn.GroupNorm instead; or, on GPUs, nn.SyncBatchNorm.convert_sync_batchnorm.

    It has no dropout either. `train` seeds all ranks alike, so they would drop the same units;
    and a resumed training, which is seeded again, would drop those of its start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=5, stride=2),  # 28x28 -> 12x12
            nn.ReLU(),
            nn.Conv2d(16, 24, kernel_size=3),  # 12x12 -> 10x10
            nn.MaxPool2d(2),  # 10x10 -> 5x5
            nn.ReLU(),
            nn.Conv2d(24, 96, kernel_size=3),  # 5x5 -> 3x3
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96 * 3 * 3, 10),
        )
        # In memory, the channels of a pixel lie side by side, which is not torch's default.
        # Convolutions are faster this way.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map raw pixels, uint8 [B, 28, 28], to logits, float32 [B, 10]."""
        # The pixels are normalised here, so that this is the same in training, in evaluation and
        # for images of your own. unsqueeze adds the channel: [B, 1, 28, 28].
        pixels = images.unsqueeze(1).float()
        return self.layers((pixels - PIXEL_MEAN) / PIXEL_STD)
