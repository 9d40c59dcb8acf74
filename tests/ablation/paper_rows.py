"""Every row of every table and figure, typed from the paper's text: what tests/ablation/test_paper_rows.py expects.

A recipe is written here by its dotted fields, teachers by their names in TEACHERS; epochs are the paper's.
"""

# What every row has in common, unless it says otherwise (Equation 3, Section 4.1).
COMMON = {
    "student.init": "mae",  # dBOT
    "student.decoder": "linear",
    "student.decoder_depth": 8,
    "student.decoder_dim": None,
    "student.decoder_heads": None,
    "student.mask_tokens": "none",
    "student.rel_pos_bias": False,
    "student.pos_embed": "sincos",
    "student.layer_scale": None,
    "feature_teacher.target": "norm",
    "relation_teacher": None,
    "relation.target": "relation",
    "relation.layers": (-3, -2),
    "relation.scale": "scaled",
    "relation.heads": "per_head",
    "relation.token_head": "norm_linear",
    "mask.strategy": "none",
    "mask.keep_ratio": 0.35,
    "mask.stage_keep_ratio": 0.7,
    "mask.random_per": "epoch",  # dBOT, MAE
    "mask.source": "online",
    "loss.alpha": 1.0,
    "loss.cls": "include",  # dBOT, FD
    "loss.features_on": "kept",
}


def taught_by(features, relations, epochs, **more):
    named = {key.replace("__", "."): value for key, value in more.items()}
    return {"feature_teacher": features, "relation_teacher": relations, "schedule.epochs": epochs, **named}


def alone(teacher, epochs, **more):
    return taught_by(teacher, None, epochs, **more)


def both(features, epochs, **more):
    return taught_by(features, "mae", epochs, **more)


def relations(features, target, **more):
    return both(features, 100, relation__target=target, **more)


def masked(features, epochs, keep=0.7):
    return both(features, epochs, mask__strategy="progressive", mask__stage_keep_ratio=keep)


def decoder(teacher, kind, **more):
    return alone(teacher, 100, student__decoder=kind, **more)


def transformer(teacher, depth=8, width=768, heads=12, **more):
    sizes = {"decoder_depth": depth, "decoder_dim": width, "decoder_heads": heads}
    return decoder(teacher, "transformer", **{f"student__{name}": size for name, size in sizes.items()}, **more)


def fd(teacher, drop_path):
    settings = {
        "student.init": "fd",
        "student.rel_pos_bias": True,
        "student.pos_embed": "none",
        "student.layer_scale": 0.1,
        "student.drop_path": drop_path,
        "data.crop_scale": (0.08, 1.0),
        "optim.betas": (0.9, 0.999),
        "schedule.warmup_epochs": 10,
        "schedule.min_lr": 1e-5,
    }
    return alone(teacher, 300) | settings


def dbot(teacher):
    settings = {
        "feature_teacher.target": "pre_norm",
        "mask.strategy": "random",
        "mask.keep_ratio": 0.25,
        "student.decoder": "transformer",
        "student.decoder_depth": 8,
        "student.decoder_dim": 512,
        "student.decoder_heads": 16,
        "student.mask_tokens": "decoder",
        "loss.features_on": "hidden",
    }
    return alone(teacher, 150) | settings  # two stages of half the epochs


DBOT_TARGET = {"feature_teacher__target": "pre_norm"}
RECONSTRUCTION = {
    "mask__strategy": "random",
    "mask__keep_ratio": 0.4,
    "student__mask_tokens": "encoder",
    "loss__features_on": "hidden",
}

