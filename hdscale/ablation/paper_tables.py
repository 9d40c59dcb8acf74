"""Tables 3 to 9 and 11 to 13 of the paper, with its figures; and all tables by the name that a person types."""

from __future__ import annotations

from hdscale.ablation.paper_figures import PAPER_FIGURES
from hdscale.ablation.table import Paper, Row, Table
from hdscale.errors import UserError

_NO_MASKS = "mask.strategy=none"
_T_C, _T_M = "T_c(x)", "T_m(x)"
_MASKED = ("mask.strategy=progressive", "mask.stage_keep_ratio=0.7")
_DEIT_AND_MAE = ("feature_teacher=@deit", "relation_teacher=@mae")
_CLIP_AND_MAE = ("feature_teacher=@clip", "relation_teacher=@mae")
_ABLATION, _MAIN = "schedule.epochs=@ablation", "schedule.epochs=@main"
_FD = ("student.init=fd", "student.rel_pos_bias=true", "student.pos_embed=none", "student.layer_scale=0.1")
_FD_TRAINING = (
    "data.crop_scale=[0.08,1.0]",
    "optim.betas=[0.9,0.999]",
    "schedule.warmup_epochs=10",
    "schedule.min_lr=1.0e-5",
)
_DBOT = (
    "mask.strategy=random",
    "mask.keep_ratio=0.25",
    "student.decoder=transformer",
    "student.decoder_depth=8",
    "student.mask_tokens=decoder",
    "loss.features_on=hidden",
    "schedule.epochs=@stage",
)
_DBOT_DECODER = ("student.decoder_dim=512", "student.decoder_heads=16")
_UNMASKED = (
    "No masks: the paper gives the same figures for this table's best row as for Table 8's row without masks, or, with "
    "CLIP, for Table 13's."
)
_SHALLOW_DECODER = "A decoder of 2 layers instead of 8, for a student of 4 instead of 12."


def _single(teacher: str) -> tuple[str, ...]:
    """Distil the features of one teacher alone."""
    return (f"feature_teacher=@{teacher}", "relation_teacher=null", _NO_MASKS)


_TABLE_3 = Table(
    "3",
    "combinations of two teachers, T_c: DeiT, T_m: MAE",
    "tc",
    (
        Row("tc", _T_C, _single("deit"), Paper(47.5, 41.8)),
        Row("tm", _T_M, _single("mae"), Paper(48.9, 43.1)),
        Row("tc+tc", "T_c(x) + T'_c(x)", ("feature_teacher=@deit", "relation_teacher=@deit"), Paper(46.8, 41.5)),
        Row("tm+tm", "T_m(x) + T'_m(x)", ("feature_teacher=@mae", "relation_teacher=@mae"), Paper(48.9, 43.2)),
        Row("tc+tm", "T_c(x) + T'_m(x)", _DEIT_AND_MAE, Paper(50.0, 43.9)),
    ),
    base=(_ABLATION, _NO_MASKS),
    notes=(_UNMASKED,),
)

_TABLE_4 = Table(
    "4",
    "combinations of two teachers, T_c: CLIP, T_m: MAE",
    "tc",
    (
        Row("tc", _T_C, _single("clip"), Paper(49.1, 43.1)),
        Row("tm", _T_M, _single("mae"), Paper(48.9, 43.1)),
        Row("tc+tc", "T_c(x) + T'_c(x)", ("feature_teacher=@clip", "relation_teacher=@clip"), Paper(49.1, 43.2)),
        Row("tc+tm", "T_c(x) + T'_m(x)", _CLIP_AND_MAE, Paper(50.4, 44.1)),
        Row(
            "tc+weak",
            "T_c(x) + T'_m(x)*",
            ("feature_teacher=@clip", "relation_teacher=@mae_weak", "loss.alpha=0.5"),
            Paper(49.5, 43.5),
        ),
    ),
    base=(_ABLATION, _NO_MASKS),
    notes=(
        _UNMASKED,
        "*: an MAE that was trained on ImageNet-100 for 100 epochs. The paper lowers its weight, and does not say to "
        "what; here loss.alpha is 0.5.",
    ),
    demo_notes=("*: an MAE of 5 epochs instead of 20.",),
)

