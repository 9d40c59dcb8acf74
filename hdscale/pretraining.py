"""Two ways to train a small teacher: a masked autoencoder and a supervised classifier.

Both give `LossTerms` like the distiller, so that one loop trains all three; feature and relation terms are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdscale.config.sections import PretrainConfig
from hdscale.masking.counts import num_kept
from hdscale.masking.random import random_keep_indices
from hdscale.student.build import Student
from hdscale.student.decoder import decoder_behind
from hdscale.student.init import draw_weights
from hdscale.types import Batch, LossTerms

_EPS = 1e-6


class MaskedAutoencoder(nn.Module):
    """MAE (He et al. 2021): the encoder sees the kept patches, a light decoder predicts the pixels of the hidden ones.

    The class token goes through the decoder, which may attend to it; nothing is predicted there.
    """

    def __init__(self, encoder: Student, config: PretrainConfig, *, seed: int) -> None:
        """Put a decoder of MAE's initial weights behind an encoder.

        Args:
            encoder: what becomes the teacher.
            config: the recipe's section.
            seed: of the decoder's weights; the caller's random state is left alone.

        Raises:
            UserError: the decoder's width is no multiple of its heads, or of the 4 parts of a sin-cos embedding.
        """
        super().__init__()
        dim, depth, heads = config.decoder_dim, config.decoder_depth, config.decoder_heads
        self.encoder = encoder
        self.decoder = decoder_behind(
            encoder, dim, depth, heads, drop_path=0.0, mask_tokens=True, seed=seed, section="pretrain"
        )
        with torch.random.fork_rng(devices=[]):  # PyTorch draws first
            self.pixels = nn.Linear(dim, 3 * encoder.patch_size**2)
        decoder = nn.ModuleList([self.decoder, self.pixels])
        draw_weights(decoder, self.decoder.blocks, "mae", seed=seed, stream="decoder")

    def forward(self, images: Tensor, keep_indices: Tensor) -> LossTerms:
        """Return the mean squared error on hidden patches.

        Args:
            images: (B, 3, H, W) uint8.
            keep_indices: (B, K) int64 ascending: the patches the encoder sees.
        """
        seen = self.encoder(images, keep_indices)
        decoded = self.decoder(seen.prefix_tokens, seen.patch_tokens, keep_indices)  # (B, N, decoder width)
        predicted = self.pixels(decoded)  # (B, N, 3 p^2)
        wanted = normalized_patches(self.encoder.preprocess(images, torch.float32), self.encoder.patch_size)
        errors = (predicted.float() - wanted).square().mean(dim=-1)  # (B, N)
        hidden = torch.ones_like(errors).scatter(1, keep_indices, 0.0)
        return _only_total((errors * hidden).sum() / hidden.sum())


class SupervisedClassifier(nn.Module):
    """A DeiT-style classifier with label smoothing.

    It reads the mean of the patch tokens where DeiT reads the class token: patch tokens are what distillation and k-NN
    take from this teacher, and only a loss on them makes each one say something about the class.
    """

    def __init__(self, encoder: Student, num_classes: int, config: PretrainConfig, *, seed: int) -> None:
        """Put a linear classifier of small random weights behind an encoder."""
        super().__init__()
        self.encoder = encoder
        self.label_smoothing = config.label_smoothing
        self.classifier = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor, labels: Tensor) -> LossTerms:
        """Return the smoothed cross-entropy.

        Args:
            images: (B, 3, H, W) uint8.
            labels: (B,) int64.
        """
        tokens = self.encoder(images, None).patch_tokens  # (B, N, D)
        logits = self.classifier(tokens.mean(dim=1)).float()  # (B, classes)
        return _only_total(F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing))


def mae_keep_indices(batch: Batch, num_patches: int, mask_ratio: float, seed: int) -> Tensor:
    """Draw MAE's random patches (B, K): a new draw every epoch, whatever view the sample is shown in."""
    num_keep = num_kept(num_patches, 1 - mask_ratio)
    indices = random_keep_indices(batch.sample_ids, batch.epochs, num_patches, num_keep, seed)
    return indices.to(batch.images.device)


def normalized_patches(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, 3, H, W) into patches (B, N, 3 p^2), each standardised over its own pixels (He et al., 3)."""
    grid = images.shape[-1] // patch_size
    patches = images.unflatten(3, (grid, patch_size)).unflatten(2, (grid, patch_size))  # (B, 3, rows, p, columns, p)
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, 3 p^2)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + _EPS).sqrt()


def _only_total(loss: Tensor) -> LossTerms:
    zero = torch.zeros_like(loss.detach())
    return LossTerms(loss, zero, zero)