# Table or figure: key, label, (AP box, AP mask, mIoU), key of the row it is compared with, recipe.
# A recipe that names a feature teacher alone is of a row that measures this teacher as it is.
ROWS = {
    "3": [
        ("tc", "T_c(x)", (47.5, 41.8), "tc", alone("deit", 100)),
        ("tm", "T_m(x)", (48.9, 43.1), "tc", alone("mae", 100)),
        ("tc+tc", "T_c(x) + T'_c(x)", (46.8, 41.5), "tc", taught_by("deit", "deit", 100)),
        ("tm+tm", "T_m(x) + T'_m(x)", (48.9, 43.2), "tc", taught_by("mae", "mae", 100)),
        ("tc+tm", "T_c(x) + T'_m(x)", (50.0, 43.9), "tc", taught_by("deit", "mae", 100)),
    ],
    "4": [
        ("tc", "T_c(x)", (49.1, 43.1), "tc", alone("clip", 100)),
        ("tm", "T_m(x)", (48.9, 43.1), "tc", alone("mae", 100)),
        ("tc+tc", "T_c(x) + T'_c(x)", (49.1, 43.2), "tc", taught_by("clip", "clip", 100)),
        ("tc+tm", "T_c(x) + T'_m(x)", (50.4, 44.1), "tc", taught_by("clip", "mae", 100)),
        ("tc+weak", "T_c(x) + T'_m(x)*", (49.5, 43.5), "tc", taught_by("clip", "mae_in100", 100, loss__alpha=0.5)),
    ],
    "5": [
        (
            "last",
            "T_m^i, both at the last layer",
            (47.7, 42.1),
            "relation",
            relations("deit", "features", relation__layers=(-1,)),
        ),
        ("features", "T_m^i", (49.6, 43.5), "relation", relations("deit", "features")),
        ("attention", "MSA_m^i", (49.8, 43.7), "relation", relations("deit", "attention")),
        ("relation", "R_m^i", (50.0, 43.9), "relation", relations("deit", "relation")),
    ],
    "6": [
        ("features", "T_m^i", (49.9, 44.0), "relation", relations("clip", "features")),
        ("attention", "MSA_m^i", (50.1, 44.0), "relation", relations("clip", "attention")),
        ("relation", "R_m^i", (50.4, 44.1), "relation", relations("clip", "relation")),
    ],
    "7": [  # the paper counts layers from 1
        (
            "1-11",
            "1-11",
            (48.8, 43.0),
            "10-11",
            both("deit", 100, relation__layers=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)),
        ),
        ("1-3", "1-3", (47.4, 41.9), "10-11", both("deit", 100, relation__layers=(0, 1, 2))),
        ("5-7", "5-7", (48.3, 42.7), "10-11", both("deit", 100, relation__layers=(4, 5, 6))),
        ("9-11", "9-11", (49.8, 43.7), "10-11", both("deit", 100, relation__layers=(8, 9, 10))),
        ("10-11", "10-11", (50.0, 43.9), "10-11", both("deit", 100, relation__layers=(-3, -2))),
        ("11", "11", (49.2, 43.3), "10-11", both("deit", 100, relation__layers=(10,))),
    ],
    "8": [
        ("none", "No, 100 %", (50.0, 43.9), "none", both("deit", 100)),
        ("random", "Random, 35 %", (49.2, 43.3), "none", both("deit", 100, mask__strategy="random")),
        ("direct", "Direct, 35 %", (49.6, 43.7), "none", both("deit", 100, mask__strategy="direct")),
        ("progressive-50", "Progressive, 13 % (50 %^3)", (48.4, 42.8), "none", masked("deit", 100, 0.5)),
        ("progressive-70", "Progressive, 34 % (70 %^3)", (49.9, 43.8), "none", masked("deit", 100, 0.7)),
        ("progressive-90", "Progressive, 73 % (90 %^3)", (49.9, 43.8), "none", masked("deit", 100, 0.9)),
    ],
    "9": [
        ("distill-deit", "Distill-DeiT", (47.7, 42.1, 47.3), "distill-deit", alone("deit", 300)),
        ("distill-mae", "Distill-MAE", (49.1, 43.1, 47.8), "distill-mae", alone("mae", 300)),
        ("distill-clip", "Distill-CLIP", (49.5, 43.5, 50.3), "distill-clip", alone("clip", 300)),
        ("fd-deit", "FD-DeiT", (47.0, 41.6, 47.9), "distill-deit", fd("deit", 0.3)),
        ("fd-mae", "FD-MAE", (48.1, 42.6, 47.0), "distill-mae", fd("mae", 0.2)),
        ("fd-clip", "FD-CLIP", (49.2, 43.3, 50.5), "distill-clip", fd("clip", 0.2)),
        ("dbot-deit-stage-1", "dBOT-DeiT, first stage", None, "distill-deit", dbot("deit")),
        ("dbot-deit", "dBOT-DeiT", (47.5, 41.9, 47.9), "distill-deit", dbot("student:dbot-deit-stage-1")),
        ("dbot-mae-stage-1", "dBOT-MAE, first stage", None, "distill-mae", dbot("mae")),
        ("dbot-mae", "dBOT-MAE", (49.3, 43.5, 48.2), "distill-mae", dbot("student:dbot-mae-stage-1")),
        ("hybrid-deit", "Hybrid Distill, MAE + DeiT", (50.3, 44.2, 49.1), "distill-deit", masked("deit", 300)),
        ("hybrid-clip", "Hybrid Distill, MAE + CLIP", (50.6, 44.4, 51.5), "distill-clip", masked("clip", 300)),
    ],
    "11": [
        ("mae", "MAE", (48.4, 42.6), "distill-dino", {"feature_teacher": "mae"}),
        ("dino", "DINO", (46.8, 41.5), "distill-dino", {"feature_teacher": "dino"}),
        ("distill-dino", "Distill-DINO", (47.5, 41.9), "distill-dino", alone("dino", 300)),
        ("distill-mae", "Distill-MAE", (49.1, 43.1), "distill-dino", alone("mae", 300)),
        ("hybrid", "Hybrid Distill", (49.6, 43.5), "distill-dino", masked("dino", 300)),
    ],
    "12": [
        ("a-0", "(a) DeiT, alpha 0", (47.5, 41.8), "a-0", both("deit", 100, loss__alpha=0)),
        ("a-0.1", "(a) DeiT, alpha 0.1", (48.2, 42.6), "a-0", both("deit", 100, loss__alpha=0.1)),
        ("a-0.3", "(a) DeiT, alpha 0.3", (49.3, 43.4), "a-0", both("deit", 100, loss__alpha=0.3)),
        ("a-0.5", "(a) DeiT, alpha 0.5", (49.3, 43.4), "a-0", both("deit", 100, loss__alpha=0.5)),
        ("a-0.7", "(a) DeiT, alpha 0.7", (49.5, 43.5), "a-0", both("deit", 100, loss__alpha=0.7)),
        ("a-1.0", "(a) DeiT, alpha 1.0", (50.0, 43.9), "a-0", both("deit", 100, loss__alpha=1)),
        ("b-0", "(b) CLIP, alpha 0", (49.1, 43.1), "b-0", both("clip", 100, loss__alpha=0)),
        ("b-0.1", "(b) CLIP, alpha 0.1", (49.9, 43.8), "b-0", both("clip", 100, loss__alpha=0.1)),
        ("b-0.3", "(b) CLIP, alpha 0.3", (49.8, 43.8), "b-0", both("clip", 100, loss__alpha=0.3)),
        ("b-0.5", "(b) CLIP, alpha 0.5", (50.1, 43.9), "b-0", both("clip", 100, loss__alpha=0.5)),
        ("b-0.7", "(b) CLIP, alpha 0.7", (50.2, 44.1), "b-0", both("clip", 100, loss__alpha=0.7)),
        ("b-1.0", "(b) CLIP, alpha 1.0", (50.4, 44.1), "b-0", both("clip", 100, loss__alpha=1)),
    ],
    "13": [
        ("deit-100", "MAE + DeiT, 100 epochs", (50.0, 43.9), "deit-100", both("deit", 100)),
        ("deit-300", "MAE + DeiT, 300 epochs", (50.0, 44.0), "deit-100", both("deit", 300)),
        ("deit-100-masked", "MAE + DeiT, 100 epochs, masked", (49.9, 43.8), "deit-100", masked("deit", 100)),
        ("deit-300-masked", "MAE + DeiT, 300 epochs, masked", (50.3, 44.2), "deit-300", masked("deit", 300)),
        ("clip-100", "MAE + CLIP, 100 epochs", (50.4, 44.1), "clip-100", both("clip", 100)),
        ("clip-300", "MAE + CLIP, 300 epochs", (50.2, 44.1), "clip-100", both("clip", 300)),
        ("clip-100-masked", "MAE + CLIP, 100 epochs, masked", (50.2, 43.9), "clip-100", masked("clip", 100)),
        ("clip-300-masked", "MAE + CLIP, 300 epochs, masked", (50.6, 44.4), "clip-300", masked("clip", 300)),
    ],
    "fig1": [
        ("mae", "(a) MAE", None, "deit-none", {"feature_teacher": "mae"}),
        ("deit", "(a) DeiT", None, "deit-none", {"feature_teacher": "deit"}),
        ("clip", "(a) CLIP", None, "deit-none", {"feature_teacher": "clip"}),
        ("deit-none", "(b) DeiT, no decoder", None, "deit-none", decoder("deit", "identity")),
        ("deit-linear", "(b) DeiT, linear", None, "deit-none", decoder("deit", "linear")),
        ("deit-transformer", "(b) DeiT, transformer", None, "deit-none", transformer("deit")),
        ("clip-none", "(c) CLIP, no decoder", None, "clip-none", decoder("clip", "identity")),
        ("clip-linear", "(c) CLIP, linear", None, "clip-none", decoder("clip", "linear")),
        ("clip-transformer", "(c) CLIP, transformer", None, "clip-none", transformer("clip")),
    ],
    "fig2": [
        ("deit", "DeiT", None, "deit-none", {"feature_teacher": "deit"}),
        ("deit-none", "(a) DeiT, no decoder", None, "deit-none", decoder("deit", "identity")),
        ("deit-linear", "(a) DeiT, linear", None, "deit-none", decoder("deit", "linear")),
        ("deit-transformer", "(a) DeiT, transformer", None, "deit-none", transformer("deit")),
        (
            "reconstruction",
            "(c) DeiT, mask reconstruction",
            None,
            "deit-none",
            decoder("deit", "linear", **RECONSTRUCTION),
        ),
    ],
    "fig3": [
        ("deit", "DeiT", None, "direct", {"feature_teacher": "deit"}),
        ("transformer", "(a) transformer decoder", None, "direct", transformer("deit")),
        ("direct", "(b) direct distillation", None, "direct", decoder("deit", "linear")),
        (
            "reconstruction",
            "(b) mask reconstruction",
            None,
            "direct",
            decoder("deit", "linear", **RECONSTRUCTION),
        ),
    ],
    "fig5": [
        ("mae", "MAE", None, "hybrid", {"feature_teacher": "mae"}),
        ("clip", "CLIP", None, "hybrid", {"feature_teacher": "clip"}),
        ("hybrid", "Hybrid Distill", None, "hybrid", masked("clip", 300)),
    ],
    "fig6": [  # its panels are (a) and (b); the others are Table 11's
        ("mae", "MAE", None, "distill-dino", {"feature_teacher": "mae"}),
        ("dino", "DINO", None, "distill-dino", {"feature_teacher": "dino"}),
        ("distill-dino", "Distill-DINO", None, "distill-dino", alone("dino", 300)),
        ("distill-mae", "Distill-MAE", None, "distill-dino", alone("mae", 300)),
        ("hybrid", "Hybrid Distill", None, "distill-dino", masked("dino", 300)),
    ],
    "fig7": [
        ("deit", "(a) DeiT", None, "symmetric", {"feature_teacher": "deit"}),
        ("symmetric", "(b) symmetric encoder", None, "symmetric", alone("deit", 100)),
        (
            "asymmetric",
            "(c) asymmetric encoder",
            None,
            "symmetric",
            alone("deit", 100, student__rel_pos_bias=True, student__pos_embed="none", student__layer_scale=0.1),
        ),
    ],
    "fig8": [
        ("deit", "DeiT", None, "direct", {"feature_teacher": "deit"}),
        ("direct", "(a) direct distillation", None, "direct", transformer("deit", 8, 512, 16, **DBOT_TARGET)),
        (
            "reconstruction",
            "(b) mask reconstruction",
            None,
            "direct",
            transformer(
                "deit",
                8,
                512,
                16,
                **DBOT_TARGET,
                mask__strategy="random",
                mask__keep_ratio=0.25,
                student__mask_tokens="decoder",
                loss__features_on="hidden",
            ),
        ),
    ],
    "fig9": [
        ("deit", "DeiT", None, "decoder-1", {"feature_teacher": "deit"}),
        ("decoder-1", "(a) 1 decoder layers", None, "decoder-1", transformer("deit", 1)),
        ("decoder-4", "(b) 4 decoder layers", None, "decoder-1", transformer("deit", 4)),
        ("decoder-8", "(c) 8 decoder layers", None, "decoder-1", transformer("deit", 8)),
    ],
}
HEADINGS = {
    "3": "Table 3: combinations of two teachers, T_c: DeiT, T_m: MAE",
    "4": "Table 4: combinations of two teachers, T_c: CLIP, T_m: MAE",
    "5": "Table 5: distilling targets of T'_m(x), T_c: DeiT, T_m: MAE",
    "6": "Table 6: distilling targets of T'_m(x), T_c: CLIP, T_m: MAE",
    "7": "Table 7: distilling position of T_m",
    "8": "Table 8: the token masking strategy",
    "9": "Table 9: more baselines",
    "11": "Table 11: MAE and DINO as teachers",
    "12": "Table 12: alpha, the weight of T'_m(x); (a) T_c: DeiT, (b) T_c: CLIP",
    "13": "Table 13: the token masking strategy for alleviating over-fitting",
    "fig1": "Figure 1: average head distance after feature distillation with various decoders",
    "fig2": "Figure 2: NMI of (a) various decoders, (b) encoder and decoder, (c) mask feature reconstruction",
    "fig3": "Figure 3: average head distance of (a) encoder and decoder, (b) mask feature reconstruction",
    "fig5": "Figure 5: head distance and NMI of Hybrid Distill with MAE and CLIP teachers",
    "fig6": (
        "Figure 6: average head distance of (a) the DINO baseline, (b) Hybrid Distill with MAE and DINO as teachers"
    ),
    "fig7": (
        "Figure 7: average head distance of (a) DeiT and of students with (b) symmetric and (c) asymmetric encoder"
    ),
    "fig8": (
        "Figure 8: average head distance of dBOT with (a) direct feature distillation, (b) mask feature reconstruction"
    ),
    "fig9": "Figure 9: average head distance of using (a) 1, (b) 4 and (c) 8 asymmetric decoder layers",
}

