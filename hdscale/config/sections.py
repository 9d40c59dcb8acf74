"""The recipe's sections: every setting of a run, typed, documented and checked.

Defaults are the paper's ViT-L on ImageNet-21K; where the paper leaves a detail open, the docstring says whose choice
the default is.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(gt=0, le=1)]
"""A number in (0, 1]."""
_SOURCES = ("timm", "open_clip", "file")


class Section(BaseModel):
    """A frozen part of the recipe that refuses keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class RunConfig(Section):
    """Where a run lives and how it computes."""

    name: str = ""
    """Folder below `root`; empty: the recipe file's name."""
    root: str = "runs"
    """Folder of all runs."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of order, views, initial weights and drop-path."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Arithmetic of student and teachers. `auto`: bf16 where the GPU has it, fp16 on V100s, fp32 on CPUs."""
    rendezvous_seconds: float = Field(default=120, gt=0)
    """How long ranks wait for those of other hosts to start, before they name the missing ones."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or (value and not path.parts):
            raise ValueError("must be a folder below run.root: neither absolute, nor . or ..")
        return value


class DataConfig(Section):
    """Shards, their order, and the augmented views."""

    shards: str = "shards"
    """Folder that holds SPLIT.manifest.json, SPLIT.index.npy and the tar files."""
    split: str = "train"
    """Which manifest in that folder is trained on."""
    order: Literal["global", "windowed"] = "windowed"
    """`global`: one permutation of all samples (local disks). `windowed`: shards are permuted, then the samples of
    `window_shards` shards at a time (network file systems)."""
    window_shards: int = Field(default=64, ge=1)
    """Shards that are mixed with each other under `windowed`."""
    img_size: int = Field(default=224, ge=1)
    """Side of the square view in pixels (paper, Section 4.1)."""
    views: Annotated[int, Field(ge=1)] | Literal["fresh"] = 4
    """Epoch e shows view e mod `views`, so that masks can be stored; `fresh` is a new view every epoch."""
    crop_scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Area of the random resized crop, as a share of the image (dBOT)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the random resized crop."""
    hflip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip (dBOT)."""
    workers: int = Field(default=8, ge=0)
    """Loader processes per rank; 0 decodes in the training process."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of the samples that may be damaged: each is replaced by another and listed; one more ends the run."""

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _check_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be two rising positive numbers")
        return value


