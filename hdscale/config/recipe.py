"""The recipe: all sections of a run, and what must be true of several of them together."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

# TeacherConfig is imported from here everywhere, as Recipe is: code outside of hdscale builds teachers by it. The other
# sections have their one import path in hdscale.config.sections.
from hdscale.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    LossConfig,
    MaskConfig,
    OptimConfig,
    PretrainConfig,
    RelationConfig,
    RunConfig,
    ScheduleConfig,
    Section,
    StudentConfig,
    TargetsConfig,
    TeacherConfig,
)


class Recipe(Section):
    """Everything that decides a run; `launch/recipes/*.yaml` and `key=value` arguments fill it."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    student: StudentConfig = StudentConfig()
    feature_teacher: TeacherConfig | None = TeacherConfig(source="open_clip", name="ViT-L-14", weights="openai")
    """Teacher of last-layer features: supervised or contrastive, or the MAE itself in the paper's Distill-MAE (T_m of
    Table 3); null: relations alone."""
    relation_teacher: TeacherConfig | None = TeacherConfig(source="timm", name="vit_large_patch16_224.mae")
    """MAE teacher of token relations and masks; null: the paper's baselines of one teacher (Table 9)."""
    relation: RelationConfig = RelationConfig()
    mask: MaskConfig = MaskConfig()
    targets: TargetsConfig = TargetsConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    pretrain: PretrainConfig = PretrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mask.is_online and self.relation_teacher is None:
            raise ValueError(f"mask.strategy {self.mask.strategy} with mask.source online needs a relation_teacher")
        if self.mask.chosen_by_teacher and self.mask.source == "store" and self.data.views == "fresh":
            raise ValueError("mask.source store needs a number of data.views; fresh views need mask.source online")
        if self.schedule.warmup_epochs >= self.schedule.epochs:
            raise ValueError(
                f"schedule.warmup_epochs must be below schedule.epochs {self.schedule.epochs:g}, "
                f"got {self.schedule.warmup_epochs:g}"
            )
        return self

    @model_validator(mode="after")
    def _check_mask_tokens(self) -> Self:
        """Refuse predictions that nobody makes, and mask tokens that stand for nothing."""
        strategy, tokens, patches = self.mask.strategy, self.student.mask_tokens, self.loss.features_on
        if strategy == "none" and tokens != "none":
            raise ValueError(f"student.mask_tokens {tokens} needs dropped patches: set mask.strategy, such as random")
        if patches == "hidden" and (strategy == "none" or self.mask.keeps_all):
            raise ValueError("loss.features_on hidden needs dropped patches: set mask.strategy and its ratio, or kept")
        if patches != "kept" and strategy != "none" and tokens == "none":
            raise ValueError(
                f"loss.features_on {patches} needs predictions at dropped patches: set student.mask_tokens to encoder "
                "or decoder"
            )
        if self.feature_teacher is None and (tokens == "decoder" or patches != "kept"):
            what = "student.mask_tokens decoder" if tokens == "decoder" else f"loss.features_on {patches}"
            raise ValueError(f"{what} needs a feature_teacher: its features are what is predicted")
        return self
