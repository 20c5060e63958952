"""LDPv2, the projector of MobileVLM-V2 (arXiv:2402.03766, section 3.3): rows, then their neighbourhoods.

Shapes: I images, P patches of one image, N visual rows of one image, E' width of a patch, D model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from trimvlm_export.families._towers import PROJECTOR
from trimvlm_export.mobilevlm.config import SIDE, window


class LDPv2(nn.Module):
    """Two linear layers on every patch, mean over windows of 2 x 2 patches, and a depth-wise 3 x 3
    convolution that is added to its own input and tells where a token lies.

    Args:
        config: a MobileVLMConfig.

    Raises:
        UserError: patches that do not divide into the windows.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.window = window(config)
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.linear_2 = nn.Linear(width, width)
        self.position = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)

    def parameter_names(self) -> dict[str, str]:
        """From this module's parameter names to those of the whole model."""
        return {name: PROJECTOR + name for name, _ in self.named_parameters()}

    def forward(self, features_IPE: Tensor) -> Tensor:
        """[I, P, E'] -> [I, N, D]; patches and tokens row by row."""
        rows = self.linear_2(F.gelu(self.linear_1(features_IPE.flatten(0, 1))))  # 2-D: exports as Gemm
        side = SIDE * self.window
        patches_IDPP = rows.unflatten(0, (-1, side, side)).permute(0, 3, 1, 2)
        tokens_IDNN = F.avg_pool2d(patches_IDPP, self.window)
        return (tokens_IDNN + self.position(tokens_IDNN)).flatten(2).transpose(1, 2)


def pooled(values_IP: Tensor, window: int) -> Tensor:
    """Mean over the patches of each token: [I, P, ...] -> [I, N, ...]."""
    windows = values_IP.unflatten(1, (SIDE, window, SIDE, window))
    return windows.mean(dim=(2, 4)).flatten(1, 2)