class StudentConfig(Section):
    """The student ViT: a timm name, sizes that replace the named model's, and heads removed at export."""

    model: str = "vit_large_patch16_224"
    """Name of a timm VisionTransformer; weights are always random (paper, Section 3.1)."""
    patch_size: int | None = Field(default=None, ge=1)
    """Replaces the named model's, as do embed_dim, depth, num_heads and mlp_ratio."""
    embed_dim: int | None = Field(default=None, ge=1)
    depth: int | None = Field(default=None, ge=1)
    num_heads: int | None = Field(default=None, ge=1)
    mlp_ratio: float | None = Field(default=None, gt=0)
    init: Literal["mae", "timm", "fd"] = "mae"
    """Initial weights. `mae`: Xavier uniform in each Linear and the patch embedding, class and mask tokens of deviation
    0.02 (MAE, dBOT). `timm`: the library's own. `fd`: deviation 0.02 cut off at one deviation, and the last Linears of
    attention and MLP divided by the root of twice their block's number (FD)."""
    drop_path: float = Field(default=0.2, ge=0, lt=1)
    """Stochastic depth of the last block, rising linearly from 0 (dBOT: 0.2 for B and L)."""
    drop_path_per: Literal["sample", "rank"] = "sample"
    """What decides which branches are left out. `sample`: the sample's place in the run, so that any number of ranks
    and any micro-batch drop the same. `rank`: the step, the rank and its micro-step."""
    decoder: Literal["linear", "identity", "transformer"] = "linear"
    """Head from student to teacher width, removed at export; `identity` needs equal widths (paper, B.3: no decoder).
    `transformer`: blocks before the Linear, the asymmetric decoder of Section 2 (dBOT, MAE)."""
    decoder_depth: int = Field(default=8, ge=1)
    """Blocks of `decoder: transformer` (dBOT, MAE: 8; Fig. 9: 1, 4 and 8)."""
    decoder_dim: int | None = Field(default=None, ge=1)
    """Width of these blocks (dBOT, MAE: 512); left out: the student's own."""
    decoder_heads: int | None = Field(default=None, ge=1)
    """Attention heads of these blocks (dBOT, MAE: 16); left out: the student's own."""
    mask_tokens: Literal["none", "encoder", "decoder"] = "none"
    """Where one learnt token stands for each dropped patch. `decoder`: the student sees kept patches, `decoder:
    transformer` all places (dBOT, MAE). `encoder`: the student itself gets all places (Section 2.4; SimMIM, BEiT v2).
    `none`: dropped patches are nowhere."""
    pos_embed: Literal["sincos", "none"] = "sincos"
    """MAE's fixed position embedding, or zeros in its place, which needs `rel_pos_bias` (FD's configs)."""
    rel_pos_bias: bool = False
    """One learnt relative position bias, added to the attention logits of all blocks (FD's configs; Appendix B.1). It
    starts at zero and needs a class token and no registers."""
    layer_scale: float | None = Field(default=None, gt=0)
    """Initial value of one learnt factor per channel behind each attention and MLP: with `rel_pos_bias`, FD's
    "additional learnable parameters" (FD's configs: 0.1; the biases of queries and values every student has). Left out:
    none, as in MAE's ViT."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean subtracted from the image in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel deviation the image is divided by."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Activation checkpointing: recompute every n-th block in the backward pass; 1: every block, 0: none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.decoder != "transformer":
            for name in ("decoder_dim", "decoder_heads"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is of decoder transformer, got decoder {self.decoder}; leave it out")
            if self.mask_tokens == "decoder":
                raise ValueError(f"mask_tokens decoder needs decoder transformer, got {self.decoder}")
        if self.pos_embed == "none" and not self.rel_pos_bias:
            raise ValueError("pos_embed none needs rel_pos_bias true: the student must know where its patches are")
        return self


class TeacherConfig(Section):
    """One frozen teacher."""

    source: Literal["timm", "open_clip", "file"] = "timm"
    """`timm` and `open_clip` take an architecture by `name`; `file` takes it from the file at `weights` (hdscale's)."""
    name: str = ""
    """`vit_large_patch16_224.mae` for timm; `ViT-L-14` for open_clip. With a source before it, and weights behind it
    where they are not the default, it stands for all three fields: `timm:vit_large_patch16_224.mae`,
    `open_clip:ViT-L-14/openai`, `file:mae.safetensors`; so does a section that is nothing but such a name."""
    weights: str = "pretrained"
    """`pretrained` (timm's), an open_clip tag such as `openai`, `random` (tests and smoke runs), or a file's path."""
    img_size: int | None = Field(default=None, ge=1)
    """Side of the square the teacher is fed, in pixels; left out: student grid x teacher patch size, so that the grids
    match (a CLIP-L/14 is fed 196 px for 14 x 14 tokens)."""
    target: Literal["norm", "pre_norm", "projected"] = "norm"
    """Feature teacher: last block's tokens after the final norm, before it, or projected (CLIP)."""
    sharding: Literal["replicate", "node", "zero3"] = "zero3"
    """Between steps, each rank holds the whole teacher, or its share of it in a DeepSpeed ZeRO-3 inference engine: a
    share among the ranks of its host (`node`: gathers stay inside), or among all."""

    @model_validator(mode="before")
    @classmethod
    def _expand_name(cls, values: Any) -> Any:
        """Turn SOURCE:NAME/WEIGHTS into the three fields, which may be given as well if they say the same."""
        if isinstance(values, str):
            if ":" not in values:
                raise ValueError(f"must be SOURCE:NAME, such as open_clip:ViT-L-14/openai, got {values}")
            values = {"name": values}
        if isinstance(values, dict) and len(values) == 1 and (key := next(iter(values))) in _SOURCES:
            got = f"{key}: {values[key] or ''}"  # YAML takes a name with a space, or none, behind the colon for a key
            raise ValueError(f"must be SOURCE:NAME without a space, such as open_clip:ViT-L-14/openai, got {got}")
        if not isinstance(values, dict) or not isinstance(values.get("name"), str) or ":" not in values["name"]:
            return values
        short = values["name"]
        source, _, rest = short.partition(":")
        if source not in _SOURCES:
            raise ValueError(f"name must start with timm:, open_clip: or file:, got {short}")
        name, slash, weights = ("", "/", rest) if source == "file" else rest.partition("/")
        said = {"source": source, "name": name, **({"weights": weights} if slash else {})}
        for field in ("source", "weights"):
            if field in said and values.get(field, said[field]) != said[field]:
                raise ValueError(
                    f"name {short} says that {field} is {said[field]}, got {field} {values[field]}: leave one of them "
                    f"out, or make {short} the whole section"
                )
        return {**values, **said}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source == "file" and self.weights in ("", "pretrained", "random"):
            raise ValueError("weights must be a file's path when source is file")
        if self.source != "file" and not self.name:
            raise ValueError(f"name must say which {self.source} model to build")
        return self


class RelationConfig(Section):
    """What the relation teacher says about some of its layers, and how it is compared."""

    target: Literal["relation", "attention", "features"] = "relation"
    """Tables 5 and 6: token relations R = QK^T (Eq. 2); the attention's output MSA; the block's output T. The last two
    are tokens: standardised as `loss.target_norm` says and compared by smooth L1, behind `token_head`; scale and heads
    are not for them."""

    layers: tuple[int, ...] = (-3, -2)
    """Blocks, 0-indexed, negative from the end: the two before the last (Eq. 3; Table 7's "10,11" of 12)."""
    scale: Literal["scaled", "raw", "softmax", "centred"] = "scaled"
    """`scaled`: QK^T / sqrt(E); `raw`: Eq. 2 to the letter; `softmax`: attention probabilities (TinyMIM). `centred`:
    `scaled` less the mean of each row, which attention cannot see."""
    heads: Literal["per_head", "merged"] = "per_head"
    """`merged` sums over heads, which is the full-width QK^T and takes unequal head counts."""
    cls: Literal["include", "exclude"] = "include"
    """Keep the class token's row and column when student and teacher both have one."""
    loss: Literal["smooth_l1", "kl"] = "smooth_l1"
    """Paper: smooth L1; `kl` needs `scale: softmax` (TinyMIM)."""
    token_head: Literal["norm_linear", "width"] = "norm_linear"
    """What the student's tokens of `target` attention or features go through. `norm_linear`: a norm and a Linear, as
    those of the feature term. `width`: a Linear where widths differ, or nothing."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.loss == "kl" and self.target != "relation":
            raise ValueError(f"loss kl compares relations, got target {self.target}: set loss to smooth_l1")
        if self.loss == "kl" and self.scale != "softmax":
            raise ValueError(f"loss kl needs scale softmax, got {self.scale}")
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must name different blocks, got {list(self.layers)}")
        return self


class MaskConfig(Section):
    """Which patch tokens the student sees (Eq. 4)."""

    strategy: Literal["none", "random", "direct", "progressive"] = "progressive"
    """Table 8's rows: `direct` keeps the least redundant tokens of the relation teacher's last layer in one go."""
    stage_keep_ratio: Fraction = 0.7
    """`progressive`: share kept at each stage; 0.7 three times is 66 of 196."""
    keep_ratio: Fraction = 0.35
    """`random` and `direct`: share kept."""
    random_per: Literal["epoch", "view"] = "epoch"
    """`random`: an image's mask is drawn anew in each epoch, or once for each of its views."""
    layers: tuple[int, ...] | None = None
    """`progressive`: blocks, 0-indexed, at which tokens are dropped; left out: 0, L/3 and 2L/3 (Section 4.1)."""
    at: Literal["output", "input"] = "output"
    """Similarity is taken at these blocks' output (PCAE) or input (the paper's text)."""
    source: Literal["online", "store"] = "store"
    """Computed in the step by the relation teacher, or read from `store`."""
    store: str = "masks"
    """Folder written by launch/precompute_masks.py."""
    in_teacher: Literal["full", "drop"] = "full"
    """`progressive`: the relation teacher runs on all patches and is masked afterwards (Eq. 1), or `drop` takes patches
    out on its way (PCAE), which changes what it says about the others and needs masks made online."""
    images_per_forward: int = Field(default=16, ge=1)
    """The mask teacher always runs on exactly this many images (the last group is filled up): a matrix product rounds
    by its shape, and a different rounding could keep a different token. Part of the store's fingerprint."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.in_teacher == "drop" and (self.strategy, self.source) != ("progressive", "online"):
            raise ValueError(
                "in_teacher drop needs strategy progressive and source online, since the teacher has to drop patches "
                f"in every step; got {self.strategy} and {self.source}"
            )
        return self

    @property
    def chosen_by_teacher(self) -> bool:
        """Whether the relation teacher chooses the tokens, ahead of training or in the step."""
        return self.strategy in ("direct", "progressive")

    @property
    def is_online(self) -> bool:
        """Whether the relation teacher chooses the tokens in the step."""
        return self.chosen_by_teacher and self.source == "online"

    @property
    def keeps_all(self) -> bool:
        """Whether the strategy's ratio drops nothing."""
        return (self.stage_keep_ratio if self.strategy == "progressive" else self.keep_ratio) == 1


class TargetsConfig(Section):
    """Where teacher targets come from."""

    source: Literal["online"] = "online"
    """Computed in the step."""


class LossConfig(Section):
    """Eq. 1."""

    alpha: float = Field(default=1.0, ge=0)
    """Weight of the relation term (Section 4.1; Table 12). The terms are not of one size at 1: with a trained DINOv2-S
    as teacher the scaled relation term is 8 times the feature term and its gradient 3.4 times; raw and merged, 467 and
    213 times. `log.gradient_norms_every` shows a run's own balance."""
    beta: float = Field(default=2.0, gt=0)
    """Smooth L1's change from square to line (dBOT, FD)."""
    target_norm: Literal["layer_norm", "none"] = "layer_norm"
    """Standardise each target token without affine parameters (dBOT, FD)."""
    cls: Literal["include", "exclude"] = "include"
    """The class token in the feature term, as one more token of the mean (dBOT, FD); where student or teacher has none,
    it is left out."""
    features_on: Literal["kept", "hidden", "all"] = "kept"
    """Patches at which features are compared. `hidden`: the dropped ones (dBOT, MAE, SimMIM); it and `all` need
    `student.mask_tokens` where there is a mask."""


class OptimConfig(Section):
    """AdamW and batch sizes; gradient accumulation is derived from them and the number of ranks."""

    global_batch_size: int = Field(default=1024, ge=1)
    """Images per optimizer step, over all ranks (Section 4.1)."""
    micro_batch_size: int = Field(default=32, ge=1)
    """Images that a rank forwards at once: what fits in memory."""
    lr: float = Field(default=6e-4, gt=0)
    """Peak learning rate (Section 4.1: 6e-4 at batch 1024); not rescaled by batch size."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW moments (dBOT)."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's denominator."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Not applied to norms, biases and tokens (Section 4.1)."""
    clip: float = Field(default=3.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""


class ScheduleConfig(Section):
    """Length and learning rate over time."""

    epochs: float = Field(default=40, gt=0)
    """Passes over the data (Section 4.1: 40 on ImageNet-21K)."""
    warmup_epochs: float = Field(default=2, ge=0)
    """Linear warm-up from 0 (EVA-L: a share of 2 in 150; dBOT's 40 would fill the run)."""
    min_lr: float = Field(default=0.0, ge=0)
    """Where the cosine ends."""
    stop_after: int | None = Field(default=None, ge=1)
    """Stop, with a checkpoint, after this step of the full schedule; the schedule itself does not change."""


class CheckpointConfig(Section):
    """When to save and how many to keep."""

    every_steps: int = Field(default=500, ge=1)
    """Optimizer steps between checkpoints; the last step always saves."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints that are kept."""


class LogConfig(Section):
    """Metrics."""

    every_steps: int = Field(default=20, ge=1)
    """Optimizer steps between lines of metrics.jsonl; losses are means over them."""
    gradient_norms_every: int = Field(default=0, ge=0)
    """Optimizer steps between measurements of how large a gradient each term of Eq. 1 sends to the tokens that enter
    the student's first relation block; 0: none. ZeRO-2 only."""


class EvaluationConfig(Section):
    """What is measured on held-out samples."""

    split: str = "val"
    """Manifest in `data.shards` that is held out; it may be absent."""
    neighbors: int = Field(default=5, ge=1)
    """k of the k-NN classifier."""
    attention_images: int = Field(default=64, ge=1)
    """Held-out images over which attention statistics are averaged."""


class PretrainConfig(Section):
    """launch/pretrain_teacher.py only."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """MAE: share of patches hidden from the encoder."""
    decoder_dim: int = Field(default=512, ge=1)
    decoder_depth: int = Field(default=8, ge=1)
    decoder_heads: int = Field(default=16, ge=1)
    """Sizes of MAE's decoder, thrown away afterwards."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Supervised: DeiT's."""