_TABLE_5 = Table(
    "5",
    "distilling targets of T'_m(x), T_c: DeiT, T_m: MAE",
    "relation",
    (
        Row(
            "last",
            "T_m^i, both at the last layer",
            ("relation.target=features", "relation.layers=[-1]"),
            Paper(47.7, 42.1),
        ),
        Row("features", "T_m^i", ("relation.target=features",), Paper(49.6, 43.5)),
        Row("attention", "MSA_m^i", ("relation.target=attention",), Paper(49.8, 43.7)),
        Row("relation", "R_m^i", ("relation.target=relation",), Paper(50.0, 43.9)),
    ),
    base=(_ABLATION, *_DEIT_AND_MAE, _NO_MASKS),
    notes=(_UNMASKED,),
)

_TABLE_6 = Table(
    "6",
    "distilling targets of T'_m(x), T_c: CLIP, T_m: MAE",
    "relation",
    (
        Row("features", "T_m^i", ("relation.target=features",), Paper(49.9, 44.0)),
        Row("attention", "MSA_m^i", ("relation.target=attention",), Paper(50.1, 44.0)),
        Row("relation", "R_m^i", ("relation.target=relation",), Paper(50.4, 44.1)),
    ),
    base=(_ABLATION, *_CLIP_AND_MAE, _NO_MASKS),
    notes=(_UNMASKED,),
)


def _layers(key: str, layers: range, ap_box: float, ap_mask: float, demo: str) -> Row:
    """Count as the paper does, from 1; the recipe counts from 0."""
    blocks = ",".join(str(layer - 1) for layer in layers)
    return Row(key, key, (f"relation.layers=[{blocks}]",), Paper(ap_box, ap_mask), (f"relation.layers={demo}",))


_TABLE_7 = Table(
    "7",
    "distilling position of T_m",
    "10-11",
    (
        _layers("1-11", range(1, 12), 48.8, 43.0, "[0,1,2]"),
        _layers("1-3", range(1, 4), 47.4, 41.9, "[0]"),
        _layers("5-7", range(5, 8), 48.3, 42.7, "[1]"),
        _layers("9-11", range(9, 12), 49.8, 43.7, "[0,1,2]"),
        Row("10-11", "10-11", ("relation.layers=[-3,-2]",), Paper(50.0, 43.9)),
        _layers("11", range(11, 12), 49.2, 43.3, "[2]"),
    ),
    base=(_ABLATION, *_DEIT_AND_MAE, _NO_MASKS),
    notes=(_UNMASKED,),
    demo_notes=(
        "Of 4 layers, counted from 1: 1-3 for 1-11 and 9-11 (one run), 1 for 1-3, 2 for 5-7, 2-3 for 10-11, 3 for 11.",
    ),
)

_TABLE_8 = Table(
    "8",
    "the token masking strategy",
    "none",
    (
        Row("none", "No, 100 %", (_NO_MASKS,), Paper(50.0, 43.9)),
        Row("random", "Random, 35 %", ("mask.strategy=random", "mask.keep_ratio=0.35"), Paper(49.2, 43.3)),
        Row("direct", "Direct, 35 %", ("mask.strategy=direct", "mask.keep_ratio=0.35"), Paper(49.6, 43.7)),
        *(
            Row(
                f"progressive-{stage}",
                f"Progressive, {kept} % ({stage} %^3)",
                ("mask.strategy=progressive", f"mask.stage_keep_ratio=0.{stage // 10}"),
                paper,
            )
            for stage, kept, paper in (
                (50, 13, Paper(48.4, 42.8)),
                (70, 34, Paper(49.9, 43.8)),
                (90, 73, Paper(49.9, 43.8)),
            )
        ),
    ),
    base=(_ABLATION, *_DEIT_AND_MAE),
)


