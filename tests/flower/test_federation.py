"""The same experiment at sites: what a simulation computes, bit for bit, and what happens when answers are lost."""

import csv
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight import LossLandscape
from fedlight.cli.command import FederatedCLI
from fedlight.flower.server import serve
from fedlight.flower.sites import Sites
from tests.flower.fake import FakeTransport, nodes

CONFIGS = Path(__file__).parents[2] / "configs"

METHODS = {
    "FedDyn": ["--algorithm=FedDyn"],
    "SCAFFOLD+SAM": ["--algorithm=SCAFFOLD", "--perturbation=SAM"],
    "FedSMOO": ["--algorithm=FedSMOO"],
    "FedACG": ["--algorithm=FedACG"],
    "FedVARP": ["--algorithm=FedVARP"],
    "FedAdamW": ["--algorithm=FedAdamW", "--model.optimizer=AdamW"],
    "QFedAvg": ["--algorithm=QFedAvg"],
    "FedPer": ["--trainer.personal=head"],
    "Ditto+FedACG": ["--algorithm=FedACG", "--trainer.personal=Ditto"],
    "FineTune": ["--trainer.personal=FineTune"],
    "TopK, Quantize": ["--trainer.transforms+=TopK", "--trainer.transforms+=Quantize"],
    "Median": ["--trainer.aggregator=Median", "--trainer.transforms+=SignFlip"],
    "FedDC": ["--algorithm=FedDC"],
    "BatchNorm": ["--model=tests.flower.normed.Net"],
    "side by side": ["--data.num_clients=12", "--trainer.clients_per_round=10"],
    "privacy": ["--trainer.transforms+={class_path: DifferentialPrivacy, init_args: {noise_multiplier: 0.5}}"],
}


def simulated(folder, *arguments, rounds=2):
    """A simulation, and its configuration as an app's."""
    given = [
        *("fit", "-c", str(CONFIGS / "quickstart.yaml"), f"--trainer.default_root_dir={folder / 'simulated'}"),
        *(f"--trainer.max_rounds={rounds}", "--data.num_clients=4", "--trainer.clients_per_round=3"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_plots=false", "--trainer.devices=1"),
        "--model.init_args.net.init_args.hidden=[8]",
        *arguments,
    ]
    trainer = FederatedCLI(given).trainer
    config = yaml.safe_load((trainer.run_dir / "config.yaml").read_text())
    config.pop("ckpt_path", None)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return trainer


def rows(trainer):
    with (trainer.run_dir / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "sites/"))} for row in csv.DictReader(file)]


def assert_same(trainer, other):
    assert rows(trainer) == rows(other)
    mine, theirs = trainer.federation.state, other.federation.state
    for part in ("algorithm", "perturbation", "buffers", "views"):
        assert getattr(mine, part).keys() == getattr(theirs, part).keys()
        for name, value in getattr(mine, part).items():
            assert torch.equal(value, getattr(theirs, part)[name]), (part, name)