# On the demo's student of 4 layers some rows are scaled down; other methods' own sizes and optimisers are left out.
ON_THE_DEMO = {
    ("7", "1-11"): {"relation.layers": (0, 1, 2)},
    ("7", "1-3"): {"relation.layers": (0,)},
    ("7", "5-7"): {"relation.layers": (1,)},
    ("7", "9-11"): {"relation.layers": (0, 1, 2)},
    ("7", "11"): {"relation.layers": (2,)},
    ("9", "dbot-deit-stage-1"): {"student.decoder_depth": 2},
    ("9", "dbot-deit"): {"student.decoder_depth": 2},
    ("9", "dbot-mae-stage-1"): {"student.decoder_depth": 2},
    ("9", "dbot-mae"): {"student.decoder_depth": 2},
    ("fig1", "deit-transformer"): {"student.decoder_depth": 2},
    ("fig1", "clip-transformer"): {"student.decoder_depth": 2},
    ("fig2", "deit-transformer"): {"student.decoder_depth": 2},
    ("fig3", "transformer"): {"student.decoder_depth": 2},
    ("fig8", "direct"): {"student.decoder_depth": 2},
    ("fig8", "reconstruction"): {"student.decoder_depth": 2},
}
NOT_ON_THE_DEMO = (
    "student.drop_path",
    "student.decoder_dim",
    "student.decoder_heads",
    "data.crop_scale",
    "optim.betas",
    "schedule.warmup_epochs",
    "schedule.min_lr",
)
