"""What crosses, what a site allows, and what it keeps."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.flower.client import SiteState, clients_of
from fedlight.flower.config import build, check_allowed
from fedlight.flower.messages import Parcel, part
from fedlight.trainer import FederatedTrainer

try:
    with warnings.catch_warnings(action="ignore"):  # and it sets environment variables, which a test must not
        from fedlight.flower import transport
except ImportError:
    transport = None

RUN = "0" * 32


def test_a_part_of_a_parcel_is_found_again():
    parcel = Parcel("train", {"round": 1}, part("a", {"x/y": torch.ones(3)}) | part("ab", {"x": torch.ones(2)}))
    assert {k: v.tolist() for k, v in parcel.part("a").items()} == {"x/y": [1, 1, 1]}
    assert parcel.num_bytes == 5 * 4 + len('{"round": 1}')


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model": {"class_path": "mymodels.Net"}}, "mymodels.Net"),
        ({"trainer": {"callbacks": [{"class_path": "os.system", "init_args": {}}]}}, "os.system"),
        ({"model": {"init_args": {"activation": "subprocess.run"}}}, "subprocess.run"),
        ({"model": {"class_path": "torchevil.Net"}}, "torchevil.Net"),
    ],
)
def test_classes_that_a_site_does_not_allow_are_named(config, named):
    with pytest.raises(MisconfigurationException, match=named):
        check_allowed(config)
    check_allowed(config, named.partition(".")[0])


def test_names_of_layers_files_and_known_classes_are_no_code():
    known = {"class_path": "torch.optim.SGD"}
    check_allowed({"model": known, "personal": ["net.head"], "data": {"source": "my.images.npz"}, "x": 1.5})


@pytest.mark.parametrize(("node", "clients"), [({"partition-ids": "0 3,6"}, [0, 3, 6]), ({"partition-id": 2}, [2])])
def test_the_clients_of_a_node(node, clients):
    assert clients_of(node) == clients


@pytest.mark.parametrize("node", [{}, {"partition-ids": "0 x"}, {"partition-ids": "1 1"}, {"partition-ids": "-1"}])
def test_nodes_without_clients_are_refused(node):
    with pytest.raises(MisconfigurationException, match="partition-ids"):
        clients_of(node)


def test_states_are_kept_until_the_server_cannot_go_back_to_them(tmp_path):
    state = SiteState(tmp_path, RUN, 3)
    assert state.load(-1) == {}
    for round in range(4):
        state.save(round, {"algorithm": {"h": torch.full((2,), float(round))}, "buffers": {}}, keep=min(round, 2))
    assert [p.name for p in sorted((tmp_path / RUN / "client_3").iterdir())] == ["round_2.pt", "round_3.pt"]
    assert state.load(2)["algorithm"]["h"].tolist() == [2, 2]
    with pytest.raises(FileNotFoundError, match="client 3: its state after round 1 is not in"):
        state.load(0)


def test_texts_of_options_are_what_they_are(tmp_path):
    config, folder = tmp_path / "config.yaml", f"{tmp_path}/{'a long: name #1 ' * 8}end"
    config.write_text(
        "model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}\ndata: {class_path: ImageData}"
    )
    found = build(config, FederatedTrainer, {"folder": folder, "rounds": 3}, site=False).trainer
    assert (str(found.default_root_dir), found.max_rounds) == (folder, 3)


@pytest.mark.parametrize("run", ["../../etc", "", "0" * 31 + "/"])
def test_a_run_cannot_write_elsewhere(tmp_path, run):
    with pytest.raises(ValueError, match="hexadecimal"):
        SiteState(tmp_path, run, 0)


@pytest.mark.skipif(transport is None, reason="needs fedlight[flower]")
def test_tensors_of_all_types_cross_flower_unchanged():
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
    tensors = {f"x/{kind}": (torch.randn(2, 3) * 5).to(kind) for kind in kinds} | {"x/0": torch.tensor(3)}
    parcel = Parcel("train", {"a": [1, None]}, tensors)
    back = transport.from_message(SimpleNamespace(content=transport._records(parcel)))
    assert (back.kind, back.info) == ("train", {"a": [1, None]})
    for name, value in tensors.items():
        assert back.tensors[name].dtype == value.dtype
        assert torch.equal(back.tensors[name], value), name