@pytest.mark.parametrize("method", [m if m == "FedDyn" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_sites_compute_what_a_simulation_computes(tmp_path, method):
    simulation = simulated(tmp_path, *METHODS[method], "--trainer.client_val_every_n_rounds=2")
    clients = list(map(str, range(simulation.federation.num_clients)))
    homes = [" ".join(clients[::2][::-1]), " ".join(clients[1::2])]
    transport = FakeTransport(tmp_path / "config.yaml", nodes(tmp_path, homes, allow="tests"))
    folder = tmp_path / "the server's folder, of a name so long that YAML would part it into lines, and whole"
    trainer = serve(tmp_path / "config.yaml", {"folder": str(folder)}, transport)
    assert trainer.run_dir.is_relative_to(folder)
    if simulation.personal.entries.any():  # which never leave their site
        assert rows(simulation)[-1].keys() == rows(trainer)[-1].keys()
        own = [k for k in rows(trainer)[-1] if k.startswith("clients/personal_")]
        assert own
        assert [r[k] for r in rows(simulation) for k in own] == [r[k] for r in rows(trainer) for k in own]
        shared = simulation.federation.state.algorithm["params"]
        assert torch.equal(shared, trainer.federation.state.algorithm["params"])
    else:
        assert_same(simulation, trainer)
    crossed = [v.nbytes for _, parcel in transport.asked for name, v in parcel.tensors.items()]
    assert sum(crossed) > 0


@pytest.mark.slow
def test_lost_answers_and_killed_nodes_leave_a_sound_state(tmp_path):
    """Σ c_i = N·c of SCAFFOLD, with answers lost at random, and nodes that are new ones from then on."""
    simulated(tmp_path, "--algorithm=SCAFFOLD", "--algorithm.weighting=equal", rounds=1)
    rng = random.Random(1)

    def lose(node, parcel):
        return "the answer was lost" if parcel.kind == "train" and rng.random() < 0.4 else None

    transport = FakeTransport(tmp_path / "config.yaml", nodes(tmp_path, ["0", "1", "2", "3"]), lose=lose)
    transport.rng = rng
    options = {"folder": str(tmp_path / "server"), "rounds": 6}
    with pytest.warns(UserWarning, match="goes on without clients .*: the answer was lost"):
        trainer = serve(tmp_path / "config.yaml", options, transport)
    side, state = trainer.federation.clients, trainer.federation.state
    total = torch.zeros_like(state.algorithm["control"], dtype=torch.float64)
    for client in range(4):
        (path,) = (tmp_path / f"site{client}").glob("*/client_*")
        if (used := side.round_of(client)) >= 0:
            total += torch.load(path / f"round_{used}.pt", weights_only=True)["algorithm"]["control"].double()
    torch.testing.assert_close(total / 4, state.algorithm["control"].double(), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_server_that_is_started_again_goes_on_with_the_same_bits(tmp_path):
    simulation = simulated(tmp_path, "--algorithm=FedDyn", rounds=4)
    transport = FakeTransport(tmp_path / "config.yaml", nodes(tmp_path, ["0", "1", "2 3"]))
    calls = 0

    def stop(node, parcel):
        nonlocal calls
        calls += parcel.kind == "train" and parcel.info["round"] == 2
        if calls == 2:
            raise KeyboardInterrupt
        return None

    transport.lose = stop
    options = {"folder": str(tmp_path / "server")}
    with pytest.raises(KeyboardInterrupt):
        serve(tmp_path / "config.yaml", options, transport)
    transport.lose = lambda node, parcel: None
    (sites,) = tmp_path.glob("server/**/sites.json")
    whole = sites.read_text()
    sites.write_text(whole[:20])
    with pytest.raises(MisconfigurationException, match="sites.json is damaged. Its `id` names what sites keep"):
        serve(tmp_path / "config.yaml", {**options, "resume": "last"}, transport)
    sites.write_text(whole)
    trainer = serve(tmp_path / "config.yaml", {**options, "resume": "last"}, transport)
    assert_same(simulation, trainer)


BAD = {
    "another shape": (lambda p: {"0/message/params": torch.zeros(3)}, {}, "is torch.float32 \\[3\\], and not"),
    "another type": (lambda p: {k: v.double() for k, v in p.tensors.items()}, {}, "is torch.float64"),
    "another name": (lambda p: {"0/message/other": torch.zeros(3)}, {}, "it has \\['other', 'params'\\]"),
    "other samples": (lambda p: {}, {"num_samples": 10**6}, "it counts 1000000 samples"),
    "endless steps": (lambda p: {}, {"lr_sum": float("nan")}, "steps .*nan"),
    "another site's": (lambda p: {}, None, "it answers for clients \\['0', '3'\\], and not \\['0'\\]"),
    "no figures": (lambda p: {}, {"lengths": None}, "its message is refused"),
    "not finite": (lambda p: {k: v * float("nan") for k, v in p.tensors.items() if "0/" in k}, {}, "left out clients"),
}


class Spoiling(FakeTransport):
    """Hands out all bad answers of client 0, one after the other, and notes what the server says of each."""

    def exchange(self, parcels, timeout):
        self.said = getattr(self, "said", [])
        for node, parcel in super().exchange(parcels, timeout):
            if parcel.kind != "train" or "0" not in parcel.info["clients"]:
                yield node, parcel
                continue
            for tensors, figures, _ in BAD.values():
                own = parcel.info["clients"]["0"]
                clients = {"0": own, "3": own} if figures is None else {"0": {**own, **figures}}
                info = {**parcel.info, "clients": clients}
                yield node, replace(parcel, info=info, tensors={**parcel.tensors, **tensors(parcel)})
                self.said.append(self.sites.missing.get(0, ""))


def test_messages_that_are_not_what_they_should_be_are_refused_by_name(tmp_path, monkeypatch):
    checked = []  # what the server alone measures, no site checks
    monkeypatch.setattr(LossLandscape, "check", lambda self, subject, view: checked.append(view))
    monkeypatch.setattr(LossLandscape, "on_train_end", lambda self, trainer, module: None)
    settings = ["--trainer.client_val_every_n_rounds=0", "--trainer.clients_per_round=4"]
    simulated(tmp_path, *settings, "--trainer.callbacks+=LossLandscape", rounds=1)
    transport = Spoiling(tmp_path / "config.yaml", nodes(tmp_path, ["0", "1 2 3"]))
    made = Sites.__init__
    monkeypatch.setattr(Sites, "__init__", lambda self, t, o: (made(self, t, o), setattr(t, "sites", self))[0])
    refused = pytest.warns(UserWarning, match="goes on without clients \\[0\\]: its message is refused")
    with pytest.warns(UserWarning, match="left out clients \\[0\\]"), refused:
        trainer = serve(tmp_path / "config.yaml", {"folder": str(tmp_path / "server")}, transport)
    for (_, _, match), said in zip(BAD.values(), transport.said, strict=True):
        assert re.search(match, said) or match == "left out clients"
    assert trainer.federation.clients.round_of(0) == -1
    assert [trainer.federation.clients.round_of(client) for client in (1, 2, 3)] == [0, 0, 0]
    assert torch.isfinite(trainer.federation.params).all()
    assert checked == ["server", "server"]  # in the simulation, and now


def test_a_site_with_too_little_memory_is_refused_before_training(tmp_path, monkeypatch):
    simulated(tmp_path, rounds=1)  # 610 parameters
    monkeypatch.setattr("fedlight.flower.client.free_memory", lambda device: 3 * 4 * 610)  # without a batch's graph
    transport = FakeTransport(tmp_path / "config.yaml", nodes(tmp_path, ["0 1 2 3"]))
    said = r"node 100 cannot take part: .*too little memory: 0.00732 MB of cpu are free, and training takes 0.0\d+ MB"
    with pytest.raises(MisconfigurationException, match=said):
        serve(tmp_path / "config.yaml", {"folder": str(tmp_path / "server")}, transport)
    assert [parcel.kind for _, parcel in transport.asked] == ["query"]


@pytest.mark.slow
def test_the_spectrum_over_sites_is_that_of_the_pooled_data(tmp_path):
    spectrum = "{class_path: HessianSpectrum, init_args: {every_n_rounds: 1, max_samples: null, float64: true, %s}}"
    quick = "density: false, trace: false, tolerance: 0.01, layerwise: [net.fc2]"
    simulation = simulated(tmp_path, f"--trainer.callbacks+={spectrum % quick}", rounds=1)
    transport = FakeTransport(tmp_path / "config.yaml", nodes(tmp_path, ["0 2", "3 1"]))
    options = {"folder": str(tmp_path / "server"), "spectrum": "sites"}
    trainer = serve(tmp_path / "config.yaml", options, transport)
    pooled, found = rows(simulation)[-1], rows(trainer)[-1]
    names = [name for name in pooled if name.startswith("hessian/") and "second" not in name]
    assert {"hessian/lambda_max", "hessian/sharpness", "hessian/loss"} <= {*names}
    for name in names:
        assert float(found[name]) == pytest.approx(float(pooled[name]), rel=1e-6, abs=1e-9), name
    assert sum(parcel.kind == "product" for _, parcel in transport.asked) >= 2 * 8


@pytest.mark.slow
def test_sites_with_data_of_their_own(tmp_path):
    """Three sites, of which each has its own file; the server has none."""
    simulated(tmp_path, rounds=1)
    configs = nodes(tmp_path, ["0", "1", "2"])
    rng = torch.Generator().manual_seed(0)
    for i, node in enumerate(configs.values()):
        images = torch.randint(0, 17, (30 + 10 * i, 8, 8), generator=rng)
        labels = torch.randint(0, 10, (len(images),), generator=rng)
        np.savez(tmp_path / f"site{i}.npz", x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
        node["source"] = str(tmp_path / f"site{i}.npz")
    transport = FakeTransport(tmp_path / "config.yaml", configs)
    options = {"folder": str(tmp_path / "server"), "data": "sites", "clients": 3, "rounds": 2}
    trainer = serve(tmp_path / "config.yaml", options, transport)
    row = rows(trainer)[-1]
    assert trainer.federation.sizes.tolist() == [30, 40, 50]
    clients = [trainer.client_val_metrics[client]["val/accuracy"] for client in range(3)]
    assert float(row["val/accuracy"]) == pytest.approx(sum(clients) / 3)  # 20 samples each
    assert float(row["clients/accuracy_mean"]) == pytest.approx(sum(clients) / 3)
