"""DeepSpeed's private names stand in one file, so that an upgrade of DeepSpeed breaks one file."""

import ast
import re
import tomllib
from pathlib import Path

import deepspeed
import pytest

ROOT = Path(__file__).parents[2]
ALONE = "hdscale/engine/zero_internals.py"

# Of parameters, optimizers, loss scalers and modules of DeepSpeed; none is in its documentation.
PRIVATE_NAMES = {
    "_get_param_partition_rank",
    "_hp_mapping",
    "_lazy_init_hp_params_optimizer_state",
    "_z3_optimizer",
    "averaged_gradients",
    "bit16_groups",
    "cdb",
    "cur_hysteresis",
    "cur_iter",
    "cur_scale",
    "ds_id",
    "ds_numel",
    "ds_shape",
    "ds_status",
    "ds_tensor",
    "fetch_sub_module",
    "fp16_groups",
    "fp32_partitioned_groups_flat",
    "grad_partitions_flat_buffer",
    "ipg_buckets",
    "last_overflow_iter",
    "loss_scaler",
    "mpu",
    "round_robin_bit16_groups",
    "single_partition_of_fp32_groups",
    "sub_group_to_group_id",
}
PUBLIC_MODULES = {"deepspeed", "deepspeed.ops.adam", "deepspeed.utils"}


def sources():
    return sorted(path for folder in ("hdscale", "launch", "data_tools") for path in (ROOT / folder).rglob("*.py"))


def private_names(source: str) -> set[str]:
    """What a text takes from DeepSpeed's insides: attributes, also by `getattr`, and optimizers' optimizers."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found |= {node.attr} & PRIVATE_NAMES
            if node.attr == "optimizer" and isinstance(node.value, ast.Attribute) and node.value.attr == "optimizer":
                found.add("optimizer.optimizer")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & PRIVATE_NAMES
    return found


def deepspeed_modules(source: str) -> set[str]:
    """What a module's text imports of DeepSpeed; `from a.b import c` is an import of `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] == "deepspeed"}


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("share = parameter.ds_tensor.numel()", {"ds_tensor"}),
        ("count = getattr(parameter, 'ds_numel', 0)", {"ds_numel"}),
        ("states = engine.optimizer.optimizer.state", {"optimizer.optimizer"}),
        ("deepspeed.utils.groups.mpu = None", {"mpu"}),
        ("deepspeed.initialize(model=model, mpu=mesh)", set()),
        ("for group in engine.optimizer.param_groups: group['lr'] = lr", set()),
    ],
)
def test_a_private_name_is_found_however_it_is_written(line, names):
    assert private_names(line) == names


def test_private_names_of_deepspeed_stand_in_one_file():
    found = {str(path.relative_to(ROOT)): private_names(path.read_text()) for path in sources()}
    assert found.pop(ALONE) >= {"ds_numel", "fp16_groups", "bit16_groups", "cdb"}, "the names are still those in use"
    assert {path: names for path, names in found.items() if names} == {}


def private_functions():
    """What `zero_internals` says its functions rely on: names in backticks, and files of DeepSpeed."""
    tree = ast.parse((ROOT / ALONE).read_text())
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if docstring is not None and "Relies on" in docstring:
            said = docstring.partition("Relies on")[2]
            yield node.name, set(re.findall(r"`(?:\w+\.)?(\w+)`", said)), set(re.findall(r"[\w/]+\.(?:py|cpp)", said))


def test_a_function_says_of_each_private_name_in_it_that_it_relies_on_it():
    said = {name: names for name, names, _ in private_functions()}
    for node in ast.parse((ROOT / ALONE).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            used = private_names(ast.unparse(node)) - {"optimizer.optimizer"}
            assert used <= said.get(node.name, set()), node.name


@pytest.mark.parametrize(("function", "names", "files"), private_functions())
def test_what_a_function_relies_on_is_in_the_files_that_it_names(function, names, files):
    assert names, function
    assert files, function
    texts = {file: (Path(deepspeed.__file__).parent / file).read_text() for file in files}
    for name in names:
        assert any(re.search(rf"\b{name}\b", text) for text in texts.values()), (function, name)
    for file, text in texts.items():
        assert any(re.search(rf"\b{name}\b", text) for name in names), (function, file)


def test_deepspeed_is_imported_in_the_engine_and_its_private_modules_in_one_file():
    found = {str(path.relative_to(ROOT)): deepspeed_modules(path.read_text()) for path in sources()}
    assert "deepspeed.comm.comm" in found.pop(ALONE)
    outside = {path: names for path, names in found.items() if names and not path.startswith("hdscale/engine/")}
    assert outside == {}
    assert {path: names - PUBLIC_MODULES for path, names in found.items() if names - PUBLIC_MODULES} == {}


def test_the_import_contract_of_deepspeed_names_every_package_but_the_engine():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (one for one in contracts if one["name"] == "DeepSpeed is imported in the engine only")
    entries = [path for path in (ROOT / "hdscale").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    rooms = {f"hdscale.{path.stem}" for path in entries if path.stem != "__init__"}
    assert set(contract["source_modules"]) == rooms - {"hdscale.engine"}
