"""Figures 1 to 3, 5 and 7 to 9 of the paper: curves over layers, of which it prints no numbers.

Figure 6 shows rows of Table 11 and stands beside it.
"""

from __future__ import annotations

from hdscale.ablation.table import Row, Table

_DIRECT = ("relation_teacher=null", "mask.strategy=none")
_MASKED = ("mask.strategy=progressive", "mask.stage_keep_ratio=0.7")
_NO_DECODER, _LINEAR = ("student.decoder=identity",), ("student.decoder=linear",)
_SHALLOW = ("student.decoder_depth=2",)
_STUDENT_WIDTH = ("student.decoder_dim=768", "student.decoder_heads=12")
_DBOT_WIDTH = ("student.decoder_dim=512", "student.decoder_heads=16")
_EPOCHS = "schedule.epochs=@ablation"
_RECONSTRUCTION = (  # Section 2.4: mask tokens go through the encoder, and a linear head follows
    "mask.strategy=random",
    "mask.keep_ratio=0.4",
    "student.mask_tokens=encoder",
    "loss.features_on=hidden",
)
_FD = ("student.rel_pos_bias=true", "student.pos_embed=none", "student.layer_scale=0.1")
_SHALLOW_NOTE = "A decoder of 2 layers instead of 8, for a student of 4 instead of 12."
_DEPTH_NOTE = "The paper does not say how many layers this decoder has; here 8, dBOT's."
_WIDTH_NOTE = (
    "The paper does not say how wide this decoder is; here as wide as the student, with as many heads (ViT-B: 768 and "
    "12)."
)
_TEACHER_NOTE = "The paper does not name the teacher of this figure; here DeiT, as in Figure 2(a)."
_RATIO_NOTE = "The paper does not say how many tokens are hidden in the reconstruction; here 60 %, SimMIM's."


def _decoder(depth: int) -> tuple[str, ...]:
    return "student.decoder=transformer", f"student.decoder_depth={depth}"


def _decoders(teacher: str, name: str, panel: str) -> tuple[Row, ...]:
    """Rows of one teacher and three decoders."""
    shared, against = (f"feature_teacher=@{teacher}",), f"{teacher}-none"
    return (
        Row(f"{teacher}-none", f"({panel}) {name}, no decoder", (*shared, *_NO_DECODER), against=against),
        Row(f"{teacher}-linear", f"({panel}) {name}, linear", (*shared, *_LINEAR), against=against),
        Row(
            f"{teacher}-transformer",
            f"({panel}) {name}, transformer",
            (*shared, *_decoder(8)),
            demo=_SHALLOW,
            full=_STUDENT_WIDTH,
            against=against,
        ),
    )


PAPER_FIGURES = (
    Table(
        "fig1",
        "average head distance after feature distillation with various decoders",
        "deit-none",
        (
            Row("mae", "(a) MAE", model="@mae"),
            Row("deit", "(a) DeiT", model="@deit"),
            Row("clip", "(a) CLIP", model="@clip"),
            *_decoders("deit", "DeiT", "b"),
            *_decoders("clip", "CLIP", "c"),
        ),
        base=(_EPOCHS, *_DIRECT),
        notes=(_DEPTH_NOTE, _WIDTH_NOTE),
        demo_notes=(_SHALLOW_NOTE,),
    ),
    Table(
        "fig2",
        "NMI of (a) various decoders, (b) encoder and decoder, (c) mask feature reconstruction",
        "deit-none",
        (
            Row("deit", "DeiT", model="@deit"),
            *_decoders("deit", "DeiT", "a"),
            Row(
                "reconstruction", "(c) DeiT, mask reconstruction", ("feature_teacher=@deit", *_LINEAR, *_RECONSTRUCTION)
            ),
        ),
        base=(_EPOCHS, *_DIRECT),
        notes=(_DEPTH_NOTE, _WIDTH_NOTE, _RATIO_NOTE),
        demo_notes=(_SHALLOW_NOTE,),
    ),
    Table(
        "fig3",
        "average head distance of (a) encoder and decoder, (b) mask feature reconstruction",
        "direct",
        (
            Row("deit", "DeiT", model="@deit"),
            Row("transformer", "(a) transformer decoder", _decoder(8), demo=_SHALLOW, full=_STUDENT_WIDTH),
            Row("direct", "(b) direct distillation", _LINEAR),
            Row("reconstruction", "(b) mask reconstruction", (*_LINEAR, *_RECONSTRUCTION)),
        ),
        base=(_EPOCHS, "feature_teacher=@deit", *_DIRECT),
        notes=(_TEACHER_NOTE, _DEPTH_NOTE, _WIDTH_NOTE, _RATIO_NOTE),
        demo_notes=(_SHALLOW_NOTE,),
    ),
    Table(
        "fig5",
        "head distance and NMI of Hybrid Distill with MAE and CLIP teachers",
        "hybrid",
        (
            Row("mae", "MAE", model="@mae"),
            Row("clip", "CLIP", model="@clip"),
            Row("hybrid", "Hybrid Distill", _MASKED),
        ),
        base=("schedule.epochs=@main", "feature_teacher=@clip", "relation_teacher=@mae"),
        notes=("The attention pictures of panel (c) are not made here.",),
    ),
    Table(
        "fig7",
        "average head distance of (a) DeiT and of students with (b) symmetric and (c) asymmetric encoder",
        "symmetric",
        (
            Row("deit", "(a) DeiT", model="@deit"),
            Row("symmetric", "(b) symmetric encoder"),
            Row("asymmetric", "(c) asymmetric encoder", _FD),
        ),
        base=(_EPOCHS, "feature_teacher=@deit", *_DIRECT),
    ),
    Table(
        "fig8",
        "average head distance of dBOT with (a) direct feature distillation, (b) mask feature reconstruction",
        "direct",
        (
            Row("deit", "DeiT", model="@deit"),
            Row("direct", "(a) direct distillation", demo=_SHALLOW, full=_DBOT_WIDTH),
            Row(
                "reconstruction",
                "(b) mask reconstruction",
                (
                    "mask.strategy=random",
                    "mask.keep_ratio=0.25",
                    "student.mask_tokens=decoder",
                    "loss.features_on=hidden",
                ),
                demo=_SHALLOW,
                full=_DBOT_WIDTH,
            ),
        ),
        base=(_EPOCHS, "feature_teacher=@deit", "feature_teacher.target=pre_norm", *_DIRECT, *_decoder(8)),
        notes=(_TEACHER_NOTE, "One stage of dBOT, with dBOT's decoder and its target before the final norm."),
        demo_notes=(_SHALLOW_NOTE,),
    ),
    Table(
        "fig9",
        "average head distance of using (a) 1, (b) 4 and (c) 8 asymmetric decoder layers",
        "decoder-1",
        (
            Row("deit", "DeiT", model="@deit"),
            *(
                Row(f"decoder-{depth}", f"({panel}) {depth} decoder layers", _decoder(depth), full=_STUDENT_WIDTH)
                for depth, panel in ((1, "a"), (4, "b"), (8, "c"))
            ),
        ),
        base=(_EPOCHS, "feature_teacher=@deit", *_DIRECT),
        notes=(_TEACHER_NOTE, _WIDTH_NOTE),
    ),
)