def _dbot(teacher: str, name: str, paper: Paper) -> tuple[Row, Row]:
    """Two stages: the first one's student teaches the second."""
    first, second = f"dbot-{teacher}-stage-1", f"dbot-{teacher}"

    def stage(key: str, title: str, taught_by: str, figures: Paper | None) -> Row:
        return Row(
            key,
            title,
            (f"feature_teacher=@{taught_by}", "feature_teacher.target=pre_norm", "relation_teacher=null", *_DBOT),
            figures,
            demo=("student.decoder_depth=2",),
            full=_DBOT_DECODER,
            against=f"distill-{teacher}",
        )

    return (
        stage(first, f"dBOT-{name}, first stage", teacher, None),
        stage(second, f"dBOT-{name}", f"student:{first}", paper),
    )


def _fd(teacher: str, name: str, paper: Paper) -> Row:
    full = (*_FD_TRAINING, f"student.drop_path={0.3 if teacher == 'deit' else 0.2}")
    return Row(f"fd-{teacher}", f"FD-{name}", (*_single(teacher), *_FD), paper, full=full, against=f"distill-{teacher}")


_TABLE_9 = Table(
    "9",
    "more baselines",
    "distill-deit",
    (
        Row("distill-deit", "Distill-DeiT", _single("deit"), Paper(47.7, 42.1, 47.3)),
        Row("distill-mae", "Distill-MAE", _single("mae"), Paper(49.1, 43.1, 47.8), against="distill-mae"),
        Row("distill-clip", "Distill-CLIP", _single("clip"), Paper(49.5, 43.5, 50.3), against="distill-clip"),
        _fd("deit", "DeiT", Paper(47.0, 41.6, 47.9)),
        _fd("mae", "MAE", Paper(48.1, 42.6, 47.0)),
        _fd("clip", "CLIP", Paper(49.2, 43.3, 50.5)),
        *_dbot("deit", "DeiT", Paper(47.5, 41.9, 47.9)),
        *_dbot("mae", "MAE", Paper(49.3, 43.5, 48.2)),
        Row("hybrid-deit", "Hybrid Distill, MAE + DeiT", (*_DEIT_AND_MAE, *_MASKED), Paper(50.3, 44.2, 49.1)),
        Row(
            "hybrid-clip",
            "Hybrid Distill, MAE + CLIP",
            (*_CLIP_AND_MAE, *_MASKED),
            Paper(50.6, 44.4, 51.5),
            against="distill-clip",
        ),
    ),
    base=(_MAIN,),
    notes=(
        "The paper says 300 epochs, not how many stages dBOT has: here two of half the epochs.",
        "Each row is compared with plain distillation from the same teacher.",
    ),
    demo_notes=(_SHALLOW_DECODER, "dBOT's stages have 18 epochs each, twice the others' in all."),
)

_TABLE_11 = Table(
    "11",
    "MAE and DINO as teachers",
    "distill-dino",
    (
        Row("mae", "MAE", (), Paper(48.4, 42.6), model="@mae"),
        Row("dino", "DINO", (), Paper(46.8, 41.5), model="@dino"),
        Row("distill-dino", "Distill-DINO", _single("dino"), Paper(47.5, 41.9)),
        Row("distill-mae", "Distill-MAE", _single("mae"), Paper(49.1, 43.1)),
        Row(
            "hybrid",
            "Hybrid Distill",
            ("feature_teacher=@dino", "relation_teacher=@mae", *_MASKED),
            Paper(49.6, 43.5),
        ),
    ),
    base=(_MAIN,),
)


_FIGURE_6 = _TABLE_11._replace(
    key="fig6",
    title="average head distance of (a) the DINO baseline, (b) Hybrid Distill with MAE and DINO as teachers",
    rows=tuple(row._replace(paper=None) for row in _TABLE_11.rows),
    notes=(
        "The paper's panels are (a) DINO and (b) Hybrid Distill; the other curves are those of Table 11's other rows.",
    ),
)


