"""What readers refuse: pickles, and indices that point elsewhere."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat import cli
from qat.errors import UserError
from qat.runtime import load_packed
from qat.tensor_files import read_json
from tests.qat.artifacts import make_artifact


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("files") / "artifact")


@pytest.fixture
def artifact(source, tmp_path):
    return shutil.copytree(source, tmp_path / "artifact")


def write_index(artifact, weight_map):
    path = artifact / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickle_in_the_place_of_safetensors(artifact, capsys, name):
    """The weights are whole, and not loaded all the same."""
    torch.save(load_file(artifact / "model.safetensors"), artifact / name)
    (artifact / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"has {name} and no safetensors"):
        load_packed(artifact)
    assert cli.main(["generate", str(artifact), "the"]) == 2
    assert "Pickles can run code when they are loaded" in capsys.readouterr().err


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("protocol", [2, 4, "zip"])
def test_pickle_under_the_name_of_safetensors(artifact, tmp_path, protocol):
    mark = tmp_path / "mark"
    path = artifact / "model.safetensors"
    if protocol == "zip":
        torch.save(Bomb(mark), path)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=protocol))
    with pytest.raises(UserError, match=r"model\.safetensors: a pickle under the name of a safet"):
        load_packed(artifact)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "ABSOLUTE", "a/../../x.safetensors",
                                  "..\\x.safetensors", "C:\\x.safetensors", "", 3])  # fmt: skip
def test_index_that_points_elsewhere(artifact, tmp_path, capsys, name):
    """The file is there and whole, and it is not opened."""
    elsewhere = tmp_path / "x.safetensors"
    shutil.copy(artifact / "model.safetensors", elsewhere)
    name = str(elsewhere) if name == "ABSOLUTE" else name
    tensors = load_file(artifact / "model.safetensors")
    write_index(artifact, dict.fromkeys(tensors, name))
    with pytest.raises(UserError, match="which is no file of this directory"):
        load_packed(artifact)
    assert cli.main(["generate", str(artifact), "the"]) == 2
    assert "Get the model from a source that you trust" in capsys.readouterr().err


def test_index_that_names_a_pickle(artifact):
    tensors = load_file(artifact / "model.safetensors")
    torch.save(tensors, artifact / "pytorch_model.bin")
    write_index(artifact, dict.fromkeys(tensors, "pytorch_model.bin"))
    with pytest.raises(UserError, match=r"no safetensors file\. Pickles can run code"):
        load_packed(artifact)


def test_index_of_another_form(artifact):
    path = artifact / "model.safetensors.index.json"
    path.write_text('{"weight_map": ["model.safetensors"]}')
    with pytest.raises(UserError, match="weight_map is no table"):
        load_packed(artifact)
    path.write_text("[]")
    with pytest.raises(UserError, match="a JSON object is expected"):
        read_json(path)


def test_shards_in_a_folder_of_the_artifact_are_read(artifact):
    tensors = load_file(artifact / "model.safetensors")
    (artifact / "model.safetensors").unlink()
    (artifact / "part").mkdir()
    names = sorted(tensors)
    parts = {"part/a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, artifact / file)
    write_index(artifact, {name: file for file, chosen in parts.items() for name in chosen})
    assert load_packed(artifact, torch.float32).lm_head.weight.shape[0] > 0