def _alphas(part: str, teachers: tuple[str, ...], figures: tuple[Paper, ...]) -> tuple[Row, ...]:
    alphas = ("0", "0.1", "0.3", "0.5", "0.7", "1.0")
    name = {"a": "DeiT", "b": "CLIP"}[part]
    return tuple(
        Row(
            f"{part}-{alpha}",
            f"({part}) {name}, alpha {alpha}",
            (*teachers, f"loss.alpha={alpha}"),
            paper,
            against=f"{part}-0",
        )
        for alpha, paper in zip(alphas, figures, strict=True)
    )


_TABLE_12 = Table(
    "12",
    "alpha, the weight of T'_m(x); (a) T_c: DeiT, (b) T_c: CLIP",
    "a-0",
    (
        *_alphas(
            "a",
            _DEIT_AND_MAE,
            (
                Paper(47.5, 41.8),
                Paper(48.2, 42.6),
                Paper(49.3, 43.4),
                Paper(49.3, 43.4),
                Paper(49.5, 43.5),
                Paper(50.0, 43.9),
            ),
        ),
        *_alphas(
            "b",
            _CLIP_AND_MAE,
            (
                Paper(49.1, 43.1),
                Paper(49.9, 43.8),
                Paper(49.8, 43.8),
                Paper(50.1, 43.9),
                Paper(50.2, 44.1),
                Paper(50.4, 44.1),
            ),
        ),
    ),
    base=(_ABLATION, _NO_MASKS),
    notes=(_UNMASKED,),
)


def _overfitting(teacher: str, teachers: tuple[str, ...], figures: dict[tuple[int, bool], Paper]) -> tuple[Row, ...]:
    """Rows of short and long runs, with and without masks; masks are compared at the same length."""
    rows = []
    for (epochs, masked), paper in figures.items():
        length = "schedule.epochs=@long" if epochs == 300 else _ABLATION
        masks = _MASKED if masked else (_NO_MASKS,)
        plain = f"{teacher}-100" if epochs == 100 or not masked else f"{teacher}-300"
        rows.append(
            Row(
                f"{teacher}-{epochs}{'-masked' if masked else ''}",
                f"MAE + {'DeiT' if teacher == 'deit' else 'CLIP'}, {epochs} epochs{', masked' if masked else ''}",
                (*teachers, length, *masks),
                paper,
                against=plain,
            )
        )
    return tuple(rows)


_TABLE_13 = Table(
    "13",
    "the token masking strategy for alleviating over-fitting",
    "deit-100",
    (
        *_overfitting(
            "deit",
            _DEIT_AND_MAE,
            {
                (100, False): Paper(50.0, 43.9),
                (300, False): Paper(50.0, 44.0),
                (100, True): Paper(49.9, 43.8),
                (300, True): Paper(50.3, 44.2),
            },
        ),
        *_overfitting(
            "clip",
            _CLIP_AND_MAE,
            {
                (100, False): Paper(50.4, 44.1),
                (300, False): Paper(50.2, 44.1),
                (100, True): Paper(50.2, 43.9),
                (300, True): Paper(50.6, 44.4),
            },
        ),
    ),
    notes=("Long runs without masks are compared with short ones, runs with masks with those without.",),
    demo_notes=("Epochs are the paper's; here 100 stands for the demo's 18 and 300 for 54.",),
)

_PAPER_TABLES = (
    _TABLE_3,
    _TABLE_4,
    _TABLE_5,
    _TABLE_6,
    _TABLE_7,
    _TABLE_8,
    _TABLE_9,
    _TABLE_11,
    _TABLE_12,
    _TABLE_13,
)

_FIGURES = sorted((*PAPER_FIGURES, _FIGURE_6), key=lambda table: table.key)

TABLES = {table.key: table for table in (*_PAPER_TABLES, *_FIGURES)}


def find_table(key: str) -> Table:
    """Return a table.

    Raises:
        UserError: there is none of this name.
    """
    if key not in TABLES:
        raise UserError(f"table must be one of {', '.join(TABLES)}, got {key}")
    return TABLES[key]
